//! One budget for heads and neurons together: multiply-accumulates, bytes, or measured time.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::CompressError;
use super::allocate::{Choice, choose};
use super::calibration::CalibrationText;
use super::importance::LayerRanking;
use super::progress::Progress;
use super::prune::{FFN_PANEL, Plan};
use crate::exec::{Runtime, time_layers};
use crate::model::{Architecture, LayerConfig};

/// What a budget is counted in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// Multiply-accumulates of the linear layers.
    #[default]
    Macs,
    /// Bytes of the linear layers in INT8.
    Bytes,
    /// Time of the layers on this machine, attention included. It differs from run to run, and what is chosen with it.
    Latency,
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Macs => "multiply-accumulates",
            Self::Bytes => "bytes",
            Self::Latency => "measured time",
        })
    }
}

/// What the two halves of a layer take of a budget, by what is kept of them.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPrices {
    /// `[n_heads]`: of the attention half with 1, 2, … heads.
    pub heads: Vec<u64>,
    /// `[⌈d_ffn / 64⌉]`: of the FFN half with 1, 2, … panels of neurons.
    pub neurons: Vec<u64>,
}

/// Neurons of `n_panels` panels in a layer that has `d_ffn`.
fn neurons_of(n_panels: usize, d_ffn: usize) -> usize {
    (n_panels * FFN_PANEL).min(d_ffn)
}

impl LayerPrices {
    fn new(config: &LayerConfig, heads: impl Fn(u64) -> u64, neurons: impl Fn(u64) -> u64) -> Self {
        let panels = 1..=config.d_ffn.div_ceil(FFN_PANEL);
        Self {
            heads: (1..=config.n_heads as u64).map(heads).collect(),
            neurons: panels.map(|n_panels| neurons(neurons_of(n_panels, config.d_ffn) as u64)).collect(),
        }
    }

    /// Multiply-accumulates per token of the linear layers.
    #[must_use]
    pub fn macs(config: &LayerConfig, d_model: usize) -> Self {
        let (width, d_head) = (d_model as u64, config.d_head as u64);
        Self::new(config, |heads| 4 * heads * d_head * width, |neurons| 2 * neurons * width)
    }

    /// Bytes of the linear layers in INT8: a byte per weight, a scale and a bias per output channel.
    #[must_use]
    pub fn bytes(config: &LayerConfig, d_model: usize) -> Self {
        let (width, d_head) = (d_model as u64, config.d_head as u64);
        let linear = |n_out: u64, n_in: u64| n_out * n_in + 8 * n_out;
        Self::new(
            config,
            |heads| linear(3 * heads * d_head, width) + linear(width, heads * d_head),
            |neurons| linear(neurons, width) + linear(width, neurons),
        )
    }

    /// What the whole layer takes.
    #[must_use]
    pub fn whole(&self) -> u64 {
        let last = |prices: &[u64]| prices.last().copied().unwrap_or_default();
        last(&self.heads) + last(&self.neurons)
    }

    /// The least that a layer takes.
    #[must_use]
    pub fn least(&self) -> u64 {
        let least = |prices: &[u64]| prices.iter().min().copied().unwrap_or_default();
        least(&self.heads) + least(&self.neurons)
    }
}

/// Prices that are counted, of every layer.
pub(super) fn prices(architecture: &Architecture, budget: Budget) -> Vec<LayerPrices> {
    let price = if budget == Budget::Bytes { LayerPrices::bytes } else { LayerPrices::macs };
    architecture.layers.iter().map(|layer| price(layer, architecture.d_model)).collect()
}

/// What is left of a budget when every layer has one head and one panel; 0 for time, which is not known before.
pub(super) fn least_share(architecture: &Architecture, budget: Budget) -> f64 {
    if budget == Budget::Latency {
        return 0.0;
    }
    let prices = prices(architecture, budget);
    let sum = |price: fn(&LayerPrices) -> u64| prices.iter().map(price).sum::<u64>() as f64;
    sum(LayerPrices::least) / sum(LayerPrices::whole)
}

/// Tokens of the batches that layers are timed on.
const TIMED_BATCH: usize = 512;
/// Batches.
const TIMED_BATCHES: usize = 2;
/// Passes over them.
const TIMED_ROUNDS: usize = 30;

/// Nanoseconds of every layer's halves on inputs as long as those of the calibration text, on one computing thread.
/// Layers of one shape are timed once. What every choice takes besides (norms, the residual stream) is part of the price.
///
/// # Errors
/// If a layer cannot be played.
pub(super) fn time_prices(
    architecture: &Architecture,
    text: &CalibrationText,
    runtime: &Runtime,
    progress: &dyn Progress,
) -> Result<Vec<LayerPrices>, CompressError> {
    let lens = timed_lens(text);
    let mut distinct: Vec<LayerConfig> = Vec::new();
    for layer in &architecture.layers {
        if !distinct.contains(layer) {
            distinct.push(*layer);
        }
    }
    let mut found = Vec::with_capacity(distinct.len());
    for layer in &distinct {
        let heads =
            (1..=layer.n_heads).map(|n_heads| LayerConfig { n_heads, d_ffn: FFN_PANEL.min(layer.d_ffn), ..*layer });
        let panels = 1..=layer.d_ffn.div_ceil(FFN_PANEL);
        let neurons = panels.map(|n| LayerConfig { n_heads: 1, d_ffn: neurons_of(n, layer.d_ffn), ..*layer });
        let shapes: Vec<LayerConfig> = heads.chain(neurons).collect();
        progress.phase_started("time layers", (shapes.len() * (TIMED_ROUNDS + 1)) as u64);
        let times = time_layers(runtime, architecture, &shapes, &lens, TIMED_ROUNDS, || progress.advanced(1))?;
        progress.phase_finished();
        let (heads, neurons) = times.split_at(layer.n_heads);
        // Both halves were timed with the smallest of the other, which is counted once.
        let (heads, neurons) = (monotone(heads.to_vec()), monotone(neurons.to_vec()));
        let other = neurons[0];
        found.push(LayerPrices { heads, neurons: neurons.iter().map(|time| time - other).collect() });
    }
    let of = |layer: &LayerConfig| distinct.iter().position(|other| other == layer).map(|at| found[at].clone());
    Ok(architecture.layers.iter().filter_map(of).collect())
}

/// Lengths of batches like those of the text.
fn timed_lens(text: &CalibrationText) -> Vec<Vec<usize>> {
    let all: Vec<usize> =
        text.batches.iter().flat_map(|batch| (0..batch.n_seqs()).map(|seq| batch.sequence(seq).len())).collect();
    let step = (text.n_tokens / (TIMED_BATCH * TIMED_BATCHES)).max(1);
    let mut batches: Vec<Vec<usize>> = vec![Vec::new()];
    let mut n_tokens = 0;
    for &len in all.iter().skip(step / 2).step_by(step) {
        if n_tokens > 0 && n_tokens + len > TIMED_BATCH {
            batches.push(Vec::new());
            n_tokens = 0;
        }
        n_tokens += len;
        if let Some(last) = batches.last_mut() {
            last.push(len);
        }
    }
    batches.retain(|batch| !batch.is_empty());
    if batches.is_empty() { vec![vec![all.first().copied().unwrap_or(1)]] } else { batches }
}

/// Prices that never fall with what is kept: measured times are noisy, and a wider layer is never worth choosing for
/// being faster.
#[must_use]
pub fn monotone(mut prices: Vec<u64>) -> Vec<u64> {
    for index in (1..prices.len()).rev() {
        prices[index - 1] = prices[index - 1].min(prices[index]);
    }
    prices
}

/// The heads and neurons that stay so that the prices of all layers fit into `budget`, at the least cost; `None` if
/// nothing fits.
#[must_use]
pub fn plan_within(
    layers: &[LayerConfig],
    rankings: &[LayerRanking],
    prices: &[LayerPrices],
    budget: u64,
) -> Option<Plan> {
    let mut parts: Vec<Vec<Choice>> = Vec::with_capacity(2 * layers.len());
    // What each choice keeps, in the same order.
    let mut kept: Vec<Vec<usize>> = Vec::with_capacity(2 * layers.len());
    for ((config, ranking), prices) in layers.iter().zip(rankings).zip(prices) {
        let heads = (1..=config.n_heads).zip(&prices.heads);
        let panels = (1..=config.d_ffn.div_ceil(FFN_PANEL)).map(|n| neurons_of(n, config.d_ffn)).zip(&prices.neurons);
        for (options, n_units, ranking) in [
            (heads.collect::<Vec<_>>(), config.n_heads, &ranking.heads),
            (panels.collect(), config.d_ffn, &ranking.neurons),
        ] {
            // A ranking may end before everything is gone; what it does not rank stays.
            let options: Vec<(usize, u64, f64)> = options
                .into_iter()
                .filter_map(|(n, &price)| Some((n, price, *ranking.cost.get(n_units - n)?)))
                .collect();
            kept.push(options.iter().map(|(n, ..)| *n).collect());
            parts.push(options.iter().map(|&(_, price, cost)| Choice { price, cost }).collect());
        }
    }
    let picks = choose(&parts, budget)?;
    let mut plan = Plan { heads: Vec::new(), neurons: Vec::new() };
    for (layer, (config, ranking)) in layers.iter().zip(rankings).enumerate() {
        let (heads, neurons) = (kept[2 * layer][picks[2 * layer]], kept[2 * layer + 1][picks[2 * layer + 1]]);
        plan.heads.push(ranking.heads.keep(config.n_heads, config.n_heads - heads));
        plan.neurons.push(ranking.neurons.keep(config.d_ffn, config.d_ffn - neurons));
    }
    Some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::allocate::Ranking;
    use crate::exec::cost::linear_macs_per_token;
    use crate::model::Band;

    const LAYER: LayerConfig = LayerConfig { n_heads: 4, d_head: 8, d_ffn: 200, band: Band::FULL };

    fn ranking(n_units: usize, scale: f64) -> Ranking {
        let cost = (0..n_units).map(|removed| scale * (removed * removed) as f64).collect();
        Ranking { order: (0..n_units - 1).rev().collect(), cost }
    }

    fn rankings() -> Vec<LayerRanking> {
        [(1.0, 1e-4), (0.1, 1e-2)]
            .map(|(heads, neurons)| LayerRanking { heads: ranking(4, heads), neurons: ranking(200, neurons) })
            .to_vec()
    }

    fn kept(plan: &Plan) -> Vec<LayerConfig> {
        plan.heads
            .iter()
            .zip(&plan.neurons)
            .map(|(heads, neurons)| LayerConfig { n_heads: heads.len(), d_ffn: neurons.len(), ..LAYER })
            .collect()
    }

    #[test]
    fn prices_are_what_the_cost_model_and_the_files_say() {
        let prices = LayerPrices::macs(&LAYER, 32);
        assert_eq!(prices.neurons.len(), 4);
        for heads in 1..=4 {
            for panels in 1..=4 {
                let config = LayerConfig { n_heads: heads, d_ffn: (panels * 64).min(200), ..LAYER };
                let sum = prices.heads[heads - 1] + prices.neurons[panels - 1];
                assert_eq!(sum, linear_macs_per_token(&[config], 32));
            }
        }
        // q, k, v: 3·4·8 rows of 32; o: 32 rows of 32; up: 200 rows of 32; down: 32 rows of 200; 8 bytes a row more.
        let bytes = 96 * 32 + 32 * 32 + 2 * 200 * 32 + 8 * (96 + 32 + 200 + 32);
        assert_eq!(LayerPrices::bytes(&LAYER, 32).whole(), bytes);
    }

    #[test]
    fn the_plan_fits_and_no_other_plan_that_fits_costs_less() {
        let layers = [LAYER, LAYER];
        let prices = [LayerPrices::macs(&LAYER, 32), LayerPrices::macs(&LAYER, 32)];
        let rankings = rankings();
        let full = linear_macs_per_token(&layers, 32);
        for share in [0.5, 0.75, 0.9] {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
            let budget = (full as f64 * share) as u64;
            let plan = plan_within(&layers, &rankings, &prices, budget).unwrap();
            let shapes = kept(&plan);
            assert!(linear_macs_per_token(&shapes, 32) <= budget);
            let cost = |shapes: &[LayerConfig]| -> f64 {
                shapes
                    .iter()
                    .zip(&rankings)
                    .map(|(shape, ranking)| {
                        ranking.heads.cost[4 - shape.n_heads] + ranking.neurons.cost[200 - shape.d_ffn]
                    })
                    .sum()
            };
            let options = (1..=4).flat_map(|heads| (1..=4).map(move |panels| (heads, (panels * 64usize).min(200))));
            let shape = |(n_heads, d_ffn)| LayerConfig { n_heads, d_ffn, ..LAYER };
            let least = options
                .clone()
                .flat_map(|first| options.clone().map(move |second| [shape(first), shape(second)]))
                .filter(|shapes| linear_macs_per_token(shapes, 32) <= budget)
                .map(|shapes| cost(&shapes))
                .fold(f64::INFINITY, f64::min);
            assert!((cost(&shapes) - least).abs() < 1e-9, "{share}: {} is not {least}", cost(&shapes));
        }
        let least: u64 = prices.iter().map(LayerPrices::least).sum();
        assert!(plan_within(&layers, &rankings, &prices, least).is_some());
        assert!(plan_within(&layers, &rankings, &prices, least - 1).is_none());
        assert_eq!(kept(&plan_within(&layers, &rankings, &prices, full).unwrap()), layers);
    }

    #[test]
    fn noise_never_makes_a_wider_layer_cheaper() {
        assert_eq!(monotone(vec![5, 4, 7, 6, 9]), [4, 4, 6, 6, 9]);
    }
}
