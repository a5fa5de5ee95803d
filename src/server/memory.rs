//! The memory for large bodies and answers: one for all requests, of which each holds its share. Smaller bodies have another,
//! so that they are taken while large ones are refused.

use std::sync::Arc;

use axum::body::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::error::ServerError;
use super::state::AppState;

/// A share of the memory for large bodies and answers, in whole KiB. What is larger than all of it takes all of it.
pub(crate) fn take_memory(app: &AppState, n_bytes: usize) -> Result<OwnedSemaphorePermit, ServerError> {
    let n_kib = n_bytes.div_ceil(1024).min(app.config.max_body_bytes / 1024);
    let n_kib = u32::try_from(n_kib).expect("`max_body_bytes` fits 32 bits: AppState::new");
    Arc::clone(&app.body_memory).try_acquire_many_owned(n_kib).map_err(|_| ServerError::BodyMemory)
}

/// The same for what has more than `small` bytes; what has less takes none.
pub(crate) fn take_above(
    small: usize,
    app: &AppState,
    n_bytes: usize,
) -> Result<Option<OwnedSemaphorePermit>, ServerError> {
    if n_bytes > small { take_memory(app, n_bytes).map(Some) } else { Ok(None) }
}

/// Bytes of small bodies that may wait for their rest, with so many for large ones.
pub(crate) fn waiting_bytes(max_body_bytes: usize) -> usize {
    (max_body_bytes / 4).max(1 << 20)
}

/// Bytes of a body that need no memory while they wait: the usual request stays possible while others have taken all of it.
pub(crate) const FREE: usize = 4096;

/// Memory for `n_bytes` more of a small body, of which there are `before` already, while it waits for its rest, which its client may
/// take its time to send. One that comes whole needs none.
pub(crate) fn take_waiting(app: &AppState, before: usize, n_bytes: usize) -> Result<OwnedSemaphorePermit, ServerError> {
    let n_bytes = (before + n_bytes).saturating_sub(before.max(FREE));
    let n_bytes = u32::try_from(n_bytes).map_err(|_| ServerError::BodyMemory)?;
    Arc::clone(&app.waiting_memory).try_acquire_many_owned(n_bytes).map_err(|_| ServerError::BodyMemory)
}

/// Two shares as one.
pub(crate) fn merged(
    first: Option<OwnedSemaphorePermit>,
    second: Option<OwnedSemaphorePermit>,
) -> Option<OwnedSemaphorePermit> {
    match (first, second) {
        (Some(mut first), Some(second)) => {
            first.merge(second);
            Some(first)
        }
        (first, second) => first.or(second),
    }
}

/// Bytes that hold their share for as long as any of them are there, be it in a connection's buffers.
pub(crate) fn held(bytes: impl Into<Bytes>, memory: Option<OwnedSemaphorePermit>) -> Bytes {
    let bytes = bytes.into();
    match memory {
        Some(memory) => Bytes::from_owner(Held { bytes, _memory: memory }),
        None => bytes,
    }
}

struct Held {
    bytes: Bytes,
    _memory: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::testing::state;

    #[tokio::test]
    async fn bytes_hold_their_share_to_the_last_of_them() {
        let app = state();
        let all = app.body_memory.available_permits();
        let shares = merged(take_above(10, &app, 11).unwrap(), Some(take_memory(&app, 2000).unwrap()));
        let mut bytes = held(vec![7; 100], shares);
        assert_eq!(app.body_memory.available_permits(), all - 3);
        let rest = bytes.split_off(90);
        drop(bytes);
        assert_eq!((app.body_memory.available_permits(), &rest[..]), (all - 3, &[7; 10][..]));
        drop(rest);
        assert_eq!(app.body_memory.available_permits(), all);
        assert!(merged(take_above(10, &app, 10).unwrap(), None).is_none());
    }
}
