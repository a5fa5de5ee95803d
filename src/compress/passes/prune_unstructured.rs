//! `prune-unstructured`: single weights go. The file becomes smaller; the work stays what it was, and the report says so.

use serde::{Deserialize, Serialize};

use super::zeros::{Zeros, check_density, check_ridge, linears};
use super::{CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::progress::Progress;
use crate::compress::slots::{Group, MatrixSlot, linear_slots};
use crate::compress::sparsity::{Pattern, Score};
use crate::model::Architecture;
use crate::quant::{Bitmap, Weight};

/// Removes single weights of linear layers: a share anywhere, or all but `n` of every `m` neighbours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneUnstructured {
    /// Which matrices: `attention`, `ffn`, or both.
    pub group: Group,
    /// Share of the weights of each matrix that stays (0.5 if neither it nor `n_of_m` is given).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// `[n, m]`: `n` of every `m` neighbouring inputs of a row stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_of_m: Option<[usize; 2]>,
    /// How weights are chosen.
    pub score: Score,
    /// Whether what stays becomes the best for its places, on the inputs as the pruned model feeds them.
    pub refit: bool,
    /// Pull to the weights as they are, relative to the mean variance of the inputs.
    pub ridge: f64,
}

impl Default for PruneUnstructured {
    fn default() -> Self {
        let score = Score::default();
        Self { group: Group::All, density: None, n_of_m: None, score, refit: true, ridge: 0.01 }
    }
}

impl PruneUnstructured {
    fn zeros(&self) -> Zeros {
        Zeros { score: self.score, refit: self.refit, ridge: self.ridge }
    }

    fn pattern(&self) -> Pattern {
        match self.n_of_m {
            Some([n, m]) => Pattern::NOfM { n, m },
            None => Pattern::Unstructured { density: self.density.unwrap_or(0.5) },
        }
    }
}

impl CompressionPass for PruneUnstructured {
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
        let stays = match self.pattern() {
            Pattern::NOfM { n, m } => format!("{n} of every {m} weights stay"),
            _ => format!("{} of the weights stay", self.density.unwrap_or(0.5)),
        };
        format!("{}: {stays}, by {}{refit}; smaller, not faster", self.group, self.score)
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        if self.group == Group::Embedding {
            return Err(Refusal::new(
                "group",
                "the embedding is made smaller by `quantize`, `low-rank` or `vocabulary`",
            ));
        }
        check_ridge(self.ridge)?;
        match (self.density, self.n_of_m) {
            (Some(_), Some(_)) => return Err(Refusal::new("n_of_m", "give either `density` or `n_of_m`")),
            (density, None) => check_density(density.unwrap_or(0.5))?,
            (None, Some([n, m])) => {
                if n == 0 || n >= m || m > 64 {
                    return Err(Refusal::new("n_of_m", format!("{n} of {m}: expected 0 < n < m <= 64")));
                }
                for (layer, config) in architecture.layers.iter().enumerate() {
                    for slot in
                        linear_slots(layer).into_iter().filter(|slot| self.group.contains(MatrixSlot::Linear(*slot)))
                    {
                        let (_, n_in) = slot.shape(config, architecture.d_model);
                        if !n_in.is_multiple_of(m) {
                            return Err(Refusal::new(
                                "n_of_m",
                                format!("{m} does not divide the {n_in} inputs of {slot}"),
                            ));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        // Earlier passes may have changed shapes since they were checked.
        self.check(work.model.architecture())
            .map_err(|refusal| CompressError::Setting { setting: refusal.field.to_owned(), reason: refusal.reason })?;
        let encode = |values: &[f32], _kept: &[bool], cols: usize| Weight::Bitmap(Bitmap::encode(values, cols));
        let slots = linears(&work.model, self.group);
        let matrices = self.zeros().put(work, &slots, (&|_, _| self.pattern(), &encode), progress)?;
        let notes = vec![
            "single zeros bring no speed: they are stored as a bitmap and the weights around them, and executed as dense INT8"
                .to_owned(),
        ];
        Ok(PassReport { matrices, notes, ..PassReport::default() })
    }
}
