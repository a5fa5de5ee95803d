//! The errors themselves: what they say, and what they are.

use std::time::Duration;

use super::{Dialect, ErrorClass};
use crate::engine::EngineError;
use crate::model::ModelError;
use crate::server::api;
use crate::telemetry::RejectReason;
use crate::text::{PoolError, TextError};

/// Why a request got no result.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The body is no JSON.
    #[error("the body is not valid JSON: {0}")]
    Json(String),
    /// The body is JSON of a wrong shape.
    #[error("the body does not fit: {0}")]
    Shape(String),
    /// The body could not be read: the connection broke, or its framing is wrong.
    #[error("the body could not be read")]
    Body,
    /// A message of gRPC that is none.
    #[error("the message cannot be read: {0}")]
    Message(String),
    /// The body took too long to arrive.
    #[error("the body did not arrive within {} s", limit.as_secs())]
    BodyTimeout {
        /// Time allowed.
        limit: Duration,
    },
    /// The body is too large.
    #[error("the body is larger than the limit of {limit} bytes")]
    BodyTooLarge {
        /// Bytes allowed.
        limit: usize,
    },
    /// The bodies being read take all memory that is set aside for them.
    #[error("too many large requests at once")]
    BodyMemory,
    /// The connection is one too many.
    #[error("too many connections")]
    Crowded,
    /// The body does not say that it is JSON.
    #[error("expected a request with `content-type: application/json`")]
    MediaType,
    /// The deadline header is no number of milliseconds in range.
    #[error("Input validation error: `x-request-timeout-ms` must be a number between 1 and {limit}")]
    TimeoutHeader {
        /// Largest value.
        limit: u64,
    },
    /// Nothing was given where something is needed.
    #[error("`{field}` cannot be empty")]
    Empty {
        /// The field.
        field: &'static str,
    },
    /// More inputs than a request may carry.
    #[error("batch size {got} > maximum allowed batch size {limit}")]
    ClientBatch {
        /// Inputs given.
        got: usize,
        /// Inputs allowed.
        limit: usize,
    },
    /// An input with too many tokens.
    #[error("Input validation error: `inputs` must have less than {limit} tokens. Given: {got}")]
    TooLong {
        /// Tokens given.
        got: usize,
        /// Tokens allowed.
        limit: usize,
    },
    /// An input with so many characters that it need not be tokenized to be refused.
    #[error("Input validation error: `inputs` must have less than {limit} characters. Given: {got}")]
    TooManyChars {
        /// Characters given.
        got: usize,
        /// Characters allowed.
        limit: usize,
    },
    /// A token id that the model does not have.
    #[error("Input validation error: token id {id} is out of range: the vocabulary has {vocab_size} entries")]
    TokenId {
        /// The id.
        id: u32,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// A prompt that the model does not have.
    #[error("Input validation error: no prompt is named `{name}`")]
    Prompt {
        /// The name, shortened.
        name: String,
    },
    /// A width that the model's embeddings cannot be cut to.
    #[error("Input validation error: `dimensions` must be between 1 and {limit}. Given: {got}")]
    Dimensions {
        /// Width asked for.
        got: usize,
        /// Width of the model.
        limit: usize,
    },
    /// A value that cannot be.
    #[error("Input validation error: `{field}` {reason}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it must be.
        reason: String,
    },
    /// The model is for something else.
    #[error("model is not {expected} model")]
    Task {
        /// What the route needs.
        expected: &'static str,
    },
    /// New artefacts that were not taken.
    #[error("reload refused: {reasons}")]
    Reload {
        /// Per model, why.
        reasons: String,
    },
    /// Key missing or wrong.
    #[error("the API key is missing or wrong")]
    Unauthorized,
    /// No such route.
    #[error("there is no such route")]
    NotFound,
    /// No such model.
    #[error("there is no model of this name")]
    NoSuchModel,
    /// A route that does not take this method.
    #[error("this route does not take this method")]
    MethodNotAllowed,
    /// The tokenizer failed on the input.
    #[error("Tokenizer error: {0}")]
    Text(#[from] TextError),
    /// The tokenizer's threads did not run the job.
    #[error(transparent)]
    Pool(PoolError),
    /// The deadline passed before the input was tokenized.
    #[error("the deadline passed after {} ms", waited.as_millis())]
    Deadline {
        /// Time since the request's arrival.
        waited: Duration,
    },
    /// The service stops.
    #[error("the service is stopping")]
    Draining {
        /// When another process may answer at this address.
        retry_after: Duration,
    },
    /// The service starts.
    #[error("the service is starting")]
    Loading,
    /// The model cannot answer any more.
    #[error("unhealthy")]
    Unhealthy,
    /// The engine's answer.
    #[error("{}", engine_message(.0))]
    Engine(#[from] EngineError),
    /// A bug of the service.
    #[error("internal error")]
    Internal,
}

/// What clients of Text Embeddings Inference know, in its words.
fn engine_message(error: &EngineError) -> String {
    match error {
        EngineError::Overloaded { .. } => "Model is overloaded".to_owned(),
        EngineError::TooLarge { .. }
        | EngineError::TooManySequences { .. }
        | EngineError::TooManyBytes { .. }
        | EngineError::Model(ModelError::TokenOutOfRange { .. } | ModelError::SequenceTooLong { .. }) => {
            format!("Input validation error: {error}")
        }
        _ => error.to_string(),
    }
}

impl ServerError {
    /// To a client that finds the service draining: another one may soon answer at its address.
    pub(crate) const DRAINING: Self = Self::Draining { retry_after: Duration::from_secs(1) };

    /// What the error is to a client.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Json(_) | Self::Body | Self::Message(_) => ErrorClass::Malformed,
            Self::Empty { .. } => ErrorClass::Empty,
            Self::Unauthorized => ErrorClass::Unauthorized,
            Self::NotFound | Self::NoSuchModel => ErrorClass::NotFound,
            Self::MethodNotAllowed => ErrorClass::MethodNotAllowed,
            Self::BodyTimeout { .. } => ErrorClass::RequestTimeout,
            Self::BodyTooLarge { .. } => ErrorClass::PayloadTooLarge,
            Self::MediaType => ErrorClass::UnsupportedMediaType,
            Self::Shape(_)
            | Self::TimeoutHeader { .. }
            | Self::ClientBatch { .. }
            | Self::TooLong { .. }
            | Self::TooManyChars { .. }
            | Self::TokenId { .. }
            | Self::Prompt { .. }
            | Self::Value { .. }
            | Self::Reload { .. }
            | Self::Dimensions { .. } => ErrorClass::Validation,
            // As Text Embeddings Inference has it.
            Self::Task { .. } => ErrorClass::Backend,
            Self::Text(TextError::Encode(_) | TextError::Decode(_)) => ErrorClass::Tokenizer,
            Self::Text(TextError::File(_) | TextError::Thread(_)) | Self::Internal => ErrorClass::Internal,
            // A text that makes the tokenizer panic is a text it cannot handle.
            Self::Pool(PoolError::Panicked) => ErrorClass::Tokenizer,
            Self::Pool(PoolError::Full { .. }) | Self::BodyMemory | Self::Crowded => ErrorClass::Overloaded,
            Self::Deadline { .. } => ErrorClass::Deadline,
            Self::Draining { .. } | Self::Loading | Self::Unhealthy => ErrorClass::Unavailable,
            Self::Engine(error) => match error {
                EngineError::Empty => ErrorClass::Empty,
                EngineError::TooLarge { .. }
                | EngineError::TooManySequences { .. }
                | EngineError::TooManyBytes { .. } => ErrorClass::Validation,
                EngineError::Overloaded { .. } => ErrorClass::Overloaded,
                EngineError::DeadlineExceeded { .. } => ErrorClass::Deadline,
                EngineError::Draining { .. } | EngineError::WorkerDied => ErrorClass::Unavailable,
                EngineError::NotFinite | EngineError::Model(ModelError::Player(_)) => ErrorClass::Backend,
                EngineError::Model(ModelError::EmptySequence) => ErrorClass::Empty,
                EngineError::Model(
                    ModelError::TokenOutOfRange { .. }
                    | ModelError::TokenTypeOutOfRange { .. }
                    | ModelError::TokenTypes { .. }
                    | ModelError::SequenceTooLong { .. }
                    | ModelError::BatchTooLarge,
                ) => ErrorClass::Validation,
                EngineError::Model(ModelError::Architecture { .. }) => ErrorClass::Backend,
            },
        }
    }

    /// OpenAI's `code`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Json(_) => "invalid_json",
            Self::Body | Self::Message(_) => "unreadable_body",
            Self::Shape(_) => "invalid_type",
            Self::BodyTimeout { .. } => "request_timeout",
            Self::BodyTooLarge { .. } => "payload_too_large",
            Self::MediaType => "unsupported_media_type",
            Self::TimeoutHeader { .. } | Self::Dimensions { .. } | Self::Value { .. } => "invalid_value",
            Self::Task { .. } => "model_not_suitable",
            Self::Reload { .. } => "reload_refused",
            Self::Empty { .. } => "empty_input",
            Self::ClientBatch { .. } => "batch_too_large",
            Self::TooLong { .. } | Self::TooManyChars { .. } => "context_length_exceeded",
            Self::TokenId { .. } => "invalid_token_id",
            Self::Prompt { .. } => "unknown_prompt",
            Self::Unauthorized => "invalid_api_key",
            Self::NotFound => "not_found",
            Self::NoSuchModel => "model_not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::Text(_) | Self::Pool(PoolError::Panicked) => "tokenizer_error",
            Self::Pool(PoolError::Full { .. }) | Self::BodyMemory | Self::Crowded => "overloaded",
            Self::Deadline { .. } => "deadline_exceeded",
            Self::Draining { .. } => "draining",
            Self::Loading => "loading",
            Self::Unhealthy => "unhealthy",
            Self::Internal => "internal_error",
            Self::Engine(_) => match self.class() {
                ErrorClass::Empty => "empty_input",
                ErrorClass::Overloaded => "overloaded",
                ErrorClass::Deadline => "deadline_exceeded",
                ErrorClass::Unavailable => "unavailable",
                ErrorClass::Backend => "backend_error",
                _ => "context_length_exceeded",
            },
        }
    }

    /// OpenAI's `param`: the field of its request that the error is about.
    #[must_use]
    pub fn param(&self) -> Option<&'static str> {
        match self {
            Self::Empty { .. }
            | Self::ClientBatch { .. }
            | Self::TooLong { .. }
            | Self::TooManyChars { .. }
            | Self::TokenId { .. }
            | Self::Text(_) => Some("input"),
            Self::Dimensions { .. } => Some("dimensions"),
            Self::Value { field, .. } => Some(field),
            Self::NoSuchModel | Self::Task { .. } => Some("model"),
            _ => None,
        }
    }

    /// When to come again, where that helps.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        const SOON: Duration = Duration::from_secs(1);
        match self {
            Self::Engine(EngineError::Overloaded { retry_after, .. } | EngineError::Draining { retry_after })
            | Self::Draining { retry_after } => Some(*retry_after),
            Self::Pool(PoolError::Full { .. }) | Self::BodyMemory | Self::Crowded | Self::Loading => Some(SOON),
            _ => None,
        }
    }

    /// How the metrics count it; `None` if it is no refusal, or was counted where it arose.
    #[must_use]
    pub fn reject_reason(&self) -> Option<RejectReason> {
        match self {
            Self::Json(_)
            | Self::Body
            | Self::Message(_)
            | Self::BodyTimeout { .. }
            | Self::BodyTooLarge { .. }
            | Self::MediaType => Some(RejectReason::Payload),
            Self::Shape(_)
            | Self::TimeoutHeader { .. }
            | Self::Empty { .. }
            | Self::TooLong { .. }
            | Self::TooManyChars { .. }
            | Self::TokenId { .. }
            | Self::Prompt { .. }
            | Self::Dimensions { .. }
            | Self::Value { .. }
            | Self::Task { .. }
            | Self::Text(_)
            | Self::Pool(PoolError::Panicked) => Some(RejectReason::Validation),
            Self::ClientBatch { .. } => Some(RejectReason::ClientBatch),
            Self::Unauthorized => Some(RejectReason::Auth),
            Self::Pool(PoolError::Full { .. }) => Some(RejectReason::Overload),
            Self::BodyMemory => Some(RejectReason::Memory),
            Self::Crowded => Some(RejectReason::Connections),
            Self::Draining { .. } => Some(RejectReason::Draining),
            // The engine counts its own, and a deadline is an event of its own.
            Self::Engine(_) | Self::Deadline { .. } => None,
            Self::NotFound
            | Self::Reload { .. }
            | Self::NoSuchModel
            | Self::MethodNotAllowed
            | Self::Loading
            | Self::Unhealthy
            | Self::Internal => None,
        }
    }

    /// The JSON body in the words of `dialect` (gRPC has none; see `grpc::refusal`).
    #[must_use]
    pub fn body(&self, dialect: Dialect) -> Vec<u8> {
        let words = self.class().words();
        let message = self.to_string();
        let json = match dialect {
            Dialect::Tei | Dialect::Grpc => {
                serde_json::to_vec(&api::ErrorBody { error: &message, error_type: words.error_type })
            }
            Dialect::OpenAi => serde_json::to_vec(&api::OpenAiErrorBody {
                error: api::OpenAiError {
                    message: &message,
                    kind: words.openai_type,
                    param: self.param(),
                    code: self.code(),
                },
            }),
        };
        json.expect("a struct of strings is always JSON")
    }
}

impl From<serde_json::Error> for ServerError {
    fn from(error: serde_json::Error) -> Self {
        // The library quotes what it found, which may be a megabyte.
        let message = shortened(&error.to_string(), 256);
        if error.is_data() { Self::Shape(message) } else { Self::Json(message) }
    }
}

/// The first `n_chars` characters of `text`.
pub(crate) fn shortened(text: &str, n_chars: usize) -> String {
    match text.char_indices().nth(n_chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
