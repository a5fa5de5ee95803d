//! Texts into normalised sentence embeddings.

use super::EvalError;
use crate::model::{Forward, Outputs, RaggedBatch, Want};
use crate::text::{Direction, TextError, Tokenizer};

/// An error of a tokenizer, whatever its type.
pub type EncodeError = Box<dyn std::error::Error + Send + Sync>;

/// Text to token ids: special tokens included, cut to what the model takes.
pub type Encode<'a> = dyn Fn(&str) -> Result<Vec<u32>, EncodeError> + 'a;

/// Texts are embedded in batches of about this many tokens, in order of length.
const BATCH_TOKENS: usize = 8_192;

/// The usual [`Encode`] of a tokenizer: special tokens, cut at the end.
pub fn encoder(tokenizer: &Tokenizer, max_tokens: usize) -> impl Fn(&str) -> Result<Vec<u32>, EncodeError> + '_ {
    move |text| {
        tokenizer
            .encode_within(text, max_tokens, Direction::Right)
            .map(|(ids, _)| ids)
            .map_err(|error: TextError| error.into())
    }
}

/// One row of length 1 per text.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    width: usize,
    values: Vec<f32>,
}

impl Embeddings {
    /// Width of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The row of a text.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    /// The rows of a range of texts, one after the other.
    pub(super) fn rows(&self, range: std::ops::Range<usize>) -> &[f32] {
        &self.values[range.start * self.width..range.end * self.width]
    }

    #[cfg(test)]
    pub(super) fn new(width: usize, values: Vec<f32>) -> Self {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        Self { width, values }
    }

    /// Cosine between row `index` here and row `other_index` there (both have length 1, so the dot product).
    #[must_use]
    pub fn cosine(&self, index: usize, other: &Self, other_index: usize) -> f64 {
        self.row(index).iter().zip(other.row(other_index)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }
}

/// Embeds `texts`, in their order. `progress` is told of every batch how many texts it held.
///
/// # Errors
/// If the tokenizer or the model fails.
pub fn embed(
    model: &mut dyn Forward,
    encode: &Encode<'_>,
    texts: &[&str],
    mut progress: impl FnMut(usize),
) -> Result<Embeddings, EvalError> {
    let ids = texts.iter().map(|text| encode(text)).collect::<Result<Vec<_>, _>>().map_err(EvalError::Encode)?;
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&index| ids[index].len());
    let width = model.width();
    let mut values = vec![0.0; ids.len() * width];
    let (mut batch, mut out) = (RaggedBatch::new(), Outputs::default());
    let mut rest = &order[..];
    while !rest.is_empty() {
        batch.clear();
        let mut n_seqs = 0;
        while n_seqs < rest.len() && (n_seqs == 0 || batch.n_tokens() + ids[rest[n_seqs]].len() <= BATCH_TOKENS) {
            batch.push(&ids[rest[n_seqs]])?;
            n_seqs += 1;
        }
        model.forward(&batch, Want::Pooled, &mut out)?;
        for (&index, row) in rest[..n_seqs].iter().zip(out.pooled.chunks_exact(width)) {
            let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt().max(1e-12);
            for (to, from) in values[index * width..(index + 1) * width].iter_mut().zip(row) {
                #[allow(clippy::cast_possible_truncation, reason = "an embedding is f32")]
                let scaled = (f64::from(*from) / length) as f32;
                *to = scaled;
            }
        }
        progress(n_seqs);
        rest = &rest[n_seqs..];
    }
    Ok(Embeddings { width, values })
}
