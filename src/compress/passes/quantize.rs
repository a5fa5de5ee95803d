//! `quantize`: how the matrices of a group are stored.

use serde::{Deserialize, Serialize};

use super::{CompressionPass, MatrixReport, PassReport, Refusal, Stage, Work, relative_error};
use crate::compress::CompressError;
use crate::compress::progress::Progress;
use crate::compress::slots::Group;
use crate::model::Architecture;
use crate::quant::{Weight, quantize_rows_symmetric};

/// What the levels of a stored number are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Evenly spaced.
    #[default]
    Linear,
}

/// Stores the matrices of a group in few bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quantize {
    /// Which matrices.
    pub group: Group,
    /// The levels.
    pub format: Format,
    /// Bits of an element.
    pub bits: u8,
}

impl Default for Quantize {
    fn default() -> Self {
        Self { group: Group::All, format: Format::Linear, bits: 8 }
    }
}

impl CompressionPass for Quantize {
    fn stage(&self) -> Stage {
        Stage::Store
    }

    fn needs_text(&self) -> bool {
        false
    }

    fn summary(&self) -> String {
        format!("{}: INT8, one scale per output channel or embedding row", self.group)
    }

    fn check(&self, _architecture: &Architecture) -> Result<(), Refusal> {
        match self.bits {
            8 => Ok(()),
            bits => Err(Refusal::new("bits", format!("{bits} is not 8"))),
        }
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let slots: Vec<_> = work.model.slots().into_iter().filter(|slot| self.group.contains(*slot)).collect();
        progress.phase_started("quantize", slots.len() as u64);
        let mut matrices = Vec::new();
        for slot in slots {
            let (before, cols) = (work.model.values(slot).to_vec(), work.model.shape(slot).1);
            let (codes, scale) = quantize_rows_symmetric(&before, cols);
            work.model.store(slot, Weight::Int8 { codes: codes.into(), scale: scale.into() });
            matrices.push(MatrixReport {
                weight_error: Some(relative_error(&before, work.model.values(slot))),
                ..work.model.report(slot)
            });
            progress.advanced(1);
        }
        progress.phase_finished();
        Ok(PassReport { matrices, ..PassReport::default() })
    }
}
