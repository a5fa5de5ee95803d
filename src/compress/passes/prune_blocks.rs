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

/// Removes blocks of 64 or 32 output channels by 4 inputs from linear layers, and makes up for them with those that stay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneBlocks {
    /// Which matrices: `attention`, `ffn`, or both.
    pub group: Group,
    /// Share of the blocks of each matrix that stays.
    pub density: f64,
    /// Output channels of a block, 64 or 32. Left out, it is 32 for a matrix with more outputs than inputs, else 64: what was
    /// faster at half density on Zen 4. On Granite Rapids 64 is for both (`cargo bench --bench products -- --ratios 4096`).
    pub width: Option<usize>,
    /// How blocks are chosen.
    pub score: Score,
    /// Whether what stays becomes the best for its places, on the inputs as the pruned model feeds them.
    pub refit: bool,
    /// Pull to the weights as they are, relative to the mean variance of the inputs.
    pub ridge: f64,
}

impl Default for PruneBlocks {
    fn default() -> Self {
        Self { group: Group::Ffn, density: 0.5, width: None, score: Score::default(), refit: true, ridge: 0.01 }
    }
}

impl PruneBlocks {
    fn zeros(&self) -> Zeros {
        Zeros { score: self.score, refit: self.refit, ridge: self.ridge }
    }

    /// Output channels of the blocks of a matrix.
    fn width(&self, n_out: usize, n_in: usize) -> usize {
        let best = if n_out > n_in || !n_out.is_multiple_of(64) { 32 } else { 64 };
        self.width.unwrap_or(best)
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
        let width = self.width.map_or("32 or 64".to_owned(), |width| width.to_string());
        let Self { group, density, score, .. } = self;
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
        if let Some(width) = self.width.filter(|width| ![64, 32].contains(width)) {
            return Err(Refusal::new("width", format!("{width} is neither 64 nor 32")));
        }
        for (layer, config) in architecture.layers.iter().enumerate() {
            for slot in linear_slots(layer) {
                let (n_out, n_in) = slot.shape(config, architecture.d_model);
                let inside = self.group.contains(crate::compress::slots::MatrixSlot::Linear(slot));
                let width = self.width(n_out, n_in);
                if inside && !(n_out.is_multiple_of(width) && n_in.is_multiple_of(BLOCK_DEPTH)) {
                    let field = if self.width.is_some() { "width" } else { "group" };
                    let reason = format!("{width}x{BLOCK_DEPTH} does not divide {slot}, {n_out}x{n_in}");
                    return Err(Refusal::new(field, reason));
                }
            }
        }
        Ok(())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        // Earlier passes may have changed shapes since they were checked.
        self.check(work.model.architecture())
            .map_err(|refusal| CompressError::Setting { setting: refusal.field.to_owned(), reason: refusal.reason })?;
        let pattern = |n_out, n_in| {
            let rows = self.width(n_out, n_in);
            Pattern::Blocks { rows, cols: BLOCK_DEPTH, density: self.density }
        };
        let encode = |values: &[f32], kept: &[bool], cols: usize| {
            let width = self.width(values.len() / cols, cols);
            let (panels, groups) = (values.len() / cols / width, cols / BLOCK_DEPTH);
            let keep: Vec<bool> =
                (0..panels * groups).map(|i| kept[i / groups * width * cols + i % groups * BLOCK_DEPTH]).collect();
            Weight::BlockSparse(BlockSparse::encode(values, cols, width, Some(&keep)))
        };
        let slots = linears(&work.model, self.group);
        let matrices = self.zeros().put(work, &slots, (&pattern, &encode), progress)?;
        Ok(PassReport { matrices, ..PassReport::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn width_follows_the_shape_unless_it_is_given() {
        let free = PruneBlocks::default();
        assert_eq!(
            [(1536, 384), (384, 1536), (384, 384), (96, 384)].map(|(n_out, n_in)| free.width(n_out, n_in)),
            [32, 64, 64, 32]
        );
        let given = PruneBlocks { width: Some(64), ..free };
        assert_eq!(given.width(1536, 384), 64);
    }
}
