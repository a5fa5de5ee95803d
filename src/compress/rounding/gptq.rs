//! Rounding that makes up for its own errors, for any codes.
//!
//! ```text
//! minimise over codes:   tr( (Ŵ − W) H (Ŵ − W)ᵀ ),     H = E[x xᵀ]: second moments of the inputs
//! ```
//!
//! Columns are rounded one after the other; the error of each is made up for by the columns that are still free
//! (Hessian inverse `H⁻¹ = Uᵀ U`, `U` upper triangular):
//!
//! ```text
//! e = (w_j − round(w_j)) / U_jj         w_k ← w_k − e · U_jk   for k > j
//! ```
//!
//! Then sweeps over all columns move single codes to where the rest of the row now wants them (coordinate descent), and
//! scales are refitted to their codes.
//!
//! *Source*: Frantar et al. 2022 (GPTQ, §3; columns in falling order of `H_jj`); the sweeps: Nair & Suggala 2024
//! (CDQuant, §3.1).

use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::{Mat, Side};

use super::for_both_rows;
use super::grid::Grid;
use crate::quant::Codebook4;

/// The metric of one matrix's inputs, factorised.
pub(in crate::compress) struct Compensation {
    n: usize,
    /// Which column is rounded when.
    order: Vec<usize>,
    /// `U` in that order, row-major.
    factor: Vec<f32>,
    /// `H`, row-major.
    metric: Vec<f32>,
}

/// Scales and offsets of a matrix's groups: `value = scale · code + offset`.
#[derive(Debug, Clone)]
pub(in crate::compress) struct Scales {
    /// Groups of a row.
    pub(in crate::compress) n_groups: usize,
    /// `[rows, n_groups]`.
    pub(in crate::compress) scale: Vec<f32>,
    /// `[rows, n_groups]`; empty when every offset is 0.
    pub(in crate::compress) offset: Vec<f32>,
}

impl Scales {
    /// Columns of a group.
    pub(in crate::compress) fn group_len(&self, cols: usize) -> usize {
        Codebook4::group_len(cols, self.n_groups)
    }

    fn offset(&self, at: usize) -> f32 {
        self.offset.get(at).copied().unwrap_or(0.0)
    }
}

#[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
fn narrow(value: f64) -> f32 {
    value as f32
}

impl Compensation {
    /// Factorises `metric: [n, n]`, which must be positive definite; `None` if it is not.
    pub(in crate::compress) fn new(metric: &Mat<f64>) -> Option<Self> {
        let n = metric.nrows();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| metric[(b, b)].total_cmp(&metric[(a, a)]));
        let sorted = Mat::from_fn(n, n, |i, j| metric[(order[i], order[j])]);
        let inverse = sorted.llt(Side::Lower).ok()?.inverse();
        let lower = inverse.llt(Side::Lower).ok()?;
        let lower = lower.L();
        let factor = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
        let factor = factor.map(|(i, j)| if j >= i { narrow(lower[(j, i)]) } else { 0.0 }).collect();
        let metric = (0..n).flat_map(|i| (0..n).map(move |j| narrow(metric[(i, j)]))).collect();
        Some(Self { n, order, factor, metric })
    }

    /// `tr(Δ H Δᵀ) / tr(W H Wᵀ)` of `values: [rows, n]` and what they became, `Δ = Ŵ − W`.
    pub(in crate::compress) fn relative_error(&self, values: &[f32], became: impl Fn(usize, usize) -> f32) -> f64 {
        let n = self.n;
        let metric = faer::MatRef::from_row_major_slice(&self.metric, n, n);
        let rows = values.len() / n;
        let norm = |matrix: &Mat<f32>| -> f64 {
            let product = matrix * metric;
            let columns = (0..n).flat_map(|j| (0..rows).map(move |i| (i, j)));
            columns.map(|at| f64::from(product[at]) * f64::from(matrix[at])).sum()
        };
        let weights = Mat::from_fn(rows, n, |i, j| values[i * n + j]);
        let error = Mat::from_fn(rows, n, |i, j| became(i, j) - values[i * n + j]);
        norm(&error) / norm(&weights).max(f64::MIN_POSITIVE)
    }
}

/// Codes of `values: [rows, cols]` (row-major) under `scales`, whose scales are refitted on the way when `refit` is set;
/// `settle` gets every new scale and gives the one that can be stored.
pub(in crate::compress) fn compensate(
    values: &[f32],
    compensation: &Compensation,
    grid: &Grid,
    scales: &mut Scales,
    sweeps: usize,
    refit: Option<&(dyn Fn(f32) -> f32 + Sync)>,
) -> Vec<f32> {
    let n = compensation.n;
    let group = scales.group_len(n);
    let n_groups = scales.n_groups;
    let offsets = scales.clone();
    let mut codes = vec![0.0; values.len()];
    for_both_rows(&mut codes, n, &mut scales.scale, n_groups, |first, codes, scale| {
        let mut row = Row { compensation, grid, group, target: vec![0.0; n], gradient: vec![0.0; n] };
        for (at, (codes, scale)) in codes.chunks_exact_mut(n).zip(scale.chunks_exact_mut(n_groups)).enumerate() {
            let at = first + at;
            // Offsets are exact in every code, so they are taken out of the target.
            for (col, target) in row.target.iter_mut().enumerate() {
                *target = values[at * n + col] - offsets.offset(at * n_groups + col / group);
            }
            row.round(codes, scale);
            row.sweep(codes, scale, sweeps);
            if let Some(settle) = refit {
                row.refit(codes, scale, settle);
                row.sweep(codes, scale, sweeps);
            }
        }
    });
    codes
}

/// One row under work.
struct Row<'a> {
    compensation: &'a Compensation,
    grid: &'a Grid,
    group: usize,
    target: Vec<f32>,
    gradient: Vec<f32>,
}

impl Row<'_> {
    /// Columns one after the other, each making up for those before.
    fn round(&mut self, codes: &mut [f32], scale: &[f32]) {
        let Compensation { n, order, factor, .. } = self.compensation;
        let work = &mut self.gradient;
        for (work, &column) in work.iter_mut().zip(order) {
            *work = self.target[column];
        }
        for (step, &column) in order.iter().enumerate() {
            let scale = scale[column / self.group];
            let code = self.grid.round(work[step] / scale);
            codes[column] = code;
            let factors = &factor[step * n + step..(step + 1) * n];
            let error = (work[step] - code * scale) / factors[0];
            for (work, factor) in work[step..].iter_mut().zip(factors) {
                *work -= error * factor;
            }
        }
    }

    /// `H (Ŵ − W)` of the row.
    fn measure(&mut self, codes: &[f32], scale: &[f32]) {
        let n = self.compensation.n;
        self.gradient.fill(0.0);
        for column in 0..n {
            let error = codes[column] * scale[column / self.group] - self.target[column];
            if error != 0.0 {
                let metric = &self.compensation.metric[column * n..(column + 1) * n];
                self.gradient.iter_mut().zip(metric).for_each(|(sum, metric)| *sum += error * metric);
            }
        }
    }

    /// Moves single codes while that helps, at most `sweeps` times around.
    fn sweep(&mut self, codes: &mut [f32], scale: &[f32], sweeps: usize) {
        if sweeps == 0 {
            return;
        }
        let n = self.compensation.n;
        self.measure(codes, scale);
        for _ in 0..sweeps {
            let mut moved = false;
            for column in 0..n {
                let metric = &self.compensation.metric[column * n..(column + 1) * n];
                let scale = scale[column / self.group];
                let wanted = codes[column] * scale - self.gradient[column] / metric[column];
                let code = self.grid.round(wanted / scale);
                if code == codes[column] {
                    continue;
                }
                // Of two codes equally near the old one stays: otherwise rounding could go back and forth.
                if (code * scale - wanted).abs() >= (codes[column] * scale - wanted).abs() {
                    continue;
                }
                let change = (code - codes[column]) * scale;
                codes[column] = code;
                self.gradient.iter_mut().zip(metric).for_each(|(sum, metric)| *sum += change * metric);
                moved = true;
            }
            if !moved {
                break;
            }
        }
    }

    /// The scales that fit the codes best: `Σ_h (q_gᵀ H q_h) s_h = q_gᵀ H w` over groups `g`.
    fn refit(&mut self, codes: &[f32], scale: &mut [f32], settle: &dyn Fn(f32) -> f32) {
        let (n, n_groups) = (self.compensation.n, scale.len());
        let mut products = vec![vec![0.0f32; n]; n_groups];
        let mut wanted = vec![0.0f32; n];
        for column in 0..n {
            let metric = &self.compensation.metric[column * n..(column + 1) * n];
            let code = codes[column];
            if code != 0.0 {
                let sums = &mut products[column / self.group];
                sums.iter_mut().zip(metric).for_each(|(sum, metric)| *sum += code * metric);
            }
            let target = self.target[column];
            wanted.iter_mut().zip(metric).for_each(|(sum, metric)| *sum += target * metric);
        }
        let dot = |group: usize, with: &[f32]| -> f64 {
            let columns = group * self.group..((group + 1) * self.group).min(n);
            columns.map(|column| f64::from(codes[column]) * f64::from(with[column])).sum()
        };
        let mut matrix = Mat::from_fn(n_groups, n_groups, |g, h| dot(g, &products[h]));
        let mean = (0..n_groups).map(|g| matrix[(g, g)]).sum::<f64>() / n_groups as f64;
        if mean <= 0.0 {
            return;
        }
        let right = Mat::from_fn(n_groups, 1, |g, _| dot(g, &wanted));
        // A group whose codes are all 0 has no best scale.
        (0..n_groups).for_each(|g| matrix[(g, g)] += 1e-9 * mean);
        let Ok(factor) = matrix.llt(Side::Lower) else { return };
        let solved = factor.solve(&right);
        for (group, scale) in scale.iter_mut().enumerate() {
            let best = narrow(solved[(group, 0)]);
            // Far from where the codes came from the fit has left what it is a fit of.
            if best > *scale * 0.5 && best < *scale * 2.0 {
                *scale = settle(best);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::grid::{NF4, linear_table};
    use super::super::range::{RangeMethod, fit_scale};
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    /// Second moments of inputs that depend on each other, and a matrix.
    fn problem(n: usize, rows: usize) -> (Mat<f64>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(11);
        let mix = Mat::from_fn(n, n / 2, |_, _| rng.random_range(-1.0..1.0));
        let mut metric = &mix * mix.transpose();
        (0..n).for_each(|i| metric[(i, i)] += 0.05);
        (metric, (0..rows * n).map(|_| rng.random_range(-1.0f32..1.0)).collect())
    }

    fn cost(metric: &Mat<f64>, values: &[f32], codes: &[f32], scales: &Scales) -> f64 {
        let n = metric.nrows();
        let group = scales.group_len(n);
        let rows = values.len() / n;
        let error = Mat::from_fn(rows, n, |r, c| {
            let at = r * scales.n_groups + c / group;
            f64::from(codes[r * n + c] * scales.scale[at] + scales.offset(at) - values[r * n + c])
        });
        (&error * metric * error.transpose()).diagonal().column_vector().iter().sum()
    }

    fn start(values: &[f32], n: usize, n_groups: usize, grid: &Grid) -> Scales {
        let group = Codebook4::group_len(n, n_groups);
        let scale = values
            .chunks_exact(n)
            .flat_map(|row| row.chunks(group).map(|part| fit_scale(part, None, grid, RangeMethod::Mse, 1.0)))
            .collect();
        Scales { n_groups, scale, offset: Vec::new() }
    }

    #[test]
    fn each_step_is_better_than_the_one_before() {
        let (metric, values) = problem(64, 24);
        let compensation = Compensation::new(&metric).unwrap();
        for (grid, n_groups) in [(Grid::of(linear_table(1)), 1), (Grid::of(NF4), 4), (Grid::Bytes, 1)] {
            let mut scales = start(&values, 64, n_groups, &grid);
            let group = scales.group_len(64);
            let nearest: Vec<f32> = (0..values.len())
                .map(|i| grid.round(values[i] / scales.scale[i / 64 * n_groups + i % 64 / group]))
                .collect();
            let plain = cost(&metric, &values, &nearest, &scales);
            let codes = compensate(&values, &compensation, &grid, &mut scales, 0, None);
            let compensated = cost(&metric, &values, &codes, &scales);
            let codes = compensate(&values, &compensation, &grid, &mut scales, 8, None);
            let swept = cost(&metric, &values, &codes, &scales);
            let codes = compensate(&values, &compensation, &grid, &mut scales, 8, Some(&|scale| scale));
            let refitted = cost(&metric, &values, &codes, &scales);
            assert!(
                compensated < 0.7 * plain && swept <= compensated * 1.0001 && refitted < swept,
                "{plain} {compensated} {swept} {refitted}"
            );
        }
    }

    #[test]
    fn without_dependence_it_is_rounding_to_the_nearest() {
        let mut metric = Mat::zeros(16, 16);
        (0..16u8).for_each(|i| metric[(usize::from(i), usize::from(i))] = 1.0 + f64::from(i));
        let (_, values) = problem(16, 8);
        let grid = Grid::of(linear_table(1));
        let mut scales = start(&values, 16, 1, &grid);
        let codes = compensate(&values, &Compensation::new(&metric).unwrap(), &grid, &mut scales, 4, None);
        for (index, (code, value)) in codes.iter().zip(&values).enumerate() {
            assert_eq!(*code, grid.round(value / scales.scale[index / 16]));
        }
    }

    #[test]
    fn it_is_the_update_of_the_paper_written_out() {
        // Every step as in the paper's equations (2) and (3): the best change of the free weights, and the inverse of what
        // remains of H.
        let (metric, values) = problem(12, 3);
        let grid = Grid::of(linear_table(1));
        let mut scales = start(&values, 12, 1, &grid);
        let compensation = Compensation::new(&metric).unwrap();
        let codes = compensate(&values, &compensation, &grid, &mut scales, 0, None);
        for row in 0..3 {
            let scale = f64::from(scales.scale[row]);
            let mut free: Vec<usize> = compensation.order.clone();
            let mut w: Vec<f64> = (0..12).map(|c| f64::from(values[row * 12 + c])).collect();
            while let Some(&q) = free.first() {
                let sub = Mat::from_fn(free.len(), free.len(), |i, j| metric[(free[i], free[j])]);
                let inverse = sub.llt(Side::Lower).unwrap().inverse();
                let code = grid.round(narrow(w[q] / scale));
                assert_eq!(code, codes[row * 12 + q], "row {row}, column {q}");
                let error = (w[q] - f64::from(code) * scale) / inverse[(0, 0)];
                free.iter().enumerate().for_each(|(i, &k)| w[k] -= error * inverse[(i, 0)]);
                free.remove(0);
            }
        }
    }

    #[test]
    fn offsets_and_threads_change_nothing_but_the_zero() {
        let (metric, values) = problem(32, 9);
        let compensation = Compensation::new(&metric).unwrap();
        let grid = Grid::of(linear_table(1));
        let mut plain = start(&values, 32, 1, &grid);
        let codes = compensate(&values, &compensation, &grid, &mut plain, 3, Some(&|scale| scale));
        let moved: Vec<f32> = values.iter().map(|x| x + 2.0).collect();
        let mut shifted = start(&values, 32, 1, &grid);
        shifted.offset = vec![2.0; shifted.scale.len()];
        let again = compensate(&moved, &compensation, &grid, &mut shifted, 3, Some(&|scale| scale));
        let same = codes.iter().zip(&again).filter(|(a, b)| a == b).count();
        assert!(same * 50 > codes.len() * 49, "{same} of {}: a shift costs only last bits", codes.len());
        for row in 0..9 {
            let mut alone =
                Scales { n_groups: 1, scale: vec![start(&values, 32, 1, &grid).scale[row]], offset: vec![] };
            let one = compensate(&values[row * 32..][..32], &compensation, &grid, &mut alone, 3, Some(&|scale| scale));
            assert_eq!(one, codes[row * 32..][..32], "a row depends on itself alone");
        }
    }
}
