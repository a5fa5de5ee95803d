//! The arithmetic forms of attention. A dword holds one f32, two s16 or four bytes; everything else is the same.

use std::marker::PhantomData;

use super::super::simd::{Simd, exp2, exp2_coarse};
use super::integers::{Integers, Multiply};
use crate::kernels::attention::{AttentionForm, KEY_BLOCK};

/// How numbers are coded in dwords, and how dwords of codes are multiplied.
///
/// # Safety
/// As for [`Simd`].
pub(in crate::kernels::arch) unsafe trait Products {
    /// The vectors.
    type S: Integers;
    /// `LANES` dwords of codes.
    type Codes: Copy;
    /// `LANES` sums of products.
    type Sums: Copy;

    const FORM: AttentionForm;
    /// Numbers in a dword.
    const GROUP: usize;
    /// Largest code of a query, key or value; 0 when codes are the numbers.
    const LARGEST: f32;

    unsafe fn zero() -> Self::Sums;
    unsafe fn load(from: *const f32) -> Self::Codes;
    /// One dword in all lanes.
    unsafe fn broadcast(from: *const f32) -> Self::Codes;
    /// Adds products of keys with a query; any constant of the query may be added besides.
    unsafe fn score(sums: Self::Sums, keys: Self::Codes, query: Self::Codes) -> Self::Sums;
    /// Adds products of weights with values.
    unsafe fn value(sums: Self::Sums, weight: Self::Codes, values: Self::Codes) -> Self::Sums;
    unsafe fn to_float(sums: Self::Sums) -> <Self::S as Simd>::F;

    /// Writes codes of `LANES` consecutive dimensions of a key, from number `at` of `to` on.
    unsafe fn store_key(to: *mut f32, at: usize, x: <Self::S as Simd>::F);
    /// The same of a query.
    unsafe fn store_query(to: *mut f32, at: usize, x: <Self::S as Simd>::F);
    /// Dwords of the codes of `GROUP` consecutive values of each lane's dimension.
    unsafe fn store_values(to: *mut f32, x: [<Self::S as Simd>::F; 4]);

    /// Turns a row of scores into weights `2^(scale · (score − highest))`, in place, and returns the weights' sum. `scale`
    /// is 1 where codes are the numbers; `width` is a multiple of `KEY_BLOCK`. Codes are not wider than scores, so that
    /// none is overwritten before it was read.
    unsafe fn weigh(scores: *mut f32, width: usize, highest: <Self::S as Simd>::F, scale: <Self::S as Simd>::F) -> f32;
}

/// Numbers as they are.
pub(in crate::kernels::arch) struct F32<S>(PhantomData<S>);

// SAFETY: made of the operations of `S`, whose contract is passed on.
unsafe impl<S: Integers> Products for F32<S> {
    type S = S;
    type Codes = S::F;
    type Sums = S::F;

    const FORM: AttentionForm = AttentionForm::F32;
    const GROUP: usize = 1;
    const LARGEST: f32 = 0.0;

    super::super::table::one! {
        fn zero() -> S::F = S::splat(0.0);
        fn load(from: *const f32) -> S::F = S::load(from);
        fn broadcast(from: *const f32) -> S::F = S::splat(*from);
        fn score(sums: S::F, keys: S::F, query: S::F) -> S::F = S::fma(query, keys, sums);
        fn value(sums: S::F, weight: S::F, values: S::F) -> S::F = S::fma(weight, values, sums);
        fn to_float(sums: S::F) -> S::F = sums;
        fn store_key(to: *mut f32, at: usize, x: S::F) = S::store(to.add(at), x);
        fn store_query(to: *mut f32, at: usize, x: S::F) = S::store(to.add(at), x);
        fn store_values(to: *mut f32, x: [S::F; 4]) = S::store(to, x[0]);
        fn weigh(scores: *mut f32, width: usize, highest: S::F, _scale: S::F) -> f32 = {
            let mut totals = [S::splat(0.0); 2];
            let mut i = 0;
            while i < width {
                // Which sum a weight is added to depends on its slot alone.
                for v in 0..KEY_BLOCK / S::LANES {
                    let score = scores.add(i + v * S::LANES);
                    // exp2 never goes below 2^−100; taking that off makes a hidden key's weight exactly 0.
                    let weight = exp2::<S>(S::sub(S::load(score), highest));
                    let weight = S::sub(weight, S::splat(f32::from_bits((127 - 100) << 23)));
                    S::store(score, weight);
                    totals[v % 2] = S::add(totals[v % 2], weight);
                }
                i += KEY_BLOCK;
            }
            S::sum(S::add(totals[0], totals[1]))
        };
    }
}

/// s16 of 12 bits with their sign. Sums of up to 256 products of weights and values, and of 512 of queries and keys, fit.
pub(in crate::kernels::arch) struct Words<S, D>(PhantomData<(S, D)>);

/// Base 2 logarithm of the largest weight in [`Words`], 4095.
const WORD_WEIGHT_LOG2: f32 = 11.999_648;

// SAFETY: made of the operations of `S` and `D`, whose contracts are passed on.
unsafe impl<S: Integers, D: Multiply<S>> Products for Words<S, D> {
    type S = S;
    type Codes = S::I;
    type Sums = S::I;

    const FORM: AttentionForm = AttentionForm::Int16;
    const GROUP: usize = 2;
    const LARGEST: f32 = 2047.0;

    super::super::table::one! {
        fn zero() -> S::I = S::splat_int(0);
        fn load(from: *const f32) -> S::I = S::load_int(from.cast());
        fn broadcast(from: *const f32) -> S::I = S::splat_int(*from.cast());
        fn score(sums: S::I, keys: S::I, query: S::I) -> S::I = D::words(sums, keys, query);
        fn value(sums: S::I, weight: S::I, values: S::I) -> S::I = D::words(sums, weight, values);
        fn to_float(sums: S::I) -> S::F = S::to_float(sums);
        fn store_key(to: *mut f32, at: usize, x: S::F) = S::store_s16(to.cast::<i16>().add(at), S::round(x));
        fn store_query(to: *mut f32, at: usize, x: S::F) = S::store_s16(to.cast::<i16>().add(at), S::round(x));
        fn store_values(to: *mut f32, x: [S::F; 4]) =
            S::store_int(to.cast(), S::pair(S::round(x[0]), S::round(x[1])));
        fn weigh(scores: *mut f32, width: usize, highest: S::F, scale: S::F) -> f32 = {
            let mut total = S::splat_int(0);
            let mut i = 0;
            while i < width {
                let below = S::sub(S::load(scores.add(i)), highest);
                let weight = S::round(exp2_coarse::<S>(S::fma(below, scale, S::splat(WORD_WEIGHT_LOG2))));
                S::store_s16(scores.cast::<i16>().add(i), weight);
                total = S::add_int(total, weight);
                i += S::LANES;
            }
            #[allow(clippy::cast_precision_loss, reason = "one rounding is within the error")]
            // Of 2^20 keys, each of at most 4,095: below 2^32.
            let total = S::sum_int(total).cast_unsigned() as f32;
            total
        };
    }
}

/// Keys u8 around 128, weights u8, queries and values s8.
pub(in crate::kernels::arch) struct Bytes<S, D>(PhantomData<(S, D)>);

// SAFETY: made of the operations of `S` and `D`, whose contracts are passed on.
unsafe impl<S: Integers, D: Multiply<S>> Products for Bytes<S, D> {
    type S = S;
    type Codes = S::I;
    type Sums = S::I;

    const FORM: AttentionForm = AttentionForm::Int8;
    const GROUP: usize = 4;
    const LARGEST: f32 = 127.0;

    super::super::table::one! {
        fn zero() -> S::I = S::splat_int(0);
        fn load(from: *const f32) -> S::I = S::load_int(from.cast());
        fn broadcast(from: *const f32) -> S::I = S::splat_int(*from.cast());
        // A key's 128 in every dimension adds 128 · Σ q to each of the query's scores, which softmax does not see.
        fn score(sums: S::I, keys: S::I, query: S::I) -> S::I = D::bytes(sums, keys, query);
        fn value(sums: S::I, weight: S::I, values: S::I) -> S::I = D::bytes(sums, weight, values);
        fn to_float(sums: S::I) -> S::F = S::to_float(sums);
        fn store_key(to: *mut f32, at: usize, x: S::F) =
            S::store_u8(to.cast::<u8>().add(at), S::round(S::add(x, S::splat(128.0))));
        fn store_query(to: *mut f32, at: usize, x: S::F) =
            S::store_u8(to.cast::<u8>().add(at), S::low_byte(S::round(x)));
        fn store_values(to: *mut f32, x: [S::F; 4]) = {
            let even = S::pair(S::round(x[0]), S::round(x[2]));
            let odd = S::pair(S::round(x[1]), S::round(x[3]));
            S::store_int(to.cast(), S::interleave(even, odd))
        };
        fn weigh(scores: *mut f32, width: usize, highest: S::F, scale: S::F) -> f32 = {
            #[allow(clippy::cast_precision_loss, reason = "below 2^24 for the lengths that this form is used at")]
            let total = S::weigh_bytes(scores, width, highest, scale) as f32;
            total
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_weight_is_the_largest_code() {
        assert!((4095f32.log2() - WORD_WEIGHT_LOG2).abs() < 1e-6);
        // 256 products of weights and values and 512 of queries and keys.
        assert!(256.0 * 4095.0 * 2047.0 < 2f64.powi(31) && 512.0 * 2047.0 * 2047.0 < 2f64.powi(31));
    }
}
