//! What the INT8 matrix products of all instruction sets share: arguments, row tiles, and what becomes of accumulators.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::simd::Simd;
use crate::kernels::layout::{PANEL, PanelColumns, RowScale, RowSums, RowTop};
use crate::kernels::outliers::{Four, PanelChains};

/// `n_rows` rows of codes times one panel of weights.
pub(super) struct Gemm<T> {
    /// `[n_rows, stride]`.
    pub(super) codes: *const u8,
    pub(super) stride: usize,
    /// Whether rows may be read to the multiple of 64 codes that their last code lies below.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "AMX alone reads on"))]
    pub(super) whole_lines: bool,
    pub(super) scales: *const RowScale,
    pub(super) n_rows: usize,
    /// `[k_groups][PANEL][4]`.
    pub(super) weights: *const i8,
    pub(super) k_groups: usize,
    pub(super) columns: *const PanelColumns,
    /// `[n_rows, PANEL]`, or rows `out_stride` apart where that is another number.
    pub(super) out: *mut T,
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "AVX-512 alone has results that are not a panel's")
    )]
    pub(super) out_stride: usize,
    /// What is taken along of each row of results by those that do; else null.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "as above"))]
    pub(super) tops: *mut RowTop,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "as above"))]
    pub(super) sums: *mut RowSums,
    /// The panel that will be needed next, or null.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "AVX-512 alone asks for it ahead"))]
    pub(super) next: *const i8,
    /// What the weights are without; none if they are whole.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "AVX2 alone has weights split"))]
    pub(super) split: Option<Split>,
}

/// The outliers of a panel whose weights were split, and the codes as they are multiplied with them.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "AVX2 alone has weights split"))]
pub(super) struct Split {
    /// `[⌈n_rows / STRIP⌉][inputs][STRIP]`.
    pub(super) turned: *const u8,
    pub(super) outliers: *const Four,
    pub(super) chains: *const PanelChains,
}

/// What becomes of the accumulators of a row's columns `column..column + LANES`.
///
/// # Safety
/// Of its functions, as for [`Simd`]; row and columns must be in range.
pub(super) trait Sink: Sized {
    /// What is read of the columns, once for many rows.
    type Columns<S: Simd>: Copy;
    unsafe fn columns<S: Simd>(gemm: &Gemm<Self>, column: usize) -> Self::Columns<S>;
    unsafe fn put<S: Simd>(gemm: &Gemm<Self>, row: usize, column: usize, columns: Self::Columns<S>, sums: S::I);
}

impl Sink for i32 {
    type Columns<S: Simd> = ();

    #[inline(always)]
    unsafe fn columns<S: Simd>(_gemm: &Gemm<Self>, _column: usize) {}
    #[inline(always)]
    unsafe fn put<S: Simd>(gemm: &Gemm<Self>, row: usize, column: usize, _columns: (), sums: S::I) {
        // SAFETY: in range by contract.
        unsafe { S::store_int(gemm.out.add(row * PANEL + column), sums) }
    }
}

/// What turns the sums of a few columns into values.
#[derive(Clone, Copy)]
pub(super) struct Affine<F> {
    scale: F,
    offset: F,
    bias: F,
}

impl<F: Copy> Affine<F> {
    /// The value of sums of a row.
    ///
    /// # Safety
    /// As for [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn value<S: Simd<F = F>>(self, row: RowScale, sums: S::I) -> F {
        // SAFETY: the instruction set is present by contract.
        unsafe { value::<S>(row, S::mul(S::to_float(sums), self.scale), self.offset, self.bias) }
    }
}

/// # Safety
/// As for [`Simd`]; the columns must be in range.
#[inline(always)]
pub(super) unsafe fn affine<S: Simd, T>(gemm: &Gemm<T>, column: usize) -> Affine<S::F> {
    // SAFETY: in range by the contract of `Sink`.
    unsafe {
        let columns = &*gemm.columns;
        let scale = S::load(columns.scale.as_ptr().add(column));
        let offset = S::load(columns.offset.as_ptr().add(column));
        Affine { scale, offset, bias: S::load(columns.bias.as_ptr().add(column)) }
    }
}

/// `row.scale · product + row.low · offset + bias`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn value<S: Simd>(row: RowScale, product: S::F, offset: S::F, bias: S::F) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe { S::fma(product, S::splat(row.scale), S::fma(S::splat(row.low), offset, bias)) }
}

/// What values are kept as.
pub(super) trait ValueSink: Copy {
    /// # Safety
    /// As for [`Simd`].
    unsafe fn store<S: Simd>(to: *mut Self, x: S::F);
}

impl ValueSink for f32 {
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, x: S::F) {
        // SAFETY: passed on.
        unsafe { S::store(to, x) }
    }
}

/// Binary16. A query, key or value beyond its numbers is held to the largest: as infinity it would make a softmax of no numbers.
impl ValueSink for u16 {
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, x: S::F) {
        // SAFETY: passed on.
        unsafe { S::store_held_half(to, x) }
    }
}

impl<T: ValueSink> Sink for T {
    type Columns<S: Simd> = Affine<S::F>;

    #[inline(always)]
    unsafe fn columns<S: Simd>(gemm: &Gemm<Self>, column: usize) -> Affine<S::F> {
        // SAFETY: passed on.
        unsafe { affine::<S, _>(gemm, column) }
    }
    #[inline(always)]
    unsafe fn put<S: Simd>(gemm: &Gemm<Self>, row: usize, column: usize, columns: Affine<S::F>, sums: S::I) {
        // SAFETY: in range by contract.
        unsafe {
            T::store::<S>(gemm.out.add(row * PANEL + column), columns.value::<S>(*gemm.scales.add(row), sums));
        }
    }
}

/// Where each of `R` rows starts. The compiler is not told that they lie `stride` bytes apart: it would compute that again in every
/// step of a loop over inputs, to save registers. (For the same reason tiles are functions that are not inlined.)
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "AVX-512 alone has a tile of so many rows"))]
#[inline(always)]
pub(super) unsafe fn row_starts<const R: usize>(first: *const u8, stride: usize) -> [*const u8; R] {
    // SAFETY: the rows are there by contract.
    std::array::from_fn(|row| std::hint::black_box(unsafe { first.add(row * stride) }))
}

/// Rows cut into as few tiles of at most `tile` rows as possible, of nearly equal size: a short last tile would leave the
/// multipliers waiting for its few accumulators (32 rows: 6, 6, 5, 5, 5, 5 instead of five sixes and a two).
#[inline(always)]
pub(super) fn row_tiles(n_rows: usize, tile: usize) -> impl Iterator<Item = (usize, usize)> {
    let n_tiles = n_rows.div_ceil(tile).max(1);
    let (size, longer) = (n_rows / n_tiles, n_rows % n_tiles);
    (0..n_tiles).map(move |index| (index * size + index.min(longer), size + usize::from(index < longer)))
}

#[cfg(test)]
mod tests {
    use super::row_tiles;

    #[test]
    fn tiles_cover_all_rows_and_differ_by_at_most_one() {
        for n_rows in 0..200 {
            for tile in [1, 2, 4, 6] {
                let mut next = 0;
                let sizes: Vec<usize> = row_tiles(n_rows, tile)
                    .map(|(first, size)| {
                        assert_eq!(first, next);
                        next += size;
                        size
                    })
                    .collect();
                assert_eq!(next, n_rows);
                assert!(sizes.iter().all(|&size| size <= tile));
                assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            }
        }
    }
}
