//! INT8 matrices of which only a part is there.

use std::borrow::Cow;

use super::FormError;
use super::scheme::to_code;
use super::weight::{expect_len, expect_scales};

/// Inputs of a block: what one step of a dot product takes.
pub const BLOCK_DEPTH: usize = 4;

/// Blocks of `width` output channels by 4 inputs; what no block covers is 0, the rest is `scale[r] · code`.
///
/// ```text
/// panels:   rows [p · width, (p + 1) · width)       groups: columns [4 g, 4 g + 4)
/// mask:     [⌈rows / width⌉, ⌈⌈cols / 4⌉ / 8⌉] bits, the lowest bit of a byte first: whether block (p, g) is there
/// blocks:   the codes of those that are, by panel, then by group: [n_blocks, width, 4]
/// ```
/// Codes beyond the last row or column mean nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockSparse<'a> {
    /// Output channels of a block: 64 or 32.
    pub width: usize,
    /// Which blocks are there.
    pub mask: Cow<'a, [u8]>,
    /// Codes.
    pub blocks: Cow<'a, [i8]>,
    /// `[rows]`, positive.
    pub scale: Cow<'a, [f32]>,
}

/// Single elements; those whose bit is not set are 0, the others `scale[r] · code`.
///
/// ```text
/// mask:  [rows, ⌈cols / 8⌉] bits, the lowest bit of a byte first        codes: those that are there, in order
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Bitmap<'a> {
    /// Which elements are there.
    pub mask: Cow<'a, [u8]>,
    /// Codes.
    pub codes: Cow<'a, [i8]>,
    /// `[rows]`, positive.
    pub scale: Cow<'a, [f32]>,
}

fn bit(mask: &[u8], index: usize) -> bool {
    mask[index / 8] >> (index % 8) & 1 == 1
}

fn n_ones(mask: &[u8]) -> usize {
    mask.iter().map(|byte| byte.count_ones() as usize).sum()
}

/// Refuses bits beyond `n_bits` in the rows of a mask, and codes that are not as many as the bits.
fn check_mask(mask: &[u8], rows: usize, n_bits: usize, n_codes: Option<usize>) -> Result<(), FormError> {
    let stride = n_bits.div_ceil(8);
    expect_len("mask", mask.len(), rows.checked_mul(stride))?;
    let beyond = |row: &[u8]| (n_bits..stride * 8).any(|index| bit(row, index));
    if let Some(row) = mask.chunks_exact(stride.max(1)).position(beyond) {
        return Err(FormError::new("mask", format!("row {row} has bits beyond the last column")));
    }
    match n_codes {
        Some(n_codes) if n_codes == n_ones(mask) => Ok(()),
        _ => Err(FormError::new("mask", format!("{} bits are set, which is not what is stored", n_ones(mask)))),
    }
}

/// Symmetric scale of a row of which `values` are kept.
fn scale_of(values: impl Iterator<Item = f32>) -> f32 {
    let max_abs = values.fold(0.0f32, |max, value| max.max(value.abs()));
    if max_abs > 0.0 { max_abs / 127.0 } else { 1.0 }
}

fn scaled(codes: &[i8], cols: usize, scale: &[f32]) -> Vec<f32> {
    let rows = codes.chunks_exact(cols.max(1)).zip(scale);
    rows.flat_map(|(row, &scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect()
}

impl BlockSparse<'_> {
    /// INT8 blocks of `values: [rows, cols]`. `keep[p · ⌈cols / 4⌉ + g]` says which blocks to keep; without it, those with
    /// anything but zeros. The scale of a row is that of what is kept, as
    /// [`quantize_rows_symmetric`](super::quantize_rows_symmetric) sets it.
    ///
    /// # Panics
    /// If the lengths do not fit or `width` is not 64 or 32.
    #[must_use]
    pub fn encode(values: &[f32], cols: usize, width: usize, keep: Option<&[bool]>) -> BlockSparse<'static> {
        assert!(cols > 0 && values.len().is_multiple_of(cols), "{} values in rows of {cols}", values.len());
        assert!(width == 64 || width == 32, "blocks of {width} rows");
        let rows = values.len() / cols;
        let (n_panels, groups) = (rows.div_ceil(width), cols.div_ceil(BLOCK_DEPTH));
        let at = |row: usize, col: usize| if row < rows && col < cols { values[row * cols + col] } else { 0.0 };
        let filled = |panel: usize, group: usize| {
            (0..width * BLOCK_DEPTH)
                .any(|i| at(panel * width + i / BLOCK_DEPTH, group * BLOCK_DEPTH + i % BLOCK_DEPTH) != 0.0)
        };
        let keep: Cow<'_, [bool]> = match keep {
            Some(keep) => keep.into(),
            None => (0..n_panels * groups).map(|i| filled(i / groups, i % groups)).collect::<Vec<_>>().into(),
        };
        assert_eq!(keep.len(), n_panels * groups, "one flag per block");
        let kept = |row: usize, col: usize| keep[row / width * groups + col / BLOCK_DEPTH];
        let scale: Vec<f32> =
            (0..rows).map(|row| scale_of((0..cols).filter(|&col| kept(row, col)).map(|col| at(row, col)))).collect();
        let mut mask = vec![0u8; n_panels * groups.div_ceil(8)];
        let mut blocks = Vec::new();
        for panel in 0..n_panels {
            for group in (0..groups).filter(|group| keep[panel * groups + group]) {
                mask[panel * groups.div_ceil(8) + group / 8] |= 1 << (group % 8);
                for row in panel * width..(panel + 1) * width {
                    let scale = scale.get(row).copied().unwrap_or(1.0);
                    blocks.extend((0..BLOCK_DEPTH).map(|j| to_code(at(row, group * BLOCK_DEPTH + j) / scale)));
                }
            }
        }
        BlockSparse { width, mask: mask.into(), blocks: blocks.into(), scale: scale.into() }
    }

    /// Blocks that are there.
    #[must_use]
    pub fn n_blocks(&self) -> usize {
        self.blocks.len() / (self.width * BLOCK_DEPTH).max(1)
    }

    /// Groups of inputs whose blocks are there, of each panel of rows in order, for a matrix of `cols` columns.
    pub fn groups(&self, cols: usize) -> impl Iterator<Item = impl Iterator<Item = usize> + '_> + '_ {
        let groups = cols.div_ceil(BLOCK_DEPTH);
        self.mask
            .chunks_exact(groups.div_ceil(8).max(1))
            .map(move |mask| (0..groups).filter(move |&group| bit(mask, group)))
    }

    /// All codes, `[rows, cols]`, 0 where no block is.
    #[must_use]
    pub fn dense_codes(&self, cols: usize) -> Vec<i8> {
        let rows = self.scale.len();
        let mut dense = vec![0; rows * cols];
        let mut blocks = self.blocks.chunks_exact(self.width * BLOCK_DEPTH);
        for (panel, groups) in self.groups(cols).enumerate() {
            for (group, block) in groups.zip(&mut blocks) {
                for (row, codes) in (panel * self.width..rows).zip(block.chunks_exact(BLOCK_DEPTH)) {
                    for (col, &code) in (group * BLOCK_DEPTH..cols).zip(codes) {
                        dense[row * cols + col] = code;
                    }
                }
            }
        }
        dense
    }

    /// The numbers that it stands for, `[rows, cols]`.
    #[must_use]
    pub fn to_f32(&self, cols: usize) -> Vec<f32> {
        scaled(&self.dense_codes(cols), cols, &self.scale)
    }

    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<(), FormError> {
        if self.width != 64 && self.width != 32 {
            return Err(FormError::new("blocks", format!("blocks of {} rows, expected 64 or 32", self.width)));
        }
        expect_len("scale", self.scale.len(), Some(rows))?;
        expect_scales(&self.scale, 1)?;
        let size = self.width * BLOCK_DEPTH;
        let n_blocks = self.blocks.len().is_multiple_of(size).then_some(self.blocks.len() / size);
        check_mask(&self.mask, rows.div_ceil(self.width), cols.div_ceil(BLOCK_DEPTH), n_blocks)
    }
}

impl Bitmap<'_> {
    /// INT8 of `values: [rows, cols]` without the zeros.
    ///
    /// # Panics
    /// If `cols` is 0 or does not divide the length.
    #[must_use]
    pub fn encode(values: &[f32], cols: usize) -> Bitmap<'static> {
        assert!(cols > 0 && values.len().is_multiple_of(cols), "{} values in rows of {cols}", values.len());
        let stride = cols.div_ceil(8);
        let mut mask = vec![0u8; values.len() / cols * stride];
        let mut codes = Vec::new();
        let mut scales = Vec::with_capacity(values.len() / cols);
        for (values, mask) in values.chunks_exact(cols).zip(mask.chunks_exact_mut(stride)) {
            let scale = scale_of(values.iter().copied());
            for (col, &value) in values.iter().enumerate().filter(|(_, value)| **value != 0.0) {
                mask[col / 8] |= 1 << (col % 8);
                codes.push(to_code(value / scale));
            }
            scales.push(scale);
        }
        Bitmap { mask: mask.into(), codes: codes.into(), scale: scales.into() }
    }

    /// All codes, `[rows, cols]`, 0 where none is stored.
    #[must_use]
    pub fn dense_codes(&self, cols: usize) -> Vec<i8> {
        let mut codes = self.codes.iter().copied();
        self.mask
            .chunks_exact(cols.div_ceil(8).max(1))
            .flat_map(|mask| (0..cols).map(move |col| bit(mask, col)))
            .map(|present| if present { codes.next().unwrap_or(0) } else { 0 })
            .collect()
    }

    /// The numbers that it stands for, `[rows, cols]`.
    #[must_use]
    pub fn to_f32(&self, cols: usize) -> Vec<f32> {
        scaled(&self.dense_codes(cols), cols, &self.scale)
    }

    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<(), FormError> {
        expect_len("scale", self.scale.len(), Some(rows))?;
        expect_scales(&self.scale, 1)?;
        check_mask(&self.mask, rows, cols, Some(self.codes.len()))
    }
}
