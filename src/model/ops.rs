//! The verbs a model is written in, and where its weights come from.

use super::{Activation, Band, HeadSlot, LayerConfig, ModelError, Pooling, Ragged};

/// The verbs. Adding one is an architecture change (`tests/tidy.rs` caps them at 8).
///
/// They are cut where a player may fuse: a linear layer with its activation and the quantization of its result; a
/// projection with its residual, LayerNorm and quantization; attention with its layout. Values are taken by value
/// where they die, so their lifetimes are the memory plan and a player can recycle buffers on drop.
pub trait Ops {
    /// Activations of one group of sequences: `[n_tokens, n_features]`, row-major, ragged (no padding rows).
    type Act;
    /// Word, position and token type embeddings.
    type Tables;
    /// A linear layer `y = x Wᵀ + b`, `W: [n_out, n_in]`.
    type Linear;
    /// A LayerNorm's gain and bias.
    type Norm;

    /// `LayerNorm(word[id] + position[p] + type[t])`: `[n_tokens, d_model]`.
    ///
    /// # Errors
    /// If an id or a type is out of range.
    fn embed(&mut self, tables: &Self::Tables, norm: &Self::Norm, batch: &Ragged<'_>) -> Result<Self::Act, ModelError>;

    /// `then(x Wᵀ + b)`: `[n_tokens, n_out]`.
    ///
    /// # Errors
    /// If the player fails.
    fn linear(&mut self, linear: &Self::Linear, x: &Self::Act, then: Activation) -> Result<Self::Act, ModelError>;

    /// Multi-head attention of each sequence over the keys in its band.
    ///
    /// `qkv: [n_tokens, 3 · n_heads · d_head]`, queries first, heads contiguous; result `[n_tokens, n_heads · d_head]`.
    ///
    /// # Errors
    /// If the player fails.
    fn attend(&mut self, qkv: Self::Act, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Self::Act, ModelError>;

    /// `LayerNorm(residual + x Wᵀ + b)`: `[n_tokens, d_model]`.
    ///
    /// # Errors
    /// If the player fails.
    fn linear_add_norm(
        &mut self,
        linear: &Self::Linear,
        x: Self::Act,
        residual: Self::Act,
        norm: &Self::Norm,
    ) -> Result<Self::Act, ModelError>;

    /// One row per sequence: `[n_seqs, d_model]`.
    ///
    /// # Errors
    /// If the player fails.
    fn pool(&mut self, x: &Self::Act, pooling: Pooling, batch: &Ragged<'_>) -> Result<Self::Act, ModelError>;

    /// Appends the values of `x` to `out`, row-major.
    ///
    /// # Errors
    /// If the player fails.
    fn read(&mut self, x: &Self::Act, out: &mut Vec<f32>) -> Result<(), ModelError>;
}

/// What [`Ops::attend`] needs to know of a layer. Scores are scaled by `1 / √d_head`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionSpec {
    /// The layer, for players that observe.
    pub layer: usize,
    /// Heads.
    pub n_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// Which keys a query sees.
    pub band: Band,
}

impl AttentionSpec {
    /// The attention of layer `layer`.
    #[must_use]
    pub fn new(layer: usize, config: &LayerConfig) -> Self {
        Self { layer, n_heads: config.n_heads, d_head: config.d_head, band: config.band }
    }
}

/// The linear layers of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearSlot {
    /// Queries, keys and values of a layer, stacked: `[3 · n_heads · d_head, d_model]`.
    Qkv(usize),
    /// Attention output: `[d_model, n_heads · d_head]`.
    AttentionOut(usize),
    /// FFN up: `[d_ffn, d_model]`.
    FfnUp(usize),
    /// FFN down: `[d_model, d_ffn]`.
    FfnDown(usize),
}

impl LinearSlot {
    /// The layer it belongs to.
    #[must_use]
    pub fn layer(self) -> usize {
        match self {
            Self::Qkv(layer) | Self::AttentionOut(layer) | Self::FfnUp(layer) | Self::FfnDown(layer) => layer,
        }
    }

    /// `(n_out, n_in)` in a model of width `d_model`.
    #[must_use]
    pub fn shape(self, config: &LayerConfig, d_model: usize) -> (usize, usize) {
        match self {
            Self::Qkv(_) => (3 * config.d_context(), d_model),
            Self::AttentionOut(_) => (d_model, config.d_context()),
            Self::FfnUp(_) => (config.d_ffn, d_model),
            Self::FfnDown(_) => (d_model, config.d_ffn),
        }
    }
}

impl std::fmt::Display for LinearSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Qkv(layer) => write!(f, "layer {layer} qkv"),
            Self::AttentionOut(layer) => write!(f, "layer {layer} attention out"),
            Self::FfnUp(layer) => write!(f, "layer {layer} ffn up"),
            Self::FfnDown(layer) => write!(f, "layer {layer} ffn down"),
        }
    }
}

/// The LayerNorms of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NormSlot {
    /// After the embedding sum.
    Embedding,
    /// After a layer's attention.
    Attention(usize),
    /// After a layer's FFN.
    Ffn(usize),
}

/// Where a player gets its handles: slots in, handles in the form the player wants to hold out.
pub trait Build<O: Ops> {
    /// The embedding tables.
    ///
    /// # Errors
    /// If the weights are missing or do not fit the architecture.
    fn tables(&mut self) -> Result<O::Tables, ModelError>;
    /// A LayerNorm.
    ///
    /// # Errors
    /// If the weights are missing or do not fit the architecture.
    fn norm(&mut self, slot: NormSlot) -> Result<O::Norm, ModelError>;
    /// A linear layer.
    ///
    /// # Errors
    /// If the weights are missing or do not fit the architecture.
    fn linear(&mut self, slot: LinearSlot) -> Result<O::Linear, ModelError>;
    /// A linear layer of the classification head, for those who play models with one.
    ///
    /// # Errors
    /// If the weights are missing or do not fit the architecture, or heads are not played.
    fn head(&mut self, slot: HeadSlot) -> Result<O::Linear, ModelError> {
        Err(ModelError::Architecture { field: "head", reason: format!("{slot} is not played here") })
    }
}
