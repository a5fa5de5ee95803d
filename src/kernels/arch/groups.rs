//! Matrix products with INT8 weights in groups of inputs that have a scale, and maybe an offset, each; written once over
//! [`Dot`]. The integer sums of a group are scaled and added in f32.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::dot::Dot;
use super::gemm::{Gemm, ValueSink};
use super::simd::Simd;
use super::tile::{Sums, Tile, add, put_product, start};
use crate::kernels::layout::PANEL;

/// `n_rows` rows of codes times one panel.
pub(super) struct Groups<T> {
    /// `k_groups` is not used.
    pub(super) gemm: Gemm<T>,
    pub(super) n_in: usize,
    /// Inputs of a group, a multiple of 4.
    pub(super) group: usize,
    /// `[n_groups, PANEL]` each.
    pub(super) scales: *const [f32; PANEL],
    pub(super) sums: *const [i32; PANEL],
    /// Null if all are 0.
    pub(super) offsets: *const [f32; PANEL],
}

/// Sums of `R` rows by `V` vectors of columns over the inputs of one group. (A function of its own: where the loop stands
/// beside the sums in f32, the compiler keeps the integer ones in memory.)
#[inline(always)]
unsafe fn sums<D: Dot, T, const R: usize, const V: usize>(
    args: &Groups<T>,
    tile: Tile,
    group: usize,
    inputs: Range<usize>,
) -> Sums<D, R, V> {
    // SAFETY: rows, columns and inputs are in range (the façade's checks).
    unsafe {
        let starts = (*args.sums.add(group)).as_ptr().add(tile.column);
        let mut sums = start::<D, R, V>(starts);
        let weights = args.gemm.weights.cast::<u8>().add(tile.column * 4);
        for step in inputs.start / 4..inputs.end.div_ceil(4) {
            let weights = weights.add(step * PANEL * 4);
            let codes = tile.codes.add(step * 4 * D::CODE_BYTES);
            add::<D, R, V>(&mut sums, codes, tile.stride, weights);
        }
        sums
    }
}

/// `Σ_g scale[g] · (codes of g · weights of g) + offset[g] · Σ codes of g`.
///
/// # Safety
/// As for [`Simd`]; the tile must be in range.
#[inline(always)]
pub(super) unsafe fn tile<D: Dot, T: ValueSink, const R: usize, const V: usize>(args: &Groups<T>, tile: Tile) {
    // SAFETY: rows, columns and groups are in range (the façade's checks).
    unsafe {
        let gemm = &args.gemm;
        let mut products = [[D::S::splat(0.0); V]; R];
        let mut first = 0;
        let mut group = 0;
        while first < args.n_in {
            let end = args.n_in.min(first + args.group);
            let sums = sums::<D, T, R, V>(args, tile, group, first..end);
            let scales = (*args.scales.add(group)).as_ptr().add(tile.column);
            for r in 0..R {
                for v in 0..V {
                    let scale = D::S::load(scales.add(v * D::S::LANES));
                    products[r][v] = D::S::fma(D::S::to_float(D::finish(sums[r][v])), scale, products[r][v]);
                }
                if !args.offsets.is_null() {
                    let offsets = (*args.offsets.add(group)).as_ptr().add(tile.column);
                    let row_sum = D::sum_codes(gemm.codes.add((tile.row + r) * gemm.stride + first), end - first);
                    #[allow(clippy::cast_precision_loss, reason = "at most 2^24")]
                    let row_sum = D::S::splat(row_sum as f32);
                    for v in 0..V {
                        let offset = D::S::load(offsets.add(v * D::S::LANES));
                        products[r][v] = D::S::fma(row_sum, offset, products[r][v]);
                    }
                }
            }
            first = end;
            group += 1;
        }
        for r in 0..R {
            for v in 0..V {
                put_product::<D::S, T>(gemm, tile.row + r, tile.column + v * D::S::LANES, products[r][v], 0);
            }
        }
    }
}
