//! What goes into the engine and what comes out.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::Want;

/// One sequence of token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, special tokens included.
    pub ids: Vec<u32>,
    /// One type per token; empty means type 0 throughout.
    pub token_types: Vec<u8>,
}

impl Sequence {
    /// A sequence of token type 0.
    #[must_use]
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, token_types: Vec::new() }
    }
}

/// Sequences that are admitted together or not at all, and answered together. They are scheduled one by one.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The sequences; at least one.
    pub sequences: Vec<Sequence>,
    /// Which rows are wanted.
    pub want: Want,
    /// When the answer is no longer of use; without one the engine's default counts.
    pub deadline: Option<Instant>,
}

/// Rows of one sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SequenceRows {
    /// `[width]`, not normalised: the pooled row, or one number per label of a classification head.
    pub pooled: Vec<f32>,
    /// `[n_tokens, d_model]`; empty unless asked for.
    pub tokens: Vec<f32>,
}

/// The answer to a [`Submission`].
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// One entry per sequence, in the order given.
    pub rows: Vec<SequenceRows>,
    /// Mean time from admission until a worker took the sequence.
    pub queue: Duration,
    /// Mean time of the forward pass that held the sequence.
    pub infer: Duration,
}
