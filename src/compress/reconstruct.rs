//! After removal: matrices refitted by least squares, layer by layer, without training.
//!
//! ```text
//! minimise over W, b:   Σ_tokens ‖ W x + b − y ‖²  +  n λ ‖ W − W₀ ‖²
//! ```
//!
//! `x` is what the pruned model feeds to the matrix (everything before it is pruned and refitted already), `y` what the
//! dense model gave at this place, `W₀` the surviving part of the dense matrix. The ridge pulls to `W₀`, so
//! directions that calibration text hardly shows keep the trained weights.
//!
//! Output matrices (`W_O`, `W_down`) make up for the heads and neurons that are gone. With [`Matrices::All`] those that
//! read the residual stream are refitted too, each in its turn: their surviving rows should give what they gave in the dense
//! model, although the stream that feeds them has drifted.
//!
//! *Source*: the closed form of Kwon et al. 2022 (§3.3, there for one scale per head or neuron) on whole matrices, as
//! in Park et al. 2024 (K-prune, §4.3).

use candle_core::Tensor;
use faer::linalg::solvers::Solve;
use serde::{Deserialize, Serialize};

use super::CompressError;
use super::calibration::CalibrationText;
use super::moments::{Moments, regularize};
use super::observe::{Branch, LayerAlone, LayerTrace, embedded};
use super::progress::Progress;
use super::slots::linear_slots;
use super::weights::{DenseLinear, Weights};
use crate::exec::candle::WeightSource;
use crate::model::{LinearSlot, NormSlot};

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

/// Which matrices are refitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matrices {
    /// The attention's and the FFN's output matrix of every layer.
    #[default]
    Outputs,
    /// Queries, keys and values and the FFN's first matrix as well.
    All,
}

/// Settings of [`reconstruct`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reconstruction {
    /// Which matrices.
    pub matrices: Matrices,
    /// λ relative to the mean variance of the inputs.
    pub ridge: f64,
    /// What is fitted.
    pub target: Target,
}

impl Default for Reconstruction {
    fn default() -> Self {
        Self { matrices: Matrices::default(), ridge: 1e-3, target: Target::default() }
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

/// Refits matrices of every layer of `pruned` to what `dense`, of which it was cut, gives on the calibration text.
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
    let slots = |layer| match settings.matrices {
        Matrices::Outputs => vec![LinearSlot::AttentionOut(layer), LinearSlot::FfnDown(layer)],
        Matrices::All => linear_slots(layer).to_vec(),
    };
    let origins = pruned.origins().to_vec();
    let n_plays = n_layers + origins.len() * (1 + slots(0).len());
    progress.phase_started("reconstruct", (n_plays * text.batches.len()) as u64);
    let mut dense_rows = embedded(dense, &text.batches)?;
    let mut pruned_rows = embedded(pruned, &text.batches)?;
    let mut refits = Vec::new();
    let mut next = 0;
    for layer in 0..origins.len() {
        let origin = origins[layer];
        let rows = match settings.matrices {
            Matrices::Outputs => None,
            Matrices::All => Some(pruned.kept(layer).rows(&dense.architecture().layers[origin])?),
        };
        // The layers of the dense model up to the next that was kept: what is gone in between is made up for here.
        let last = origins.get(layer + 1).map_or(n_layers, |&origin| origin) - 1;
        let mut traces: Vec<LayerTrace> = Vec::with_capacity(text.batches.len());
        for dense_layer in next..=last {
            let alone = LayerAlone::new(dense, dense_layer)?;
            for (index, (dense_rows, batch)) in dense_rows.iter_mut().zip(&text.batches).enumerate() {
                let trace = alone.play(dense_rows, &batch.view(0..batch.n_seqs()))?;
                *dense_rows = trace.out.clone();
                if dense_layer == origin {
                    traces.push(trace);
                } else if dense_layer == last {
                    // All that is gone as one branch, which starts at the stream that the kept layer's own starts at.
                    let ffn = &mut traces[index].ffn;
                    ffn.output = ((trace.ffn.output + trace.ffn.residual)? - &ffn.residual)?;
                }
                progress.advanced(1);
            }
        }
        next = last + 1;
        if last != origin {
            // The stream that is fitted is that before this norm.
            pruned.replace_norm(NormSlot::Ffn(layer), dense.norm(NormSlot::Ffn(last))?);
        }
        let wanted = traces.iter().map(|trace| Wanted::new(trace, rows.as_ref(), settings.target));
        let wanted = wanted.collect::<candle_core::Result<Vec<_>>>()?;
        for slot in slots(layer) {
            let start = pruned.dense(slot).clone();
            let mut moments = Moments::new(start.n_in, start.n_out);
            let mut spread = Spread::default();
            let alone = LayerAlone::new(pruned, layer)?;
            for ((rows, wanted), batch) in pruned_rows.iter().zip(&wanted).zip(&text.batches) {
                let trace = alone.play(rows, &batch.view(0..batch.n_seqs()))?;
                let (input, y) = match slot {
                    LinearSlot::Qkv(_) => (trace.qkv.input, wanted.entries[0].clone()),
                    LinearSlot::AttentionOut(_) => {
                        let y = still_missing(&wanted.attention, &trace.attention, settings.target)?;
                        (trace.attention.input, y)
                    }
                    LinearSlot::FfnUp(_) => (trace.up.input, wanted.entries[1].clone()),
                    LinearSlot::FfnDown(_) => {
                        let y = still_missing(&wanted.ffn, &trace.ffn, settings.target)?;
                        (trace.ffn.input, y)
                    }
                };
                moments.add(&input, &y)?;
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

/// What a batch gave in the dense layer.
struct Wanted {
    /// Of the matrices that read the residual stream, rows that are still there; empty when they are not refitted.
    entries: Vec<Tensor>,
    attention: Tensor,
    ffn: Tensor,
}

impl Wanted {
    fn new(trace: &LayerTrace, rows: Option<&[Tensor; 2]>, target: Target) -> candle_core::Result<Self> {
        let entries = rows.iter().flat_map(|rows| [(&trace.qkv, &rows[0]), (&trace.up, &rows[1])]);
        let branch = |branch: &Branch| match target {
            Target::Branch => Ok(branch.output.clone()),
            Target::ResidualStream => &branch.output + &branch.residual,
        };
        Ok(Self {
            entries: entries.map(|(entry, rows)| entry.output.index_select(rows, 1)).collect::<Result<_, _>>()?,
            attention: branch(&trace.attention)?,
            ffn: branch(&trace.ffn)?,
        })
    }
}

/// What a branch has to give.
fn still_missing(wanted: &Tensor, got: &Branch, target: Target) -> candle_core::Result<Tensor> {
    match target {
        Target::Branch => Ok(wanted.clone()),
        Target::ResidualStream => wanted - &got.residual,
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
