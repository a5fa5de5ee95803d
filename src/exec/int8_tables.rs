//! Embedding tables of the INT8 player: rows are decoded where they are looked up, and what a table stores stays in the
//! mapping of its file.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use super::workspace::{Aligned, Mapped};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::kernels::forms::PackedMatrix;
use crate::kernels::layout::{CodeRows, PANEL, RowScale, block_index, code_stride};
use crate::kernels::{Block, CodeRowsMut, KernelSet};
use crate::model::{ModelError, Positions, Ragged};
use crate::quant::{BlockSparse, Codebook4, Int8Grouped, LowRank, Weight, pack_matrix, quantize_rows_symmetric};

/// What looking a table up in a checkpoint gives.
pub(super) type Found<'a> = Result<Weight<'a>, CheckpointError>;

/// Numbers in memory or in a mapping.
#[derive(Debug)]
enum Held<T: 'static> {
    Owned(Vec<T>),
    Mapped(Mapped<T>),
}

impl<T> Deref for Held<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(numbers) => numbers,
            Self::Mapped(numbers) => numbers,
        }
    }
}

impl<T> Held<T> {
    fn bytes(&self) -> usize {
        match self {
            Self::Owned(numbers) => size_of_val(numbers.as_slice()),
            // What of a mapping is resident is the system's choice, and counted there.
            Self::Mapped(_) => 0,
        }
    }
}

/// Rows that can be added to others one by one.
#[derive(Debug)]
enum Rows {
    /// s8 with a scale per row or group of a row, and as many offsets if there are any.
    Int8 { codes: Held<i8>, scale: Vec<f32>, offset: Vec<f32>, n_groups: usize },
    /// Four bits per element.
    Codebook { indices: Held<u8>, table: [i8; 16], scale: Vec<f32>, zero: Vec<i8>, n_groups: usize },
}

/// One table.
#[derive(Debug)]
pub(super) struct Table {
    rows: Rows,
    n_rows: usize,
    /// Of `rows`.
    width: usize,
    /// What a row is still to be multiplied with.
    factor: Option<Factor>,
}

/// The small factor of a table of low rank: `row · down`, with `down`'s scales multiplied into the row before it is
/// quantized.
#[derive(Debug)]
struct Factor {
    /// `[rank]`.
    scale: Vec<f32>,
    /// `[d_model, rank]`.
    packed: PackedMatrix,
}

/// The embedding tables.
#[derive(Debug)]
pub struct Int8Tables {
    pub(super) word: Table,
    pub(super) position: Table,
    pub(super) token_type: Option<Table>,
    pub(super) positions: Positions,
}

impl Int8Tables {
    /// Tables of f32 rows in memory, `[n, width]` each.
    pub(super) fn of_rows(
        width: usize,
        word: &[f32],
        position: &[f32],
        token_type: Option<&[f32]>,
        positions: Positions,
    ) -> Self {
        let table = |rows: &[f32]| {
            let weight = Weight::F32(Cow::Borrowed(rows));
            Table { rows: Rows::of(&weight, width), n_rows: rows.len() / width, width, factor: None }
        };
        Self { word: table(word), position: table(position), token_type: token_type.map(table), positions }
    }
}

/// Numbers of a table from which on its rows are asked for ahead, and by how many rows.
const NEAR_BY: usize = 1 << 19;
const AHEAD: usize = 8;

/// Room for the rows of tables of low rank, kept by each thread.
#[derive(Debug, Default)]
pub(super) struct Gather {
    row: Aligned,
    block: Aligned,
    codes: Aligned,
    scales: Aligned,
    sums: Aligned,
}

impl Gather {
    /// Room for `n_rows` rows of rank `rank` and width `width`.
    pub(super) fn new(n_rows: usize, rank: usize, width: usize) -> Self {
        let panels = |n: usize| n.next_multiple_of(PANEL);
        Self {
            row: Aligned::with_bytes(rank * 4),
            block: Aligned::with_bytes(n_rows * panels(rank) * 4),
            codes: Aligned::with_bytes(n_rows * code_stride(rank)),
            scales: Aligned::with_bytes(n_rows * size_of::<RowScale>()),
            sums: Aligned::with_bytes(n_rows * panels(width) * 4),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        [&self.row, &self.block, &self.codes, &self.scales, &self.sums].iter().map(|part| part.bytes()).sum()
    }
}

/// Keeps borrowed numbers in their mapping: `part` of what `find` finds again.
fn hold<T: Clone>(
    numbers: Cow<'_, [T]>,
    checkpoint: &Arc<Checkpoint>,
    find: &impl for<'a> Fn(&'a Checkpoint) -> Found<'a>,
    part: for<'a> fn(Weight<'a>) -> &'a [T],
) -> Result<Held<T>, CheckpointError> {
    match numbers {
        Cow::Owned(numbers) => Ok(Held::Owned(numbers)),
        Cow::Borrowed(numbers) => {
            let mapped = Mapped::new(checkpoint, |checkpoint| Ok::<_, CheckpointError>(part(find(checkpoint)?)))?;
            assert!(mapped.len() == numbers.len(), "a table is found twice in the same form");
            Ok(Held::Mapped(mapped))
        }
    }
}

#[allow(clippy::needless_pass_by_value, reason = "what it borrows outlives it")]
fn borrowed_codes(weight: Weight<'_>) -> &[i8] {
    match weight {
        Weight::Int8 { codes: Cow::Borrowed(codes), .. }
        | Weight::Int8Affine { codes: Cow::Borrowed(codes), .. }
        | Weight::Int8Grouped(Int8Grouped { codes: Cow::Borrowed(codes), .. }) => codes,
        _ => &[],
    }
}

#[allow(clippy::needless_pass_by_value, reason = "what it borrows outlives it")]
fn borrowed_indices(weight: Weight<'_>) -> &[u8] {
    match weight {
        Weight::Codebook4(Codebook4 { indices: Cow::Borrowed(indices), .. }) => indices,
        _ => &[],
    }
}

impl Rows {
    /// Takes what `find` finds; f32 is quantized.
    fn load(
        checkpoint: &Arc<Checkpoint>,
        width: usize,
        find: impl for<'a> Fn(&'a Checkpoint) -> Found<'a>,
    ) -> Result<Self, CheckpointError> {
        Ok(match find(checkpoint)? {
            Weight::Int8 { codes, scale } => Self::Int8 {
                codes: hold(codes, checkpoint, &find, borrowed_codes)?,
                scale: scale.into_owned(),
                offset: Vec::new(),
                n_groups: 1,
            },
            Weight::Int8Affine { codes, scale, offset } => Self::Int8 {
                codes: hold(codes, checkpoint, &find, borrowed_codes)?,
                scale: scale.into_owned(),
                offset: offset.into_owned(),
                n_groups: 1,
            },
            Weight::Int8Grouped(Int8Grouped { codes, scale, offset, n_groups }) => Self::Int8 {
                codes: hold(codes, checkpoint, &find, borrowed_codes)?,
                scale: scale.into_owned(),
                offset: offset.map(Cow::into_owned).unwrap_or_default(),
                n_groups,
            },
            Weight::Codebook4(Codebook4 { indices, table, scale, zero, n_groups }) => Self::Codebook {
                indices: hold(indices, checkpoint, &find, borrowed_indices)?,
                table,
                scale: scale.into_owned(),
                zero: zero.map(Cow::into_owned).unwrap_or_default(),
                n_groups,
            },
            other => Self::of(&other, width),
        })
    }

    /// Takes a weight that is not in a mapping.
    fn of(weight: &Weight<'_>, width: usize) -> Self {
        let int8 = |codes, scale: &[f32]| Self::Int8 {
            codes: Held::Owned(codes),
            scale: scale.to_vec(),
            offset: Vec::new(),
            n_groups: 1,
        };
        match weight {
            Weight::Bitmap(bitmap) => int8(bitmap.dense_codes(width), &bitmap.scale),
            Weight::BlockSparse(sparse @ BlockSparse { scale, .. }) => int8(sparse.dense_codes(width), scale),
            other => {
                let (codes, scale) = quantize_rows_symmetric(&other.to_f32(width), width);
                int8(codes, &scale)
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Int8 { codes, scale, offset, .. } => {
                codes.bytes() + size_of_val(scale.as_slice()) + size_of_val(offset.as_slice())
            }
            Self::Codebook { indices, scale, zero, .. } => indices.bytes() + size_of_val(scale.as_slice()) + zero.len(),
        }
    }

    /// Asks for the numbers of a row that will be added.
    fn fetch(&self, kernels: &KernelSet, index: usize, width: usize) {
        match self {
            Self::Int8 { codes, .. } => kernels.fetch(&codes[index * width..(index + 1) * width]),
            Self::Codebook { indices, .. } => {
                let stride = width.div_ceil(2);
                kernels.fetch(&indices[index * stride..(index + 1) * stride]);
            }
        }
    }

    /// `row += rows[index]`.
    fn add(&self, kernels: &KernelSet, index: usize, row: &mut [f32]) {
        let width = row.len();
        match self {
            Self::Int8 { codes, scale, offset, n_groups } => {
                let group = Codebook4::group_len(width, *n_groups);
                let codes = &codes[index * width..(index + 1) * width];
                for (at, (row, codes)) in row.chunks_mut(group).zip(codes.chunks(group)).enumerate() {
                    let at = index * n_groups + at;
                    kernels.add_codes(row, codes, scale[at]);
                    if let Some(offset) = offset.get(at) {
                        row.iter_mut().for_each(|value| *value += offset);
                    }
                }
            }
            Self::Codebook { indices, table, scale, zero, n_groups } => {
                let stride = width.div_ceil(2);
                let indices = &indices[index * stride..(index + 1) * stride];
                let group = Codebook4::group_len(width, *n_groups);
                for (at, (row, indices)) in row.chunks_mut(group).zip(indices.chunks(group.div_ceil(2))).enumerate() {
                    let at = index * n_groups + at;
                    let zero = zero.get(at).copied().unwrap_or(0);
                    let table = table.map(|entry| entry.wrapping_sub(zero));
                    add_nibbles(kernels, row, indices, &table, scale[at]);
                }
            }
        }
    }
}

/// `row[c] += scale · table[index c]`.
fn add_nibbles(kernels: &KernelSet, row: &mut [f32], indices: &[u8], table: &[i8; 16], scale: f32) {
    /// Columns that are decoded at a time; even, so that each time starts with a byte.
    const STEP: usize = 256;
    let mut codes = [0i8; STEP];
    for (row, indices) in row.chunks_mut(STEP).zip(indices.chunks(STEP / 2)) {
        for (codes, &pair) in codes.chunks_exact_mut(2).zip(indices) {
            codes[0] = table[usize::from(pair & 15)];
            codes[1] = table[usize::from(pair >> 4)];
        }
        kernels.add_codes(row, &codes[..row.len()], scale);
    }
}

impl Factor {
    /// `down: [rank, width]` turned around.
    fn new(down: &Weight<'_>, rank: usize, width: usize) -> Self {
        let no_bias = vec![0.0; width];
        let turn = |k: usize, c: usize| k * width + c;
        match down {
            // The codes stay what they are: a row's scale belongs to one input.
            Weight::Int8 { codes, scale } => {
                let turned: Vec<i8> = (0..width).flat_map(|c| (0..rank).map(move |k| codes[turn(k, c)])).collect();
                let ones = Weight::Int8 { codes: turned.into(), scale: vec![1.0; width].into() };
                Self { scale: scale.to_vec(), packed: pack_matrix(&ones, &no_bias, rank) }
            }
            // Other scales run along the outputs; this factor is small, so it is rounded to INT8 anew.
            other => {
                let values = other.to_f32(width);
                let turned: Vec<f32> =
                    (0..width).flat_map(|c| (0..rank).map(|k| values[turn(k, c)]).collect::<Vec<_>>()).collect();
                Self { scale: vec![1.0; rank], packed: pack_matrix(&Weight::F32(turned.into()), &no_bias, rank) }
            }
        }
    }
}

impl Table {
    /// The table that `find` finds, `[_, width]`.
    pub(super) fn load(
        checkpoint: &Arc<Checkpoint>,
        width: usize,
        find: impl for<'a> Fn(&'a Checkpoint) -> Found<'a>,
    ) -> Result<Self, CheckpointError> {
        let weight = find(checkpoint)?;
        let n_rows = weight.n_rows(width);
        let Weight::LowRank(LowRank { rank, down, .. }) = weight else {
            return Ok(Self { rows: Rows::load(checkpoint, width, find)?, n_rows, width, factor: None });
        };
        let rows = Rows::load(checkpoint, rank, |checkpoint| {
            Ok(match find(checkpoint)? {
                Weight::LowRank(LowRank { up, .. }) => *up,
                other => other,
            })
        })?;
        Ok(Self { rows, n_rows, width: rank, factor: Some(Factor::new(&down, rank, width)) })
    }

    /// A table in memory.
    #[cfg(test)]
    pub(super) fn new(weight: &Weight<'_>, width: usize) -> Self {
        Self { rows: Rows::of(weight, width), n_rows: weight.n_rows(width), width, factor: None }
    }

    /// Number of rows.
    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Width of its rows as they are added.
    pub(super) fn width(&self) -> usize {
        self.factor.as_ref().map_or(self.width, |factor| factor.packed.n_out())
    }

    /// Width between the factors; 0 without.
    pub(super) fn rank(&self) -> usize {
        if self.factor.is_some() { self.width } else { 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        let factor = |factor: &Factor| size_of_val(factor.scale.as_slice()) + factor.packed.bytes();
        self.rows.bytes() + self.factor.as_ref().map_or(0, factor)
    }

    /// `rows[i] += table[index(i)]` for the rows of `rows`.
    fn add(&self, kernels: &KernelSet, index: impl Fn(usize) -> usize, rows: &mut [f32], gather: &mut Gather) {
        let width = self.width();
        let Some(Factor { scale, packed }) = &self.factor else {
            let n_rows = rows.len() / width;
            let is_large = self.n_rows * width > NEAR_BY;
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                if is_large && i + AHEAD < n_rows {
                    self.rows.fetch(kernels, index(i + AHEAD), width);
                }
                self.rows.add(kernels, index(i), row);
            }
            return;
        };
        let rank = self.width;
        let n_rows = rows.len() / width;
        let block = gather.block.first::<f32>(rank.next_multiple_of(PANEL) * n_rows);
        let row = gather.row.first::<f32>(rank);
        for i in 0..n_rows {
            row.fill(0.0);
            self.rows.add(kernels, index(i), row);
            for (k, (value, scale)) in row.iter().zip(scale).enumerate() {
                block[block_index(n_rows, i, k)] = value * scale;
            }
        }
        let stride = code_stride(rank);
        let codes = gather.codes.first::<u8>(n_rows * stride);
        let scales = gather.scales.first::<RowScale>(n_rows);
        let mut to = CodeRowsMut { codes, stride, scales, range: None };
        kernels.quantize(Block { data: block, n_rows, n: rank }, 0..n_rows, &mut to);
        let x = CodeRows::new(to.codes, stride, to.scales);
        let sums = gather.sums.first::<f32>(n_rows * PANEL);
        for panel in 0..packed.n_panels() {
            kernels.product_f32(&x, packed, panel..packed.n_panels(), sums);
            let columns = panel * PANEL..width.min((panel + 1) * PANEL);
            for (row, sums) in rows.chunks_exact_mut(width).zip(sums.chunks_exact(PANEL)) {
                row[columns.clone()].iter_mut().zip(sums).for_each(|(value, sum)| *value += sum);
            }
        }
    }
}

impl Int8Tables {
    /// Refuses ids, types and positions beyond the tables.
    pub(super) fn check(&self, batch: &Ragged<'_>) -> Result<(), ModelError> {
        let vocab_size = self.word.n_rows();
        if let Some(&id) = batch.ids().iter().find(|&&id| id as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { id, vocab_size });
        }
        let n_token_types = self.token_type.as_ref().map_or(1, Table::n_rows);
        if let Some(&token_type) = batch.token_types().iter().find(|&&t| usize::from(t) >= n_token_types) {
            return Err(ModelError::TokenTypeOutOfRange { token_type, n_token_types });
        }
        if !self.positions.tiled && batch.max_len() > self.positions.usable() {
            return Err(ModelError::SequenceTooLong { got: batch.max_len(), limit: self.positions.usable() });
        }
        Ok(())
    }

    /// `word[id] + position[p] + type[t]` of the tokens from `first`, as many as `rows` has rows.
    pub(super) fn sum(
        &self,
        kernels: &KernelSet,
        batch: &Ragged<'_>,
        first: usize,
        rows: &mut [f32],
        gather: &mut Gather,
    ) {
        rows.fill(0.0);
        self.word.add(kernels, |i| batch.ids()[first + i] as usize, rows, gather);
        let position = |i: usize| {
            let token = first + i;
            self.positions.row(token - batch.rows(batch.sequence_of(token)).start)
        };
        self.position.add(kernels, position, rows, gather);
        if let Some(table) = &self.token_type {
            table.add(kernels, |i| usize::from(batch.token_types()[first + i]), rows, gather);
        }
    }
}
