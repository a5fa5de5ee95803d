//! What can go wrong in an evaluation.

use std::path::PathBuf;

use super::EncodeError;
use crate::model::ModelError;

/// An error of an evaluation; each names the file and line, or the text.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is not UTF-8.
    #[error("{}:{line}: not UTF-8 text (byte {offset} of the file)", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Line of the first bad byte, counted from 1.
        line: usize,
        /// Offset of the first bad byte.
        offset: usize,
    },
    /// A line that does not have the expected columns.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A file with too little in it to measure on.
    #[error("{}: {got} usable lines, at least {needed} are needed", path.display())]
    TooFew {
        /// The file.
        path: PathBuf,
        /// Lines found.
        got: usize,
        /// Lines needed.
        needed: usize,
    },
    /// Fewer texts are to be drawn than there are classes.
    #[error("{}: {max} texts of {n_classes} classes cannot be drawn, as every class needs one", path.display())]
    Draw {
        /// The file.
        path: PathBuf,
        /// Texts to draw.
        max: usize,
        /// Classes in the file.
        n_classes: usize,
    },
    /// A solver that did not come to its end.
    #[error("the linear probe did not converge in {iterations} iterations (largest gradient {gradient:.1e})")]
    Probe {
        /// Iterations made.
        iterations: usize,
        /// Largest component of the gradient that was left.
        gradient: f64,
    },
    /// Two models whose embeddings cannot be compared.
    #[error("embeddings of widths {0} and {1} cannot be compared")]
    Widths(usize, usize),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Encode(#[source] EncodeError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}
