//! The safe face of the row passes, and of products whose values go on into one.

use std::ops::Range;

use super::gemm::Gemm;
use super::norm::{Add, Normalize};
use super::rows::Quantize;
use super::{Block, CodeRowsMut, KernelSet, Norm, Stream};
use crate::kernels::forms::PackedMatrix;
use crate::kernels::layout::{CodeRows, PANEL, RowTop};
use crate::kernels::{Nonlinearity, Reduction};

impl KernelSet {
    /// `values[i] = f(values[i])`.
    pub fn activate(&self, kind: Nonlinearity, values: &mut [f32]) {
        // SAFETY: `Isa` proves the instruction set; pointer and length are one slice's.
        unsafe { (self.table.activate)(kind, values.as_mut_ptr(), values.len()) }
    }

    /// The product with the first of `panels` of weights ([`KernelSet::product_f32`]); the largest value of each row is taken into `tops`.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn product_topped(
        &self,
        x: &CodeRows<'_>,
        weights: &PackedMatrix,
        panels: Range<usize>,
        tops: &mut [RowTop],
        out: &mut [f32],
    ) {
        let n_rows = tops.len();
        assert!(n_rows == x.scales.len() && out.len() >= n_rows * PANEL, "{n_rows} tops for {}", out.len());
        let width = PANEL.min(weights.n_out() - panels.start * PANEL);
        if let (Some(gemm), PackedMatrix::Dense(dense), PANEL) = (self.table.gemm_topped, weights, width)
            && n_rows > 0
        {
            let args = self.arguments_to(x, dense, &panels, out.as_mut_ptr().cast());
            // SAFETY: `Isa` proves the instruction set; rows, panel, tops and results are inside their slices, checked above.
            return unsafe { gemm(&Gemm { tops: tops.as_mut_ptr(), ..args }) };
        }
        self.product_f32(x, weights, panels, out);
        // SAFETY: `Isa` proves the instruction set; sizes are checked above, a panel's width is at most PANEL.
        unsafe { (self.table.tops)(out.as_ptr(), n_rows, width, tops.as_mut_ptr()) }
    }

    /// Codes of rows `rows` of `block`, with a step and a minimum per row.
    ///
    /// ```text
    /// low = min_c x[c], scale = (max_c x[c] − low) / 255, code[c] = round((x[c] − low) / scale)
    /// ```
    /// *Error*: half a step; with a fixed range, what is clipped besides.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn quantize(&self, block: Block<'_>, rows: Range<usize>, to: &mut CodeRowsMut<'_>) {
        self.quantize_with(block, rows, None, None, to);
    }

    /// Codes of `then` of the rows. `tops` are those of the rows before that, where they are known ([`KernelSet::product_topped`]).
    ///
    /// ```text
    /// low = min f, high = max f(x) for x ≤ max_c x[c];  scale = (high − low) / 255, code[c] = round((f(x[c]) − low) / scale)
    /// ```
    /// *Error*: half a step, beyond that of `then`. On AVX-512 both forms of GELU are looked up in 64 straight pieces between −4 and a
    /// row's top between 1 and 12, which adds 0.07 of a step at most.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn quantize_activated(
        &self,
        block: Block<'_>,
        rows: Range<usize>,
        then: Nonlinearity,
        tops: Option<&[RowTop]>,
        to: &mut CodeRowsMut<'_>,
    ) {
        self.quantize_with(block, rows, Some(then), tops, to);
    }

    fn quantize_with(
        &self,
        block: Block<'_>,
        rows: Range<usize>,
        then: Option<Nonlinearity>,
        tops: Option<&[RowTop]>,
        to: &mut CodeRowsMut<'_>,
    ) {
        block.check(&rows);
        to.check(rows.len(), block.n);
        assert!(tops.is_none_or(|tops| tops.len() == rows.len()), "tops for {} rows", rows.len());
        let args = Quantize {
            block: block.data.as_ptr(),
            n_rows: block.n_rows,
            n: block.n,
            rows,
            codes: to.codes.as_mut_ptr(),
            stride: to.stride,
            scales: to.scales.as_mut_ptr(),
            range: to.range,
            then,
            tops: tops.map_or(std::ptr::null(), <[RowTop]>::as_ptr),
        };
        // SAFETY: `Isa` proves the instruction set; sizes are checked above.
        unsafe { (self.table.quantize)(&args) }
    }

    /// Adds `block`, if there is one, to rows of the residual stream.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn add(&self, block: Option<(Block<'_>, Range<usize>)>, to: &mut Stream<'_>) {
        let n_rows = to.check();
        let (data, panel) = match block {
            Some((block, rows)) => {
                block.check(&rows);
                assert!(block.n == to.n && rows.len() == n_rows, "{rows:?} of {} for {n_rows} rows", block.n);
                (block.data[rows.start * PANEL..].as_ptr(), block.n_rows * PANEL)
            }
            None => (std::ptr::null(), 0),
        };
        self.add_columns(data, panel, 0..to.n, to);
    }

    /// Adds the values of a block, or none, to some columns.
    fn add_columns(&self, block: *const f32, panel: usize, columns: Range<usize>, to: &mut Stream<'_>) {
        if to.sums.is_empty() {
            return;
        }
        let args = Add {
            block,
            panel,
            n_rows: to.sums.len(),
            stream: to.rows[columns.start..].as_mut_ptr(),
            stride: to.n,
            width: columns.len(),
            sums: to.sums.as_mut_ptr(),
        };
        // SAFETY: `Isa` proves the instruction set; sizes are checked by the callers.
        unsafe { (self.table.add)(&args) }
    }

    /// The product with the first of `panels` of weights ([`KernelSet::product_f32`]), added to its columns of the residual stream. `room` holds the
    /// panel's values where they have to be stored in between; the results are the same.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn product_add(
        &self,
        x: &CodeRows<'_>,
        weights: &PackedMatrix,
        panels: Range<usize>,
        to: &mut Stream<'_>,
        room: &mut [f32],
    ) {
        let (n_rows, first) = (to.check(), panels.start * PANEL);
        assert!(n_rows == x.scales.len() && to.n == weights.n_out(), "{} rows for {n_rows}", x.scales.len());
        let width = PANEL.min(to.n - first);
        if let (Some(gemm), PackedMatrix::Dense(dense), PANEL) = (self.table.gemm_added, weights, width)
            && n_rows > 0
        {
            let (out, sums) = (to.rows[first..].as_mut_ptr().cast(), to.sums.as_mut_ptr());
            let args = self.arguments_to(x, dense, &panels, out);
            // SAFETY: `Isa` proves the instruction set; rows and panel are inside their slices, and the residual stream holds as many
            // rows, `n` apart, of which the panel's columns are a part, and their sums.
            return unsafe { gemm(&Gemm { out_stride: to.n, sums, ..args }) };
        }
        let room = &mut room[..n_rows * PANEL];
        self.product_f32(x, weights, panels, room);
        self.add_columns(room.as_ptr(), 0, first..first + width, to);
    }

    /// LayerNorm of rows of the residual stream that were added up ([`KernelSet::add`], [`KernelSet::product_add`]), and its codes.
    ///
    /// ```text
    /// mean = Σx / n, var = Σx² / n − mean², or Σ(x − mean)² / n if mean² > var;  y = (x − mean) / √(var + eps) · gain + bias
    /// ```
    /// *Error*: 2e-6 relative to the row's largest result.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn normalize(&self, stream: &mut Stream<'_>, norm: Norm<'_>, to: &mut CodeRowsMut<'_>) {
        let (n_rows, n) = (stream.check(), stream.n);
        assert!(norm.gain.len() == n && norm.bias.len() == n, "{n} columns");
        to.check(n_rows, n);
        let args = Normalize {
            n_rows,
            n,
            stream: stream.rows.as_mut_ptr(),
            sums: stream.sums.as_ptr(),
            gain: norm.gain.as_ptr(),
            bias: norm.bias.as_ptr(),
            eps: norm.eps,
            codes: to.codes.as_mut_ptr(),
            stride: to.stride,
            scales: to.scales.as_mut_ptr(),
            range: to.range,
        };
        // SAFETY: `Isa` proves the instruction set; sizes are checked above.
        unsafe { (self.table.normalize)(&args) }
    }

    /// Asks for what will be read soon to be brought near by, where there is an instruction for that.
    #[inline]
    pub fn fetch<T>(&self, what: &[T]) {
        #[cfg(target_arch = "x86_64")]
        for line in (0..size_of_val(what)).step_by(64) {
            // SAFETY: part of the base instruction set; nothing is read or written.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T0>(what.as_ptr().cast::<i8>().add(line));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = what;
    }

    /// `row[c] += scale · codes[c]`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_codes(&self, row: &mut [f32], codes: &[i8], scale: f32) {
        assert_eq!(row.len(), codes.len());
        // SAFETY: `Isa` proves the instruction set; both slices have the same length.
        unsafe { (self.table.add_codes)(row.as_mut_ptr(), codes.as_ptr(), scale, row.len()) }
    }

    /// Reduces `rows: [n_rows, out.len()]` to one row, in order.
    ///
    /// # Panics
    /// If there is no row or the sizes do not fit.
    pub fn reduce(&self, kind: Reduction, rows: &[f32], out: &mut [f32]) {
        let n = out.len();
        assert!(n > 0 && !rows.is_empty() && rows.len().is_multiple_of(n), "{} by {n}", rows.len());
        // SAFETY: `Isa` proves the instruction set; `rows` holds at least one row of `n`.
        unsafe { (self.table.reduce)(kind, rows.as_ptr(), rows.len() / n, n, out.as_mut_ptr()) }
    }
}
