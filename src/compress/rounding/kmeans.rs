//! A table of 16 values learnt from the numbers that it will stand for.

use crate::quant::TABLE_LEN;

/// Bins of a distribution on −1..=1.
const BINS: usize = 4_096;
/// Rounds of Lloyd's algorithm; it settles earlier.
const ROUNDS: usize = 200;

/// Weighted distribution of numbers in −1..=1; what lies outside counts as the end.
#[derive(Debug, Clone)]
pub(in crate::compress) struct Histogram {
    weight: Vec<f64>,
    sum: Vec<f64>,
}

impl Histogram {
    pub(in crate::compress) fn new() -> Self {
        Self { weight: vec![0.0; BINS], sum: vec![0.0; BINS] }
    }

    /// Adds a number that an error at costs `weight`.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a bin's index")]
    pub(in crate::compress) fn add(&mut self, value: f32, weight: f32) {
        let value = value.clamp(-1.0, 1.0);
        let bin = (((value + 1.0) * 0.5 * BINS as f32) as usize).min(BINS - 1);
        self.weight[bin] += f64::from(weight);
        self.sum[bin] += f64::from(weight) * f64::from(value);
    }
}

/// The 16 values with the least weighted squared error: k-means in one dimension (Lloyd), started from quantiles of the
/// cube root of the density, where the best quantizer of many levels has its values (Panter & Dite 1951).
fn centres(histogram: &Histogram) -> [f64; TABLE_LEN] {
    let middle = |bin: usize| (bin as f64 + 0.5) / BINS as f64 * 2.0 - 1.0;
    // Smoothed, so that empty bins between values of a small matrix do not count as regions without values.
    let smooth: Vec<f64> = (0..BINS)
        .map(|bin| {
            let around = bin.saturating_sub(32)..(bin + 33).min(BINS);
            (histogram.weight[around.clone()].iter().sum::<f64>() / around.len() as f64).cbrt()
        })
        .collect();
    let total: f64 = smooth.iter().sum();
    let mut centres = [0.0; TABLE_LEN];
    let (mut bin, mut passed) = (0, 0.0);
    for (index, centre) in centres.iter_mut().enumerate() {
        let wanted = total * (index as f64 + 0.5) / TABLE_LEN as f64;
        while bin + 1 < BINS && passed + smooth[bin] < wanted {
            passed += smooth[bin];
            bin += 1;
        }
        *centre = middle(bin);
    }
    for _ in 0..ROUNDS {
        let mut sums = [(0.0, 0.0); TABLE_LEN];
        let mut at = 0;
        for bin in 0..BINS {
            while at + 1 < TABLE_LEN && middle(bin) > (centres[at] + centres[at + 1]) / 2.0 {
                at += 1;
            }
            sums[at].0 += histogram.sum[bin];
            sums[at].1 += histogram.weight[bin];
        }
        let mut moved = 0.0f64;
        for (centre, (sum, weight)) in centres.iter_mut().zip(sums) {
            if weight > 0.0 {
                moved = moved.max((sum / weight - *centre).abs());
                *centre = sum / weight;
            }
        }
        centres.sort_by(f64::total_cmp);
        if moved < 1e-6 {
            break;
        }
    }
    centres
}

/// The table, rounded to codes within ±`reach`, of numbers whose 1 stands for code `reach`.
pub(in crate::compress) fn fit_table(histogram: &Histogram, reach: i8) -> [i8; TABLE_LEN] {
    let limit = f64::from(reach);
    #[allow(clippy::cast_possible_truncation, reason = "clamped to the range of i8")]
    centres(histogram).map(|centre| (centre * limit).round().clamp(-limit, limit) as i8)
}

#[cfg(test)]
mod tests {
    use super::super::grid::{Grid, NF4, linear_table};
    use super::super::range::error;
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    fn histogram(values: &[f32]) -> Histogram {
        let mut histogram = Histogram::new();
        values.iter().for_each(|&value| histogram.add(value, 1.0));
        histogram
    }

    #[test]
    fn sixteen_values_are_found_exactly() {
        let values: Vec<f32> = (0..1_600).map(|i| ((i % 16) as f32).powi(2) / 128.0 - 0.9).collect();
        let found = centres(&histogram(&values));
        for (index, centre) in found.iter().enumerate() {
            let wanted = (index as f64).powi(2) / 128.0 - 0.9;
            assert!((centre - wanted).abs() < 1e-6, "{index}: {centre} is not {wanted}");
        }
    }

    #[test]
    fn a_learnt_table_is_better_than_every_fixed_one() {
        let mut rng = StdRng::seed_from_u64(3);
        let values: Vec<f32> =
            (0..20_000).map(|_| (0..12).map(|_| rng.random_range(-0.5f32..0.5)).sum::<f32>() / 6.0).collect();
        let learnt = Grid::of(fit_table(&histogram(&values), 127));
        let ours = error(&values, None, &learnt, 1.0 / 127.0);
        for table in [linear_table(15), NF4] {
            let grid = Grid::of(table);
            let best = (1..200u8)
                .map(|i| error(&values, None, &grid, f32::from(i) / 100.0 / grid.reach()))
                .fold(f32::INFINITY, f32::min);
            assert!(ours < best, "{ours} is not less than {best}");
        }
    }

    #[test]
    fn weights_draw_the_values_to_where_errors_cost() {
        let mut histogram = Histogram::new();
        for i in 0..2_000u16 {
            let value = f32::from(i) / 1_000.0 - 1.0;
            histogram.add(value, if value > 0.5 { 100.0 } else { 1.0 });
        }
        let within = centres(&histogram).iter().filter(|&&centre| centre > 0.5).count();
        assert!(within > 7, "{within} of 16 values in the quarter that matters");
    }
}
