//! The residual stream's pass, written once over [`Simd`] and instantiated per instruction set: addition, LayerNorm, codes.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::rows::{TOGETHER, code_run, in_fours, steps};
use super::simd::Simd;
use crate::kernels::layout::{PANEL, RowScale};

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

/// Four sums, each of which waits for its own last addition alone.
#[inline(always)]
unsafe fn total<S: Simd>(sums: [S::F; 4]) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe { S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])) }
}

/// Adds `R` rows of a block to `x`, if there is a block, and returns the sums of what results, by lane. `block` is the first row in
/// the block's first panel, those of the next panels lie `stride` floats apart.
#[inline(always)]
unsafe fn add<S: Simd, const R: usize>(x: *mut f32, block: *const f32, stride: usize, n: usize) -> [S::F; TOGETHER] {
    // SAFETY: `x` holds `R` rows of `n`, and so does the block.
    unsafe {
        let mut sums = [[S::splat(0.0); 4]; R];
        let mut from = block;
        for column in (0..n).step_by(PANEL) {
            let width = PANEL.min(n - column);
            for r in 0..R {
                let (x, from) = (x.add(r * n + column), from.wrapping_add(r * PANEL));
                let mut i = 0;
                while i + 4 * S::LANES <= width {
                    for j in 0..4 {
                        let at = i + j * S::LANES;
                        let mut value = S::load(x.add(at));
                        if !block.is_null() {
                            value = S::add(value, S::load(from.add(at)));
                            S::store(x.add(at), value);
                        }
                        sums[r][j] = S::add(sums[r][j], value);
                    }
                    i += 4 * S::LANES;
                }
                while i < width {
                    let rest = S::LANES.min(width - i);
                    let mut value = S::load_some(x.add(i), rest, 0.0);
                    if !block.is_null() {
                        value = S::add(value, S::load_some(from.add(i), rest, 0.0));
                        S::store_some(x.add(i), rest, value);
                    }
                    sums[r][0] = S::add(sums[r][0], value);
                    i += rest;
                }
            }
            from = from.wrapping_add(stride);
        }
        let mut totals = [S::splat(0.0); TOGETHER];
        for r in 0..R {
            totals[r] = total::<S>(sums[r]);
        }
        totals
    }
}

/// `Σ (x − mean)²`, by lane.
#[inline(always)]
unsafe fn squares<S: Simd>(x: *const f32, n: usize, mean: f32) -> S::F {
    // SAFETY: `x` holds `n`.
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        let centre = S::splat(mean);
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            for j in 0..4 {
                let centred = S::sub(S::load(x.add(i + j * S::LANES)), centre);
                sums[j] = S::fma(centred, centred, sums[j]);
            }
            i += 4 * S::LANES;
        }
        while i < n {
            let rest = S::LANES.min(n - i);
            let centred = S::sub(S::load_some(x.add(i), rest, mean), centre);
            sums[0] = S::fma(centred, centred, sums[0]);
            i += rest;
        }
        total::<S>(sums)
    }
}

/// `x = (x − mean) · inverse · gain + bias`; returns the range of what results, by lane.
#[inline(always)]
unsafe fn scale<S: Simd>(args: &AddNorm, x: *mut f32, mean: f32, inverse: f32) -> (S::F, S::F) {
    // SAFETY: `x`, gain and bias hold `n`.
    unsafe {
        let (mut low, mut high) = ([S::splat(f32::INFINITY); 4], [S::splat(f32::NEG_INFINITY); 4]);
        let (n, mean, inverse) = (args.n, S::splat(mean), S::splat(inverse));
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            for j in 0..4 {
                let at = i + j * S::LANES;
                let gain = S::mul(S::load(args.gain.add(at)), inverse);
                let y = S::fma(S::sub(S::load(x.add(at)), mean), gain, S::load(args.bias.add(at)));
                S::store(x.add(at), y);
                low[j] = S::min(low[j], y);
                high[j] = S::max(high[j], y);
            }
            i += 4 * S::LANES;
        }
        while i < n {
            let rest = S::LANES.min(n - i);
            let gain = S::mul(S::load_some(args.gain.add(i), rest, 0.0), inverse);
            let centred = S::sub(S::load_some(x.add(i), rest, 0.0), mean);
            S::store_some(x.add(i), rest, S::fma(centred, gain, S::load_some(args.bias.add(i), rest, 0.0)));
            low[0] = S::min(low[0], S::load_some(x.add(i), rest, f32::INFINITY));
            high[0] = S::max(high[0], S::load_some(x.add(i), rest, f32::NEG_INFINITY));
            i += rest;
        }
        let low = S::min(S::min(low[0], low[1]), S::min(low[2], low[3]));
        (low, S::max(S::max(high[0], high[1]), S::max(high[2], high[3])))
    }
}

/// [`add_norm`] of the `R` rows from the one at `first` of `args.rows` on.
#[inline(always)]
unsafe fn rows<S: Simd, const R: usize, const CLIP: bool>(args: &AddNorm, first: usize) {
    // SAFETY: the rows are there, sizes as in `add_norm`.
    unsafe {
        let n = args.n;
        #[allow(clippy::cast_precision_loss, reason = "widths are at most 65,536")]
        let inverse_n = 1.0 / n as f32;
        let x = args.residual.add(first * n);
        let block = match args.block.is_null() {
            true => args.block,
            false => args.block.add((args.rows.start + first) * PANEL),
        };
        let mut parts = add::<S, R>(x, block, args.n_rows * PANEL, n);
        let means = S::sums(parts).map(|sum| sum * inverse_n);
        for r in 0..R {
            parts[r] = squares::<S>(x.add(r * n), n, means[r]);
        }
        let inverses = S::sums(parts).map(|square| 1.0 / (square * inverse_n + args.eps).sqrt());
        let (mut low, mut high) = ([S::splat(0.0); TOGETHER], [S::splat(0.0); TOGETHER]);
        for r in 0..R {
            (low[r], high[r]) = scale::<S>(args, x.add(r * n), means[r], inverses[r]);
        }
        let by = steps(S::lowests(low), S::highests(high), args.range);
        for r in 0..R {
            *args.scales.add(first + r) = by[r].0;
            let to = args.codes.add((first + r) * args.stride);
            code_run::<S, CLIP>(x.add(r * n), n, to, S::splat(by[r].0.low), S::splat(by[r].1));
        }
    }
}

/// `x = residual + block`, `y = (x − mean) / √(var + eps) · gain + bias`, codes of y; per row. The sums of a few rows are reduced
/// together.
#[inline(always)]
pub(super) unsafe fn add_norm<S: Simd>(args: &AddNorm) {
    // SAFETY: the block, if there is one, holds `rows` in ⌈n / PANEL⌉ panels of `n_rows` rows; `residual`, codes and scales hold
    // `rows`, `gain` and `bias` hold `n` (the façade's checks).
    unsafe {
        match args.range {
            None => in_fours!(args.rows.len(), |first| rows::<S, false>(args, first)),
            Some(_) => in_fours!(args.rows.len(), |first| rows::<S, true>(args, first)),
        }
    }
}
