//! A matrix times one row, in f32.

/// Partial sums that a row is split over, so that additions need not wait for each other.
const LANES: usize = 16;

/// `out = weight · x + bias`, in an order of additions that depends on the shapes alone.
///
/// *Shapes*: `x: [n_in]`, `weight: [out.len(), n_in]` row-major, `bias: [out.len()]`. *Error*: that of f32 sums of
/// `n_in / 16 + 16` terms. For a few rows per sequence (a classification head), where a matrix product is not worth
/// packing for.
///
/// # Panics
/// If the lengths do not fit.
pub fn dense(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    assert!(weight.len() == out.len() * x.len() && bias.len() == out.len(), "{} by {}", out.len(), x.len());
    for ((out, row), bias) in out.iter_mut().zip(weight.chunks_exact(x.len().max(1))).zip(bias) {
        let mut sums = [0.0f32; LANES];
        let (blocks, rest) = x.as_chunks::<LANES>();
        let (row_blocks, row_rest) = row.as_chunks::<LANES>();
        for (x, w) in blocks.iter().zip(row_blocks) {
            for lane in 0..LANES {
                sums[lane] += x[lane] * w[lane];
            }
        }
        let tail: f32 = rest.iter().zip(row_rest).map(|(x, w)| x * w).sum();
        *out = sums.iter().sum::<f32>() + tail + bias;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_sum_of_products() {
        for (n_in, n_out) in [(1, 1), (16, 3), (37, 5), (384, 2)] {
            let value = |i: usize| ((i * 7919 % 1000) as f32 - 500.0) / 500.0;
            let x: Vec<f32> = (0..n_in).map(value).collect();
            let weight: Vec<f32> = (0..n_in * n_out).map(|i| value(i + 3)).collect();
            let bias: Vec<f32> = (0..n_out).map(|i| value(i + 11)).collect();
            let mut out = vec![0.0; n_out];
            dense(&x, &weight, &bias, &mut out);
            for (row, out) in out.iter().enumerate() {
                let products = x.iter().zip(&weight[row * n_in..]).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let expected = products.sum::<f64>() + f64::from(bias[row]);
                assert!((f64::from(*out) - expected).abs() < 1e-4, "{n_in} by {n_out}: {out} {expected}");
            }
        }
    }
}
