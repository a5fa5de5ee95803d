//! Row passes, written once over [`Simd`] and instantiated per instruction set.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::simd::{Simd, load_some, store_some, store_some_u8};
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

/// Rows `rows` of a block (or none) to be added to a residual, normalised and turned into codes.
pub(super) struct AddNorm {
    /// Null when there is nothing to add.
    pub(super) block: *const f32,
    pub(super) n_rows: usize,
    pub(super) n: usize,
    pub(super) rows: Range<usize>,
    /// First row's residual, `[rows.len(), n]`; receives the result.
    pub(super) residual: *mut f32,
    pub(super) gain: *const f32,
    pub(super) bias: *const f32,
    pub(super) eps: f32,
    pub(super) codes: *mut u8,
    pub(super) stride: usize,
    pub(super) scales: *mut RowScale,
    pub(super) range: Option<RowScale>,
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

/// The code of `x`; one outside of a fixed range is clipped.
#[inline(always)]
unsafe fn code<S: Simd>(x: S::F, low: S::F, inverse: S::F, clip: bool) -> S::I {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        let code = S::mul(S::sub(x, low), inverse);
        S::round(if clip { S::min(S::max(code, S::splat(0.0)), S::splat(255.0)) } else { code })
    }
}

/// A fixed range and the inverse of its step.
fn fixed(range: RowScale) -> (RowScale, f32) {
    step(range.low, range.low + 255.0 * range.scale)
}

/// `code[c] = round((x[c] − min) · 255 / (max − min))` per row, or the same in a fixed range.
#[inline(always)]
pub(super) unsafe fn quantize<S: Simd>(args: &Quantize) {
    // SAFETY: the block holds `n_rows` rows of ⌈n / PANEL⌉ panels, codes and scales hold `rows` (the façade's checks).
    unsafe {
        let n = args.n;
        let clip = args.range.is_some();
        for (index, row) in args.rows.clone().enumerate() {
            let mut low = S::splat(f32::INFINITY);
            let mut high = S::splat(f32::NEG_INFINITY);
            let known = !args.ranges.is_null();
            if known {
                let range = &*args.ranges.add(index);
                (low, high) = (S::load(range.low.as_ptr()), S::load(range.high.as_ptr()));
            }
            let mut column = 0;
            while column < n && !clip && !known {
                let from = args.block.add((column / PANEL * args.n_rows + row) * PANEL);
                let width = PANEL.min(n - column);
                let mut i = 0;
                while i + S::LANES <= width {
                    let x = S::load(from.add(i));
                    low = S::min(low, x);
                    high = S::max(high, x);
                    i += S::LANES;
                }
                if i < width {
                    low = S::min(low, load_some::<S>(from.add(i), width - i, f32::INFINITY));
                    high = S::max(high, load_some::<S>(from.add(i), width - i, f32::NEG_INFINITY));
                }
                column += PANEL;
            }
            let (scale, inverse) = match args.range {
                Some(range) => fixed(range),
                None => step(S::lowest(low), S::highest(high)),
            };
            *args.scales.add(index) = scale;
            let (low, inverse) = (S::splat(scale.low), S::splat(inverse));
            let to = args.codes.add(index * args.stride);
            let mut column = 0;
            while column < n {
                let from = args.block.add((column / PANEL * args.n_rows + row) * PANEL);
                let width = PANEL.min(n - column);
                let mut i = 0;
                while i + 4 * S::LANES <= width {
                    let mut codes = [code::<S>(S::load(from.add(i)), low, inverse, clip); 4];
                    for j in 1..4 {
                        codes[j] = code::<S>(S::load(from.add(i + j * S::LANES)), low, inverse, clip);
                    }
                    S::store_four_u8(to.add(column + i), codes);
                    i += 4 * S::LANES;
                }
                while i + S::LANES <= width {
                    S::store_u8(to.add(column + i), code::<S>(S::load(from.add(i)), low, inverse, clip));
                    i += S::LANES;
                }
                if i < width {
                    let x = load_some::<S>(from.add(i), width - i, scale.low);
                    store_some_u8::<S>(to.add(column + i), width - i, code::<S>(x, low, inverse, clip));
                }
                column += PANEL;
            }
        }
    }
}

/// [`add_norm`] of rows of `N` vectors, a multiple of four, on vectors of which four make a panel's row.
#[inline(always)]
unsafe fn add_norm_held<S: Simd, const N: usize>(args: &AddNorm) {
    // SAFETY: sizes as in `add_norm`, a block, and `n = N · LANES`.
    unsafe {
        let n = N * S::LANES;
        #[allow(clippy::cast_precision_loss, reason = "at most 32 vectors")]
        let inverse_n = 1.0 / n as f32;
        for (index, row) in args.rows.clone().enumerate() {
            let x = args.residual.add(index * n);
            let mut held = [S::splat(0.0); N];
            let mut sums = [S::splat(0.0); 4];
            // In fours, so that what adds up stays in registers though the outer loop is not unrolled.
            for v in (0..N).step_by(4) {
                let from = args.block.add((v * S::LANES / PANEL * args.n_rows + row) * PANEL + v * S::LANES % PANEL);
                for j in 0..4 {
                    let value = S::add(S::load(x.add((v + j) * S::LANES)), S::load(from.add(j * S::LANES)));
                    held[v + j] = value;
                    sums[j] = S::add(sums[j], value);
                }
            }
            let sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            let mean = S::splat(S::sum(sum) * inverse_n);
            let mut squares = [S::splat(0.0); 4];
            for v in (0..N).step_by(4) {
                for j in 0..4 {
                    let centred = S::sub(held[v + j], mean);
                    squares[j] = S::fma(centred, centred, squares[j]);
                }
            }
            let square = S::sum(S::add(S::add(squares[0], squares[1]), S::add(squares[2], squares[3])));
            let deviation = S::splat(1.0 / (square * inverse_n + args.eps).sqrt());
            let mut low = [S::splat(f32::INFINITY); 4];
            let mut high = [S::splat(f32::NEG_INFINITY); 4];
            for v in (0..N).step_by(4) {
                for j in 0..4 {
                    let column = (v + j) * S::LANES;
                    let gain = S::mul(S::load(args.gain.add(column)), deviation);
                    let y = S::fma(S::sub(held[v + j], mean), gain, S::load(args.bias.add(column)));
                    S::store(x.add(column), y);
                    held[v + j] = y;
                    low[j] = S::min(low[j], y);
                    high[j] = S::max(high[j], y);
                }
            }
            let (scale, inverse) = match args.range {
                Some(range) => fixed(range),
                None => {
                    let low = S::min(S::min(low[0], low[1]), S::min(low[2], low[3]));
                    let high = S::max(S::max(high[0], high[1]), S::max(high[2], high[3]));
                    step(S::lowest(low), S::highest(high))
                }
            };
            *args.scales.add(index) = scale;
            let (low, inverse) = (S::splat(scale.low), S::splat(inverse));
            let to = args.codes.add(index * args.stride);
            let clip = args.range.is_some();
            for v in (0..N).step_by(4) {
                let mut codes = [code::<S>(held[v], low, inverse, clip); 4];
                for j in 1..4 {
                    codes[j] = code::<S>(held[v + j], low, inverse, clip);
                }
                S::store_four_u8(to.add(v * S::LANES), codes);
            }
        }
    }
}

/// `x = residual + block`, `y = (x − mean) / √(var + eps) · gain + bias`, codes of y; per row.
#[inline(always)]
pub(super) unsafe fn add_norm<S: Simd>(args: &AddNorm) {
    // SAFETY: sizes as in `quantize`; `residual`, `gain` and `bias` hold `n` per row.
    unsafe {
        let n = args.n;
        if S::LANES == 16 && !args.block.is_null() {
            match n {
                128 => return add_norm_held::<S, 8>(args),
                256 => return add_norm_held::<S, 16>(args),
                384 => return add_norm_held::<S, 24>(args),
                _ => {}
            }
        }
        let whole = n / S::LANES * S::LANES;
        let rest = n - whole;
        #[allow(clippy::cast_precision_loss, reason = "widths are at most 65,536")]
        let inverse_n = 1.0 / n as f32;
        for (index, row) in args.rows.clone().enumerate() {
            let x = args.residual.add(index * n);
            // Two chains hide the latency of the additions.
            let mut sums = [S::splat(0.0); 2];
            let mut column = 0;
            while column < n {
                let from = args.block.wrapping_add((column / PANEL * args.n_rows + row) * PANEL);
                let end = n.min(column + PANEL);
                let mut i = column;
                let mut chain = 0;
                while i + S::LANES <= end {
                    let mut value = S::load(x.add(i));
                    if !args.block.is_null() {
                        value = S::add(value, S::load(from.add(i - column)));
                        S::store(x.add(i), value);
                    }
                    sums[chain] = S::add(sums[chain], value);
                    chain ^= 1;
                    i += S::LANES;
                }
                if i < end {
                    let mut value = load_some::<S>(x.add(i), end - i, 0.0);
                    if !args.block.is_null() {
                        value = S::add(value, load_some::<S>(from.add(i - column), end - i, 0.0));
                        store_some::<S>(x.add(i), end - i, value);
                    }
                    sums[0] = S::add(sums[0], value);
                }
                column += PANEL;
            }
            let mean = S::splat(S::sum(S::add(sums[0], sums[1])) * inverse_n);
            let mut squares = [S::splat(0.0); 2];
            let mut i = 0;
            let mut chain = 0;
            while i < whole {
                let d = S::sub(S::load(x.add(i)), mean);
                squares[chain] = S::fma(d, d, squares[chain]);
                chain ^= 1;
                i += S::LANES;
            }
            let mut square = S::sum(S::add(squares[0], squares[1]));
            let mean_scalar = S::highest(mean);
            for i in whole..n {
                let d = *x.add(i) - mean_scalar;
                square += d * d;
            }
            let deviation = S::splat(1.0 / (square * inverse_n + args.eps).sqrt());
            let mut low = S::splat(f32::INFINITY);
            let mut high = S::splat(f32::NEG_INFINITY);
            let mut i = 0;
            while i < whole {
                let gain = S::mul(S::load(args.gain.add(i)), deviation);
                let y = S::fma(S::sub(S::load(x.add(i)), mean), gain, S::load(args.bias.add(i)));
                S::store(x.add(i), y);
                low = S::min(low, y);
                high = S::max(high, y);
                i += S::LANES;
            }
            if rest > 0 {
                let gain = S::mul(load_some::<S>(args.gain.add(whole), rest, 0.0), deviation);
                let centred = S::sub(load_some::<S>(x.add(whole), rest, 0.0), mean);
                let y = S::fma(centred, gain, load_some::<S>(args.bias.add(whole), rest, 0.0));
                store_some::<S>(x.add(whole), rest, y);
                low = S::min(low, load_some::<S>(x.add(whole), rest, f32::INFINITY));
                high = S::max(high, load_some::<S>(x.add(whole), rest, f32::NEG_INFINITY));
            }
            let (scale, inverse) = match args.range {
                Some(range) => fixed(range),
                None => step(S::lowest(low), S::highest(high)),
            };
            *args.scales.add(index) = scale;
            let (low, inverse) = (S::splat(scale.low), S::splat(inverse));
            let to = args.codes.add(index * args.stride);
            let mut i = 0;
            while i < whole {
                S::store_u8(to.add(i), code::<S>(S::load(x.add(i)), low, inverse, args.range.is_some()));
                i += S::LANES;
            }
            if rest > 0 {
                let y = load_some::<S>(x.add(whole), rest, scale.low);
                store_some_u8::<S>(to.add(whole), rest, code::<S>(y, low, inverse, args.range.is_some()));
            }
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

#[inline(always)]
unsafe fn load_upto<S: Simd>(from: *const f32, width: usize) -> S::F {
    // SAFETY: `from` is valid for `width` by contract.
    unsafe { if width == S::LANES { S::load(from) } else { load_some::<S>(from, width, 0.0) } }
}

/// `out[c] = factor · Σ_r rows[r, c]`, or the maximum over r. Rows are taken in order, one vector of columns at a time.
#[inline(always)]
pub(super) unsafe fn reduce<S: Simd>(kind: Reduction, rows: *const f32, n_rows: usize, n: usize, out: *mut f32) {
    // SAFETY: `rows` holds `[n_rows, n]` with `n_rows ≥ 1`, `out` holds `n`, by contract.
    unsafe {
        let mut i = 0;
        while i < n {
            let width = S::LANES.min(n - i);
            let mut total = load_upto::<S>(rows.add(i), width);
            for row in 1..n_rows {
                let next = load_upto::<S>(rows.add(row * n + i), width);
                total = match kind {
                    Reduction::Sum { .. } => S::add(total, next),
                    Reduction::Max => S::max(total, next),
                };
            }
            if let Reduction::Sum { factor } = kind {
                total = S::mul(total, S::splat(factor));
            }
            if width == S::LANES {
                S::store(out.add(i), total)
            } else {
                store_some::<S>(out.add(i), width, total)
            }
            i += S::LANES;
        }
    }
}
