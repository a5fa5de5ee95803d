//! Matrix products with 4-bit codebook weights, written once over [`Dot`]: a shuffle decodes the weights of a step, which
//! all rows of the tile then use.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::dot::Dot;
use super::gemm::{Gemm, Sink, ValueSink};
use super::simd::Simd;
use super::tile::{Sums, Tile, put, put_product, start};
use crate::kernels::forms::PAIR;
use crate::kernels::layout::PANEL;

/// `n_rows` rows of codes times one panel of indices.
pub(super) struct Codebook<T> {
    /// `weights` are the packed indices; `k_groups` is not used.
    pub(super) gemm: Gemm<T>,
    pub(super) n_in: usize,
    /// 16 entries.
    pub(super) table: *const i8,
    /// Groups with scales and zeros of their own; 0 where the columns' scales say it all.
    pub(super) n_groups: usize,
    /// Pairs of a group.
    pub(super) group_pairs: usize,
    /// `[n_groups, PANEL]`.
    pub(super) scales: *const [f32; PANEL],
    /// `[n_groups, PANEL]`.
    pub(super) zeros: *const [i8; PANEL],
}

/// The weights of half `half` of a packed vector. Of the last pair only the bytes of `rest` inputs are kept.
#[inline(always)]
unsafe fn decode<D: Dot, const LAST: bool>(
    packed: D::B,
    half: usize,
    table: D::B,
    zero: Option<D::B>,
    rest: usize,
) -> D::W {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        let mut bytes = D::lookup(table, if half == 0 { D::low(packed) } else { D::high(packed) });
        if let Some(zero) = zero {
            bytes = D::sub(bytes, zero);
        }
        if LAST {
            let n_bytes = rest.saturating_sub(half * 4).min(4);
            bytes = D::keep(bytes, if n_bytes == 4 { u32::MAX } else { (1 << (8 * n_bytes)) - 1 });
        }
        D::weights(bytes)
    }
}

#[inline(always)]
#[allow(clippy::manual_map, reason = "a closure would not carry the target features")]
fn at_vector<B: Copy, const V: usize>(vectors: Option<[B; V]>, v: usize) -> Option<B> {
    match vectors {
        Some(vectors) => Some(vectors[v]),
        None => None,
    }
}

/// Adds pair `pair` to the sums of a tile, in loops and without closures, which would not carry the target features.
#[inline(always)]
unsafe fn step<D: Dot, T, const R: usize, const V: usize, const LAST: bool>(
    args: &Codebook<T>,
    tile: Tile,
    pair: usize,
    table: D::B,
    zero: Option<[D::B; V]>,
    sums: &mut Sums<D, R, V>,
) {
    // SAFETY: rows, columns and pairs are in range (the façade's checks).
    unsafe {
        let from = args.gemm.weights.cast::<u8>().add((pair * PANEL + tile.column) * 4);
        let codes = tile.codes.add(pair * PAIR * D::CODE_BYTES);
        let rest = args.n_in - pair * PAIR;
        if D::PAIRED {
            let mut weights = [[D::weights(table); 2]; V];
            for v in 0..V {
                let packed = D::bytes(from.add(v * D::S::LANES * 4));
                let zero = at_vector(zero, v);
                weights[v][0] = decode::<D, LAST>(packed, 0, table, zero, rest);
                weights[v][1] = decode::<D, LAST>(packed, 1, table, zero, rest);
            }
            for r in 0..R {
                let codes = codes.add(r * tile.stride);
                let codes = [D::codes(codes), D::codes(codes.add(4 * D::CODE_BYTES))];
                for v in 0..V {
                    sums[r][v] = D::dot_two(sums[r][v], codes, weights[v]);
                }
            }
        } else {
            for half in 0..2 {
                let mut weights = [D::weights(table); V];
                for v in 0..V {
                    let packed = D::bytes(from.add(v * D::S::LANES * 4));
                    let zero = at_vector(zero, v);
                    weights[v] = decode::<D, LAST>(packed, half, table, zero, rest);
                }
                for r in 0..R {
                    let codes = D::codes(codes.add(r * tile.stride + half * 4 * D::CODE_BYTES));
                    for v in 0..V {
                        sums[r][v] = D::dot(sums[r][v], codes, weights[v]);
                    }
                }
            }
        }
    }
}

/// Adds pairs `pairs` to the sums of a tile.
#[inline(always)]
unsafe fn add<D: Dot, T, const R: usize, const V: usize>(
    args: &Codebook<T>,
    tile: Tile,
    pairs: Range<usize>,
    zero: Option<[D::B; V]>,
    sums: &mut Sums<D, R, V>,
) {
    // SAFETY: as in `step`; the table holds 16 entries.
    unsafe {
        let table = D::table(args.table);
        let whole = pairs.end.min(args.n_in / PAIR);
        for pair in pairs.start..whole {
            step::<D, T, R, V, false>(args, tile, pair, table, zero, sums);
        }
        if whole < pairs.end {
            step::<D, T, R, V, true>(args, tile, whole, table, zero, sums);
        }
    }
}

/// One scale per column, no zeros: sums over all inputs are integers.
///
/// # Safety
/// As for [`Simd`]; the tile must be in range.
#[inline(always)]
pub(super) unsafe fn tile<D: Dot, T: Sink, const R: usize, const V: usize>(args: &Codebook<T>, tile: Tile) {
    // SAFETY: in range by contract.
    unsafe {
        let mut sums = start::<D, R, V>((*args.gemm.columns).sum.as_ptr().add(tile.column));
        add::<D, T, R, V>(args, tile, 0..args.n_in.div_ceil(PAIR), None, &mut sums);
        put::<D, T, R, V>(&args.gemm, tile.row, tile.column, &sums);
    }
}

/// Scales and zeros per group of inputs: the integer sums of a group are scaled and added in f32.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn grouped_tile<D: Dot, T: ValueSink, const R: usize, const V: usize>(
    args: &Codebook<T>,
    tile: Tile,
) {
    // SAFETY: in range by contract; there are `n_groups` scales and zeros.
    unsafe {
        let n_pairs = args.n_in.div_ceil(PAIR);
        let mut products = [[D::S::splat(0.0); V]; R];
        for group in 0..args.n_groups {
            let zeros = (*args.zeros.add(group)).as_ptr().add(tile.column);
            let mut zero = [D::spread(zeros); V];
            for v in 1..V {
                zero[v] = D::spread(zeros.add(v * D::S::LANES));
            }
            let pairs = group * args.group_pairs..((group + 1) * args.group_pairs).min(n_pairs);
            let mut sums = [[D::zero(); V]; R];
            add::<D, T, R, V>(args, tile, pairs, Some(zero), &mut sums);
            let scales = (*args.scales.add(group)).as_ptr().add(tile.column);
            for r in 0..R {
                for v in 0..V {
                    let scale = D::S::load(scales.add(v * D::S::LANES));
                    products[r][v] = D::S::fma(D::S::to_float(D::finish(sums[r][v])), scale, products[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                let column = tile.column + v * D::S::LANES;
                put_product::<D::S, T>(&args.gemm, tile.row + r, column, products[r][v], D::CODE_BIAS);
            }
        }
    }
}
