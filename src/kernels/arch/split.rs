//! Dense products on AVX2 of weights that are split into what is multiplied in s16 and outliers (`kernels/outliers.rs`).
//!
//! Outliers stand anywhere, so they are multiplied with rows in the lanes of vectors: codes are turned once for all panels, by input
//! and in strips of 32 rows, of which two inputs at a time are multiplied and added in s16. Tiles of the main part start with these.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::dot::Dot;
use super::dot_x86::Avx2Within32;
use super::gemm::{Gemm, Sink, Split, row_tiles};
use super::tile::{Tile, put};
use crate::kernels::layout::{PANEL, STRIP};
use crate::kernels::outliers::{Chains, Four, PLACE};

/// Codes `[n_rows, stride]` to `[⌈n_rows / STRIP⌉][k][STRIP]`; what stands for rows that are not there means nothing.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn turn(codes: *const u8, stride: usize, n_rows: usize, k: usize, to: *mut u8) {
    const HALF: usize = STRIP / 2;
    // SAFETY: `k` codes of each row are there, and room for whole strips, by contract.
    unsafe {
        for first in (0..n_rows).step_by(HALF) {
            let rows: [*const u8; HALF] = std::array::from_fn(|r| codes.add((first + r).min(n_rows - 1) * stride));
            let to = to.add(first / STRIP * STRIP * k + first % STRIP);
            let whole = k / HALF * HALF;
            for input in (0..whole).step_by(HALF) {
                let bytes = turned(std::array::from_fn(|r| _mm_loadu_si128(rows[r].add(input).cast())));
                for (i, bytes) in bytes.into_iter().enumerate() {
                    _mm_storeu_si128(to.add((input + i) * STRIP).cast(), bytes);
                }
            }
            for input in whole..k {
                for (r, row) in rows.iter().enumerate() {
                    to.add(input * STRIP + r).write(*row.add(input));
                }
            }
        }
    }
}

/// 16 rows of 16 bytes, rows and columns exchanged: each step puts those of the first and second eight in turn.
#[target_feature(enable = "avx2")]
#[inline]
fn turned(mut x: [__m128i; 16]) -> [__m128i; 16] {
    for _ in 0..4 {
        let mut y = x;
        for i in 0..8 {
            y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
            y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
        }
        x = y;
    }
    x
}

/// Products of a chain of `n` fours with the codes of a strip: by vector, rows 4 v to 4 v + 3 and 16 + 4 v to 16 + 4 v + 3.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn chain(fours: *const Four, n: usize, turned: *const u8) -> [__m256i; 4] {
    // Of rows 0 to 7 and 16 to 23, and of the others; of the fours' first pairs, and of their second ones.
    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    let (mut low2, mut high2) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    for i in 0..n {
        // SAFETY: there are `n` fours, whose inputs are among the turned ones.
        let (codes, weights) = unsafe {
            let four = &*fours.add(i);
            let codes = four.places.map(|place| _mm256_loadu_si256(turned.add(usize::from(place) * PLACE).cast()));
            (codes, four.weights.map(|pair| _mm256_set1_epi32(i32::from_ne_bytes(pair.map(i8::cast_unsigned)))))
        };
        let first = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(codes[0], codes[1]), weights[0]);
        let second = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(codes[0], codes[1]), weights[0]);
        (low, high) = (_mm256_add_epi16(low, first), _mm256_add_epi16(high, second));
        let first = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(codes[2], codes[3]), weights[1]);
        let second = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(codes[2], codes[3]), weights[1]);
        (low2, high2) = (_mm256_add_epi16(low2, first), _mm256_add_epi16(high2, second));
    }
    let ones = _mm256_set1_epi16(1);
    [
        _mm256_madd_epi16(_mm256_unpacklo_epi16(low, low2), ones),
        _mm256_madd_epi16(_mm256_unpackhi_epi16(low, low2), ones),
        _mm256_madd_epi16(_mm256_unpacklo_epi16(high, high2), ones),
        _mm256_madd_epi16(_mm256_unpackhi_epi16(high, high2), ones),
    ]
}

/// [`chain`] of the first half of a strip, in half the instructions; rows of the other half are 0.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn half_chain(fours: *const Four, n: usize, turned: *const u8) -> [__m256i; 4] {
    const FIRST: [i8; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3];
    // Of rows 0 to 7, and of rows 8 to 15; of the fours' first pairs in the lower lane, of their second ones in the upper.
    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    for i in 0..n {
        // SAFETY: there are `n` fours, whose inputs are among the turned ones.
        let (even, odd, weights) = unsafe {
            let four = &*fours.add(i);
            let codes = four.places.map(|place| _mm_loadu_si128(turned.add(usize::from(place) * PLACE).cast()));
            let first = _mm_loadu_si128(FIRST.as_ptr().cast());
            let each = _mm256_set_m128i(_mm_add_epi8(first, _mm_set1_epi8(4)), first);
            let weights = _mm256_set1_epi64x((&raw const four.weights).cast::<i64>().read_unaligned());
            let weights = _mm256_shuffle_epi8(weights, each);
            (_mm256_set_m128i(codes[2], codes[0]), _mm256_set_m128i(codes[3], codes[1]), weights)
        };
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(even, odd), weights));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(even, odd), weights));
    }
    let ones = _mm_set1_epi16(1);
    let lanes = |x: __m256i| (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let ((first, second), (first8, second8)) = (lanes(low), lanes(high));
    [
        _mm_madd_epi16(_mm_unpacklo_epi16(first, second), ones),
        _mm_madd_epi16(_mm_unpackhi_epi16(first, second), ones),
        _mm_madd_epi16(_mm_unpacklo_epi16(first8, second8), ones),
        _mm_madd_epi16(_mm_unpackhi_epi16(first8, second8), ones),
    ]
    .map(|rows| _mm256_zextsi128_si256(rows))
}

/// The same of the chains of the next column.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn column<const HALF: bool>(fours: &mut *const Four, chains: &Chains, turned: *const u8) -> [__m256i; 4] {
    let mut sums = [_mm256_setzero_si256(); 4];
    for at in 0..chains.n {
        let n = usize::from(chains.fours);
        // SAFETY: passed on; the column has as many chains.
        let products = unsafe { if HALF { half_chain(*fours, n, turned) } else { chain(*fours, n, turned) } };
        // SAFETY: as above.
        *fours = unsafe { fours.add(n) };
        for v in 0..4 {
            sums[v] = if at == 0 { products[v] } else { _mm256_add_epi32(sums[v], products[v]) };
        }
    }
    sums
}

/// Eight columns of four and four rows become these rows of eight columns.
#[target_feature(enable = "avx2")]
#[inline]
fn by_row(columns: [__m256i; EIGHT]) -> [[__m256i; 2]; 4] {
    let fours = |x: &[__m256i]| {
        let (a, b) = (_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
        let (c, d) = (_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
        let (first, second) = (_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c));
        [first, second, _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)]
    };
    let (left, right) = (fours(&columns[..4]), fours(&columns[4..]));
    std::array::from_fn(|r| {
        [_mm256_permute2x128_si256::<0x20>(left[r], right[r]), _mm256_permute2x128_si256::<0x31>(left[r], right[r])]
    })
}

/// Columns of a block that is exchanged at once.
const EIGHT: usize = 8;

/// Sums of a panel's outliers for a strip, or for the first half of its rows: `[STRIP, PANEL]`.
#[target_feature(enable = "avx2")]
#[inline(never)]
unsafe fn outliers<const HALF: bool>(split: &Split, turned: *const u8, sums: *mut i32) {
    let mut by_column = [const { MaybeUninit::<[__m256i; 4]>::uninit() }; PANEL];
    let by_column: *mut [__m256i; 4] = by_column.as_mut_ptr().cast();
    // SAFETY: the panel has as many fours, and there is room for the sums. Each column is among the chains.
    unsafe {
        let mut fours = split.outliers;
        for chains in &*split.chains {
            by_column.add(chains.column.into()).write(column::<HALF>(&mut fours, chains, turned));
        }
        for column in (0..PANEL).step_by(EIGHT) {
            let columns = &*by_column.add(column).cast::<[[__m256i; 4]; EIGHT]>();
            for v in 0..4 {
                let [a, b, c, d, e, f, g, h] = columns;
                let rows = by_row([a[v], b[v], c[v], d[v], e[v], f[v], g[v], h[v]]);
                for (r, [first, second]) in rows.into_iter().enumerate() {
                    let to = sums.add((4 * v + r) * PANEL + column);
                    _mm256_store_si256(to.cast(), first);
                    if !HALF {
                        _mm256_store_si256(to.add(STRIP / 2 * PANEL).cast(), second);
                    }
                }
            }
        }
    }
}

/// A tile of the main part; its sums start at `sums`, those of its first row and column.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn tile<T: Sink, const R: usize, const V: usize>(gemm: &Gemm<T>, tile: Tile, sums: *const i32) {
    // SAFETY: in range by contract; a panel holds `k_groups` groups.
    unsafe {
        let mut tile_sums = [[_mm256_setzero_si256(); V]; R];
        for r in 0..R {
            for v in 0..V {
                tile_sums[r][v] = _mm256_load_si256(sums.add(r * PANEL + v * 8).cast());
            }
        }
        let weights = gemm.weights.cast::<u8>().add(tile.column * 4);
        let load = |group: usize, v: usize| Avx2Within32::load(weights.add(group * PANEL * 4 + v * 32));
        for pair in 0..gemm.k_groups / 2 {
            let group = pair * 2;
            let mut both = [[load(group, 0), load(group + 1, 0)]; V];
            for v in 1..V {
                both[v] = [load(group, v), load(group + 1, v)];
            }
            for r in 0..R {
                let codes = tile.codes.add(r * tile.stride + group * 4);
                let codes = [Avx2Within32::codes(codes), Avx2Within32::codes(codes.add(4))];
                for v in 0..V {
                    tile_sums[r][v] = Avx2Within32::dot_two(tile_sums[r][v], codes, both[v]);
                }
            }
        }
        if !gemm.k_groups.is_multiple_of(2) {
            let group = gemm.k_groups - 1;
            for r in 0..R {
                let codes = Avx2Within32::codes(tile.codes.add(r * tile.stride + group * 4));
                for v in 0..V {
                    tile_sums[r][v] = Avx2Within32::dot(tile_sums[r][v], codes, load(group, v));
                }
            }
        }
        put::<Avx2Within32, T, R, V>(gemm, tile.row, tile.column, &tile_sums);
    }
}

/// Sums of outliers, aligned for vectors.
#[repr(C, align(64))]
struct Sums([MaybeUninit<i32>; STRIP * PANEL]);

/// `n_rows` rows times a panel, in tiles of 4x16.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
pub(super) unsafe fn gemm<T: Sink>(gemm: &Gemm<T>, split: Split) {
    let mut room = Sums([const { MaybeUninit::uninit() }; STRIP * PANEL]);
    let sums: *mut i32 = room.0.as_mut_ptr().cast();
    for first in (0..gemm.n_rows).step_by(STRIP) {
        let n_rows = STRIP.min(gemm.n_rows - first);
        // SAFETY: rows and columns are in range; all sums of the strip are written before they are read.
        unsafe {
            let turned = split.turned.add(first * gemm.k_groups * 4);
            if n_rows <= STRIP / 2 {
                outliers::<true>(&split, turned, sums);
            } else {
                outliers::<false>(&split, turned, sums);
            }
            for column in (0..PANEL).step_by(16) {
                for (row, n_rows) in row_tiles(n_rows, 4) {
                    let codes = gemm.codes.add((first + row) * gemm.stride);
                    let at = Tile { row: first + row, column, codes, stride: gemm.stride };
                    let sums = sums.add(row * PANEL + column);
                    match n_rows {
                        0 => {}
                        1 => tile::<T, 1, 2>(gemm, at, sums),
                        2 => tile::<T, 2, 2>(gemm, at, sums),
                        3 => tile::<T, 3, 2>(gemm, at, sums),
                        _ => tile::<T, 4, 2>(gemm, at, sums),
                    }
                }
            }
        }
    }
}
