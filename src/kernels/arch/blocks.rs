//! Matrix products with INT8 blocks of which only some are there, written once over [`Dot`]: the loop over inputs runs over
//! a list, so time falls with the blocks.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::dot::Dot;
use super::gemm::{Gemm, Sink, ValueSink};
use super::simd::Simd;
use super::tile::{Sums, Tile, add, put, put_product, start};

/// `n_rows` rows of codes times one strip of blocks.
pub(super) struct Blocks<T> {
    /// `weights` are the blocks' codes; `k_groups` is not used.
    pub(super) gemm: Gemm<T>,
    pub(super) n_in: usize,
    /// Columns of the strip, and where in the panel it starts.
    pub(super) width: usize,
    pub(super) first_column: usize,
    /// First input of each block.
    pub(super) inputs: *const u16,
    pub(super) n_blocks: usize,
    /// Added to every weight of a column, `[PANEL]`; null if nothing is.
    pub(super) offsets: *const f32,
}

/// Sums of `R` rows by `V` vectors of columns from `column` of the strip.
#[inline(always)]
unsafe fn sums<D: Dot, T, const R: usize, const V: usize>(args: &Blocks<T>, tile: Tile) -> Sums<D, R, V> {
    // SAFETY: rows and columns are in range, each block's inputs are below the stride (the façade's checks).
    unsafe {
        let gemm = &args.gemm;
        let starts = (*gemm.columns).sum.as_ptr().add(args.first_column + tile.column);
        let mut sums = start::<D, R, V>(starts);
        let size = args.width * 4;
        let mut weights = gemm.weights.cast::<u8>().add(tile.column * 4);
        for block in 0..args.n_blocks {
            let codes = tile.codes.add(usize::from(*args.inputs.add(block)) * D::CODE_BYTES);
            add::<D, R, V>(&mut sums, codes, tile.stride, weights);
            weights = weights.add(size);
        }
        sums
    }
}

/// `scale · codes` in every block.
///
/// # Safety
/// As for [`Simd`]; the tile must be in range.
#[inline(always)]
pub(super) unsafe fn tile<D: Dot, T: Sink, const R: usize, const V: usize>(args: &Blocks<T>, tile: Tile) {
    // SAFETY: in range by contract.
    unsafe {
        let sums = sums::<D, T, R, V>(args, tile);
        put::<D, T, R, V>(&args.gemm, tile.row, args.first_column + tile.column, &sums);
    }
}

/// `scale · codes + offset` in every block: the offset takes the sum of a row's codes.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn offset_tile<D: Dot, T: ValueSink, const R: usize, const V: usize>(args: &Blocks<T>, tile: Tile) {
    // SAFETY: in range by contract; there are PANEL offsets.
    unsafe {
        let sums = sums::<D, T, R, V>(args, tile);
        let gemm = &args.gemm;
        let first = args.first_column + tile.column;
        for r in 0..R {
            let row_sum = D::sum_codes(gemm.codes.add((tile.row + r) * gemm.stride), args.n_in);
            #[allow(clippy::cast_precision_loss, reason = "at most 2^24")]
            let row_sum = D::S::splat(row_sum as f32);
            for v in 0..V {
                let column = first + v * D::S::LANES;
                let scale = D::S::load((*gemm.columns).scale.as_ptr().add(column));
                let extra = D::S::mul(row_sum, D::S::load(args.offsets.add(column)));
                let product = D::S::fma(D::S::to_float(D::finish(sums[r][v])), scale, extra);
                put_product::<D::S, T>(gemm, tile.row + r, column, product, 0);
            }
        }
    }
}
