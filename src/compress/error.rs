//! What can go wrong in a compression.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::eval::EvalError;
use crate::model::{LinearSlot, ModelError};
use crate::text::TextError;

/// An error of a compression. Those that a user can cause come before any work.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// A setting that cannot be.
    #[error("{setting}: {reason}")]
    Setting {
        /// The flag's name.
        setting: &'static str,
        /// What is wrong, with the values.
        reason: String,
    },
    /// The source is an artefact.
    #[error("{}: is compressed already; give the uncompressed model directory", .0.display())]
    AlreadyCompressed(PathBuf),
    /// The model directory or the target.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The calibration text or a measurement.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A player.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A covariance without a Cholesky factor.
    #[error("the covariance of {n} inputs has no Cholesky factor: the activations are not finite")]
    NotPositive {
        /// Width of the inputs.
        n: usize,
    },
    /// A gradient was cut on its way.
    #[error("no gradient reached {slot}")]
    NoGradient {
        /// Where it was awaited.
        slot: LinearSlot,
    },
}
