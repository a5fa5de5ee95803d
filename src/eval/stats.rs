//! Rank correlation and resampling.

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Resamples of every interval.
pub(super) const N_RESAMPLES: usize = 1_000;

/// A confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Ranks from 1; equal values share the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && values[order[end]] == values[order[start]] {
            end += 1;
        }
        let mean = (start + 1 + end) as f64 / 2.0;
        order[start..end].iter().for_each(|&index| ranks[index] = mean);
        start = end;
    }
    ranks
}

fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let (dx, dy) = (x - mean_x, y - mean_y);
        xy += dx * dy;
        xx += dx * dx;
        yy += dy * dy;
    }
    if xx > 0.0 && yy > 0.0 { xy / (xx * yy).sqrt() } else { 0.0 }
}

/// Spearman's rank correlation in −1..=1: Pearson's correlation of the ranks, ties sharing their mean rank. Where all
/// values of a side are equal there is no order, and the result is 0.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn spearman(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len(), "a correlation needs pairs");
    pearson(&ranks(x), &ranks(y))
}

/// The central 95 % of `statistic` over `n_resamples` samples of `n` indices drawn with replacement.
///
/// *Source*: Efron & Tibshirani 1993, §13 (percentile interval).
pub fn bootstrap(n: usize, n_resamples: usize, seed: u64, mut statistic: impl FnMut(&[usize]) -> f64) -> Interval {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sample = vec![0; n];
    let mut values: Vec<f64> = (0..n_resamples)
        .map(|_| {
            sample.iter_mut().for_each(|index| *index = rng.random_range(0..n));
            statistic(&sample)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    Interval { low: quantile(&values, 0.025), high: quantile(&values, 0.975) }
}

/// Linear interpolation between order statistics; `sorted` must not be empty.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the length")]
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (position - below as f64) * (sorted[above] - sorted[below])
}

/// How much a measure differs between two models that were measured on the same items.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Difference {
    /// Measure of this model less that of the other.
    pub difference: f64,
    /// Its 95 % interval by paired bootstrap.
    pub interval: Interval,
    /// Two-sided bootstrap p-value: twice the smaller share of resamples on one side of 0, at most 1.
    pub p_value: f64,
}

/// `ours − theirs` of a statistic on the same items, resampled together, so that what makes an item hard for both does
/// not widen the interval.
///
/// *Source*: Efron & Tibshirani 1993, §13 (percentile interval) and §15 (achieved significance level).
pub fn paired_difference(
    n: usize,
    n_resamples: usize,
    seed: u64,
    ours: impl Fn(&[usize]) -> f64,
    theirs: impl Fn(&[usize]) -> f64,
) -> Difference {
    let all: Vec<usize> = (0..n).collect();
    let (mut below, mut above) = (0, 0);
    let interval = bootstrap(n, n_resamples, seed, |sample| {
        let difference = ours(sample) - theirs(sample);
        below += usize::from(difference <= 0.0);
        above += usize::from(difference >= 0.0);
        difference
    });
    let p_value = (2.0 * below.min(above) as f64 / n_resamples as f64).min(1.0);
    Difference { difference: ours(&all) - theirs(&all), interval, p_value }
}

/// The mean of `values` over a sample of indices.
pub(super) fn mean_of(values: &[f64], sample: &[usize]) -> f64 {
    sample.iter().map(|&index| values[index]).sum::<f64>() / sample.len() as f64
}

/// Spearman's correlation over a sample of indices.
pub(super) fn spearman_of(x: &[f64], y: &[f64], sample: &[usize]) -> f64 {
    let pick = |values: &[f64]| sample.iter().map(|&index| values[index]).collect::<Vec<_>>();
    spearman(&pick(x), &pick(y))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spearman_knows_order_ties_and_constants() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert!((spearman(&x, &[1.0, 8.0, 27.0, 64.0, 125.0]) - 1.0).abs() < 1e-12);
        assert!((spearman(&x, &[5.0, 4.0, 3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        assert_eq!(spearman(&x, &[2.0; 5]), 0.0);
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [3.5, 1.0, 3.5, 2.0]);
        // scipy.stats.spearmanr([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])
        assert!((spearman(&x, &[5.0, 6.0, 7.0, 8.0, 7.0]) - 0.820_782_681_668_123_3).abs() < 1e-12);
    }

    #[test]
    fn intervals_cover_the_estimate_and_repeat_with_the_seed() {
        let mut rng = StdRng::seed_from_u64(3);
        let gold: Vec<f64> = (0..300).map(|_| rng.random_range(0.0..5.0)).collect();
        let noisy = |noise: f64, rng: &mut StdRng| -> Vec<f64> {
            gold.iter().map(|value| value + rng.random_range(-noise..noise)).collect()
        };
        let (good, bad) = (noisy(0.5, &mut rng), noisy(6.0, &mut rng));
        let interval = |seed| bootstrap(300, 400, seed, |sample| spearman_of(&bad, &gold, sample));
        let estimate = spearman(&bad, &gold);
        assert!(interval(1).low < estimate && estimate < interval(1).high);
        assert_eq!(interval(1), interval(1));
        let between = |ours: &[f64], theirs: &[f64]| {
            paired_difference(300, 400, 1, |s| spearman_of(ours, &gold, s), |s| spearman_of(theirs, &gold, s))
        };
        let better = between(&good, &bad);
        assert!(better.interval.low > 0.0 && better.p_value == 0.0);
        assert!((better.difference - (spearman(&good, &gold) - estimate)).abs() < 1e-12);
        let same = between(&bad, &bad);
        assert_eq!((same.interval.low, same.interval.high, same.p_value), (0.0, 0.0, 1.0));
        // Noise of the same size on both sides is no difference.
        let other = noisy(6.0, &mut StdRng::seed_from_u64(9));
        assert!(between(&other, &bad).p_value > 0.05);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[0.0, 10.0], 0.25), 2.5);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }
}
