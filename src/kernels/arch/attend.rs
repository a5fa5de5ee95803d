//! Attention, written once over [`Products`] and instantiated per form and instruction set.
//!
//! ```text
//! packed head, in dwords of GROUP codes:
//!   steps   [2][d_padded]                                  of keys and of values, per dimension
//!   keys    [n_slots / KEY_BLOCK][d_padded / GROUP][KEY_BLOCK]
//!   values  [n_slots / GROUP][d_padded]
//! a tile of Q queries:
//!   scores [Q][slots visited] = q · k → less the row's maximum → 2^x → codes in place → Σ codes · values / Σ codes
//! ```
//! A key's step is folded into the query before the query is coded, so a score has one scale per row.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
mod face;
#[cfg(target_arch = "x86_64")]
pub(super) mod full;
pub(super) mod integers;
mod pack;
pub(super) mod products;
pub(super) mod table;
mod tile;
#[cfg(target_arch = "x86_64")]
pub(super) mod vnni;
#[cfg(target_arch = "x86_64")]
pub(super) mod wide;

use std::ops::Range;

use self::pack::{Columns, Third};
use self::products::Products;
use self::tile::{MASKED, Pooled, Tile, blocks, mask};
use super::gemm::row_tiles;
use super::simd::Simd;
use crate::kernels::attention::{CacheLine, Heads, KEY_BLOCK, KeySlots, QueryKeys, SlotRange};
use crate::kernels::layout::PANEL;

pub use self::face::Attention;
pub(super) use self::pack::pack;

/// One head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    qkv: *const u16,
    n_rows: usize,
    heads: Heads,
    first_row: usize,
    len: usize,
    slots: KeySlots<'a>,
    head: usize,
}

/// A block of queries of one head.
pub(super) struct Attend<'a> {
    head: Head<'a>,
    /// The head whose columns the block begins with.
    first_head: usize,
    first: usize,
    keys: &'a [QueryKeys],
    /// Whether all of them see the same.
    uniform: bool,
    step: usize,
    packed: *const CacheLine,
    scratch: *mut f32,
    /// Block in panels of `keys.len()` rows, heads side by side.
    out: *mut f32,
}

/// Most queries of a tile.
pub(super) const MAX_TILE: usize = 8;
/// Integer sums over this many slots fit; longer ones are added up in f32.
const CHUNK: usize = 256;

/// Cache lines of a head of `n_slots` slots.
pub(super) fn lines<P: Products>(n_slots: usize, d_padded: usize) -> usize {
    (2 * d_padded + 2 * n_slots * d_padded / P::GROUP) / 16
}

/// Floats of scratch that packing a head, or computing a tile that visits `width` slots, takes.
pub(super) fn scratch(width: usize, d_padded: usize) -> usize {
    // Packing: the inverse steps and the rows of a block of slots. A tile: its coded queries and their scores.
    let packing = (2 + KEY_BLOCK) * d_padded;
    packing.max(MAX_TILE * (d_padded + width))
}

/// Products of `Q` queries, `query_stride` dwords apart, with `V` vectors of slots. `GROUPS` is the number of groups if it is known when
/// this is compiled, or 0.
#[inline(always)]
unsafe fn score_sums<P: Products, const Q: usize, const V: usize, const GROUPS: usize>(
    queries: *const f32,
    query_stride: usize,
    keys: *const f32,
    n_groups: usize,
) -> [[P::Sums; V]; Q] {
    // SAFETY: `queries` is `[Q, query_stride]`, `keys` holds V · LANES / KEY_BLOCK blocks (at least one).
    unsafe {
        let lanes = P::S::LANES;
        let n_groups = if GROUPS > 0 { GROUPS } else { n_groups };
        let mut sums = [[P::zero(); V]; Q];
        for group in 0..n_groups {
            let mut key = [P::load(keys.add(group * KEY_BLOCK)); V];
            for v in 1..V {
                let (block, column) = (v * lanes / KEY_BLOCK, v * lanes % KEY_BLOCK);
                key[v] = P::load(keys.add((block * n_groups + group) * KEY_BLOCK + column));
            }
            for q in 0..Q {
                let query = P::broadcast(queries.add(q * query_stride + group));
                for v in 0..V {
                    sums[q][v] = P::score(sums[q][v], key[v], query);
                }
            }
        }
        sums
    }
}

/// Scores of `Q` queries against `V` vectors of slots.
#[inline(always)]
unsafe fn score_tile<P: Products, const Q: usize, const V: usize, const GROUPS: usize>(
    queries: *const f32,
    keys: *const f32,
    n_groups: usize,
    to: *mut f32,
    width: usize,
) {
    // SAFETY: `queries` is `[Q, n_groups]`, the keys are those of `score_sums`, and `to` is `[Q, width]` from the tile's column on.
    unsafe {
        let sums = score_sums::<P, Q, V, GROUPS>(queries, n_groups, keys, n_groups);
        for q in 0..Q {
            for v in 0..V {
                P::S::store(to.add(q * width + v * P::S::LANES), P::to_float(sums[q][v]));
            }
        }
    }
}

/// Scores of `Q` queries against blocks of slots; `V` vectors at a time, `B` at the end.
#[inline(always)]
unsafe fn score<P: Products, const Q: usize, const V: usize, const B: usize>(
    queries: *const f32,
    keys: *const f32,
    n_groups: usize,
    blocks: &SlotRange,
    to: *mut f32,
    width: usize,
) {
    // SAFETY: passed on; the blocks are among the packed ones and the columns inside the row.
    unsafe {
        let (at_once, Range { start, end }) = (V / B, blocks.slots());
        let mut block = start;
        while block < end {
            let from = keys.add(block * n_groups * KEY_BLOCK);
            let to = to.add((block - start) * KEY_BLOCK);
            if block + at_once <= end {
                if n_groups == 8 {
                    score_tile::<P, Q, V, 8>(queries, from, n_groups, to, width);
                } else {
                    score_tile::<P, Q, V, 0>(queries, from, n_groups, to, width);
                }
                block += at_once;
            } else {
                score_tile::<P, Q, B, 0>(queries, from, n_groups, to, width);
                block += 1;
            }
        }
    }
}

/// Products of weights, in rows `width` dwords apart, with `V` vectors of dimensions of the values of `n_groups` groups of slots, which are
/// `d` dwords apart. At most [`CHUNK`] slots.
#[inline(always)]
unsafe fn value_sums<P: Products, const Q: usize, const V: usize>(
    weights: *const f32,
    width: usize,
    values: *const f32,
    d: usize,
    n_groups: usize,
) -> [[P::Sums; V]; Q] {
    // SAFETY: weights and values are there by contract.
    unsafe {
        let mut sums = [[P::zero(); V]; Q];
        for group in 0..n_groups {
            let mut value = [P::load(values.add(group * d)); V];
            for v in 1..V {
                value[v] = P::load(values.add(group * d + v * P::S::LANES));
            }
            for q in 0..Q {
                let weight = P::broadcast(weights.add(q * width + group));
                for v in 0..V {
                    sums[q][v] = P::value(sums[q][v], weight, value[v]);
                }
            }
        }
        sums
    }
}

/// Adds weighted values of blocks of slots to `Q` sums of `V` vectors of dimensions. `weights` are rows `width` apart.
#[inline(always)]
unsafe fn add_values<P: Products, const Q: usize, const V: usize>(
    sums: &mut [[<P::S as Simd>::F; V]; Q],
    weights: *const f32,
    width: usize,
    values: *const f32,
    d: usize,
    blocks: &SlotRange,
) {
    // SAFETY: the blocks are among the packed ones; `weights` holds their codes; V vectors are inside a row of values.
    unsafe {
        let Range { start, end } = blocks.slots();
        let per_block = KEY_BLOCK / P::GROUP;
        let mut block = start;
        while block < end {
            let stop = (block / (CHUNK / KEY_BLOCK) + 1) * (CHUNK / KEY_BLOCK);
            let stop = stop.min(end);
            let weights = weights.add((block - start) * per_block);
            let from = values.add(block * per_block * d);
            let part = value_sums::<P, Q, V>(weights, width, from, d, (stop - block) * per_block);
            for q in 0..Q {
                for v in 0..V {
                    sums[q][v] = P::S::add(sums[q][v], P::to_float(part[q][v]));
                }
            }
            block = stop;
        }
    }
}

/// Scores to weights, in place; returns the weights' sum.
#[inline(always)]
unsafe fn soften<P: Products>(scores: *mut f32, width: usize, scale: f32) -> f32 {
    // SAFETY: `scores` holds `width`, a multiple of `KEY_BLOCK`.
    unsafe {
        let lanes = P::S::LANES;
        let mut highest = [P::S::splat(MASKED); 2];
        let mut i = 0;
        while i < width {
            for v in 0..KEY_BLOCK / lanes {
                highest[v % 2] = P::S::max(highest[v % 2], P::S::load(scores.add(i + v * lanes)));
            }
            i += KEY_BLOCK;
        }
        let highest = P::S::splat(P::S::highest(P::S::max(highest[0], highest[1])));
        P::weigh(scores, width, highest, P::S::splat(scale))
    }
}

/// Least that the largest of a query's numbers counts as. It lies below every product of two numbers of binary16, one of them
/// divided by 2,047, and is large enough for a hidden slot's score to be far below the others in the unit of that query.
const LEAST_QUERY: f32 = 1e-20;

/// What a product of a query with a key is multiplied with to become an exponent of 2.
#[allow(clippy::cast_precision_loss, reason = "widths are at most 65,536")]
fn exponent_unit(heads: Heads) -> f32 {
    std::f32::consts::LOG2_E / (heads.d_head as f32).sqrt()
}

/// Codes the query at `position`; returns what a score is multiplied with to become an exponent of 2.
#[inline(always)]
unsafe fn code_query<P: Products>(columns: &Columns<'_>, position: usize, steps: *const f32, to: *mut f32) -> f32 {
    // SAFETY: `to` holds a coded row, `steps` one per dimension.
    unsafe {
        let heads = columns.head.heads;
        let unit = exponent_unit(heads);
        let d = heads.d_padded();
        let lanes = P::S::LANES;
        if P::GROUP == 1 {
            let factor = P::S::splat(unit);
            for j in (0..d).step_by(lanes) {
                P::store_query(to, j, P::S::mul(columns.read::<P::S>(position, j), factor));
            }
            return 1.0;
        }
        let mut largest = P::S::splat(LEAST_QUERY);
        for j in (0..d).step_by(lanes) {
            let x = P::S::mul(columns.read::<P::S>(position, j), P::S::load(steps.add(j)));
            largest = P::S::max(largest, P::S::abs(x));
        }
        let largest = P::S::highest(largest);
        let inverse = P::S::splat(P::LARGEST / largest);
        for j in (0..d).step_by(lanes) {
            let x = P::S::mul(columns.read::<P::S>(position, j), P::S::load(steps.add(j)));
            P::store_query(to, j, P::S::mul(x, inverse));
        }
        largest * (unit / P::LARGEST)
    }
}

/// Writes the first `n` of `factor · values` to the head's columns of `row`, from its dimension `first` on.
#[inline(always)]
unsafe fn write_row<S: Simd, const V: usize>(
    args: &Attend<'_>,
    row: usize,
    first: usize,
    values: &[S::F; V],
    n: usize,
    factor: f32,
) {
    // SAFETY: `first + n` columns of `row` belong to the output block; whole vectors do not cross a panel.
    unsafe {
        let n_rows = args.keys.len();
        let column = (args.head.head - args.first_head) * args.head.heads.d_head + first;
        let at = |column: usize| args.out.add((column / PANEL * n_rows + row) * PANEL + column % PANEL);
        let factor = S::splat(factor);
        if column.is_multiple_of(16) && n == V * S::LANES {
            for v in 0..V {
                S::store(at(column + v * S::LANES), S::mul(values[v], factor));
            }
            return;
        }
        let mut lanes = [0.0f32; 64];
        for v in 0..V {
            S::store(lanes.as_mut_ptr().add(v * S::LANES), S::mul(values[v], factor));
        }
        for (j, &value) in lanes[..n].iter().enumerate() {
            *at(column + j) = value;
        }
    }
}

/// One tile of `Q` queries.
#[inline(always)]
unsafe fn tile<P: Products, const Q: usize, const V: usize, const B: usize>(args: &Attend<'_>, tile: &Tile) {
    // SAFETY: `packed` was filled by `pack` for the same head; `scratch` and `out` have the sizes of the façade.
    unsafe {
        let head = &args.head;
        let d = head.heads.d_padded();
        let n_groups = d / P::GROUP;
        let step: *const f32 = args.packed.cast();
        let keys = step.add(2 * d);
        let values = keys.add(head.slots.n_slots(head.len) * n_groups);
        let queries = args.scratch;
        let scores = queries.add(MAX_TILE * d);
        let width = tile.shared + tile.own;
        let columns = Columns::new(head, Third::Query);
        let index = |q: usize| tile.first + q * tile.step;
        let mut scale = [1.0f32; Q];
        for q in 0..Q {
            scale[q] = code_query::<P>(&columns, args.first + index(q), step, queries.add(q * n_groups));
        }
        let mut column = 0;
        for blocks in &tile.blocks {
            score::<P, Q, V, B>(queries, keys, n_groups, blocks, scores.add(column), width);
            column += blocks.slots().len() * KEY_BLOCK;
        }
        let mut inverse = [0.0f32; Q];
        for q in 0..Q {
            let row = scores.add(q * width);
            let seen = &args.keys[index(q)];
            let pooled = Pooled::new(head, scale[q]);
            let own = seen.own.map(blocks);
            let mut column = tile.shared;
            for blocks in &own {
                score::<P, 1, V, B>(queries.add(q * n_groups), keys, n_groups, blocks, row.add(column), width);
                column += blocks.slots().len() * KEY_BLOCK;
            }
            if !tile.all_seen || head.slots.pooled > 0 {
                mask(row, &tile.blocks, &seen.shared, &pooled);
            }
            if tile.own > 0 {
                mask(row.add(tile.shared), &own, &seen.own, &pooled);
            }
            inverse[q] = 1.0 / soften::<P>(row, column, scale[q]);
        }
        let part = V * P::S::LANES;
        for first in (0..d).step_by(part) {
            let mut sums = [[P::S::splat(0.0); V]; Q];
            let values = values.add(first);
            let mut column = 0;
            for blocks in &tile.blocks {
                add_values::<P, Q, V>(&mut sums, scores.add(column), width, values, d, blocks);
                column += blocks.slots().len() * KEY_BLOCK / P::GROUP;
            }
            for q in 0..Q {
                if tile.own > 0 {
                    let mut column = tile.shared / P::GROUP;
                    let mut own = [sums[q]];
                    for blocks in &args.keys[index(q)].own.map(blocks) {
                        let weights = scores.add(q * width + column);
                        add_values::<P, 1, V>(&mut own, weights, width, values, d, blocks);
                        column += blocks.slots().len() * KEY_BLOCK / P::GROUP;
                    }
                    [sums[q]] = own;
                }
                for v in 0..V {
                    if P::GROUP > 1 {
                        sums[q][v] = P::S::mul(sums[q][v], P::S::load(step.add(d + first + v * P::S::LANES)));
                    }
                }
                let n = part.min(head.heads.d_head.saturating_sub(first));
                write_row::<P::S, V>(args, index(q), first, &sums[q], n, inverse[q]);
            }
        }
    }
}

/// `out[q] = Σ_k softmax_k(q · k / √d) v[k]` for the keys that each query sees; tiles of at most `Q` queries by `V`
/// vectors, of which `B` make a block of slots. *Error*: as [`crate::kernels::AttentionForm`] states.
#[inline(always)]
pub(super) unsafe fn attend<P: Products, const Q: usize, const V: usize, const B: usize>(args: &Attend<'_>) {
    const { assert!(Q <= MAX_TILE && B * P::S::LANES == KEY_BLOCK && V / B * B == V && V * P::S::LANES <= 64) };
    let n = args.keys.len();
    for first in 0..args.step.min(n) {
        for (start, size) in row_tiles((n - first).div_ceil(args.step), Q) {
            let at = Tile::new(args.keys, first + start * args.step, args.step, size, args.uniform);
            // SAFETY: passed on; the tile's queries are in the block.
            unsafe {
                match size {
                    1 => tile::<P, 1, V, B>(args, &at),
                    2 if Q >= 2 => tile::<P, 2, V, B>(args, &at),
                    3 if Q >= 3 => tile::<P, 3, V, B>(args, &at),
                    4 if Q >= 4 => tile::<P, 4, V, B>(args, &at),
                    5 if Q >= 5 => tile::<P, 5, V, B>(args, &at),
                    6 if Q >= 6 => tile::<P, 6, V, B>(args, &at),
                    7 if Q >= 7 => tile::<P, 7, V, B>(args, &at),
                    8 if Q >= 8 => tile::<P, 8, V, B>(args, &at),
                    _ => {}
                }
            }
        }
    }
}
