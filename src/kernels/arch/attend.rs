//! Attention in f32, written once over [`Simd`] and instantiated per instruction set.
//!
//! ```text
//! packed head:  keys   [n_blocks][d_padded][KEY_BLOCK]      values  [n_blocks · KEY_BLOCK][d_padded]
//! a tile of Q queries:  scores [Q][keys in reach] = q · k / √d · log2 e  → minus the row's maximum → 2^x → values
//! ```
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::simd::{Simd, exp2};
use crate::kernels::attention::{CacheLine, Heads, KEY_BLOCK, KeyBand};
use crate::kernels::half::half_to_f32;
use crate::kernels::layout::PANEL;

/// One head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub(super) qkv: *const u16,
    pub(super) n_rows: usize,
    pub(super) heads: Heads,
    pub(super) first_row: usize,
    pub(super) len: usize,
    pub(super) band: KeyBand,
    pub(super) head: usize,
}

/// Queries of one head.
pub(super) struct Attend {
    pub(super) head: Head,
    pub(super) queries: Range<usize>,
    pub(super) packed: *const CacheLine,
    pub(super) scratch: *mut f32,
    /// Block in panels of `queries.len()` rows, all heads side by side.
    pub(super) out: *mut f32,
}

/// Keys that are not seen; below every score, and 2^x of it is 0.
pub(super) const MASKED: f32 = -1e30;
/// Most queries of a tile.
pub(super) const MAX_TILE: usize = 8;

/// Packed size of a head.
pub(super) fn lines(len: usize, d_padded: usize) -> usize {
    2 * len.next_multiple_of(KEY_BLOCK) * d_padded / 16
}

/// Floats of scratch that packing or computing one tile takes.
pub(super) fn scratch(len: usize, d_padded: usize) -> usize {
    MAX_TILE * (d_padded + len.next_multiple_of(KEY_BLOCK))
}

/// Which third of `qkv`.
#[derive(Clone, Copy)]
pub(super) enum Third {
    Query = 0,
    Key = 1,
    Value = 2,
}

/// `to[j] = factor · x[row, j]` for the head's columns, zeros up to `d_padded`.
#[inline(always)]
pub(super) unsafe fn read_row<S: Simd>(head: &Head, third: Third, row: usize, factor: f32, to: *mut f32) {
    // SAFETY: the row is one of the sequence's, the columns are the head's, and `to` holds `d_padded`.
    unsafe {
        let d_head = head.heads.d_head;
        let first = third as usize * head.heads.d_context() + head.head * d_head;
        let at = |column: usize| {
            head.qkv.add((column / PANEL * head.n_rows + head.first_row + row) * PANEL + column % PANEL)
        };
        let mut j = 0;
        if first.is_multiple_of(16) {
            let factor = S::splat(factor);
            while j + 16 <= d_head {
                let from = at(first + j);
                let mut i = 0;
                while i < 16 {
                    S::store(to.add(j + i), S::mul(S::load_half(from.add(i)), factor));
                    i += S::LANES;
                }
                j += 16;
            }
        }
        while j < d_head {
            *to.add(j) = half_to_f32(*at(first + j)) * factor;
            j += 1;
        }
        while j < head.heads.d_padded() {
            *to.add(j) = 0.0;
            j += 1;
        }
    }
}

/// Packs keys and values of one head.
#[inline(always)]
pub(super) unsafe fn pack<S: Simd>(head: &Head, packed: *mut CacheLine, scratch: *mut f32) {
    // SAFETY: `packed` holds `lines` and `scratch` holds `scratch` for this head (the façade's checks).
    unsafe {
        let d = head.heads.d_padded();
        let padded = head.len.next_multiple_of(KEY_BLOCK);
        let keys: *mut f32 = packed.cast();
        let values = keys.add(padded * d);
        for key in 0..padded {
            let to = keys.add(key / KEY_BLOCK * d * KEY_BLOCK + key % KEY_BLOCK);
            if key < head.len {
                read_row::<S>(head, Third::Key, key, 1.0, scratch);
                for j in 0..d {
                    *to.add(j * KEY_BLOCK) = *scratch.add(j);
                }
                read_row::<S>(head, Third::Value, key, 1.0, values.add(key * d));
            } else {
                for j in 0..d {
                    *to.add(j * KEY_BLOCK) = 0.0;
                    *values.add(key * d + j) = 0.0;
                }
            }
        }
    }
}

/// Scores of `Q` queries against one block of keys.
#[inline(always)]
unsafe fn score_tile<S: Simd, const Q: usize, const V: usize>(
    queries: *const f32,
    keys: *const f32,
    d: usize,
    to: *mut f32,
    width: usize,
) {
    // SAFETY: `queries` is `[Q, d]`, `keys` is `[d, KEY_BLOCK]` and `to` is `[Q, width]` from the tile's column on.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; Q];
        for j in 0..d {
            let mut key = [S::splat(0.0); V];
            for v in 0..V {
                key[v] = S::load(keys.add(j * KEY_BLOCK + v * S::LANES));
            }
            for q in 0..Q {
                let query = S::splat(*queries.add(q * d + j));
                for v in 0..V {
                    sums[q][v] = S::fma(query, key[v], sums[q][v]);
                }
            }
        }
        for q in 0..Q {
            for v in 0..V {
                S::store(to.add(q * width + v * S::LANES), sums[q][v]);
            }
        }
    }
}

/// Adds weighted values of one block of keys to `Q` sums of `KEY_BLOCK` dimensions.
#[inline(always)]
unsafe fn value_tile<S: Simd, const Q: usize, const V: usize>(
    sums: &mut [[S::F; V]; Q],
    weights: *const f32,
    width: usize,
    values: *const f32,
    d: usize,
) {
    // SAFETY: `weights` is `[Q, width]` from the block's column on, `values` is `[KEY_BLOCK, d]`.
    unsafe {
        for key in 0..KEY_BLOCK {
            let mut value = [S::splat(0.0); V];
            for v in 0..V {
                value[v] = S::load(values.add(key * d + v * S::LANES));
            }
            for q in 0..Q {
                let weight = S::splat(*weights.add(q * width + key));
                for v in 0..V {
                    sums[q][v] = S::fma(weight, value[v], sums[q][v]);
                }
            }
        }
    }
}

/// Sets the scores of keys that `query` does not see.
unsafe fn mask(scores: *mut f32, segments: &[Range<usize>; 2], globals: usize, window: &Range<usize>) {
    let mut column = 0;
    for blocks in segments {
        let keys = blocks.start * KEY_BLOCK..blocks.end * KEY_BLOCK;
        let before = keys.start.max(globals)..window.start.min(keys.end);
        let after = keys.start.max(globals).max(window.end)..keys.end;
        for hidden in [before, after] {
            for key in hidden {
                // SAFETY: the key is in the segment, whose columns start at `column`.
                unsafe { *scores.add(column + key - keys.start) = MASKED };
            }
        }
        column += keys.len();
    }
}

/// Scores to weights, in place; returns the weights' sum.
#[inline(always)]
unsafe fn soften<S: Simd, const V: usize>(scores: *mut f32, width: usize) -> f32 {
    // SAFETY: `scores` holds `width`, a multiple of `KEY_BLOCK` = V · LANES.
    unsafe {
        let mut highest = S::splat(MASKED);
        let mut i = 0;
        while i < width {
            highest = S::max(highest, S::load(scores.add(i)));
            i += S::LANES;
        }
        let highest = S::splat(S::highest(highest));
        // exp2 never goes below 2^−100; taking that off makes a hidden key's weight exactly 0.
        let floor = S::splat(f32::from_bits((127 - 100) << 23));
        let mut sums = [S::splat(0.0); V];
        let mut i = 0;
        while i < width {
            for v in 0..V {
                let at = scores.add(i + v * S::LANES);
                let weight = S::sub(exp2::<S>(S::sub(S::load(at), highest)), floor);
                S::store(at, weight);
                sums[v] = S::add(sums[v], weight);
            }
            i += KEY_BLOCK;
        }
        let mut sum = sums[0];
        for v in 1..V {
            sum = S::add(sum, sums[v]);
        }
        S::sum(sum)
    }
}

/// Writes `factor · from[j]` to the head's columns of `row`.
#[inline(always)]
pub(super) unsafe fn write_row<S: Simd>(
    args: &Attend,
    row: usize,
    first: usize,
    values: *const f32,
    n: usize,
    factor: f32,
) {
    // SAFETY: `first + n` columns of `row` belong to the output block.
    unsafe {
        let n_rows = args.queries.len();
        let column = args.head.head * args.head.heads.d_head + first;
        let at = |column: usize| args.out.add((column / PANEL * n_rows + row) * PANEL + column % PANEL);
        let mut j = 0;
        if column.is_multiple_of(16) {
            let factor = S::splat(factor);
            while j + 16 <= n {
                let to = at(column + j);
                let mut i = 0;
                while i < 16 {
                    S::store(to.add(i), S::mul(S::load(values.add(j + i)), factor));
                    i += S::LANES;
                }
                j += 16;
            }
        }
        while j < n {
            *at(column + j) = *values.add(j) * factor;
            j += 1;
        }
    }
}

/// `out[q] = Σ_k softmax_k(q · k / √d) v[k]` for the keys in each query's band.
///
/// *Error*: relative to the largest |v|, 2e-6 for up to a few thousand keys.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, const Q: usize, const V: usize>(args: &Attend) {
    debug_assert!(V * S::LANES == KEY_BLOCK && Q <= MAX_TILE);
    // SAFETY: `packed` was filled by `pack` for the same head; `scratch` and `out` have the sizes of the façade.
    unsafe {
        let Head { heads, len, band, .. } = args.head;
        let d = heads.d_padded();
        let keys: *const f32 = args.packed.cast();
        let values = keys.add(len.next_multiple_of(KEY_BLOCK) * d);
        let queries = args.scratch;
        let scores = args.scratch.add(MAX_TILE * d);
        #[allow(clippy::cast_precision_loss, reason = "widths are at most 65,536")]
        let scale = std::f32::consts::LOG2_E / (heads.d_head as f32).sqrt();
        let mut first = args.queries.start;
        while first < args.queries.end {
            let tile = first..(first + Q).min(args.queries.end);
            for q in 0..Q {
                // A short last tile computes its last query several times.
                read_row::<S>(&args.head, Third::Query, (first + q).min(tile.end - 1), scale, queries.add(q * d));
            }
            let segments = band.segments(&tile, len);
            let width = segments.iter().map(|blocks| blocks.len() * KEY_BLOCK).sum();
            let mut column = 0;
            for block in segments.iter().cloned().flatten() {
                score_tile::<S, Q, V>(queries, keys.add(block * d * KEY_BLOCK), d, scores.add(column), width);
                column += KEY_BLOCK;
            }
            let mut inverse = [0.0f32; Q];
            for q in 0..Q {
                let row = scores.add(q * width);
                let query = (first + q).min(tile.end - 1);
                mask(row, &segments, band.globals.min(len), &band.window(query, len));
                inverse[q] = 1.0 / soften::<S, V>(row, width);
            }
            let mut part = 0;
            while part < d {
                let mut sums = [[S::splat(0.0); V]; Q];
                let mut column = 0;
                for block in segments.iter().cloned().flatten() {
                    let from = values.add(block * KEY_BLOCK * d + part);
                    value_tile::<S, Q, V>(&mut sums, scores.add(column), width, from, d);
                    column += KEY_BLOCK;
                }
                let n = KEY_BLOCK.min(heads.d_head.saturating_sub(part));
                for q in 0..tile.len() {
                    let mut result = [0.0f32; KEY_BLOCK];
                    for v in 0..V {
                        S::store(result.as_mut_ptr().add(v * S::LANES), sums[q][v]);
                    }
                    write_row::<S>(args, first + q - args.queries.start, part, result.as_ptr(), n, inverse[q]);
                }
                part += KEY_BLOCK;
            }
            first += Q;
        }
    }
}
