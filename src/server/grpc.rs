//! The gRPC service of Text Embeddings Inference, and gRPC's health service.
//!
//! It is served by the same connections, layers and handlers' parts as HTTP with JSON; only messages and statuses differ.

mod call;
mod context;
mod incoming;
pub mod messages;
mod outgoing;
mod service;
mod stream;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use tonic::{Code, Status};

use super::error::{ErrorClass, ServerError};
use super::layers;
use super::state::AppState;
use crate::telemetry::events;
use call::{client_streaming, server_streaming, unary};
use stream::streaming;

/// Declares a handler per method: its path, how it is called, and what answers it.
macro_rules! methods {
    ($router:expr, $($path:literal => $call:ident($answer:path),)+) => {
        $router$(.route($path, post(|State(app): State<AppState>, request: Request| $call(app, request, $answer))))+
    };
}

/// The whole gRPC service, without a socket.
#[allow(clippy::needless_pass_by_value, reason = "the router keeps the state; a handle is what callers have")]
pub fn grpc_router(state: AppState) -> Router {
    let routes = methods!(
        Router::new(),
        "/tei.v1.Info/Info" => unary(service::info),
        "/tei.v1.Embed/Embed" => unary(service::embed),
        "/tei.v1.Embed/EmbedStream" => streaming(service::embed),
        "/tei.v1.Embed/EmbedSparse" => unary(service::embed_sparse),
        "/tei.v1.Embed/EmbedSparseStream" => streaming(service::embed_sparse),
        "/tei.v1.Embed/EmbedAll" => unary(service::embed_all),
        "/tei.v1.Embed/EmbedAllStream" => streaming(service::embed_all),
        "/tei.v1.Predict/Predict" => unary(service::predict),
        "/tei.v1.Predict/PredictStream" => streaming(service::predict),
        "/tei.v1.Predict/PredictPair" => unary(service::predict_pair),
        "/tei.v1.Predict/PredictPairStream" => streaming(service::predict_pair),
        "/tei.v1.Rerank/Rerank" => unary(service::rerank),
        "/tei.v1.Rerank/RerankStream" => client_streaming(service::rerank_stream),
        "/tei.v1.Tokenize/Tokenize" => unary(service::tokenize),
        "/tei.v1.Tokenize/TokenizeStream" => streaming(service::tokenize),
        "/tei.v1.Tokenize/Decode" => unary(service::decode),
        "/tei.v1.Tokenize/DecodeStream" => streaming(service::decode),
        "/grpc.health.v1.Health/Check" => unary(service::health),
        "/grpc.health.v1.Health/Watch" => server_streaming(service::watch_health),
    );
    let unknown = || async { Status::unimplemented("there is no such method").into_http::<Body>() };
    layers::around_grpc(routes.fallback(unknown).with_state(state.clone()), &state)
}

/// What an error is in gRPC, as Text Embeddings Inference has it where it has it.
fn code_of(class: ErrorClass) -> Code {
    match class {
        ErrorClass::Malformed | ErrorClass::Empty | ErrorClass::Validation | ErrorClass::UnsupportedMediaType => {
            Code::InvalidArgument
        }
        ErrorClass::Unauthorized => Code::Unauthenticated,
        ErrorClass::NotFound => Code::NotFound,
        ErrorClass::MethodNotAllowed => Code::Unimplemented,
        ErrorClass::RequestTimeout | ErrorClass::Deadline => Code::DeadlineExceeded,
        ErrorClass::Tokenizer | ErrorClass::Backend => Code::FailedPrecondition,
        ErrorClass::PayloadTooLarge => Code::OutOfRange,
        ErrorClass::Overloaded => Code::ResourceExhausted,
        ErrorClass::Internal => Code::Internal,
        ErrorClass::Unavailable => Code::Unavailable,
    }
}

/// Marks the response of a stream: what counts is its messages, each when it is answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streamed;

/// The status code by which the metrics count a response: its own, unless it has a status of gRPC.
pub(crate) fn counted_code(response: &Response) -> u16 {
    if let Some(&CountedAs(code)) = response.extensions().get() {
        return code;
    }
    match Status::from_header_map(response.headers()) {
        // There is no such method, or none for such messages.
        Some(status) if status.code() == Code::Unimplemented => ErrorClass::MethodNotAllowed.words().status.as_u16(),
        _ => response.status().as_u16(),
    }
}

/// On a response: the status code by which the metrics count it. A code of gRPC says less than an error is.
#[derive(Debug, Clone, Copy)]
struct CountedAs(u16);

/// A failure as its client is told of it, and the status code by which the metrics count it: that which it has over HTTP.
#[derive(Debug)]
struct Failure {
    status: Status,
    code: u16,
}

impl Failure {
    /// With the time to retry after where there is one.
    fn of(error: &ServerError) -> Self {
        let mut status = Status::new(code_of(error.class()), error.to_string());
        if let Some(retry_after) = error.retry_after() {
            status.metadata_mut().insert("retry-after", retry_after.as_secs().max(1).into());
        }
        Self { status, code: error.class().words().status.as_u16() }
    }

    fn into_response(self) -> Response {
        let mut response = self.status.into_http();
        response.extensions_mut().insert(CountedAs(self.code));
        response
    }
}

/// The answer of a request that no handler saw.
pub(crate) fn refusal(error: &ServerError) -> Response {
    Failure::of(error).into_response()
}

/// The failure of an error that a handler met; counts it as the layers count others.
fn failed(app: &AppState, error: &ServerError) -> Failure {
    if let Some(reason) = error.reject_reason() {
        events::rejected(&app.metrics, reason);
    }
    Failure::of(error)
}
