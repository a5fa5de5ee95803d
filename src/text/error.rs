//! What can go wrong between text and ids.

use std::io;

/// Errors of the tokenizer library carry no type of their own.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A tokenizer that cannot be read, or a text it cannot handle.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` is no tokenizer.
    #[error("cannot read the tokenizer")]
    File(#[source] Cause),
    /// The tokenizer failed on a text.
    #[error("cannot tokenize the text: {0}")]
    Encode(#[source] Cause),
    /// The tokenizer failed on ids.
    #[error("cannot decode the token ids: {0}")]
    Decode(#[source] Cause),
    /// The system gave no thread for a pool.
    #[error("cannot start a tokenizer thread")]
    Thread(#[source] io::Error),
}

/// A job that a pool did not run to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// As many jobs wait as may.
    #[error("{limit} jobs wait for a tokenizer thread already")]
    Full {
        /// Jobs that may wait.
        limit: usize,
    },
    /// The job panicked.
    #[error("the tokenizer panicked")]
    Panicked,
}
