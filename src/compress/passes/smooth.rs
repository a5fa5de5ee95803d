//! `smooth`: the range of activations is moved into weights where that changes nothing else.
//!
//! ```text
//! y = W x = (W diag(s)) (diag(s)⁻¹ x),      s_j = max|x_j|^α / max|W_·j|^(1 − α)
//! ```
//!
//! *Source*: Xiao et al. 2023 (SmoothQuant, §4). There `s` is folded into the LayerNorm before the matrix. In the post-norm
//! layers of the BERT family that LayerNorm's result is the residual stream as well, so folding would change the model: what
//! can be folded is the attention's output matrix (into the rows of the values, because attention mixes tokens and not
//! channels), and with ReLU the FFN's output matrix (into the rows of the FFN's input matrix).

use serde::{Deserialize, Serialize};

use super::{CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::observe::{Listening, listening_encoder};
use crate::compress::progress::Progress;
use crate::compress::slots::MatrixSlot;
use crate::compress::weights::{DenseLinear, Weights};
use crate::model::{Activation, Architecture, LinearSlot};

/// Moves outliers of activations into weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Smooth {
    /// 0 leaves the weights flat, 1 the activations.
    pub alpha: f64,
}

impl Default for Smooth {
    fn default() -> Self {
        Self { alpha: 0.5 }
    }
}

impl CompressionPass for Smooth {
    fn stage(&self) -> Stage {
        Stage::Shape
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        format!("outliers of activations moved into weights, alpha {}", self.alpha)
    }

    fn check(&self, _architecture: &Architecture) -> Result<(), Refusal> {
        if (0.0..=1.0).contains(&self.alpha) {
            return Ok(());
        }
        Err(Refusal::new("alpha", format!("{} is not in 0..=1", self.alpha)))
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        let n_layers = work.model.architecture().layers.len();
        let with_ffn = work.model.architecture().activation == Activation::Relu;
        progress.phase_started("smooth", text.n_tokens as u64);
        let encoder = listening_encoder(&work.model)?;
        // Attention, FFN, attention, …: largest magnitude of each input of an output matrix.
        let mut largest: Vec<Vec<f32>> = vec![Vec::new(); 2 * n_layers];
        for batch in &text.batches {
            let mut player = Listening::default();
            encoder.forward(&mut player, &batch.view(0..batch.n_seqs()))?;
            for (largest, branch) in largest.iter_mut().zip(&player.branches) {
                let found: Vec<f32> = branch.input.abs()?.max(0)?.to_vec1()?;
                largest.resize(found.len(), 0.0);
                largest.iter_mut().zip(found).for_each(|(largest, found)| *largest = largest.max(found));
            }
            progress.advanced(batch.n_tokens() as u64);
        }
        let mut matrices = Vec::new();
        for layer in 0..n_layers {
            let mut fold = |from: LinearSlot, skip: usize, to: LinearSlot, largest: &[f32]| {
                let factors = factors(work.model.dense(to), largest, self.alpha);
                matrices.push(MatrixSlot::Linear(to).report());
                apply(&mut work.model, from, skip, to, &factors);
            };
            let (qkv, out) = (LinearSlot::Qkv(layer), LinearSlot::AttentionOut(layer));
            let values = 2 * largest[2 * layer].len();
            fold(qkv, values, out, &largest[2 * layer]);
            if with_ffn {
                fold(LinearSlot::FfnUp(layer), 0, LinearSlot::FfnDown(layer), &largest[2 * layer + 1]);
            }
        }
        progress.phase_finished();
        let kept = if with_ffn { "" } else { " and FFN output" };
        let notes = vec![format!(
            "queries, keys, values{kept} and FFN input matrices stay as they are: what feeds them feeds more than them, or \
             passes a curved function"
        )];
        Ok(PassReport { matrices, notes, ..PassReport::default() })
    }
}

/// `s_j`; 1 for inputs that never vary from 0 or are not used.
fn factors(linear: &DenseLinear, largest: &[f32], alpha: f64) -> Vec<f32> {
    let mut weights = vec![0.0f32; linear.n_in];
    for row in linear.weight.chunks_exact(linear.n_in) {
        weights.iter_mut().zip(row).for_each(|(largest, weight)| *largest = largest.max(weight.abs()));
    }
    let factor = |(&x, &w): (&f32, &f32)| {
        #[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
        let factor = (f64::from(x).powf(alpha) / f64::from(w).powf(1.0 - alpha)) as f32;
        if factor.is_finite() && factor > 0.0 { factor } else { 1.0 }
    };
    largest.iter().zip(&weights).map(factor).collect()
}

/// Divides the rows of `from` after the first `skip`, and multiplies the columns of `to`.
fn apply(model: &mut Weights, from: LinearSlot, skip: usize, to: LinearSlot, factors: &[f32]) {
    let DenseLinear { n_in, mut weight, mut bias, .. } = model.dense(from).clone();
    for ((row, bias), factor) in weight.chunks_exact_mut(n_in).zip(&mut bias).skip(skip).zip(factors) {
        row.iter_mut().for_each(|weight| *weight /= factor);
        *bias /= factor;
    }
    model.replace(from, weight, bias);
    let DenseLinear { n_in, mut weight, bias, .. } = model.dense(to).clone();
    for row in weight.chunks_exact_mut(n_in) {
        row.iter_mut().zip(factors).for_each(|(weight, factor)| *weight *= factor);
    }
    model.replace(to, weight, bias);
}
