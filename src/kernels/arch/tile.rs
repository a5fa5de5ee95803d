//! Tiles of `R` rows by `V` vectors of columns, written once over [`Dot`]: where sums start, the step over four inputs that all forms
//! of weights share, and what becomes of the sums.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::dot::Dot;
use super::gemm::{Gemm, Sink, ValueSink, value};
use super::simd::Simd;
use crate::kernels::layout::{PANEL, RowScale};

/// A tile: its first row and column, and that row's codes in the form that [`Dot::codes`] reads, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) row: usize,
    pub(super) column: usize,
    pub(super) codes: *const u8,
    pub(super) stride: usize,
}

/// Sums of a tile.
pub(super) type Sums<D, const R: usize, const V: usize> = [[<D as Dot>::A; V]; R];

/// The sums of a tile where they start ([`Dot::start`]).
///
/// # Safety
/// As for [`Simd`]; `sums` must hold the sum of the weights of each of the tile's columns.
#[inline(always)]
pub(super) unsafe fn start<D: Dot, const R: usize, const V: usize>(sums: *const i32) -> Sums<D, R, V> {
    // SAFETY: passed on.
    unsafe {
        let mut tile = [[D::zero(); V]; R];
        for v in 0..V {
            let start = D::start(sums.add(v * D::S::LANES));
            for r in 0..R {
                tile[r][v] = start;
            }
        }
        tile
    }
}

/// Adds the products of four inputs: of the codes of `R` rows, `stride` bytes apart, with `V` vectors of weights.
///
/// # Safety
/// As for [`Simd`]; codes and weights must be there.
#[inline(always)]
pub(super) unsafe fn add<D: Dot, const R: usize, const V: usize>(
    sums: &mut Sums<D, R, V>,
    codes: *const u8,
    stride: usize,
    weights: *const u8,
) {
    // SAFETY: passed on.
    unsafe {
        let mut weight = [D::load(weights); V];
        for v in 1..V {
            weight[v] = D::load(weights.add(v * D::S::LANES * 4));
        }
        for r in 0..R {
            let code = D::codes(codes.add(r * stride));
            for v in 0..V {
                sums[r][v] = D::dot(sums[r][v], code, weight[v]);
            }
        }
    }
}

/// Hands sums over all inputs to the sink; the tile's first column is `column` of the panel.
///
/// # Safety
/// As for [`Simd`]; the tile must be in range.
#[inline(always)]
pub(super) unsafe fn put<D: Dot, T: Sink, const R: usize, const V: usize>(
    gemm: &Gemm<T>,
    row: usize,
    column: usize,
    sums: &Sums<D, R, V>,
) {
    const { assert!(V <= 4) };
    // SAFETY: in range by contract. Written out: a loop over vectors would keep the sums in memory.
    unsafe {
        put_vector::<D, T, R, V, 0>(gemm, row, column, sums);
        put_vector::<D, T, R, V, 1>(gemm, row, column, sums);
        put_vector::<D, T, R, V, 2>(gemm, row, column, sums);
        put_vector::<D, T, R, V, 3>(gemm, row, column, sums);
    }
}

/// [`put`] of vector `AT` of each row, if there is one.
#[inline(always)]
unsafe fn put_vector<D: Dot, T: Sink, const R: usize, const V: usize, const AT: usize>(
    gemm: &Gemm<T>,
    row: usize,
    column: usize,
    sums: &Sums<D, R, V>,
) {
    if AT < V {
        // SAFETY: in range by the contract of `put`.
        unsafe {
            let column = column + AT * D::S::LANES;
            let columns = T::columns::<D::S>(gemm, column);
            for r in 0..R {
                T::put::<D::S>(gemm, row + r, column, columns, D::finish(sums[r][AT]));
            }
        }
    }
}

/// `row.scale · product + (row.low + bias · row.scale) · column.offset + column.bias`, where `product` is the sum of
/// weights times codes less `bias`.
///
/// # Safety
/// As for [`Simd`]; row and column must be in range.
#[inline(always)]
pub(super) unsafe fn put_product<S: Simd, T: ValueSink>(
    gemm: &Gemm<T>,
    row: usize,
    column: usize,
    product: S::F,
    bias: i32,
) {
    // SAFETY: in range by contract.
    unsafe {
        let columns = &*gemm.columns;
        let RowScale { scale, low } = *gemm.scales.add(row);
        #[allow(clippy::cast_precision_loss, reason = "0 or 128")]
        let low = low + bias as f32 * scale;
        let offset = S::load(columns.offset.as_ptr().add(column));
        let bias = S::load(columns.bias.as_ptr().add(column));
        let value = value::<S>(RowScale { scale, low }, product, offset, bias);
        T::store::<S>(gemm.out.add(row * PANEL + column), value);
    }
}

/// A tile of dense weights.
///
/// # Safety
/// As for [`Simd`]; the tile must be in range.
#[inline(always)]
pub(super) unsafe fn dense<D: Dot, T: Sink, const R: usize, const V: usize>(gemm: &Gemm<T>, tile: Tile) {
    // SAFETY: in range by contract; a panel holds `k_groups` groups.
    unsafe {
        let mut sums = start::<D, R, V>((*gemm.columns).sum.as_ptr().add(tile.column));
        let weights = gemm.weights.cast::<u8>().add(tile.column * 4);
        for group in 0..gemm.k_groups {
            let codes = tile.codes.add(group * 4 * D::CODE_BYTES);
            add::<D, R, V>(&mut sums, codes, tile.stride, weights.add(group * PANEL * 4));
        }
        put::<D, T, R, V>(gemm, tile.row, tile.column, &sums);
    }
}
