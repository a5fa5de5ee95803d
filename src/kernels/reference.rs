//! What each kernel means, in plain loops and f64: the oracle of the tests, never called to serve.

use std::ops::Range;

use super::layout::RowScale;
use super::{Nonlinearity, Reduction};

/// `out[r, n] = Σ_k codes[r, k] · weights[n, k]`.
#[must_use]
pub fn gemm_i32(codes: &[u8], weights: &[i8], k: usize) -> Vec<i32> {
    let dot = |row: &[u8], column: &[i8]| row.iter().zip(column).map(|(&a, &w)| i32::from(a) * i32::from(w)).sum();
    codes.chunks_exact(k).flat_map(|row| weights.chunks_exact(k).map(move |column| dot(row, column))).collect()
}

/// `x Wᵀ + b` with `x = low + scale · codes` and `W = weight_scale · weights`.
#[must_use]
pub fn linear(
    codes: &[u8],
    scales: &[RowScale],
    weights: &[i8],
    weight_scale: &[f32],
    bias: &[f32],
    k: usize,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(scales.len() * bias.len());
    for (row, scale) in codes.chunks_exact(k).zip(scales) {
        for (n, column) in weights.chunks_exact(k).enumerate() {
            let value = |code: u8| f64::from(scale.low) + f64::from(scale.scale) * f64::from(code);
            let sum: f64 = row.iter().zip(column).map(|(&a, &w)| value(a) * f64::from(w)).sum();
            out.push(sum * f64::from(weight_scale[n]) + f64::from(bias[n]));
        }
    }
    out
}

/// The error function, to 1e-15: its Taylor series where it converges fast, its continued fraction beyond.
#[must_use]
pub fn erf(x: f64) -> f64 {
    let t = x.abs();
    let magnitude = if t < 3.0 {
        let mut term = t;
        let mut sum = t;
        let mut n = 0.0;
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= -t * t / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..=60).rev().fold(t, |tail, n| t + f64::from(n) / 2.0 / tail);
        1.0 - (-t * t).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    magnitude.copysign(x)
}

/// An element-wise function.
#[must_use]
pub fn activate(kind: Nonlinearity, x: f64) -> f64 {
    match kind {
        Nonlinearity::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Nonlinearity::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Nonlinearity::Relu => x.max(0.0),
        Nonlinearity::Tanh => x.tanh(),
    }
}

/// The scale and codes of a row.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rounded values in 0..=255")]
pub fn quantize(row: &[f32]) -> (RowScale, Vec<u8>) {
    let low = row.iter().copied().fold(f32::INFINITY, f32::min);
    let high = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let inverse = if high > low { 255.0 / (high - low) } else { 0.0 };
    let codes = row.iter().map(|x| ((x - low) * inverse).round_ties_even() as u8).collect();
    (RowScale { scale: (high - low) / 255.0, low }, codes)
}

/// `(x − mean) / √(var + eps) · gain + bias`.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "lengths of tests")]
pub fn layer_norm(x: &[f64], gain: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let normal = x.iter().map(|x| (x - mean) / (variance + eps).sqrt());
    normal.zip(gain.iter().zip(bias)).map(|(x, (&gain, &bias))| x * f64::from(gain) + f64::from(bias)).collect()
}

/// Many rows to one.
#[must_use]
pub fn reduce(kind: Reduction, rows: &[f32], n: usize) -> Vec<f64> {
    let column = |c: usize| rows.iter().skip(c).step_by(n).map(|&x| f64::from(x));
    (0..n)
        .map(|c| match kind {
            Reduction::Sum { factor } => column(c).sum::<f64>() * f64::from(factor),
            Reduction::Max => column(c).fold(f64::NEG_INFINITY, f64::max),
        })
        .collect()
}

/// One head: `q`, `k`, `v` are `[len, d]`; the result is `[len, d]`. `seen` tells what a query sees: keys, or the mean of
/// several that weighs as much as they are.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "lengths of tests")]
pub fn attend(q: &[f64], k: &[f64], v: &[f64], d: usize, seen: impl Fn(usize) -> Vec<Range<usize>>) -> Vec<f64> {
    let len = q.len() / d;
    let mut out = vec![0.0; len * d];
    let mean = |x: &[f64], keys: &Range<usize>, j: usize| {
        keys.clone().map(|key| x[key * d + j]).sum::<f64>() / keys.len() as f64
    };
    for query in 0..len {
        let seen = seen(query);
        let score = |keys: &Range<usize>| {
            let product: f64 = (0..d).map(|j| q[query * d + j] * mean(k, keys, j)).sum();
            product / (d as f64).sqrt() + (keys.len() as f64).ln()
        };
        let scores: Vec<f64> = seen.iter().map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (keys, weight) in seen.iter().zip(&weights) {
            for j in 0..d {
                out[query * d + j] += weight / sum * mean(v, keys, j);
            }
        }
    }
    out
}
