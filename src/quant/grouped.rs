//! INT8 with a scale, and maybe an offset, per group of a row.

use std::borrow::Cow;

use super::weight::{expect_finite, expect_len, expect_scales};
use super::{Codebook4, FormError};

/// `value[r, c] = scale[r, g] · codes[r, c] + offset[r, g]`, `g = c / group`; without `offset` it is 0.
///
/// Groups are cut as those of [`Codebook4`]: [`Codebook4::group_len`] columns each, the last one possibly shorter.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Grouped<'a> {
    /// `[rows, cols]`, in −127..=127.
    pub codes: Cow<'a, [i8]>,
    /// `[rows, n_groups]`, positive.
    pub scale: Cow<'a, [f32]>,
    /// `[rows, n_groups]`, the value of code 0.
    pub offset: Option<Cow<'a, [f32]>>,
    /// Groups of a row, at least 2.
    pub n_groups: usize,
}

impl Int8Grouped<'_> {
    /// Rows of the matrix.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.scale.len() / self.n_groups.max(1)
    }

    /// The numbers that it stands for, `[rows, cols]`.
    #[must_use]
    pub fn to_f32(&self, cols: usize) -> Vec<f32> {
        let group = Codebook4::group_len(cols, self.n_groups).max(1);
        let value = |(index, &code): (usize, &i8)| {
            let at = index / cols * self.n_groups + index % cols / group;
            f32::from(code) * self.scale[at] + self.offset.as_ref().map_or(0.0, |offset| offset[at])
        };
        self.codes.iter().enumerate().map(value).collect()
    }

    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<(), FormError> {
        let n_groups = self.n_groups;
        if n_groups < 2 || cols == 0 || cols.div_ceil(Codebook4::group_len(cols, n_groups)) != n_groups {
            return Err(FormError::new("scale", format!("{n_groups} groups in rows of {cols}")));
        }
        expect_len("codes", self.codes.len(), rows.checked_mul(cols))?;
        expect_len("scale", self.scale.len(), rows.checked_mul(n_groups))?;
        expect_scales(&self.scale, n_groups)?;
        match &self.offset {
            None => Ok(()),
            Some(offset) => {
                expect_len("offset", offset.len(), rows.checked_mul(n_groups))?;
                expect_finite("offset", offset)
            }
        }
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.codes.len() + 4 * (self.scale.len() + self.offset.as_ref().map_or(0, |offset| offset.len()))
    }
}
