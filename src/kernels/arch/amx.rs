//! AMX with INT8: the matrix product of AVX-512's kernels in tiles of the matrix unit. Everything else is AVX-512's.
//!
//! ```text
//! tile of codes     16 rows of 64 inputs                    rows of a block, as they lie
//! tile of weights   64 inputs by 16 columns, four by four   16 lines of a panel, 256 bytes apart, as they lie
//! tile of sums      16 rows by 16 columns, i32
//! ```
//!
//! So both operands are read in the layout that VNNI reads. The compiler knows neither the tiles nor their instructions (the
//! intrinsics are not stable): they stand in blocks of assembly, each of which takes its sums from memory or begins without, and
//! ends with them in memory, so that nothing but the shape of the tiles outlives a block.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::attend::amx::Amx;
use super::attend::full;
use super::attend::table::{AttentionTable, Forms};
use super::avx512::{self, Avx512};
use super::gemm::{Gemm, Sink};
use super::table::Table;
use crate::kernels::layout::PANEL;

mod groups;

pub(super) use self::groups::groups;

const _: () = assert!(<Avx512 as super::simd::Simd>::LANES == TILE);

/// Rows, and columns, of a tile of sums.
const TILE: usize = 16;
/// Groups of four inputs that a tile holds: a step.
const STEP_GROUPS: usize = 16;

/// Steps that are computed for several squares before the next ones are: the weights of 32 columns and the codes of 64 rows then
/// stay in the first cache.
const CHUNK: usize = 6;
/// Squares that a chunk is computed for.
const SQUARES: usize = 2;
const _: () = assert!(SQUARES * 2 * TILE <= crate::kernels::KernelSet::MOST_BLOCK_ROWS);

/// What `ldtilecfg` reads: palette 1, eight tiles of 16 rows by 64 bytes.
#[repr(C, align(64))]
struct Shapes([u8; 64]);

static SHAPES: Shapes = {
    let mut shapes = [0; 64];
    shapes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        shapes[16 + 2 * tile] = 64;
        shapes[48 + tile] = TILE as u8;
        tile += 1;
    }
    Shapes(shapes)
};

/// Assembly that changes tiles, and no stack.
macro_rules! on_tiles {
    ($($part:tt)*) => {
        std::arch::asm!(
            $($part)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}
pub(super) use on_tiles;

/// The end of a loop "2" over the `n_steps` at `$from`: once more for the one at `rest`, unless that is null.
macro_rules! and_rest {
    ($from:literal) => {
        concat!(
            "test {rest}, {rest}\n",
            "jz 3f\n",
            "mov ",
            $from,
            ", {rest}\n",
            "xor {rest:e}, {rest:e}\n",
            "mov {n_steps:e}, 1\n",
            "jmp 2b\n",
            "3:",
        )
    };
}
pub(super) use and_rest;

thread_local! {
    /// Whether this thread's tiles have their shape. It is part of the thread's state like any register, and nobody else in
    /// the process uses tiles: candle has such kernels for GGUF matrices (`quantized::QMatMul`), which are not read here.
    static SHAPED: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread's tiles their shape.
///
/// # Safety
/// AMX must be there, and the system allow it (`detect`): an [`Isa`](crate::kernels::Isa) of that name is the proof.
#[inline]
pub(super) unsafe fn shape_tiles() {
    SHAPED.with(|shaped| {
        if !shaped.replace(true) {
            // SAFETY: as the contract says.
            unsafe { asm!("ldtilecfg [{}]", in(reg) SHAPES.0.as_ptr(), options(nostack, preserves_flags, readonly)) }
        }
    });
}

/// A panel's weights of a step, zeros behind the last.
#[repr(C, align(64))]
struct Filled([i8; STEP_GROUPS * 4 * PANEL]);

/// Sums of four tiles on their way to a [`Sink`].
#[repr(C, align(64))]
struct Sums([MaybeUninit<i32>; 4 * TILE * TILE]);

/// The weights of 32 or 64 columns: whole steps of 64 inputs, and one that is filled up with zeros.
#[derive(Clone, Copy)]
struct Steps {
    weights: *const i8,
    n_whole: usize,
    /// Null if whole steps are all.
    rest: *const i8,
}

impl Steps {
    /// The weights of at most [`CHUNK`] steps from step `step` on; what fills up the last step comes with the last chunk.
    fn chunk(self, step: usize) -> Self {
        let rest = if step + CHUNK >= self.n_whole { self.rest } else { std::ptr::null() };
        let weights = self.weights.wrapping_add(step * STEP_GROUPS * 4 * PANEL);
        Self { weights, n_whole: CHUNK.min(self.n_whole - step), rest }
    }

    /// The same from column `column` of the panel on.
    fn from(self, column: usize) -> Self {
        let rest = if self.rest.is_null() { self.rest } else { self.rest.wrapping_add(column * 4) };
        Self { weights: self.weights.wrapping_add(column * 4), rest, ..self }
    }
}

/// A function that makes a square of sums; each step executes `$fetch` besides.
macro_rules! square {
    ($name:ident $(, $fetch:literal)*) => {
        /// `sums[r, c] = Σ_k codes[r, k] · weights[c, k]` for 32 rows and 32 columns, rows 32 apart; added to what is there if it
        /// shall `go_on`. `ahead` goes along a panel as the weights do.
        ///
        /// # Safety
        /// AMX must be usable and the tiles shaped; 32 rows of codes and the weights of the steps must be readable, there must
        /// be a whole step, and sums to go on from.
        #[inline]
        unsafe fn $name(codes: *const u8, stride: usize, steps: Steps, go_on: bool, ahead: *const i8, sums: &mut Sums) {
            let sums: *mut i32 = sums.0.as_mut_ptr().cast();
            // SAFETY: as the contract says; the assembly writes the 1,024 sums only.
            unsafe {
                on_tiles!(
                    "test {go_on}, {go_on}",
                    "jz 4f",
                    "tileloadd tmm0, [{sums} + {row}]",
                    "tileloadd tmm1, [{sums} + {row} + 64]",
                    "tileloadd tmm2, [{below} + {row}]",
                    "tileloadd tmm3, [{below} + {row} + 64]",
                    "jmp 2f",
                    "4:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{upper} + {stride}]",
                    "tileloadd tmm6, [{weights} + {line}]",
                    "tileloadd tmm7, [{weights} + {line} + 64]",
                    "tdpbusd tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{lower} + {stride}]",
                    "tdpbusd tmm1, tmm4, tmm7",
                    $($fetch,)*
                    "tdpbusd tmm2, tmm5, tmm6",
                    "tdpbusd tmm3, tmm5, tmm7",
                    "add {upper}, 64",
                    "add {lower}, 64",
                    "add {weights}, 4096",
                    "add {ahead}, 4096",
                    "dec {n_steps}",
                    "jnz 2b",
                    and_rest!("{weights}"),
                    "tilestored [{sums} + {row}], tmm0",
                    "tilestored [{sums} + {row} + 64], tmm1",
                    "tilestored [{below} + {row}], tmm2",
                    "tilestored [{below} + {row} + 64], tmm3",
                    upper = inout(reg) codes => _,
                    lower = inout(reg) codes.add(TILE * stride) => _,
                    stride = in(reg) stride,
                    weights = inout(reg) steps.weights => _,
                    rest = inout(reg) steps.rest => _,
                    n_steps = inout(reg) steps.n_whole => _,
                    ahead = inout(reg) ahead => _,
                    line = in(reg) 4 * PANEL,
                    sums = in(reg) sums,
                    below = in(reg) sums.add(TILE * 2 * TILE),
                    row = in(reg) 2 * TILE * size_of::<i32>(),
                    go_on = in(reg) usize::from(go_on),
                );
            }
        }
    };
}

square!(square);
// Fetches the two lines of each group that a square of the weights ahead reads.
square!(
    square_ahead,
    ".irp group, 0, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840",
    "prefetcht0 [{ahead} + \\group]",
    "prefetcht0 [{ahead} + \\group + 64]",
    ".endr"
);

/// A function that makes a strip of sums; each step executes `$fetch` besides.
macro_rules! strip {
    ($name:ident $(, $fetch:literal)*) => {
        /// `sums[r, c]` as in a square, for 16 rows and the 64 columns of a panel, rows 64 apart.
        ///
        /// # Safety
        /// As for a square, with 16 rows.
        #[inline]
        unsafe fn $name(codes: *const u8, stride: usize, steps: Steps, sums: &mut Sums) {
            // SAFETY: as for `square`.
            unsafe {
                on_tiles!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{codes} + {stride}]",
                    "tileloadd tmm5, [{weights} + {line}]",
                    "tileloadd tmm6, [{weights} + {line} + 64]",
                    "tileloadd tmm7, [{weights} + {line} + 128]",
                    "tdpbusd tmm0, tmm4, tmm5",
                    "tileloadd tmm5, [{weights} + {line} + 192]",
                    "tdpbusd tmm1, tmm4, tmm6",
                    "tdpbusd tmm2, tmm4, tmm7",
                    $($fetch,)*
                    "tdpbusd tmm3, tmm4, tmm5",
                    "add {codes}, 64",
                    "add {weights}, 4096",
                    "dec {n_steps}",
                    "jnz 2b",
                    and_rest!("{weights}"),
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + 64], tmm1",
                    "tilestored [{sums} + {line} + 128], tmm2",
                    "tilestored [{sums} + {line} + 192], tmm3",
                    codes = inout(reg) codes => _,
                    stride = in(reg) stride,
                    weights = inout(reg) steps.weights => _,
                    rest = inout(reg) steps.rest => _,
                    n_steps = inout(reg) steps.n_whole => _,
                    // A row of sums is as long as a line of weights.
                    line = in(reg) 4 * PANEL,
                    sums = in(reg) sums.0.as_mut_ptr().cast::<i32>(),
                );
            }
        }
    };
}

strip!(strip);
// Fetches the step behind, which at the end of a panel is the next one's first.
strip!(
    strip_ahead,
    ".irp group, 0, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840",
    "prefetcht0 [{weights} + 4096 + \\group]",
    "prefetcht0 [{weights} + 4096 + \\group + 64]",
    "prefetcht0 [{weights} + 4096 + \\group + 128]",
    "prefetcht0 [{weights} + 4096 + \\group + 192]",
    ".endr"
);

/// Hands rows `rows` of sums, `V` tiles side by side, to the sink: those of row `first + r` and of the columns from `column` on.
///
/// # Safety
/// AVX-512 must be there; the sums must have been written, and rows and columns be in range.
#[inline(always)]
unsafe fn put<T: Sink, const V: usize>(gemm: &Gemm<T>, first: usize, rows: Range<usize>, column: usize, sums: &Sums) {
    // SAFETY: as the contract says.
    unsafe {
        let mut columns = [T::columns::<Avx512>(gemm, column); V];
        for v in 1..V {
            columns[v] = T::columns::<Avx512>(gemm, column + v * TILE);
        }
        for r in rows {
            for v in 0..V {
                let sum = _mm512_load_si512(sums.0.as_ptr().add((r * V + v) * TILE).cast());
                T::put::<Avx512>(gemm, first + r, column + v * TILE, columns[v], sum);
            }
        }
    }
}

/// `gemm_u8i8_amx_int8`: squares of 32 by 32; what is left of the rows in strips of 16, the last of which may take up rows again
/// that have their results already. Inputs that fill no whole step meet zeros behind the last weight. Fewer rows than a tile has,
/// and fewer inputs than a step has, are AVX-512's.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn gemm<T: Sink>(gemm: &Gemm<T>) {
    let (n_whole, n_rest) = (gemm.k_groups / STEP_GROUPS, gemm.k_groups % STEP_GROUPS);
    if gemm.n_rows < TILE || n_whole == 0 || n_rest > 0 && !gemm.whole_lines {
        // SAFETY: passed on unchanged.
        return unsafe { avx512::gemm(gemm) };
    }
    // SAFETY: an `Isa` of this name is the proof.
    unsafe { shape_tiles() };
    let mut steps = Steps { weights: gemm.weights, n_whole, rest: std::ptr::null() };
    let mut filled;
    if n_rest > 0 {
        filled = Filled([0; STEP_GROUPS * 4 * PANEL]);
        // SAFETY: the panel's last groups lie behind its whole steps.
        let last = unsafe { gemm.weights.add(n_whole * STEP_GROUPS * 4 * PANEL) };
        // SAFETY: there are `n_rest` of them.
        unsafe { filled.0.as_mut_ptr().copy_from(last, n_rest * 4 * PANEL) };
        steps.rest = filled.0.as_ptr();
    }
    let mut squares = [const { Sums([const { MaybeUninit::uninit() }; 4 * TILE * TILE]) }; SQUARES];
    let whole = gemm.n_rows / (2 * TILE) * (2 * TILE);
    // SAFETY: every tile's rows are below `n_rows` and its columns below PANEL. Its inputs are below `4 · k_groups`, or else
    // below the stride in rows that are there as a whole.
    unsafe {
        for start in (0..whole).step_by(SQUARES * 2 * TILE) {
            let n_squares = SQUARES.min((whole - start) / (2 * TILE));
            for first in [0, 2 * TILE] {
                let ahead = match first {
                    _ if n_squares > 1 => std::ptr::null(),
                    0 => gemm.weights.add(2 * TILE * 4),
                    _ => gemm.next,
                };
                for step in (0..n_whole).step_by(CHUNK) {
                    let chunk = steps.chunk(step).from(first);
                    for (index, sums) in squares[..n_squares].iter_mut().enumerate() {
                        let row = start + index * 2 * TILE;
                        let codes = gemm.codes.add(row * gemm.stride + step * STEP_GROUPS * 4);
                        if ahead.is_null() {
                            square(codes, gemm.stride, chunk, step > 0, ahead, sums);
                        } else {
                            let ahead = ahead.wrapping_add(step * STEP_GROUPS * 4 * PANEL);
                            square_ahead(codes, gemm.stride, chunk, step > 0, ahead, sums);
                        }
                        if step + CHUNK >= n_whole {
                            put::<T, 2>(gemm, row, 0..2 * TILE, first, sums);
                        }
                    }
                }
            }
        }
        let sums = &mut squares[0];
        let mut row = whole;
        while row < gemm.n_rows {
            let start = row.min(gemm.n_rows - TILE);
            let codes = gemm.codes.add(start * gemm.stride);
            if whole == 0 {
                strip_ahead(codes, gemm.stride, steps, sums);
            } else {
                strip(codes, gemm.stride, steps, sums);
            }
            put::<T, 4>(gemm, start, row - start..TILE, 0, sums);
            row = start + TILE;
        }
    }
}

/// Multiply-accumulates of `rounds` rounds of `tdpbusd` on tiles that are there; for [`peak`](super::peak).
///
/// # Safety
/// As for [`shape_tiles`].
pub(super) unsafe fn burn(rounds: u64) -> u64 {
    // SAFETY: AMX is usable by contract; memory is not touched.
    unsafe {
        shape_tiles();
        on_tiles!(
            "2:",
            "tdpbusd tmm0, tmm4, tmm6",
            "tdpbusd tmm1, tmm4, tmm7",
            "tdpbusd tmm2, tmm5, tmm6",
            "tdpbusd tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) rounds.max(1) => _,
        );
    }
    rounds.max(1) * 4 * (TILE * TILE * 4 * STEP_GROUPS) as u64
}

pub(super) static TABLE: Table = Table {
    name: "gemm_u8i8_amx_int8",
    // One square, for which the next weights are fetched ahead, or several that share a chunk.
    block_rows: [2 * TILE, SQUARES * 2 * TILE],
    gemm_i32: gemm::<i32>,
    gemm_f32: gemm::<f32>,
    gemm_half: gemm::<u16>,
    // Its sums come from memory, in halves of a panel's rows.
    gemm_topped: None,
    gemm_added: None,
    attention: Forms {
        tables: &[
            avx512::TABLE.attention.tables[0],
            avx512::TABLE.attention.tables[1],
            AttentionTable { attend: full::attend::<Amx>, ..avx512::TABLE.attention.tables[2] },
        ],
        ..avx512::TABLE.attention
    },
    ..avx512::TABLE
};
