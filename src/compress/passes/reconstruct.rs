//! `reconstruct`: matrices refitted by least squares after pruning.

use serde::{Deserialize, Serialize};

use super::{CompressionPass, MatrixReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::progress::Progress;
use crate::compress::reconstruct::{Matrices, Reconstruction, Target, reconstruct};
use crate::compress::slots::MatrixSlot;
use crate::model::Architecture;

/// Refits matrices of every layer to what the uncompressed model gives on the calibration text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reconstruct {
    /// Which matrices.
    pub matrices: Matrices,
    /// Pull to the surviving weights, relative to the mean variance of the inputs.
    pub ridge: f64,
    /// What is fitted.
    pub target: Target,
}

impl Default for Reconstruct {
    fn default() -> Self {
        let Reconstruction { matrices, ridge, target } = Reconstruction::default();
        Self { matrices, ridge, target }
    }
}

impl CompressionPass for Reconstruct {
    fn stage(&self) -> Stage {
        Stage::Shape
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        let which = match self.matrices {
            Matrices::Outputs => "output matrices",
            Matrices::All => "all matrices",
        };
        format!("{which} by least squares, ridge {}", self.ridge)
    }

    fn check(&self, _architecture: &Architecture) -> Result<(), Refusal> {
        if self.ridge.is_finite() && self.ridge >= 0.0 {
            return Ok(());
        }
        Err(Refusal::new("ridge", format!("{} is not a number from 0 on", self.ridge)))
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        let settings = Reconstruction { matrices: self.matrices, ridge: self.ridge, target: self.target };
        let refits = reconstruct(&work.dense, &mut work.model, &text, settings, progress)?;
        let matrices = refits
            .iter()
            .map(|refit| MatrixReport {
                error_before: Some(refit.error_before),
                error_after: Some(refit.error_after),
                ..MatrixSlot::Linear(refit.slot).report()
            })
            .collect();
        Ok(PassReport { matrices, ..PassReport::default() })
    }
}
