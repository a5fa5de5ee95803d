//! The products of [`super::full`] with `vpdpbusd`.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;

use super::full::{Keys, Lanes, PAIR, Products, QUERY_STRIDE, Sums, TILE, Tiles, Values, WEIGHT_STRIDE, seen};
use super::{score_sums, value_sums};
use crate::kernels::attention::KEY_BLOCK;

/// AVX-512 with VNNI.
pub(in crate::kernels::arch) struct Avx512Tiles;

/// Calls `$part` for runs of `$size` of `$n` queries, the first of which is `$first`, as long as there are so many.
macro_rules! in_parts {
    ($n:expr, |$first:ident| $($size:literal => $part:expr),* $(,)?) => {{
        let mut $first = 0;
        $(while $n - $first >= $size {
            $part;
            $first += $size;
        })*
    }};
}

// SAFETY: AVX-512 with VNNI, which the contract demands.
unsafe impl Tiles for Avx512Tiles {
    const WHOLE_STEPS: bool = false;

    #[inline(always)]
    unsafe fn prepare() {}

    #[inline(always)]
    unsafe fn scores(
        queries: *const u8,
        n_queries: usize,
        keys: Keys,
        to: *mut u8,
        stride: usize,
        highest: &mut Lanes,
    ) {
        // SAFETY: in range by contract.
        unsafe {
            in_parts! { n_queries, |q|
                8 => score::<8, 2>(queries.add(q * QUERY_STRIDE), keys, to.add(q * stride), stride, &mut highest[q..]),
                4 => score::<4, 4>(queries.add(q * QUERY_STRIDE), keys, to.add(q * stride), stride, &mut highest[q..]),
                1 => score::<1, 4>(queries.add(q * QUERY_STRIDE), keys, to.add(q * stride), stride, &mut highest[q..]),
            }
        }
    }

    #[inline(always)]
    unsafe fn context(weights: *const u8, n_queries: usize, values: Values, sums: &mut Sums) {
        let to: *mut i32 = sums.0.as_mut_ptr().cast();
        // SAFETY: in range by contract.
        unsafe {
            in_parts! { n_queries, |q|
                8 => add_up::<8>(weights.add(q * WEIGHT_STRIDE), values, to.add(q * PAIR)),
                4 => add_up::<4>(weights.add(q * WEIGHT_STRIDE), values, to.add(q * PAIR)),
                1 => add_up::<1>(weights.add(q * WEIGHT_STRIDE), values, to.add(q * PAIR)),
            }
        }
    }
}

/// Scores of `Q` queries with all keys, `V` blocks at a time.
///
/// # Safety
/// As for [`Tiles::scores`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn score<const Q: usize, const V: usize>(
    queries: *const u8,
    keys: Keys,
    to: *mut u8,
    stride: usize,
    highest: &mut [__m512i],
) {
    let mut largest = [_mm512_set1_epi32(i32::MIN); Q];
    let mut key = 0;
    while key < keys.n_slots {
        // SAFETY: in range by contract.
        unsafe {
            if key + V * KEY_BLOCK <= keys.n_slots {
                if keys.d == 32 {
                    score_blocks::<Q, V, 8>(queries, keys, key, to, stride, &mut largest);
                } else {
                    score_blocks::<Q, V, 0>(queries, keys, key, to, stride, &mut largest);
                }
                key += V * KEY_BLOCK;
            } else {
                score_blocks::<Q, 1, 0>(queries, keys, key, to, stride, &mut largest);
                key += KEY_BLOCK;
            }
        }
    }
    highest[..Q].copy_from_slice(&largest);
}

/// Scores of `Q` queries with `V` blocks of keys from `key` on; `GROUPS` as in [`score_sums`].
#[inline(always)]
unsafe fn score_blocks<const Q: usize, const V: usize, const GROUPS: usize>(
    queries: *const u8,
    keys: Keys,
    key: usize,
    to: *mut u8,
    stride: usize,
    largest: &mut [__m512i; Q],
) {
    // SAFETY: in range by the contract of `score`.
    unsafe {
        let (from, to) = (keys.first.add(key * keys.d), to.add(4 * key));
        let sums = score_sums::<Products, Q, V, GROUPS>(queries.cast(), QUERY_STRIDE / 4, from.cast(), keys.d / 4);
        let whole = key + V * KEY_BLOCK <= keys.n_keys;
        for q in 0..Q {
            for v in 0..V {
                _mm512_storeu_si512(to.add(q * stride + v * 4 * KEY_BLOCK).cast(), sums[q][v]);
                if v + 1 < V || whole {
                    largest[q] = _mm512_max_epi32(largest[q], sums[q][v]);
                } else {
                    // Only the last block is not whole.
                    largest[q] = _mm512_mask_max_epi32(largest[q], seen(keys.n_keys), largest[q], sums[q][v]);
                }
            }
        }
    }
}

/// Sums of weights times values, `Q` queries by [`PAIR`] dimensions.
///
/// # Safety
/// As for [`Tiles::context`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn add_up<const Q: usize>(weights: *const u8, values: Values, to: *mut i32) {
    // SAFETY: in range by contract.
    unsafe {
        let (first, width, line) = (values.first.cast(), WEIGHT_STRIDE / 4, values.line / 4);
        let sums = value_sums::<Products, Q, 2>(weights.cast(), width, first, line, values.n_keys / 4);
        for q in 0..Q {
            for v in 0..2 {
                _mm512_storeu_si512(to.add(q * PAIR + v * TILE).cast(), sums[q][v]);
            }
        }
    }
}
