//! From real numbers to stored ones: levels, ranges, and rounding that makes up for its own errors.

mod gptq;
mod grid;
mod kmeans;
mod range;

pub(super) use gptq::{Compensation, Scales, compensate};
pub(super) use grid::{Grid, LOG2, LOG2_SUM, NF4, linear_table};
pub(super) use kmeans::{Histogram, fit_table};
pub use range::RangeMethod;
pub(super) use range::{clip_ratio, fit_affine, fit_scale};

/// Splits rows over candle's number of threads: `body(first_row, rows)` for runs of rows of `per_row` elements. What a row
/// becomes does not depend on the split.
pub(super) fn for_rows<T: Send>(rows: &mut [T], per_row: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    let mut nothing: Vec<()> = vec![(); rows.len() / per_row.max(1)];
    for_both_rows(rows, per_row, &mut nothing, 1, |first, rows, _| body(first, rows));
}

/// The same for the rows of two arrays that belong together.
pub(super) fn for_both_rows<T: Send, U: Send>(
    rows: &mut [T],
    per_row: usize,
    others: &mut [U],
    others_per_row: usize,
    body: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let n_rows = rows.len() / per_row.max(1);
    let n_threads = candle_core::utils::get_num_threads().clamp(1, n_rows.max(1));
    let part = n_rows.div_ceil(n_threads).max(1);
    std::thread::scope(|scope| {
        let parts = rows.chunks_mut(part * per_row.max(1)).zip(others.chunks_mut(part * others_per_row));
        for (index, (rows, others)) in parts.enumerate() {
            let body = &body;
            scope.spawn(move || body(index * part, rows, others));
        }
    });
}
