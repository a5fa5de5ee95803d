//! After removal: output matrices refitted by least squares, layer by layer, without training.
//!
//! ```text
//! minimise over W, b:   Σ_tokens ‖ W x + b − y ‖²  +  n λ ‖ W − W₀ ‖²
//! ```
//!
//! `x` is what the pruned model feeds to the matrix (everything before it is pruned and refitted already), `y` what the
//! dense model gave at this place, `W₀` the surviving columns of the dense matrix. The ridge pulls to `W₀`, so
//! directions that calibration text hardly shows keep the trained weights.
//!
//! *Source*: the closed form of Kwon et al. 2022 (§3.3, there for one scale per head or neuron) on whole matrices, as
//! in Park et al. 2024 (K-prune, §4.3).

use candle_core::Tensor;
use faer::linalg::solvers::Solve;
use serde::{Deserialize, Serialize};

use super::CompressError;
use super::calibration::CalibrationText;
use super::moments::{Moments, regularize};
use super::observe::{Branch, LayerAlone, embedded};
use super::progress::Progress;
use super::weights::{DenseLinear, Weights};
use crate::model::LinearSlot;

/// What a refitted branch should give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// What the dense model's branch gave.
    Branch,
    /// What brings the residual stream back to the dense model's: errors of earlier layers are corrected too.
    #[default]
    ResidualStream,
}

/// Settings of [`reconstruct`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reconstruction {
    /// λ relative to the mean variance of the inputs.
    pub ridge: f64,
    /// What is fitted.
    pub target: Target,
}

impl Default for Reconstruction {
    fn default() -> Self {
        Self { ridge: 1e-3, target: Target::default() }
    }
}

/// Error of a refitted matrix on the calibration text, relative to the variance of the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Refit {
    /// The matrix.
    pub slot: LinearSlot,
    /// With the dense model's surviving columns.
    pub error_before: f64,
    /// With the fitted ones.
    pub error_after: f64,
}

/// `(W, b)` of the minimum above, and the relative squared errors of `W₀` and `W`.
pub(super) fn fit(
    moments: &Moments,
    start: &DenseLinear,
    target_variance: f64,
    ridge: f64,
) -> Result<Fit, CompressError> {
    let plain = moments.covariance();
    let cross = moments.cross_covariance(); //                      C_xy: [n_in, n_out]
    let mut covariance = plain.clone();
    regularize(&mut covariance, ridge);
    let old = faer::Mat::from_fn(start.n_in, start.n_out, |i, j| f64::from(start.weight[j * start.n_in + i]));
    // ΔWᵀ = (C_xx + λ)⁻¹ (C_xy − C_xx W₀ᵀ)
    let missing = &cross - &plain * &old;
    let factor = covariance.llt(faer::Side::Lower).map_err(|_| CompressError::NotPositive { n: start.n_in })?;
    let new = &old + factor.solve(&missing);
    let error = |w: &faer::Mat<f64>| {
        // tr(C_yy) − 2 tr(W C_xy) + tr(W C_xx Wᵀ)
        let product = &plain * w;
        let mut sum = target_variance;
        for j in 0..w.ncols() {
            for i in 0..w.nrows() {
                sum += w[(i, j)] * (product[(i, j)] - 2.0 * cross[(i, j)]);
            }
        }
        sum / target_variance.max(f64::MIN_POSITIVE)
    };
    let bias: Vec<f32> = moments
        .mean_y()
        .enumerate()
        .map(|(j, mean)| {
            let explained: f64 = moments.mean_x().enumerate().map(|(i, x)| new[(i, j)] * x).sum();
            narrow(mean - explained)
        })
        .collect();
    let weight =
        (0..start.n_out).flat_map(|j| (0..start.n_in).map(move |i| (i, j))).map(|at| narrow(new[at])).collect();
    Ok(Fit { weight, bias, error_before: error(&old), error_after: error(&new) })
}

/// A solution of [`fit`].
#[derive(Debug)]
pub(super) struct Fit {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) error_before: f64,
    pub(super) error_after: f64,
}

#[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Refits `W_O` and `W_down` of every layer of `pruned` to what `dense` gives on the calibration text.
///
/// # Errors
/// If a player or a factorisation fails.
pub fn reconstruct(
    dense: &Weights,
    pruned: &mut Weights,
    text: &CalibrationText,
    settings: Reconstruction,
    progress: &dyn Progress,
) -> Result<Vec<Refit>, CompressError> {
    let n_layers = dense.architecture().layers.len();
    progress.phase_started("reconstruct", (n_layers * text.batches.len() * 4) as u64);
    let mut dense_rows = embedded(dense, &text.batches)?;
    let mut pruned_rows = dense_rows.clone();
    let mut refits = Vec::new();
    for layer in 0..n_layers {
        let alone = LayerAlone::new(dense, layer)?;
        let mut wanted = Vec::with_capacity(text.batches.len());
        for (rows, batch) in dense_rows.iter_mut().zip(&text.batches) {
            let trace = alone.play(rows, &batch.view(0..batch.n_seqs()))?;
            *rows = trace.out;
            wanted.push((trace.attention, trace.ffn));
            progress.advanced(1);
        }
        for slot in [LinearSlot::AttentionOut(layer), LinearSlot::FfnDown(layer)] {
            let start = pruned.dense(slot).clone();
            let mut moments = Moments::new(start.n_in, start.n_out);
            let mut spread = Spread::default();
            let alone = LayerAlone::new(pruned, layer)?;
            for ((rows, wanted), batch) in pruned_rows.iter().zip(&wanted).zip(&text.batches) {
                let trace = alone.play(rows, &batch.view(0..batch.n_seqs()))?;
                let (got, wanted) = match slot {
                    LinearSlot::AttentionOut(_) => (trace.attention, &wanted.0),
                    _ => (trace.ffn, &wanted.1),
                };
                let y = target(&got, wanted, settings.target)?;
                moments.add(&got.input, &y)?;
                spread.add(&y)?;
                progress.advanced(1);
            }
            let fit = fit(&moments, &start, spread.total_variance(&moments), settings.ridge)?;
            pruned.replace(slot, fit.weight, fit.bias);
            refits.push(Refit { slot, error_before: fit.error_before, error_after: fit.error_after });
        }
        let alone = LayerAlone::new(pruned, layer)?;
        for (rows, batch) in pruned_rows.iter_mut().zip(&text.batches) {
            *rows = alone.play(rows, &batch.view(0..batch.n_seqs()))?.out;
            progress.advanced(1);
        }
    }
    progress.phase_finished();
    Ok(refits)
}

fn target(got: &Branch, wanted: &Branch, target: Target) -> candle_core::Result<Tensor> {
    match target {
        Target::Branch => Ok(wanted.output.clone()),
        Target::ResidualStream => (&wanted.output + &wanted.residual)? - &got.residual,
    }
}

/// Sum of squares of the targets.
#[derive(Debug, Default)]
struct Spread {
    n_tokens: f64,
    squares: f64,
}

impl Spread {
    fn add(&mut self, y: &Tensor) -> candle_core::Result<()> {
        self.n_tokens += y.dim(0)? as f64;
        self.squares += f64::from(y.sqr()?.sum_all()?.to_scalar::<f32>()?);
        Ok(())
    }

    /// `tr(C_yy)`.
    fn total_variance(&self, moments: &Moments) -> f64 {
        self.squares / self.n_tokens - moments.mean_y().map(|mean| mean * mean).sum::<f64>()
    }
}
