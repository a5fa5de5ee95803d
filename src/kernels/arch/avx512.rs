//! AVX-512 with VNNI.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;

use super::attend::full;
use super::attend::integers::Vnni;
use super::attend::products::{Bytes, F32, Words};
use super::attend::table::{AttentionTable, Forms, attention};
use super::attend::vnni::Avx512Tiles;
use super::attend::wide;
use super::avx2::{halves, reduce_fours};
use super::codebook::Codebook;
use super::dot_x86::Avx512Vnni;
use super::ends::{Added, PanelEnd, Topped};
use super::gemm::{Gemm, row_starts, row_tiles};
use super::pieces;
use super::rows::Quantize;
use super::simd::Simd;
use super::table::{Table, kernel_table, one};
use crate::kernels::forms::PAIR;
use crate::kernels::layout::{LINES, PANEL};
use crate::kernels::{AttentionForm, Nonlinearity};

/// Bytes of a cache line, and of a vector.
const LINE: usize = 64;

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// Four vectors of dwords in two of words, saturated; the dwords of a vector come to lie in its four quarters.
#[inline(always)]
pub(super) unsafe fn words_of_dwords(x: [__m512i; 4]) -> [__m512i; 2] {
    // SAFETY: AVX-512 BW, by contract.
    unsafe { [_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])] }
}

/// Bytes of four vectors of dwords that were packed twice, in the order of the dwords again.
#[inline(always)]
pub(super) unsafe fn in_order(packed: __m512i) -> __m512i {
    // SAFETY: AVX-512 F, by contract.
    unsafe {
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_permutexvar_epi32(order, packed)
    }
}

/// What [`words_of_dwords`] yields, in bytes, saturated, and in the order of the dwords again.
#[inline(always)]
pub(super) unsafe fn bytes_of_words(x: [__m512i; 2]) -> __m512i {
    // SAFETY: AVX-512 BW, by contract.
    unsafe { in_order(_mm512_packus_epi16(x[0], x[1])) }
}

/// The first `n ≤ 16` lanes.
#[inline(always)]
fn first_lanes(n: usize) -> u16 {
    u16::MAX.unbounded_shr(16 - n as u32)
}

/// The halves of each of four vectors, combined.
macro_rules! wide_halves {
    ($x:expr, $combine:ident) => {{
        let mut halves = [_mm256_setzero_ps(); 4];
        for r in 0..4 {
            halves[r] = $combine(_mm512_castps512_ps256($x[r]), _mm512_extractf32x8_ps::<1>($x[r]));
        }
        halves
    }};
}

// SAFETY: each function is one or a few instructions of AVX-512 F, BW, DQ and VL, which the contract demands.
unsafe impl Simd for Avx512 {
    const LANES: usize = 16;
    const PICKS: bool = true;
    const SATURATES: bool = true;
    type F = __m512;
    type I = __m512i;

    one! {
        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
        fn store(to: *mut f32, x: __m512) = _mm512_storeu_ps(to, x);
        fn load_half(from: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
        fn store_half(to: *mut u16, x: __m512) =
            _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        // Half of the last place is added, and what is behind it cut off: then nothing rounds to infinity.
        fn store_held_half(to: *mut u16, x: __m512) = {
            let half = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x1000));
            let cut = _mm512_cvtps_ph::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(_mm512_castsi512_ps(half));
            _mm256_storeu_si256(to.cast(), cut);
        };
        fn load_s8(from: *const i8) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())));
        fn store_u8(to: *mut u8, x: __m512i) = _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x));
        fn store_four_u8(to: *mut u8, x: [__m512i; 4]) =
            _mm512_storeu_si512(to.cast(), bytes_of_words(words_of_dwords(x)));
        fn store_int(to: *mut i32, x: __m512i) = _mm512_storeu_si512(to.cast(), x);
        fn load_some(from: *const f32, n: usize, fill: f32) -> __m512 =
            _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), from);
        fn store_some(to: *mut f32, n: usize, x: __m512) = _mm512_mask_storeu_ps(to, first_lanes(n), x);
        fn store_some_u8(to: *mut u8, n: usize, x: __m512i) =
            _mm_mask_storeu_epi8(to.cast(), first_lanes(n), _mm512_cvtepi32_epi8(x));
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn abs(x: __m512) -> __m512 = _mm512_abs_ps(x);
        fn pick(table: &[f32; 32], lanes: __m512) -> __m512 = _mm512_permutex2var_ps(
            _mm512_loadu_ps(table.as_ptr()),
            _mm512_castps_si512(lanes),
            _mm512_loadu_ps(table.as_ptr().add(16)),
        );
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn round(x: __m512) -> __m512i = _mm512_cvtps_epi32(x);
        fn to_float(x: __m512i) -> __m512 = _mm512_cvtepi32_ps(x);
        fn power_of_two(x: __m512i) -> __m512 =
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(x, _mm512_set1_epi32(127))));
        fn round_float(x: __m512) -> __m512 = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(x);
        fn scale_by_power(x: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(x, n);
        fn sum(x: __m512) -> f32 = _mm512_reduce_add_ps(x);
        fn lowest(x: __m512) -> f32 = _mm512_reduce_min_ps(x);
        fn highest(x: __m512) -> f32 = _mm512_reduce_max_ps(x);
        fn sums(x: [__m512; 4]) -> [f32; 4] =
            reduce_fours!(halves!(wide_halves!(x, _mm256_add_ps), _mm_add_ps), _mm_add_ps);
        fn lowests(x: [__m512; 4]) -> [f32; 4] =
            reduce_fours!(halves!(wide_halves!(x, _mm256_min_ps), _mm_min_ps), _mm_min_ps);
        fn highests(x: [__m512; 4]) -> [f32; 4] =
            reduce_fours!(halves!(wide_halves!(x, _mm256_max_ps), _mm_max_ps), _mm_max_ps);
    }
}

/// `R` rows by the 64 columns of a panel, all of k in 4·R accumulators. For every group of k, `PREFETCH` lines from `ahead` on are
/// asked for, into the cache that `HINT` says.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
#[inline(never)]
unsafe fn tile<T: PanelEnd, const R: usize, const PREFETCH: usize, const HINT: i32>(
    gemm: &Gemm<T>,
    row: usize,
    ahead: *const i8,
) {
    // SAFETY: the rows are inside `codes` and `out`, the panel holds `k_groups` groups (the façade's checks); prefetching
    // touches nothing.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); 4]; R];
        let codes = row_starts::<R>(gemm.codes.add(row * gemm.stride), gemm.stride);
        // What the results will be added to is fetched while they are computed.
        if T::ADDS {
            for r in 0..R {
                let out: *const i8 = gemm.out.add((row + r) * gemm.out_stride).cast();
                for line in 0..PANEL * size_of::<T>() / LINE {
                    _mm_prefetch::<_MM_HINT_T0>(out.add(line * LINE));
                }
            }
        }
        for group in 0..gemm.k_groups {
            let weights = gemm.weights.add(group * LINES * LINE);
            let weight: [__m512i; LINES] = std::array::from_fn(|j| _mm512_load_si512(weights.add(j * LINE).cast()));
            for r in 0..R {
                let code = codes[r].add(group * 4).cast::<i32>().read_unaligned();
                let code = _mm512_set1_epi32(code);
                for j in 0..LINES {
                    sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], code, weight[j]);
                }
            }
            for line in 0..PREFETCH {
                _mm_prefetch::<HINT>(ahead.wrapping_add((group * PREFETCH + line) * LINE));
            }
        }
        T::end::<Avx512Vnni, R>(gemm, row, &sums);
    }
}

/// [`tile`] of `n_rows` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn tile_of<T: PanelEnd, const PREFETCH: usize, const HINT: i32>(
    gemm: &Gemm<T>,
    (row, n_rows): (usize, usize),
    ahead: *const i8,
) {
    // SAFETY: passed on.
    unsafe {
        match n_rows {
            0 => {}
            1 => tile::<T, 1, PREFETCH, HINT>(gemm, row, ahead),
            2 => tile::<T, 2, PREFETCH, HINT>(gemm, row, ahead),
            3 => tile::<T, 3, PREFETCH, HINT>(gemm, row, ahead),
            4 => tile::<T, 4, PREFETCH, HINT>(gemm, row, ahead),
            5 => tile::<T, 5, PREFETCH, HINT>(gemm, row, ahead),
            _ => tile::<T, 6, PREFETCH, HINT>(gemm, row, ahead),
        }
    }
}

/// How many lines of the next panel tile `index` of `n_tiles` asks for with every group of k: together the whole panel.
fn lines_asked(n_tiles: usize, index: usize) -> usize {
    match (n_tiles, index) {
        (4.., 4..) => 0,
        (4.., _) | (3, 0 | 1) => 1,
        (2 | 3, _) => 2,
        _ => LINES,
    }
}

/// `gemm_u8i8_avx512_vnni`: 6x64 tiles. Meanwhile the next panel is fetched, spread over the first tiles, in the order of its lines:
/// in strides it is slower, probably since the processor then does not see a stream to fetch ahead by itself. Few rows leave a panel
/// no time to come from the third cache into the first, where it would only take the place of this one.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn gemm<T: PanelEnd>(gemm: &Gemm<T>) {
    let n_tiles = gemm.n_rows.div_ceil(6);
    let mut n_asked = 0;
    for (index, rows) in row_tiles(gemm.n_rows, 6).enumerate() {
        let n_lines = if gemm.next.is_null() { 0 } else { lines_asked(n_tiles, index) };
        let ahead = gemm.next.wrapping_add(n_asked * gemm.k_groups * LINE);
        // SAFETY: passed on; the rows are below `n_rows`.
        unsafe {
            match (n_lines, n_tiles) {
                (0, _) => tile_of::<T, 0, _MM_HINT_T0>(gemm, rows, ahead),
                (1, 4..) => tile_of::<T, 1, _MM_HINT_T0>(gemm, rows, ahead),
                (1, _) => tile_of::<T, 1, _MM_HINT_T1>(gemm, rows, ahead),
                (2, _) => tile_of::<T, 2, _MM_HINT_T1>(gemm, rows, ahead),
                _ => tile_of::<T, LINES, _MM_HINT_T1>(gemm, rows, ahead),
            }
        }
        n_asked += n_lines;
    }
}

/// Decodes a panel of 4-bit indices into `[⌈n_in / 4⌉][PANEL][4]`, zeros of groups taken off.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn decode<T>(args: &Codebook<T>, to: *mut i8) {
    // SAFETY: the panel holds the pairs of `n_in` inputs, `to` as many groups of four; there are `n_groups` zeros.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(args.table.cast()));
        let nibble = _mm512_set1_epi8(15);
        let whole = args.n_in / PAIR;
        let mut zero = [_mm512_setzero_si512(); 4];
        for pair in 0..args.n_in.div_ceil(PAIR) {
            if args.n_groups > 0 && pair % args.group_pairs == 0 {
                let zeros = (*args.zeros.add(pair / args.group_pairs)).as_ptr();
                for vector in 0..4 {
                    let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.add(vector * 16).cast()));
                    zero[vector] = _mm512_mullo_epi32(bytes, _mm512_set1_epi32(0x0101_0101));
                }
            }
            let from = args.gemm.weights.add(pair * 256);
            let low = to.add(pair * 512);
            for vector in 0..4 {
                let packed = _mm512_loadu_si512(from.add(vector * 64).cast());
                let first = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, nibble));
                let second = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), nibble);
                let second = _mm512_shuffle_epi8(table, second);
                let mut first = _mm512_sub_epi8(first, zero[vector]);
                let mut second = _mm512_sub_epi8(second, zero[vector]);
                let rest = args.n_in - pair * PAIR;
                if pair == whole {
                    // Bytes beyond the last input are those of no weight.
                    let kept = |n_bytes: usize| if n_bytes >= 4 { -1 } else { (1 << (8 * n_bytes)) - 1 };
                    let (kept_first, kept_second) = (kept(rest), kept(rest.saturating_sub(4)));
                    first = _mm512_and_si512(first, _mm512_set1_epi32(kept_first));
                    second = _mm512_and_si512(second, _mm512_set1_epi32(kept_second));
                }
                _mm512_storeu_si512(low.add(vector * 64).cast(), first);
                if rest > 4 {
                    _mm512_storeu_si512(low.add(256 + vector * 64).cast(), second);
                }
            }
        }
    }
}

/// The kernels whose results are stored as they are.
mod stored {
    use super::*;

    kernel_table! {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
        "gemm_u8i8_avx512_vnni", gemm, Avx512, 64,
        Forms {
            // `cargo bench --bench attention` on Zen 4: bytes take 0.4 to 0.6 of the time of f32, words 0.7 to 0.9.
            preferred: &[AttentionForm::Int8, AttentionForm::Int16],
            tables: &[
                attention!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")] F32<Avx512>, 8, 2, 1),
                attention!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")] Words<Avx512, Vnni>, 8, 2, 1),
                AttentionTable {
                    scratch: full::scratch,
                    pack: wide::pack,
                    attend: full::attend::<Avx512Tiles>,
                    ..attention!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")] Bytes<Avx512, Vnni>, 8, 2, 1)
                },
            ],
        }
    }
}

/// Codes of rows: those that go through GELU first have a way of their own.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn quantize(args: &Quantize) {
    // SAFETY: passed on unchanged.
    unsafe {
        match (args.then, args.range) {
            (Some(kind @ (Nonlinearity::Gelu | Nonlinearity::GeluTanh)), None) => pieces::quantize(kind, args),
            _ => (stored::TABLE.quantize)(args),
        }
    }
}

pub(super) static TABLE: Table =
    Table { quantize, gemm_topped: Some(gemm::<Topped>), gemm_added: Some(gemm::<Added>), ..stored::TABLE };

#[cfg(test)]
mod tests {
    use super::{LINES, lines_asked};

    #[test]
    fn tiles_ask_for_the_whole_next_panel() {
        for n_tiles in 1..20 {
            assert_eq!((0..n_tiles).map(|index| lines_asked(n_tiles, index)).sum::<usize>(), LINES, "{n_tiles} tiles");
        }
    }
}
