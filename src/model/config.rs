//! A model family as data.

use std::ops::Deref;

use serde::{Deserialize, Serialize};

use super::{Band, HeadConfig, ModelError};

/// Families that share this forward text; they differ in tensor names (`checkpoint::hf_names`) and in the data below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// BERT and its copies (MiniLM, BGE, E5, GTE-v1 …).
    Bert,
    /// RoBERTa, XLM-RoBERTa and CamemBERT: positions start after the padding id.
    Roberta,
    /// DistilBERT: no token types, other tensor names.
    Distilbert,
}

/// The non-linearity after a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// None.
    Identity,
    /// `x · Φ(x)` with the exact error function.
    Gelu,
    /// The tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// The hyperbolic tangent.
    Tanh,
}

/// How token rows become one row per sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The first token.
    Cls,
    /// The mean of all tokens.
    Mean,
    /// The element-wise maximum of all tokens.
    Max,
    /// The last token.
    LastToken,
    /// The sum of all tokens divided by the square root of their number.
    MeanSqrtLen,
}

/// Learned absolute positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    /// Rows of the table.
    pub table_len: usize,
    /// Row of the first token (RoBERTa: padding id + 1).
    pub offset: usize,
    /// Whether the usable rows repeat beyond the table's end (Longformer §5, "copying" the pretrained positions).
    pub tiled: bool,
}

impl Positions {
    /// Rows that hold positions of real tokens.
    #[must_use]
    pub fn usable(&self) -> usize {
        self.table_len.saturating_sub(self.offset)
    }

    /// The table row of the token at `position`.
    ///
    /// # Panics
    /// In debug builds, if `position` is beyond an untiled table.
    #[must_use]
    pub fn row(&self, position: usize) -> usize {
        debug_assert!(self.tiled || position < self.usable());
        self.offset + if position < self.usable() { position } else { position % self.usable() }
    }
}

/// One layer's shape: pruning makes layers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// Attention heads kept.
    pub n_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// FFN neurons kept.
    pub d_ffn: usize,
    /// Which keys a query sees.
    pub band: Band,
}

/// Values that an activation takes: what lies outside is clipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ValueRange {
    /// The lowest value.
    pub low: f32,
    /// The highest value, above `low`.
    pub high: f32,
}

/// Ranges of the inputs of a layer's four matrices that were fixed beforehand; without one, every token has its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerRanges {
    /// Of queries, keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_in: Option<ValueRange>,
    /// Of the attention's output matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<ValueRange>,
    /// Of the FFN's first matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn_in: Option<ValueRange>,
    /// Of the FFN's second matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<ValueRange>,
}

impl LayerRanges {
    /// All four, in the order of the score.
    #[must_use]
    pub fn all(&self) -> [Option<ValueRange>; 4] {
        [self.attention_in, self.context, self.ffn_in, self.hidden]
    }
}

/// Everything the score needs to know about an encoder. Unchecked: see [`Architecture`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArchitectureSpec {
    /// The family, for names.
    pub family: Family,
    /// Rows of the word embedding.
    pub vocab_size: usize,
    /// Rows of the token type embedding; 0 when the family has none.
    pub n_token_types: usize,
    /// Position embedding.
    pub positions: Positions,
    /// Width of the residual stream.
    pub d_model: usize,
    /// LayerNorm's epsilon.
    pub norm_eps: f32,
    /// The FFN's non-linearity.
    pub activation: Activation,
    /// Layers from input to output.
    pub layers: Vec<LayerConfig>,
    /// Fixed ranges of the layers' inputs, one entry a layer; empty when all are dynamic.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<LayerRanges>,
    /// Sentence pooling.
    pub pooling: Pooling,
    /// Whether the sentence encoder ends in an L2 normalisation.
    pub normalize: bool,
    /// Longest input in tokens, special tokens included.
    pub max_input_tokens: usize,
    /// The classification head, if the model has one; its input is the first token's row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadConfig>,
}

/// A checked [`ArchitectureSpec`]: every declared size is in range and consistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture(ArchitectureSpec);

impl Deref for Architecture {
    type Target = ArchitectureSpec;
    fn deref(&self) -> &ArchitectureSpec {
        &self.0
    }
}

/// Largest width that integer accumulation is proven for: 2^31 / (255 · 128) rounded down to a power of two.
const MAX_WIDTH: usize = 65_536;
const MAX_LAYERS: usize = 1_024;
const MAX_LABELS: usize = 4_096;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 20;

impl Architecture {
    /// Checks a specification.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] naming the field that is out of range.
    pub fn new(spec: ArchitectureSpec) -> Result<Self, ModelError> {
        let in_range = |field: &'static str, value: usize, max: usize| {
            if value == 0 || value > max {
                let reason = format!("{value} is not in 1..={max}");
                return Err(ModelError::Architecture { field, reason });
            }
            Ok(())
        };
        in_range("vocab_size", spec.vocab_size, MAX_VOCAB)?;
        in_range("hidden_size", spec.d_model, MAX_WIDTH)?;
        in_range("num_hidden_layers", spec.layers.len(), MAX_LAYERS)?;
        in_range("max_position_embeddings", spec.positions.table_len, MAX_POSITIONS)?;
        if spec.n_token_types > 256 {
            let reason = format!("{} is not in 0..=256", spec.n_token_types);
            return Err(ModelError::Architecture { field: "type_vocab_size", reason });
        }
        if spec.positions.offset >= spec.positions.table_len {
            let reason = format!("{} positions start at row {}", spec.positions.table_len, spec.positions.offset);
            return Err(ModelError::Architecture { field: "max_position_embeddings", reason });
        }
        let position_limit = if spec.positions.tiled { MAX_POSITIONS } else { spec.positions.usable() };
        in_range("max_input_tokens", spec.max_input_tokens, position_limit)?;
        if !(spec.norm_eps > 0.0 && spec.norm_eps < 1.0) {
            let reason = format!("{} is not in (0, 1)", spec.norm_eps);
            return Err(ModelError::Architecture { field: "layer_norm_eps", reason });
        }
        if let Some(head) = &spec.head {
            in_range("num_labels", head.labels.len(), MAX_LABELS)?;
            if spec.pooling != Pooling::Cls {
                let reason = format!("a classification head reads the first token's row, not {:?}", spec.pooling);
                return Err(ModelError::Architecture { field: "pooling", reason });
            }
        }
        if !spec.ranges.is_empty() && spec.ranges.len() != spec.layers.len() {
            let reason = format!("{} for {} layers", spec.ranges.len(), spec.layers.len());
            return Err(ModelError::Architecture { field: "ranges", reason });
        }
        for ValueRange { low, high } in spec.ranges.iter().flat_map(LayerRanges::all).flatten() {
            // Between finite ends it may be wider than numbers are.
            if !(low < high && (high - low).is_finite()) {
                let reason = format!("{low} to {high} is no range of values");
                return Err(ModelError::Architecture { field: "ranges", reason });
            }
        }
        for layer in &spec.layers {
            in_range("n_heads", layer.n_heads, MAX_WIDTH)?;
            in_range("d_head", layer.d_head, MAX_WIDTH)?;
            in_range("intermediate_size", layer.d_ffn, MAX_WIDTH)?;
            in_range("n_heads * d_head", layer.d_context(), MAX_WIDTH / 3)?;
        }
        Ok(Self(spec))
    }

    /// Fixed ranges of a layer's inputs; none where they are dynamic.
    #[must_use]
    pub fn ranges_of(&self, layer: usize) -> LayerRanges {
        self.ranges.get(layer).copied().unwrap_or_default()
    }

    /// The unchecked data, for edits that are checked again by [`Architecture::new`].
    #[must_use]
    pub fn spec(&self) -> ArchitectureSpec {
        self.0.clone()
    }
}

impl LayerConfig {
    /// Width of the concatenated heads.
    #[must_use]
    pub fn d_context(&self) -> usize {
        self.n_heads.saturating_mul(self.d_head)
    }
}
