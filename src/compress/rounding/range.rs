//! Which range the codes should cover: everything, or less with finer steps.

use serde::{Deserialize, Serialize};

use super::grid::Grid;

/// How the range of a row or group is found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RangeMethod {
    /// Everything is covered.
    #[default]
    MinMax,
    /// A share of the magnitudes is covered, the rest is clipped.
    Percentile,
    /// The range with the least squared error.
    Mse,
    /// The clipping that keeps most of the distribution (Kullback-Leibler), one ratio for a whole matrix.
    Entropy,
}

/// Ranges that are tried, as parts of the largest magnitude, from the narrowest; beyond 1 the outermost code is left to
/// nobody, which pays for tables whose outer steps are wide.
const RATIOS: std::ops::RangeInclusive<u8> = 10..=30;
/// Rounds of refitting a scale to its own codes.
const REFITS: usize = 3;

fn square(x: f32) -> f32 {
    x * x
}

/// Weighted squared error of `values` rounded under `scale`.
pub(super) fn error(values: &[f32], weights: Option<&[f32]>, grid: &Grid, scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    let one = |value: f32| square(value - grid.round(value * inverse) * scale);
    match weights {
        Some(weights) => values.iter().zip(weights).map(|(&value, weight)| weight * one(value)).sum(),
        None => values.iter().map(|&value| one(value)).sum(),
    }
}

/// The scale that fits given codes best: `Σ ω w q / Σ ω q²`.
fn refit(values: &[f32], weights: Option<&[f32]>, grid: &Grid, scale: f32) -> Option<f32> {
    let (mut top, mut bottom) = (0.0, 0.0);
    for (index, &value) in values.iter().enumerate() {
        let code = grid.round(value / scale);
        let weight = weights.map_or(1.0, |weights| weights[index]);
        top += weight * value * code;
        bottom += weight * code * code;
    }
    (bottom > 0.0 && top > 0.0).then(|| top / bottom)
}

/// The scale of a row or group under symmetric codes. A row of zeros has scale 1.
///
/// *Mse*: the best of 21 ranges from half to one and a half of the largest magnitude, then refitted to its codes.
/// `weights`, one a value, say what an error costs there.
pub(in crate::compress) fn fit_scale(
    values: &[f32],
    weights: Option<&[f32]>,
    grid: &Grid,
    method: RangeMethod,
    part: f64,
) -> f32 {
    let largest = values.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    if largest <= 0.0 {
        return 1.0;
    }
    let whole = largest / grid.reach();
    match method {
        RangeMethod::MinMax => whole,
        #[allow(clippy::cast_possible_truncation, reason = "a ratio")]
        RangeMethod::Entropy => whole * part as f32,
        RangeMethod::Percentile => {
            let mut magnitudes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
            magnitudes.sort_by(f32::total_cmp);
            let covered = quantile(&magnitudes, part);
            if covered > 0.0 { covered / grid.reach() } else { whole }
        }
        RangeMethod::Mse => {
            let mut best = (f32::INFINITY, whole);
            for ratio in RATIOS {
                let scale = whole * f32::from(ratio) / 20.0;
                let error = error(values, weights, grid, scale);
                if error < best.0 {
                    best = (error, scale);
                }
            }
            for _ in 0..REFITS {
                let Some(scale) = refit(values, weights, grid, best.1) else { break };
                let error = error(values, weights, grid, scale);
                if error >= best.0 {
                    break;
                }
                best = (error, scale);
            }
            best.1
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index into the values")]
fn quantile(sorted: &[f32], part: f64) -> f32 {
    sorted[((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len()) - 1]
}

/// The lowest and highest value that should be representable, for codes with an offset.
///
/// *Entropy*: clipped at `part` of the largest magnitude on either side of 0, around which most values lie: the middle of the
/// range may hold none. Values that all lie beyond are covered whole.
pub(in crate::compress) fn fit_affine(values: &[f32], n_steps: f32, method: RangeMethod, part: f64) -> (f32, f32) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
    match method {
        RangeMethod::MinMax => (low, high),
        RangeMethod::Percentile => {
            let tail = (1.0 - part) / 2.0;
            (quantile(&sorted, tail), quantile(&sorted, 1.0 - tail))
        }
        RangeMethod::Entropy => {
            #[allow(clippy::cast_possible_truncation, reason = "a ratio")]
            let ratio = part as f32;
            let kept = low.abs().max(high.abs()) * ratio;
            let clipped = (low.max(-kept), high.min(kept));
            if clipped.0 < clipped.1 { clipped } else { (low, high) }
        }
        RangeMethod::Mse => {
            let mut best = (f32::INFINITY, (low, high));
            for ratio in 8..=20u8 {
                let shrink = (high - low) / 2.0 * (1.0 - f32::from(ratio) / 20.0);
                for (low, high) in [(low + shrink, high), (low, high - shrink), (low + shrink, high - shrink)] {
                    let step = (high - low) / n_steps;
                    if step <= 0.0 {
                        continue;
                    }
                    let error = values
                        .iter()
                        .map(|&value| {
                            let code = ((value - low) / step).round_ties_even().clamp(0.0, n_steps);
                            square(value - (low + code * step))
                        })
                        .sum();
                    if error < best.0 {
                        best = (error, (low, high));
                    }
                }
            }
            best.1
        }
    }
}

/// The part of the largest magnitude at which clipping loses least of the distribution of `magnitudes` (each relative to
/// its row's or group's largest, so in 0..=1).
///
/// ```text
/// min over t:  Σ_b P_t(b) log(P_t(b) / Q_t(b))
/// ```
///
/// `P_t` is the histogram below `t` with everything above added to its last bin, `Q_t` the same histogram after its bins
/// were merged into the grid's steps and spread evenly over those that were not empty.
///
/// *Source*: Migacz 2017 (8-bit inference with TensorRT, slides 26-38), there for activations.
pub(in crate::compress) fn clip_ratio(magnitudes: impl Iterator<Item = f32>, grid: &Grid) -> f64 {
    const BINS: usize = 2_048;
    let mut histogram = vec![0.0f64; BINS];
    for magnitude in magnitudes {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a bin's index")]
        let bin = ((f64::from(magnitude) * BINS as f64) as usize).min(BINS - 1);
        histogram[bin] += 1.0;
    }
    let mut best = (f64::INFINITY, 1.0);
    // Below an eighth of the range nothing is left of a distribution of weights.
    for end in (BINS / 8..=BINS).step_by(16) {
        let tail: f64 = histogram[end..].iter().sum();
        let divergence = divergence(&histogram[..end], tail, grid);
        if divergence < best.0 {
            best = (divergence, end as f64 / BINS as f64);
        }
    }
    best.1
}

fn divergence(histogram: &[f64], tail: f64, grid: &Grid) -> f64 {
    let n = histogram.len();
    let covered = histogram.iter().sum::<f64>();
    // What covers nothing keeps nothing.
    if covered <= 0.0 {
        return f64::INFINITY;
    }
    let total = covered + tail;
    // Which code the middle of each bin is rounded to.
    #[allow(clippy::cast_possible_truncation, reason = "a position within the range")]
    let code = |bin: usize| grid.round(((bin as f64 + 0.5) / n as f64) as f32 * grid.reach());
    let mut sum = 0.0;
    let mut start = 0;
    while start < n {
        let step = code(start);
        let mut end = start + 1;
        while end < n && code(end) == step {
            end += 1;
        }
        let merged: f64 = histogram[start..end].iter().sum();
        let filled = histogram[start..end].iter().filter(|&&count| count > 0.0).count().max(1);
        for (bin, &count) in histogram[start..end].iter().enumerate() {
            let p = count + if start + bin == n - 1 { tail } else { 0.0 };
            if p > 0.0 {
                // An empty last bin that receives the tail has nothing in Q: a small count stands for it.
                let q = if count > 0.0 { merged / filled as f64 } else { 1e-3 };
                sum += p / total * ((p / total) / (q / covered)).ln();
            }
        }
        start = end;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::super::grid::{LOG2, NF4, linear_table};
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    /// About normal: sums of uniform numbers.
    fn normal(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..n).map(|_| (0..12).map(|_| rng.random_range(-0.5f32..0.5)).sum()).collect()
    }

    #[test]
    fn the_least_squares_range_is_the_best_of_all_ranges() {
        let values = normal(512, 1);
        let weights: Vec<f32> = normal(512, 2).iter().map(|x| x * x).collect();
        for grid in [Grid::of(linear_table(1)), Grid::of(NF4), Grid::of(LOG2), Grid::Bytes] {
            for weights in [None, Some(&weights[..])] {
                let found = error(&values, weights, &grid, fit_scale(&values, weights, &grid, RangeMethod::Mse, 1.0));
                let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs())) / grid.reach();
                // An exhaustive search on a fine grid finds hardly anything better.
                let best = (1..=400u16)
                    .map(|i| error(&values, weights, &grid, largest * f32::from(i) / 200.0))
                    .fold(f32::INFINITY, f32::min);
                let whole = error(&values, weights, &grid, largest);
                assert!(found <= whole && found <= best * 1.04, "{grid:?}: {found}, best {best}, whole {whole}");
            }
        }
    }

    #[test]
    fn outliers_are_clipped_by_every_method_but_min_max() {
        let mut values = normal(2_000, 3);
        values[17] = 40.0;
        let grid = Grid::of(linear_table(1));
        let scale = |method, part| fit_scale(&values, None, &grid, method, part);
        let whole = scale(RangeMethod::MinMax, 1.0);
        assert_eq!(whole, 40.0 / grid.reach());
        assert!(scale(RangeMethod::Percentile, 0.999) < whole / 8.0);
        assert!(scale(RangeMethod::Mse, 1.0) < whole);
        let ratio = clip_ratio(values.iter().map(|x| x.abs() / 40.0), &Grid::Bytes);
        assert!(ratio < 0.5, "{ratio}");
        // Nothing far out: nothing to clip.
        let flat: Vec<f32> = (0..4_096u16).map(|i| f32::from(i) / 4_096.0).collect();
        assert!(clip_ratio(flat.into_iter(), &Grid::Bytes) > 0.9);
        // Nothing near 0 either: a range without a value in it is none.
        let far = (2_048..4_096u16).map(|i| f32::from(i) / 4_096.0);
        assert!(clip_ratio(far, &Grid::Bytes) > 0.5);
    }

    #[test]
    fn asymmetric_ranges_follow_the_values() {
        let values: Vec<f32> = normal(1_000, 4).iter().map(|x| x * 0.1 + 3.0).collect();
        let (low, high) = fit_affine(&values, 254.0, RangeMethod::MinMax, 1.0);
        assert!(low > 2.0 && high < 4.0 && values.iter().all(|x| (low..=high).contains(x)));
        let narrow = fit_affine(&values, 15.0, RangeMethod::Mse, 1.0);
        assert!(narrow.0 >= low && narrow.1 <= high && narrow.1 - narrow.0 < high - low);
        let part = fit_affine(&values, 15.0, RangeMethod::Percentile, 0.9);
        let inside = values.iter().filter(|x| (part.0..=part.1).contains(*x)).count();
        assert!((880..=920).contains(&inside), "{inside}");
        // Clipped where few values are, not around the middle between the extremes.
        let mut outlier = normal(1_000, 5);
        outlier[17] = 40.0;
        let (low, high) = fit_affine(&outlier, 15.0, RangeMethod::Entropy, 0.1);
        assert!(high == 4.0 && outlier.iter().filter(|x| (low..=high).contains(*x)).count() == 999, "{low} {high}");
        assert_eq!(fit_affine(&[2.0, 3.0], 15.0, RangeMethod::Entropy, 0.1), (2.0, 3.0));
        assert_eq!(fit_scale(&[0.0; 4], None, &Grid::Bytes, RangeMethod::Mse, 1.0), 1.0);
    }
}
