//! `activations`: ranges of the inputs of matrices fixed beforehand, instead of one for every token as it comes.
//!
//! ```text
//! code = round(255 · clamp((x − low) / (high − low), 0, 1))
//! ```
//!
//! A fixed range saves the search for it in every row, and costs precision: it has to do for all tokens of all texts.

use serde::{Deserialize, Serialize};

use super::{CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::observe::{Listening, listening_encoder};
use crate::compress::progress::Progress;
use crate::compress::rounding::{Grid, RangeMethod, clip_ratio, fit_affine};
use crate::compress::slots::Group;
use crate::model::{Architecture, LayerRanges, ValueRange};

/// Values of a matrix's input that a range is chosen by, at most; every n-th is taken where there are more.
const MAX_SAMPLES: usize = 200_000;
/// Steps between the codes of a byte.
const N_STEPS: f32 = 255.0;
/// What errors name the inputs.
const NAMES: [&str; 4] = ["attention input", "attention output input", "ffn input", "ffn output input"];

/// Fixes the ranges of inputs by what the calibration text shows there.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Activations {
    /// Inputs of which matrices.
    pub group: Group,
    /// How a range is chosen.
    pub range: RangeMethod,
    /// Share of the values that `range = "percentile"` covers.
    pub percentile: f64,
}

impl Default for Activations {
    fn default() -> Self {
        Self { group: Group::All, range: RangeMethod::MinMax, percentile: 0.9999 }
    }
}

/// What the text shows of one input.
#[derive(Debug)]
struct Seen {
    /// Of so many values one is kept.
    every: usize,
    /// Values that were passed over since the last that was kept.
    passed: usize,
    samples: Vec<f32>,
    low: f32,
    high: f32,
}

/// `every`, or the next number that has no divisor in common with `width`: rows of that width then show every channel, and
/// all of them equally often, where a divisor of the width would take the same few in every row.
fn stride(every: usize, width: usize) -> usize {
    let coprime = |stride: &usize| {
        let (mut a, mut b) = (*stride, width);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    (every.max(1)..).find(coprime).unwrap_or(1)
}

impl Seen {
    /// For `n_tokens` rows of `width` values.
    fn of_rows(n_tokens: usize, width: usize) -> Self {
        Self::new(stride((n_tokens * width).div_ceil(MAX_SAMPLES), width))
    }

    fn new(every: usize) -> Self {
        Self { every, passed: 0, samples: Vec::new(), low: f32::INFINITY, high: f32::NEG_INFINITY }
    }

    fn add(&mut self, values: &[f32]) {
        for &value in values {
            self.low = self.low.min(value);
            self.high = self.high.max(value);
            if self.passed == 0 {
                self.samples.push(value);
            }
            self.passed = (self.passed + 1) % self.every;
        }
    }

    /// The chosen range, and the share of the samples that it clips. An input that never varies keeps its own.
    fn range(mut self, pass: &Activations) -> Option<(ValueRange, f64)> {
        // The extremes may be between the samples.
        self.samples.extend([self.low, self.high]);
        let (low, high) = match pass.range {
            // Clipped as far on either side of 0, around which most values lie: the middle of the range may hold none.
            RangeMethod::Entropy => {
                let largest = self.low.abs().max(self.high.abs());
                let ratio = clip_ratio(self.samples.iter().map(|value| value.abs() / largest), &Grid::Bytes);
                #[allow(clippy::cast_possible_truncation, reason = "a ratio")]
                let kept = largest * ratio as f32;
                (self.low.max(-kept), self.high.min(kept))
            }
            method => fit_affine(&self.samples, N_STEPS, method, pass.percentile),
        };
        let n_clipped = self.samples.iter().filter(|&&value| value < low || value > high).count();
        let clipped = n_clipped as f64 / self.samples.len() as f64;
        (low.is_finite() && high.is_finite() && low < high).then_some((ValueRange { low, high }, clipped))
    }
}

impl CompressionPass for Activations {
    fn stage(&self) -> Stage {
        Stage::Correct
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        let how = match self.range {
            RangeMethod::MinMax => "by the extremes".to_owned(),
            RangeMethod::Percentile => format!("that cover {} of the values", self.percentile),
            RangeMethod::Mse => "of the least squared error".to_owned(),
            RangeMethod::Entropy => "that keep most of the distribution".to_owned(),
        };
        format!("inputs of {} matrices in fixed ranges {how}", self.group)
    }

    fn check(&self, _architecture: &Architecture) -> Result<(), Refusal> {
        if self.group == Group::Embedding {
            return Err(Refusal::new("group", "an embedding has no input that is a range of values"));
        }
        if !(self.percentile > 0.5 && self.percentile <= 1.0) {
            return Err(Refusal::new("percentile", format!("{} is not above 0.5 and up to 1", self.percentile)));
        }
        if self.percentile != Self::default().percentile && self.range != RangeMethod::Percentile {
            return Err(Refusal::new("percentile", "is a setting of range = \"percentile\""));
        }
        Ok(())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        let architecture = work.model.architecture();
        let n_layers = architecture.layers.len();
        // Inputs in the order of the score, four a layer.
        let widths = architecture.layers.iter().flat_map(|layer| {
            let d_model = architecture.d_model;
            [d_model, layer.d_context(), d_model, layer.d_ffn]
        });
        let mut seen: Vec<Seen> = widths.map(|width| Seen::of_rows(text.n_tokens, width)).collect();
        progress.phase_started("ranges of activations", text.n_tokens as u64);
        let encoder = listening_encoder(&work.model)?;
        for batch in &text.batches {
            let mut player = Listening::entering();
            encoder.forward(&mut player, &batch.view(0..batch.n_seqs()))?;
            let inputs = player.entries.iter().map(|entry| &entry.input).zip(player.branches.iter().map(|b| &b.input));
            for (index, input) in inputs.flat_map(|(entry, branch)| [entry, branch]).enumerate() {
                let values: Vec<f32> = input.flatten_all()?.to_vec1()?;
                seen[index].add(&values);
            }
            progress.advanced(batch.n_tokens() as u64);
        }
        // What another pass of this kind has fixed for other inputs stays.
        let mut ranges: Vec<LayerRanges> = (0..n_layers).map(|layer| architecture.ranges_of(layer)).collect();
        let mut notes = Vec::new();
        for (index, seen) in seen.into_iter().enumerate() {
            let (layer, input) = (index / 4, index % 4);
            if !self.group.overlaps(if input < 2 { Group::Attention } else { Group::Ffn }) {
                continue;
            }
            let found = seen.range(self);
            notes.push(match found {
                Some((ValueRange { low, high }, clipped)) => {
                    format!("layer {layer} {}: {low:.3} to {high:.3}, {:.4} % clipped", NAMES[input], clipped * 100.0)
                }
                None => format!("layer {layer} {}: does not vary, stays dynamic", NAMES[input]),
            });
            let LayerRanges { attention_in, context, ffn_in, hidden } = &mut ranges[layer];
            *[attention_in, context, ffn_in, hidden][input] = found.map(|(range, _)| range);
        }
        work.model.set_ranges(ranges)?;
        progress.phase_finished();
        Ok(PassReport { notes, ..PassReport::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between −1 and 1, and one far out.
    fn values() -> Vec<f32> {
        let mut values: Vec<f32> = (0..10_000u16).map(|i| (f32::from(i) * 0.77).sin()).collect();
        values[5_001] = 30.0;
        values
    }

    fn chosen(range: RangeMethod, percentile: f64, every: usize) -> (ValueRange, f64) {
        let pass = Activations { range, percentile, ..Activations::default() };
        let mut seen = Seen::new(every);
        values().chunks(77).for_each(|part| seen.add(part));
        seen.range(&pass).unwrap()
    }

    #[test]
    fn every_method_but_the_extremes_clips_what_lies_far_out() {
        for every in [1, 7] {
            let (all, clipped) = chosen(RangeMethod::MinMax, 1.0, every);
            assert_eq!((all.high, clipped), (30.0, 0.0), "the extremes may be between the samples");
            for method in [RangeMethod::Percentile, RangeMethod::Entropy] {
                let (range, clipped) = chosen(method, 0.99, every);
                assert!(
                    range.low < -0.9 && range.high < 20.0 && clipped > 0.0 && clipped < 0.02,
                    "{method:?} {range:?}"
                );
            }
            let (range, _) = chosen(RangeMethod::Mse, 1.0, every);
            assert!(range.high - range.low <= 31.0 + 1e-3, "{range:?}");
        }
        let mut same = Seen::new(1);
        same.add(&[0.5; 10]);
        assert!(same.range(&Activations { range: RangeMethod::MinMax, ..Activations::default() }).is_none());
    }

    #[test]
    fn every_channel_is_sampled_equally_often() {
        // 24 and 96 divide the widths: without a shift the same few channels would be taken in every row.
        for (n_tokens, width) in [(12_500, 384), (12_500, 1_536), (100, 32)] {
            let mut seen = Seen::of_rows(n_tokens, width);
            let row: Vec<f32> = (0..width).map(|channel| channel as f32).collect();
            (0..n_tokens).for_each(|_| seen.add(&row));
            assert!(seen.samples.len() <= MAX_SAMPLES, "{}", seen.samples.len());
            let mut counts = vec![0usize; width];
            seen.samples.iter().for_each(|&channel| counts[channel as usize] += 1);
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(*least > 0 && most - least <= 1, "{n_tokens} rows of {width}: {least} to {most}");
        }
    }
}
