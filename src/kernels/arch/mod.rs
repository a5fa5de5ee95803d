//! The safe face of the kernels: lengths are checked here once, then the chosen instruction set's function is called.
#![allow(unsafe_code, reason = "intrinsics and raw pointers into blocks; this folder is the only place for them")]

mod attend;
mod blocks;
mod codebook;
pub(super) mod detect;
mod dot;
mod gemm;
pub(super) mod peak;
mod products;
mod rows;
mod simd;
mod table;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod dot_neon;
#[cfg(target_arch = "x86_64")]
mod dot_x86;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use std::ops::Range;

use self::attend::{Attend, Head};
use self::gemm::Gemm;
use self::products::{Forms, forms};
use self::rows::{AddNorm, Quantize};
use self::table::{AttentionTable, Table};
use super::attention::{AttentionForm, CacheLine, Heads, SequenceHeads};
use super::isa::{Isa, IsaName};
use super::layout::{CodeRows, PANEL, PackedLinear, RowScale};
use super::{Nonlinearity, Reduction};

/// Kernels of one instruction set, chosen once and passed to whoever computes.
#[derive(Clone, Copy)]
pub struct KernelSet {
    isa: Isa,
    table: &'static Table,
    forms: &'static Forms,
    attention: AttentionTable,
}

impl std::fmt::Debug for KernelSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelSet").field("isa", &self.isa).field("attention", &self.attention.form).finish()
    }
}

/// Gain and bias of a LayerNorm.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// One per column.
    pub gain: &'a [f32],
    /// One per column.
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

/// Rows of a block in panels: `[⌈n / PANEL⌉][n_rows][PANEL]`.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// Rows of the block.
    pub n_rows: usize,
    /// Columns that mean something.
    pub n: usize,
}

/// Where quantized rows go; `scales.len()` rows.
#[derive(Debug)]
pub struct CodeRowsMut<'a> {
    /// `[scales.len(), stride]`.
    pub codes: &'a mut [u8],
    /// Distance of rows.
    pub stride: usize,
    /// One per row.
    pub scales: &'a mut [RowScale],
}

impl Block<'_> {
    fn check(&self, rows: &Range<usize>) {
        let needed = self.n.div_ceil(PANEL) * self.n_rows * PANEL;
        assert!(self.data.len() >= needed, "a block of {needed} in {} elements", self.data.len());
        assert!(rows.start <= rows.end && rows.end <= self.n_rows, "rows {rows:?} of {}", self.n_rows);
    }
}

impl CodeRowsMut<'_> {
    fn check(&self, n_rows: usize, n: usize) {
        assert!(self.scales.len() == n_rows, "{} scales for {n_rows} rows", self.scales.len());
        assert!(self.stride >= n && self.codes.len() >= n_rows.saturating_sub(1) * self.stride + n * n_rows.min(1));
    }
}

fn table(isa: Isa) -> &'static Table {
    match isa.name() {
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx512Vnni => &avx512::TABLE,
        #[cfg(target_arch = "x86_64")]
        IsaName::AvxVnni => &avx2::vnni::TABLE,
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2 => &avx2::exact::TABLE,
        #[cfg(target_arch = "aarch64")]
        IsaName::NeonDotprod => &neon::TABLE,
        _ => &portable::TABLE,
    }
}

impl KernelSet {
    /// The kernels of `isa`, with INT8 attention where there is one.
    #[must_use]
    pub fn new(isa: Isa) -> Self {
        let table = table(isa);
        Self { isa, table, forms: forms(isa.name()), attention: table.int8_attention.unwrap_or(table.attention) }
    }

    /// The same with attention in `form`; `None` if the instruction set has no such kernel.
    #[must_use]
    pub fn with_attention(self, form: AttentionForm) -> Option<Self> {
        match form {
            AttentionForm::F32 => Some(Self { attention: self.table.attention, ..self }),
            AttentionForm::Int8 => self.table.int8_attention.map(|attention| Self { attention, ..self }),
        }
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Name of the matrix product, for logs and reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.table.name
    }

    /// The arithmetic of attention.
    #[must_use]
    pub fn attention_form(&self) -> AttentionForm {
        self.attention.form
    }

    fn gemm<T>(kernel: unsafe fn(&Gemm<T>), x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [T]) {
        let n_rows = x.scales.len();
        let k = weights.k_groups() * 4;
        if n_rows == 0 {
            return;
        }
        assert!(x.stride >= k && x.codes.len() >= (n_rows - 1) * x.stride + k, "{n_rows} rows of {k} codes");
        assert!(out.len() >= n_rows * PANEL, "{n_rows} rows of results in {} elements", out.len());
        // Prefetching pays only where weights are read more slowly than they are used.
        let next =
            if n_rows <= 36 && panel + 1 < weights.n_panels() { weights.panel(panel + 1) } else { std::ptr::null() };
        let args = Gemm {
            codes: x.codes.as_ptr(),
            stride: x.stride,
            scales: x.scales.as_ptr(),
            n_rows,
            weights: weights.panel(panel),
            k_groups: weights.k_groups(),
            columns: std::ptr::from_ref(weights.columns(panel)),
            out: out.as_mut_ptr(),
            next,
        };
        // SAFETY: `Isa` proves the instruction set; rows, panel and results are inside their slices, checked above.
        unsafe { kernel(&args) }
    }

    /// `out[r, c] = Σ_k codes[r, k] · weights[n, k]`, `n = panel · PANEL + c`; exact.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn gemm_i32(&self, x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [i32]) {
        Self::gemm(self.table.gemm_i32, x, weights, panel, out);
    }

    /// The same, as values: `x Wᵀ + b` for the columns of a panel, `[n_rows, PANEL]`.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn gemm_f32(&self, x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [f32]) {
        Self::gemm(self.table.gemm_f32, x, weights, panel, out);
    }

    /// The same, rounded to binary16.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn gemm_half(&self, x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [u16]) {
        Self::gemm(self.table.gemm_half, x, weights, panel, out);
    }

    /// `values[i] = f(values[i])`.
    pub fn activate(&self, kind: Nonlinearity, values: &mut [f32]) {
        // SAFETY: `Isa` proves the instruction set; pointer and length are one slice's.
        unsafe { (self.table.activate)(kind, values.as_mut_ptr(), values.len()) }
    }

    /// Codes of rows `rows` of `block`, with a step and a minimum per row.
    ///
    /// ```text
    /// low = min_c x[c], scale = (max_c x[c] − low) / 255, code[c] = round((x[c] − low) / scale)
    /// ```
    /// *Error*: half a step.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn quantize(&self, block: Block<'_>, rows: Range<usize>, to: &mut CodeRowsMut<'_>) {
        block.check(&rows);
        to.check(rows.len(), block.n);
        let args = Quantize {
            block: block.data.as_ptr(),
            n_rows: block.n_rows,
            n: block.n,
            rows,
            codes: to.codes.as_mut_ptr(),
            stride: to.stride,
            scales: to.scales.as_mut_ptr(),
        };
        // SAFETY: `Isa` proves the instruction set; sizes are checked above.
        unsafe { (self.table.quantize)(&args) }
    }

    /// `residual = LayerNorm(residual + block)` for rows `rows` of `block` (or without block), and its codes.
    ///
    /// The variance is taken around the mean in a second pass. *Error*: 2e-6 relative to the row's largest result.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn add_norm(
        &self,
        block: Option<(Block<'_>, Range<usize>)>,
        residual: &mut [f32],
        norm: Norm<'_>,
        to: &mut CodeRowsMut<'_>,
    ) {
        let n = norm.gain.len();
        assert!(n > 0 && norm.bias.len() == n && residual.len().is_multiple_of(n), "{} by {n}", residual.len());
        let n_residual = residual.len() / n;
        let (data, n_rows, rows) = match block {
            Some((block, rows)) => {
                block.check(&rows);
                assert!(block.n == n && rows.len() == n_residual, "{rows:?} of {} for {n_residual} rows", block.n);
                (block.data.as_ptr(), block.n_rows, rows)
            }
            None => (std::ptr::null(), 0, 0..n_residual),
        };
        to.check(n_residual, n);
        let args = AddNorm {
            block: data,
            n_rows,
            n,
            rows,
            residual: residual.as_mut_ptr(),
            gain: norm.gain.as_ptr(),
            bias: norm.bias.as_ptr(),
            eps: norm.eps,
            codes: to.codes.as_mut_ptr(),
            stride: to.stride,
            scales: to.scales.as_mut_ptr(),
        };
        // SAFETY: `Isa` proves the instruction set; sizes are checked above.
        unsafe { (self.table.add_norm)(&args) }
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

    /// Cache lines of one packed head of a sequence of `len` tokens.
    #[must_use]
    pub fn packed_lines(&self, heads: Heads, len: usize) -> usize {
        (self.attention.lines)(len, heads.d_padded())
    }

    /// Floats of scratch for packing or computing a sequence of `len` tokens.
    #[must_use]
    pub fn attention_scratch(&self, heads: Heads, len: usize) -> usize {
        (self.attention.scratch)(len, heads.d_padded())
    }

    fn head(&self, sequence: &SequenceHeads<'_>, head: usize, scratch: &[f32]) -> Head {
        let SequenceHeads { qkv, heads, first_row, len, band } = *sequence;
        assert!(head < heads.n_heads && heads.d_head > 0 && len > 0, "head {head} of {heads:?}, {len} tokens");
        assert!(first_row + len <= qkv.n_rows && qkv.data.len() >= heads.qkv_panels() * qkv.n_rows * PANEL);
        assert!(scratch.len() >= self.attention_scratch(heads, len), "{} floats of scratch", scratch.len());
        Head { qkv: qkv.data.as_ptr(), n_rows: qkv.n_rows, heads, first_row, len, band, head }
    }

    /// Packs keys and values of head `head` of a sequence into `packed` (`packed_lines` of them).
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn pack_head(&self, sequence: &SequenceHeads<'_>, head: usize, packed: &mut [CacheLine], scratch: &mut [f32]) {
        let args = self.head(sequence, head, scratch);
        assert_eq!(packed.len(), self.packed_lines(sequence.heads, sequence.len));
        // SAFETY: `Isa` proves the instruction set; sizes are checked above and in `head`.
        unsafe { (self.attention.pack)(&args, packed.as_mut_ptr(), scratch.as_mut_ptr()) }
    }

    /// Attention of queries `queries` of all heads over the packed heads; `out` is a block of `queries.len()` rows.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn attend(
        &self,
        sequence: &SequenceHeads<'_>,
        queries: Range<usize>,
        packed: &[CacheLine],
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let heads = sequence.heads;
        let lines = self.packed_lines(heads, sequence.len);
        assert!(queries.start <= queries.end && queries.end <= sequence.len, "{queries:?} of {}", sequence.len);
        assert_eq!(packed.len(), lines * heads.n_heads);
        assert!(out.len() >= heads.d_context().div_ceil(PANEL) * queries.len() * PANEL, "{} results", out.len());
        if queries.is_empty() {
            return;
        }
        for head in 0..heads.n_heads {
            let args = Attend {
                head: self.head(sequence, head, scratch),
                queries: queries.clone(),
                packed: packed[head * lines..].as_ptr(),
                scratch: scratch.as_mut_ptr(),
                out: out.as_mut_ptr(),
            };
            // SAFETY: `Isa` proves the instruction set; sizes are checked above and in `head`.
            unsafe { (self.attention.attend)(&args) }
        }
    }
}
