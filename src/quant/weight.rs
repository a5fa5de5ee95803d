//! A stored matrix in any of the forms.

use std::borrow::Cow;

use super::{Bitmap, BlockSparse, Codebook4, Int8Grouped};

/// A matrix as it is stored, row-major `[rows, cols]`, one output channel (or one embedding) per row.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight<'a> {
    /// Plain numbers.
    F32(Cow<'a, [f32]>),
    /// Linear symmetric INT8: `value[r, c] = scale[r] · codes[r, c]`.
    Int8 {
        /// `[rows, cols]`, in −127..=127.
        codes: Cow<'a, [i8]>,
        /// `[rows]`, positive.
        scale: Cow<'a, [f32]>,
    },
    /// Linear asymmetric INT8: `value[r, c] = scale[r] · codes[r, c] + offset[r]`.
    Int8Affine {
        /// `[rows, cols]`.
        codes: Cow<'a, [i8]>,
        /// `[rows]`, positive.
        scale: Cow<'a, [f32]>,
        /// `[rows]`, the value of code 0.
        offset: Cow<'a, [f32]>,
    },
    /// Linear INT8 with a scale per group of a row.
    Int8Grouped(Int8Grouped<'a>),
    /// Four bits per element and a table of 16 values.
    Codebook4(Codebook4<'a>),
    /// A product of two thin matrices.
    LowRank(LowRank<'a>),
    /// INT8 with whole blocks absent.
    BlockSparse(BlockSparse<'a>),
    /// INT8 with single elements absent. Smaller, not faster: it is executed as dense INT8.
    Bitmap(Bitmap<'a>),
}

/// `W = up · down`.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank<'a> {
    /// Rows of `down`, columns of `up`.
    pub rank: usize,
    /// `[rank, cols]`.
    pub down: Box<Weight<'a>>,
    /// `[rows, rank]`.
    pub up: Box<Weight<'a>>,
}

/// A stored matrix whose parts do not fit each other or hold what no weight may be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{part}: {reason}")]
pub struct FormError {
    /// Which part, such as `scale`.
    pub part: &'static str,
    /// What is wrong.
    pub reason: String,
}

impl FormError {
    pub(super) fn new(part: &'static str, reason: impl Into<String>) -> Self {
        Self { part, reason: reason.into() }
    }
}

/// Refuses a part of another length.
pub(super) fn expect_len(part: &'static str, got: usize, expected: Option<usize>) -> Result<(), FormError> {
    match expected {
        Some(expected) if expected == got => Ok(()),
        Some(expected) => Err(FormError::new(part, format!("{got} elements, expected {expected}"))),
        None => Err(FormError::new(part, "the declared sizes are too large")),
    }
}

/// Refuses scales that are not positive and finite.
pub(super) fn expect_scales(scale: &[f32], per_row: usize) -> Result<(), FormError> {
    match scale.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
        None => Ok(()),
        Some(index) => {
            Err(FormError::new("scale", format!("not positive and finite (row {})", index / per_row.max(1))))
        }
    }
}

pub(super) fn expect_finite(part: &'static str, values: &[f32]) -> Result<(), FormError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(FormError::new(part, format!("not finite (element {index})"))),
    }
}

fn affine<'a>(
    codes: &'a [i8],
    cols: usize,
    scale: &'a [f32],
    offset: impl Fn(usize) -> f32 + 'a,
) -> impl Iterator<Item = f32> + 'a {
    codes.chunks_exact(cols.max(1)).zip(scale).enumerate().flat_map(move |(row, (codes, &scale))| {
        let offset = offset(row);
        codes.iter().map(move |&code| f32::from(code) * scale + offset)
    })
}

impl Weight<'_> {
    /// The numbers that the stored form stands for, `[rows, cols]`; `cols` must be the stored matrix's.
    #[must_use]
    pub fn to_f32(&self, cols: usize) -> Vec<f32> {
        match self {
            Self::F32(values) => values.to_vec(),
            Self::Int8 { codes, scale } => affine(codes, cols, scale, |_| 0.0).collect(),
            Self::Int8Affine { codes, scale, offset } => affine(codes, cols, scale, |row| offset[row]).collect(),
            Self::Int8Grouped(grouped) => grouped.to_f32(cols),
            Self::Codebook4(codebook) => codebook.to_f32(cols),
            Self::LowRank(LowRank { rank, down, up }) => multiply(&up.to_f32(*rank), &down.to_f32(cols), *rank, cols),
            Self::BlockSparse(sparse) => sparse.to_f32(cols),
            Self::Bitmap(bitmap) => bitmap.to_f32(cols),
        }
    }

    /// Rows of the matrix, for matrices of `cols` columns.
    #[must_use]
    pub fn n_rows(&self, cols: usize) -> usize {
        match self {
            Self::F32(values) => values.len() / cols.max(1),
            Self::Int8 { scale, .. } | Self::Int8Affine { scale, .. } => scale.len(),
            Self::Int8Grouped(grouped) => grouped.n_rows(),
            Self::Codebook4(codebook) => codebook.n_rows(),
            Self::LowRank(LowRank { rank, up, .. }) => up.n_rows(*rank),
            Self::BlockSparse(sparse) => sparse.scale.len(),
            Self::Bitmap(bitmap) => bitmap.scale.len(),
        }
    }

    /// Whether the parts fit a matrix `[rows, cols]` and each other, and every number is one that a weight may be. A
    /// weight that passes can be expanded, packed and played without a panic.
    ///
    /// # Errors
    /// Naming the first part that does not fit.
    pub fn check(&self, rows: usize, cols: usize) -> Result<(), FormError> {
        let n = rows.checked_mul(cols);
        match self {
            Self::F32(values) => {
                expect_len("values", values.len(), n)?;
                expect_finite("values", values)
            }
            Self::Int8 { codes, scale } => {
                expect_len("codes", codes.len(), n)?;
                expect_len("scale", scale.len(), Some(rows))?;
                expect_scales(scale, 1)
            }
            Self::Int8Affine { codes, scale, offset } => {
                expect_len("codes", codes.len(), n)?;
                expect_len("scale", scale.len(), Some(rows))?;
                expect_scales(scale, 1)?;
                expect_len("offset", offset.len(), Some(rows))?;
                expect_finite("offset", offset)
            }
            Self::Int8Grouped(grouped) => grouped.check(rows, cols),
            Self::Codebook4(codebook) => codebook.check(rows, cols),
            Self::LowRank(LowRank { rank, down, up }) => {
                let nested = |weight: &Weight<'_>| matches!(weight, Weight::LowRank(_));
                if *rank == 0 || *rank > rows.min(cols) {
                    return Err(FormError::new("rank", format!("{rank} for a matrix of {rows}x{cols}")));
                }
                if nested(down) || nested(up) {
                    return Err(FormError::new("low rank", "a factor is itself a product"));
                }
                down.check(*rank, cols)?;
                up.check(rows, *rank)
            }
            Self::BlockSparse(sparse) => sparse.check(rows, cols),
            Self::Bitmap(bitmap) => bitmap.check(rows, cols),
        }
    }

    /// Bytes of the stored parts.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        match self {
            Self::F32(values) => 4 * values.len(),
            Self::Int8 { codes, scale } => codes.len() + 4 * scale.len(),
            Self::Int8Affine { codes, scale, .. } => codes.len() + 8 * scale.len(),
            Self::Int8Grouped(grouped) => grouped.n_bytes(),
            Self::Codebook4(codebook) => codebook.n_bytes(),
            Self::LowRank(LowRank { down, up, .. }) => down.n_bytes() + up.n_bytes(),
            Self::BlockSparse(sparse) => sparse.mask.len() + sparse.blocks.len() + 4 * sparse.scale.len(),
            Self::Bitmap(bitmap) => bitmap.mask.len() + bitmap.codes.len() + 4 * bitmap.scale.len(),
        }
    }

    /// Multiply-accumulates of one input row, as the INT8 player does them: what a low rank or absent blocks save is
    /// saved, absent elements save nothing. `[rows, cols]` is the matrix's shape.
    #[must_use]
    pub fn macs(&self, rows: usize, cols: usize) -> u64 {
        match self {
            Self::LowRank(LowRank { rank, down, up }) => down.macs(*rank, cols) + up.macs(rows, *rank),
            Self::BlockSparse(sparse) => sparse.blocks.len() as u64,
            _ => rows as u64 * cols as u64,
        }
    }

    /// A short name of the form, for manifests and reports, such as `int8` or `codebook4, 6 groups`.
    #[must_use]
    pub fn scheme(&self) -> String {
        match self {
            Self::F32(_) => "f32".to_owned(),
            Self::Int8 { .. } => "int8".to_owned(),
            Self::Int8Affine { .. } => "int8-affine".to_owned(),
            Self::Int8Grouped(grouped) => match grouped.offset {
                None => format!("int8, {} groups", grouped.n_groups),
                Some(_) => format!("int8-affine, {} groups", grouped.n_groups),
            },
            Self::Codebook4(codebook) => match codebook.n_groups {
                1 => "codebook4".to_owned(),
                n_groups => format!("codebook4, {n_groups} groups"),
            },
            Self::LowRank(LowRank { rank, down, up }) => {
                format!("low-rank {rank} ({} by {})", up.scheme(), down.scheme())
            }
            Self::BlockSparse(sparse) => format!("block-sparse {}x4, {} blocks", sparse.width, sparse.n_blocks()),
            Self::Bitmap(_) => "int8-bitmap".to_owned(),
        }
    }

    /// The same with nothing borrowed.
    #[must_use]
    pub fn into_owned(self) -> Weight<'static> {
        fn own<T: Clone>(values: Cow<'_, [T]>) -> Cow<'static, [T]> {
            Cow::Owned(values.into_owned())
        }
        match self {
            Self::F32(values) => Weight::F32(own(values)),
            Self::Int8 { codes, scale } => Weight::Int8 { codes: own(codes), scale: own(scale) },
            Self::Int8Affine { codes, scale, offset } => {
                Weight::Int8Affine { codes: own(codes), scale: own(scale), offset: own(offset) }
            }
            Self::Int8Grouped(Int8Grouped { codes, scale, offset, n_groups }) => Weight::Int8Grouped(Int8Grouped {
                codes: own(codes),
                scale: own(scale),
                offset: offset.map(own),
                n_groups,
            }),
            Self::Codebook4(Codebook4 { indices, table, scale, zero, n_groups }) => Weight::Codebook4(Codebook4 {
                indices: own(indices),
                table,
                scale: own(scale),
                zero: zero.map(own),
                n_groups,
            }),
            Self::LowRank(LowRank { rank, down, up }) => {
                Weight::LowRank(LowRank { rank, down: Box::new(down.into_owned()), up: Box::new(up.into_owned()) })
            }
            Self::BlockSparse(BlockSparse { width, mask, blocks, scale }) => {
                Weight::BlockSparse(BlockSparse { width, mask: own(mask), blocks: own(blocks), scale: own(scale) })
            }
            Self::Bitmap(Bitmap { mask, codes, scale }) => {
                Weight::Bitmap(Bitmap { mask: own(mask), codes: own(codes), scale: own(scale) })
            }
        }
    }

    /// The same, lent.
    #[must_use]
    pub fn lend(&self) -> Weight<'_> {
        fn lend<T: Clone>(values: &[T]) -> Cow<'_, [T]> {
            Cow::Borrowed(values)
        }
        match self {
            Self::F32(values) => Weight::F32(lend(values)),
            Self::Int8 { codes, scale } => Weight::Int8 { codes: lend(codes), scale: lend(scale) },
            Self::Int8Affine { codes, scale, offset } => {
                Weight::Int8Affine { codes: lend(codes), scale: lend(scale), offset: lend(offset) }
            }
            Self::Int8Grouped(grouped) => Weight::Int8Grouped(Int8Grouped {
                codes: lend(&grouped.codes),
                scale: lend(&grouped.scale),
                offset: grouped.offset.as_deref().map(lend),
                n_groups: grouped.n_groups,
            }),
            Self::Codebook4(codebook) => Weight::Codebook4(Codebook4 {
                indices: lend(&codebook.indices),
                table: codebook.table,
                scale: lend(&codebook.scale),
                zero: codebook.zero.as_deref().map(lend),
                n_groups: codebook.n_groups,
            }),
            Self::LowRank(LowRank { rank, down, up }) => {
                Weight::LowRank(LowRank { rank: *rank, down: Box::new(down.lend()), up: Box::new(up.lend()) })
            }
            Self::BlockSparse(BlockSparse { width, mask, blocks, scale }) => Weight::BlockSparse(BlockSparse {
                width: *width,
                mask: lend(mask),
                blocks: lend(blocks),
                scale: lend(scale),
            }),
            Self::Bitmap(Bitmap { mask, codes, scale }) => {
                Weight::Bitmap(Bitmap { mask: lend(mask), codes: lend(codes), scale: lend(scale) })
            }
        }
    }
}

/// `up [rows, rank] · down [rank, cols]`.
fn multiply(up: &[f32], down: &[f32], rank: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; up.len() / rank.max(1) * cols];
    for (up, out) in up.chunks_exact(rank.max(1)).zip(out.chunks_exact_mut(cols.max(1))) {
        for (&factor, down) in up.iter().zip(down.chunks_exact(cols.max(1))) {
            out.iter_mut().zip(down).for_each(|(out, down)| *out += factor * down);
        }
    }
    out
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
