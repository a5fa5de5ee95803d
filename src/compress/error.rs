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
        /// The flag or field.
        setting: String,
        /// What is wrong, with the values.
        reason: String,
    },
    /// Something in a recipe's file.
    #[error("{}:{line}: {reason}", file.display())]
    Recipe {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, with the values.
        reason: String,
    },
    /// A recipe that cannot be read.
    #[error("{}: {source}", path.display())]
    ReadRecipe {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Too little room for the artefact.
    #[error("{}: {free} bytes are free, the artefact takes about {needed}", path.display())]
    NoSpace {
        /// Where the artefact would go.
        path: PathBuf,
        /// Bytes that the file system has for this user.
        free: u64,
        /// Bytes that the artefact takes, estimated.
        needed: u64,
    },
    /// A pass measures on text, and there is none.
    #[error("a pass measures on calibration text, and none was given")]
    NoText,
    /// The serving player could not be started.
    #[error("computing threads: {0}")]
    Threads(#[from] std::io::Error),
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
