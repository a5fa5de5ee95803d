//! The safe face of the kernels: lengths are checked here once, then the chosen instruction set's function is called.
#![allow(unsafe_code, reason = "intrinsics and raw pointers into blocks; this folder is the only place for them")]

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attend;
mod blocks;
mod codebook;
pub(super) mod detect;
mod dot;
mod gemm;
mod groups;
mod norm;
pub(super) mod peak;
mod products;
mod rows;
mod simd;
mod table;
mod tile;

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

pub use self::attend::Attention;
use self::gemm::Gemm;
use self::norm::AddNorm;
use self::products::{Forms, forms};
use self::rows::Quantize;
use self::table::Table;
use super::attention::{AttentionForm, Heads};
use super::forms::PackedMatrix;
use super::isa::{Isa, IsaName};
use super::layout::{CodeRows, PANEL, PackedLinear, RowRange, RowScale, rows_fit};
use super::{Nonlinearity, Reduction};

/// Kernels of one instruction set, chosen once and passed to whoever computes.
#[derive(Clone, Copy)]
pub struct KernelSet {
    isa: Isa,
    table: &'static Table,
    forms: &'static Forms,
    /// The only form to use, where one was asked for.
    attention: Option<AttentionForm>,
}

impl std::fmt::Debug for KernelSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelSet").field("isa", &self.isa).field("attention", &self.attention).finish()
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
    /// The range of all rows where it was fixed beforehand, values outside of it being clipped; otherwise each row has the
    /// range of its values.
    pub range: Option<RowScale>,
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
        assert!(rows_fit(self.codes.len(), n_rows, self.stride, n), "{n_rows} rows of {n} codes");
    }
}

/// Inputs up to which a panel of weights and a block of codes fit the first cache.
const FEW_INPUTS: usize = 384;

fn table(isa: Isa) -> &'static Table {
    match isa.name() {
        #[cfg(target_arch = "x86_64")]
        IsaName::AmxInt8 => &amx::TABLE,
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
    /// The kernels of `isa`.
    #[must_use]
    pub fn new(isa: Isa) -> Self {
        Self { isa, table: table(isa), forms: forms(isa.name()), attention: None }
    }

    /// The same with attention in `form` for every length; `None` if the instruction set has no such kernel.
    #[must_use]
    pub fn with_attention(self, form: AttentionForm) -> Option<Self> {
        self.attention_in(form).map(|_| Self { attention: Some(form), ..self })
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

    /// Most rows that [`KernelSet::block_rows`] gives.
    pub const MOST_BLOCK_ROWS: usize = 64;

    /// Rows of a block that products of `n_in` inputs are fastest with: what a row pass makes of the results, and the weights
    /// of a panel, should stay in the caches near by.
    #[must_use]
    pub fn block_rows(&self, n_in: usize) -> usize {
        self.table.block_rows[usize::from(n_in > FEW_INPUTS)]
    }

    /// Most rows of a block, of products of any inputs.
    #[must_use]
    pub fn most_block_rows(&self) -> usize {
        let [few, many] = self.table.block_rows;
        few.max(many)
    }

    /// Attention in `form`, if the instruction set has it.
    fn attention_in(&self, form: AttentionForm) -> Option<Attention> {
        let table = self.table.attention.tables.iter().find(|table| table.form == form)?;
        Some(Attention::new(self.isa, table))
    }

    /// Forms of attention that are used for `heads`, best first, with the most keys of a query that each is used for.
    pub fn attention_forms(&self, heads: Heads) -> impl Iterator<Item = (Attention, usize)> + '_ {
        // A form that was asked for is the only one, but for heads that it cannot compute.
        let asked = self.attention.map(|form| (form, usize::MAX)).into_iter();
        let preferred = self.table.attention.preferred.iter().map(|&form| (form, form.max_keys()));
        let preferred = preferred.filter(move |_| self.attention.is_none());
        asked
            .chain(preferred)
            .chain([(AttentionForm::F32, usize::MAX)])
            .filter(move |(form, _)| heads.d_head <= form.max_d_head())
            .filter_map(move |(form, max_keys)| Some((self.attention_in(form)?, max_keys)))
    }

    /// Attention for a sequence in which a query sees up to `n_keys` keys.
    ///
    /// # Panics
    /// Never: every instruction set has attention in f32.
    #[must_use]
    pub fn attention(&self, heads: Heads, n_keys: usize) -> Attention {
        let chosen = self.attention_forms(heads).find(|&(_, max_keys)| n_keys <= max_keys);
        chosen.expect("every instruction set has attention in f32").0
    }

    /// Whether [`KernelSet::widen`] needs room.
    #[must_use]
    pub fn widens(&self) -> bool {
        self.table.widen.is_some()
    }

    /// `x` with its codes in the form that products with `weights` are fastest from, for all panels; what is made for that is in
    /// `room`. Results are the same without.
    pub fn widen<'a>(
        &self,
        x: CodeRows<'a>,
        weights: &PackedMatrix,
        room: impl FnOnce(usize) -> &'a mut [u16],
    ) -> CodeRows<'a> {
        let (Some(widen), PackedMatrix::Dense(_)) = (self.table.widen, weights) else { return x };
        let Some(others) = x.scales.len().checked_sub(1) else { return x };
        // All of the last row that is there.
        let n = others.saturating_mul(x.stride).saturating_add(x.stride).min(x.codes.len());
        let wide = &mut room(n)[..n];
        // SAFETY: `Isa` proves the instruction set; both hold `n` codes.
        unsafe { widen(x.codes.as_ptr(), n, wide.as_mut_ptr()) }
        CodeRows { wide, ..x }
    }

    fn gemm<T>(kernel: unsafe fn(&Gemm<T>), x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [T]) {
        let (n_rows, k_groups) = (x.scales.len(), weights.k_groups());
        if n_rows == 0 {
            return;
        }
        let args = products::arguments(x, k_groups * 4, weights.panel(panel), weights.columns(panel), out);
        let next = if panel + 1 < weights.n_panels() { weights.panel(panel + 1) } else { std::ptr::null() };
        let args = Gemm { k_groups, next, ..args };
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

    /// `values[r, c] = f(values[r, c])` for the first `n` columns of a block of one panel, and takes the results into `ranges`, one
    /// per row.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn activate_rows(&self, kind: Nonlinearity, values: &mut [f32], n: usize, ranges: &mut [RowRange]) {
        assert!(n <= PANEL && values.len() == ranges.len() * PANEL, "{} ranges for {}", ranges.len(), values.len());
        // SAFETY: `Isa` proves the instruction set; sizes are checked above.
        unsafe {
            (self.table.activate_rows)(kind, values.as_mut_ptr(), ranges.len(), n, ranges.as_mut_ptr());
        }
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
        self.quantize_with(block, rows, std::ptr::null(), to);
    }

    /// The same of all rows, whose ranges are known ([`KernelSet::activate_rows`]).
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn quantize_within(&self, block: Block<'_>, ranges: &[RowRange], to: &mut CodeRowsMut<'_>) {
        assert_eq!(ranges.len(), block.n_rows);
        self.quantize_with(block, 0..block.n_rows, ranges.as_ptr(), to);
    }

    fn quantize_with(&self, block: Block<'_>, rows: Range<usize>, ranges: *const RowRange, to: &mut CodeRowsMut<'_>) {
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
            range: to.range,
            ranges,
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
            range: to.range,
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
}
