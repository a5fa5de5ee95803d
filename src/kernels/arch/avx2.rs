//! AVX2 with FMA and F16C, and the same with AVX-VNNI's dot product.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;

use super::gemm::{Gemm, Sink, row_tiles};
use super::simd::Simd;
use super::table::one;

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// One number of each of four vectors of four: what `$combine` makes of lanes 0 and 2, and 1 and 3, and of these two.
macro_rules! reduce_fours {
    ($four:expr, $combine:ident) => {{
        let four: [__m128; 4] = $four;
        let first = $combine(_mm_movelh_ps(four[0], four[1]), _mm_movehl_ps(four[1], four[0]));
        let last = $combine(_mm_movelh_ps(four[2], four[3]), _mm_movehl_ps(four[3], four[2]));
        let (even, odd) = (_mm_shuffle_ps::<0x88>(first, last), _mm_shuffle_ps::<0xdd>(first, last));
        let mut numbers = [0.0f32; 4];
        _mm_storeu_ps(numbers.as_mut_ptr(), $combine(even, odd));
        numbers
    }};
}
pub(super) use reduce_fours;

/// The halves of each of four vectors, combined.
macro_rules! halves {
    ($x:expr, $combine:ident) => {{
        let mut four = [_mm_setzero_ps(); 4];
        for r in 0..4 {
            four[r] = $combine(_mm256_castps256_ps128($x[r]), _mm256_extractf128_ps::<1>($x[r]));
        }
        four
    }};
}
pub(super) use halves;

// SAFETY: each function is a few instructions of AVX2, FMA and F16C, which the contract demands.
unsafe impl Simd for Avx2 {
    const LANES: usize = 8;
    const SATURATES: bool = true;
    type F = __m256;
    type I = __m256i;

    one! {
        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn load(from: *const f32) -> __m256 = _mm256_loadu_ps(from);
        fn store(to: *mut f32, x: __m256) = _mm256_storeu_ps(to, x);
        fn load_half(from: *const u16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
        fn store_half(to: *mut u16, x: __m256) =
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        fn load_s8(from: *const i8) -> __m256 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())));
        fn store_u8(to: *mut u8, x: __m256i) = {
            // Lanes are in 0..=255 or next to it, so both packings are exact or saturate; the low dwords of the halves hold four bytes each.
            let words = _mm256_packus_epi32(x, x);
            let bytes = _mm256_packus_epi16(words, words);
            let low = _mm256_castsi256_si128(bytes);
            let high = _mm256_extracti128_si256::<1>(bytes);
            _mm_storel_epi64(to.cast(), _mm_unpacklo_epi32(low, high));
        };
        fn store_int(to: *mut i32, x: __m256i) = _mm256_storeu_si256(to.cast(), x);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn abs(x: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn round(x: __m256) -> __m256i = _mm256_cvtps_epi32(x);
        fn to_float(x: __m256i) -> __m256 = _mm256_cvtepi32_ps(x);
        fn power_of_two(x: __m256i) -> __m256 =
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(x, _mm256_set1_epi32(127))));
        fn sum(x: __m256) -> f32 = {
            let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        };
        fn lowest(x: __m256) -> f32 = {
            let four = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_min_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_min_ss(two, _mm_shuffle_ps::<1>(two, two)))
        };
        fn highest(x: __m256) -> f32 = {
            let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        };
        fn sums(x: [__m256; 4]) -> [f32; 4] = reduce_fours!(halves!(x, _mm_add_ps), _mm_add_ps);
        fn lowests(x: [__m256; 4]) -> [f32; 4] = reduce_fours!(halves!(x, _mm_min_ps), _mm_min_ps);
        fn highests(x: [__m256; 4]) -> [f32; 4] = reduce_fours!(halves!(x, _mm_max_ps), _mm_max_ps);
    }
}

/// With AVX2 alone. Weights that were split are multiplied in `split.rs`. Whole ones are in the operations of
/// [`Avx2Exact`](super::dot_x86::Avx2Exact): `vpmaddwd` on bytes widened to s16, which is exact, unlike the s16 sums of `vpmaddubsw`,
/// which saturate. Codes are widened once, so that the inner loop only broadcasts them; weights are widened by the load.
pub(super) mod exact {
    use super::super::attend::integers::Exact;
    use super::super::attend::products::{Bytes, F32, Words};
    use super::super::attend::table::{Forms, attention};
    use super::super::dot::Dot;
    use super::super::dot_x86::Avx2Exact;
    use super::super::split;
    use super::super::table::{Table, kernel_table};
    use super::super::tile::{self, Tile};
    use super::*;
    use crate::kernels::AttentionForm;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline(never)]
    unsafe fn tile<T: Sink, const R: usize, const V: usize>(gemm: &Gemm<T>, tile: Tile) {
        // SAFETY: passed on unchanged, under the target features that the body needs.
        unsafe { tile::dense::<Avx2Exact, T, R, V>(gemm, tile) }
    }

    /// All tiles of `n_rows` rows from `first` on, 6x8, which take twelve of the sixteen registers; 2x16 for one or two rows. `codes`
    /// are the widened codes of the first row, the others `stride` bytes apart.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn rows<T: Sink>(gemm: &Gemm<T>, first: usize, n_rows: usize, codes: *const u8, stride: usize) {
        for column in (0..64).step_by(if n_rows <= 2 { 16 } else { 8 }) {
            for (row, n) in row_tiles(n_rows, 6) {
                // SAFETY: passed on; rows and columns are in range.
                unsafe {
                    let at = Tile { row: first + row, column, codes: codes.add(row * stride), stride };
                    match n {
                        0 => {}
                        1 => tile::<T, 1, 2>(gemm, at),
                        // Tiles of one or two rows only come of as many rows in all.
                        2 => tile::<T, 2, 2>(gemm, at),
                        3 => tile::<T, 3, 1>(gemm, at),
                        4 => tile::<T, 4, 1>(gemm, at),
                        5 => tile::<T, 5, 1>(gemm, at),
                        _ => tile::<T, 6, 1>(gemm, at),
                    }
                }
            }
        }
    }

    /// `gemm_u8i8_avx2`: of weights with outliers, or of whole ones.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn gemm<T: Sink>(gemm: &Gemm<T>) {
        // SAFETY: passed on; where weights are split, codes are turned.
        unsafe {
            match gemm.split {
                Some(split) => split::gemm(gemm, split),
                None => whole(gemm),
            }
        }
    }

    /// A function of its own, so that others do not have its room on the stack.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline(never)]
    unsafe fn whole<T: Sink>(gemm: &Gemm<T>) {
        let k = gemm.k_groups * 4;
        let mut room = Avx2Exact::room();
        for (first, n_rows) in row_tiles(gemm.n_rows, Avx2Exact::rows_at_once(k)) {
            // SAFETY: the rows are below `n_rows`, and the room is made for that many.
            unsafe {
                let codes = gemm.codes.add(first * gemm.stride);
                let (codes, stride) = Avx2Exact::prepare(&mut room, codes, gemm.stride, n_rows, k);
                rows(gemm, first, n_rows, codes, stride);
            }
        }
    }

    pub(in crate::kernels::arch) static TABLE: Table = Table { turn: Some(split::turn), ..without_turn::TABLE };

    mod without_turn {
        use super::*;

        kernel_table! {
            #[target_feature(enable = "avx2,fma,f16c")]
            "gemm_u8i8_avx2", gemm, Avx2, 32,
            Forms {
                preferred: &[AttentionForm::F32],
                tables: &[
                    attention!(#[target_feature(enable = "avx2,fma,f16c")] F32<Avx2>, 6, 2, 2),
                    attention!(#[target_feature(enable = "avx2,fma,f16c")] Words<Avx2, Exact>, 6, 2, 2),
                    attention!(#[target_feature(enable = "avx2,fma,f16c")] Bytes<Avx2, Exact>, 4, 2, 2),
                ],
            }
        }
    }
}

/// With the VEX-encoded `vpdpbusd`.
pub(super) mod vnni {
    use super::super::attend::integers::Vnni;
    use super::super::attend::products::{Bytes, F32, Words};
    use super::super::attend::table::{Forms, attention};
    use super::super::dot_x86::AvxVnni;
    use super::super::table::kernel_table;
    use super::super::tile::{self, Tile};
    use super::*;
    use crate::kernels::AttentionForm;

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    #[inline(never)]
    unsafe fn tile<T: Sink, const R: usize>(gemm: &Gemm<T>, tile: Tile) {
        // SAFETY: passed on unchanged, under the target features that the body needs.
        unsafe { tile::dense::<AvxVnni, T, R, 2>(gemm, tile) }
    }

    /// `gemm_u8i8_avx_vnni`: 6x16 tiles, twelve of the sixteen registers.
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn gemm<T: Sink>(gemm: &Gemm<T>) {
        for column in (0..64).step_by(16) {
            for (row, n_rows) in row_tiles(gemm.n_rows, 6) {
                // SAFETY: passed on; rows and columns are in range.
                unsafe {
                    let codes = gemm.codes.add(row * gemm.stride);
                    let at = Tile { row, column, codes, stride: gemm.stride };
                    match n_rows {
                        0 => {}
                        1 => tile::<T, 1>(gemm, at),
                        2 => tile::<T, 2>(gemm, at),
                        3 => tile::<T, 3>(gemm, at),
                        4 => tile::<T, 4>(gemm, at),
                        5 => tile::<T, 5>(gemm, at),
                        _ => tile::<T, 6>(gemm, at),
                    }
                }
            }
        }
    }

    kernel_table! {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        "gemm_u8i8_avx_vnni", gemm, Avx2, 48,
        Forms {
            // `cargo bench --bench attention` on a Xeon (Emerald Rapids), time of bytes and of words against f32: 0.8 and 1.0 at 128 keys,
            // 0.5 and 0.6 at 512, in a window of 128 on either side 0.6 and 0.9.
            preferred: &[AttentionForm::Int8, AttentionForm::Int16],
            tables: &[
                attention!(#[target_feature(enable = "avx2,fma,f16c,avxvnni")] F32<Avx2>, 6, 2, 2),
                attention!(#[target_feature(enable = "avx2,fma,f16c,avxvnni")] Words<Avx2, Vnni>, 6, 2, 2),
                attention!(#[target_feature(enable = "avx2,fma,f16c,avxvnni")] Bytes<Avx2, Vnni>, 6, 2, 2),
            ],
        }
    }
}
