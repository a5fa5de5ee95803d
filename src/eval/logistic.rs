//! Multinomial logistic regression by L-BFGS.

use super::EvalError;

/// Pairs of steps and gradient changes that the curvature is estimated from.
const MEMORY: usize = 10;
/// Iterations after which the solver gives up.
const MAX_ITERATIONS: usize = 2_000;
/// The solution is found when no component of the mean loss's gradient is larger.
const TOLERANCE: f64 = 1e-6;

/// A fitted classifier.
#[derive(Debug, Clone)]
pub(super) struct Logistic {
    width: usize,
    /// `[n_classes, width + 1]`; the last column is the bias.
    coefficients: Vec<f64>,
    /// Iterations that the solver made.
    pub(super) iterations: usize,
}

/// Rows of features `[n, width]` with their classes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Examples<'a> {
    pub(super) width: usize,
    pub(super) features: &'a [f32],
    pub(super) classes: &'a [usize],
    pub(super) n_classes: usize,
}

/// Fits
///
/// ```text
/// min over W, b of   Σ_i ( log Σ_k exp(w_k·x_i + b_k) − (w_{y_i}·x_i + b_{y_i}) )  +  l2/2 · ‖W‖²
/// ```
///
/// The problem is convex and the start is 0, so the result depends on the data alone. Biases are not regularised. With
/// three or more classes this is scikit-learn's `LogisticRegression(C = 1 / l2)`; two classes have a row each, which is
/// its `C = 2 / l2`.
///
/// *Source*: Nocedal & Wright 2006, algorithm 7.5 (L-BFGS) with the backtracking of algorithm 3.1.
pub(super) fn fit(examples: &Examples<'_>, l2: f64) -> Result<Logistic, EvalError> {
    let n_parameters = examples.n_classes * (examples.width + 1);
    let mut at = vec![0.0; n_parameters];
    let mut gradient = vec![0.0; n_parameters];
    let mut value = objective(examples, l2, &at, &mut gradient);
    let mut history: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
    let (mut next, mut next_gradient) = (at.clone(), gradient.clone());
    for iterations in 0..MAX_ITERATIONS {
        let largest = gradient.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
        if largest <= TOLERANCE {
            return Ok(Logistic { width: examples.width, coefficients: at, iterations });
        }
        let direction = direction(&gradient, &history);
        let slope = dot(&direction, &gradient);
        let mut step = if history.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt().max(1.0) } else { 1.0 };
        let next_value = loop {
            next.iter_mut().zip(&at).zip(&direction).for_each(|((next, at), d)| *next = at + step * d);
            let next_value = objective(examples, l2, &next, &mut next_gradient);
            if next_value <= value + 1e-4 * step * slope {
                break next_value;
            }
            step *= 0.5;
            if step < 1e-12 {
                // Rounding hides any further decrease.
                return Err(EvalError::Probe { iterations, gradient: largest });
            }
        };
        let moved: Vec<f64> = next.iter().zip(&at).map(|(next, at)| next - at).collect();
        let change: Vec<f64> = next_gradient.iter().zip(&gradient).map(|(next, g)| next - g).collect();
        if dot(&moved, &change) > 1e-12 * dot(&change, &change) {
            if history.len() == MEMORY {
                history.remove(0);
            }
            history.push((moved, change));
        }
        std::mem::swap(&mut at, &mut next);
        std::mem::swap(&mut gradient, &mut next_gradient);
        value = next_value;
    }
    let largest = gradient.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
    Err(EvalError::Probe { iterations: MAX_ITERATIONS, gradient: largest })
}

/// `−H g`, `H` the inverse curvature that the history stands for.
fn direction(gradient: &[f64], history: &[(Vec<f64>, Vec<f64>)]) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut weights = Vec::with_capacity(history.len());
    for (moved, change) in history.iter().rev() {
        let weight = dot(moved, &q) / dot(moved, change);
        q.iter_mut().zip(change).for_each(|(q, change)| *q -= weight * change);
        weights.push(weight);
    }
    if let Some((moved, change)) = history.last() {
        let scale = dot(moved, change) / dot(change, change);
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((moved, change), weight) in history.iter().zip(weights.iter().rev()) {
        let other = dot(change, &q) / dot(moved, change);
        q.iter_mut().zip(moved).for_each(|(q, moved)| *q += (weight - other) * moved);
    }
    q
}

/// The objective divided by the number of examples, and its gradient.
fn objective(examples: &Examples<'_>, l2: f64, at: &[f64], gradient: &mut [f64]) -> f64 {
    let (width, n) = (examples.width, examples.classes.len() as f64);
    gradient.fill(0.0);
    let mut loss = 0.0;
    let mut row = vec![0.0; width];
    let mut scores = vec![0.0; examples.n_classes];
    for (features, &class) in examples.features.chunks_exact(width).zip(examples.classes) {
        row.iter_mut().zip(features).for_each(|(to, from)| *to = f64::from(*from));
        let log_sum = softmax(at, &row, &mut scores);
        loss += log_sum - score(&at[class * (width + 1)..], &row);
        scores[class] -= 1.0;
        for (error, gradient) in scores.iter().zip(gradient.chunks_exact_mut(width + 1)) {
            let (weights, bias) = gradient.split_at_mut(width);
            weights.iter_mut().zip(&row).for_each(|(gradient, x)| *gradient += error * x);
            bias[0] += error;
        }
    }
    for (gradient, at) in gradient.chunks_exact_mut(width + 1).zip(at.chunks_exact(width + 1)) {
        for (gradient, at) in gradient[..width].iter_mut().zip(&at[..width]) {
            *gradient += l2 * at;
            loss += 0.5 * l2 * at * at;
        }
    }
    gradient.iter_mut().for_each(|gradient| *gradient /= n);
    loss / n
}

/// `w·x + b` of the class whose coefficients come first.
fn score(coefficients: &[f64], row: &[f64]) -> f64 {
    dot(&coefficients[..row.len()], row) + coefficients[row.len()]
}

/// Probabilities of the classes into `scores`; returns the logarithm of the sum of exponentials.
fn softmax(coefficients: &[f64], row: &[f64], scores: &mut [f64]) -> f64 {
    for (to, coefficients) in scores.iter_mut().zip(coefficients.chunks_exact(row.len() + 1)) {
        *to = score(coefficients, row);
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    scores.iter_mut().for_each(|score| *score = (*score - max).exp() / sum);
    max + sum.ln()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four sums side by side: one alone waits for each addition.
    let mut sums = [0.0; 4];
    let (a_chunks, b_chunks) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        (0..4).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + rest
}

impl Logistic {
    /// The most probable class of a row; of equals the first.
    pub(super) fn predict(&self, features: &[f32]) -> usize {
        let row: Vec<f64> = features.iter().map(|value| f64::from(*value)).collect();
        let scores = self.coefficients.chunks_exact(self.width + 1).map(|coefficients| score(coefficients, &row));
        let best =
            scores.enumerate().fold((0, f64::NEG_INFINITY), |best, next| if next.1 > best.1 { next } else { best });
        best.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 30 examples of 4 features in 3 classes by a small generator that Python repeats.
    fn examples() -> (Vec<f32>, Vec<usize>) {
        let mut state = 12_345u64;
        let mut next = || {
            state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345) % (1 << 31);
            state as f64 / f64::from(1u32 << 31)
        };
        let (mut features, mut classes) = (Vec::new(), Vec::new());
        for i in 0..30 {
            let class = i % 3;
            (0..4).for_each(|j| features.push((next() - 0.5 + if j == class { 0.3 } else { 0.0 }) as f32));
            classes.push(class);
        }
        (features, classes)
    }

    // import numpy as np; from sklearn.linear_model import LogisticRegression
    // (X, y as above, X rounded to f32)
    // m = LogisticRegression(C=1/0.5, tol=1e-12, max_iter=10000).fit(X, y); m.coef_, m.intercept_, m.predict(X)
    #[test]
    fn three_classes_as_in_scikit_learn() {
        let (features, classes) = examples();
        let fit = fit(&Examples { width: 4, features: &features, classes: &classes, n_classes: 3 }, 0.5).unwrap();
        #[rustfmt::skip]
        let expected = [
             1.944_895_834_431, -0.429_082_205_045, -0.844_028_408_674,  0.729_727_661_318,  0.066_412_186_608,
            -0.659_392_286_596,  1.283_466_110_646, -0.578_910_357_161, -1.286_258_135_977, -0.001_306_286_569,
            -1.285_503_547_836, -0.854_383_905_601,  1.422_938_765_835,  0.556_530_474_659, -0.065_105_900_038,
        ];
        for (got, expected) in fit.coefficients.iter().zip(expected) {
            assert!((got - expected).abs() < 2e-4, "{got} is not {expected}");
        }
        let predicted: Vec<usize> = features.chunks_exact(4).map(|row| fit.predict(row)).collect();
        let expected = [0, 1, 2, 2, 0, 2, 0, 2, 2, 0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 1, 0, 1, 2, 1, 0, 2, 0, 1, 2];
        assert_eq!(predicted, expected);
    }

    // b = y != 2; m = LogisticRegression(C=2/0.5, tol=1e-12, max_iter=10000).fit(X[b], y[b]); m.coef_, m.intercept_
    #[test]
    fn two_classes_are_the_binary_model_of_twice_the_c() {
        let (features, classes) = examples();
        let kept: Vec<usize> = (0..30).filter(|&i| classes[i] != 2).collect();
        let features: Vec<f32> = kept.iter().flat_map(|&i| &features[4 * i..4 * i + 4]).copied().collect();
        let classes: Vec<usize> = kept.iter().map(|&i| classes[i]).collect();
        let fit = fit(&Examples { width: 4, features: &features, classes: &classes, n_classes: 2 }, 0.5).unwrap();
        let expected =
            [-2.475_682_500_401, 1.409_771_987_209, 0.468_585_326_506, -1.838_475_890_711, -0.010_737_648_869];
        for (place, expected) in expected.iter().enumerate() {
            let got = fit.coefficients[5 + place] - fit.coefficients[place];
            assert!((got - expected).abs() < 2e-4, "{got} is not {expected}");
        }
    }
}
