//! How fast the INT8 multiply instruction itself runs: independent accumulators in registers, no memory.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
#[cfg(target_arch = "x86_64")]
use std::hint::black_box;

use crate::kernels::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernels::IsaName;

/// Multiply-accumulates of `rounds` rounds of the instruction set's widest INT8 multiply; `None` where there is none.
#[cfg(target_arch = "x86_64")]
pub(in crate::kernels) fn burn(isa: Isa, rounds: u64) -> Option<u64> {
    match isa.name() {
        // SAFETY: holding an `Isa` is the proof that the machine has it.
        IsaName::AmxInt8 => Some(unsafe { super::amx::burn(rounds) }),
        // SAFETY: as above.
        IsaName::Avx512Vnni => Some(unsafe { avx512_vnni(rounds) }),
        // SAFETY: as above.
        IsaName::AvxVnni => Some(unsafe { avx_vnni(rounds) }),
        // SAFETY: as above.
        IsaName::Avx2 => Some(unsafe { avx2(rounds) }),
        _ => None,
    }
}

/// Not measured on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub(in crate::kernels) fn burn(_isa: Isa, _rounds: u64) -> Option<u64> {
    None
}

/// Accumulators: more than two ports times five cycles of latency.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn avx512_vnni(rounds: u64) -> u64 {
    let (codes, weights) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(1)));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, codes, weights);
        }
    }
    black_box(sums);
    rounds * CHAINS as u64 * 64
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
fn avx_vnni(rounds: u64) -> u64 {
    let (codes, weights) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(1)));
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, codes, weights);
        }
    }
    black_box(sums);
    rounds * CHAINS as u64 * 32
}

/// On AVX2 the fastest exact products are of two bytes, added in 16 bits twice (`split.rs`). Each sum is multiplied itself, or it would be
/// taken out of the loop.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(rounds: u64) -> u64 {
    /// Beside which three constants and what is between leave no more registers.
    const CHAINS: usize = 10;
    let (first, second, ones) =
        (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(2)), black_box(_mm256_set1_epi16(1)));
    let mut sums = [ones; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(*sum, first), _mm256_maddubs_epi16(*sum, second));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
        }
    }
    black_box(sums);
    rounds * CHAINS as u64 * 64
}
