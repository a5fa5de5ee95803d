//! [`Dot`] with the dot-product extension of AArch64.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::aarch64::*;

use super::dot::{Dot, codes_as_they_are, dots};
use super::neon::{Neon, dot};

// SAFETY: each function is a few instructions of Advanced SIMD or the dot-product extension, which the contract demands.
unsafe impl Dot for Neon {
    type S = Self;
    type B = uint8x16_t;
    type W = int8x16_t;
    type C = int8x16_t;
    type A = int32x4_t;
    /// Codes are u8 and the dot product wants s8: `Σ a w = Σ (a − 128) w + 128 Σ w`.
    const CODE_BIAS: i32 = 128;

    codes_as_they_are!();
    dots! {
        fn finish(sums: int32x4_t) -> int32x4_t = sums;
        fn zero() -> int32x4_t = vdupq_n_s32(0);
        fn start(sums: *const i32) -> int32x4_t = vshlq_n_s32::<7>(vld1q_s32(sums));
        fn bytes(from: *const u8) -> uint8x16_t = vld1q_u8(from);
        fn spread(from: *const i8) -> uint8x16_t = {
            let four = vreinterpretq_u8_u32(vdupq_n_u32(from.cast::<u32>().read_unaligned()));
            let lanes: [u8; 16] = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
            vqtbl1q_u8(four, vld1q_u8(lanes.as_ptr()))
        };
        fn low(x: uint8x16_t) -> uint8x16_t = vandq_u8(x, vdupq_n_u8(15));
        fn high(x: uint8x16_t) -> uint8x16_t = vshrq_n_u8::<4>(x);
        fn lookup(table: uint8x16_t, index: uint8x16_t) -> uint8x16_t = vqtbl1q_u8(table, index);
        fn table(from: *const i8) -> uint8x16_t = vld1q_u8(from.cast());
        fn sub(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t = vsubq_u8(a, b);
        fn keep(x: uint8x16_t, mask: u32) -> uint8x16_t = vandq_u8(x, vreinterpretq_u8_u32(vdupq_n_u32(mask)));
        fn weights(x: uint8x16_t) -> int8x16_t = vreinterpretq_s8_u8(x);
        fn codes(from: *const u8) -> int8x16_t = {
            let codes = vdupq_n_u32(from.cast::<u32>().read_unaligned());
            vreinterpretq_s8_u32(veorq_u32(codes, vdupq_n_u32(0x8080_8080)))
        };
        fn dot(sums: int32x4_t, codes: int8x16_t, weights: int8x16_t) -> int32x4_t = dot(sums, weights, codes);
    }
}
