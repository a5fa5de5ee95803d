//! What becomes of the sums of a tile that is as wide as a panel. Most become values that are stored; some go on as values while they
//! are in registers, which saves the next row pass from reading them.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "AVX-512 alone has tiles as wide as a panel"))]

use super::dot::Dot;
use super::gemm::{Gemm, Sink, affine};
use super::norm::Moments;
use super::rows::rise;
use super::simd::Simd;
use super::tile::{Sums, put};

/// Vectors of a panel.
const V: usize = 4;

/// # Safety
/// Of its function, as for [`Simd`], whose vectors must be a quarter of a panel; the rows must be in range.
pub(super) trait PanelEnd: Sized {
    /// Whether results are added to what stands where they go.
    const ADDS: bool;
    /// Hands over the sums of `R` rows from `row` on.
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>);
}

impl<T: Sink> PanelEnd for T {
    const ADDS: bool = false;

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

/// What is done with a row's values, vector by vector.
trait RowEnd: Sized {
    /// What is kept of the vectors of a row until its last.
    type Kept<S: Simd>: Copy;
    /// Stores the vector at `to`, and returns what is there now.
    unsafe fn store<S: Simd>(to: *mut f32, value: S::F) -> S::F;
    /// Of a row's first vector.
    unsafe fn first<S: Simd>(value: S::F) -> Self::Kept<S>;
    /// With the next one.
    unsafe fn next<S: Simd>(kept: Self::Kept<S>, value: S::F) -> Self::Kept<S>;
    /// Takes what was kept of a panel into what is known of the row.
    unsafe fn keep<S: Simd>(gemm: &Gemm<Self>, row: usize, kept: Self::Kept<S>);
}

impl RowEnd for Topped {
    type Kept<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut f32, value: S::F) -> S::F {
        // SAFETY: in range by the contract of `PanelEnd`.
        unsafe { S::store(to, value) };
        value
    }
    #[inline(always)]
    unsafe fn first<S: Simd>(value: S::F) -> S::F {
        value
    }
    #[inline(always)]
    unsafe fn next<S: Simd>(kept: S::F, value: S::F) -> S::F {
        // SAFETY: the instruction set is present by contract.
        unsafe { S::max(kept, value) }
    }
    #[inline(always)]
    unsafe fn keep<S: Simd>(gemm: &Gemm<Self>, row: usize, kept: S::F) {
        // SAFETY: there is a top for each row.
        unsafe { rise::<S>(gemm.tops.add(row), kept) }
    }
}

impl RowEnd for Added {
    type Kept<S: Simd> = Moments<S>;

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut f32, value: S::F) -> S::F {
        // SAFETY: in range by the contract of `PanelEnd`.
        unsafe {
            let sum = S::add(S::load(to), value);
            S::store(to, sum);
            sum
        }
    }
    #[inline(always)]
    unsafe fn first<S: Simd>(value: S::F) -> Moments<S> {
        // SAFETY: the instruction set is present by contract.
        unsafe { Moments::of(value) }
    }
    #[inline(always)]
    unsafe fn next<S: Simd>(kept: Moments<S>, value: S::F) -> Moments<S> {
        // SAFETY: the instruction set is present by contract.
        unsafe { kept.and(value) }
    }
    #[inline(always)]
    unsafe fn keep<S: Simd>(gemm: &Gemm<Self>, row: usize, kept: Moments<S>) {
        // SAFETY: there are sums for each row.
        unsafe { kept.take(gemm.sums.add(row)) }
    }
}

impl PanelEnd for Topped {
    const ADDS: bool = false;

    #[inline(always)]
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>) {
        // SAFETY: passed on.
        unsafe { rows::<D, Self, R>(gemm, row, sums) }
    }
}

impl PanelEnd for Added {
    const ADDS: bool = true;

    #[inline(always)]
    unsafe fn end<D: Dot, const R: usize>(gemm: &Gemm<Self>, row: usize, sums: &Sums<D, R, V>) {
        // SAFETY: passed on.
        unsafe { rows::<D, Self, R>(gemm, row, sums) }
    }
}

/// Column by column, so that what belongs to columns is read once, and what is kept of rows takes the place of sums. Written out: a
/// loop would keep the sums in memory.
#[inline(always)]
unsafe fn rows<D: Dot, T: RowEnd, const R: usize>(gemm: &Gemm<T>, row: usize, sums: &Sums<D, R, V>) {
    // SAFETY: in range by the contract of `PanelEnd`.
    unsafe {
        let values = values::<D, T, R, 0>(gemm, row, sums);
        let mut kept = [T::first::<D::S>(values[0]); R];
        for r in 1..R {
            kept[r] = T::first::<D::S>(values[r]);
        }
        next::<D, T, R, 1>(gemm, row, sums, &mut kept);
        next::<D, T, R, 2>(gemm, row, sums, &mut kept);
        next::<D, T, R, 3>(gemm, row, sums, &mut kept);
        for r in 0..R {
            T::keep::<D::S>(gemm, row + r, kept[r]);
        }
    }
}

/// What vector `AT` of each row is, once it is stored.
#[inline(always)]
unsafe fn values<D: Dot, T: RowEnd, const R: usize, const AT: usize>(
    gemm: &Gemm<T>,
    row: usize,
    sums: &Sums<D, R, V>,
) -> [<D::S as Simd>::F; R] {
    // SAFETY: in range by the contract of `PanelEnd`.
    unsafe {
        let at = AT * D::S::LANES;
        let columns = affine::<D::S, _>(gemm, at);
        let mut values = [D::S::splat(0.0); R];
        for r in 0..R {
            let value = columns.value::<D::S>(*gemm.scales.add(row + r), D::finish(sums[r][AT]));
            let to: *mut f32 = gemm.out.add((row + r) * gemm.out_stride).cast();
            values[r] = T::store::<D::S>(to.add(at), value);
        }
        values
    }
}

/// Takes vector `AT` of each row along.
#[inline(always)]
unsafe fn next<D: Dot, T: RowEnd, const R: usize, const AT: usize>(
    gemm: &Gemm<T>,
    row: usize,
    sums: &Sums<D, R, V>,
    kept: &mut [T::Kept<D::S>; R],
) {
    // SAFETY: in range by the contract of `PanelEnd`.
    unsafe {
        let values = values::<D, T, R, AT>(gemm, row, sums);
        for r in 0..R {
            kept[r] = T::next::<D::S>(kept[r], values[r]);
        }
    }
}
