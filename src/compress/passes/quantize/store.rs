//! From the numbers of one matrix to its stored form.

use super::settings::{Format, Per, Quantize};
use crate::compress::rounding::{
    Compensation, Grid, Histogram, LOG2, LOG2_SUM, NF4, RangeMethod, Scales, clip_ratio, compensate, fit_affine,
    fit_scale, fit_table, for_rows, linear_table,
};
use crate::quant::{Codebook4, Int8Grouped, TABLE_LEN, Weight, pack_nibbles, round_scales_to_half};

/// Rounds of learning a table and refitting the scales to it.
const TABLE_ROUNDS: usize = 3;

/// What errors of a matrix cost.
#[derive(Default)]
pub(in crate::compress) struct Costs {
    /// Per row.
    pub(in crate::compress) rows: Option<Vec<f64>>,
    /// Per column.
    pub(in crate::compress) columns: Option<Vec<f64>>,
    /// How a row makes up for its own errors.
    pub(in crate::compress) compensation: Option<Compensation>,
}

impl Costs {
    /// Costs per row alone.
    pub(in crate::compress) fn of_rows(rows: &[f64]) -> Self {
        Self { rows: Some(rows.to_vec()), ..Self::default() }
    }
}

/// A stored form, and its error in the metric of the compensation relative to the matrix itself: rounded to the nearest,
/// and as it is.
pub(in crate::compress) struct Stored {
    pub(in crate::compress) form: Weight<'static>,
    pub(in crate::compress) error_nearest: Option<f64>,
    pub(in crate::compress) error: Option<f64>,
}

#[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Stores `values: [rows, cols]` as the settings say.
pub(in crate::compress) fn store(settings: &Quantize, values: &[f32], cols: usize, costs: &Costs) -> Stored {
    let matrix = Matrix::new(settings, values, cols, costs);
    let (table, mut scales, zeros) = match (settings.bits, settings.symmetric) {
        (8, true) => (None, matrix.symmetric(&Grid::Bytes), None),
        (8, false) => (None, matrix.affine_bytes(), None),
        (_, true) => {
            let (table, scales) = matrix.table();
            (Some(table), scales, None)
        }
        (_, false) => {
            let (table, scales, zeros) = matrix.affine_table();
            (Some(table), scales, Some(zeros))
        }
    };
    let grid = table.map_or(Grid::Bytes, Grid::of);
    let mut codes = matrix.nearest(&grid, &scales);
    let error_nearest = matrix.error(&codes, &scales);
    if let Some(compensation) = &costs.compensation {
        // An offset that is a whole number of steps moves with the scale; such scales stay.
        let refit: Option<&(dyn Fn(f32) -> f32 + Sync)> = match (table, &zeros) {
            (_, Some(_)) => None,
            (Some(_), None) => Some(&|scale| half_scale(scale)),
            (None, None) => Some(&|scale| scale),
        };
        codes = compensate(values, compensation, &grid, &mut scales, settings.sweeps, refit);
    }
    let error = costs.compensation.as_ref().and_then(|_| matrix.error(&codes, &scales));
    Stored { form: form(&codes, cols, table, scales, zeros, &grid), error_nearest: error.and(error_nearest), error }
}

fn half_scale(scale: f32) -> f32 {
    let mut one = [scale];
    round_scales_to_half(&mut one);
    one[0]
}

fn form(
    codes: &[f32],
    cols: usize,
    table: Option<[i8; TABLE_LEN]>,
    scales: Scales,
    zeros: Option<Vec<i8>>,
    grid: &Grid,
) -> Weight<'static> {
    match table {
        None => {
            #[allow(clippy::cast_possible_truncation, reason = "codes are whole numbers of 8 bits")]
            let codes: Vec<i8> = codes.iter().map(|&code| code as i8).collect();
            if scales.n_groups > 1 {
                let offset = (!scales.offset.is_empty()).then(|| scales.offset.into());
                let (scale, n_groups) = (scales.scale.into(), scales.n_groups);
                return Weight::Int8Grouped(Int8Grouped { codes: codes.into(), scale, offset, n_groups });
            }
            match scales.offset.is_empty() {
                true => Weight::Int8 { codes: codes.into(), scale: scales.scale.into() },
                false => {
                    let (scale, offset) = (scales.scale.into(), scales.offset.into());
                    Weight::Int8Affine { codes: codes.into(), scale, offset }
                }
            }
        }
        Some(table) => {
            let indices: Vec<u8> = codes.iter().map(|&code| grid.index(code)).collect();
            Weight::Codebook4(Codebook4 {
                indices: pack_nibbles(&indices, cols).into(),
                table,
                scale: scales.scale.into(),
                zero: zeros.map(Into::into),
                n_groups: scales.n_groups,
            })
        }
    }
}

/// A matrix and how it is cut into parts that share a scale.
struct Matrix<'a> {
    settings: &'a Quantize,
    values: &'a [f32],
    cols: usize,
    group: usize,
    n_groups: usize,
    costs: &'a Costs,
    columns: Option<Vec<f32>>,
}

impl<'a> Matrix<'a> {
    fn new(settings: &'a Quantize, values: &'a [f32], cols: usize, costs: &'a Costs) -> Self {
        let n_groups = match settings.per {
            Per::Group => Codebook4::n_groups(cols, settings.group_size),
            _ => 1,
        };
        let columns = costs.columns.as_ref().map(|columns| columns.iter().map(|&cost| narrow(cost)).collect());
        Self { settings, values, cols, group: Codebook4::group_len(cols, n_groups), n_groups, costs, columns }
    }

    /// The parts of a row, with the costs of their columns.
    fn parts<'s>(&'s self, row: &'s [f32]) -> impl Iterator<Item = (&'s [f32], Option<&'s [f32]>)> {
        row.chunks(self.group).enumerate().map(move |(index, part)| {
            let start = index * self.group;
            (part, self.columns.as_deref().map(|columns| &columns[start..start + part.len()]))
        })
    }

    /// `f` of every part, `[rows, n_groups]`; with a scale per tensor, of the whole matrix for all.
    fn per_part(&self, f: impl Fn(&[f32], Option<&[f32]>) -> f32 + Sync) -> Vec<f32> {
        let n_rows = self.values.len() / self.cols;
        if self.settings.per == Per::Tensor {
            let all: Option<Vec<f32>> = self.columns.as_ref().map(|columns| columns.repeat(n_rows));
            return vec![f(self.values, all.as_deref()); n_rows];
        }
        let mut found = vec![0.0; n_rows * self.n_groups];
        for_rows(&mut found, self.n_groups, |first, found| {
            for (at, found) in found.chunks_exact_mut(self.n_groups).enumerate() {
                let row = &self.values[(first + at) * self.cols..][..self.cols];
                found.iter_mut().zip(self.parts(row)).for_each(|(found, (part, costs))| *found = f(part, costs));
            }
        });
        found
    }

    /// The part of a range that is covered, for the methods that have one.
    fn covered(&self, grid: &Grid) -> f64 {
        match self.settings.range() {
            RangeMethod::Entropy => {
                let per_tensor = self.settings.per == Per::Tensor;
                let part = if per_tensor { self.values.len() } else { self.group };
                let rows = self.values.chunks(if per_tensor { self.values.len() } else { self.cols });
                let relative = rows.flat_map(|row| row.chunks(part)).flat_map(|part| {
                    let largest = part.iter().fold(f32::MIN_POSITIVE, |max, value| max.max(value.abs()));
                    part.iter().map(move |value| value.abs() / largest)
                });
                clip_ratio(relative, grid)
            }
            _ => self.settings.percentile,
        }
    }

    fn symmetric(&self, grid: &Grid) -> Scales {
        let (method, covered) = (self.settings.range(), self.covered(grid));
        let scale = self.per_part(|part, costs| fit_scale(part, costs, grid, method, covered));
        Scales { n_groups: self.n_groups, scale, offset: Vec::new() }
    }

    fn affine_bytes(&self) -> Scales {
        let (method, covered) = (self.settings.range(), self.covered(&Grid::Bytes));
        let bounds = |part: &[f32]| fit_affine(part, 254.0, method, covered);
        let step = |(low, high): (f32, f32)| if high > low { (high - low) / 254.0 } else { 1.0 };
        let scale = self.per_part(|part, _| step(bounds(part)));
        let offset = self.per_part(|part, _| {
            let (low, high) = bounds(part);
            low / 2.0 + high / 2.0
        });
        Scales { n_groups: self.n_groups, scale, offset }
    }

    /// Tables around 0, fixed or learnt, and their scales.
    fn table(&self) -> ([i8; TABLE_LEN], Scales) {
        let fixed = match self.settings.format {
            Format::Linear => Some(linear_table(1)),
            Format::Log2 => Some(LOG2),
            Format::Log2Sum => Some(LOG2_SUM),
            Format::Nf4 => Some(NF4),
            Format::Kmeans => None,
        };
        if let Some(table) = fixed {
            let mut scales = self.symmetric(&Grid::of(table));
            round_scales_to_half(&mut scales.scale);
            return (table, scales);
        }
        let reach = self.settings.table_reach;
        // First by the largest magnitude of each part, then by what fits the table.
        let mut scale = self.per_part(|part, _| fit_scale(part, None, &Grid::Bytes, RangeMethod::MinMax, 1.0) * 127.0);
        scale.iter_mut().for_each(|scale| *scale /= f32::from(reach));
        let mut table = [0; TABLE_LEN];
        for _ in 0..TABLE_ROUNDS {
            table = fit_table(&self.histogram(&scale, reach), reach);
            scale = self.symmetric(&Grid::of(table)).scale;
        }
        round_scales_to_half(&mut scale);
        (table, Scales { n_groups: self.n_groups, scale, offset: Vec::new() })
    }

    /// Distribution of the scaled numbers, each weighted by what an error of its code costs.
    fn histogram(&self, scale: &[f32], reach: i8) -> Histogram {
        let mut histogram = Histogram::new();
        for (row, values) in self.values.chunks_exact(self.cols).enumerate() {
            let cost = self.costs.rows.as_ref().map_or(1.0, |rows| narrow(rows[row]));
            for (index, (part, costs)) in self.parts(values).enumerate() {
                let scale = scale[row * self.n_groups + index];
                let cost = cost * scale * scale;
                for (at, value) in part.iter().enumerate() {
                    let cost = cost * costs.map_or(1.0, |costs| costs[at]);
                    histogram.add(value / (scale * f32::from(reach)), cost);
                }
            }
        }
        histogram
    }

    /// Evenly spaced levels with a zero point of a quarter step's precision.
    ///
    /// ```text
    /// w = s · (t − z),  t = −32, −28 … 28,  −128 ≤ t − z ≤ 127
    /// s = max((high − low) / 60, high / 127, −low / 128),  z = −32 − low / s
    /// ```
    ///
    /// 15 levels of 4 reach from `low` to `high`; where both lie far on one side of 0, the outermost code of 8 bits has to reach
    /// the end that is farther off.
    fn affine_table(&self) -> ([i8; TABLE_LEN], Scales, Vec<i8>) {
        const STEP: i8 = 4;
        let table = linear_table(STEP);
        let (low_code, step) = (f32::from(table[0]), f32::from(STEP));
        let (method, covered) = (self.settings.range(), self.covered(&Grid::of(table)));
        let bounds = |part: &[f32]| {
            let (low, high) = fit_affine(part, 15.0, method, covered);
            let (span, above, below) = ((high - low) / 15.0 / step, high / 127.0, -low / 128.0);
            let scale = half_scale(span.max(above).max(below).max(1e-6 / 64.0));
            (scale, (low_code - low / scale).round().clamp(-99.0, 96.0))
        };
        let scale = self.per_part(|part, _| bounds(part).0);
        let zero = self.per_part(|part, _| bounds(part).1);
        let offset = scale.iter().zip(&zero).map(|(scale, zero)| -scale * zero).collect();
        #[allow(clippy::cast_possible_truncation, reason = "clamped to the range of i8")]
        let zeros = zero.iter().map(|&zero| zero as i8).collect();
        (table, Scales { n_groups: self.n_groups, scale, offset }, zeros)
    }

    fn nearest(&self, grid: &Grid, scales: &Scales) -> Vec<f32> {
        let mut codes = vec![0.0; self.values.len()];
        for_rows(&mut codes, self.cols, |first, codes| {
            for (at, codes) in codes.chunks_exact_mut(self.cols).enumerate() {
                let row = first + at;
                let values = &self.values[row * self.cols..][..self.cols];
                for (index, (codes, values)) in codes.chunks_mut(self.group).zip(values.chunks(self.group)).enumerate()
                {
                    let at = row * self.n_groups + index;
                    let (scale, offset) = (scales.scale[at], scales.offset.get(at).copied().unwrap_or(0.0));
                    codes.iter_mut().zip(values).for_each(|(code, value)| *code = grid.round((value - offset) / scale));
                }
            }
        });
        codes
    }

    /// `tr(Δ H Δᵀ) / tr(W H Wᵀ)` in the metric of the compensation, when there is one.
    fn error(&self, codes: &[f32], scales: &Scales) -> Option<f64> {
        let compensation = self.costs.compensation.as_ref()?;
        let rounded = |row: usize, col: usize| {
            let at = row * self.n_groups + col / self.group;
            codes[row * self.cols + col] * scales.scale[at] + scales.offset.get(at).copied().unwrap_or(0.0)
        };
        Some(compensation.relative_error(self.values, rounded))
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
