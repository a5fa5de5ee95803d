//! `sensitivity`: what the sentence embedding loses when one matrix alone is stored in few bits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::quantize::{Candidate, Quantize};
use super::{CompressionPass, MatrixReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::measure::reference_player;
use crate::compress::progress::Progress;
use crate::compress::slots::MatrixSlot;
use crate::compress::weights::Weights;
use crate::eval::{Embeddings, compare, embed};
use crate::model::Architecture;

/// Held-out texts that losses are measured on.
const N_TEXTS: usize = 100;

/// Measures and changes nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sensitivity {
    /// How each matrix is stored for the measurement.
    pub store: Quantize,
}

impl Default for Sensitivity {
    fn default() -> Self {
        Self { store: Quantize { bits: 4, ..Quantize::default() } }
    }
}

/// A matrix stored alone.
pub(super) struct Alone {
    pub(super) slot: MatrixSlot,
    /// `1 − cosine` of the sentence embedding in the mean over held-out texts.
    pub(super) loss: f64,
    /// Bytes of the stored form.
    pub(super) bytes: u64,
    pub(super) report: MatrixReport,
}

/// The embeddings of `texts` by a model in memory, in f32.
fn embeddings(model: &Weights, work: &Work<'_>, texts: &[&str]) -> Result<Embeddings, CompressError> {
    Ok(embed(&mut reference_player(model, false)?, &*work.encode, texts, |_| ())?)
}

/// Stores each matrix of the settings' group alone and measures what the embedding loses.
pub(super) fn measure_alone(
    settings: &Quantize,
    work: &mut Work<'_>,
    progress: &dyn Progress,
) -> Result<Vec<Alone>, CompressError> {
    let text = work.text()?;
    if text.held_out.is_empty() {
        return Err(CompressError::Setting {
            setting: "calibration".to_owned(),
            reason: "no text is left to measure on: give more lines or use fewer tokens".to_owned(),
        });
    }
    let texts: Vec<&str> = text.held_out.iter().take(N_TEXTS).map(String::as_str).collect();
    let slots: Vec<MatrixSlot> = work.model.slots().into_iter().filter(|slot| settings.group.contains(*slot)).collect();
    let mut candidates: BTreeMap<MatrixSlot, Candidate> = BTreeMap::new();
    let mut take = |_: &mut Weights, slot: MatrixSlot, candidate: Candidate| drop(candidates.insert(slot, candidate));
    settings.candidates(work, &slots, &mut take, progress)?;
    let expected = embeddings(&work.model, work, &texts)?;
    progress.phase_started("sensitivity of each matrix", slots.len() as u64);
    let mut alone = Vec::with_capacity(slots.len());
    for (slot, candidate) in candidates {
        let mut model = work.model.clone();
        model.store(slot, candidate.stored.form);
        if let (MatrixSlot::Linear(linear), Some(bias)) = (slot, candidate.bias) {
            model.replace_bias(linear, bias);
        }
        let loss = (1.0 - compare(&expected, &embeddings(&model, work, &texts)?)?.mean).max(0.0);
        let report = MatrixReport {
            sensitivity: Some(loss),
            error_before: candidate.stored.error_nearest,
            error_after: candidate.stored.error,
            ..model.report(slot)
        };
        alone.push(Alone { slot, loss, bytes: model.matrix_bytes(slot), report });
        progress.advanced(1);
    }
    progress.phase_finished();
    Ok(alone)
}

impl CompressionPass for Sensitivity {
    fn stage(&self) -> Stage {
        Stage::Any
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        format!("loss of the embedding when one matrix alone is stored, {}", self.store.summary())
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        self.store.check(architecture)
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let alone = measure_alone(&self.store, work, progress)?;
        let matrices = alone.into_iter().map(|alone| alone.report).collect();
        Ok(PassReport { matrices, ..PassReport::default() })
    }
}
