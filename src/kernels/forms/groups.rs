//! INT8 matrices whose rows are cut into groups with a scale, and maybe an offset, each.

use super::{LayerShape, Line, PANEL, PanelColumns, check_shape, empty_columns};

/// A layer's codes, and what they mean.
#[derive(Debug, Clone, Copy)]
pub struct GroupParts<'a> {
    /// `[n_out, n_in]`.
    pub codes: &'a [i8],
    /// `[n_out, n_groups]`.
    pub scale: &'a [f32],
    /// `[n_out, n_groups]`, the value of code 0.
    pub offset: Option<&'a [f32]>,
    /// Inputs of a group (of the last one: at most), a multiple of 4.
    pub group: usize,
}

/// A linear layer of INT8 in groups of inputs.
#[derive(Debug, Clone)]
pub struct PackedGroups {
    n_out: usize,
    n_in: usize,
    group: usize,
    lines: Vec<Line>,
    columns: Vec<PanelColumns>,
    /// Per panel and group: scales, sums of codes, and offsets (none where all are 0).
    scales: Vec<[f32; PANEL]>,
    sums: Vec<[i32; PANEL]>,
    offsets: Vec<[f32; PANEL]>,
}

impl PackedGroups {
    /// Packs a layer.
    ///
    /// # Panics
    /// If the lengths do not fit.
    #[must_use]
    pub fn new(parts: GroupParts<'_>, layer: LayerShape<'_>) -> Self {
        let LayerShape { bias, n_in } = layer;
        let n_out = bias.len();
        check_shape(n_out, layer);
        assert!(parts.group > 0 && parts.group.is_multiple_of(4), "groups of {}", parts.group);
        let n_groups = n_in.div_ceil(parts.group);
        let fits = |scales: &[f32]| scales.len() == n_out * n_groups;
        assert!(parts.codes.len() == n_out * n_in && fits(parts.scale) && parts.offset.is_none_or(fits));
        let (n_panels, k_groups) = (n_out.div_ceil(PANEL), n_in.div_ceil(4));
        let mut packed = Self {
            n_out,
            n_in,
            group: parts.group,
            lines: vec![Line([0; 64]); n_panels * k_groups * 4],
            columns: empty_columns(n_panels),
            scales: vec![[0.0; PANEL]; n_panels * n_groups],
            sums: vec![[0; PANEL]; n_panels * n_groups],
            offsets: vec![[0.0; PANEL]; if parts.offset.is_some() { n_panels * n_groups } else { 0 }],
        };
        for n in 0..n_out {
            let (panel, column) = (n / PANEL, n % PANEL);
            let mut total = 0.0f64;
            for (index, codes) in parts.codes[n * n_in..(n + 1) * n_in].chunks(parts.group).enumerate() {
                let (at, from) = (panel * n_groups + index, n * n_groups + index);
                let mut sum = 0i32;
                for (k, &code) in (index * parts.group..).zip(codes) {
                    let line = (panel * k_groups + k / 4) * 4 + column / 16;
                    packed.lines[line].0[column % 16 * 4 + k % 4] = code.cast_unsigned();
                    sum += i32::from(code);
                }
                let offset = parts.offset.map_or(0.0, |offset| offset[from]);
                packed.scales[at][column] = parts.scale[from];
                packed.sums[at][column] = sum;
                if let Some(offsets) = packed.offsets.get_mut(at) {
                    offsets[column] = offset;
                }
                #[allow(clippy::cast_precision_loss, reason = "at most 2^16")]
                let len = codes.len() as f64;
                total += f64::from(sum) * f64::from(parts.scale[from]) + len * f64::from(offset);
            }
            #[allow(clippy::cast_possible_truncation, reason = "rounded once")]
            let total = total as f32;
            packed.columns[panel].offset[column] = total;
            packed.columns[panel].bias[column] = bias[n];
        }
        packed
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

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + size_of_val(self.columns.as_slice())
            + size_of_val(self.scales.as_slice())
            + size_of_val(self.sums.as_slice())
            + size_of_val(self.offsets.as_slice())
    }

    /// Inputs of a group.
    pub(in crate::kernels) fn group(&self) -> usize {
        self.group
    }

    pub(in crate::kernels) fn columns(&self, panel: usize) -> &PanelColumns {
        &self.columns[panel]
    }

    /// The first byte of a panel, 64-byte aligned.
    pub(in crate::kernels) fn panel(&self, panel: usize) -> *const i8 {
        let n_lines = self.n_in.div_ceil(4) * 4;
        self.lines[panel * n_lines..(panel + 1) * n_lines].as_ptr().cast()
    }

    /// What belongs to the groups of a panel.
    pub(in crate::kernels) fn groups(&self, panel: usize) -> PanelGroups<'_> {
        let n_groups = self.n_in.div_ceil(self.group);
        let range = panel * n_groups..(panel + 1) * n_groups;
        let offsets = if self.offsets.is_empty() { &[][..] } else { &self.offsets[range.clone()] };
        PanelGroups { scales: &self.scales[range.clone()], sums: &self.sums[range], offsets }
    }
}

/// What belongs to the groups of a panel, `[n_groups]` each; no offsets where all are 0.
pub(in crate::kernels) struct PanelGroups<'a> {
    pub(in crate::kernels) scales: &'a [[f32; PANEL]],
    pub(in crate::kernels) sums: &'a [[i32; PANEL]],
    pub(in crate::kernels) offsets: &'a [[f32; PANEL]],
}
