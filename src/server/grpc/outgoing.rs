//! Answers on their way to the client.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::Stream;
use tonic::Status;
use tonic::codec::{Codec, EncodeBody, SingleMessageCompressionOverride};
use tonic_prost::ProstCodec;

/// Bytes that a connection is given at once. It takes whatever it is given, asks for the next while the client may have taken
/// nothing, and only then waits: what it is given must be little.
const PIECE: usize = 16 * 1024;

/// What answers a message.
pub(super) struct Answer<Res> {
    pub(super) message: Res,
    /// Its share of the memory, to be held until it has been sent.
    pub(super) memory: Option<OwnedSemaphorePermit>,
}

impl<Res> From<Res> for Answer<Res> {
    fn from(message: Res) -> Self {
        Self { message, memory: None }
    }
}

/// The response whose body is these messages, up to the first failure.
pub(super) fn respond<Res>(answers: impl Stream<Item = Result<Res, Status>> + Send + 'static) -> Response
where
    Res: Message + Default + 'static,
{
    let encoder = ProstCodec::<Res, Res>::default().encoder();
    let body = EncodeBody::new_server(encoder, answers, None, SingleMessageCompressionOverride::default(), None);
    let body = Body::new(InPieces { body: Body::new(body), rest: Bytes::new() });
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"))], body).into_response()
}

/// A body whose large frames are given piece by piece.
struct InPieces {
    body: Body,
    rest: Bytes,
}

impl hyper::body::Body for InPieces {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            let next = ready!(Pin::new(&mut self.body).poll_frame(context));
            let Some(Ok(frame)) = next else { return Poll::Ready(next) };
            match frame.into_data() {
                Ok(data) if data.len() > PIECE => self.rest = data,
                Ok(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            }
        }
        let n_bytes = self.rest.len().min(PIECE);
        // Copied, as a part of the whole would keep all of it.
        let piece = Bytes::copy_from_slice(&self.rest.split_to(n_bytes));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

/// Messages with what is held for them, `H`. The next message is asked for when the last one is with the connection but for
/// some pieces; what is held for it is let go then.
pub(super) struct Sending<S, H> {
    answers: S,
    held: Option<H>,
}

impl<S, H> Sending<S, H> {
    pub(super) fn new(answers: S) -> Self {
        Self { answers, held: None }
    }
}

impl<S, H, Res> Stream for Sending<S, H>
where
    S: Stream<Item = (Result<Res, Status>, H)> + Unpin,
    H: Unpin,
{
    type Item = Result<Res, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.held = None;
        let next = ready!(Pin::new(&mut self.answers).poll_next(context));
        Poll::Ready(next.map(|(answer, held)| {
            self.held = Some(held);
            answer
        }))
    }
}
