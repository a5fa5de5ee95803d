//! What becomes of the sums of a tile that is as wide as a panel. Most become values that are stored; some go on as values while they
//! are in registers, which saves the next row pass from reading them.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::dot::Dot;
use super::gemm::{Gemm, Sink, value};
use super::norm::take;
use super::rows::rise;
use super::simd::Simd;
use super::tile::{Sums, put};

/// Vectors of a panel.
const V: usize = 4;

/// # Safety
/// Of its function, as for [`Simd`], whose vectors must be a quarter of a panel; the rows must be in range.
pub(super) trait PanelEnd: Sized {
    /// Hands over the sums of `R` rows from `row` on.
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>);
}

impl<T: Sink> PanelEnd for T {
    #[inline(always)]
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>) {
        // SAFETY: passed on.
        unsafe { put::<D, T, R, V>(gemm, row, 0, sums) }
    }
}

/// Values, the largest of which are taken into `tops`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Topped(#[allow(dead_code, reason = "written by pointer")] f32);

/// Values added to what stands there; the rows' sums of what results are taken into `sums`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Added(#[allow(dead_code, reason = "written by pointer")] f32);

/// What is done with a panel's values of a row.
trait RowEnd: Sized {
    unsafe fn row<S: Simd>(gemm: &Gemm<Self>, row: usize, values: [S::F; V]);
}

impl RowEnd for Topped {
    #[inline(always)]
    unsafe fn row<S: Simd>(gemm: &Gemm<Self>, row: usize, values: [S::F; V]) {
        // SAFETY: in range by the contract of `PanelEnd`; there is a top for each row.
        unsafe {
            let to: *mut f32 = gemm.out.add(row * gemm.out_stride).cast();
            for v in 0..V {
                S::store(to.add(v * S::LANES), values[v]);
            }
            rise::<S>(gemm.tops.add(row), values);
        }
    }
}

impl RowEnd for Added {
    #[inline(always)]
    unsafe fn row<S: Simd>(gemm: &Gemm<Self>, row: usize, mut values: [S::F; V]) {
        // SAFETY: in range by the contract of `PanelEnd`; there are sums for each row.
        unsafe {
            let to: *mut f32 = gemm.out.add(row * gemm.out_stride).cast();
            for v in 0..V {
                values[v] = S::add(S::load(to.add(v * S::LANES)), values[v]);
                S::store(to.add(v * S::LANES), values[v]);
            }
            take::<S>(gemm.sums.add(row), values);
        }
    }
}

impl PanelEnd for Topped {
    #[inline(always)]
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>) {
        // SAFETY: passed on.
        unsafe { rows::<D, Self, R>(gemm, row, sums) }
    }
}

impl PanelEnd for Added {
    #[inline(always)]
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>) {
        // SAFETY: passed on.
        unsafe { rows::<D, Self, R>(gemm, row, sums) }
    }
}

/// Row by row. Written out: a loop would keep the sums in memory.
#[inline(always)]
unsafe fn rows<D: Dot, T: RowEnd, const R: usize>(gemm: &Gemm<T>, row: usize, sums: &Sums<D, R, V>) {
    const { assert!(R <= 6) };
    // SAFETY: in range by the contract of `PanelEnd`.
    unsafe {
        row_of::<D, T, R, 0>(gemm, row, sums);
        row_of::<D, T, R, 1>(gemm, row, sums);
        row_of::<D, T, R, 2>(gemm, row, sums);
        row_of::<D, T, R, 3>(gemm, row, sums);
        row_of::<D, T, R, 4>(gemm, row, sums);
        row_of::<D, T, R, 5>(gemm, row, sums);
    }
}

/// Row `AT` of the tile, if it has one.
#[inline(always)]
unsafe fn row_of<D: Dot, T: RowEnd, const R: usize, const AT: usize>(
    gemm: &Gemm<T>,
    first: usize,
    sums: &Sums<D, R, V>,
) {
    if AT < R {
        // SAFETY: in range by the contract of `PanelEnd`. Columns are read for each row: they would not all stay in registers.
        unsafe {
            let (columns, row) = (&*gemm.columns, *gemm.scales.add(first + AT));
            let mut values = [D::S::splat(0.0); V];
            for v in 0..V {
                let at = v * D::S::LANES;
                let product = D::S::to_float(D::finish(sums[AT][v]));
                let product = D::S::mul(product, D::S::load(columns.scale.as_ptr().add(at)));
                let offset = D::S::load(columns.offset.as_ptr().add(at));
                values[v] = value::<D::S>(row, product, offset, D::S::load(columns.bias.as_ptr().add(at)));
            }
            T::row::<D::S>(gemm, first + AT, values);
        }
    }
}
