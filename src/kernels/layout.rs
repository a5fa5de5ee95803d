//! How numbers lie in memory: packed weights, rows of codes, blocks of f32 in panels.
//!
//! Everything wide is cut in *panels* of [`PANEL`] columns, so that one format serves every instruction set:
//!
//! ```text
//! weights   [n_panels][k_groups][PANEL][4] s8      four consecutive k of one column lie together, as dot products eat them
//! block     [n_panels][n_rows][PANEL]              results of a matrix product; f32, or f16 where they are kept
//! codes     [n_rows][stride] u8, stride ≥ 4 · k_groups
//! turned    [n_strips][4 · k_groups][STRIP] u8     codes by input, beside codes where weights have outliers
//! ```
//!
//! Columns beyond `n_out` and k beyond `n_in` are zeros with scale 0, so any pruned width works.

use super::outliers::{Four, MOST_INPUTS, Outliers, PanelChains};

/// Columns of a panel: four vectors of 16 accumulators, the widest tile's.
pub const PANEL: usize = 64;

/// Rows whose codes are turned together.
pub const STRIP: usize = 32;

/// What a row of u8 codes stands for: `value[c] = low + scale · code[c]`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct RowScale {
    /// One step.
    pub scale: f32,
    /// The value of code 0: the row's real minimum, not rounded to a step.
    pub low: f32,
}

/// What turns a column's accumulators into values; one entry per column of a panel.
///
/// ```text
/// y[r, n] = row[r].scale · acc[r, n] · scale[n] + row[r].low · offset[n] + bias[n]
/// ```
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct PanelColumns {
    /// Scale of the weight codes.
    pub scale: [f32; PANEL],
    /// `scale · sum`.
    pub offset: [f32; PANEL],
    /// The layer's bias.
    pub bias: [f32; PANEL],
    /// Sum of the weight codes over k.
    pub sum: [i32; PANEL],
}

/// The largest value of a row so far, by the lane that it stood in.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct RowTop(pub(super) [f32; 16]);

impl RowTop {
    /// That of no values.
    pub const EMPTY: Self = Self([f32::NEG_INFINITY; 16]);
}

/// The sum of a row's values so far and that of their squares, by the lane that they stood in.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct RowSums {
    pub(super) sum: [f32; 16],
    pub(super) square: [f32; 16],
}

impl RowSums {
    /// Those of no values.
    pub const EMPTY: Self = Self { sum: [0.0; 16], square: [0.0; 16] };
}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([i8; 64]);

/// Lines of one group of four k in a panel.
pub(super) const LINES: usize = PANEL * 4 / 64;

/// A linear layer `[n_out, n_in]` with s8 weights, packed in panels.
#[derive(Debug, Clone)]
pub struct PackedLinear {
    n_out: usize,
    n_in: usize,
    k_groups: usize,
    lines: Vec<Line>,
    columns: Vec<PanelColumns>,
    /// What the lines are without, where they were split.
    outliers: Option<Outliers>,
}

impl PackedLinear {
    /// Packs row-major `codes: [n_out, n_in]` with `scale` and `bias` per row.
    ///
    /// # Panics
    /// If the lengths do not fit, or `n_in` is so large that i32 sums could overflow (over 65,536).
    #[must_use]
    pub fn new(codes: &[i8], scale: &[f32], bias: &[f32], n_in: usize) -> Self {
        let n_out = scale.len();
        assert!(n_in <= 65_536, "sums over {n_in} products may overflow");
        assert!(codes.len() == n_out * n_in && bias.len() == n_out, "{n_out}x{n_in}: {} codes", codes.len());
        let k_groups = n_in.div_ceil(4);
        let n_panels = n_out.div_ceil(PANEL);
        let mut lines = vec![Line([0; 64]); n_panels * k_groups * LINES];
        let empty = PanelColumns { scale: [0.0; PANEL], offset: [0.0; PANEL], bias: [0.0; PANEL], sum: [0; PANEL] };
        let mut columns = vec![empty; n_panels];
        for n in 0..n_out {
            let (panel, column) = (n / PANEL, n % PANEL);
            let row = &codes[n * n_in..(n + 1) * n_in];
            for (k, &code) in row.iter().enumerate() {
                let line = (panel * k_groups + k / 4) * LINES + column / 16;
                lines[line].0[column % 16 * 4 + k % 4] = code;
            }
            let sum: i32 = row.iter().map(|&code| i32::from(code)).sum();
            let target = &mut columns[panel];
            target.scale[column] = scale[n];
            #[allow(clippy::cast_precision_loss, reason = "at most 2^23")]
            let offset = sum as f32 * scale[n];
            target.offset[column] = offset;
            target.bias[column] = bias[n];
            target.sum[column] = sum;
        }
        Self { n_out, n_in, k_groups, lines, columns, outliers: None }
    }

    /// The same matrix, the weights of its panels split into a main part and outliers where the products that this adds are at most a
    /// share `most` of all.
    #[must_use]
    pub fn split(mut self, most: f64) -> Self {
        if self.is_split() || self.n_in > MOST_INPUTS {
            return self;
        }
        let mut outliers = Outliers::default();
        let mut weights = Vec::with_capacity(self.k_groups * PANEL * 4);
        for lines in self.lines.chunks_exact_mut(self.k_groups * LINES) {
            weights.clear();
            lines.iter().for_each(|line| weights.extend_from_slice(&line.0));
            outliers.take(&mut weights, most);
            for (line, weights) in lines.iter_mut().zip(weights.as_chunks::<64>().0) {
                line.0 = *weights;
            }
        }
        self.outliers = Some(outliers).filter(|outliers| !outliers.is_empty());
        self
    }

    /// What the weights of panel `panel` are without, where they were split.
    pub(super) fn outliers(&self, panel: usize) -> Option<(&[Four], &PanelChains)> {
        self.outliers.as_ref()?.panel(panel)
    }

    /// Whether its weights were split.
    pub(super) fn is_split(&self) -> bool {
        self.outliers.is_some()
    }

    /// Outputs.
    #[must_use]
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Inputs.
    #[must_use]
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Panels of outputs.
    #[must_use]
    pub fn n_panels(&self) -> usize {
        self.columns.len()
    }

    /// Groups of four inputs.
    #[must_use]
    pub fn k_groups(&self) -> usize {
        self.k_groups
    }

    /// Columns of panel `panel`.
    #[must_use]
    pub fn columns(&self, panel: usize) -> &PanelColumns {
        &self.columns[panel]
    }

    /// The first weight of panel `panel`; `k_groups · 4 · PANEL` bytes, 64-byte aligned.
    pub(super) fn panel(&self, panel: usize) -> *const i8 {
        self.lines[panel * self.k_groups * LINES..(panel + 1) * self.k_groups * LINES].as_ptr().cast()
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + size_of_val(self.columns.as_slice())
            + self.outliers.as_ref().map_or(0, Outliers::bytes)
    }
}

/// Rows of u8 codes with their scales: the left side of a matrix product.
#[derive(Debug, Clone, Copy)]
pub struct CodeRows<'a> {
    /// `[scales.len(), stride]`.
    pub codes: &'a [u8],
    /// Distance of rows, at least the inputs rounded up to 4.
    pub stride: usize,
    /// One per row.
    pub scales: &'a [RowScale],
    /// The same codes turned, where products are made of them ([`KernelSet::turn`](super::KernelSet::turn)); else empty.
    pub(super) turned: &'a [u8],
}

impl<'a> CodeRows<'a> {
    /// Rows of codes, one for each of `scales`, `stride` apart.
    #[must_use]
    pub fn new(codes: &'a [u8], stride: usize, scales: &'a [RowScale]) -> Self {
        Self { codes, stride, scales, turned: &[] }
    }

    /// Whether each row is there up to a multiple of 64 codes.
    pub(super) fn has_whole_lines(&self) -> bool {
        self.stride.is_multiple_of(64) && rows_fit(self.codes.len(), self.scales.len(), self.stride, self.stride)
    }
}

/// Whether `n_rows` rows of `n` elements, `stride` apart, lie within `len`: what reading and writing by pointers rests on, so it
/// holds for sizes whose product is beyond the numbers too.
pub(super) fn rows_fit(len: usize, n_rows: usize, stride: usize, n: usize) -> bool {
    let Some(others) = n_rows.checked_sub(1) else { return true };
    let needed = others.checked_mul(stride).and_then(|start| start.checked_add(n));
    stride >= n && needed.is_some_and(|needed| needed <= len)
}

/// Distance of rows of codes `n` wide: a multiple of a cache line, so that rows start aligned.
#[must_use]
pub fn code_stride(n: usize) -> usize {
    n.next_multiple_of(64)
}

/// Element `(row, column)` of a block of `n_rows` rows.
#[must_use]
pub fn block_index(n_rows: usize, row: usize, column: usize) -> usize {
    (column / PANEL * n_rows + row) * PANEL + column % PANEL
}
