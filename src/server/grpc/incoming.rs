//! Messages as they come. They are read here and not by tonic, which would keep what has come of a message, and a buffer of
//! the largest one for as long as a stream is open, without asking whether there is memory for them.

use std::marker::PhantomData;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use http_body_util::BodyExt;
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};

use crate::server::error::ServerError;
use crate::server::memory::{take_above, take_waiting};
use crate::server::state::AppState;

/// Before each message: whether it is compressed, and its length.
const HEAD_LEN: usize = 5;

/// How long a message may still take to come once the service has begun to stop.
const LAST_MESSAGES: Duration = Duration::from_millis(500);

/// The messages of a client.
pub(super) struct Messages<Req> {
    app: AppState,
    body: Body,
    /// What has come of the body and is not read: never more than a frame of HTTP/2.
    rest: Bytes,
    /// Bytes that a message may have without a share of the memory for large ones.
    small: usize,
    message: PhantomData<fn() -> Req>,
}

/// A message and its share of the memory, which is to be held while its content is.
pub(super) type Received<Req> = (Req, Option<OwnedSemaphorePermit>);

impl<Req: Message + Default> Messages<Req> {
    pub(super) fn of(app: &AppState, request: Request, small: usize) -> Self {
        Self { app: app.clone(), body: request.into_body(), rest: Bytes::new(), small, message: PhantomData }
    }

    /// The next message, `None` after the last. Its memory is taken as soon as its length is known, before it comes.
    pub(super) async fn next(&mut self) -> Result<Option<Received<Req>>, ServerError> {
        let mut head = Vec::with_capacity(HEAD_LEN);
        self.read(HEAD_LEN, &mut head).await?;
        let (is_compressed, len) = match head[..] {
            [] => return Ok(None),
            [flag, a, b, c, d] => (flag != 0, u32::from_be_bytes([a, b, c, d]) as usize),
            _ => return Err(cut()),
        };
        if is_compressed {
            return Err(ServerError::Message("it is compressed".to_owned()));
        }
        let limit = self.app.config.payload_limit;
        if len > limit {
            return Err(ServerError::BodyTooLarge { limit });
        }
        let memory = take_above(self.small, &self.app, len)?;
        let waits = memory.is_none() && self.rest.len() < len;
        let _waiting = waits.then(|| take_waiting(&self.app, 0, len)).transpose()?;
        let mut bytes = Vec::with_capacity(len);
        // A stream may say nothing for hours, but not in the middle of a message: it holds memory for the rest of it.
        let limit = self.app.config.body_timeout;
        let reading = timeout(limit, self.read(len, &mut bytes));
        reading.await.unwrap_or(Err(ServerError::BodyTimeout { limit }))?;
        if bytes.len() < len {
            return Err(cut());
        }
        let message = Req::decode(bytes.as_slice()).map_err(|error| ServerError::Message(error.to_string()))?;
        Ok(Some((message, memory)))
    }

    /// The same for a call of many messages and one answer, which is given up when the service stops and the rest of its
    /// messages do not come at once: its client may take its time.
    pub(super) async fn next_of_many(&mut self) -> Result<Option<Received<Req>>, ServerError> {
        let app = self.app.clone();
        let stopped = async {
            app.readiness.draining().await;
            sleep(LAST_MESSAGES).await;
        };
        tokio::select! {
            received = self.next() => received,
            () = stopped => Err(ServerError::DRAINING),
        }
    }

    /// Fills `out` up to `len` bytes, or as far as the body goes.
    async fn read(&mut self, len: usize, out: &mut Vec<u8>) -> Result<(), ServerError> {
        loop {
            let n_bytes = self.rest.len().min(len - out.len());
            out.extend_from_slice(&self.rest.split_to(n_bytes));
            if out.len() == len {
                return Ok(());
            }
            let Some(frame) = self.body.frame().await else { return Ok(()) };
            // Trailers say nothing to a server.
            self.rest = frame.map_err(|_| ServerError::Body)?.into_data().unwrap_or_default();
        }
    }
}

fn cut() -> ServerError {
    ServerError::Message("it is cut off".to_owned())
}
