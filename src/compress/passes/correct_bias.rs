//! `correct-bias`: the mean error of every linear layer's output, moved into its bias.

use serde::{Deserialize, Serialize};

use super::quantize::corrected_bias;
use super::{CompressionPass, MatrixReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::moments::Moments;
use crate::compress::progress::Progress;
use crate::compress::slots::MatrixSlot;
use crate::compress::walk::walk;
use crate::compress::weights::Weights;
use crate::model::{Architecture, LinearSlot};

/// `b ← E[y] − Ŵ E[x]`: `x` is what the stored model feeds the layer, `y` what the full-precision one gave there.
///
/// *Source*: Nagel et al. 2019 (data-free quantization, §4.2), here with means measured on text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CorrectBias {}

impl CompressionPass for CorrectBias {
    fn stage(&self) -> Stage {
        Stage::Correct
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        "mean errors of linear layers moved into their biases".to_owned()
    }

    fn check(&self, _architecture: &Architecture) -> Result<(), Refusal> {
        Ok(())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        progress.phase_started("correct biases", (4 * work.model.architecture().layers.len()) as u64);
        let mut matrices = Vec::new();
        let mut visit = |model: &mut Weights, slot: LinearSlot, moments: &Moments| {
            let old = &model.dense(slot).bias;
            let new = corrected_bias(&model.dense(slot).weight, moments);
            // Relative to the output's mean square, which the old bias is a part of.
            let size: f64 = moments.mean_y().map(|mean| mean * mean).sum();
            let moved: f64 = old.iter().zip(&new).map(|(old, new)| f64::from(new - old).powi(2)).sum();
            matrices.push(MatrixReport {
                error_before: Some(moved / size.max(f64::MIN_POSITIVE)),
                error_after: Some(0.0),
                ..model.report(MatrixSlot::Linear(slot))
            });
            model.replace_bias(slot, new);
            Ok(())
        };
        walk(&work.reference, &mut work.model, &text, &|_| true, &mut visit, progress)?;
        progress.phase_finished();
        Ok(PassReport { matrices, ..PassReport::default() })
    }
}
