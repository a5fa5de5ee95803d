//! A model behind an object-safe face: the engine and the evaluations hold `Box<dyn Forward>`.

use std::ops::Range;
use std::sync::Arc;

use super::{Architecture, Encoder, Head, ModelError, Ops, RaggedBatch};

/// What a caller wants of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Want {
    /// One pooled row per sequence.
    #[default]
    Pooled,
    /// One row per token as well.
    PooledAndTokens,
}

/// Results of a batch; reused from batch to batch.
#[derive(Debug, Default)]
pub struct Outputs {
    /// `[n_seqs, width]`, not normalised: the pooled rows, or what a classification head makes of them.
    pub pooled: Vec<f32>,
    /// `[n_tokens, d_model]`, empty unless asked for.
    pub tokens: Vec<f32>,
}

/// Bytes a model holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ForwardMemory {
    /// Weights, shared by all workers.
    pub weights: usize,
    /// Workspace of this worker.
    pub workspace: usize,
    /// Largest part of the workspace that a batch has used.
    pub workspace_peak: usize,
}

/// The erased face of a model with its player.
pub trait Forward: Send {
    /// The model's shape.
    fn architecture(&self) -> &Architecture;

    /// Numbers per sequence: the model's width, or with a classification head the number of labels.
    fn width(&self) -> usize {
        self.architecture().d_model
    }

    /// Runs `batch`. The results of a sequence do not depend on the other sequences.
    ///
    /// # Errors
    /// If an id, type or length is out of range (nothing was computed) or the player fails.
    fn forward(&mut self, batch: &RaggedBatch, want: Want, out: &mut Outputs) -> Result<(), ModelError>;

    /// Bytes held.
    fn memory(&self) -> ForwardMemory;
}

/// An encoder with the player that plays it.
pub struct Model<O: Ops> {
    architecture: Arc<Architecture>,
    encoder: Arc<Encoder<O>>,
    head: Option<Arc<Head<O>>>,
    ops: O,
    /// A batch is played in groups of whole sequences of about this many tokens, so that a group's activations stay
    /// in the L2 cache; a longer sequence is a group of its own.
    group_tokens: usize,
    memory: fn(&O) -> ForwardMemory,
}

impl<O: Ops> std::fmt::Debug for Model<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("architecture", &self.architecture).finish_non_exhaustive()
    }
}

impl<O: Ops> Model<O> {
    /// Puts a built encoder and a player together.
    pub fn new(
        architecture: Arc<Architecture>,
        encoder: Arc<Encoder<O>>,
        ops: O,
        group_tokens: usize,
        memory: fn(&O) -> ForwardMemory,
    ) -> Self {
        Self { architecture, encoder, head: None, ops, group_tokens, memory }
    }

    /// The same model ending in `head`.
    #[must_use]
    pub fn with_head(mut self, head: Option<Arc<Head<O>>>) -> Self {
        self.head = head;
        self
    }

    /// Another player of the same weights.
    #[must_use]
    pub fn another(&self) -> Self
    where
        O: Clone,
    {
        Self {
            architecture: Arc::clone(&self.architecture),
            encoder: Arc::clone(&self.encoder),
            head: self.head.clone(),
            ops: self.ops.clone(),
            group_tokens: self.group_tokens,
            memory: self.memory,
        }
    }

    /// The player.
    pub fn ops_mut(&mut self) -> &mut O {
        &mut self.ops
    }

    /// The encoder and the player, for callers that want the rows between layers.
    pub fn parts(&mut self) -> (&Encoder<O>, &mut O) {
        (&self.encoder, &mut self.ops)
    }

    fn check(&self, batch: &RaggedBatch) -> Result<(), ModelError> {
        let all = batch.view(0..batch.n_seqs());
        let vocab_size = self.architecture.vocab_size;
        if let Some(&id) = all.ids().iter().find(|&&id| id as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { id, vocab_size });
        }
        let n_token_types = self.architecture.n_token_types.max(1);
        if let Some(&token_type) = all.token_types().iter().find(|&&t| usize::from(t) >= n_token_types) {
            return Err(ModelError::TokenTypeOutOfRange { token_type, n_token_types });
        }
        let limit = self.architecture.max_input_tokens;
        let got = all.max_len();
        if got > limit {
            return Err(ModelError::SequenceTooLong { got, limit });
        }
        Ok(())
    }
}

/// A sequence counts as a multiple of this many tokens when groups are cut: players pack keys in blocks, so that a group
/// of many tiny sequences would need more room than one of the same number of tokens.
pub const GROUP_GRAIN: usize = 32;

/// Cuts a batch into groups of whole sequences of at most `group_tokens` tokens, each sequence rounded up to
/// [`GROUP_GRAIN`] (a longer sequence stands alone).
fn groups(batch: &RaggedBatch, group_tokens: usize) -> impl Iterator<Item = Range<usize>> + '_ {
    let cost = |index: usize| batch.sequence(index).len().next_multiple_of(GROUP_GRAIN);
    let mut start = 0;
    std::iter::from_fn(move || {
        if start == batch.n_seqs() {
            return None;
        }
        let mut end = start + 1;
        let mut n_tokens = cost(start);
        while end < batch.n_seqs() && n_tokens + cost(end) <= group_tokens {
            n_tokens += cost(end);
            end += 1;
        }
        let group = start..end;
        start = end;
        Some(group)
    })
}

impl<O: Ops + Send> Forward for Model<O>
where
    O::Tables: Send + Sync,
    O::Linear: Send + Sync,
    O::Norm: Send + Sync,
{
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn width(&self) -> usize {
        self.head.as_ref().map_or(self.architecture.d_model, |head| head.n_labels())
    }

    fn forward(&mut self, batch: &RaggedBatch, want: Want, out: &mut Outputs) -> Result<(), ModelError> {
        self.check(batch)?;
        out.pooled.clear();
        out.tokens.clear();
        for group in groups(batch, self.group_tokens) {
            let view = batch.view(group);
            let x = self.encoder.forward(&mut self.ops, &view)?;
            let pooled = self.ops.pool(&x, self.architecture.pooling, &view)?;
            match &self.head {
                None => self.ops.read(&pooled, &mut out.pooled)?,
                Some(head) => {
                    let scores = head.forward(&mut self.ops, &pooled)?;
                    self.ops.read(&scores, &mut out.pooled)?;
                }
            }
            if want == Want::PooledAndTokens {
                self.ops.read(&x, &mut out.tokens)?;
            }
        }
        Ok(())
    }

    fn memory(&self) -> ForwardMemory {
        (self.memory)(&self.ops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_all_sequences_once_and_respect_the_budget() {
        let lens = [3 * GROUP_GRAIN, 4 * GROUP_GRAIN - 5, 9 * GROUP_GRAIN, 1, 20, GROUP_GRAIN, 300 * GROUP_GRAIN, 2];
        let sequences: Vec<Vec<u32>> = lens.iter().map(|&len| vec![0; len]).collect();
        let batch = RaggedBatch::from_sequences(&sequences).unwrap();
        let cut: Vec<_> = groups(&batch, 8 * GROUP_GRAIN).collect();
        assert_eq!(cut, [0..2, 2..3, 3..6, 6..7, 7..8]);
    }
}
