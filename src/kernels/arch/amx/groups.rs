//! Matrix products with scales per group of inputs, on the squares and strips of dense ones.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::avx512::Avx512;
use super::super::gemm::{Gemm, ValueSink};
use super::super::groups::Groups;
use super::super::products::amx::any;
use super::super::tile::put_product;
use super::{STEP_GROUPS, Steps, Sums, TILE, shape_tiles, square, strip};
use crate::kernels::layout::PANEL;

/// Sums that were scaled by group, as far as they have come.
#[repr(C, align(64))]
struct Values([f32; 4 * TILE * TILE]);

/// Adds the sums of a group, `V` tiles side by side, to the values, each column's times its scale.
///
/// # Safety
/// AVX-512 must be there; the sums must have been written, and `scales` hold the columns.
#[inline(always)]
unsafe fn add_scaled<const V: usize>(sums: &Sums, scales: *const f32, values: &mut Values) {
    // SAFETY: as the contract says.
    unsafe {
        for v in 0..V {
            let scale = _mm512_loadu_ps(scales.add(v * TILE));
            for r in 0..4 * TILE / V {
                let at = (r * V + v) * TILE;
                let sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.0.as_ptr().add(at).cast()));
                let value = values.0.as_mut_ptr().add(at);
                _mm512_store_ps(value, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(value)));
            }
        }
    }
}

/// [`put`](super::put) of values.
///
/// # Safety
/// As for [`put`](super::put).
#[inline(always)]
unsafe fn put_values<T: ValueSink, const V: usize>(
    gemm: &Gemm<T>,
    first: usize,
    rows: Range<usize>,
    column: usize,
    values: &Values,
) {
    // SAFETY: as the contract says.
    unsafe {
        for r in rows {
            for v in 0..V {
                let value = _mm512_load_ps(values.0.as_ptr().add((r * V + v) * TILE));
                put_product::<Avx512, T>(gemm, first + r, column + v * TILE, value, 0);
            }
        }
    }
}

/// Scales per group of inputs, of whole steps and without offsets; other groups are AVX-512's.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(in crate::kernels::arch) unsafe fn groups<T: ValueSink>(args: &Groups<T>) {
    let gemm = &args.gemm;
    let whole_steps = args.group.is_multiple_of(4 * STEP_GROUPS) && args.n_in.is_multiple_of(args.group);
    if gemm.n_rows < TILE || !whole_steps || !args.offsets.is_null() {
        // SAFETY: passed on unchanged.
        return unsafe { any::in_groups(args) };
    }
    // SAFETY: as in `gemm`.
    unsafe { shape_tiles() };
    let steps = |group: usize| Steps {
        weights: gemm.weights.wrapping_add(group * args.group * PANEL),
        n_whole: args.group / (4 * STEP_GROUPS),
        rest: std::ptr::null(),
    };
    let n_groups = args.n_in / args.group;
    let mut sums = Sums([const { MaybeUninit::uninit() }; 4 * TILE * TILE]);
    let whole = gemm.n_rows / (2 * TILE) * (2 * TILE);
    // SAFETY: as in `gemm`; there are `n_groups` scales.
    unsafe {
        for first in [0, 2 * TILE] {
            for row in (0..whole).step_by(2 * TILE) {
                let mut values = Values([0.0; 4 * TILE * TILE]);
                for group in 0..n_groups {
                    let codes = gemm.codes.add(row * gemm.stride + group * args.group);
                    square(codes, gemm.stride, steps(group).from(first), false, std::ptr::null(), &mut sums);
                    add_scaled::<2>(&sums, (*args.scales.add(group)).as_ptr().add(first), &mut values);
                }
                put_values::<T, 2>(gemm, row, 0..2 * TILE, first, &values);
            }
        }
        let mut row = whole;
        while row < gemm.n_rows {
            let start = row.min(gemm.n_rows - TILE);
            let mut values = Values([0.0; 4 * TILE * TILE]);
            for group in 0..n_groups {
                let codes = gemm.codes.add(start * gemm.stride + group * args.group);
                strip(codes, gemm.stride, steps(group), &mut sums);
                add_scaled::<4>(&sums, (*args.scales.add(group)).as_ptr(), &mut values);
            }
            put_values::<T, 4>(gemm, start, row - start..TILE, 0, &values);
            row = start + TILE;
        }
    }
}
