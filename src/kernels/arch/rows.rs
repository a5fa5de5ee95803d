//! Row passes, written once over [`Simd`] and instantiated per instruction set.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::activations::{apply, apply_four, by_kind, ceilings, floor};
use super::simd::Simd;
use crate::kernels::layout::{PANEL, RowScale, RowTop};
use crate::kernels::{Nonlinearity, Reduction};

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
    /// What the numbers go through first.
    pub(super) then: Option<Nonlinearity>,
    /// The largest number of each row of `rows` before that, where it is known; else null.
    pub(super) tops: *const RowTop,
}

/// The step and its inverse for a row between `low` and `high`.
#[inline(always)]
fn step(low: f32, high: f32) -> (RowScale, f32) {
    let range = high - low;
    // A constant row has step 0: all codes 0, all values `low`. So has a range that is not finite, as that of a row without a number,
    // so that what comes of it is not taken for a result.
    let inverse = if range > f32::MIN_POSITIVE * 1e3 { 255.0 / range } else { 0.0 };
    let low = if range.is_finite() { low } else { f32::NAN };
    (RowScale { scale: if inverse > 0.0 { range / 255.0 } else { 0.0 }, low }, inverse)
}

/// How far numbers may lie beyond the range that they are coded in: not at all, by the error of the function that they went through,
/// by any amount.
pub(super) const NOT: u8 = 0;
pub(super) const BARELY: u8 = 1;
pub(super) const FAR: u8 = 2;

/// The code of `x`, held to what a byte holds if `clip`.
#[inline(always)]
unsafe fn code<S: Simd>(x: S::F, low: S::F, inverse: S::F, clip: bool) -> S::I {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        let code = S::mul(S::sub(x, low), inverse);
        S::round(if clip { S::min(S::max(code, S::splat(0.0)), S::splat(255.0)) } else { code })
    }
}

/// Rows whose sums and ranges are reduced together, so that they do not wait for one another.
pub(super) const TOGETHER: usize = 4;

/// `$f::<$simd, R, $beyond>` of `$n` rows, [`TOGETHER`] at a time as long as there are so many.
macro_rules! in_fours {
    ($n:expr, |$first:ident| $f:ident::<$simd:ident, $beyond:ident>($($arg:expr),+)) => {{
        let (n, mut $first) = ($n, 0);
        while n - $first >= TOGETHER {
            $f::<$simd, TOGETHER, $beyond>($($arg),+);
            $first += TOGETHER;
        }
        while $first < n {
            $f::<$simd, 1, $beyond>($($arg),+);
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

/// Codes of `n` numbers that lie side by side, activated, less `low`, times `inverse`.
#[inline(always)]
pub(super) unsafe fn code_run<S: Simd, const BEYOND: u8>(
    then: Option<Nonlinearity>,
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
            let mut values = four::<S>(from.add(i));
            if let Some(kind) = then {
                values = apply_four::<S>(kind, values);
            }
            let clip = BEYOND == FAR || BEYOND == BARELY && !S::SATURATES;
            let mut codes = [code::<S>(values[0], low, inverse, clip); 4];
            for j in 1..4 {
                codes[j] = code::<S>(values[j], low, inverse, clip);
            }
            S::store_four_u8(to.add(i), codes);
            i += 4 * S::LANES;
        }
        while i < n {
            let rest = S::LANES.min(n - i);
            let mut x = S::load_some(from.add(i), rest, 0.0);
            if let Some(kind) = then {
                x = apply::<S>(kind, x);
            }
            let code = code::<S>(x, low, inverse, BEYOND != NOT);
            if rest == S::LANES {
                S::store_u8(to.add(i), code);
            } else {
                S::store_some_u8(to.add(i), rest, code);
            }
            i += rest;
        }
    }
}

/// The range of row `first` of `args.rows`, by lane.
#[inline(always)]
unsafe fn range_of<S: Simd>(args: &Quantize, first: usize) -> (S::F, S::F) {
    // SAFETY: the row is one of the block's.
    unsafe {
        let (mut low, mut high) = (S::splat(f32::INFINITY), S::splat(f32::NEG_INFINITY));
        for column in (0..args.n).step_by(PANEL) {
            let from = args.block.add((column / PANEL * args.n_rows + args.rows.start + first) * PANEL);
            let width = PANEL.min(args.n - column);
            let mut i = 0;
            while i + 4 * S::LANES <= width {
                let x = four::<S>(from.add(i));
                // As a tree, so that a row's extremes wait for one operation instead of four.
                low = S::min(low, S::min(S::min(x[0], x[1]), S::min(x[2], x[3])));
                high = S::max(high, S::max(S::max(x[0], x[1]), S::max(x[2], x[3])));
                i += 4 * S::LANES;
            }
            while i < width {
                let rest = S::LANES.min(width - i);
                low = S::min(low, S::load_some(from.add(i), rest, f32::INFINITY));
                high = S::max(high, S::load_some(from.add(i), rest, f32::NEG_INFINITY));
                i += rest;
            }
        }
        (low, high)
    }
}

/// Four vectors that lie side by side.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn four<S: Simd>(from: *const f32) -> [S::F; 4] {
    // SAFETY: `from` is valid for four vectors by contract.
    unsafe {
        [S::load(from), S::load(from.add(S::LANES)), S::load(from.add(2 * S::LANES)), S::load(from.add(3 * S::LANES))]
    }
}

/// Takes numbers into the top of their row.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn rise<S: Simd>(top: *mut RowTop, x: S::F) {
    // SAFETY: the instruction set is present, and there is a top, by contract.
    unsafe {
        let top = (*top).0.as_mut_ptr();
        S::store(top, S::max(S::load(top), x));
    }
}

/// Takes the first `n` columns of rows of a panel into the rows' tops.
#[inline(always)]
pub(super) unsafe fn tops<S: Simd>(values: *const f32, n_rows: usize, n: usize, tops: *mut RowTop) {
    // SAFETY: `values` is `[n_rows, PANEL]` with `n ≤ PANEL`, and there are `n_rows` tops, by contract.
    unsafe {
        for row in 0..n_rows {
            let (values, top) = (values.add(row * PANEL), tops.add(row));
            let mut i = 0;
            while i + 4 * S::LANES <= n {
                let [a, b, c, d] = four::<S>(values.add(i));
                rise::<S>(top, S::max(S::max(a, b), S::max(c, d)));
                i += 4 * S::LANES;
            }
            while i < n {
                let rest = S::LANES.min(n - i);
                rise::<S>(top, S::load_some(values.add(i), rest, f32::NEG_INFINITY));
                i += rest;
            }
        }
    }
}

/// The largest number of row `first` of `args.rows`, by lane.
///
/// # Safety
/// As for [`Simd`]; the row must be there.
#[inline(always)]
pub(super) unsafe fn top_of<S: Simd>(args: &Quantize, first: usize) -> S::F {
    // SAFETY: the row is one of the block's; there is a top for each, if any.
    unsafe {
        if args.tops.is_null() {
            let mut top = RowTop::EMPTY;
            for column in (0..args.n).step_by(PANEL) {
                let from = args.block.add((column / PANEL * args.n_rows + args.rows.start + first) * PANEL);
                tops::<S>(from, 1, PANEL.min(args.n - column), &raw mut top);
            }
            return S::load(top.0.as_ptr());
        }
        S::load((*args.tops.add(first)).0.as_ptr())
    }
}

/// [`quantize`] of the `R` rows from the one at `first` of `args.rows` on.
///
/// # Safety
/// As for [`quantize`].
#[inline(always)]
pub(super) unsafe fn quantize_rows<S: Simd, const R: usize, const BEYOND: u8>(
    then: Option<Nonlinearity>,
    args: &Quantize,
    first: usize,
) {
    // SAFETY: the rows are there, sizes as in `quantize`.
    unsafe {
        let row = args.rows.start + first;
        let (mut low, mut high) = ([S::splat(0.0); TOGETHER], [S::splat(0.0); TOGETHER]);
        let by = match (args.range, then) {
            (Some(_), _) => steps([0.0; TOGETHER], [0.0; TOGETHER], args.range),
            (None, None) => {
                for r in 0..R {
                    (low[r], high[r]) = range_of::<S>(args, first + r);
                }
                steps(S::lowests(low), S::highests(high), None)
            }
            (None, Some(kind)) => {
                for r in 0..R {
                    high[r] = top_of::<S>(args, first + r);
                }
                steps([floor(kind); TOGETHER], ceilings::<S>(kind, S::highests(high)), None)
            }
        };
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
                code_run::<S, BEYOND>(then, from.add(r * PANEL), width, to, low[r], inverse[r]);
            }
        }
    }
}

/// [`quantize`] of numbers that are activated first. Results may lie beyond their range by the error of the function.
#[inline(always)]
unsafe fn quantize_activated<S: Simd>(kind: Nonlinearity, args: &Quantize) {
    let (then, n_rows) = (Some(kind), args.rows.len());
    // SAFETY: as in `quantize`.
    unsafe {
        match args.range {
            None => in_fours!(n_rows, |first| quantize_rows::<S, BARELY>(then, args, first)),
            Some(_) => in_fours!(n_rows, |first| quantize_rows::<S, FAR>(then, args, first)),
        }
    }
}

/// `code[c] = round((x[c] − min) · 255 / (max − min))` per row, or the same in a fixed range; of what becomes of numbers that are
/// activated first.
#[inline(always)]
pub(super) unsafe fn quantize<S: Simd>(args: &Quantize) {
    let n_rows = args.rows.len();
    // SAFETY: the block holds `n_rows` rows of ⌈n / PANEL⌉ panels, codes and scales hold `rows` (the façade's checks).
    unsafe {
        match (args.then, args.range) {
            (Some(kind), _) => by_kind!(kind, quantize_activated::<S>(args)),
            (None, None) => in_fours!(n_rows, |first| quantize_rows::<S, NOT>(None, args, first)),
            (None, Some(_)) => in_fours!(n_rows, |first| quantize_rows::<S, FAR>(None, args, first)),
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
