//! A table of 16 values learnt from the numbers that it will stand for.

use std::ops::Range;

use crate::quant::TABLE_LEN;

/// Bins of a distribution on −1..=1.
const BINS: usize = 4_096;

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

/// The 16 values with the least weighted squared error of all: one-dimensional k-means by dynamic programming over the
/// bins that hold anything. Of a cluster only `S²/W` depends on where it is cut, so
///
/// ```text
/// best[k][j] = max_i best[k−1][i] + S(i, j)² / W(i, j)
/// ```
///
/// and as the best `i` rises with `j`, each row is found by halving. *Source*: Wang & Song 2011 (Ckmeans.1d.dp); the
/// halving as in Grønlund et al. 2017, §2.
fn centres(histogram: &Histogram) -> [f64; TABLE_LEN] {
    let filled = (0..BINS).filter(|&bin| histogram.weight[bin] > 0.0);
    let (mut weight, mut sum) = (vec![0.0], vec![0.0]);
    for (index, bin) in filled.enumerate() {
        weight.push(weight[index] + histogram.weight[bin]);
        sum.push(sum[index] + histogram.sum[bin]);
    }
    let n = weight.len() - 1;
    let mut centres = [0.0; TABLE_LEN];
    if n == 0 {
        return centres;
    }
    let n_clusters = n.min(TABLE_LEN);
    let gain = |from: usize, to: usize| (sum[to] - sum[from]).powi(2) / (weight[to] - weight[from]);
    let mut best: Vec<f64> = (0..=n).map(|to| if to == 0 { f64::NEG_INFINITY } else { gain(0, to) }).collect();
    let mut cuts = vec![vec![0; n + 1]];
    for k in 2..=n_clusters {
        let mut row = Row { best: vec![f64::NEG_INFINITY; n + 1], cut: vec![0; n + 1] };
        row.fill(&best, &gain, k..n + 1, k - 1..n);
        best = row.best;
        cuts.push(row.cut);
    }
    let mut to = n;
    for k in (0..n_clusters).rev() {
        let from = cuts[k][to];
        centres[k] = (sum[to] - sum[from]) / (weight[to] - weight[from]);
        to = from;
    }
    // Fewer different values than entries: the rest repeat the last.
    let last = centres[n_clusters - 1];
    centres[n_clusters..].fill(last);
    centres
}

/// One row of the table of [`centres`].
struct Row {
    best: Vec<f64>,
    cut: Vec<usize>,
}

impl Row {
    /// Fills the ends `to` from a row with one cluster less; the best cut of each is in `from`.
    fn fill(&mut self, before: &[f64], gain: &impl Fn(usize, usize) -> f64, to: Range<usize>, from: Range<usize>) {
        if to.is_empty() {
            return;
        }
        let middle = to.start + to.len() / 2;
        for cut in from.start..from.end.min(middle) {
            let value = before[cut] + gain(cut, middle);
            if value > self.best[middle] {
                self.best[middle] = value;
                self.cut[middle] = cut;
            }
        }
        let cut = self.cut[middle];
        self.fill(before, gain, to.start..middle, from.start..cut + 1);
        self.fill(before, gain, middle + 1..to.end, cut..from.end);
    }
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
