//! Every way a request can fail, and the only status codes of the service.
//!
//! An error becomes a response in one place: [`ServerError`] puts itself into the extensions of an empty response, and
//! `layers.rs` writes the body, in the words of the route's clients.

mod kinds;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::telemetry::Route;

pub use kinds::ServerError;
pub(crate) use kinds::shortened;

/// The status code of what is no error.
pub(crate) const OK: u16 = StatusCode::OK.as_u16();

/// What an error is to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorClass {
    /// Not JSON, or not readable.
    Malformed,
    /// Nothing given.
    Empty,
    /// Key missing or wrong.
    Unauthorized,
    /// No such route or model.
    NotFound,
    /// Wrong method.
    MethodNotAllowed,
    /// The body took too long.
    RequestTimeout,
    /// The body is too large.
    PayloadTooLarge,
    /// The body is of another type.
    UnsupportedMediaType,
    /// The request means nothing valid.
    Validation,
    /// The tokenizer failed on it.
    Tokenizer,
    /// The model failed.
    Backend,
    /// Come again later.
    Overloaded,
    /// A bug.
    Internal,
    /// Not now: starting, stopping or broken.
    Unavailable,
    /// The deadline passed.
    Deadline,
}

/// A class in the words of the wire.
#[derive(Debug, Clone, Copy)]
pub struct ClassWords {
    /// Status code.
    pub status: StatusCode,
    /// `error_type` of Text Embeddings Inference, with names of our own where it has none.
    pub error_type: &'static str,
    /// `type` of OpenAI.
    pub openai_type: &'static str,
    /// What the OpenAPI document says.
    pub description: &'static str,
}

impl ErrorClass {
    /// All classes.
    pub const ALL: [Self; 15] = [
        Self::Malformed,
        Self::Empty,
        Self::Unauthorized,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::PayloadTooLarge,
        Self::UnsupportedMediaType,
        Self::Validation,
        Self::Tokenizer,
        Self::Backend,
        Self::Overloaded,
        Self::Internal,
        Self::Unavailable,
        Self::Deadline,
    ];

    /// The table of classes.
    #[must_use]
    pub const fn words(self) -> ClassWords {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        let (status, error_type, openai_type, description) = match self {
            Self::Malformed => {
                (StatusCode::BAD_REQUEST, "Validation", INVALID, "The body is not JSON, or not readable")
            }
            Self::Empty => (StatusCode::BAD_REQUEST, "Empty", INVALID, "Nothing was given"),
            Self::Unauthorized => {
                (StatusCode::UNAUTHORIZED, "Unauthorized", INVALID, "The API key is missing or wrong")
            }
            Self::NotFound => (StatusCode::NOT_FOUND, "NotFound", INVALID, "There is no such route or model"),
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", INVALID, "The route does not take this method")
            }
            Self::RequestTimeout => {
                (StatusCode::REQUEST_TIMEOUT, "Timeout", INVALID, "The body took too long to arrive")
            }
            Self::PayloadTooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLarge", INVALID, "The body is too large")
            }
            Self::UnsupportedMediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "UnsupportedMediaType",
                INVALID,
                "The body is not declared as JSON",
            ),
            Self::Validation => {
                (StatusCode::UNPROCESSABLE_ENTITY, "Validation", INVALID, "The request means nothing valid")
            }
            Self::Tokenizer => {
                (StatusCode::UNPROCESSABLE_ENTITY, "Tokenizer", INVALID, "The tokenizer cannot handle the input")
            }
            Self::Backend => (StatusCode::FAILED_DEPENDENCY, "Backend", SERVER, "The model failed"),
            Self::Overloaded => (
                StatusCode::TOO_MANY_REQUESTS,
                "Overloaded",
                "rate_limit_error",
                "The service is overloaded; retry after the time in `retry-after`",
            ),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "Internal", SERVER, "A bug of the service"),
            Self::Unavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "Unhealthy", SERVER, "The service is starting, stopping or broken")
            }
            Self::Deadline => (StatusCode::GATEWAY_TIMEOUT, "Timeout", SERVER, "The deadline passed"),
        };
        ClassWords { status, error_type, openai_type, description }
    }

    /// The classes that `route` can answer with, from a request of the method it takes.
    #[must_use]
    pub const fn of(route: Route) -> &'static [Self] {
        match route {
            Route::Embed
            | Route::EmbedAll
            | Route::Similarity
            | Route::OpenAiEmbeddings
            | Route::Embeddings
            | Route::Predict
            | Route::Rerank
            | Route::CohereRerank
            | Route::CohereRerank2
            | Route::Infer
            | Route::GrpcEmbed
            | Route::GrpcPredict
            | Route::GrpcRerank
            | Route::GrpcTokenize
            | Route::Root => &[
                Self::Malformed,
                Self::Empty,
                Self::Unauthorized,
                Self::NotFound,
                Self::RequestTimeout,
                Self::PayloadTooLarge,
                Self::UnsupportedMediaType,
                Self::Validation,
                Self::Tokenizer,
                Self::Backend,
                Self::Overloaded,
                Self::Internal,
                Self::Unavailable,
                Self::Deadline,
            ],
            // Without the model, which is all that can fail in the backend.
            Route::Tokenize | Route::Decode => &[
                Self::Malformed,
                Self::Empty,
                Self::Unauthorized,
                Self::NotFound,
                Self::RequestTimeout,
                Self::PayloadTooLarge,
                Self::UnsupportedMediaType,
                Self::Validation,
                Self::Tokenizer,
                Self::Overloaded,
                Self::Internal,
                Self::Unavailable,
                Self::Deadline,
            ],
            Route::Model | Route::Info | Route::InferenceModel => &[Self::Unauthorized, Self::NotFound],
            Route::InferenceModelReady => &[Self::NotFound, Self::Unavailable],
            Route::Models | Route::Inference => &[Self::Unauthorized],
            Route::Reload => &[Self::Unauthorized, Self::NotFound, Self::Validation, Self::Internal],
            Route::Health | Route::HealthReady | Route::Ping | Route::InferenceReady => &[Self::Unavailable],
            Route::InferenceLive
            | Route::GrpcInfo
            | Route::GrpcHealth
            | Route::HealthLive
            | Route::Metrics
            | Route::Docs
            | Route::OpenApi
            | Route::Other => &[],
        }
    }
}

/// In which words an error is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error", "error_type"}`.
    Tei,
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// gRPC's status.
    Grpc,
}

impl Dialect {
    /// The words of `route`'s clients; `path` decides where none matched.
    #[must_use]
    pub fn of(route: Route, path: &str) -> Self {
        match route {
            _ if route.is_grpc() => Self::Grpc,
            Route::OpenAiEmbeddings
            | Route::Embeddings
            | Route::CohereRerank
            | Route::CohereRerank2
            | Route::Models
            | Route::Model => Self::OpenAi,
            Route::Other if path.starts_with("/v1/") => Self::OpenAi,
            _ => Self::Tei,
        }
    }
}

impl ServerError {
    /// The error of a failure that a part of the router gave without one of ours, by its status.
    #[must_use]
    pub(crate) fn of_status(status: StatusCode) -> Option<Self> {
        match status {
            StatusCode::NOT_FOUND => Some(Self::NotFound),
            StatusCode::METHOD_NOT_ALLOWED => Some(Self::MethodNotAllowed),
            _ if status.is_server_error() => Some(Self::Internal),
            // A path that is no UTF-8, say.
            _ if status.is_client_error() => Some(Self::Body),
            _ => None,
        }
    }
}

/// An error on its way to the layer that writes it.
#[derive(Debug, Clone)]
pub(crate) struct Unwritten(pub(crate) std::sync::Arc<ServerError>);

impl IntoResponse for ServerError {
    fn into_response(self) -> Response {
        let mut response = self.class().words().status.into_response();
        if matches!(self, Self::Unauthorized) {
            let scheme = axum::http::HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        if let Some(retry_after) = self.retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, retry_after.as_secs().max(1).into());
        }
        response.extensions_mut().insert(Unwritten(std::sync::Arc::new(self)));
        response
    }
}
