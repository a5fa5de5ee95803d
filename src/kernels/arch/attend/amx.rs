//! The products of [`super::full`] with AMX.
//!
//! ```text
//! scores    tile by tile of 16 keys, 64 dimensions a step
//! context   two tiles of 16 dimensions at once, 64 keys a step
//! ```

use super::super::amx::{and_rest, on_tiles, shape_tiles};
use super::full::{self, Keys, Lanes, PAIR, QUERY_STRIDE, STEP, Sums, TILE, Tiles, Values, WEIGHT_STRIDE};
use crate::kernels::attention::KEY_BLOCK;

/// Tiles of the matrix unit. All 16 queries are computed, however many there are.
pub(in crate::kernels::arch) struct Amx;

const _: () = assert!(TILE == KEY_BLOCK);

// SAFETY: AMX, which the contract demands.
unsafe impl Tiles for Amx {
    const WHOLE_STEPS: bool = true;

    #[inline]
    unsafe fn prepare() {
        // SAFETY: AMX is usable by contract.
        unsafe { shape_tiles() }
    }

    #[inline]
    unsafe fn scores(
        queries: *const u8,
        n_queries: usize,
        keys: Keys,
        to: *mut u8,
        stride: usize,
        highest: &mut Lanes,
    ) {
        let (block, n_steps) = (KEY_BLOCK * keys.d, keys.d.div_ceil(STEP));
        let mut key = 0;
        while key < keys.n_slots {
            // SAFETY: in range by contract.
            unsafe {
                let (from, to) = (keys.first.add(key * keys.d), to.add(4 * key));
                if key + 4 * KEY_BLOCK <= keys.n_slots {
                    score::<4>(queries, n_steps, from, block, to, stride);
                    key += 4 * KEY_BLOCK;
                } else {
                    score::<1>(queries, n_steps, from, block, to, stride);
                    key += KEY_BLOCK;
                }
            }
        }
        for q in 0..n_queries {
            // SAFETY: AVX-512 comes with AMX; the row holds whole vectors.
            highest[q] = unsafe { full::highest(to.add(q * stride).cast(), keys.n_keys) };
        }
    }

    #[inline]
    unsafe fn context(weights: *const u8, _n_queries: usize, values: Values, sums: &mut Sums) {
        // SAFETY: passed on.
        unsafe { add_up(weights, values, sums) }
    }
}

/// Scores of 16 queries with `N` blocks of keys, which is 1 or 4.
///
/// # Safety
/// AMX must be usable and its tiles shaped. `queries` is `[16, QUERY_STRIDE]`, zeros beyond the head's dimensions; a block of keys
/// takes `block` bytes, and as many bytes must be readable from its start as the `n_steps` take; `to` is `[16, stride]`.
#[inline]
unsafe fn score<const N: usize>(
    queries: *const u8,
    n_steps: usize,
    keys: *const u8,
    block: usize,
    to: *mut u8,
    stride: usize,
) {
    // SAFETY: as the contract says; the assembly writes N tiles of scores.
    unsafe {
        if N == 4 {
            on_tiles!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{queries} + {query_stride}]",
                "tileloadd tmm5, [{first} + {line}]",
                "tileloadd tmm6, [{second} + {line}]",
                "tileloadd tmm7, [{third} + {line}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "tileloadd tmm5, [{fourth} + {line}]",
                "tdpbsud tmm1, tmm4, tmm6",
                "tdpbsud tmm2, tmm4, tmm7",
                "tdpbsud tmm3, tmm4, tmm5",
                "add {queries}, 64",
                "add {first}, 1024",
                "add {second}, 1024",
                "add {third}, 1024",
                "add {fourth}, 1024",
                "dec {n_steps}",
                "jnz 2b",
                "tilestored [{to} + {stride}], tmm0",
                "tilestored [{to} + {stride} + 64], tmm1",
                "tilestored [{to} + {stride} + 128], tmm2",
                "tilestored [{to} + {stride} + 192], tmm3",
                queries = inout(reg) queries => _,
                query_stride = in(reg) QUERY_STRIDE,
                first = inout(reg) keys => _,
                second = inout(reg) keys.add(block) => _,
                third = inout(reg) keys.add(2 * block) => _,
                fourth = inout(reg) keys.add(3 * block) => _,
                line = in(reg) STEP,
                n_steps = inout(reg) n_steps => _,
                to = in(reg) to,
                stride = in(reg) stride,
            );
        } else {
            on_tiles!(
                "tilezero tmm0",
                "2:",
                "tileloadd tmm4, [{queries} + {query_stride}]",
                "tileloadd tmm5, [{keys} + {line}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "add {queries}, 64",
                "add {keys}, 1024",
                "dec {n_steps}",
                "jnz 2b",
                "tilestored [{to} + {stride}], tmm0",
                queries = inout(reg) queries => _,
                query_stride = in(reg) QUERY_STRIDE,
                keys = inout(reg) keys => _,
                line = in(reg) STEP,
                n_steps = inout(reg) n_steps => _,
                to = in(reg) to,
                stride = in(reg) stride,
            );
        }
    }
}

/// Sums of weights times values, 16 queries by 32 dimensions.
///
/// # Safety
/// AMX must be usable and its tiles shaped; `weights` is `[16, WEIGHT_STRIDE]`, as wide as the steps; there is a key.
#[inline]
unsafe fn add_up(weights: *const u8, values: Values, sums: &mut Sums) {
    let (mut first, mut n_steps) = (values.first, values.n_keys / STEP);
    let mut rest = if values.n_keys.is_multiple_of(STEP) { std::ptr::null() } else { values.rest };
    if n_steps == 0 {
        (first, n_steps, rest) = (rest, 1, std::ptr::null());
    }
    // SAFETY: as the contract says; the assembly writes the 512 sums.
    unsafe {
        on_tiles!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{weights} + {stride}]",
            "tileloadd tmm5, [{values} + {line}]",
            "tileloadd tmm6, [{values} + {line} + 64]",
            "tdpbusd tmm0, tmm4, tmm5",
            "tdpbusd tmm1, tmm4, tmm6",
            "add {weights}, 64",
            "add {values}, {step}",
            "dec {n_steps}",
            "jnz 2b",
            and_rest!("{values}"),
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 64], tmm1",
            weights = inout(reg) weights => _,
            stride = in(reg) WEIGHT_STRIDE,
            values = inout(reg) first => _,
            line = in(reg) values.line,
            step = in(reg) values.line * (STEP / 4),
            n_steps = inout(reg) n_steps => _,
            rest = inout(reg) rest => _,
            sums = in(reg) sums.0.as_mut_ptr().cast::<i32>(),
            row = in(reg) PAIR * size_of::<i32>(),
        );
    }
}
