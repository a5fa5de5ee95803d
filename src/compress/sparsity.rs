//! Zeros in one matrix: which elements go, and what the others become.
//!
//! The loss of a matrix `Ŵ` in place of `W` is quadratic, with the second moments of the inputs as its curvature:
//!
//! ```text
//! E ‖ (W − Ŵ) x ‖² = tr( (W − Ŵ) H (W − Ŵ)ᵀ ),     H = E[x xᵀ]
//! ```
//!
//! so for given places of zeros the best values follow in closed form, `Ŵ_K = W H_:K H_KK⁻¹` for each row with the
//! places `K` kept. What differs between methods is how the places are chosen.

use std::fmt;

use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::{Mat, Side};
use serde::{Deserialize, Serialize};

use super::surgeon;

/// Where zeros may stand.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// Anywhere: a share `density` of all elements stays.
    Unstructured {
        /// Share that stays.
        density: f64,
    },
    /// `n` of every `m` neighbouring inputs of a row stay.
    NOfM {
        /// How many stay.
        n: usize,
        /// Of how many.
        m: usize,
    },
    /// A share of all blocks of `rows` output channels by `cols` inputs stays.
    Blocks {
        /// Output channels of a block.
        rows: usize,
        /// Inputs of a block.
        cols: usize,
        /// Share of the blocks that stays.
        density: f64,
    },
}

/// How places are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// `w²`: the smallest weights of the matrix go.
    Magnitude,
    /// `w² E[x²]`, compared within a row (Sun et al. 2023, Wanda, §3).
    Activation,
    /// What the loss rises by when the other weights make up for it (optimal brain surgeon): column by column with
    /// compensation for elements (Frantar & Alistarh 2023, SparseGPT, §3.2), greedily and exactly for blocks.
    #[default]
    Surgeon,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Magnitude => "magnitude",
            Self::Activation => "activation",
            Self::Surgeon => "surgeon",
        })
    }
}

/// A matrix with zeros.
#[derive(Debug, Clone)]
pub struct Sparse {
    /// `[n_out, n_in]`, zeros where `kept` is false.
    pub weight: Mat<f64>,
    /// `[n_out · n_in]`, row-major.
    pub kept: Vec<bool>,
}

impl Sparse {
    /// Share of elements that stay.
    #[must_use]
    pub fn density(&self) -> f64 {
        self.kept.iter().filter(|&&kept| kept).count() as f64 / self.kept.len() as f64
    }
}

/// Columns that SparseGPT looks at together when it chooses elements.
const WINDOW: usize = 128;

/// Puts zeros into `weight: [n_out, n_in]`. `moments: [n_in, n_in]` is `E[x xᵀ]`, regularised. With `refit` the kept
/// elements become the best for their places, else they stay as they are. `None` if `moments` is not positive
/// definite.
///
/// # Panics
/// If a pattern does not divide the matrix: that is checked before any work.
#[must_use]
pub fn sparsify(weight: &Mat<f64>, moments: &Mat<f64>, pattern: Pattern, score: Score, refit: bool) -> Option<Sparse> {
    let kept = match (pattern, score) {
        (Pattern::Blocks { rows, cols, density }, Score::Surgeon) => {
            surgeon_blocks(weight, moments, rows, cols, density)?
        }
        (_, Score::Surgeon) => surgeon_elements(weight, moments, pattern)?,
        _ => {
            let saliency = |i: usize, j: usize| {
                let square = weight[(i, j)].powi(2);
                if score == Score::Activation { square * moments[(j, j)] } else { square }
            };
            choose(weight.nrows(), weight.ncols(), pattern, score == Score::Activation, saliency)
        }
    };
    let weight = if refit { best_on(weight, moments, &kept)? } else { masked(weight, &kept) };
    Some(Sparse { weight, kept })
}

/// `tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)`.
#[must_use]
pub fn output_error(weight: &Mat<f64>, other: &Mat<f64>, moments: &Mat<f64>) -> f64 {
    let energy = |matrix: &Mat<f64>| {
        let product = matrix * moments;
        (0..matrix.ncols())
            .map(|j| (0..matrix.nrows()).map(|i| matrix[(i, j)] * product[(i, j)]).sum::<f64>())
            .sum::<f64>()
    };
    energy(&(weight - other)) / energy(weight).max(f64::MIN_POSITIVE)
}

fn masked(weight: &Mat<f64>, kept: &[bool]) -> Mat<f64> {
    let n_in = weight.ncols();
    Mat::from_fn(weight.nrows(), n_in, |i, j| if kept[i * n_in + j] { weight[(i, j)] } else { 0.0 })
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
fn share_of(count: usize, share: f64) -> usize {
    ((count as f64 * share).round() as usize).min(count)
}

/// The `n_kept` largest of `scores` stay; among equals the first.
fn keep_largest(scores: &[f64], n_kept: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut kept = vec![false; scores.len()];
    order[..n_kept].iter().for_each(|&index| kept[index] = true);
    kept
}

fn choose(
    n_out: usize,
    n_in: usize,
    pattern: Pattern,
    by_row: bool,
    saliency: impl Fn(usize, usize) -> f64,
) -> Vec<bool> {
    match pattern {
        Pattern::Unstructured { density } if by_row => (0..n_out)
            .flat_map(|i| {
                let scores: Vec<f64> = (0..n_in).map(|j| saliency(i, j)).collect();
                keep_largest(&scores, share_of(n_in, density))
            })
            .collect(),
        Pattern::Unstructured { density } => {
            let scores: Vec<f64> =
                (0..n_out).flat_map(|i| (0..n_in).map(move |j| (i, j))).map(|(i, j)| saliency(i, j)).collect();
            keep_largest(&scores, share_of(scores.len(), density))
        }
        Pattern::NOfM { n, m } => {
            assert!(n_in.is_multiple_of(m), "{n_in} inputs in groups of {m}");
            (0..n_out)
                .flat_map(|i| (0..n_in / m).map(move |group| (i, group * m)))
                .flat_map(|(i, start)| {
                    let scores: Vec<f64> = (start..start + m).map(|j| saliency(i, j)).collect();
                    keep_largest(&scores, n)
                })
                .collect()
        }
        Pattern::Blocks { rows, cols, density } => {
            assert!(n_out.is_multiple_of(rows) && n_in.is_multiple_of(cols), "{n_out}x{n_in} in {rows}x{cols}");
            let per_panel = n_in / cols;
            let scores: Vec<f64> = (0..n_out / rows * per_panel)
                .map(|block| {
                    let (top, left) = (block / per_panel * rows, block % per_panel * cols);
                    (top..top + rows).map(|i| (left..left + cols).map(|j| saliency(i, j)).sum::<f64>()).sum()
                })
                .collect();
            let blocks = keep_largest(&scores, share_of(scores.len(), density));
            spread(&blocks, n_out, n_in, rows, cols)
        }
    }
}

/// From blocks to elements.
fn spread(blocks: &[bool], n_out: usize, n_in: usize, rows: usize, cols: usize) -> Vec<bool> {
    let per_panel = n_in / cols;
    (0..n_out * n_in).map(|at| blocks[at / n_in / rows * per_panel + at % n_in / cols]).collect()
}

/// Elements by SparseGPT: columns from left to right, each removed element's loss passed on to the columns right of it.
fn surgeon_elements(weight: &Mat<f64>, moments: &Mat<f64>, pattern: Pattern) -> Option<Vec<bool>> {
    let (n_out, n_in) = (weight.nrows(), weight.ncols());
    let window = match pattern {
        Pattern::NOfM { m, .. } => m,
        _ => WINDOW.min(n_in),
    };
    let inverse = moments.llt(Side::Lower).ok()?.inverse();
    // H⁻¹ = L Lᵀ; row i of Lᵀ says how the columns right of i make up for column i.
    let lower = inverse.llt(Side::Lower).ok()?.L().to_owned();
    let mut rows: Vec<Vec<f64>> = (0..n_out).map(|i| (0..n_in).map(|j| weight[(i, j)]).collect()).collect();
    let mut kept = vec![true; n_out * n_in];
    for start in (0..n_in).step_by(window) {
        let width = window.min(n_in - start);
        let saliency = |i: usize, j: usize| (rows[i][start + j] / lower[(start + j, start + j)]).powi(2);
        let chosen = match pattern {
            Pattern::NOfM { n, m } => choose(n_out, width, Pattern::NOfM { n, m }, true, saliency),
            Pattern::Unstructured { density } => {
                choose(n_out, width, Pattern::Unstructured { density }, false, saliency)
            }
            Pattern::Blocks { .. } => unreachable!("blocks are chosen by surgeon_blocks"),
        };
        for (i, row) in rows.iter_mut().enumerate() {
            for column in start..start + width {
                if chosen[i * width + column - start] {
                    continue;
                }
                kept[i * n_in + column] = false;
                let loss = row[column] / lower[(column, column)];
                for (right, value) in row.iter_mut().enumerate().skip(column) {
                    *value -= loss * lower[(right, column)];
                }
            }
        }
    }
    Some(kept)
}

/// Blocks by the exact greedy surgeon: within a panel of rows a block is a group of columns. Across panels the losses
/// are compared as they are, since all panels share one output error.
fn surgeon_blocks(weight: &Mat<f64>, moments: &Mat<f64>, rows: usize, cols: usize, density: f64) -> Option<Vec<bool>> {
    let (n_out, n_in) = (weight.nrows(), weight.ncols());
    assert!(n_out.is_multiple_of(rows) && n_in.is_multiple_of(cols), "{n_out}x{n_in} in {rows}x{cols}");
    let (n_panels, per_panel) = (n_out / rows, n_in / cols);
    let n_removed = n_panels * per_panel - share_of(n_panels * per_panel, density);
    // No panel is expected to lose more than this; one that would keeps its dearest blocks.
    let most = (n_removed.div_ceil(n_panels) * 5 / 4 + 1).min(per_panel - 1);
    let mut rankings = vec![None; n_panels];
    let n_threads = candle_core::utils::get_num_threads().clamp(1, n_panels);
    let part = n_panels.div_ceil(n_threads);
    std::thread::scope(|scope| {
        for (index, part_of) in rankings.chunks_mut(part).enumerate() {
            scope.spawn(move || {
                for (offset, ranking) in part_of.iter_mut().enumerate() {
                    let top = (index * part + offset) * rows;
                    let panel = Mat::from_fn(rows, n_in, |i, j| weight[(top + i, j)]);
                    *ranking = surgeon::rank_most(&panel, moments, None, cols, most);
                }
            });
        }
    });
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    let mut orders = Vec::with_capacity(n_panels);
    for (panel, ranking) in rankings.into_iter().enumerate() {
        let ranking = ranking?;
        let mut dearest = 0.0f64;
        for (step, cost) in ranking.cost.windows(2).enumerate() {
            // A later step never counts as cheaper than the ones it stands on.
            dearest = dearest.max(cost[1] - cost[0]);
            steps.push((dearest, panel, step));
        }
        orders.push(ranking.order);
    }
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut blocks = vec![true; n_panels * per_panel];
    for &(_, panel, step) in steps.iter().take(n_removed) {
        blocks[panel * per_panel + orders[panel][step]] = false;
    }
    Some(spread(&blocks, n_out, n_in, rows, cols))
}

/// The best values on given places: `H_KK ŵ_K = H_K: w` for each row; rows with the same places are solved together.
pub(super) fn best_on(weight: &Mat<f64>, moments: &Mat<f64>, kept: &[bool]) -> Option<Mat<f64>> {
    let (n_out, n_in) = (weight.nrows(), weight.ncols());
    // Neighbouring rows with equal places.
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    let places = |row: usize| &kept[row * n_in..(row + 1) * n_in];
    for row in 0..n_out {
        match groups.last_mut() {
            Some(group) if places(group.start) == places(row) => group.end = row + 1,
            _ => groups.push(row..row + 1),
        }
    }
    let right = weight * moments; // H is symmetric: row i is H w_i
    let mut solved: Vec<Option<Mat<f64>>> = vec![None; groups.len()];
    let n_threads = candle_core::utils::get_num_threads().clamp(1, groups.len());
    let part = groups.len().div_ceil(n_threads);
    std::thread::scope(|scope| {
        for (groups, solved) in groups.chunks(part).zip(solved.chunks_mut(part)) {
            let right = &right;
            scope.spawn(move || {
                for (group, solved) in groups.iter().zip(solved) {
                    let columns: Vec<usize> = (0..n_in).filter(|&j| kept[group.start * n_in + j]).collect();
                    let n = columns.len();
                    let inner = Mat::from_fn(n, n, |i, j| moments[(columns[i], columns[j])]);
                    let mut rhs = Mat::from_fn(n, group.len(), |i, j| right[(group.start + j, columns[i])]);
                    if n > 0 {
                        let Ok(factor) = inner.llt(Side::Lower) else { return };
                        factor.solve_in_place(&mut rhs);
                    }
                    let mut full = Mat::zeros(group.len(), n_in);
                    for (i, &column) in columns.iter().enumerate() {
                        (0..group.len()).for_each(|j| full[(j, column)] = rhs[(i, j)]);
                    }
                    *solved = Some(full);
                }
            });
        }
    });
    let mut out = Mat::zeros(n_out, n_in);
    for (group, solved) in groups.iter().zip(solved) {
        let solved = solved?;
        for (offset, row) in group.clone().enumerate() {
            (0..n_in).for_each(|j| out[(row, j)] = solved[(offset, j)]);
        }
    }
    Some(out)
}

#[cfg(test)]
#[path = "sparsity/tests.rs"]
mod tests;
