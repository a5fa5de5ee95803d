//! Matrices in forms other than dense INT8, as their kernels read them: codebooks of 4 bits, and blocks of INT8 of which
//! only some are there. Panels and columns are those of [`layout`](super::layout).
//!
//! ```text
//! codebook   [n_panels][n_pairs][PANEL][4] u8    byte j of column n: the index of k = 8 p + j in its lower half, that of
//!                                                k = 8 p + 4 + j in its upper half, so that one shuffle decodes four k of
//!                                                as many columns as a vector holds
//! groups     [n_panels][k_groups][PANEL][4] s8   as dense INT8; beside it scales, offsets and sums per group of inputs
//! blocks     [n_blocks][width][4] s8             by strip of `width` columns; beside each block the first k that it takes
//! ```

use super::layout::{PANEL, PackedLinear, PanelColumns};

mod groups;

pub(super) use self::groups::PanelGroups;
pub use self::groups::{GroupParts, PackedGroups};

/// Inputs of a pair of groups of four: what one packed byte per column and j covers.
pub(super) const PAIR: usize = 8;

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A linear layer in any form that there is a kernel for.
#[derive(Debug, Clone)]
pub enum PackedMatrix {
    /// Dense INT8.
    Dense(PackedLinear),
    /// Codebook of 4 bits.
    Codebook(PackedCodebook),
    /// Blocks of INT8, or all of them with an offset per column.
    Blocks(PackedBlocks),
    /// INT8 with a scale, and maybe an offset, per group of inputs.
    Groups(PackedGroups),
}

/// What the packing functions take besides the weights.
#[derive(Debug, Clone, Copy)]
pub struct LayerShape<'a> {
    /// One per output.
    pub bias: &'a [f32],
    /// Inputs.
    pub n_in: usize,
}

/// Codebook indices of one layer, and what they mean.
#[derive(Debug, Clone, Copy)]
pub struct CodebookParts<'a> {
    /// What an index stands for.
    pub table: [i8; 16],
    /// `[n_out, n_groups]`.
    pub scale: &'a [f32],
    /// `[n_out, n_groups]`, subtracted from the table's entry.
    pub zero: Option<&'a [i8]>,
    /// Groups of a row.
    pub n_groups: usize,
    /// Inputs of a group (of the last one: at most); a multiple of 8 if there are several groups.
    pub group: usize,
}

/// A linear layer of 4-bit indices.
#[derive(Debug, Clone)]
pub struct PackedCodebook {
    n_out: usize,
    n_in: usize,
    n_groups: usize,
    /// Pairs of a group.
    group_pairs: usize,
    table: [i8; 16],
    /// Largest magnitude of `table − zero`.
    reach: u8,
    lines: Vec<Line>,
    columns: Vec<PanelColumns>,
    /// Per panel and group; empty when one scale per column and no zero say it all.
    scales: Vec<[f32; PANEL]>,
    zeros: Vec<[i8; PANEL]>,
}

/// A linear layer of INT8 blocks.
#[derive(Debug, Clone)]
pub struct PackedBlocks {
    n_out: usize,
    n_in: usize,
    /// Columns of a strip.
    width: usize,
    lines: Vec<Line>,
    /// First k of each block.
    inputs: Vec<u16>,
    /// First block of each strip, and the end.
    starts: Vec<u32>,
    columns: Vec<PanelColumns>,
    /// Per panel, what is added to every weight of a column; empty if nothing is.
    offsets: Vec<[f32; PANEL]>,
}

fn empty_columns(n_panels: usize) -> Vec<PanelColumns> {
    vec![PanelColumns { scale: [0.0; PANEL], offset: [0.0; PANEL], bias: [0.0; PANEL], sum: [0; PANEL] }; n_panels]
}

fn check_shape(n_out: usize, layer: LayerShape<'_>) {
    assert!(layer.n_in <= 65_536, "sums over {} products may overflow", layer.n_in);
    assert!(layer.bias.len() == n_out && layer.n_in > 0, "{n_out}x{}: {} biases", layer.n_in, layer.bias.len());
}

impl PackedMatrix {
    /// Outputs.
    #[must_use]
    pub fn n_out(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.n_out(),
            Self::Codebook(codebook) => codebook.n_out,
            Self::Blocks(blocks) => blocks.n_out,
            Self::Groups(groups) => groups.n_out(),
        }
    }

    /// Inputs.
    #[must_use]
    pub fn n_in(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.n_in(),
            Self::Codebook(codebook) => codebook.n_in,
            Self::Blocks(blocks) => blocks.n_in,
            Self::Groups(groups) => groups.n_in(),
        }
    }

    /// Panels of outputs.
    #[must_use]
    pub fn n_panels(&self) -> usize {
        self.n_out().div_ceil(PANEL)
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.bytes(),
            Self::Codebook(codebook) => codebook.bytes(),
            Self::Blocks(blocks) => blocks.bytes(),
            Self::Groups(groups) => groups.bytes(),
        }
    }
}

impl PackedCodebook {
    /// Packs indices given by `index(n, k)`.
    ///
    /// # Panics
    /// If the lengths do not fit, a group is not a multiple of 8 inputs, or `table − zero` leaves s8.
    #[must_use]
    pub fn new(parts: CodebookParts<'_>, index: impl Fn(usize, usize) -> u8, layer: LayerShape<'_>) -> Self {
        let LayerShape { bias, n_in } = layer;
        let (n_out, n_groups) = (bias.len(), parts.n_groups);
        check_shape(n_out, layer);
        assert!(n_groups > 0 && parts.scale.len() == n_out * n_groups, "{} scales", parts.scale.len());
        assert!(n_in.div_ceil(parts.group) == n_groups, "{n_groups} groups of {} in {n_in}", parts.group);
        assert!(n_groups == 1 || parts.group.is_multiple_of(PAIR), "groups of {}", parts.group);
        let n_pairs = n_in.div_ceil(PAIR);
        let n_panels = n_out.div_ceil(PANEL);
        let general = n_groups > 1 || parts.zero.is_some();
        let n_extra = if general { n_panels * n_groups } else { 0 };
        let mut packed = Self {
            n_out,
            n_in,
            n_groups,
            group_pairs: if n_groups == 1 { n_pairs } else { parts.group / PAIR },
            table: parts.table,
            reach: 0,
            lines: vec![Line([0; 64]); n_panels * n_pairs * 4],
            columns: empty_columns(n_panels),
            scales: vec![[0.0; PANEL]; n_extra],
            zeros: vec![[0; PANEL]; n_extra],
        };
        for n in 0..n_out {
            let (panel, column) = (n / PANEL, n % PANEL);
            let target = &mut packed.columns[panel];
            let (mut sum, mut offset) = (0i32, 0.0f64);
            for group in 0..n_groups {
                let scale = parts.scale[n * n_groups + group];
                let zero = parts.zero.map_or(0, |zero| zero[n * n_groups + group]);
                let mut group_sum = 0i32;
                for k in group * parts.group..((group + 1) * parts.group).min(n_in) {
                    let index = index(n, k) & 15;
                    let code = i16::from(parts.table[usize::from(index)]) - i16::from(zero);
                    assert!(i8::try_from(code).is_ok(), "an entry less its zero is {code}");
                    packed.reach = packed.reach.max(u8::try_from(code.unsigned_abs()).unwrap_or(u8::MAX));
                    group_sum += i32::from(code);
                    let line = (panel * n_pairs + k / PAIR) * 4 + column / 16;
                    packed.lines[line].0[column % 16 * 4 + k % 4] |= index << (k % PAIR / 4 * 4);
                }
                sum += group_sum;
                offset += f64::from(group_sum) * f64::from(scale);
                if general {
                    packed.scales[panel * n_groups + group][column] = scale;
                    packed.zeros[panel * n_groups + group][column] = zero;
                }
            }
            target.scale[column] = parts.scale[n * n_groups];
            #[allow(clippy::cast_possible_truncation, reason = "rounded once")]
            let offset = offset as f32;
            target.offset[column] = offset;
            target.bias[column] = bias[n];
            target.sum[column] = sum;
        }
        // Entries that no weight uses may be larger; they are decoded for the columns and inputs that mean nothing.
        packed
    }

    /// Whether a sum over all inputs is one integer, as with one scale per column and no zeros.
    #[must_use]
    pub fn has_integer_sums(&self) -> bool {
        self.scales.is_empty()
    }

    /// Groups of a row.
    #[must_use]
    pub fn n_groups(&self) -> usize {
        self.n_groups
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + size_of_val(self.columns.as_slice())
            + size_of_val(self.scales.as_slice())
            + size_of_val(self.zeros.as_slice())
    }

    pub(super) fn n_in(&self) -> usize {
        self.n_in
    }

    pub(super) fn group_pairs(&self) -> usize {
        self.group_pairs
    }

    pub(super) fn table(&self) -> &[i8; 16] {
        &self.table
    }

    pub(super) fn reach(&self) -> u8 {
        self.reach
    }

    pub(super) fn columns(&self, panel: usize) -> &PanelColumns {
        &self.columns[panel]
    }

    /// The first byte of a panel, `n_pairs · 4 · PANEL` bytes, 64-byte aligned.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        let n_lines = self.n_in.div_ceil(PAIR) * 4;
        self.lines[panel * n_lines..(panel + 1) * n_lines].as_ptr().cast()
    }

    /// Scales and zeros of a panel's groups; empty if the columns say it all.
    pub(super) fn groups(&self, panel: usize) -> (&[[f32; PANEL]], &[[i8; PANEL]]) {
        if self.scales.is_empty() {
            return (&[], &[]);
        }
        let range = panel * self.n_groups..(panel + 1) * self.n_groups;
        (&self.scales[range.clone()], &self.zeros[range])
    }
}

impl PackedBlocks {
    /// Packs the blocks of strips of `width` rows (64 or 32): `groups` yields for each strip the groups of four inputs that
    /// are there, in order; `codes` holds `[n_blocks, width, 4]`. Codes beyond the last row or input are taken as 0.
    ///
    /// # Panics
    /// If the lengths do not fit.
    #[must_use]
    pub fn new<G: Iterator<Item = usize>>(
        width: usize,
        groups: impl Iterator<Item = G>,
        codes: &[i8],
        scale: &[f32],
        layer: LayerShape<'_>,
    ) -> Self {
        let LayerShape { bias, n_in } = layer;
        let n_out = bias.len();
        check_shape(n_out, layer);
        assert!((width == 64 || width == 32) && scale.len() == n_out, "strips of {width}, {} scales", scale.len());
        let n_panels = n_out.div_ceil(PANEL);
        let mut packed = Self {
            n_out,
            n_in,
            width,
            lines: Vec::new(),
            inputs: Vec::new(),
            starts: vec![0],
            columns: empty_columns(n_panels),
            offsets: Vec::new(),
        };
        let mut blocks = codes.chunks_exact(width * 4);
        for (strip, groups) in groups.enumerate() {
            for group in groups {
                assert!(group < n_in.div_ceil(4), "group {group} of {n_in} inputs");
                let codes = blocks.next().expect("a block of codes for every group");
                let mut block = vec![Line([0; 64]); width / 16];
                for (i, &code) in codes.iter().enumerate() {
                    let (n, k) = (strip * width + i / 4, group * 4 + i % 4);
                    if n < n_out && k < n_in {
                        block[i / 64].0[i % 64] = code.cast_unsigned();
                        packed.columns[n / PANEL].sum[n % PANEL] += i32::from(code);
                    }
                }
                packed.lines.extend(block);
                packed.inputs.push(u16::try_from(group * 4).expect("inputs are limited to 65,536"));
            }
            packed.starts.push(u32::try_from(packed.inputs.len()).expect("blocks of a layer are fewer than 2^32"));
        }
        assert!(blocks.next().is_none(), "a group for every block of codes");
        // Strips of a last panel that has no rows for them.
        let last = packed.starts[packed.starts.len() - 1];
        packed.starts.resize(n_panels * PANEL / width + 1, last);
        for n in 0..n_out {
            let target = &mut packed.columns[n / PANEL];
            target.scale[n % PANEL] = scale[n];
            #[allow(clippy::cast_precision_loss, reason = "at most 2^23")]
            let offset = target.sum[n % PANEL] as f32 * scale[n];
            target.offset[n % PANEL] = offset;
            target.bias[n % PANEL] = bias[n];
        }
        packed
    }

    /// Packs dense row-major codes with a real-valued offset per row: `value = scale · code + offset`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    #[must_use]
    pub fn affine(codes: &[i8], scale: &[f32], offset: &[f32], layer: LayerShape<'_>) -> Self {
        let (n_out, n_in) = (layer.bias.len(), layer.n_in);
        assert!(codes.len() == n_out * n_in && offset.len() == n_out, "{n_out}x{n_in}: {} codes", codes.len());
        let n_groups = n_in.div_ceil(4);
        let n_strips = n_out.div_ceil(PANEL);
        let code = |n: usize, k: usize| if n < n_out && k < n_in { codes[n * n_in + k] } else { 0 };
        let blocks: Vec<i8> = (0..n_strips * n_groups)
            .flat_map(|block| {
                (0..PANEL * 4).map(move |i| (block / n_groups * PANEL + i / 4, block % n_groups * 4 + i % 4))
            })
            .map(|(n, k)| code(n, k))
            .collect();
        let mut packed = Self::new(PANEL, (0..n_strips).map(|_| 0..n_groups), &blocks, scale, layer);
        packed.offsets = vec![[0.0; PANEL]; n_strips];
        for (n, &offset) in offset.iter().enumerate() {
            packed.offsets[n / PANEL][n % PANEL] = offset;
            // Σ_k x_k offset = scale_x · Σ_k code_k · offset + low_x · n_in · offset: the second part is a constant.
            #[allow(clippy::cast_precision_loss, reason = "at most 2^16")]
            let all = n_in as f32 * offset;
            packed.columns[n / PANEL].offset[n % PANEL] += all;
        }
        packed
    }

    /// Share of the blocks that are there.
    #[must_use]
    pub fn density(&self) -> f64 {
        self.inputs.len() as f64 / (self.n_out.div_ceil(self.width) * self.n_in.div_ceil(4)) as f64
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + size_of_val(self.inputs.as_slice())
            + size_of_val(self.starts.as_slice())
            + size_of_val(self.columns.as_slice())
            + size_of_val(self.offsets.as_slice())
    }

    pub(super) fn n_in(&self) -> usize {
        self.n_in
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn columns(&self, panel: usize) -> &PanelColumns {
        &self.columns[panel]
    }

    pub(super) fn offsets(&self, panel: usize) -> Option<&[f32; PANEL]> {
        self.offsets.get(panel)
    }

    /// The blocks of a strip: their codes, 64-byte aligned, and the first input of each.
    pub(super) fn strip(&self, strip: usize) -> (*const i8, &[u16]) {
        let range = self.starts[strip] as usize..self.starts[strip + 1] as usize;
        let lines = &self.lines[range.start * (self.width / 16)..range.end * (self.width / 16)];
        (lines.as_ptr().cast(), &self.inputs[range])
    }
}
