//! Second moments of activations, in f64 over all batches.

use candle_core::Tensor;
use faer::Mat;

/// Sums over tokens of `x`, `y`, `x xᵀ` and `x yᵀ`: all that a least-squares fit of `y` on `x` needs.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    n_x: usize,
    n_y: usize,
    n_tokens: f64,
    sum_x: Vec<f64>,
    sum_y: Vec<f64>,
    xx: Vec<f64>,
    xy: Vec<f64>,
}

fn add(to: &mut [f64], from: &Tensor) -> candle_core::Result<()> {
    let values: Vec<f32> = from.flatten_all()?.to_vec1()?;
    to.iter_mut().zip(values).for_each(|(to, from)| *to += f64::from(from));
    Ok(())
}

impl Moments {
    pub(super) fn new(n_x: usize, n_y: usize) -> Self {
        let zeros = |n: usize| vec![0.0; n];
        Self {
            n_x,
            n_y,
            n_tokens: 0.0,
            sum_x: zeros(n_x),
            sum_y: zeros(n_y),
            xx: zeros(n_x * n_x),
            xy: zeros(n_x * n_y),
        }
    }

    /// Adds the rows of a batch: `x: [n_tokens, n_x]`, `y: [n_tokens, n_y]`. Products within a batch are f32.
    pub(super) fn add(&mut self, x: &Tensor, y: &Tensor) -> candle_core::Result<()> {
        self.add_x(x)?;
        add(&mut self.sum_y, &y.sum(0)?)?;
        add(&mut self.xy, &x.t()?.contiguous()?.matmul(y)?)
    }

    /// Adds rows of `x` alone, for covariances.
    pub(super) fn add_x(&mut self, x: &Tensor) -> candle_core::Result<()> {
        self.n_tokens += x.dim(0)? as f64;
        add(&mut self.sum_x, &x.sum(0)?)?;
        add(&mut self.xx, &x.t()?.contiguous()?.matmul(x)?)
    }

    /// `E[x xᵀ] − E[x] E[x]ᵀ`, `[n_x, n_x]`.
    pub(super) fn covariance(&self) -> Mat<f64> {
        let n = self.n_tokens;
        Mat::from_fn(self.n_x, self.n_x, |i, j| self.xx[i * self.n_x + j] / n - self.sum_x[i] / n * (self.sum_x[j] / n))
    }

    /// `E[x yᵀ] − E[x] E[y]ᵀ`, `[n_x, n_y]`.
    pub(super) fn cross_covariance(&self) -> Mat<f64> {
        let n = self.n_tokens;
        Mat::from_fn(self.n_x, self.n_y, |i, j| self.xy[i * self.n_y + j] / n - self.sum_x[i] / n * (self.sum_y[j] / n))
    }

    pub(super) fn mean_x(&self) -> impl Iterator<Item = f64> + '_ {
        self.sum_x.iter().map(|sum| sum / self.n_tokens)
    }

    pub(super) fn mean_y(&self) -> impl Iterator<Item = f64> + '_ {
        self.sum_y.iter().map(|sum| sum / self.n_tokens)
    }
}

/// Adds `ridge · mean diagonal` to the diagonal, so that directions that calibration text hardly shows stay put.
pub(super) fn regularize(matrix: &mut Mat<f64>, ridge: f64) {
    let n = matrix.nrows();
    let mean = (0..n).map(|i| matrix[(i, i)]).sum::<f64>() / n as f64;
    // A matrix of zeros (an input that never varies) must become invertible too.
    let shift = (ridge * mean).max(1e-12);
    (0..n).for_each(|i| matrix[(i, i)] += shift);
}
