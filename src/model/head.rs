//! The classification head: one row per sequence becomes one number per label.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Activation, Architecture, Build, ModelError, Ops};

/// What makes scores of the numbers that a head gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreFunction {
    /// The numbers themselves (regression).
    Identity,
    /// `1 / (1 + e^-x)` of each.
    Sigmoid,
    /// `e^(x_i) / Σ_j e^(x_j)`.
    Softmax,
}

impl ScoreFunction {
    /// Turns the numbers of one sequence into scores, in double precision.
    pub fn apply(self, values: &mut [f32]) {
        let map = |values: &mut [f32], f: &dyn Fn(f64) -> f64| {
            for value in values {
                #[allow(clippy::cast_possible_truncation, reason = "a score is f32")]
                let score = f(f64::from(*value)) as f32;
                *value = score;
            }
        };
        match self {
            Self::Identity => {}
            Self::Sigmoid => map(values, &|x| 1.0 / (1.0 + (-x).exp())),
            Self::Softmax => {
                // Relative to the largest, so that no power overflows.
                let largest = values.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
                let power = |x: f64| (x - f64::from(largest)).exp();
                let sum: f64 = values.iter().map(|&x| power(f64::from(x))).sum();
                map(values, &|x| power(x) / sum);
            }
        }
    }
}

/// A head as data: `out(dense(row))`, a dense layer of the model's width with an activation, then one row per label.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadConfig {
    /// After the dense layer: tanh in BERT (its pooler) and RoBERTa, ReLU in DistilBERT.
    pub dense: Activation,
    /// Names of the labels, in the order of the numbers.
    pub labels: Vec<String>,
    /// From numbers to scores.
    pub function: ScoreFunction,
}

impl HeadConfig {
    /// The labels by their position, written as Hugging Face's `id2label`.
    #[must_use]
    pub fn id2label(&self) -> BTreeMap<String, String> {
        self.labels.iter().enumerate().map(|(id, label)| (id.to_string(), label.clone())).collect()
    }
}

/// The linear layers of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HeadSlot {
    /// `[d_model, d_model]`.
    Dense,
    /// `[n_labels, d_model]`.
    Out,
}

impl HeadSlot {
    /// Both, in the order of the forward pass.
    pub const ALL: [Self; 2] = [Self::Dense, Self::Out];

    /// `(n_out, n_in)`; no rows if `architecture` has no head.
    #[must_use]
    pub fn shape(self, architecture: &Architecture) -> (usize, usize) {
        let d_model = architecture.d_model;
        match (self, &architecture.head) {
            (_, None) => (0, d_model),
            (Self::Dense, Some(_)) => (d_model, d_model),
            (Self::Out, Some(head)) => (head.labels.len(), d_model),
        }
    }

    /// Numbers of the whole head, biases included.
    pub(crate) fn n_elements(architecture: &Architecture) -> usize {
        Self::ALL.map(|slot| slot.shape(architecture)).map(|(n_out, n_in)| n_out * (n_in + 1)).into_iter().sum()
    }
}

impl std::fmt::Display for HeadSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dense => "head dense",
            Self::Out => "head out",
        })
    }
}

/// A head's weights.
pub struct Head<O: Ops> {
    n_labels: usize,
    activation: Activation,
    dense: O::Linear,
    out: O::Linear,
}

impl<O: Ops> std::fmt::Debug for Head<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Head").field("n_labels", &self.n_labels).finish_non_exhaustive()
    }
}

impl<O: Ops> Head<O> {
    /// Takes the head of `architecture` from `build`; `None` if it has none.
    ///
    /// # Errors
    /// If a weight is missing or does not fit.
    pub fn build(architecture: &Architecture, build: &mut impl Build<O>) -> Result<Option<Self>, ModelError> {
        let Some(config) = &architecture.head else { return Ok(None) };
        let dense = build.head(HeadSlot::Dense)?;
        let out = build.head(HeadSlot::Out)?;
        Ok(Some(Self { n_labels: config.labels.len(), activation: config.dense, dense, out }))
    }

    /// Numbers per sequence.
    #[must_use]
    pub fn n_labels(&self) -> usize {
        self.n_labels
    }

    /// `[n_seqs, d_model]` to `[n_seqs, n_labels]`.
    ///
    /// # Errors
    /// If the player fails.
    pub fn forward(&self, ops: &mut O, pooled: &O::Act) -> Result<O::Act, ModelError> {
        let hidden = ops.linear(&self.dense, pooled, self.activation)?;
        ops.linear(&self.out, &hidden, Activation::Identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_finite_whatever_the_numbers() {
        let scores = |function: ScoreFunction, values: &[f32]| {
            let mut values = values.to_vec();
            function.apply(&mut values);
            values
        };
        assert_eq!(scores(ScoreFunction::Softmax, &[-100.0, 10.0]), [0.0, 1.0]);
        assert_eq!(scores(ScoreFunction::Softmax, &[1e30, 1e30, -1e30]), [0.5, 0.5, 0.0]);
        assert_eq!(scores(ScoreFunction::Sigmoid, &[0.0, 1e30, -1e30]), [0.5, 1.0, 0.0]);
        assert_eq!(scores(ScoreFunction::Identity, &[-7.5]), [-7.5]);
        let sum: f32 = scores(ScoreFunction::Softmax, &[0.3, -2.0, 1.1, 0.0]).iter().sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }
}
