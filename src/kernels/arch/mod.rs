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
mod ends;
mod gemm;
mod groups;
mod norm;
mod passes;
pub(super) mod peak;
#[cfg(target_arch = "x86_64")]
mod pieces;
mod products;
mod rows;
mod simd;
#[cfg(target_arch = "x86_64")]
mod split;
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
use self::products::{FormKernels, forms};
use self::table::Table;
use super::attention::{AttentionForm, Heads};
use super::forms::PackedMatrix;
use super::isa::{Isa, IsaName};
use super::layout::{CodeRows, PANEL, PackedLinear, RowScale, RowSums, STRIP, rows_fit};

/// Kernels of one instruction set, chosen once and passed to whoever computes.
#[derive(Clone, Copy)]
pub struct KernelSet {
    isa: Isa,
    table: &'static Table,
    forms: &'static FormKernels,
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

/// Rows of the residual stream.
#[derive(Debug)]
pub struct Stream<'a> {
    /// `[sums.len(), n]`.
    pub rows: &'a mut [f32],
    /// Columns.
    pub n: usize,
    /// What has been added to each row, summed up.
    pub sums: &'a mut [RowSums],
}

impl Stream<'_> {
    /// The number of rows.
    fn check(&self) -> usize {
        let n_rows = self.sums.len();
        assert!(
            rows_fit(self.rows.len(), n_rows, self.n, self.n),
            "{n_rows} rows of {} in {}",
            self.n,
            self.rows.len()
        );
        n_rows
    }
}

impl Block<'_> {
    fn check(&self, rows: &Range<usize>) {
        let panel = self.n_rows.checked_mul(PANEL).expect("a panel has less than 2^64 elements");
        let fits = rows_fit(self.data.len(), self.n.div_ceil(PANEL), panel, panel);
        assert!(fits, "{} rows of {} columns in {} elements", self.n_rows, self.n, self.data.len());
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

    /// Share of a panel's products from which its outliers cost more than the split brings, as estimated from their instructions.
    const MOST_OUTLIERS: f64 = 0.15;

    /// `weights` as products with these kernels are fastest; the results are the same.
    #[must_use]
    pub fn fit(&self, weights: PackedMatrix) -> PackedMatrix {
        match weights {
            PackedMatrix::Dense(dense) if self.turns() => PackedMatrix::Dense(dense.split(Self::MOST_OUTLIERS)),
            weights => weights,
        }
    }

    /// Whether [`KernelSet::turn`] needs room.
    #[must_use]
    pub fn turns(&self) -> bool {
        self.table.turn.is_some()
    }

    /// `x` with its codes as products with `weights`, if they were made to fit ([`KernelSet::fit`]), want them for all panels; `room`
    /// gives as many bytes as are asked for.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn turn<'a>(
        &self,
        x: CodeRows<'a>,
        weights: &PackedMatrix,
        room: impl FnOnce(usize) -> &'a mut [u8],
    ) -> CodeRows<'a> {
        let (Some(turn), PackedMatrix::Dense(dense)) = (self.table.turn, weights) else { return x };
        let n_rows = x.scales.len();
        if !dense.is_split() || n_rows == 0 {
            return x;
        }
        let k = dense.k_groups() * 4;
        assert!(rows_fit(x.codes.len(), n_rows, x.stride, k), "{n_rows} rows of {k} codes");
        let n = n_rows.next_multiple_of(STRIP) * k;
        let turned = &mut room(n)[..n];
        // SAFETY: `Isa` proves the instruction set; the codes are there, and room for whole strips.
        unsafe { turn(x.codes.as_ptr(), x.stride, n_rows, k, turned.as_mut_ptr()) }
        CodeRows { turned, ..x }
    }

    fn gemm<T>(
        &self,
        kernel: unsafe fn(&Gemm<T>),
        x: &CodeRows<'_>,
        weights: &PackedLinear,
        panels: Range<usize>,
        out: &mut [T],
    ) {
        let n_rows = x.scales.len();
        if n_rows == 0 {
            return;
        }
        assert!(rows_fit(out.len(), n_rows, PANEL, PANEL), "{n_rows} rows of results in {} elements", out.len());
        let args = self.arguments_to(x, weights, &panels, out.as_mut_ptr());
        // SAFETY: `Isa` proves the instruction set; rows, panel and results are inside their slices, checked above.
        unsafe { kernel(&args) }
    }

    /// `out[r, c] = Σ_k codes[r, k] · weights[n, k]`, `n = panel · PANEL + c`; exact.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn gemm_i32(&self, x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [i32]) {
        self.gemm(self.table.gemm_i32, x, weights, panel..panel + 1, out);
    }

    /// The same, as values: `x Wᵀ + b` for the columns of a panel, `[n_rows, PANEL]`.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn gemm_f32(&self, x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [f32]) {
        self.gemm(self.table.gemm_f32, x, weights, panel..panel + 1, out);
    }

    /// The same, rounded to binary16.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn gemm_half(&self, x: &CodeRows<'_>, weights: &PackedLinear, panel: usize, out: &mut [u16]) {
        self.gemm(self.table.gemm_half, x, weights, panel..panel + 1, out);
    }
}
