//! Coding of queries, keys and values in bytes with AVX-512 for heads whose dimensions lie in whole vectors of 32, read and packed
//! in pairs of vectors; every other head is [`super::pack()`]'s and [`super::full::code_queries`]'. Codes and layout are the same.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::avx512::{Avx512, in_order};
use super::super::simd::Simd;
use super::full::{MAX_D, PAIR, PerQuery, Products, QUERY_STRIDE, TILE, reduce};
use super::integers::Integers;
use super::pack::{Columns, LEAST_LARGEST, Third};
use super::products::Products as ProductsOf;
use super::{Head, LEAST_QUERY, exponent_unit};
use crate::kernels::attention::{CacheLine, KEY_BLOCK, KeySlots};
use crate::kernels::layout::PANEL;

const MOST: f32 = <Products as ProductsOf>::LARGEST;

/// One third of a head, if it can be read in pairs of vectors.
#[inline(always)]
fn columns<'a>(head: &Head<'a>, third: Third) -> Option<Columns<'a>> {
    let columns = Columns::new(head, third);
    (columns.are_whole(PAIR) && head.heads.d_padded() <= MAX_D).then_some(columns)
}

#[inline(always)]
unsafe fn pair(from: *const u16) -> [__m512; 2] {
    // SAFETY: AVX-512 F; `from` holds two vectors of binary16, by contract.
    unsafe { [Avx512::load_half(from), Avx512::load_half(from.add(TILE))] }
}

/// Writes the step of each of `PAIR` dimensions to `step`, and returns the inverses.
#[inline(always)]
unsafe fn steps(from: *const u16, len: usize, step: *mut f32) -> [__m512; 2] {
    // SAFETY: AVX-512 F and BW; `from` is `[len, PANEL]`, `step` holds `PAIR`.
    unsafe {
        // Numbers of binary16 that are not negative are in the order of their bits.
        let magnitude = _mm512_set1_epi16(0x7fff);
        let mut largest = [_mm512_setzero_si512(); 4];
        let whole = len / 4 * 4;
        for position in (0..whole).step_by(4) {
            for chain in 0..4 {
                let x = _mm512_loadu_si512(from.add((position + chain) * PANEL).cast());
                largest[chain] = _mm512_max_epu16(largest[chain], _mm512_and_si512(x, magnitude));
            }
        }
        for position in whole..len {
            let x = _mm512_loadu_si512(from.add(position * PANEL).cast());
            largest[0] = _mm512_max_epu16(largest[0], _mm512_and_si512(x, magnitude));
        }
        let largest = [_mm512_max_epu16(largest[0], largest[1]), _mm512_max_epu16(largest[2], largest[3])];
        let largest = _mm512_max_epu16(largest[0], largest[1]);
        let halves = [_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64::<1>(largest)];
        let mut inverses = [_mm512_setzero_ps(); 2];
        for v in 0..2 {
            let largest = _mm512_max_ps(_mm512_cvtph_ps(halves[v]), _mm512_set1_ps(LEAST_LARGEST));
            _mm512_storeu_ps(step.add(v * TILE), _mm512_mul_ps(largest, _mm512_set1_ps(1.0 / MOST)));
            inverses[v] = _mm512_div_ps(_mm512_set1_ps(MOST), largest);
        }
        inverses
    }
}

/// Packs `PAIR` dimensions of [`KEY_BLOCK`] keys, of which there are `n`, as `[PAIR / 4][KEY_BLOCK]` dwords.
#[inline(always)]
unsafe fn pack_keys(from: *const u16, n: usize, inverses: [__m512; 2], to: *mut u8) {
    // SAFETY: AVX-512 F and BW; `from` is `[n, PANEL]`, `to` holds the block.
    unsafe {
        let zero = _mm512_set1_ps(128.0);
        // Pairs of keys; in each quarter `q` two dwords of either, of groups of dimensions `q` and `4 + q`.
        let mut pairs = [_mm512_setzero_si512(); KEY_BLOCK / 2];
        for p in 0..KEY_BLOCK / 2 {
            let mut words = [_mm512_set1_epi16(128); 2];
            for k in 0..2 {
                if 2 * p + k < n {
                    let x = pair(from.add((2 * p + k) * PANEL));
                    let low = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(x[0], inverses[0]), zero));
                    let high = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(x[1], inverses[1]), zero));
                    words[k] = _mm512_packs_epi32(low, high);
                }
            }
            pairs[p] = _mm512_packus_epi16(words[0], words[1]);
        }
        // Groups `q` and `4 + q` of four keys; then the quarters of all sixteen.
        let mut fours = [[_mm512_setzero_si512(); 4]; 2];
        for i in 0..4 {
            let (a, b) = (_mm512_castsi512_ps(pairs[2 * i]), _mm512_castsi512_ps(pairs[2 * i + 1]));
            fours[0][i] = _mm512_castps_si512(_mm512_shuffle_ps::<0x88>(a, b));
            fours[1][i] = _mm512_castps_si512(_mm512_shuffle_ps::<0xdd>(a, b));
        }
        for (half, [a, b, c, d]) in fours.into_iter().enumerate() {
            let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            let groups = [
                _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even),
                _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd),
                _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even),
                _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd),
            ];
            for (q, group) in groups.into_iter().enumerate() {
                _mm512_storeu_si512(to.add((4 * half + q) * KEY_BLOCK * 4).cast(), group);
            }
        }
    }
}

/// Packs `PAIR` dimensions of [`KEY_BLOCK`] values, of which there are `n`, as dwords of four keys, groups `line` bytes apart.
#[inline(always)]
unsafe fn pack_values(from: *const u16, n: usize, inverses: [__m512; 2], to: *mut u8, line: usize) {
    // SAFETY: AVX-512 F and BW; `from` is `[n, PANEL]`, `to` holds the block.
    unsafe {
        for group in 0..KEY_BLOCK / 4 {
            let mut codes = [[_mm512_setzero_si512(); 4]; 2];
            for k in 0..4 {
                if group * 4 + k < n {
                    let x = pair(from.add((group * 4 + k) * PANEL));
                    for v in 0..2 {
                        codes[v][k] = _mm512_cvtps_epi32(_mm512_mul_ps(x[v], inverses[v]));
                    }
                }
            }
            for (v, codes) in codes.into_iter().enumerate() {
                let even = Avx512::pair(codes[0], codes[2]);
                let odd = Avx512::pair(codes[1], codes[3]);
                let bytes = Avx512::interleave(even, odd);
                _mm512_storeu_si512(to.add(group * line + v * 4 * TILE).cast(), bytes);
            }
        }
    }
}

/// [`super::pack()`] in bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(in crate::kernels::arch) unsafe fn pack(head: &Head<'_>, packed: *mut CacheLine, scratch: *mut f32) {
    // SAFETY: `packed` holds `lines` and `scratch` holds `scratch` for this head (the façade's checks).
    unsafe {
        let (key_columns, value_columns) = match (columns(head, Third::Key), columns(head, Third::Value)) {
            (Some(keys), Some(values)) if head.slots == KeySlots::NATURAL => (keys, values),
            _ => return super::pack::<Products>(head, packed, scratch),
        };
        let (d, len) = (head.heads.d_padded(), head.len);
        let n_slots = head.slots.n_slots(len);
        let step: *mut f32 = packed.cast();
        let keys: *mut u8 = step.add(2 * d).cast();
        let values = keys.add(n_slots * d);
        for j in (0..d).step_by(PAIR) {
            let (key, value) = (key_columns.start(j), value_columns.start(j));
            let key_inverses = steps(key, len, step.add(j));
            let value_inverses = steps(value, len, step.add(d + j));
            for first in (0..n_slots).step_by(KEY_BLOCK) {
                let (key, value) = (key.add(first * PANEL), value.add(first * PANEL));
                let (to_keys, to_values) = (keys.add(first * d + j * KEY_BLOCK), values.add(first * d + 4 * j));
                if first + KEY_BLOCK <= len {
                    pack_keys(key, KEY_BLOCK, key_inverses, to_keys);
                    pack_values(value, KEY_BLOCK, value_inverses, to_values, 4 * d);
                } else {
                    pack_keys(key, len - first, key_inverses, to_keys);
                    pack_values(value, len - first, value_inverses, to_values, 4 * d);
                }
            }
        }
    }
}

/// Codes [`TILE`] queries from the one at `position` on, of which there are `size`; returns what the scores of each are multiplied
/// with. `None` if the head cannot be read so.
///
/// # Safety
/// AVX-512 must be there; `to` is `[16, QUERY_STRIDE]`, `steps` one per dimension.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn code_queries(
    head: &Head<'_>,
    position: usize,
    size: usize,
    steps: *const f32,
    to: *mut u8,
) -> Option<__m512> {
    // SAFETY: as the contract says.
    unsafe {
        let columns = columns(head, Third::Query)?;
        let d = head.heads.d_padded();
        let mut largest = [_mm512_castps_si512(_mm512_set1_ps(LEAST_QUERY)); TILE];
        let mut scaled = [[const { MaybeUninit::<[__m512; 2]>::uninit() }; TILE]; MAX_D / PAIR];
        for (part, j) in (0..d).step_by(PAIR).enumerate() {
            let from = columns.start(j).add(position * PANEL);
            let step = [_mm512_loadu_ps(steps.add(j)), _mm512_loadu_ps(steps.add(j + TILE))];
            for q in 0..TILE {
                // Behind the last query it is coded again.
                let x = pair(from.add(q.min(size - 1) * PANEL));
                let x = [_mm512_mul_ps(x[0], step[0]), _mm512_mul_ps(x[1], step[1])];
                scaled[part][q].write(x);
                // Numbers that are not negative are in the order of their bits.
                let magnitudes = [_mm512_castps_si512(_mm512_abs_ps(x[0])), _mm512_castps_si512(_mm512_abs_ps(x[1]))];
                largest[q] = _mm512_max_epi32(largest[q], _mm512_max_epi32(magnitudes[0], magnitudes[1]));
            }
        }
        let largest = _mm512_castsi512_ps(reduce!(largest, _mm512_max_epi32));
        let inverse = PerQuery::new(_mm512_div_ps(_mm512_set1_ps(MOST), largest));
        for part in 0..d / PAIR {
            for q in (0..TILE).step_by(2) {
                let mut words = [_mm512_setzero_si512(); 2];
                for k in 0..2 {
                    let inverse = _mm512_set1_ps(inverse.0[q + k]);
                    let x = scaled[part][q + k].assume_init();
                    let low = _mm512_cvtps_epi32(_mm512_mul_ps(x[0], inverse));
                    words[k] = _mm512_packs_epi32(low, _mm512_cvtps_epi32(_mm512_mul_ps(x[1], inverse)));
                }
                let both = in_order(_mm512_packs_epi16(words[0], words[1]));
                let to = to.add(q * QUERY_STRIDE + part * PAIR);
                _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(both));
                _mm256_storeu_si256(to.add(QUERY_STRIDE).cast(), _mm512_extracti64x4_epi64::<1>(both));
            }
        }
        Some(_mm512_mul_ps(largest, _mm512_set1_ps(exponent_unit(head.heads) / MOST)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::full;
    use super::*;
    use crate::kernels::attention::Heads;
    use crate::kernels::half::f32_to_half;
    use crate::kernels::{Isa, IsaName};

    /// A head of random numbers, a dimension that is 0 throughout, and numbers at the end of what binary16 holds.
    fn check(d_head: usize, len: usize, first_row: usize) {
        let n_rows = first_row + len + 3;
        let heads = Heads { n_heads: 2, d_head };
        let n_panels = (3 * heads.d_context()).div_ceil(PANEL);
        let mut state = 7u32;
        let mut qkv: Vec<u16> = (0..n_panels * n_rows * PANEL)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32_to_half(((state >> 8) as f32 / 8_388_608.0 - 1.0) * 3.0)
            })
            .collect();
        for column in [heads.d_context() + d_head + 5, 2 * heads.d_context() + d_head + 5, d_head + 5] {
            for row in 0..n_rows {
                qkv[(column / PANEL * n_rows + row) * PANEL + column % PANEL] = 0;
            }
        }
        let largest = heads.d_context() + d_head + 9;
        qkv[(largest / PANEL * n_rows + first_row) * PANEL + largest % PANEL] = f32_to_half(-65_504.0);
        let slots = KeySlots::NATURAL;
        let head = Head { qkv: qkv.as_ptr(), n_rows, heads, first_row, len, slots, head: 1 };
        let lines = super::super::lines::<Products>(slots.n_slots(len), d_head);
        let mut packed = [vec![CacheLine::ZERO; lines], vec![CacheLine([f32::NAN; 16]); lines]];
        let mut scratch = vec![0.0f32; super::super::scratch(0, d_head)];
        // SAFETY: AVX-512 is there, which the caller has checked; sizes are those of the façade.
        unsafe {
            super::super::pack::<Products>(&head, packed[0].as_mut_ptr(), scratch.as_mut_ptr());
            pack(&head, packed[1].as_mut_ptr(), std::ptr::null_mut());
            let [slow, wide] = packed.each_ref().map(|lines| bits(lines));
            assert!(slow == wide, "{d_head} dimensions, {len} tokens");

            let steps: *const f32 = packed[0].as_ptr().cast();
            let columns = Columns::new(&head, Third::Query);
            for size in [1, 7, 16] {
                let size = size.min(len);
                let mut codes = [[0u8; TILE * QUERY_STRIDE]; 2];
                let slow = full::code_queries(&columns, len - size, size, steps, codes[0].as_mut_ptr());
                let wide = code_queries(&head, len - size, size, steps, codes[1].as_mut_ptr());
                let (slow, wide) = (PerQuery::new(slow), PerQuery::new(wide.expect("a head of whole vectors")));
                assert_eq!(slow.0[..size], wide.0[..size], "{d_head} dimensions, {size} of {len} queries");
                for q in 0..size {
                    let row = q * QUERY_STRIDE..q * QUERY_STRIDE + d_head;
                    assert_eq!(codes[0][row.clone()], codes[1][row], "{d_head} dimensions, query {q} of {size}");
                }
            }
        }
    }

    fn bits(lines: &[CacheLine]) -> Vec<[u32; 16]> {
        lines.iter().map(|line| line.0.map(f32::to_bits)).collect()
    }

    #[test]
    fn heads_of_whole_vectors_are_coded_as_every_other_head_is() {
        if Isa::force(IsaName::Avx512Vnni).is_err() {
            return;
        }
        for d_head in [32, 64, 96, 128] {
            for len in [1, 2, 15, 16, 17, 33, 50] {
                check(d_head, len, 0);
                check(d_head, len, 3);
            }
        }
    }
}
