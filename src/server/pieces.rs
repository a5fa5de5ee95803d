//! An answer that is written piece by piece, as the connection takes it.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use hyper::body::Frame;
use tokio::sync::OwnedSemaphorePermit;

/// The body of what `next` writes, which tells whether it was the last piece. `memory` is held until then.
pub(crate) fn body<F>(memory: Option<OwnedSemaphorePermit>, next: F) -> Body
where
    F: FnMut() -> (Vec<u8>, bool) + Send + Unpin + 'static,
{
    Body::new(Pieces { next, _memory: memory, ended: false, rest: false })
}

struct Pieces<F> {
    next: F,
    _memory: Option<OwnedSemaphorePermit>,
    ended: bool,
    /// Whether to let other tasks run before the next piece: the connection would take one after the other.
    rest: bool,
}

impl<F: FnMut() -> (Vec<u8>, bool) + Unpin> hyper::body::Body for Pieces<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if std::mem::replace(&mut self.rest, true) {
            self.rest = false;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let (out, ended) = (self.next)();
        self.ended = ended;
        Poll::Ready(Some(Ok(Frame::data(out.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
