//! AArch64 Advanced SIMD with the dot-product extension.
//!
//! The dot product and the conversions to binary16 are written in assembly, because their intrinsics are not stable.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::attend::products::F32;
use super::attend::table::{Forms, attention};
use super::gemm::{Gemm, Sink, row_tiles};
use super::simd::Simd;
use super::table::{kernel_table, one};
use super::tile::{self, Tile};
use crate::kernels::AttentionForm;

/// Four lanes.
#[derive(Clone, Copy)]
pub(super) struct Neon;

// SAFETY: each function is a few instructions of Advanced SIMD, which the contract demands.
unsafe impl Simd for Neon {
    const LANES: usize = 4;
    type F = float32x4_t;
    type I = int32x4_t;

    one! {
        fn splat(x: f32) -> float32x4_t = vdupq_n_f32(x);
        fn load(from: *const f32) -> float32x4_t = vld1q_f32(from);
        fn store(to: *mut f32, x: float32x4_t) = vst1q_f32(to, x);
        fn load_half(from: *const u16) -> float32x4_t = {
            let half = vld1_u16(from);
            let wide: float32x4_t;
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) half, options(pure, nomem, nostack));
            wide
        };
        fn store_half(to: *mut u16, x: float32x4_t) = {
            let half: uint16x4_t;
            asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) half, in(vreg) x, options(pure, nomem, nostack));
            vst1_u16(to, half);
        };
        fn load_s8(from: *const i8) -> float32x4_t = {
            let four = vreinterpret_s8_s32(vdup_n_s32(from.cast::<i32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(four))))
        };
        fn store_u8(to: *mut u8, x: int32x4_t) = {
            let words = vmovn_u32(vreinterpretq_u32_s32(x));
            let bytes = vmovn_u16(vcombine_u16(words, words));
            to.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_u8(bytes)));
        };
        fn store_int(to: *mut i32, x: int32x4_t) = vst1q_s32(to, x);
        fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
        fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
        fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
        fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t = vdivq_f32(a, b);
        fn abs(x: float32x4_t) -> float32x4_t = vabsq_f32(x);
        fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t = vfmaq_f32(c, a, b);
        fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
        fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
        fn round(x: float32x4_t) -> int32x4_t = vcvtnq_s32_f32(x);
        fn to_float(x: int32x4_t) -> float32x4_t = vcvtq_f32_s32(x);
        fn power_of_two(x: int32x4_t) -> float32x4_t =
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(x, vdupq_n_s32(127))));
        fn sum(x: float32x4_t) -> f32 = vaddvq_f32(x);
        fn lowest(x: float32x4_t) -> f32 = vminvq_f32(x);
        fn highest(x: float32x4_t) -> f32 = vmaxvq_f32(x);
    }
}

/// `sums[n] += Σ_j weights[n][j] · codes[j]`, all s8.
#[inline(always)]
pub(super) unsafe fn dot(sums: int32x4_t, weights: int8x16_t, codes: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: SDOT is part of the dot-product extension, which the callers' contract demands.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums, in(vreg) weights, in(vreg) codes,
            options(pure, nomem, nostack)
        );
    }
    sums
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn tile<T: Sink, const R: usize>(gemm: &Gemm<T>, tile: Tile) {
    // SAFETY: passed on unchanged, under the target features that the body needs.
    unsafe { tile::dense::<Neon, T, R, 4>(gemm, tile) }
}

/// `gemm_u8i8_neon_dotprod`: 4x16 tiles.
#[target_feature(enable = "neon,dotprod")]
unsafe fn gemm<T: Sink>(gemm: &Gemm<T>) {
    for column in (0..64).step_by(16) {
        for (row, n_rows) in row_tiles(gemm.n_rows, 4) {
            // SAFETY: passed on; rows and columns are in range.
            unsafe {
                let at = Tile { row, column, codes: gemm.codes.add(row * gemm.stride), stride: gemm.stride };
                match n_rows {
                    0 => {}
                    1 => tile::<T, 1>(gemm, at),
                    2 => tile::<T, 2>(gemm, at),
                    3 => tile::<T, 3>(gemm, at),
                    _ => tile::<T, 4>(gemm, at),
                }
            }
        }
    }
}

kernel_table! {
    #[target_feature(enable = "neon,dotprod")]
    "gemm_u8i8_neon_dotprod", gemm, Neon, 48,
    Forms {
        preferred: &[AttentionForm::F32],
        tables: &[
            attention!(#[target_feature(enable = "neon,dotprod")] F32<Neon>, 4, 4, 4),
        ],
    }
}
