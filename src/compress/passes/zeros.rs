//! What the passes share that put zeros into matrices: where each matrix meets its inputs, and what makes up for what
//! went.

use faer::Mat;

use super::{MatrixReport, Refusal, Work};
use crate::compress::CompressError;
use crate::compress::moments::{Moments, regularize};
use crate::compress::passes::quantize::corrected_bias;
use crate::compress::passes::report::relative_error;
use crate::compress::progress::Progress;
use crate::compress::reconstruct::fit;
use crate::compress::slots::{Group, MatrixSlot};
use crate::compress::sparsity::{Pattern, Score, output_error, sparsify};
use crate::compress::walk::walk;
use crate::compress::weights::Weights;
use crate::model::LinearSlot;
use crate::quant::Weight;

/// The stored form of a matrix: its numbers, which of them are kept, and its number of columns.
type Encode<'a> = &'a dyn Fn(&[f32], &[bool], usize) -> Weight<'static>;

/// Where zeros may stand in a matrix, by its outputs and inputs.
type PatternOf<'a> = &'a dyn Fn(usize, usize) -> Pattern;

/// Settings of both passes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Zeros {
    pub(super) score: Score,
    pub(super) refit: bool,
    pub(super) ridge: f64,
}

/// `[rows, cols]` as a matrix in f64.
pub(super) fn to_mat(values: &[f32], cols: usize) -> Mat<f64> {
    Mat::from_fn(values.len() / cols, cols, |i, j| f64::from(values[i * cols + j]))
}

/// Row-major numbers of a matrix.
#[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
pub(super) fn to_values(matrix: &Mat<f64>) -> Vec<f32> {
    (0..matrix.nrows()).flat_map(|i| (0..matrix.ncols()).map(move |j| (i, j))).map(|at| matrix[at] as f32).collect()
}

/// The linear layers of a group.
pub(super) fn linears(model: &Weights, group: Group) -> Vec<LinearSlot> {
    let linear = |slot| match slot {
        MatrixSlot::Linear(linear) if group.contains(slot) => Some(linear),
        _ => None,
    };
    model.slots().into_iter().filter_map(linear).collect()
}

/// Refuses a ridge that is no number from 0 on.
pub(super) fn check_ridge(ridge: f64) -> Result<(), Refusal> {
    if ridge.is_finite() && ridge >= 0.0 {
        return Ok(());
    }
    Err(Refusal::new("ridge", format!("{ridge} is not a number from 0 on")))
}

/// Refuses a density that keeps nothing or everything.
pub(super) fn check_density(density: f64) -> Result<(), Refusal> {
    if (0.01..1.0).contains(&density) {
        return Ok(());
    }
    Err(Refusal::new("density", format!("{density} is not in 0.01..1, the share that stays")))
}

impl Zeros {
    /// Whether places or values depend on what the matrices see.
    pub(super) fn needs_text(&self) -> bool {
        self.score != Score::Magnitude || self.refit
    }

    /// Puts zeros into `slots`, where `pattern` lets them stand; `encode` is given the numbers, the places kept and the number of
    /// columns.
    pub(super) fn put(
        &self,
        work: &mut Work<'_>,
        slots: &[LinearSlot],
        (pattern, encode): (PatternOf<'_>, Encode<'_>),
        progress: &dyn Progress,
    ) -> Result<Vec<MatrixReport>, CompressError> {
        progress.phase_started("prune", slots.len() as u64);
        let mut reports = Vec::new();
        if self.needs_text() {
            let text = work.text()?;
            let stops = |slot| slots.contains(&slot);
            let mut visit = |model: &mut Weights, slot: LinearSlot, moments: &Moments| {
                reports.push(self.on_the_walk(model, slot, moments, (pattern, encode))?);
                Ok(())
            };
            walk(&work.reference, &mut work.model, &text, &stops, &mut visit, progress)?;
        } else {
            for &slot in slots {
                let start = work.model.dense(slot);
                let (weight, n_in) = (to_mat(&start.weight, start.n_in), start.n_in);
                // By magnitude and without a refit nothing depends on the inputs.
                let pattern = pattern(weight.nrows(), n_in);
                let sparse = sparsify(&weight, &Mat::identity(n_in, n_in), pattern, self.score, false)
                    .ok_or(CompressError::NotPositive { n: n_in })?;
                let form = encode(&to_values(&sparse.weight), &sparse.kept, n_in);
                reports.push(settle(&mut work.model, slot, form, None));
                progress.advanced(1);
            }
        }
        progress.phase_finished();
        Ok(reports)
    }

    fn on_the_walk(
        &self,
        model: &mut Weights,
        slot: LinearSlot,
        moments: &Moments,
        (pattern, encode): (PatternOf<'_>, Encode<'_>),
    ) -> Result<MatrixReport, CompressError> {
        let start = model.dense(slot).clone();
        let n_in = start.n_in;
        let mut covariance = moments.covariance();
        regularize(&mut covariance, self.ridge);
        // What the rest should come near to: with a refit, the weights that fit best to the inputs as they are now.
        let wanted = if self.refit { fit(moments, &start, 1.0, self.ridge)?.weight } else { start.weight };
        let wanted = to_mat(&wanted, n_in);
        let pattern = pattern(wanted.nrows(), n_in);
        let sparse = sparsify(&wanted, &covariance, pattern, self.score, self.refit)
            .ok_or(CompressError::NotPositive { n: n_in })?;
        let masked =
            Mat::from_fn(wanted.nrows(), n_in, |i, j| if sparse.kept[i * n_in + j] { wanted[(i, j)] } else { 0.0 });
        let form = encode(&to_values(&sparse.weight), &sparse.kept, n_in);
        let stored = form.to_f32(n_in);
        let errors =
            (output_error(&wanted, &masked, &covariance), output_error(&wanted, &to_mat(&stored, n_in), &covariance));
        let bias = corrected_bias(&stored, moments);
        let report = settle(model, slot, form, Some(errors));
        model.replace_bias(slot, bias);
        Ok(report)
    }
}

/// Puts a form into the model, and reports on it; `errors` are those of the output, before and after what made up for
/// them.
pub(super) fn settle(
    model: &mut Weights,
    slot: LinearSlot,
    form: Weight<'static>,
    errors: Option<(f64, f64)>,
) -> MatrixReport {
    let slot = MatrixSlot::Linear(slot);
    let before = model.values(slot).to_vec();
    model.store(slot, form);
    MatrixReport {
        weight_error: Some(relative_error(&before, model.values(slot))),
        error_before: errors.map(|errors| errors.0),
        error_after: errors.map(|errors| errors.1),
        ..model.report(slot)
    }
}
