//! The products of [`super::full`] with `vpdpbusd`.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;

use super::full::{PAIR, QUERY_STRIDE, Sums, TILE, Tiles, Values, WEIGHT_STRIDE};
use crate::kernels::attention::KEY_BLOCK;

/// AVX-512 with VNNI.
pub(in crate::kernels::arch) struct Avx512Tiles;

/// Calls `$part::<Q, ..>(first, ..)` for the largest parts that `$n` queries have.
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
        keys: *const u8,
        d: usize,
        n_slots: usize,
        to: *mut u8,
        stride: usize,
    ) {
        // SAFETY: in range by contract.
        unsafe {
            in_parts! { n_queries, |q|
                16 => score::<16, 1>(queries, keys, d, n_slots, to, stride),
                8 => score::<8, 2>(queries.add(q * QUERY_STRIDE), keys, d, n_slots, to.add(q * stride), stride),
                4 => score::<4, 4>(queries.add(q * QUERY_STRIDE), keys, d, n_slots, to.add(q * stride), stride),
                1 => score::<1, 4>(queries.add(q * QUERY_STRIDE), keys, d, n_slots, to.add(q * stride), stride),
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

#[inline(always)]
unsafe fn broadcast(from: *const u8) -> __m512i {
    // SAFETY: AVX-512 F is there, and four bytes, by contract.
    unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
}

/// Scores of `Q` queries with all keys, `V` blocks at a time.
///
/// # Safety
/// As for [`Tiles::scores`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn score<const Q: usize, const V: usize>(
    queries: *const u8,
    keys: *const u8,
    d: usize,
    n_slots: usize,
    to: *mut u8,
    stride: usize,
) {
    let mut key = 0;
    while key < n_slots {
        // SAFETY: in range by contract.
        unsafe {
            let (from, to) = (keys.add(key * d), to.add(4 * key));
            if key + V * KEY_BLOCK <= n_slots {
                if d == 32 {
                    score_blocks::<Q, V, 8>(queries, from, d, to, stride);
                } else {
                    score_blocks::<Q, V, 0>(queries, from, d, to, stride);
                }
                key += V * KEY_BLOCK;
            } else {
                score_blocks::<Q, 1, 0>(queries, from, d, to, stride);
                key += KEY_BLOCK;
            }
        }
    }
}

/// Scores of `Q` queries with `V` blocks of keys. `GROUPS` is the number of groups of four dimensions if it is known.
#[inline(always)]
unsafe fn score_blocks<const Q: usize, const V: usize, const GROUPS: usize>(
    queries: *const u8,
    keys: *const u8,
    d: usize,
    to: *mut u8,
    stride: usize,
) {
    // SAFETY: in range by the contract of `score`.
    unsafe {
        let n_groups = if GROUPS > 0 { GROUPS } else { d / 4 };
        let mut sums = [[_mm512_setzero_si512(); V]; Q];
        for group in 0..n_groups {
            let mut key = [_mm512_setzero_si512(); V];
            for v in 0..V {
                key[v] = _mm512_loadu_si512(keys.add(v * KEY_BLOCK * d + group * 4 * KEY_BLOCK).cast());
            }
            for q in 0..Q {
                let query = broadcast(queries.add(q * QUERY_STRIDE + group * 4));
                for v in 0..V {
                    sums[q][v] = _mm512_dpbusd_epi32(sums[q][v], key[v], query);
                }
            }
        }
        for q in 0..Q {
            for v in 0..V {
                _mm512_storeu_si512(to.add(q * stride + v * 4 * KEY_BLOCK).cast(), sums[q][v]);
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
        let mut sums = [[_mm512_setzero_si512(); 2]; Q];
        for group in 0..values.n_keys / 4 {
            let from = values.first.add(group * values.line);
            let value = [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(4 * TILE).cast())];
            for q in 0..Q {
                let weight = broadcast(weights.add(q * WEIGHT_STRIDE + group * 4));
                for v in 0..2 {
                    sums[q][v] = _mm512_dpbusd_epi32(sums[q][v], weight, value[v]);
                }
            }
        }
        for q in 0..Q {
            for v in 0..2 {
                _mm512_storeu_si512(to.add(q * PAIR + v * TILE).cast(), sums[q][v]);
            }
        }
    }
}
