//! What the integer forms of attention need of an instruction set beyond [`Simd`]: packing of codes, transposition, and
//! products of two s16 or four u8 with s8 added to a dword.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::super::portable::Portable;
use super::super::simd::{Simd, exp2_coarsest};
use super::super::table::one;

/// Integer lanes of a vector instruction set.
///
/// # Safety
/// As for [`Simd`].
pub(in crate::kernels::arch) unsafe trait Integers: Simd {
    unsafe fn load_int(from: *const i32) -> Self::I;
    unsafe fn splat_int(x: i32) -> Self::I;
    unsafe fn add_int(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sum_int(x: Self::I) -> i32;
    /// The low byte of each lane, the others 0.
    unsafe fn low_byte(x: Self::I) -> Self::I;
    /// Dwords of two s16: the low halves of `first` and of `second`.
    unsafe fn pair(first: Self::I, second: Self::I) -> Self::I;
    /// Words of two bytes: the low bytes of the words of `first` and of `second`.
    unsafe fn interleave(first: Self::I, second: Self::I) -> Self::I;
    /// Writes lanes that fit s16.
    unsafe fn store_s16(to: *mut i16, x: Self::I);
    /// `to[c][r] = from[r][c]` for 8 by 8 dwords, rows `from_stride` and `to_stride` apart.
    unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
    /// Turns a row of scores into u8 weights `255 · 2^(scale · (score − highest))`, in place, and adds them up. `width` is
    /// a multiple of [`KEY_BLOCK`]. *Error*: half a code, and 0.6 % of the weight.
    ///
    /// [`KEY_BLOCK`]: crate::kernels::attention::KEY_BLOCK
    #[inline(always)]
    unsafe fn weigh_bytes(scores: *mut f32, width: usize, highest: Self::F, scale: Self::F) -> i32 {
        // SAFETY: `scores` holds `width`; a byte is written where a score was read before.
        unsafe {
            let mut total = Self::splat_int(0);
            let mut i = 0;
            while i < width {
                let below = Self::sub(Self::load(scores.add(i)), highest);
                let exponent = Self::fma(below, scale, Self::splat(BYTE_WEIGHT_LOG2));
                let weight = Self::round(exp2_coarsest::<Self>(exponent));
                Self::store_u8(scores.cast::<u8>().add(i), weight);
                total = Self::add_int(total, weight);
                i += Self::LANES;
            }
            Self::sum_int(total)
        }
    }
}

/// Base 2 logarithm of the largest weight in bytes, 255.
const BYTE_WEIGHT_LOG2: f32 = 7.994_353;

/// Products of codes, added to dwords. The sums must fit.
///
/// # Safety
/// As for [`Simd`].
pub(in crate::kernels::arch) unsafe trait Multiply<S: Simd>: Copy {
    /// `sum + a[0] · b[0] + a[1] · b[1]` per dword of s16.
    unsafe fn words(sum: S::I, a: S::I, b: S::I) -> S::I;
    /// `sum + Σ_j unsigned[j] · signed[j]` per dword of u8 and s8.
    unsafe fn bytes(sum: S::I, unsigned: S::I, signed: S::I) -> S::I;
}

fn words(x: i32) -> [i16; 2] {
    bytemuck::cast(x)
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(in crate::kernels::arch) struct Plain;

// SAFETY: plain Rust.
unsafe impl Multiply<Portable> for Plain {
    one! {
        fn words(sum: [i32; 4], a: [i32; 4], b: [i32; 4]) -> [i32; 4] = std::array::from_fn(|lane| {
            let (a, b) = (words(a[lane]), words(b[lane]));
            sum[lane] + i32::from(a[0]) * i32::from(b[0]) + i32::from(a[1]) * i32::from(b[1])
        });
        fn bytes(sum: [i32; 4], unsigned: [i32; 4], signed: [i32; 4]) -> [i32; 4] = std::array::from_fn(|lane| {
            let (a, b): ([u8; 4], [i8; 4]) = (bytemuck::cast(unsigned[lane]), bytemuck::cast(signed[lane]));
            (0..4).fold(sum[lane], |sum, j| sum + i32::from(a[j]) * i32::from(b[j]))
        });
    }
}

// SAFETY: plain Rust; pointers are valid by contract.
unsafe impl Integers for Portable {
    one! {
        fn load_int(from: *const i32) -> [i32; 4] = from.cast::<[i32; 4]>().read_unaligned();
        fn splat_int(x: i32) -> [i32; 4] = [x; 4];
        fn add_int(a: [i32; 4], b: [i32; 4]) -> [i32; 4] = std::array::from_fn(|lane| a[lane].wrapping_add(b[lane]));
        fn sum_int(x: [i32; 4]) -> i32 = x.iter().fold(0, |sum, &lane| sum.wrapping_add(lane));
        fn low_byte(x: [i32; 4]) -> [i32; 4] = x.map(|lane| lane & 0xff);
        fn pair(first: [i32; 4], second: [i32; 4]) -> [i32; 4] =
            std::array::from_fn(|lane| (second[lane] << 16) | (first[lane] & 0xffff));
        fn interleave(first: [i32; 4], second: [i32; 4]) -> [i32; 4] =
            std::array::from_fn(|lane| ((second[lane] & 0x00ff_00ff) << 8) | (first[lane] & 0x00ff_00ff));
        fn store_s16(to: *mut i16, x: [i32; 4]) = to.cast::<[i16; 4]>().write_unaligned(x.map(|lane| words(lane)[0]));
        fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) =
            transpose(from, from_stride, to, to_stride);
    }
}

unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    for row in 0..8 {
        for column in 0..8 {
            // SAFETY: both are valid for 8 by 8 by the contract of `Integers::transpose`.
            unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::super::avx2::Avx2;
    use super::super::super::avx512::{Avx512, bytes_of_words, words_of_dwords};
    use super::super::super::table::one;
    use super::{BYTE_WEIGHT_LOG2, Integers, Multiply};

    // SAFETY: AVX2, which the contract demands.
    unsafe impl Integers for Avx2 {
        one! {
            fn load_int(from: *const i32) -> __m256i = _mm256_loadu_si256(from.cast());
            fn splat_int(x: i32) -> __m256i = _mm256_set1_epi32(x);
            fn add_int(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
            fn sum_int(x: __m256i) -> i32 = {
                let four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
                _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b0001>(two)))
            };
            fn low_byte(x: __m256i) -> __m256i = _mm256_and_si256(x, _mm256_set1_epi32(0xff));
            fn pair(first: __m256i, second: __m256i) -> __m256i =
                _mm256_blend_epi16::<0b1010_1010>(first, _mm256_slli_epi32::<16>(second));
            fn interleave(first: __m256i, second: __m256i) -> __m256i =
                _mm256_blendv_epi8(first, _mm256_slli_epi16::<8>(second), _mm256_set1_epi16(-256));
            fn store_s16(to: *mut i16, x: __m256i) =
                _mm_storeu_si128(to.cast(), _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)));
            fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) =
                transpose(from, from_stride, to, to_stride);
        }
    }

    // SAFETY: AVX-512 F, BW, DQ and VL, which the contract demands.
    unsafe impl Integers for Avx512 {
        one! {
            fn load_int(from: *const i32) -> __m512i = _mm512_loadu_si512(from.cast());
            fn splat_int(x: i32) -> __m512i = _mm512_set1_epi32(x);
            fn add_int(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
            fn sum_int(x: __m512i) -> i32 = _mm512_reduce_add_epi32(x);
            fn low_byte(x: __m512i) -> __m512i = _mm512_and_si512(x, _mm512_set1_epi32(0xff));
            fn pair(first: __m512i, second: __m512i) -> __m512i =
                _mm512_mask_blend_epi16(0xaaaa_aaaa, first, _mm512_slli_epi32::<16>(second));
            fn interleave(first: __m512i, second: __m512i) -> __m512i =
                _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, first, _mm512_slli_epi16::<8>(second));
            fn store_s16(to: *mut i16, x: __m512i) = _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(x));
            fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) =
                transpose(from, from_stride, to, to_stride);
            fn weigh_bytes(scores: *mut f32, width: usize, highest: __m512, scale: __m512) -> i32 =
                weigh_bytes(scores, width, highest, scale);
        }
    }

    /// `round(2^15 · 2^(i / 64))`: the fractional part of a power of two, by its first six bits.
    const POWERS: [u16; 64] = [
        32_768, 33_125, 33_486, 33_850, 34_219, 34_591, 34_968, 35_349, 35_734, 36_123, 36_516, 36_914, 37_316, 37_722,
        38_133, 38_548, 38_968, 39_392, 39_821, 40_255, 40_693, 41_136, 41_584, 42_037, 42_495, 42_958, 43_425, 43_898,
        44_376, 44_859, 45_348, 45_842, 46_341, 46_846, 47_356, 47_871, 48_393, 48_920, 49_452, 49_991, 50_535, 51_085,
        51_642, 52_204, 52_773, 53_347, 53_928, 54_515, 55_109, 55_709, 56_316, 56_929, 57_549, 58_176, 58_809, 59_449,
        60_097, 60_751, 61_413, 62_081, 62_757, 63_441, 64_132, 64_830,
    ];

    /// 64 weights of exponents in 64ths, in the order of the four vectors: in 16 bits, the fraction looked up, the whole part a
    /// shift.
    #[inline(always)]
    pub(in crate::kernels::arch) unsafe fn weights(exponents: [__m512i; 4]) -> __m512i {
        // SAFETY: AVX-512 F and BW, by contract.
        unsafe {
            let low = _mm512_loadu_si512(POWERS.as_ptr().cast());
            let high = _mm512_loadu_si512(POWERS.as_ptr().add(32).cast());
            let mut halves = words_of_dwords(exponents);
            for exponent in &mut halves {
                let fraction = _mm512_permutex2var_epi16(low, *exponent, high);
                let shift = _mm512_sub_epi16(_mm512_set1_epi16(14), _mm512_srai_epi16::<6>(*exponent));
                // A shift by more than there is gives 0; the last bit is rounded.
                *exponent = _mm512_avg_epu16(_mm512_srlv_epi16(fraction, shift), _mm512_setzero_si512());
            }
            bytes_of_words(halves)
        }
    }

    /// What a score in f32 is multiplied with, and what is added, to become an exponent of [`weights`].
    #[inline(always)]
    pub(in crate::kernels::arch) unsafe fn exponent(highest: __m512, scale: __m512) -> (__m512, __m512) {
        // SAFETY: AVX-512 F, by contract.
        unsafe {
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(64.0));
            (scale, _mm512_fnmadd_ps(highest, scale, _mm512_set1_ps(64.0 * BYTE_WEIGHT_LOG2)))
        }
    }

    #[inline(always)]
    unsafe fn weigh_bytes(scores: *mut f32, width: usize, highest: __m512, scale: __m512) -> i32 {
        // SAFETY: AVX-512 F, BW and VNNI; `scores` holds `width`, and nothing beyond is read or written.
        unsafe {
            let (scale, offset) = exponent(highest, scale);
            let mut total = _mm512_setzero_si512();
            let mut i = 0;
            while i < width {
                let there = width - i;
                let mut x = [_mm512_set1_epi32(i32::MIN); 4];
                for v in 0..4 {
                    if v * 16 < there {
                        // What is hidden lies beyond the range of integers and becomes the smallest of them.
                        let score = _mm512_loadu_ps(scores.add(i + v * 16));
                        x[v] = _mm512_cvtps_epi32(_mm512_fmadd_ps(score, scale, offset));
                    }
                }
                let bytes = weights(x);
                total = _mm512_dpbusd_epi32(total, bytes, _mm512_set1_epi8(1));
                let kept = if there < 64 { (1 << there) - 1 } else { u64::MAX };
                _mm512_mask_storeu_epi8(scores.cast::<i8>().add(i), kept, bytes);
                i += 64;
            }
            _mm512_reduce_add_epi32(total)
        }
    }

    /// Rows in pairs, pairs in fours, then the halves.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: AVX, and 8 rows of 8 dwords on either side, by the contract of `Integers::transpose`.
        unsafe {
            let row = |r: usize| _mm256_loadu_ps(from.add(r * from_stride));
            let mut pairs = [_mm256_setzero_ps(); 8];
            for r in 0..4 {
                pairs[2 * r] = _mm256_unpacklo_ps(row(2 * r), row(2 * r + 1));
                pairs[2 * r + 1] = _mm256_unpackhi_ps(row(2 * r), row(2 * r + 1));
            }
            // Columns 0 and 4, 1 and 5, 2 and 6, 3 and 7, of rows 0 to 3 and of rows 4 to 7.
            let mut fours = [_mm256_setzero_ps(); 8];
            for half in 0..2 {
                let [a, b, c, d] = std::array::from_fn(|i| pairs[4 * half + i]);
                fours[4 * half] = _mm256_shuffle_ps::<0x44>(a, c);
                fours[4 * half + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                fours[4 * half + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                fours[4 * half + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for c in 0..4 {
                _mm256_storeu_ps(to.add(c * to_stride), _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]));
                _mm256_storeu_ps(to.add((4 + c) * to_stride), _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]));
            }
        }
    }

    /// AVX2 alone. Bytes are widened, because the s16 sums of `vpmaddubsw` saturate.
    #[derive(Clone, Copy)]
    pub(in crate::kernels::arch) struct Exact;

    // SAFETY: AVX2, which the contract demands.
    unsafe impl Multiply<Avx2> for Exact {
        one! {
            fn words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i =
                _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
            fn bytes(sum: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i = {
                let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed));
                let odd = _mm256_srai_epi16::<8>(signed);
                let even = _mm256_madd_epi16(_mm256_and_si256(unsigned, _mm256_set1_epi16(0xff)), even);
                let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(unsigned), odd);
                _mm256_add_epi32(sum, _mm256_add_epi32(even, odd))
            };
        }
    }

    /// AVX-VNNI, or AVX-512 with VNNI.
    #[derive(Clone, Copy)]
    pub(in crate::kernels::arch) struct Vnni;

    // SAFETY: AVX-VNNI, which the contract demands.
    unsafe impl Multiply<Avx2> for Vnni {
        one! {
            fn words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i = _mm256_dpwssd_avx_epi32(sum, a, b);
            fn bytes(sum: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i =
                _mm256_dpbusd_avx_epi32(sum, unsigned, signed);
        }
    }

    // SAFETY: AVX-512 with VNNI, which the contract demands.
    unsafe impl Multiply<Avx512> for Vnni {
        one! {
            fn words(sum: __m512i, a: __m512i, b: __m512i) -> __m512i = _mm512_dpwssd_epi32(sum, a, b);
            fn bytes(sum: __m512i, unsigned: __m512i, signed: __m512i) -> __m512i =
                _mm512_dpbusd_epi32(sum, unsigned, signed);
        }
    }
}
#[cfg(target_arch = "x86_64")]
pub(in crate::kernels::arch) use x86::{Exact, Vnni, exponent, weights};

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::super::super::neon::Neon;
    use super::super::super::table::one;
    use super::{Integers, transpose};
    use std::arch::aarch64::*;

    // SAFETY: NEON, which the contract demands.
    unsafe impl Integers for Neon {
        one! {
            fn load_int(from: *const i32) -> int32x4_t = vld1q_s32(from);
            fn splat_int(x: i32) -> int32x4_t = vdupq_n_s32(x);
            fn add_int(a: int32x4_t, b: int32x4_t) -> int32x4_t = vaddq_s32(a, b);
            fn sum_int(x: int32x4_t) -> i32 = vaddvq_s32(x);
            fn low_byte(x: int32x4_t) -> int32x4_t = vandq_s32(x, vdupq_n_s32(0xff));
            fn pair(first: int32x4_t, second: int32x4_t) -> int32x4_t =
                vorrq_s32(vandq_s32(first, vdupq_n_s32(0xffff)), vshlq_n_s32::<16>(second));
            fn interleave(first: int32x4_t, second: int32x4_t) -> int32x4_t = {
                let low = vdupq_n_s32(0x00ff_00ff);
                vorrq_s32(vandq_s32(first, low), vshlq_n_s32::<8>(vandq_s32(second, low)))
            };
            fn store_s16(to: *mut i16, x: int32x4_t) = vst1_s16(to, vmovn_s32(x));
            fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) =
                transpose(from, from_stride, to, to_stride);
        }
    }
}
