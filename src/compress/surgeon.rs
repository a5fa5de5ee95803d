//! Optimal brain surgeon on whole columns: which inputs of a matrix can go when the others make up for them?

use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::{Mat, Side};

use super::allocate::Ranking;

/// The state of a greedy removal. Column-major; columns from `n_active` on are gone.
struct Surgeon {
    n: usize,
    n_out: usize,
    n_active: usize,
    /// `H⁻¹` of the active inputs, `[n, n]`.
    inverse: Vec<f64>,
    /// `W` after compensation, `[n_out, n]`.
    weight: Vec<f64>,
    /// `C W`, `[n_out, n]`.
    weighted: Vec<f64>,
    /// Which group stands in each place.
    groups: Vec<usize>,
    group: usize,
}

/// Ranks groups of `group` neighbouring columns of `weight: [n_out, n_in]` by repeatedly removing the one with the
/// least cost and compensating with the rest.
///
/// ```text
/// cost(S) = tr( W_Sᵀ C W_S · ([H⁻¹]_SS)⁻¹ )            H: covariance of the inputs,  C: metric of the outputs
/// W  ← W − W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:                  H⁻¹ ← H⁻¹ − [H⁻¹]_:,S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:
/// ```
///
/// With `C = I` the cost is the increase of the mean squared error of the output. The last group is never removed.
/// `None` if `H` is not positive definite.
///
/// *Source*: Hassibi & Stork 1993 (optimal brain surgeon); on columns as in Kurtic et al. 2023 (ZipLM, §3.1).
pub(super) fn rank(
    weight: &Mat<f64>,
    covariance: &Mat<f64>,
    metric: Option<&Mat<f64>>,
    group: usize,
) -> Option<Ranking> {
    rank_most(weight, covariance, metric, group, usize::MAX)
}

/// The same, for the first `most` removals only.
pub(super) fn rank_most(
    weight: &Mat<f64>,
    covariance: &Mat<f64>,
    metric: Option<&Mat<f64>>,
    group: usize,
    most: usize,
) -> Option<Ranking> {
    let (n_out, n) = (weight.nrows(), weight.ncols());
    let inverse = covariance.llt(Side::Lower).ok()?.inverse();
    let weighted = metric.map_or_else(|| weight.clone(), |metric| metric * weight);
    let flat = |matrix: &Mat<f64>| -> Vec<f64> {
        (0..matrix.ncols()).flat_map(|j| (0..matrix.nrows()).map(move |i| (i, j))).map(|at| matrix[at]).collect()
    };
    let mut surgeon = Surgeon {
        n,
        n_out,
        n_active: n,
        inverse: flat(&inverse),
        weight: flat(weight),
        weighted: flat(&weighted),
        groups: (0..n / group).collect(),
        group,
    };
    let mut ranking = Ranking { order: Vec::new(), cost: vec![0.0] };
    let mut total = 0.0;
    while surgeon.n_active > group && ranking.order.len() < most {
        let (place, cost) = surgeon.cheapest()?;
        total += cost.max(0.0);
        ranking.order.push(surgeon.groups[place]);
        ranking.cost.push(total);
        surgeon.remove(place)?;
    }
    Some(ranking)
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

impl Surgeon {
    /// `[H⁻¹]_SS` of a place.
    fn block(&self, place: usize) -> Mat<f64> {
        let start = place * self.group;
        Mat::from_fn(self.group, self.group, |i, j| self.inverse[(start + j) * self.n + start + i])
    }

    fn cheapest(&self) -> Option<(usize, f64)> {
        let mut best: Option<(usize, f64)> = None;
        for place in 0..self.n_active / self.group {
            let start = place * self.group;
            let column = |matrix: &'_ [f64], j: usize| -> (usize, usize) {
                debug_assert!(j < matrix.len() / self.n_out);
                (j * self.n_out, (j + 1) * self.n_out)
            };
            let product = |i: usize, j: usize| {
                let (a, b) = (column(&self.weight, start + i), column(&self.weighted, start + j));
                dot(&self.weight[a.0..a.1], &self.weighted[b.0..b.1])
            };
            let cost = if self.group == 1 {
                product(0, 0) / self.inverse[start * self.n + start]
            } else {
                let gram = Mat::from_fn(self.group, self.group, product);
                let solved = self.block(place).llt(Side::Lower).ok()?.solve(&gram);
                (0..self.group).map(|i| solved[(i, i)]).sum()
            };
            // Among equals the group that stood first goes first, so that the order does not depend on swaps.
            let better = best.is_none_or(|(other, least)| {
                cost < least || (cost == least && self.groups[place] < self.groups[other])
            });
            if better {
                best = Some((place, cost));
            }
        }
        best
    }

    /// Removes a place, compensates, and moves the last active place into the gap.
    fn remove(&mut self, place: usize) -> Option<()> {
        let (n, n_out, group, n_active) = (self.n, self.n_out, self.group, self.n_active);
        let start = place * group;
        let factors = {
            let rows = Mat::from_fn(group, n_active, |i, j| self.inverse[j * n + start + i]);
            if group == 1 {
                rows * (1.0 / self.inverse[start * n + start])
            } else {
                self.block(place).llt(Side::Lower).ok()?.solve(&rows)
            }
        };
        subtract(&mut self.inverse, n, n_active, start, n_active, &factors);
        subtract(&mut self.weight, n_out, n_out, start, n_active, &factors);
        subtract(&mut self.weighted, n_out, n_out, start, n_active, &factors);
        let last = n_active - group;
        for offset in 0..group {
            let (gap, end) = (start + offset, last + offset);
            if gap != end {
                self.weight.copy_within(end * n_out..(end + 1) * n_out, gap * n_out);
                self.weighted.copy_within(end * n_out..(end + 1) * n_out, gap * n_out);
                self.inverse.copy_within(end * n..end * n + n_active, gap * n);
                (0..n_active).for_each(|column| self.inverse[column * n + gap] = self.inverse[column * n + end]);
            }
        }
        self.groups.swap_remove(place);
        self.n_active = last;
        Some(())
    }
}

/// `M[:, j] −= Σ_s M[:, start + s] · factors[s, j]` for every active column `j`, over the first `rows` rows.
fn subtract(matrix: &mut [f64], stride: usize, rows: usize, start: usize, n_active: usize, factors: &Mat<f64>) {
    let group = factors.nrows();
    let removed: Vec<Vec<f64>> =
        (0..group).map(|s| matrix[(start + s) * stride..(start + s) * stride + rows].to_vec()).collect();
    for j in 0..n_active {
        let column = &mut matrix[j * stride..j * stride + rows];
        for (s, removed) in removed.iter().enumerate() {
            let factor = factors[(s, j)];
            column.iter_mut().zip(removed).for_each(|(value, removed)| *value -= removed * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    fn random(rows: usize, cols: usize, rng: &mut StdRng) -> Mat<f64> {
        Mat::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
    }

    /// Mean squared error, in the metric, of the best fit that uses only the columns in `keep`.
    fn error_without(weight: &Mat<f64>, h: &Mat<f64>, metric: &Mat<f64>, keep: &[usize]) -> f64 {
        let h_kk = Mat::from_fn(keep.len(), keep.len(), |i, j| h[(keep[i], keep[j])]);
        let h_ka = Mat::from_fn(keep.len(), h.ncols(), |i, j| h[(keep[i], j)]);
        let right = &h_ka * weight.transpose();
        let fitted = h_kk.llt(Side::Lower).unwrap().solve(&right);
        let total = weight * h * weight.transpose() - right.transpose() * fitted;
        (metric * total).diagonal().column_vector().iter().sum()
    }

    #[test]
    fn costs_are_the_error_increase_of_the_best_fit() {
        let mut rng = StdRng::seed_from_u64(5);
        for group in [1, 2, 3] {
            let n = 12;
            let factor = random(n, 40, &mut rng);
            let h = &factor * factor.transpose();
            let c = random(5, 9, &mut rng);
            let metric = &c * c.transpose();
            let weight = random(5, n, &mut rng);
            let ranking = rank(&weight, &h, Some(&metric), group).unwrap();
            assert_eq!(ranking.order.len(), n / group - 1);
            for n_removed in 1..=ranking.order.len() {
                let kept = ranking.keep(n / group, n_removed);
                let columns: Vec<usize> = kept.iter().flat_map(|unit| unit * group..(unit + 1) * group).collect();
                let exact = error_without(&weight, &h, &metric, &columns);
                let ours = ranking.cost[n_removed];
                assert!(
                    (ours - exact).abs() < 1e-8 * exact.max(1.0),
                    "group {group}, {n_removed}: {ours} is not {exact}"
                );
            }
            // The first choice is the best of all single choices.
            let least = (0..n / group)
                .map(|unit| {
                    let columns: Vec<usize> = (0..n).filter(|column| column / group != unit).collect();
                    error_without(&weight, &h, &metric, &columns)
                })
                .fold(f64::INFINITY, f64::min);
            assert!((ranking.cost[1] - least).abs() < 1e-8 * least);
        }
    }

    #[test]
    fn a_redundant_input_costs_nothing_even_if_its_weight_is_large() {
        let mut rng = StdRng::seed_from_u64(6);
        let mut factor = random(6, 60, &mut rng);
        (0..60).for_each(|t| factor[(4, t)] = factor[(1, t)]);
        let mut h = &factor * factor.transpose();
        (0..6).for_each(|i| h[(i, i)] += 1e-9);
        let mut weight = random(3, 6, &mut rng);
        (0..3).for_each(|i| weight[(i, 4)] = 50.0);
        let ranking = rank(&weight, &h, None, 1).unwrap();
        assert!(matches!(ranking.order[0], 1 | 4), "{:?}", ranking.order);
        assert!(ranking.cost[1] < 1e-4 * ranking.cost[2], "{:?}", ranking.cost);
    }
}
