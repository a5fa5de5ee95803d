//! Matrices in and out: which tensors hold a stored form, under which names, and every check before they are trusted.

use std::borrow::Cow;

use super::hf_names::{
    BLOCKS_SUFFIX, DOWN_SUFFIX, INDICES_SUFFIX, MASK_SUFFIX, OFFSET_SUFFIX, SCALE_SUFFIX, TABLE_SUFFIX, UP_SUFFIX,
    VALUES_SUFFIX, ZERO_SUFFIX,
};
use super::reader::{Dtype, TensorView};
use super::writer::TensorOut;
use super::{CheckpointError, hf_names};
use crate::model::{Family, LinearSlot};
use crate::quant::{BLOCK_DEPTH, Bitmap, BlockSparse, Codebook4, Int8Grouped, LowRank, TABLE_LEN, Weight};

/// Where tensors are looked up by name.
pub(super) trait Tensors<'a>: Copy {
    /// Whether there is a tensor of this name.
    fn has(self, name: &str) -> bool;
    /// The tensor of this name.
    fn get(self, name: &str) -> Result<TensorView<'a>, CheckpointError>;
}

/// Which tensors are there decides the form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// One tensor of the matrix's own name: f32 or INT8.
    Plain,
    Codebook4,
    BlockSparse,
    Bitmap,
    LowRank,
}

fn form<'a>(tensors: impl Tensors<'a>, name: &str) -> Option<Form> {
    let has = |suffix: &str| tensors.has(&format!("{name}{suffix}"));
    if tensors.has(name) {
        Some(Form::Plain)
    } else if has(INDICES_SUFFIX) {
        Some(Form::Codebook4)
    } else if has(BLOCKS_SUFFIX) {
        Some(Form::BlockSparse)
    } else if has(VALUES_SUFFIX) {
        Some(Form::Bitmap)
    } else if name.ends_with(DOWN_SUFFIX) || name.ends_with(UP_SUFFIX) {
        // A factor is no product itself.
        None
    } else {
        form(tensors, &format!("{name}{DOWN_SUFFIX}")).map(|_| Form::LowRank)
    }
}

/// Whether a matrix of this name is there in any form.
pub(super) fn has_matrix<'a>(tensors: impl Tensors<'a>, name: &str) -> bool {
    form(tensors, name).is_some()
}

/// Whether its tensors are there and of the right shapes; values of a plain matrix are not looked at.
pub(super) fn check_matrix<'a>(
    tensors: impl Tensors<'a>,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<(), CheckpointError> {
    match form(tensors, name) {
        Some(Form::Plain) | None => tensors.get(name)?.expect_shape(&[rows, cols]),
        Some(_) => matrix(tensors, name, rows, cols).map(|_| ()),
    }
}

/// The matrix of this name, `[rows, cols]`.
pub(super) fn matrix<'a>(
    tensors: impl Tensors<'a>,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<Weight<'a>, CheckpointError> {
    let part = |suffix: &str| tensors.get(&format!("{name}{suffix}"));
    // One scale per row.
    let scale = || -> Result<Cow<'a, [f32]>, CheckpointError> {
        let scale = part(SCALE_SUFFIX)?;
        scale.expect_shape(&[rows, 1])?;
        check_scale(&scale)
    };
    let weight = match form(tensors, name) {
        Some(Form::Plain) | None => {
            let tensor = tensors.get(name)?;
            tensor.expect_shape(&[rows, cols])?;
            if tensor.dtype != Dtype::I8 {
                return Ok(Weight::F32(tensor.to_f32()?));
            }
            let codes = Cow::Borrowed(tensor.to_i8()?);
            let offset = match tensors.has(&format!("{name}{OFFSET_SUFFIX}")) {
                false => None,
                true => Some(part(OFFSET_SUFFIX)?),
            };
            match (part(SCALE_SUFFIX)?.shape, offset) {
                ([got, n_groups], offset) if *got == rows && *n_groups > 1 => {
                    offset.iter().try_for_each(|offset| offset.expect_shape(&[rows, *n_groups]))?;
                    let offset = offset.map(|offset| offset.to_f32()).transpose()?;
                    let scale = check_scale(&part(SCALE_SUFFIX)?)?;
                    Weight::Int8Grouped(Int8Grouped { codes, scale, offset, n_groups: *n_groups })
                }
                (_, None) => Weight::Int8 { codes, scale: scale()? },
                (_, Some(offset)) => {
                    offset.expect_shape(&[rows, 1])?;
                    Weight::Int8Affine { codes, scale: scale()?, offset: offset.to_f32()? }
                }
            }
        }
        Some(Form::Codebook4) => {
            let indices = part(INDICES_SUFFIX)?;
            indices.expect_shape(&[rows, cols.div_ceil(2)])?;
            let table = part(TABLE_SUFFIX)?;
            table.expect_shape(&[TABLE_LEN])?;
            let scale = part(SCALE_SUFFIX)?;
            let n_groups = match scale.shape {
                [got, n_groups] if *got == rows => *n_groups,
                _ => return Err(scale.wrong_shape(&[rows, 1])),
            };
            let zero = match tensors.has(&format!("{name}{ZERO_SUFFIX}")) {
                false => None,
                true => {
                    let zero = part(ZERO_SUFFIX)?;
                    zero.expect_shape(&[rows, n_groups])?;
                    Some(Cow::Borrowed(zero.to_i8()?))
                }
            };
            let mut entries = [0; TABLE_LEN];
            entries.copy_from_slice(table.to_i8()?);
            let scale = check_scale(&scale)?;
            Weight::Codebook4(Codebook4 {
                indices: Cow::Borrowed(indices.to_u8()?),
                table: entries,
                scale,
                zero,
                n_groups,
            })
        }
        Some(Form::BlockSparse) => {
            let blocks = part(BLOCKS_SUFFIX)?;
            let width = match blocks.shape {
                [_, width, BLOCK_DEPTH] if *width > 0 => *width,
                _ => return Err(blocks.wrong_shape(&[0, 64, BLOCK_DEPTH])),
            };
            let mask = part(MASK_SUFFIX)?;
            mask.expect_shape(&[rows.div_ceil(width), cols.div_ceil(BLOCK_DEPTH).div_ceil(8)])?;
            let (mask, blocks) = (Cow::Borrowed(mask.to_u8()?), Cow::Borrowed(blocks.to_i8()?));
            Weight::BlockSparse(BlockSparse { width, mask, blocks, scale: scale()? })
        }
        Some(Form::Bitmap) => {
            let values = part(VALUES_SUFFIX)?;
            if values.shape.len() != 1 {
                return Err(values.wrong_shape(&[0]));
            }
            let mask = part(MASK_SUFFIX)?;
            mask.expect_shape(&[rows, cols.div_ceil(8)])?;
            let (mask, codes) = (Cow::Borrowed(mask.to_u8()?), Cow::Borrowed(values.to_i8()?));
            Weight::Bitmap(Bitmap { mask, codes, scale: scale()? })
        }
        Some(Form::LowRank) => {
            let (down, up) = (format!("{name}{DOWN_SUFFIX}"), format!("{name}{UP_SUFFIX}"));
            let rank = rank(tensors, &down)?;
            let down = Box::new(matrix(tensors, &down, rank, cols)?);
            Weight::LowRank(LowRank { rank, down, up: Box::new(matrix(tensors, &up, rows, rank)?) })
        }
    };
    weight
        .check(rows, cols)
        .map_err(|error| CheckpointError::Form { name: name.to_owned(), reason: error.to_string() })?;
    Ok(weight)
}

/// Rows of the first factor: the first dimension of whatever part of it has one per row.
fn rank<'a>(tensors: impl Tensors<'a>, down: &str) -> Result<usize, CheckpointError> {
    let suffix = match form(tensors, down) {
        Some(Form::Plain) | None => "",
        _ => SCALE_SUFFIX,
    };
    let tensor = tensors.get(&format!("{down}{suffix}"))?;
    match tensor.shape {
        [rank, _] => Ok(*rank),
        _ => Err(tensor.wrong_shape(&[0, 0])),
    }
}

fn check_scale<'a>(scale: &TensorView<'a>) -> Result<Cow<'a, [f32]>, CheckpointError> {
    let values = scale.to_f32()?;
    let per_row = scale.shape.get(1).copied().unwrap_or(1).max(1);
    match values.iter().position(|&scale| scale <= 0.0) {
        Some(index) => Err(CheckpointError::Scale { name: scale.name.to_owned(), row: index / per_row }),
        None => Ok(values),
    }
}

fn tensor<T: bytemuck::NoUninit>(name: String, dtype: Dtype, shape: Vec<usize>, values: &[T]) -> TensorOut<'static> {
    TensorOut { name, dtype, shape, data: bytemuck::cast_slice(values).to_vec().into() }
}

/// The tensors that hold `weight`, `[rows, cols]`, under the name `name` (`….weight`).
///
/// # Panics
/// If the weight's parts do not fit the shape ([`Weight::check`]).
#[must_use]
pub fn matrix_tensors(name: &str, weight: &Weight<'_>, rows: usize, cols: usize) -> Vec<TensorOut<'static>> {
    let part = |suffix: &str| format!("{name}{suffix}");
    let scales = |scale: &[f32]| tensor(part(SCALE_SUFFIX), Dtype::F32, vec![rows, 1], scale);
    match weight {
        Weight::F32(values) => vec![tensor(part(""), Dtype::F32, vec![rows, cols], values)],
        Weight::Int8 { codes, scale } => {
            vec![tensor(part(""), Dtype::I8, vec![rows, cols], codes), scales(scale)]
        }
        Weight::Int8Affine { codes, scale, offset } => vec![
            tensor(part(""), Dtype::I8, vec![rows, cols], codes),
            scales(scale),
            tensor(part(OFFSET_SUFFIX), Dtype::F32, vec![rows, 1], offset),
        ],
        Weight::Int8Grouped(grouped) => {
            let shape = || vec![rows, grouped.n_groups];
            let offset = grouped.offset.as_ref();
            let mut out = vec![
                tensor(part(""), Dtype::I8, vec![rows, cols], &grouped.codes),
                tensor(part(SCALE_SUFFIX), Dtype::F32, shape(), &grouped.scale),
            ];
            out.extend(offset.map(|offset| tensor(part(OFFSET_SUFFIX), Dtype::F32, shape(), offset)));
            out
        }
        Weight::Codebook4(codebook) => {
            let shape = vec![rows, codebook.n_groups];
            let scale = if codebook.has_half_scales() {
                let halves: Vec<u8> =
                    codebook.scale.iter().flat_map(|&scale| half::f16::from_f32(scale).to_le_bytes()).collect();
                tensor(part(SCALE_SUFFIX), Dtype::F16, shape.clone(), &halves)
            } else {
                tensor(part(SCALE_SUFFIX), Dtype::F32, shape.clone(), &codebook.scale)
            };
            let mut out = vec![
                tensor(part(INDICES_SUFFIX), Dtype::U8, vec![rows, cols.div_ceil(2)], &codebook.indices),
                tensor(part(TABLE_SUFFIX), Dtype::I8, vec![TABLE_LEN], &codebook.table),
                scale,
            ];
            out.extend(codebook.zero.as_ref().map(|zero| tensor(part(ZERO_SUFFIX), Dtype::I8, shape, zero)));
            out
        }
        Weight::BlockSparse(sparse) => {
            let mask = vec![rows.div_ceil(sparse.width), cols.div_ceil(BLOCK_DEPTH).div_ceil(8)];
            let blocks = vec![sparse.n_blocks(), sparse.width, BLOCK_DEPTH];
            vec![
                tensor(part(BLOCKS_SUFFIX), Dtype::I8, blocks, &sparse.blocks),
                tensor(part(MASK_SUFFIX), Dtype::U8, mask, &sparse.mask),
                scales(&sparse.scale),
            ]
        }
        Weight::Bitmap(bitmap) => vec![
            tensor(part(VALUES_SUFFIX), Dtype::I8, vec![bitmap.codes.len()], &bitmap.codes),
            tensor(part(MASK_SUFFIX), Dtype::U8, vec![rows, cols.div_ceil(8)], &bitmap.mask),
            scales(&bitmap.scale),
        ],
        Weight::LowRank(LowRank { rank, down, up }) => {
            let mut out = matrix_tensors(&part(DOWN_SUFFIX), down, *rank, cols);
            out.extend(matrix_tensors(&part(UP_SUFFIX), up, rows, *rank));
            out
        }
    }
}

/// The tensors of a linear layer `[bias.len(), n_in]`: f32 and INT8 under the names that Hugging Face gives the modules
/// it stacks, other forms of stacked modules whole under one name; biases always by module.
///
/// # Panics
/// If the weight's parts do not fit the shape.
#[must_use]
pub fn linear_tensors(
    family: Family,
    slot: LinearSlot,
    weight: &Weight<'_>,
    bias: &[f32],
    n_in: usize,
) -> Vec<TensorOut<'static>> {
    let modules = hf_names::linear_modules(family, slot);
    let n_out = bias.len();
    let rows = n_out / modules.len();
    let mut out = Vec::new();
    for (index, module) in modules.iter().enumerate() {
        let range = index * rows..(index + 1) * rows;
        out.push(tensor(format!("{module}.bias"), Dtype::F32, vec![rows], &bias[range.clone()]));
        let elements = range.start * n_in..range.end * n_in;
        let part = match weight {
            Weight::F32(values) => Weight::F32(Cow::Borrowed(&values[elements])),
            Weight::Int8 { codes, scale } => {
                Weight::Int8 { codes: Cow::Borrowed(&codes[elements]), scale: Cow::Borrowed(&scale[range]) }
            }
            _ => continue,
        };
        out.extend(matrix_tensors(&format!("{module}.weight"), &part, rows, n_in));
    }
    if !matches!(weight, Weight::F32(_) | Weight::Int8 { .. }) {
        out.extend(matrix_tensors(&hf_names::whole_weight(family, slot), weight, n_out, n_in));
    }
    out
}
