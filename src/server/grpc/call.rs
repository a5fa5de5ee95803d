//! The four kinds of gRPC calls, from messages in to messages out.

use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use hyper::body::Frame;
use prost::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::Streaming;
use tonic::server::Grpc;
use tonic::{Code, Request as GrpcRequest, Response as GrpcResponse, Status};
use tonic_prost::ProstCodec;

use super::failed;
use crate::server::error::ServerError;
use crate::server::extract::{Clock, Target, asked_model};
use crate::server::state::AppState;

/// Messages of a stream that are computed at once.
const WINDOW: usize = 32;

/// What a call is about, besides its messages.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) target: Target,
    pub(super) clock: Clock,
}

impl Context {
    fn of(app: &AppState, request: &Request) -> Result<Self, ServerError> {
        let headers = request.headers();
        let model = app.models.find(asked_model(request.uri(), headers)?.as_deref(), None)?;
        let mut clock = Clock::of(app, request.extensions().get(), headers)?;
        if let Some(timeout) = grpc_timeout(headers)? {
            clock.deadline = clock.start.checked_add(timeout);
        }
        Ok(Self { target: Target { app: app.clone(), model }, clock })
    }

    /// The same for a message that comes now: a stream may be open for hours, its messages have a deadline each unless
    /// the client has set one for the whole.
    fn for_message(&self, has_deadline: bool) -> Self {
        let start = Instant::now();
        let default = self.target.app.config.default_timeout;
        let deadline =
            if has_deadline { self.clock.deadline } else { default.and_then(|limit| start.checked_add(limit)) };
        Self { target: self.target.clone(), clock: Clock { start, deadline, trace: self.clock.trace.clone() } }
    }
}

/// `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, ServerError> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parse = || {
        let text = value.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8 && !digits.starts_with('+'))?;
        Some(match unit {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    };
    let invalid = || ServerError::Value { field: "grpc-timeout", reason: "must be digits and a unit".to_owned() };
    parse().map(Some).ok_or_else(invalid)
}

fn codec<Req: Message + Default + 'static, Res: Message + Default + 'static>(
    app: &AppState,
) -> Grpc<ProstCodec<Res, Req>> {
    Grpc::new(ProstCodec::default()).max_decoding_message_size(app.config.payload_limit)
}

fn respond(response: axum::http::Response<tonic::body::Body>) -> Response {
    response.map(Body::new)
}

/// A body that fails when it has not ended in time. (A stream of messages has no such time: its client may have nothing to
/// ask for hours. That it is there at all is what the connection's pings find out.)
struct TimedBody {
    body: Body,
    app: AppState,
    limit: Pin<Box<Sleep>>,
}

impl TimedBody {
    fn of(app: &AppState, request: Request) -> Request {
        let app = app.clone();
        let limit = Box::pin(sleep(app.config.body_timeout));
        request.map(|body| Body::new(Self { body, app, limit }))
    }
}

impl hyper::body::Body for TimedBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        ready!(self.limit.as_mut().poll(context));
        let error = ServerError::BodyTimeout { limit: self.app.config.body_timeout };
        Poll::Ready(Some(Err(failed(&self.app, &error).into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// The next message of a client. One that cannot be read is the client's mistake, which tonic calls an internal error.
pub(super) async fn next<Req>(app: &AppState, messages: &mut Streaming<Req>) -> Result<Option<Req>, Status> {
    messages.message().await.map_err(|status| match status.code() {
        Code::Internal | Code::Unknown => failed(app, &ServerError::Message(status.message().to_owned())),
        _ => status,
    })
}

/// The message of a client that sends one.
async fn only<Req>(app: &AppState, messages: GrpcRequest<Streaming<Req>>) -> Result<Req, Status> {
    let message = next(app, &mut messages.into_inner()).await?;
    message.ok_or_else(|| failed(app, &ServerError::Message("there is none".to_owned())))
}

/// A message in, a message out.
pub(super) async fn unary<Req, Res, F, Fut>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(Context, Req) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = Result<Res, ServerError>> + Send,
{
    let context = match Context::of(&app, &request) {
        Ok(context) => context,
        Err(error) => return failed(&app, &error).into_http(),
    };
    let of_call = app.clone();
    let service = tower::service_fn(move |messages: GrpcRequest<Streaming<Req>>| {
        let (app, context) = (of_call.clone(), context.clone());
        async move {
            match answer(context, only(&app, messages).await?).await {
                Ok(message) => Ok(GrpcResponse::new(message)),
                Err(error) => Err(failed(&app, &error)),
            }
        }
    });
    respond(codec::<Req, Res>(&app).client_streaming(service, TimedBody::of(&app, request)).await)
}

/// Ends a message's work when its stream is left.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Messages in, as many messages out, in their order; up to [`WINDOW`] of them are computed at once.
pub(super) async fn streaming<Req, Res, F, Fut>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(Context, Req) -> Fut + Copy + Send + Sync + 'static,
    Fut: Future<Output = Result<Res, ServerError>> + Send + 'static,
{
    let context = match Context::of(&app, &request) {
        Ok(context) => context,
        Err(error) => return failed(&app, &error).into_http(),
    };
    let has_deadline = request.headers().contains_key("grpc-timeout");
    let of_call = app.clone();
    let service = tower::service_fn(move |messages: GrpcRequest<Streaming<Req>>| {
        let (app, context) = (of_call.clone(), context.clone());
        async move {
            let mut messages = messages.into_inner();
            let (started, mut running) = mpsc::channel::<AbortOnDrop<Result<Res, Status>>>(WINDOW);
            let (out, answers) = mpsc::channel(1);
            // Both tasks end when the client leaves: its stream drops `answers`, and so on backwards.
            tokio::spawn(async move {
                loop {
                    let work = match next(&app, &mut messages).await {
                        Ok(None) => return,
                        Ok(Some(message)) => {
                            let (app, context) = (app.clone(), context.for_message(has_deadline));
                            tokio::spawn(
                                async move { answer(context, message).await.map_err(|error| failed(&app, &error)) },
                            )
                        }
                        // Not readable: told in its place, and the end.
                        Err(status) => tokio::spawn(async move { Err(status) }),
                    };
                    if started.send(AbortOnDrop(work)).await.is_err() {
                        return;
                    }
                }
            });
            tokio::spawn(async move {
                while let Some(mut work) = running.recv().await {
                    let answer = tokio::select! {
                        answer = &mut work.0 => answer.unwrap_or_else(|_| Err(Status::internal("internal error"))),
                        // What is computed for a client that has left is given up at once.
                        () = out.closed() => return,
                    };
                    let ends = answer.is_err();
                    if out.send(answer).await.is_err() || ends {
                        return;
                    }
                }
            });
            Ok(GrpcResponse::new(ReceiverStream::new(answers)))
        }
    });
    respond(codec::<Req, Res>(&app).streaming(service, request).await)
}

/// Messages in, one message out.
pub(super) async fn client_streaming<Req, Res, F, Fut>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(Context, Streaming<Req>) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = Result<Result<Res, ServerError>, Status>> + Send,
{
    let context = match Context::of(&app, &request) {
        Ok(context) => context,
        Err(error) => return failed(&app, &error).into_http(),
    };
    let of_call = app.clone();
    let service = tower::service_fn(move |messages: GrpcRequest<Streaming<Req>>| {
        let (app, context) = (of_call.clone(), context.clone());
        async move {
            match answer(context, messages.into_inner()).await? {
                Ok(message) => Ok(GrpcResponse::new(message)),
                Err(error) => Err(failed(&app, &error)),
            }
        }
    });
    respond(codec::<Req, Res>(&app).client_streaming(service, request).await)
}

/// A message in, messages out.
pub(super) async fn server_streaming<Req, Res, F>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(AppState, Req) -> mpsc::Receiver<Result<Res, Status>> + Copy + Send + 'static,
{
    let of_call = app.clone();
    let service = tower::service_fn(move |messages: GrpcRequest<Streaming<Req>>| {
        let app = of_call.clone();
        async move {
            let message = only(&app, messages).await?;
            Ok::<_, Status>(GrpcResponse::new(ReceiverStream::new(answer(app, message))))
        }
    });
    respond(codec::<Req, Res>(&app).streaming(service, TimedBody::of(&app, request)).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit() {
        let timeout = |text: &str| {
            let headers = HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]);
            grpc_timeout(&headers)
        };
        for (text, millis) in
            [("2H", 7_200_000), ("3M", 180_000), ("4S", 4000), ("5m", 5), ("6000u", 6), ("7000000n", 7)]
        {
            assert_eq!(timeout(text).unwrap(), Some(Duration::from_millis(millis)), "{text}");
        }
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1.5S"] {
            assert!(timeout(wrong).is_err(), "{wrong}");
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()).unwrap(), None);
    }
}
