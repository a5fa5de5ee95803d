//! Weights as players receive them.

use crate::quant::Weight;

/// A linear layer `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct LinearWeights<'a> {
    /// Rows of the matrix.
    pub n_out: usize,
    /// Columns of the matrix.
    pub n_in: usize,
    /// `[n_out, n_in]`.
    pub weight: Weight<'a>,
    /// `[n_out]`.
    pub bias: Vec<f32>,
}

/// A LayerNorm.
#[derive(Debug, Clone)]
pub struct NormWeights {
    /// `[d_model]`.
    pub gain: Vec<f32>,
    /// `[d_model]`.
    pub bias: Vec<f32>,
    /// Added to the variance.
    pub eps: f32,
}

/// The embedding tables.
#[derive(Debug, Clone)]
pub struct TableWeights<'a> {
    /// `[vocab_size, d_model]`.
    pub word: Weight<'a>,
    /// `[positions.table_len, d_model]`.
    pub position: Weight<'a>,
    /// `[n_token_types, d_model]`, if the family has token types.
    pub token_type: Option<Weight<'a>>,
}
