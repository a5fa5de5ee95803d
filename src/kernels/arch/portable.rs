//! Plain Rust, for machines without any of the other instruction sets. Written so that compilers vectorise it.
#![allow(clippy::inline_always, reason = "bodies must be inlined into their instantiations")]

use super::attend::integers::Plain;
use super::attend::products::{Bytes, F32, Words};
use super::attend::table::{Forms, attention};
use super::gemm::{Gemm, Sink};
use super::simd::Simd;
use super::table::{kernel_table, one};
use crate::kernels::AttentionForm;
use crate::kernels::half::{f32_to_half, half_to_f32};
use crate::kernels::layout::PANEL;

/// Four lanes.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; 4] {
    [f(0), f(1), f(2), f(3)]
}

// SAFETY: no instruction set is needed; pointers are valid for four lanes by contract.
unsafe impl Simd for Portable {
    const LANES: usize = 4;
    type F = [f32; 4];
    type I = [i32; 4];

    one! {
        fn splat(x: f32) -> [f32; 4] = [x; 4];
        fn load(from: *const f32) -> [f32; 4] = from.cast::<[f32; 4]>().read_unaligned();
        fn store(to: *mut f32, x: [f32; 4]) = to.cast::<[f32; 4]>().write_unaligned(x);
        fn load_half(from: *const u16) -> [f32; 4] = from.cast::<[u16; 4]>().read_unaligned().map(half_to_f32);
        fn store_half(to: *mut u16, x: [f32; 4]) = to.cast::<[u16; 4]>().write_unaligned(x.map(f32_to_half));
        fn load_s8(from: *const i8) -> [f32; 4] = from.cast::<[i8; 4]>().read_unaligned().map(f32::from);
        fn store_u8(to: *mut u8, x: [i32; 4]) = {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the low byte is asked for")]
            to.cast::<[u8; 4]>().write_unaligned(x.map(|lane| lane as u8));
        };
        fn store_int(to: *mut i32, x: [i32; 4]) = to.cast::<[i32; 4]>().write_unaligned(x);
        fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] = each(|i| a[i] + b[i]);
        fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] = each(|i| a[i] - b[i]);
        fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] = each(|i| a[i] * b[i]);
        fn div(a: [f32; 4], b: [f32; 4]) -> [f32; 4] = each(|i| a[i] / b[i]);
        fn abs(x: [f32; 4]) -> [f32; 4] = x.map(f32::abs);
        fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] = each(|i| a[i] * b[i] + c[i]);
        fn min(a: [f32; 4], b: [f32; 4]) -> [f32; 4] = each(|i| if a[i] < b[i] { a[i] } else { b[i] });
        fn max(a: [f32; 4], b: [f32; 4]) -> [f32; 4] = each(|i| if a[i] > b[i] { a[i] } else { b[i] });
        fn round(x: [f32; 4]) -> [i32; 4] = {
            #[allow(clippy::cast_possible_truncation, reason = "an integer below 2^22 by contract")]
            x.map(|lane| ((lane + ROUNDER) - ROUNDER) as i32)
        };
        fn to_float(x: [i32; 4]) -> [f32; 4] = {
            #[allow(clippy::cast_precision_loss, reason = "rounding is what the other instruction sets do")]
            x.map(|lane| lane as f32)
        };
        fn power_of_two(x: [i32; 4]) -> [f32; 4] = {
            #[allow(clippy::cast_sign_loss, reason = "above −127 by contract")]
            x.map(|lane| f32::from_bits(((lane + 127) as u32) << 23))
        };
        fn sum(x: [f32; 4]) -> f32 = (x[0] + x[2]) + (x[1] + x[3]);
        fn lowest(x: [f32; 4]) -> f32 = x[0].min(x[1]).min(x[2].min(x[3]));
        fn highest(x: [f32; 4]) -> f32 = x[0].max(x[1]).max(x[2].max(x[3]));
    }
}

/// `gemm_u8i8_portable`: a row by 16 columns.
unsafe fn gemm<T: Sink>(gemm: &Gemm<T>) {
    for row in 0..gemm.n_rows {
        for column in (0..PANEL).step_by(16) {
            let mut sums = [0i32; 16];
            // SAFETY: rows and columns are in range (the façade's checks).
            unsafe {
                for group in 0..gemm.k_groups {
                    let codes = gemm.codes.add(row * gemm.stride + group * 4).cast::<[u8; 4]>().read_unaligned();
                    let weights = gemm.weights.add((group * PANEL + column) * 4).cast::<[[i8; 4]; 16]>();
                    let weights = weights.read_unaligned();
                    for c in 0..16 {
                        for j in 0..4 {
                            sums[c] += i32::from(codes[j]) * i32::from(weights[c][j]);
                        }
                    }
                }
                for c in (0..16).step_by(4) {
                    let columns = T::columns::<Portable>(gemm, column + c);
                    let four = [sums[c], sums[c + 1], sums[c + 2], sums[c + 3]];
                    T::put::<Portable>(gemm, row, column + c, columns, four);
                }
            }
        }
    }
}

kernel_table! {
    #[inline(never)]
    "gemm_u8i8_portable", gemm, Portable, 48,
    Forms {
        preferred: &[AttentionForm::F32],
        tables: &[
            attention!(#[inline(never)] F32<Portable>, 2, 4, 4),
            attention!(#[inline(never)] Words<Portable, Plain>, 2, 4, 4),
            attention!(#[inline(never)] Bytes<Portable, Plain>, 2, 4, 4),
        ],
    }
}
