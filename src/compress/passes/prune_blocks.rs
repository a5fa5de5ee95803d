//! `prune-blocks`: whole blocks of the packed panels go, and with them the time that they took.

use serde::{Deserialize, Serialize};

use super::zeros::{Zeros, check_density, check_ridge, linears};
use super::{CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::progress::Progress;
use crate::compress::slots::{Group, linear_slots};
use crate::compress::sparsity::{Pattern, Score};
use crate::model::Architecture;
use crate::quant::{BLOCK_DEPTH, BlockSparse, Weight};

/// Removes blocks of `width` output channels by 4 inputs from linear layers, and makes up for them with those that stay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneBlocks {
    /// Which matrices: `attention`, `ffn`, or both.
    pub group: Group,
    /// Share of the blocks of each matrix that stays.
    pub density: f64,
    /// Output channels of a block: 64 or 32.
    pub width: usize,
    /// How blocks are chosen.
    pub score: Score,
    /// Whether what stays becomes the best for its places, on the inputs as the pruned model feeds them.
    pub refit: bool,
    /// Pull to the weights as they are, relative to the mean variance of the inputs.
    pub ridge: f64,
}

impl Default for PruneBlocks {
    fn default() -> Self {
        Self { group: Group::Ffn, density: 0.5, width: 64, score: Score::default(), refit: true, ridge: 0.01 }
    }
}

impl PruneBlocks {
    fn zeros(&self) -> Zeros {
        let pattern = Pattern::Blocks { rows: self.width, cols: BLOCK_DEPTH, density: self.density };
        Zeros { pattern, score: self.score, refit: self.refit, ridge: self.ridge }
    }
}

impl CompressionPass for PruneBlocks {
    fn stage(&self) -> Stage {
        Stage::Store
    }

    fn stores(&self) -> Option<Group> {
        Some(self.group)
    }

    fn needs_text(&self) -> bool {
        self.zeros().needs_text()
    }

    fn summary(&self) -> String {
        let refit = if self.refit { ", the rest refitted" } else { "" };
        let Self { group, density, width, score, .. } = self;
        format!("{group}: {density} of the blocks of {width}x{BLOCK_DEPTH} stay, by {score}{refit}")
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        if self.group == Group::Embedding {
            return Err(Refusal::new(
                "group",
                "rows of tables are looked up, not multiplied: blocks are for linear layers",
            ));
        }
        check_density(self.density)?;
        check_ridge(self.ridge)?;
        if self.width != 64 && self.width != 32 {
            return Err(Refusal::new("width", format!("{} is neither 64 nor 32", self.width)));
        }
        for (layer, config) in architecture.layers.iter().enumerate() {
            for slot in linear_slots(layer) {
                let (n_out, n_in) = slot.shape(config, architecture.d_model);
                let inside = self.group.contains(crate::compress::slots::MatrixSlot::Linear(slot));
                if inside && !(n_out.is_multiple_of(self.width) && n_in.is_multiple_of(BLOCK_DEPTH)) {
                    let reason = format!("{}x{BLOCK_DEPTH} does not divide {slot}, {n_out}x{n_in}", self.width);
                    return Err(Refusal::new("width", reason));
                }
            }
        }
        Ok(())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        // Earlier passes may have changed shapes since they were checked.
        self.check(work.model.architecture())
            .map_err(|refusal| CompressError::Setting { setting: refusal.field.to_owned(), reason: refusal.reason })?;
        let width = self.width;
        let encode = |values: &[f32], kept: &[bool], cols: usize| {
            let (panels, groups) = (values.len() / cols / width, cols / BLOCK_DEPTH);
            let keep: Vec<bool> =
                (0..panels * groups).map(|i| kept[i / groups * width * cols + i % groups * BLOCK_DEPTH]).collect();
            Weight::BlockSparse(BlockSparse::encode(values, cols, width, Some(&keep)))
        };
        let slots = linears(&work.model, self.group);
        let matrices = self.zeros().put(work, &slots, &encode, progress)?;
        Ok(PassReport { matrices, ..PassReport::default() })
    }
}
