//! Row passes, written once over [`Simd`] and instantiated per instruction set.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::simd::Simd;
use crate::kernels::Reduction;
use crate::kernels::layout::{PANEL, RowRange, RowScale};

/// Rows `rows` of a block of `n_rows` rows in panels, `n` columns wide, to be turned into codes.
pub(super) struct Quantize {
    pub(super) block: *const f32,
    pub(super) n_rows: usize,
    pub(super) n: usize,
    pub(super) rows: Range<usize>,
    /// First row's codes.
    pub(super) codes: *mut u8,
    pub(super) stride: usize,
    pub(super) scales: *mut RowScale,
    /// The range of all rows, where it was fixed beforehand.
    pub(super) range: Option<RowScale>,
    /// The range of each row of `rows`, where it is known; else null.
    pub(super) ranges: *const RowRange,
}

/// The step and its inverse for a row between `low` and `high`.
#[inline(always)]
fn step(low: f32, high: f32) -> (RowScale, f32) {
    let range = high - low;
    // A constant row has step 0: all codes 0, all values `low`. So has a range that is not finite, and values that are no numbers,
    // so that what comes of it is not taken for a result.
    let inverse = if range > f32::MIN_POSITIVE * 1e3 { 255.0 / range } else { 0.0 };
    let low = if range.is_finite() { low } else { f32::NAN };
    (RowScale { scale: if inverse > 0.0 { range / 255.0 } else { 0.0 }, low }, inverse)
}

/// The code of `x`.
#[inline(always)]
unsafe fn code<S: Simd, const CLIP: bool>(x: S::F, low: S::F, inverse: S::F) -> S::I {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        let code = S::mul(S::sub(x, low), inverse);
        S::round(if CLIP { S::min(S::max(code, S::splat(0.0)), S::splat(255.0)) } else { code })
    }
}

/// Rows whose sums and ranges are reduced together, so that they do not wait for one another.
pub(super) const TOGETHER: usize = 4;

/// `$f::<$simd, R, $clip>` of `$n` rows, [`TOGETHER`] at a time as long as there are so many.
macro_rules! in_fours {
    ($n:expr, |$first:ident| $f:ident::<$simd:ident, $clip:literal>($args:expr, $at:ident)) => {{
        let (n, mut $first) = ($n, 0);
        while n - $first >= TOGETHER {
            $f::<$simd, TOGETHER, $clip>($args, $at);
            $first += TOGETHER;
        }
        while $first < n {
            $f::<$simd, 1, $clip>($args, $at);
            $first += 1;
        }
    }};
}
pub(super) use in_fours;

/// How each of `TOGETHER` rows is coded: its scale, and the inverse of its step.
#[inline(always)]
pub(super) fn steps(
    lows: [f32; TOGETHER],
    highs: [f32; TOGETHER],
    range: Option<RowScale>,
) -> [(RowScale, f32); TOGETHER] {
    std::array::from_fn(|row| match range {
        Some(range) => step(range.low, range.low + 255.0 * range.scale),
        None => step(lows[row], highs[row]),
    })
}

/// Codes of `n` numbers that lie side by side, less `low`, times `inverse`. `CLIP` if some may be outside of the range.
#[inline(always)]
pub(super) unsafe fn code_run<S: Simd, const CLIP: bool>(
    from: *const f32,
    n: usize,
    to: *mut u8,
    low: S::F,
    inverse: S::F,
) {
    // SAFETY: both are valid for `n` by contract.
    unsafe {
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            let mut codes = [code::<S, CLIP>(S::load(from.add(i)), low, inverse); 4];
            for j in 1..4 {
                codes[j] = code::<S, CLIP>(S::load(from.add(i + j * S::LANES)), low, inverse);
            }
            S::store_four_u8(to.add(i), codes);
            i += 4 * S::LANES;
        }
        while i + S::LANES <= n {
            S::store_u8(to.add(i), code::<S, CLIP>(S::load(from.add(i)), low, inverse));
            i += S::LANES;
        }
        if i < n {
            let x = S::load_some(from.add(i), n - i, 0.0);
            S::store_some_u8(to.add(i), n - i, code::<S, CLIP>(x, low, inverse));
        }
    }
}

/// The range of a row of a block, by lane.
#[inline(always)]
unsafe fn range_of<S: Simd>(args: &Quantize, row: usize) -> (S::F, S::F) {
    // SAFETY: the row is one of the block's.
    unsafe {
        let (mut low, mut high) = (S::splat(f32::INFINITY), S::splat(f32::NEG_INFINITY));
        for column in (0..args.n).step_by(PANEL) {
            let from = args.block.add((column / PANEL * args.n_rows + row) * PANEL);
            let width = PANEL.min(args.n - column);
            let mut i = 0;
            while i + S::LANES <= width {
                let x = S::load(from.add(i));
                low = S::min(low, x);
                high = S::max(high, x);
                i += S::LANES;
            }
            if i < width {
                low = S::min(low, S::load_some(from.add(i), width - i, f32::INFINITY));
                high = S::max(high, S::load_some(from.add(i), width - i, f32::NEG_INFINITY));
            }
        }
        (low, high)
    }
}

/// [`quantize`] of the `R` rows from the one at `first` of `args.rows` on.
#[inline(always)]
unsafe fn quantize_rows<S: Simd, const R: usize, const CLIP: bool>(args: &Quantize, first: usize) {
    // SAFETY: the rows are there, sizes as in `quantize`.
    unsafe {
        let row = args.rows.start + first;
        let (mut low, mut high) = ([S::splat(0.0); TOGETHER], [S::splat(0.0); TOGETHER]);
        for r in 0..R {
            if !args.ranges.is_null() {
                let range = &*args.ranges.add(first + r);
                (low[r], high[r]) = (S::load(range.low.as_ptr()), S::load(range.high.as_ptr()));
            } else if !CLIP {
                (low[r], high[r]) = range_of::<S>(args, row + r);
            }
        }
        let by = steps(S::lowests(low), S::highests(high), args.range);
        let mut inverse = [S::splat(0.0); R];
        for r in 0..R {
            *args.scales.add(first + r) = by[r].0;
            (low[r], inverse[r]) = (S::splat(by[r].0.low), S::splat(by[r].1));
        }
        let to = args.codes.add(first * args.stride);
        // Rows of a panel lie side by side.
        for column in (0..args.n).step_by(PANEL) {
            let from = args.block.add((column / PANEL * args.n_rows + row) * PANEL);
            let width = PANEL.min(args.n - column);
            for r in 0..R {
                let to = to.add(r * args.stride + column);
                code_run::<S, CLIP>(from.add(r * PANEL), width, to, low[r], inverse[r]);
            }
        }
    }
}

/// `code[c] = round((x[c] − min) · 255 / (max − min))` per row, or the same in a fixed range.
#[inline(always)]
pub(super) unsafe fn quantize<S: Simd>(args: &Quantize) {
    // SAFETY: the block holds `n_rows` rows of ⌈n / PANEL⌉ panels, codes and scales hold `rows` (the façade's checks).
    unsafe {
        match args.range {
            None => in_fours!(args.rows.len(), |first| quantize_rows::<S, false>(args, first)),
            Some(_) => in_fours!(args.rows.len(), |first| quantize_rows::<S, true>(args, first)),
        }
    }
}

/// `row[c] += scale · codes[c]`.
#[inline(always)]
pub(super) unsafe fn add_codes<S: Simd>(row: *mut f32, codes: *const i8, scale: f32, n: usize) {
    // SAFETY: both are valid for `n` by contract.
    unsafe {
        let factor = S::splat(scale);
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(row.add(i), S::fma(S::load_s8(codes.add(i)), factor, S::load(row.add(i))));
            i += S::LANES;
        }
        while i < n {
            *row.add(i) += f32::from(*codes.add(i)) * scale;
            i += 1;
        }
    }
}

/// `out[c] = factor · Σ_r rows[r, c]`, or the maximum over r. Rows are taken in order, one vector of columns at a time.
#[inline(always)]
pub(super) unsafe fn reduce<S: Simd>(kind: Reduction, rows: *const f32, n_rows: usize, n: usize, out: *mut f32) {
    // SAFETY: `rows` holds `[n_rows, n]` with `n_rows ≥ 1`, `out` holds `n`, by contract.
    unsafe {
        let mut i = 0;
        while i < n {
            let width = S::LANES.min(n - i);
            let mut total = S::load_some(rows.add(i), width, 0.0);
            for row in 1..n_rows {
                let next = S::load_some(rows.add(row * n + i), width, 0.0);
                total = match kind {
                    Reduction::Sum { .. } => S::add(total, next),
                    Reduction::Max => S::max(total, next),
                };
            }
            if let Reduction::Sum { factor } = kind {
                total = S::mul(total, S::splat(factor));
            }
            S::store_some(out.add(i), width, total);
            i += S::LANES;
        }
    }
}
