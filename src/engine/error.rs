//! Why the engine gives no rows.

use std::io;
use std::time::Duration;

use crate::model::ModelError;
use crate::telemetry::{ExpiryStage, RejectReason};

/// The answer to a submission that gets no rows. The engine has counted it in the metrics before it returns it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A submission without sequences.
    #[error("a submission must hold at least one sequence")]
    Empty,
    /// A sequence longer than a batch may be, or a submission that the queue could not hold even if it were empty.
    #[error("{tokens} tokens are more than the limit of {limit}")]
    TooLarge {
        /// Tokens given.
        tokens: usize,
        /// Tokens allowed.
        limit: usize,
    },
    /// More sequences than may be admitted even if nothing else were.
    #[error("{sequences} inputs are more than the limit of {limit}")]
    TooManySequences {
        /// Sequences given.
        sequences: usize,
        /// Sequences allowed.
        limit: usize,
    },
    /// Ids and reply would take more memory than is set aside for all requests.
    #[error("the request and its reply take {bytes} bytes, more than the limit of {limit}")]
    TooManyBytes {
        /// Bytes needed.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Something is used up for now.
    #[error("the model is overloaded, retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// [`RejectReason::Overload`] (tokens, sequences) or [`RejectReason::Memory`] (bytes).
        reason: RejectReason,
        /// When the queue should have been worked off, from the measured rate; whole seconds.
        retry_after: Duration,
    },
    /// The deadline passed.
    #[error("the deadline passed after {} ms", waited.as_millis())]
    DeadlineExceeded {
        /// Where the submission was.
        stage: ExpiryStage,
        /// How long the engine had it.
        waited: Duration,
    },
    /// The engine takes no more work.
    #[error("the service is stopping")]
    Draining {
        /// When another process may answer at this address; whole seconds.
        retry_after: Duration,
    },
    /// The worker that ran a sequence panicked, or no worker is left.
    #[error("a worker died")]
    WorkerDied,
    /// The model gave a value that is no number.
    #[error("the model gave a value that is not finite")]
    NotFinite,
    /// The model refused a sequence (ids, types, length: nothing was computed) or its player failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl EngineError {
    /// How the metrics count it; `None` for failures of the service itself.
    #[must_use]
    pub fn reject_reason(&self) -> Option<RejectReason> {
        match self {
            Self::Overloaded { reason, .. } => Some(*reason),
            Self::DeadlineExceeded { .. } => Some(RejectReason::Deadline),
            Self::Draining { .. } => Some(RejectReason::Draining),
            Self::WorkerDied | Self::NotFinite | Self::Model(ModelError::Player(_)) => None,
            Self::Empty
            | Self::TooLarge { .. }
            | Self::TooManySequences { .. }
            | Self::TooManyBytes { .. }
            | Self::Model(_) => Some(RejectReason::Validation),
        }
    }
}

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No worker was given.
    #[error("an engine needs at least one worker")]
    NoWorkers,
    /// A limit that cannot be.
    #[error("limit `{name}` is {got}, it must be at least {least}")]
    Limit {
        /// The field of `EngineLimits`.
        name: &'static str,
        /// As given.
        got: usize,
        /// Smallest value that makes sense.
        least: usize,
    },
    /// The system gave no thread.
    #[error("cannot start a worker thread")]
    Thread(#[source] io::Error),
}
