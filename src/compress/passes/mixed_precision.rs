//! `mixed-precision`: 4 bits where the sentence embedding feels it least, 8 elsewhere.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::quantize::Quantize;
use super::sensitivity::{Alone, measure_alone};
use super::{CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::progress::Progress;
use crate::compress::slots::MatrixSlot;
use crate::model::Architecture;

/// Chooses for every matrix of a group between few bits and INT8, under one budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MixedPrecision {
    /// Most bytes of all weights, in millions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub megabytes: Option<f64>,
    /// Most loss of the sentence embedding, `1 − cosine`, as the sum of what the matrices lose alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// How a matrix is stored in few bits, and which group is chosen from.
    pub store: Quantize,
}

impl Default for MixedPrecision {
    fn default() -> Self {
        Self { megabytes: None, loss: None, store: Quantize { bits: 4, ..Quantize::default() } }
    }
}

impl CompressionPass for MixedPrecision {
    fn stage(&self) -> Stage {
        Stage::Store
    }

    fn stores(&self) -> Option<crate::compress::Group> {
        Some(self.store.group)
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        let budget = match (self.megabytes, self.loss) {
            (Some(megabytes), _) => format!("within {megabytes} MB"),
            (_, loss) => format!("within a loss of {}", loss.unwrap_or_default()),
        };
        format!("{}, or INT8 where that costs most, {budget}", self.store.summary())
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        self.store.check(architecture)?;
        if self.store.bits != 4 {
            return Err(Refusal::new("store", "8 bits are the other choice already; give bits = 4"));
        }
        match (self.megabytes, self.loss) {
            (None, None) => Err(Refusal::new("", "give a budget: megabytes or loss")),
            (Some(_), Some(_)) => Err(Refusal::new("loss", "give one budget, megabytes or loss")),
            (None, Some(loss)) if !(loss > 0.0 && loss < 1.0) => {
                Err(Refusal::new("loss", format!("{loss} is not between 0 and 1")))
            }
            (Some(megabytes), None) => {
                // The tables that are left by now whole, and of the rest what pruning leaves, a tenth.
                let rows = architecture.vocab_size + architecture.positions.table_len;
                let linears = crate::exec::cost::linear_macs_per_token(&architecture.layers, architecture.d_model);
                let least = (rows * architecture.d_model) as f64 / 2.0 + linears as f64 / 20.0;
                if megabytes * 1e6 >= least {
                    return Ok(());
                }
                let reason = format!("{megabytes} MB cannot be met: 4 bits take {:.1} MB at least", least / 1e6);
                Err(Refusal::new("megabytes", reason))
            }
            (None, Some(_)) => Ok(()),
        }
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let alone = measure_alone(&self.store, work, progress)?;
        let high: Vec<u64> = alone.iter().map(|alone| int8_bytes(work, alone.slot)).collect();
        // What is not chosen here: other groups, biases, norms.
        let chosen_from: u64 = alone.iter().map(|alone| work.model.matrix_bytes(alone.slot)).sum();
        let rest = work.model.bytes() - chosen_from;
        let choice = choose(&alone, &high, rest, self.megabytes, self.loss)?;
        let low: Vec<MatrixSlot> = choice.iter().copied().collect();
        let others: Vec<MatrixSlot> =
            alone.iter().map(|alone| alone.slot).filter(|slot| !choice.contains(slot)).collect();
        let mut reports = Quantize::default().quantize(work, &others, progress)?;
        reports.extend(self.store.quantize(work, &low, progress)?);
        let predicted: f64 = alone.iter().filter(|alone| choice.contains(&alone.slot)).map(|alone| alone.loss).sum();
        for alone in &alone {
            if let Some(report) = reports.get_mut(&alone.slot) {
                report.sensitivity = Some(alone.loss);
            }
        }
        let notes = vec![format!(
            "{} of {} matrices in 4 bits; their losses alone add up to {predicted:.5}",
            choice.len(),
            alone.len()
        )];
        Ok(PassReport { matrices: reports.into_values().collect(), notes, ..PassReport::default() })
    }
}

fn int8_bytes(work: &Work<'_>, slot: MatrixSlot) -> u64 {
    let (rows, cols) = work.model.shape(slot);
    (rows * cols + 4 * rows) as u64
}

/// The matrices that get few bits: least loss within a size, or least size within a loss.
///
/// Exact up to the grain of the sizes, by dynamic programming over matrices: `best[bytes saved] = least loss`.
fn choose(
    alone: &[Alone],
    high: &[u64],
    rest: u64,
    megabytes: Option<f64>,
    loss: Option<f64>,
) -> Result<BTreeSet<MatrixSlot>, CompressError> {
    const STEPS: usize = 4_096;
    let saved: Vec<u64> = alone.iter().zip(high).map(|(alone, high)| high.saturating_sub(alone.bytes)).collect();
    let total: u64 = saved.iter().sum();
    let grain = total.div_ceil(STEPS as u64).max(1);
    let units = |bytes: u64| usize::try_from(bytes / grain).unwrap_or(STEPS);
    let n = saved.iter().map(|&bytes| units(bytes)).sum::<usize>() + 1;
    let mut best = vec![f64::INFINITY; n];
    best[0] = 0.0;
    let mut taken: Vec<Vec<bool>> = Vec::with_capacity(alone.len());
    for (alone, &saved) in alone.iter().zip(&saved) {
        let step = units(saved);
        let mut took = vec![false; n];
        for at in (step..n).rev() {
            let loss = best[at - step] + alone.loss;
            if step > 0 && loss < best[at] {
                best[at] = loss;
                took[at] = true;
            }
        }
        taken.push(took);
    }
    let all: u64 = rest + high.iter().sum::<u64>();
    let end = match (megabytes, loss) {
        (Some(megabytes), _) => {
            // Sums of rounded-down savings never promise more than is saved.
            let size = |at: usize| all as f64 - (at as u64 * grain) as f64;
            let within = (0..n).filter(|&at| best[at].is_finite() && size(at) <= megabytes * 1e6);
            within.min_by(|&a, &b| best[a].total_cmp(&best[b])).ok_or_else(|| CompressError::Setting {
                setting: "megabytes".to_owned(),
                reason: format!(
                    "{megabytes} MB cannot be met: with all of these matrices in 4 bits the weights take {:.2} MB",
                    (all - total) as f64 / 1e6
                ),
            })?
        }
        (_, loss) => {
            let most = loss.unwrap_or_default();
            (0..n).rev().find(|&at| best[at] <= most).unwrap_or(0)
        }
    };
    let mut chosen = BTreeSet::new();
    let mut at = end;
    for (index, took) in taken.iter().enumerate().rev() {
        if took[at] {
            chosen.insert(alone[index].slot);
            at -= units(saved[index]);
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::passes::MatrixReport;
    use crate::model::LinearSlot;

    fn alone(losses: &[f64], bytes: &[u64]) -> Vec<Alone> {
        let one = |(layer, (&loss, &bytes)): (usize, (&f64, &u64))| Alone {
            slot: MatrixSlot::Linear(LinearSlot::Qkv(layer)),
            loss,
            bytes,
            report: MatrixReport::default(),
        };
        losses.iter().zip(bytes).enumerate().map(one).collect()
    }

    fn layers(chosen: &BTreeSet<MatrixSlot>) -> Vec<usize> {
        chosen
            .iter()
            .filter_map(|slot| match slot {
                MatrixSlot::Linear(slot) => Some(slot.layer()),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn the_choice_is_the_best_of_all_choices() {
        let losses = [0.03, 0.001, 0.02, 0.004, 0.011, 0.006, 0.002];
        let low = [400_000, 100_000, 250_000, 120_000, 600_000, 90_000, 310_000];
        let high: Vec<u64> = low.iter().map(|bytes| bytes * 2).collect();
        let alone = alone(&losses, &low);
        let rest = 500_000;
        for megabytes in [4.0, 3.5, 3.1, 2.7, 2.5] {
            let got = choose(&alone, &high, rest, Some(megabytes), None).unwrap();
            let cost = |mask: usize| {
                let within = |i: &usize| mask >> i & 1 == 1;
                let bytes: u64 = (0..7).map(|i| if within(&i) { low[i] } else { high[i] }).sum::<u64>() + rest;
                (bytes as f64 / 1e6, (0..7).filter(within).map(|i| losses[i]).sum::<f64>())
            };
            let best = (0..128).map(cost).filter(|(mb, _)| *mb <= megabytes).map(|(_, loss)| loss).fold(1.0, f64::min);
            let mask = layers(&got).iter().fold(0, |mask, layer| mask | 1 << layer);
            let (bytes, loss) = cost(mask);
            assert!(bytes <= megabytes && loss <= best + 0.002, "{megabytes}: {bytes} {loss} {best}");
        }
        let message = choose(&alone, &high, rest, Some(2.0), None).unwrap_err().to_string();
        assert!(message.contains("2 MB") && message.contains("2.37 MB"), "{message}");
        let within = choose(&alone, &high, rest, None, Some(0.013)).unwrap();
        assert!(layers(&within).iter().map(|&layer| losses[layer]).sum::<f64>() <= 0.013);
        assert!(layers(&within).contains(&6), "most bytes for least loss");
    }
}
