//! The tiny model with its matrices stored in any of the forms.

use std::collections::BTreeMap;

use niwaki::checkpoint::{Checkpoint, Dtype, TensorOut, hf_names, linear_tensors, matrix_tensors, write_safetensors};
use niwaki::model::{LinearSlot, NormSlot};
use niwaki::quant::{
    Bitmap, BlockSparse, Codebook4, Int8Grouped, LowRank, Weight, quantize_rows_affine, quantize_rows_symmetric,
};

use super::tiny::{TinyModel, tiny_dir};

/// How to store a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Int8,
    Affine,
    /// Scales per group of 8 columns.
    Groups,
    /// Scales and offsets per group of 8 columns.
    AffineGroups,
    /// One scale per row.
    Codebook,
    /// Scales and zeros per group of 8 columns.
    CodebookGroups,
    /// A table that reaches ±127.
    CodebookWide,
    LowRank,
    LowRankCodebook,
    Blocks64,
    Blocks32,
    Bitmap,
}

/// All of them.
pub(crate) const KINDS: [Kind; 12] = [
    Kind::Int8,
    Kind::Affine,
    Kind::Groups,
    Kind::AffineGroups,
    Kind::Codebook,
    Kind::CodebookGroups,
    Kind::CodebookWide,
    Kind::LowRank,
    Kind::LowRankCodebook,
    Kind::Blocks64,
    Kind::Blocks32,
    Kind::Bitmap,
];

/// −8 to 7.
pub(crate) const LINEAR: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];
/// NormalFloat4 (Dettmers et al. 2023, appendix E), times 127.
pub(crate) const NF4: [i8; 16] = [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127];

fn int8(values: &[f32], cols: usize) -> Weight<'static> {
    let (codes, scale) = quantize_rows_symmetric(values, cols);
    Weight::Int8 { codes: codes.into(), scale: scale.into() }
}

/// Groups of 8 columns, each with a scale, and with an offset if asked for; a row of one group has the form without groups.
fn groups(values: &[f32], cols: usize, affine: bool) -> Weight<'static> {
    let n_groups = Codebook4::n_groups(cols, 8);
    let (mut codes, mut scales, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    for group in values.chunks_exact(cols).flat_map(|row| row.chunks(Codebook4::group_len(cols, n_groups))) {
        let shift = if affine { 0.05 } else { 0.0 };
        let shifted: Vec<f32> = group.iter().map(|value| value + shift).collect();
        let (part, scale, offset) = match affine {
            true => quantize_rows_affine(&shifted, group.len()),
            false => {
                let (codes, scale) = quantize_rows_symmetric(&shifted, group.len());
                (codes, scale, vec![0.0])
            }
        };
        codes.extend(part);
        scales.extend(scale);
        offsets.extend(offset);
    }
    let (codes, scale) = (codes.into(), scales.into());
    match (n_groups, affine) {
        (1, false) => Weight::Int8 { codes, scale },
        (1, true) => Weight::Int8Affine { codes, scale, offset: offsets.into() },
        _ => Weight::Int8Grouped(Int8Grouped { codes, scale, offset: affine.then(|| offsets.into()), n_groups }),
    }
}

/// Scales by the largest magnitude of each group, and codes by the nearest entry.
fn codebook(values: &[f32], cols: usize, table: [i8; 16], n_groups: usize, zero: Option<i8>) -> Weight<'static> {
    let group = Codebook4::group_len(cols, n_groups);
    let reach = table.iter().map(|&entry| f32::from(entry) - f32::from(zero.unwrap_or(0))).fold(0.0, f32::max);
    let scale: Vec<f32> = values
        .chunks_exact(cols)
        .flat_map(|row| row.chunks(group).map(|group| group.iter().fold(1e-3f32, |max, x| max.max(x.abs())) / reach))
        .collect();
    let zero = zero.map(|zero| vec![zero; scale.len()]);
    Weight::Codebook4(Codebook4::nearest(values, cols, table, scale, zero, n_groups))
}

/// `values: [rows, cols]` stored as `kind`. A low rank keeps leading rows and columns: what it stands for is another
/// matrix, which is all that tests of storing and playing need.
pub(crate) fn store(kind: Kind, values: &[f32], cols: usize) -> Weight<'static> {
    let rows = values.len() / cols;
    let rank = (rows.min(cols) / 2).max(1);
    let up: Vec<f32> = values.chunks_exact(cols).flat_map(|row| row[..rank].to_vec()).collect();
    let down = &values[values.len() - rank * cols..];
    match kind {
        Kind::Int8 => int8(values, cols),
        Kind::Affine => {
            let shifted: Vec<f32> = values.iter().map(|value| value + 0.05).collect();
            let (codes, scale, offset) = quantize_rows_affine(&shifted, cols);
            Weight::Int8Affine { codes: codes.into(), scale: scale.into(), offset: offset.into() }
        }
        Kind::Groups | Kind::AffineGroups => groups(values, cols, kind == Kind::AffineGroups),
        Kind::Codebook => codebook(values, cols, LINEAR, 1, None),
        Kind::CodebookGroups => codebook(values, cols, LINEAR, Codebook4::n_groups(cols, 8), Some(-1)),
        Kind::CodebookWide => codebook(values, cols, NF4, 1, None),
        Kind::LowRank => {
            let (down, up) = (Box::new(int8(down, cols)), Box::new(int8(&up, rank)));
            Weight::LowRank(LowRank { rank, down, up })
        }
        Kind::LowRankCodebook => {
            let down = Box::new(codebook(down, cols, LINEAR, 1, None));
            let up = Box::new(codebook(&up, rank, NF4, Codebook4::n_groups(rank, 8), None));
            Weight::LowRank(LowRank { rank, down, up })
        }
        Kind::Blocks64 | Kind::Blocks32 => {
            let width = if kind == Kind::Blocks64 { 64 } else { 32 };
            let keep: Vec<bool> = (0..rows.div_ceil(width) * cols.div_ceil(4)).map(|i| i % 3 != 1).collect();
            Weight::BlockSparse(BlockSparse::encode(values, cols, width, Some(&keep)))
        }
        Kind::Bitmap => {
            let thinned: Vec<f32> =
                values.iter().enumerate().map(|(i, &value)| if i % 4 == 0 { 0.0 } else { value }).collect();
            Weight::Bitmap(Bitmap::encode(&thinned, cols))
        }
    }
}

/// Writes the model with linear layers stored as `linear` says and embedding tables as `table` says.
pub(crate) fn stored_dir(
    model: &TinyModel,
    linear: impl Fn(LinearSlot) -> Kind,
    table: impl Fn(&str) -> Kind,
) -> tempfile::TempDir {
    let dir = tiny_dir(model);
    let tensors = {
        let checkpoint = Checkpoint::open(dir.path()).expect("the plain model opens");
        tensors(&checkpoint, linear, table)
    };
    write_safetensors(&dir.path().join("model.safetensors"), tensors, &BTreeMap::new()).expect("weights are written");
    dir
}

fn tensors(
    checkpoint: &Checkpoint,
    linear: impl Fn(LinearSlot) -> Kind,
    table: impl Fn(&str) -> Kind,
) -> Vec<TensorOut<'static>> {
    let spec = checkpoint.architecture();
    let (family, d) = (spec.family, spec.d_model);
    let mut out = Vec::new();
    let tables = checkpoint.tables().expect("tables");
    let mut add_table = |name: &str, weight: &Weight<'_>| {
        let values = weight.to_f32(d);
        let rows = values.len() / d;
        out.extend(matrix_tensors(name, &store(table(name), &values, d), rows, d));
    };
    add_table(hf_names::WORD_EMBEDDING, &tables.word);
    add_table(hf_names::POSITION_EMBEDDING, &tables.position);
    add_table(hf_names::TOKEN_TYPE_EMBEDDING, tables.token_type.as_ref().expect("BERT has token types"));
    let mut norms = vec![NormSlot::Embedding];
    for layer in 0..spec.layers.len() {
        norms.extend([NormSlot::Attention(layer), NormSlot::Ffn(layer)]);
        for slot in [
            LinearSlot::Qkv(layer),
            LinearSlot::AttentionOut(layer),
            LinearSlot::FfnUp(layer),
            LinearSlot::FfnDown(layer),
        ] {
            let weights = checkpoint.linear(slot).expect("a linear layer");
            let weight = store(linear(slot), &weights.weight.to_f32(weights.n_in), weights.n_in);
            out.extend(linear_tensors(family, slot, &weight, &weights.bias, weights.n_in));
        }
    }
    for slot in norms {
        let norm = checkpoint.norm(slot).expect("a norm");
        let module = hf_names::norm_module(family, slot);
        for (part, values) in [("weight", &norm.gain), ("bias", &norm.bias)] {
            out.push(TensorOut {
                name: format!("{module}.{part}"),
                dtype: Dtype::F32,
                shape: vec![d],
                data: bytemuck::cast_slice(values).to_vec().into(),
            });
        }
    }
    out
}
