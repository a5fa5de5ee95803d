//! `quantize`: how the matrices of a group are stored.

mod settings;
mod store;

use std::collections::BTreeMap;

pub use settings::{Compensate, Format, Per, Quantize, Weighting};
pub(in crate::compress) use store::{Costs, Stored, store};

use super::{CompressionPass, MatrixReport, PassReport, Refusal, Stage, Work, relative_error};
use crate::compress::CompressError;
use crate::compress::moments::{Moments, regularize};
use crate::compress::progress::Progress;
use crate::compress::reconstruct::fit;
use crate::compress::rounding::Compensation;
use crate::compress::sense::{Sensitivities, sense};
use crate::compress::slots::{Group, MatrixSlot};
use crate::compress::walk::walk;
use crate::compress::weights::Weights;
use crate::model::{Architecture, LinearSlot};

impl CompressionPass for Quantize {
    fn stage(&self) -> Stage {
        Stage::Store
    }

    fn stores(&self) -> Option<Group> {
        Some(self.group)
    }

    fn needs_text(&self) -> bool {
        self.weighting != Weighting::None || self.compensate != Compensate::None
    }

    fn summary(&self) -> String {
        self.describe()
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        self.refuse(architecture)
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let slots: Vec<MatrixSlot> = work.model.slots().into_iter().filter(|slot| self.group.contains(*slot)).collect();
        let reports = self.quantize(work, &slots, progress)?;
        Ok(PassReport { matrices: reports.into_values().collect(), ..PassReport::default() })
    }
}

/// A matrix as the settings would store it.
pub(in crate::compress) struct Candidate {
    pub(in crate::compress) stored: Stored,
    /// The bias that belongs to it, when that is known.
    pub(in crate::compress) bias: Option<Vec<f32>>,
}

/// Puts a form into the model, and reports on it.
fn settle(model: &mut Weights, slot: MatrixSlot, stored: Stored) -> MatrixReport {
    let before = model.values(slot).to_vec();
    model.store(slot, stored.form);
    MatrixReport {
        weight_error: Some(relative_error(&before, model.values(slot))),
        error_before: stored.error_nearest,
        error_after: stored.error,
        ..model.report(slot)
    }
}

impl Quantize {
    /// Stores the matrices `slots` of the model under work.
    pub(in crate::compress) fn quantize(
        &self,
        work: &mut Work<'_>,
        slots: &[MatrixSlot],
        progress: &dyn Progress,
    ) -> Result<BTreeMap<MatrixSlot, MatrixReport>, CompressError> {
        let mut reports = BTreeMap::new();
        let mut take = |model: &mut Weights, slot: MatrixSlot, candidate: Candidate| {
            let report = settle(model, slot, candidate.stored);
            if let (MatrixSlot::Linear(linear), Some(bias)) = (slot, candidate.bias) {
                model.replace_bias(linear, bias);
            }
            reports.insert(slot, report);
        };
        self.candidates(work, slots, &mut take, progress)?;
        Ok(reports)
    }

    /// What the matrices `slots` would be stored as, one after the other; `take` may put them into the model, and what
    /// comes after then makes up for it.
    pub(in crate::compress) fn candidates(
        &self,
        work: &mut Work<'_>,
        slots: &[MatrixSlot],
        take: &mut dyn FnMut(&mut Weights, MatrixSlot, Candidate),
        progress: &dyn Progress,
    ) -> Result<(), CompressError> {
        let sensed = self.sense(work, slots, progress)?;
        progress.phase_started("quantize", slots.len() as u64);
        let is_linear = |slot: &MatrixSlot| matches!(slot, MatrixSlot::Linear(_));
        for &slot in slots.iter().filter(|slot| !is_linear(slot) || !self.needs_walk()) {
            let costs = match (slot, &sensed) {
                (MatrixSlot::Linear(linear), Some(sensed)) => Costs::of_rows(&sensed.outputs[&linear]),
                (_, Some(sensed)) => self.embedding_costs(sensed)?,
                (_, None) => Costs::default(),
            };
            let stored = store(self, work.model.values(slot), work.model.shape(slot).1, &costs);
            take(&mut work.model, slot, Candidate { stored, bias: None });
            progress.advanced(1);
        }
        if self.needs_walk() && slots.iter().any(is_linear) {
            let text = work.text()?;
            let stops = |slot| slots.contains(&MatrixSlot::Linear(slot));
            let mut visit = |model: &mut Weights, slot: LinearSlot, moments: &Moments| {
                let candidate = self.on_the_walk(model, slot, moments, sensed.as_ref())?;
                take(model, MatrixSlot::Linear(slot), candidate);
                Ok(())
            };
            walk(&work.reference, &mut work.model, &text, &stops, &mut visit, progress)?;
        }
        progress.phase_finished();
        Ok(())
    }

    /// Whether linear layers are quantized one after the other along the model, on what the earlier ones feed them.
    fn needs_walk(&self) -> bool {
        self.compensate == Compensate::Gptq || self.weighting == Weighting::Inputs
    }

    fn sense(
        &self,
        work: &Work<'_>,
        slots: &[MatrixSlot],
        progress: &dyn Progress,
    ) -> Result<Option<Sensitivities>, CompressError> {
        let tables = slots.iter().any(|slot| slot.group() == Group::Embedding);
        // Linear layers feel their inputs during the walk; tables have no inputs, so what they feel is always this.
        if self.weighting == Weighting::Fisher || (self.needs_text() && tables) {
            return sense(&work.reference, &*work.text()?, work.seed, progress).map(Some);
        }
        Ok(None)
    }

    fn embedding_costs(&self, sensed: &Sensitivities) -> Result<Costs, CompressError> {
        let mut metric = sensed.embedding.clone();
        regularize(&mut metric, self.ridge);
        let n = metric.nrows();
        let columns = (0..n).map(|i| metric[(i, i)]).collect();
        let compensation = match self.compensate {
            Compensate::None => None,
            Compensate::Gptq => Some(Compensation::new(&metric).ok_or(CompressError::NotPositive { n })?),
        };
        Ok(Costs { rows: None, columns: Some(columns), compensation })
    }

    /// A linear layer on the walk.
    fn on_the_walk(
        &self,
        model: &Weights,
        slot: LinearSlot,
        moments: &Moments,
        sensed: Option<&Sensitivities>,
    ) -> Result<Candidate, CompressError> {
        let start = model.dense(slot);
        let n = start.n_in;
        let mut covariance = moments.covariance();
        regularize(&mut covariance, self.ridge);
        let rows = match self.weighting {
            Weighting::Fisher => sensed.map(|sensed| sensed.outputs[&slot].clone()),
            _ => None,
        };
        let columns = (0..n).map(|i| covariance[(i, i)]).collect();
        let compensation = match self.compensate {
            Compensate::None => None,
            Compensate::Gptq => Some(Compensation::new(&covariance).ok_or(CompressError::NotPositive { n })?),
        };
        let costs = Costs { rows, columns: Some(columns), compensation };
        // What the codes should come near to: the weights that fit best to the inputs as they are now.
        let fitted = if self.refit { Some(fit(moments, start, 1.0, self.refit_ridge)?.weight) } else { None };
        let stored = store(self, fitted.as_ref().unwrap_or(&start.weight), n, &costs);
        let bias = Some(corrected_bias(&stored.form.to_f32(n), moments));
        Ok(Candidate { stored, bias })
    }
}

/// The bias that brings the mean of the output to where it should be: `E[y] − Ŵ E[x]`.
pub(in crate::compress) fn corrected_bias(weight: &[f32], moments: &Moments) -> Vec<f32> {
    let mean: Vec<f64> = moments.mean_x().collect();
    weight
        .chunks_exact(mean.len())
        .zip(moments.mean_y())
        .map(|(row, wanted)| {
            let given: f64 = row.iter().zip(&mean).map(|(&weight, mean)| f64::from(weight) * mean).sum();
            #[allow(clippy::cast_possible_truncation, reason = "biases are f32")]
            let bias = (wanted - given) as f32;
            bias
        })
        .collect()
}
