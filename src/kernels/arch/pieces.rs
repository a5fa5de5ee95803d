//! Codes of activated rows with AVX-512, 32 numbers at once: each row's way from a number to its code is a curve of straight pieces,
//! in whole numbers of 16 bits.
//!
//! ```text
//! p = round((x + 4) · 65535 / (top + 4)), held to 0..=65535, i = ⌊p / 1024⌋
//! code = ⌊(v[i] + (v[i+1] − v[i]) · (p mod 1024) / 1024) / 128⌋,   v[i] = round(128 · (f(xᵢ) − f''(xᵢ) h²/16 − low) / step) + 64
//! ```
//! at the ends xᵢ, h = (top + 4) / 64 apart, of 64 pieces between −4, below which f is 0 but for 1.3e-4, and the row's top.
//!
//! *Error* besides the rounding to a code: that of a straight piece which lies half above and half below the curve, `h²/16 · max f''`
//! with `f'' ≤ 0.8`, or 1.3e-4 below −4: at most 0.07 of a step for the tops that rows are coded so for ([`TOPS`]); and a hundredth
//! of a step.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;
use std::ops::RangeInclusive;

use super::activations::{apply, apply_four, ceilings, floor};
use super::avx512::{Avx512, in_order};
use super::rows::{BARELY, Quantize, TOGETHER, quantize_rows, steps, top_of};
use super::simd::Simd;
use crate::kernels::Nonlinearity;
use crate::kernels::layout::PANEL;

/// Tops of rows that are coded so. Below, steps are small against the error of a piece; above, pieces are long. What is not, is
/// activated number by number.
const TOPS: RangeInclusive<f32> = 1.0..=12.0;
/// Where the pieces start.
const FLAT: f32 = -4.0;
const PIECES: usize = 64;
/// Positions within a piece.
const FINE: f32 = 1024.0;
/// Parts of a code.
const PARTS: f32 = 128.0;

/// A row's curve.
#[derive(Clone, Copy)]
struct Curve {
    scale: __m512,
    shift: __m512,
    value: [__m512i; 2],
    rise: [__m512i; 2],
}

/// Words of four vectors of dwords.
#[inline(always)]
unsafe fn words(x: [__m512i; 4]) -> [__m512i; 2] {
    // SAFETY: AVX-512 F, by contract.
    unsafe {
        let [a, b, c, d] = [
            _mm512_cvtepi32_epi16(x[0]),
            _mm512_cvtepi32_epi16(x[1]),
            _mm512_cvtepi32_epi16(x[2]),
            _mm512_cvtepi32_epi16(x[3]),
        ];
        let pair = |low, high| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
        [pair(a, b), pair(c, d)]
    }
}

/// The curve of a row up to `top` whose codes are `(f(x) − low) · inverse`.
#[inline(always)]
unsafe fn curve(kind: Nonlinearity, top: f32, low: f32, inverse: f32) -> Curve {
    // SAFETY: AVX-512 F and BW, by contract.
    unsafe {
        let scale = (PIECES as f32 * FINE - 1.0) / (top - FLAT);
        let piece = FINE / scale;
        let lane = _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
        let mut ends = [_mm512_fmadd_ps(lane, _mm512_set1_ps(piece), _mm512_set1_ps(FLAT)); 4];
        for v in 1..4 {
            ends[v] = _mm512_add_ps(ends[0], _mm512_set1_ps((16 * v) as f32 * piece));
        }
        let ys = apply_four::<Avx512>(kind, ends);
        let last = apply::<Avx512>(kind, _mm512_set1_ps(FLAT + PIECES as f32 * piece));
        let first = _mm512_broadcastss_ps(_mm512_castps512_ps128(ys[0]));
        let all = [first, ys[0], ys[1], ys[2], ys[3], last].map(|y| _mm512_castps_si512(y));
        let mut values = [_mm512_setzero_si512(); 5];
        for v in 0..5 {
            // Half of what a straight piece lies above a curve at most, an eighth of the second difference.
            let (before, here) = (_mm512_alignr_epi32::<15>(all[v + 1], all[v]), all[v + 1]);
            let after = _mm512_alignr_epi32::<1>(all[(v + 2).min(5)], here);
            let [before, here, after] = [before, here, after].map(|y| _mm512_castsi512_ps(y));
            let bend = _mm512_add_ps(_mm512_sub_ps(before, here), _mm512_sub_ps(after, here));
            let y = match v {
                4 => here,
                _ => _mm512_fmadd_ps(bend, _mm512_set1_ps(-1.0 / 16.0), here),
            };
            let code = _mm512_mul_ps(_mm512_sub_ps(y, _mm512_set1_ps(low)), _mm512_set1_ps(inverse * PARTS));
            values[v] = _mm512_cvtps_epi32(_mm512_add_ps(code, _mm512_set1_ps(PARTS / 2.0)));
        }
        let mut rises = [_mm512_setzero_si512(); 4];
        for v in 0..4 {
            let next = _mm512_alignr_epi32::<1>(values[v + 1], values[v]);
            rises[v] = _mm512_sub_epi32(next, values[v]);
        }
        let [a, b, c, d, _] = values;
        let (scale, shift) = (_mm512_set1_ps(scale), _mm512_set1_ps(-FLAT * scale));
        Curve { scale, shift, value: words([a, b, c, d]), rise: words(rises) }
    }
}

/// Codes of 64 numbers.
#[inline(always)]
unsafe fn codes(curve: &Curve, x: [__m512; 4]) -> __m512i {
    // SAFETY: AVX-512 F and BW, by contract.
    unsafe {
        let mut halves = [_mm512_setzero_si512(); 2];
        for h in 0..2 {
            let low = _mm512_cvtps_epi32(_mm512_fmadd_ps(x[2 * h], curve.scale, curve.shift));
            let high = _mm512_cvtps_epi32(_mm512_fmadd_ps(x[2 * h + 1], curve.scale, curve.shift));
            // What lies below or above of all pieces is held to their ends.
            let position = _mm512_packus_epi32(low, high);
            let piece = _mm512_srli_epi16::<10>(position);
            let within = _mm512_and_si512(_mm512_slli_epi16::<5>(position), _mm512_set1_epi16(0x7fff));
            let value = _mm512_permutex2var_epi16(curve.value[0], piece, curve.value[1]);
            let rise = _mm512_permutex2var_epi16(curve.rise[0], piece, curve.rise[1]);
            let code = _mm512_add_epi16(value, _mm512_mulhrs_epi16(rise, within));
            halves[h] = _mm512_srli_epi16::<7>(code);
        }
        in_order(_mm512_packus_epi16(halves[0], halves[1]))
    }
}

/// Codes of row `first` of `args.rows`. A function of its own, so that the curve stays in registers.
///
/// # Safety
/// AVX-512 must be there, and the row.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn code_row(args: &Quantize, first: usize, curve: &Curve) {
    // SAFETY: as the contract says; a panel holds `PANEL` columns of the row.
    unsafe {
        let curve = *curve;
        let mut to = args.codes.add(first * args.stride);
        let mut from = args.block.add((args.rows.start + first) * PANEL);
        for _ in 0..args.n / PANEL {
            let mut x = [_mm512_loadu_ps(from); 4];
            for v in 1..4 {
                x[v] = _mm512_loadu_ps(from.add(v * Avx512::LANES));
            }
            _mm512_storeu_si512(to.cast(), codes(&curve, x));
            to = to.add(PANEL);
            from = from.wrapping_add(args.n_rows * PANEL);
        }
        let rest = args.n % PANEL;
        if rest > 0 {
            let mask = (1u64 << rest) - 1;
            let mut x = [_mm512_setzero_ps(); 4];
            for v in 0..4 {
                x[v] = _mm512_maskz_loadu_ps((mask >> (16 * v)) as u16, from.add(v * Avx512::LANES));
            }
            _mm512_mask_storeu_epi8(to.cast(), mask, codes(&curve, x));
        }
    }
}

/// [`super::rows::quantize`] of numbers that go through either form of GELU first, in the range that they are found in.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn quantize(kind: Nonlinearity, args: &Quantize) {
    // SAFETY: the block holds `n_rows` rows of ⌈n / PANEL⌉ panels, codes and scales hold `rows` (the façade's checks).
    unsafe {
        for start in (0..args.rows.len()).step_by(TOGETHER) {
            let size = TOGETHER.min(args.rows.len() - start);
            let mut tops = [_mm512_setzero_ps(); TOGETHER];
            for r in 0..size {
                tops[r] = top_of::<Avx512>(args, start + r);
            }
            let tops = Avx512::highests(tops);
            let by = steps([floor(kind); TOGETHER], ceilings::<Avx512>(kind, tops), None);
            for r in 0..size {
                if TOPS.contains(&tops[r]) {
                    let curve = curve(kind, tops[r], by[r].0.low, by[r].1);
                    *args.scales.add(start + r) = by[r].0;
                    code_row(args, start + r, &curve);
                } else {
                    quantize_rows::<Avx512, 1, BARELY>(Some(kind), args, start + r);
                }
            }
        }
    }
}
