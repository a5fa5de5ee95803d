//! Low rank: a matrix as a product of two thin ones.
//!
//! ```text
//! minimise over rank(Ŵ) ≤ r:   ‖ D (W − Ŵ) L ‖²_F         L Lᵀ = E[x xᵀ],  D: weights of the rows
//! ```
//!
//! With neither `D` nor `L` this is the plain SVD. `L` makes it the error of the output on calibration text (Wang et al.
//! 2024, SVD-LLM, §3.1; Chen et al. 2021, DRONE, §3.2); `D` weighs output channels by what errors of theirs do to the
//! embedding (Hsu et al. 2022, FWSVD, §3). In all cases the error is the sum of the squared singular values of `D W L`
//! that are left out.

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};

/// A factorised matrix, of which any rank can be taken.
#[derive(Debug, Clone)]
pub struct Factorization {
    /// Squared singular values of `D W L`, falling.
    energies: Vec<f64>,
    /// `[n_out, k]`; component `i` of the product is column `i` times row `i` of `down`.
    up: Mat<f64>,
    /// `[k, n_in]`.
    down: Mat<f64>,
}

/// `W ≈ up · down`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// Columns of `up`, rows of `down`.
    pub rank: usize,
    /// `[n_out, rank]`.
    pub up: Vec<f32>,
    /// `[rank, n_in]`.
    pub down: Vec<f32>,
}

/// Factorises `weight: [n_out, n_in]`. `rows: [n_out]` are the diagonal of `D`, positive; `moments: [n_in, n_in]` is
/// `E[x xᵀ]`. `None` if that is not positive definite or holds what is not finite.
///
/// Both factors of component `i` are scaled by the root of its singular value, so that neither the weights of one
/// factor nor the activations between them span more of the range of an INT8 code than they must.
#[must_use]
pub fn factorize(weight: &Mat<f64>, rows: Option<&[f64]>, moments: Option<&Mat<f64>>) -> Option<Factorization> {
    let (n_out, n_in) = (weight.nrows(), weight.ncols());
    let scaled = match rows {
        Some(rows) => Mat::from_fn(n_out, n_in, |i, j| rows[i] * weight[(i, j)]),
        None => weight.clone(),
    };
    let lower = match moments {
        Some(moments) => Some(moments.llt(Side::Lower).ok()?.L().to_owned()),
        None => None,
    };
    let product = match &lower {
        Some(lower) => &scaled * lower,
        None => scaled.clone(),
    };
    // The eigenvectors of the smaller Gram matrix are the singular vectors of that side; projecting on them needs no
    // others.
    let left = n_out <= n_in;
    let gram = if left { &product * product.transpose() } else { product.transpose() * &product };
    let eigen = gram.self_adjoint_eigen(Side::Lower).ok()?;
    let n = gram.nrows();
    let falling: Vec<usize> = (0..n).rev().collect(); // faer gives them rising
    let energies: Vec<f64> = falling.iter().map(|&i| eigen.S().column_vector()[i].max(0.0)).collect();
    if !energies.iter().all(|energy| energy.is_finite()) {
        return None;
    }
    let vectors = Mat::from_fn(n, n, |i, j| eigen.U()[(i, falling[j])]);
    let (mut up, mut down) = if left {
        // Ŵ = D⁻¹ U_r U_rᵀ D W
        let up = match rows {
            Some(rows) => Mat::from_fn(n_out, n, |i, j| vectors[(i, j)] / rows[i]),
            None => vectors.clone(),
        };
        (up, vectors.transpose() * &scaled)
    } else {
        // Ŵ = W L V_r V_rᵀ L⁻¹
        let (up, down) = match &lower {
            Some(lower) => {
                let inverse = lower.partial_piv_lu().inverse();
                (weight * lower * &vectors, vectors.transpose() * inverse)
            }
            None => (weight * &vectors, vectors.transpose().to_owned()),
        };
        (up, down)
    };
    for (i, energy) in energies.iter().enumerate() {
        let root = energy.max(f64::MIN_POSITIVE).powf(0.25);
        let factor = if left { root } else { root.recip() };
        (0..n_out).for_each(|row| up[(row, i)] *= factor);
        (0..n_in).for_each(|column| down[(i, column)] /= factor);
    }
    Some(Factorization { energies, up, down })
}

impl Factorization {
    /// Squared singular values, falling.
    #[must_use]
    pub fn energies(&self) -> &[f64] {
        &self.energies
    }

    /// The weighted squared error at `rank`.
    #[must_use]
    pub fn error(&self, rank: usize) -> f64 {
        self.energies.iter().skip(rank).sum()
    }

    /// The smallest rank that keeps `share` of the energy, at least 1.
    #[must_use]
    pub fn rank_for_energy(&self, share: f64) -> usize {
        let allowed = (1.0 - share) * self.error(0);
        let mut left_out = 0.0;
        let mut rank = self.energies.len();
        while rank > 1 && left_out + self.energies[rank - 1] <= allowed {
            left_out += self.energies[rank - 1];
            rank -= 1;
        }
        rank
    }

    /// The factors of rank `rank`.
    ///
    /// # Panics
    /// If the rank is 0 or above that of the factorization.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
    pub fn factors(&self, rank: usize) -> Factors {
        assert!(rank > 0 && rank <= self.energies.len(), "rank {rank} of {}", self.energies.len());
        let up = (0..self.up.nrows()).flat_map(|i| (0..rank).map(move |j| (i, j))).map(|at| self.up[at] as f32);
        let down = (0..rank).flat_map(|i| (0..self.down.ncols()).map(move |j| (i, j))).map(|at| self.down[at] as f32);
        Factors { rank, up: up.collect(), down: down.collect() }
    }
}

/// Ranks below this make the pair of factors smaller and cheaper than the matrix: `r (n_out + n_in) < n_out · n_in`.
#[must_use]
pub fn break_even(n_out: usize, n_in: usize) -> usize {
    (n_out * n_in).div_ceil(n_out + n_in)
}

impl Factors {
    /// `up · down`, row-major `[n_out, n_in]`.
    #[must_use]
    pub fn product(&self, n_in: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.up.len() / self.rank * n_in);
        for row in self.up.chunks_exact(self.rank) {
            let mut sum = vec![0.0f32; n_in];
            for (&factor, component) in row.iter().zip(self.down.chunks_exact(n_in)) {
                sum.iter_mut().zip(component).for_each(|(sum, &value)| *sum += factor * value);
            }
            out.append(&mut sum);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    fn random(rows: usize, cols: usize, rng: &mut StdRng) -> Mat<f64> {
        Mat::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
    }

    fn product(factors: &Factors, n_in: usize) -> Mat<f64> {
        let values = factors.product(n_in);
        Mat::from_fn(values.len() / n_in, n_in, |i, j| f64::from(values[i * n_in + j]))
    }

    /// `tr(D Δ H Δᵀ D)`, straight from the definition.
    fn weighted_error(difference: &Mat<f64>, rows: &[f64], moments: &Mat<f64>) -> f64 {
        let product = difference * moments;
        (0..difference.nrows())
            .map(|i| {
                (0..difference.ncols()).map(|j| difference[(i, j)] * product[(i, j)]).sum::<f64>() * rows[i].powi(2)
            })
            .sum()
    }

    /// Inputs that vary much more in some directions than in others, and a weight that sees all of them.
    fn case(n_out: usize, n_in: usize, seed: u64) -> (Mat<f64>, Vec<f64>, Mat<f64>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut samples = random(n_in, 4 * n_in, &mut rng);
        for i in 0..n_in {
            let spread = 10f64.powf(-2.0 * i as f64 / n_in as f64);
            (0..4 * n_in).for_each(|t| samples[(i, t)] *= spread);
        }
        let mixing = random(n_in, n_in, &mut rng);
        let samples = mixing * samples;
        let moments = &samples * samples.transpose() * (1.0 / (4 * n_in) as f64);
        let rows = (0..n_out).map(|_| rng.random_range(0.1..3.0)).collect();
        (random(n_out, n_in, &mut rng), rows, moments)
    }

    #[test]
    fn the_error_is_the_energy_left_out_and_no_other_weighting_gets_below_it() {
        for (n_out, n_in) in [(9, 14), (14, 9), (8, 8)] {
            let (weight, rows, moments) = case(n_out, n_in, 11);
            let identity = Mat::identity(n_in, n_in);
            let ones = vec![1.0; n_out];
            let kinds = [(None, None), (Some(&rows), None), (None, Some(&moments)), (Some(&rows), Some(&moments))];
            let all: Vec<Factorization> = kinds
                .iter()
                .map(|(rows, moments)| factorize(&weight, rows.map(Vec::as_slice), *moments).unwrap())
                .collect();
            for ((rows, moments), own) in kinds.iter().zip(&all) {
                let rows = rows.unwrap_or(&ones);
                let moments = moments.unwrap_or(&identity);
                for rank in 1..n_out.min(n_in) {
                    let error_of = |factorization: &Factorization| {
                        let difference = &weight - product(&factorization.factors(rank), n_in);
                        weighted_error(&difference, rows, moments)
                    };
                    let ours = error_of(own);
                    let stated = own.error(rank);
                    // The factors are f32.
                    assert!(
                        (ours - stated).abs() < 1e-5 * own.error(0),
                        "{n_out}x{n_in} rank {rank}: {ours}, {stated}"
                    );
                    for other in &all {
                        assert!(ours <= error_of(other) + 1e-6 * own.error(0), "{n_out}x{n_in} rank {rank}");
                    }
                }
                assert!(own.error(n_out.min(n_in)) == 0.0);
            }
        }
    }

    #[test]
    fn singular_values_are_those_of_an_independent_decomposition() {
        let (weight, _, moments) = case(7, 10, 3);
        let lower = moments.llt(Side::Lower).unwrap().L().to_owned();
        let svd = (&weight * lower).thin_svd().unwrap();
        let ours = factorize(&weight, None, Some(&moments)).unwrap();
        for (i, energy) in ours.energies().iter().enumerate() {
            let exact = svd.S().column_vector()[i].powi(2);
            assert!((energy - exact).abs() < 1e-9 * ours.error(0), "{i}: {energy} is not {exact}");
        }
    }

    #[test]
    fn rank_by_energy_is_the_smallest_that_keeps_it() {
        let (weight, _, moments) = case(12, 10, 4);
        let factorization = factorize(&weight, None, Some(&moments)).unwrap();
        let total = factorization.error(0);
        for share in [0.3, 0.9, 0.99, 0.9999] {
            let rank = factorization.rank_for_energy(share);
            assert!(total - factorization.error(rank) >= share * total * (1.0 - 1e-12));
            assert!(rank == 1 || total - factorization.error(rank - 1) < share * total);
        }
        assert_eq!(factorization.rank_for_energy(0.0), 1);
        assert_eq!(factorization.rank_for_energy(1.0), 10);
    }

    #[test]
    fn break_even_is_where_the_factors_stop_being_smaller() {
        for (n_out, n_in) in [(384, 384), (1536, 384), (384, 1536), (7, 3)] {
            let rank = break_even(n_out, n_in);
            assert!(rank * (n_out + n_in) >= n_out * n_in);
            assert!((rank - 1) * (n_out + n_in) < n_out * n_in);
        }
        assert_eq!(break_even(384, 384), 192);
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let (weight, _, mut moments) = case(4, 4, 5);
        moments[(1, 2)] = f64::NAN;
        moments[(2, 1)] = f64::NAN;
        assert!(factorize(&weight, None, Some(&moments)).is_none());
    }
}
