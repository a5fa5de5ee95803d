//! What a pass tells about what it did. Nothing here depends on the machine's speed: reports belong to the artefact,
//! whose bytes are reproducible.

use std::fmt;

use serde::Serialize;

use crate::model::LayerConfig;

/// What a pass did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PassReport {
    /// The pass's kind.
    pub kind: String,
    /// One line.
    pub summary: String,
    /// The pass's fields with their values.
    pub settings: serde_json::Value,
    /// Bytes of all weights before and after, as they would be written.
    pub bytes: (u64, u64),
    /// Multiply-accumulates per token of the linear layers, before and after.
    pub macs_per_token: (u64, u64),
    /// Layers whose shape changed.
    pub layers: Vec<LayerReport>,
    /// Matrices that changed.
    pub matrices: Vec<MatrixReport>,
    /// What an attention pattern changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention: Option<AttentionReport>,
    /// Cosine to the uncompressed model after the pass, in f32 on a few texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f64>,
    /// What else should be known.
    pub notes: Vec<String>,
}

/// The shape of a layer before and after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: usize,
    /// Heads.
    pub heads: (usize, usize),
    /// FFN neurons.
    pub ffn: (usize, usize),
}

/// What became of a matrix.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MatrixReport {
    /// Its name, such as `layer 3 ffn up` or `word embedding`.
    pub matrix: String,
    /// `attention`, `ffn` or `embedding`.
    pub group: String,
    /// The layer, for matrices of layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// How it is stored now.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub form: String,
    /// Stored bits per element, scales and tables included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
    /// `‖W' − W‖² / ‖W‖²`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_error: Option<f64>,
    /// Mean squared error of the matrix's output on calibration text, relative to the output's variance: before the
    /// pass made up for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_before: Option<f64>,
    /// The same, after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_after: Option<f64>,
    /// Loss of the sentence embedding, `1 − cosine`, when only this matrix is changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
}

/// An attention pattern against full attention: the same weights, in f32, on documents longer than most texts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionReport {
    /// Documents.
    pub n_documents: usize,
    /// Tokens of each.
    pub n_tokens: usize,
    /// Share of the pairs of query and key that are still visited.
    pub pairs: f64,
    /// Mean cosine to the embedding with full attention.
    pub cosine_mean: f64,
    /// The smallest.
    pub cosine_min: f64,
}

impl fmt::Display for AttentionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_documents, n_tokens, pairs, cosine_mean, cosine_min } = self;
        write!(
            f,
            "{n_documents} documents of {n_tokens} tokens: {:.1} % of the pairs are visited; cosine to full attention {cosine_mean:.4} \
             in the mean, {cosine_min:.4} at least",
            pairs * 100.0
        )
    }
}

impl LayerReport {
    /// The layers that differ.
    #[must_use]
    pub fn changed(before: &[LayerConfig], after: &[LayerConfig]) -> Vec<Self> {
        before
            .iter()
            .zip(after)
            .enumerate()
            .filter(|(_, (before, after))| before != after)
            .map(|(layer, (before, after))| Self {
                layer,
                heads: (before.n_heads, after.n_heads),
                ffn: (before.d_ffn, after.d_ffn),
            })
            .collect()
    }
}

/// `‖after − before‖² / ‖before‖²`.
pub(in crate::compress) fn relative_error(before: &[f32], after: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value) * f64::from(value);
    let norm: f64 = before.iter().map(|&value| square(value)).sum();
    let error: f64 = before.iter().zip(after).map(|(before, after)| square(after - before)).sum();
    error / norm.max(f64::MIN_POSITIVE)
}
