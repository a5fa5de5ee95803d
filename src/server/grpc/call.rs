//! Calls of one message to the server, and of one from it. (Streams both ways are in `stream.rs`.)

use axum::extract::Request;
use axum::response::Response;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::context::{Context, Head};
use super::failed;
use super::incoming::{Messages, Received};
use super::outgoing::{Answer, Sending, respond};
use crate::server::error::ServerError;
use crate::server::extract::SMALL_BODY;
use crate::server::state::AppState;

/// Refuses what nobody here can read.
pub(super) fn check_encoding(request: &Request) -> Result<(), Status> {
    match request.headers().get("grpc-encoding") {
        Some(encoding) if encoding != "identity" => {
            let mut status = Status::unimplemented("messages must not be compressed");
            status.metadata_mut().insert("grpc-accept-encoding", "identity".parse().expect("it is ASCII"));
            Err(status)
        }
        _ => Ok(()),
    }
}

/// The message of a client that sends one. It has to come in time. (A stream of messages has no such time: its client may have
/// nothing to ask for hours. That it is there at all is what the connection's pings find out.)
async fn only<Req: Message + Default>(app: &AppState, request: Request) -> Result<Received<Req>, ServerError> {
    let limit = app.config.body_timeout;
    let mut messages = Messages::of(app, request, SMALL_BODY);
    let received = timeout(limit, messages.next()).await.unwrap_or(Err(ServerError::BodyTimeout { limit }))?;
    received.ok_or_else(|| ServerError::Message("there is none".to_owned()))
}

fn one<Res: Message + Default + 'static>(app: &AppState, answer: Result<Answer<Res>, ServerError>) -> Response {
    match answer {
        Ok(Answer { message, memory }) => respond(Sending::new(tokio_stream::once((Ok(message), memory)))),
        Err(error) => failed(app, &error).into_response(),
    }
}

/// A message in, a message out.
pub(super) async fn unary<Req, Res, F, Fut>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(Context, Req) -> Fut,
    Fut: Future<Output = Result<Answer<Res>, ServerError>>,
{
    if let Err(status) = check_encoding(&request) {
        return status.into_http();
    }
    let answering = async {
        let head = Head::of(&app, &request)?;
        let (message, memory) = only(&app, request).await?;
        answer(head.context(memory)?, message).await
    };
    one(&app, answering.await)
}

/// Messages in, one message out.
pub(super) async fn client_streaming<Req, Res, F, Fut>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(Head, Messages<Req>) -> Fut,
    Fut: Future<Output = Result<Answer<Res>, ServerError>>,
{
    if let Err(status) = check_encoding(&request) {
        return status.into_http();
    }
    let answering = async {
        let head = Head::of(&app, &request)?;
        answer(head, Messages::of(&app, request, 0)).await
    };
    one(&app, answering.await)
}

/// A message in, messages out.
pub(super) async fn server_streaming<Req, Res, F>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(AppState, Req) -> mpsc::Receiver<Result<Res, Status>>,
{
    if let Err(status) = check_encoding(&request) {
        return status.into_http();
    }
    match only(&app, request).await {
        Ok((message, _)) => respond(ReceiverStream::new(answer(app, message))),
        Err(error) => failed(&app, &error).into_response(),
    }
}
