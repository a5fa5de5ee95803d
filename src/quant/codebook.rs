//! Four bits per element: an index into a table of 16 s8 values, a scale per row or per group of a row.

use std::borrow::Cow;

use super::FormError;
use super::weight::{expect_len, expect_scales};

/// Entries of a table.
pub const TABLE_LEN: usize = 16;
/// Groups along a row start at multiples of this, so that a kernel's step never straddles two.
const GROUP_GRAIN: usize = 8;

/// `value[r, c] = scale[r, g] · (table[index[r, c]] − zero[r, g])`, `g = c / group`.
///
/// Linear (`table[i] = i − 8`), logarithmic (powers of two and sums of two), k-means and NF4 differ in the table alone.
/// Without `zero` it is 0. Every `table[i] − zero` must be in −128..=127. A row of `cols` columns has `n_groups` groups
/// of [`Codebook4::group_len`] columns, the last one possibly shorter.
///
/// Tables whose `table[i] − zero` stay within ±32 run fastest where products of bytes are added in 16 bits (AVX2), those
/// within ±64 next; elsewhere it makes no difference.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook4<'a> {
    /// `[rows, ⌈cols / 2⌉]`, the lower half of a byte first.
    pub indices: Cow<'a, [u8]>,
    /// What an index stands for, before scaling.
    pub table: [i8; TABLE_LEN],
    /// `[rows, n_groups]`, positive.
    pub scale: Cow<'a, [f32]>,
    /// `[rows, n_groups]`.
    pub zero: Option<Cow<'a, [i8]>>,
    /// Groups of a row.
    pub n_groups: usize,
}

/// Packs indices `[rows, cols]` two per byte, the first in the lower half; every row starts on a byte.
///
/// # Panics
/// If `cols` is 0 or does not divide the length, or an index is 16 or more.
#[must_use]
pub fn pack_nibbles(indices: &[u8], cols: usize) -> Vec<u8> {
    assert!(cols > 0 && indices.len().is_multiple_of(cols), "{} indices in rows of {cols}", indices.len());
    assert!(indices.iter().all(|&index| usize::from(index) < TABLE_LEN), "an index is beyond the table");
    indices
        .chunks_exact(cols)
        .flat_map(|row| row.chunks(2).map(|pair| pair[0] | pair.get(1).copied().unwrap_or(0) << 4))
        .collect()
}

/// Rounds scales to binary16, so that they are stored in half the bytes without loss. A scale that would become 0 or
/// infinite there keeps its value (and then all of the matrix's are stored as f32).
pub fn round_scales_to_half(scales: &mut [f32]) {
    for scale in scales {
        let rounded = half::f16::from_f32(*scale).to_f32();
        if rounded.is_finite() && rounded > 0.0 {
            *scale = rounded;
        }
    }
}

impl Codebook4<'_> {
    /// Columns of a group when a row of `cols` columns has `n_groups` of them.
    #[must_use]
    pub fn group_len(cols: usize, n_groups: usize) -> usize {
        match n_groups {
            0 | 1 => cols,
            _ => cols.div_ceil(n_groups).next_multiple_of(GROUP_GRAIN),
        }
    }

    /// Groups of a row for groups of about `wanted` columns: as many as `wanted`, rounded up to a multiple of 8, asks for.
    /// The groups are then of nearly equal length, exactly `wanted` where it divides `cols`.
    #[must_use]
    pub fn n_groups(cols: usize, wanted: usize) -> usize {
        cols.div_ceil(wanted.next_multiple_of(GROUP_GRAIN).max(GROUP_GRAIN)).max(1)
    }

    /// The nearest entries for `values: [rows, cols]` under given scales (and zeros), `[rows, n_groups]` each. Of two
    /// entries equally near the smaller one is taken.
    ///
    /// # Panics
    /// If the lengths do not fit.
    #[must_use]
    pub fn nearest(
        values: &[f32],
        cols: usize,
        table: [i8; TABLE_LEN],
        scale: Vec<f32>,
        zero: Option<Vec<i8>>,
        n_groups: usize,
    ) -> Codebook4<'static> {
        assert!(cols > 0 && values.len().is_multiple_of(cols), "{} values in rows of {cols}", values.len());
        let group = Self::group_len(cols, n_groups);
        assert!(scale.len() == values.len() / cols * n_groups && group > 0, "{} scales", scale.len());
        assert!(zero.as_ref().is_none_or(|zero| zero.len() == scale.len()), "as many zeros as scales");
        // Between neighbours of the sorted table the nearer one changes at their middle.
        let mut order: Vec<u8> = (0..16).collect();
        order.sort_by_key(|&index| table[usize::from(index)]);
        order.dedup_by_key(|index| table[usize::from(*index)]);
        let sorted: Vec<f32> = order.iter().map(|&index| f32::from(table[usize::from(index)])).collect();
        let mut indices = Vec::with_capacity(values.len());
        for (row, values) in values.chunks_exact(cols).enumerate() {
            for (at, values) in values.chunks(group).enumerate() {
                let at = row * n_groups + at;
                let shift = zero.as_ref().map_or(0.0, |zero| f32::from(zero[at]));
                indices.extend(values.iter().map(|value| {
                    let code = value / scale[at] + shift;
                    let upper = sorted.partition_point(|&entry| entry < code).min(sorted.len() - 1);
                    let lower = upper.saturating_sub(1);
                    order[if (code - sorted[lower]).abs() <= (sorted[upper] - code).abs() { lower } else { upper }]
                }));
            }
        }
        Codebook4 {
            indices: pack_nibbles(&indices, cols).into(),
            table,
            scale: scale.into(),
            zero: zero.map(Cow::Owned),
            n_groups,
        }
    }

    /// Rows of the matrix.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.scale.len() / self.n_groups.max(1)
    }

    /// Index of element `[row, col]`.
    #[must_use]
    pub fn index(&self, cols: usize, row: usize, col: usize) -> u8 {
        let byte = self.indices[row * cols.div_ceil(2) + col / 2];
        if col.is_multiple_of(2) { byte & 15 } else { byte >> 4 }
    }

    /// The integer that element `[row, col]` is before scaling, `table[index] − zero`.
    #[must_use]
    pub fn code(&self, cols: usize, row: usize, col: usize) -> i16 {
        let group = row * self.n_groups + col / Self::group_len(cols, self.n_groups).max(1);
        let zero = self.zero.as_ref().map_or(0, |zero| i16::from(zero[group]));
        i16::from(self.table[usize::from(self.index(cols, row, col))]) - zero
    }

    /// The numbers that it stands for, `[rows, cols]`.
    #[must_use]
    pub fn to_f32(&self, cols: usize) -> Vec<f32> {
        let group = Self::group_len(cols, self.n_groups).max(1);
        (0..self.n_rows())
            .flat_map(|row| (0..cols).map(move |col| (row, col)))
            .map(|(row, col)| f32::from(self.code(cols, row, col)) * self.scale[row * self.n_groups + col / group])
            .collect()
    }

    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<(), FormError> {
        let n_groups = self.n_groups;
        let group = Self::group_len(cols, n_groups);
        if n_groups == 0 || cols == 0 || cols.div_ceil(group) != n_groups {
            return Err(FormError::new("scale", format!("{n_groups} groups in rows of {cols}")));
        }
        expect_len("indices", self.indices.len(), rows.checked_mul(cols.div_ceil(2)))?;
        expect_len("scale", self.scale.len(), rows.checked_mul(n_groups))?;
        expect_scales(&self.scale, n_groups)?;
        if let Some(zero) = &self.zero {
            expect_len("zero", zero.len(), rows.checked_mul(n_groups))?;
            let (low, high) = self.table.iter().fold((i8::MAX, i8::MIN), |(l, h), &x| (l.min(x), h.max(x)));
            let fits = |zero: i8| i16::from(low) - i16::from(zero) >= -128 && i16::from(high) - i16::from(zero) <= 127;
            if let Some(index) = zero.iter().position(|&zero| !fits(zero)) {
                let reason = format!("{} with a table of {low} to {high} leaves 8 bits", zero[index]);
                return Err(FormError::new("zero", reason));
            }
        }
        Ok(())
    }

    /// Whether every scale is a binary16 number, so that storing them as such loses nothing.
    #[must_use]
    pub fn has_half_scales(&self) -> bool {
        self.scale.iter().all(|&scale| half::f16::from_f32(scale).to_f32() == scale)
    }

    pub(super) fn n_bytes(&self) -> usize {
        let scales = self.scale.len() * if self.has_half_scales() { 2 } else { 4 };
        self.indices.len() + TABLE_LEN + scales + self.zero.as_ref().map_or(0, |zero| zero.len())
    }
}
