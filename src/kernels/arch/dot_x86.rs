//! [`Dot`] with AVX2 (three forms, by how large the weights are), AVX-VNNI, and AVX-512 VNNI.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::avx2::Avx2;
use super::avx512::Avx512;
use super::dot::{Dot, codes_as_they_are, dots};

/// AVX2, any weights: bytes are widened to s16 and multiplied by `vpmaddwd`, whose sums of two cannot overflow
/// (2 · 255 · 128 < 2^31). Codes are widened once per row, weights in registers. A column's sum is in two lanes until the
/// end.
#[derive(Clone, Copy)]
pub(super) struct Avx2Exact;

/// AVX2, weights within ±64: `vpmaddubsw` adds two products in s16, at most 2 · 255 · 64 < 2^15.
#[derive(Clone, Copy)]
pub(super) struct Avx2Within64;

/// AVX2, weights within ±32: the s16 sums of two steps are added before they are widened, at most 4 · 255 · 32 < 2^15.
#[derive(Clone, Copy)]
pub(super) struct Avx2Within32;

/// AVX2 with the VEX-encoded `vpdpbusd`.
#[derive(Clone, Copy)]
pub(super) struct AvxVnni;

/// AVX-512 with `vpdpbusd`.
#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni;

/// What the forms of eight columns share.
macro_rules! bytes_of_avx2 {
    () => {
        dots! {
            fn bytes(from: *const u8) -> __m256i = _mm256_loadu_si256(from.cast());
            fn spread(from: *const i8) -> __m256i = {
                let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
                _mm256_mullo_epi32(wide, _mm256_set1_epi32(0x0101_0101))
            };
            fn low(x: __m256i) -> __m256i = _mm256_and_si256(x, _mm256_set1_epi8(15));
            fn high(x: __m256i) -> __m256i = _mm256_and_si256(_mm256_srli_epi16::<4>(x), _mm256_set1_epi8(15));
            fn lookup(table: __m256i, index: __m256i) -> __m256i = _mm256_shuffle_epi8(table, index);
            fn table(from: *const i8) -> __m256i = _mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast()));
            fn sub(a: __m256i, b: __m256i) -> __m256i = _mm256_sub_epi8(a, b);
            fn keep(x: __m256i, mask: u32) -> __m256i = _mm256_and_si256(x, _mm256_set1_epi32(mask.cast_signed()));
            fn sum_codes(from: *const u8, n: usize) -> i32 = {
                let mut sums = _mm256_setzero_si256();
                let whole = n / 32 * 32;
                for i in (0..whole).step_by(32) {
                    let bytes = _mm256_loadu_si256(from.add(i).cast());
                    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
                }
                let two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
                let one = _mm_add_epi64(two, _mm_unpackhi_epi64(two, two));
                (whole..n).fold(_mm_cvtsi128_si32(one), |sum, i| sum + i32::from(*from.add(i)))
            };
        }
    };
}

/// What the forms that keep a column's sum in one lane share.
macro_rules! sums_of_avx2 {
    () => {
        codes_as_they_are!();
        dots! {
            fn zero() -> __m256i = _mm256_setzero_si256();
            fn start(_sums: *const i32) -> __m256i = _mm256_setzero_si256();
            fn finish(sums: __m256i) -> __m256i = sums;
            fn weights(x: __m256i) -> __m256i = x;
            fn codes(from: *const u8) -> __m256i = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
        }
    };
}

/// Codes that the room for widened rows holds: 42 rows of 1,536 inputs, one row of 65,536.
const ROOM: usize = 65_536;
/// Rows widened at once: four tiles.
const ROOM_ROWS: usize = 24;

// SAFETY: each function is a few instructions of AVX2, which the contract demands.
unsafe impl Dot for Avx2Exact {
    type S = Avx2;
    type B = __m256i;
    /// Columns 0 to 3 and 4 to 7.
    type W = [__m256i; 2];
    type C = __m256i;
    type A = [__m256i; 2];
    type Room = [MaybeUninit<u16>; ROOM];
    const CODE_BYTES: usize = 2;

    #[inline(always)]
    fn room() -> Self::Room {
        [const { MaybeUninit::uninit() }; ROOM]
    }
    #[inline(always)]
    fn rows_at_once(k: usize) -> usize {
        (ROOM / k.next_multiple_of(16).max(1)).clamp(1, ROOM_ROWS)
    }
    #[inline(always)]
    unsafe fn prepare(
        room: &mut Self::Room,
        codes: *const u8,
        stride: usize,
        n_rows: usize,
        k: usize,
    ) -> (*const u8, usize) {
        // SAFETY: `n_rows` rows of `k` codes rounded up to 16 fit the room (`rows_at_once`), and `k` are read of each.
        unsafe {
            let to = room.as_mut_ptr().cast::<u16>();
            let to_stride = k.next_multiple_of(16);
            for row in 0..n_rows {
                let (from, to) = (codes.add(row * stride), to.add(row * to_stride));
                let mut i = 0;
                while i + 16 <= k {
                    let wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.add(i).cast()));
                    _mm256_storeu_si256(to.add(i).cast(), wide);
                    i += 16;
                }
                while i < k {
                    to.add(i).write(u16::from(*from.add(i)));
                    i += 1;
                }
            }
            (to.cast_const().cast(), to_stride * 2)
        }
    }

    bytes_of_avx2!();
    dots! {
        fn zero() -> [__m256i; 2] = [_mm256_setzero_si256(); 2];
        fn start(_sums: *const i32) -> [__m256i; 2] = [_mm256_setzero_si256(); 2];
        fn finish(sums: [__m256i; 2]) -> __m256i =
            // By halves of a register: columns 0, 1, 4, 5 and 2, 3, 6, 7.
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(sums[0], sums[1]));
        fn weights(x: __m256i) -> [__m256i; 2] = [
            _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)),
            _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(x)),
        ];
        // Widened by the load: in registers that takes the place of additions.
        fn load(from: *const u8) -> [__m256i; 2] = [
            _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(16).cast())),
        ];
        fn codes(from: *const u8) -> __m256i = _mm256_set1_epi64x(from.cast::<i64>().read_unaligned());
        fn dot(sums: [__m256i; 2], codes: __m256i, weights: [__m256i; 2]) -> [__m256i; 2] = [
            _mm256_add_epi32(sums[0], _mm256_madd_epi16(codes, weights[0])),
            _mm256_add_epi32(sums[1], _mm256_madd_epi16(codes, weights[1])),
        ];
    }
}

// SAFETY: as above.
unsafe impl Dot for Avx2Within64 {
    type S = Avx2;
    type B = __m256i;
    type W = __m256i;
    type C = __m256i;
    type A = __m256i;

    bytes_of_avx2!();
    sums_of_avx2!();
    dots! {
        fn dot(sums: __m256i, codes: __m256i, weights: __m256i) -> __m256i = {
            let pairs = _mm256_maddubs_epi16(codes, weights);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
    }
}

// SAFETY: as above.
unsafe impl Dot for Avx2Within32 {
    type S = Avx2;
    type B = __m256i;
    type W = __m256i;
    type C = __m256i;
    type A = __m256i;
    const PAIRED: bool = true;

    bytes_of_avx2!();
    sums_of_avx2!();
    dots! {
        fn dot(sums: __m256i, codes: __m256i, weights: __m256i) -> __m256i = {
            let pairs = _mm256_maddubs_epi16(codes, weights);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        fn dot_two(sums: __m256i, codes: [__m256i; 2], weights: [__m256i; 2]) -> __m256i = {
            let first = _mm256_maddubs_epi16(codes[0], weights[0]);
            let second = _mm256_maddubs_epi16(codes[1], weights[1]);
            let pairs = _mm256_add_epi16(first, second);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
    }
}

// SAFETY: each function is a few instructions of AVX2 or AVX-VNNI, which the contract demands.
unsafe impl Dot for AvxVnni {
    type S = Avx2;
    type B = __m256i;
    type W = __m256i;
    type C = __m256i;
    type A = __m256i;

    bytes_of_avx2!();
    sums_of_avx2!();
    dots! {
        fn dot(sums: __m256i, codes: __m256i, weights: __m256i) -> __m256i =
            _mm256_dpbusd_avx_epi32(sums, codes, weights);
    }
}

// SAFETY: each function is a few instructions of AVX-512 F, BW or VNNI, which the contract demands.
unsafe impl Dot for Avx512Vnni {
    type S = Avx512;
    type B = __m512i;
    type W = __m512i;
    type C = __m512i;
    type A = __m512i;

    codes_as_they_are!();
    dots! {
        fn finish(sums: __m512i) -> __m512i = sums;
        fn zero() -> __m512i = _mm512_setzero_si512();
        fn start(_sums: *const i32) -> __m512i = _mm512_setzero_si512();
        fn bytes(from: *const u8) -> __m512i = _mm512_loadu_si512(from.cast());
        fn spread(from: *const i8) -> __m512i = {
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x0101_0101))
        };
        fn low(x: __m512i) -> __m512i = _mm512_and_si512(x, _mm512_set1_epi8(15));
        fn high(x: __m512i) -> __m512i = _mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15));
        fn lookup(table: __m512i, index: __m512i) -> __m512i = _mm512_shuffle_epi8(table, index);
        fn table(from: *const i8) -> __m512i = _mm512_broadcast_i32x4(_mm_loadu_si128(from.cast()));
        fn sub(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi8(a, b);
        fn keep(x: __m512i, mask: u32) -> __m512i = _mm512_and_si512(x, _mm512_set1_epi32(mask.cast_signed()));
        fn weights(x: __m512i) -> __m512i = x;
        fn codes(from: *const u8) -> __m512i = _mm512_set1_epi32(from.cast::<i32>().read_unaligned());
        fn dot(sums: __m512i, codes: __m512i, weights: __m512i) -> __m512i =
            _mm512_dpbusd_epi32(sums, codes, weights);
    }
}
