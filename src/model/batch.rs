//! Ragged batches: sequences laid end to end, no padding anywhere.

use super::ModelError;

/// Token ids of several sequences laid end to end; sequence `i` is `ids[cu_seqlens[i]..cu_seqlens[i + 1]]`.
///
/// Every sequence is non-empty; `cu_seqlens` starts at 0 and ends at `ids.len()`. Reusing one batch through
/// [`RaggedBatch::clear`] keeps its capacity.
#[derive(Debug, Clone)]
pub struct RaggedBatch {
    ids: Vec<u32>,
    token_types: Vec<u8>,
    cu_seqlens: Vec<u32>,
}

impl Default for RaggedBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl RaggedBatch {
    /// A batch without sequences.
    #[must_use]
    pub fn new() -> Self {
        Self { ids: Vec::new(), token_types: Vec::new(), cu_seqlens: vec![0] }
    }

    /// A batch of the given sequences, all of token type 0.
    ///
    /// # Errors
    /// [`ModelError::EmptySequence`] for a sequence without tokens.
    pub fn from_sequences<S: AsRef<[u32]>>(sequences: &[S]) -> Result<Self, ModelError> {
        let mut batch = Self::new();
        for sequence in sequences {
            batch.push(sequence.as_ref())?;
        }
        Ok(batch)
    }

    /// Removes all sequences, keeps the memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.token_types.clear();
        self.cu_seqlens.truncate(1);
    }

    /// Appends a sequence of token type 0.
    ///
    /// # Errors
    /// [`ModelError::EmptySequence`] if `ids` is empty.
    pub fn push(&mut self, ids: &[u32]) -> Result<(), ModelError> {
        self.push_typed(ids, &[])
    }

    /// Appends a sequence with one token type per token (an empty slice means type 0 throughout).
    ///
    /// # Errors
    /// [`ModelError::EmptySequence`] if `ids` is empty; [`ModelError::TokenTypes`] if the lengths differ.
    pub fn push_typed(&mut self, ids: &[u32], token_types: &[u8]) -> Result<(), ModelError> {
        if ids.is_empty() {
            return Err(ModelError::EmptySequence);
        }
        if !token_types.is_empty() && token_types.len() != ids.len() {
            return Err(ModelError::TokenTypes { expected: ids.len(), got: token_types.len() });
        }
        self.ids.extend_from_slice(ids);
        if token_types.is_empty() {
            self.token_types.resize(self.ids.len(), 0);
        } else {
            self.token_types.extend_from_slice(token_types);
        }
        let end = u32::try_from(self.ids.len()).map_err(|_| ModelError::BatchTooLarge)?;
        self.cu_seqlens.push(end);
        Ok(())
    }

    /// Number of sequences.
    #[must_use]
    pub fn n_seqs(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// Number of tokens of all sequences together.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    /// The token ids of sequence `index`.
    #[must_use]
    pub fn sequence(&self, index: usize) -> &[u32] {
        &self.ids[self.cu_seqlens[index] as usize..self.cu_seqlens[index + 1] as usize]
    }

    /// A view of sequences `seqs`.
    #[must_use]
    pub fn view(&self, seqs: std::ops::Range<usize>) -> Ragged<'_> {
        let cu_seqlens = &self.cu_seqlens[seqs.start..=seqs.end];
        let tokens = cu_seqlens[0] as usize..cu_seqlens[seqs.len()] as usize;
        Ragged { ids: &self.ids[tokens.clone()], token_types: &self.token_types[tokens], cu_seqlens }
    }
}

/// A view of consecutive sequences of a [`RaggedBatch`].
#[derive(Debug, Clone, Copy)]
pub struct Ragged<'a> {
    ids: &'a [u32],
    token_types: &'a [u8],
    /// Not rebased: the first entry is the view's offset in its batch.
    cu_seqlens: &'a [u32],
}

impl<'a> Ragged<'a> {
    /// Token ids, all sequences end to end.
    #[must_use]
    pub fn ids(&self) -> &'a [u32] {
        self.ids
    }

    /// Token types, one per token.
    #[must_use]
    pub fn token_types(&self) -> &'a [u8] {
        self.token_types
    }

    /// Number of tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of sequences.
    #[must_use]
    pub fn n_seqs(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// The rows of sequence `index`, counted from the view's first token.
    #[must_use]
    pub fn rows(&self, index: usize) -> std::ops::Range<usize> {
        let base = self.cu_seqlens[0];
        (self.cu_seqlens[index] - base) as usize..(self.cu_seqlens[index + 1] - base) as usize
    }

    /// The sequence that row `row` belongs to.
    #[must_use]
    pub fn sequence_of(&self, row: usize) -> usize {
        let ends = &self.cu_seqlens[1..];
        ends.partition_point(|&end| (end - self.cu_seqlens[0]) as usize <= row)
    }

    /// Row ranges of all sequences in order.
    pub fn sequences(self) -> impl Iterator<Item = std::ops::Range<usize>> + 'a {
        (0..self.n_seqs()).map(move |index| self.rows(index))
    }

    /// Length of the longest sequence.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_rebase_rows() {
        let batch = RaggedBatch::from_sequences(&[vec![1, 2], vec![3], vec![4, 5, 6]]).unwrap();
        let view = batch.view(1..3);
        assert_eq!(view.ids(), [3, 4, 5, 6]);
        assert_eq!(view.sequences().collect::<Vec<_>>(), [0..1, 1..4]);
        assert_eq!([0, 1, 2, 3].map(|row| view.sequence_of(row)), [0, 1, 1, 1]);
        assert_eq!((view.max_len(), batch.n_tokens(), batch.n_seqs()), (3, 6, 3));
        assert_eq!(batch.sequence(2), [4, 5, 6]);
    }

    #[test]
    fn empty_sequences_and_wrong_types_are_refused() {
        let mut batch = RaggedBatch::new();
        assert!(matches!(batch.push(&[]), Err(ModelError::EmptySequence)));
        assert!(matches!(batch.push_typed(&[1, 2], &[0]), Err(ModelError::TokenTypes { expected: 2, got: 1 })));
        assert_eq!((batch.n_seqs(), batch.n_tokens()), (0, 0));
    }
}
