//! From a checkpoint to the handles of the INT8 player: linear layers packed, embeddings left where they are mapped.

use std::borrow::Cow;
use std::sync::Arc;

use super::int8::{Int8, WorkspaceLimits};
use super::workspace::MappedCodes;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::kernels::KernelSet;
use crate::kernels::layout::PackedLinear;
use crate::kernels::threads::Cores;
use crate::model::{Architecture, Build, Encoder, LinearSlot, Model, ModelError, NormSlot, Positions, Ragged};
use crate::quant::{Weight, pack_linear, quantize_rows_symmetric};

/// A linear layer.
#[derive(Debug)]
pub struct Int8Linear {
    pub(super) packed: PackedLinear,
}

/// A LayerNorm.
#[derive(Debug)]
pub struct Int8Norm {
    pub(super) gain: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) eps: f32,
}

/// Rows of s8 with a scale each.
#[derive(Debug)]
pub(super) struct CodeTable {
    codes: TableCodes,
    scale: Vec<f32>,
    width: usize,
}

#[derive(Debug)]
enum TableCodes {
    Owned(Vec<i8>),
    Mapped(MappedCodes),
}

/// The embedding tables.
#[derive(Debug)]
pub struct Int8Tables {
    pub(super) word: CodeTable,
    pub(super) position: CodeTable,
    pub(super) token_type: Option<CodeTable>,
    pub(super) positions: Positions,
}

impl CodeTable {
    #[cfg(test)]
    pub(super) fn new(weight: &Weight<'_>, width: usize) -> Self {
        let (codes, scale) = quantize_rows_symmetric(&weight.to_f32(width), width);
        Self { codes: TableCodes::Owned(codes), scale, width }
    }

    /// Row `index` and its scale.
    pub(super) fn row(&self, index: usize) -> (&[i8], f32) {
        let codes: &[i8] = match &self.codes {
            TableCodes::Owned(codes) => codes,
            TableCodes::Mapped(codes) => codes,
        };
        (&codes[index * self.width..(index + 1) * self.width], self.scale[index])
    }

    pub(super) fn n_rows(&self) -> usize {
        self.scale.len()
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    fn bytes(&self) -> usize {
        let codes = match &self.codes {
            TableCodes::Owned(codes) => codes.len(),
            // What of a mapping is resident is the system's choice, and counted there.
            TableCodes::Mapped(_) => 0,
        };
        codes + size_of_val(self.scale.as_slice())
    }
}

impl Int8Tables {
    /// Refuses ids, types and positions beyond the tables.
    pub(super) fn check(&self, batch: &Ragged<'_>) -> Result<(), ModelError> {
        let vocab_size = self.word.n_rows();
        if let Some(&id) = batch.ids().iter().find(|&&id| id as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { id, vocab_size });
        }
        let n_token_types = self.token_type.as_ref().map_or(1, CodeTable::n_rows);
        if let Some(&token_type) = batch.token_types().iter().find(|&&t| usize::from(t) >= n_token_types) {
            return Err(ModelError::TokenTypeOutOfRange { token_type, n_token_types });
        }
        if !self.positions.tiled && batch.max_len() > self.positions.usable() {
            return Err(ModelError::SequenceTooLong { got: batch.max_len(), limit: self.positions.usable() });
        }
        Ok(())
    }

    /// `word[id] + position[p] + type[t]` of token `token` at `position` in its sequence.
    pub(super) fn sum(&self, kernels: &KernelSet, batch: &Ragged<'_>, token: usize, position: usize, row: &mut [f32]) {
        row.fill(0.0);
        let (codes, scale) = self.word.row(batch.ids()[token] as usize);
        kernels.add_codes(row, codes, scale);
        let (codes, scale) = self.position.row(self.positions.row(position));
        kernels.add_codes(row, codes, scale);
        if let Some(table) = &self.token_type {
            let (codes, scale) = table.row(usize::from(batch.token_types()[token]));
            kernels.add_codes(row, codes, scale);
        }
    }
}

impl Int8Linear {
    /// A layer of the given weights, `[bias.len(), n_in]`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    #[must_use]
    pub fn new(weight: &Weight<'_>, bias: &[f32], n_in: usize) -> Self {
        Self { packed: pack_linear(weight, bias, n_in) }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.packed.bytes()
    }
}

/// An INT8 encoder that any number of workers play.
#[derive(Debug, Clone)]
pub struct Int8Model {
    architecture: Arc<Architecture>,
    encoder: Arc<Encoder<Int8>>,
    bytes: usize,
}

/// Tokens of a group of sequences: their activations and a layer's weights share a core's L2 cache of 2 MB.
pub const GROUP_TOKENS: usize = 512;

impl Int8Model {
    /// Packs the weights of `checkpoint`, quantizing those that are not.
    ///
    /// # Errors
    /// Naming the tensor that is missing or damaged.
    pub fn load(checkpoint: &Arc<Checkpoint>) -> Result<Self, ModelError> {
        let architecture = Arc::new(checkpoint.architecture().clone());
        let mut build = Int8Build::new(Arc::clone(checkpoint));
        let encoder = Arc::new(Encoder::build(&architecture, &mut build)?);
        Ok(Self { architecture, encoder, bytes: build.bytes() })
    }

    #[cfg(test)]
    pub(super) fn of_encoder(architecture: Arc<Architecture>, encoder: Arc<Encoder<Int8>>, bytes: usize) -> Self {
        Self { architecture, encoder, bytes }
    }

    /// Bytes of the weights that the workers share, without what stays in the mapping.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The model for one worker, with its own workspace.
    #[must_use]
    pub fn worker(&self, kernels: KernelSet, cores: Arc<Cores>, group_tokens: usize) -> Model<Int8> {
        let limits = WorkspaceLimits::new(&self.architecture, group_tokens);
        let player = Int8::new(kernels, cores, &limits, self.bytes);
        Model::new(Arc::clone(&self.architecture), Arc::clone(&self.encoder), player, group_tokens, Int8::memory)
    }
}

/// Takes weights from a checkpoint; f32 weights are quantized on the way.
#[derive(Debug)]
pub struct Int8Build {
    checkpoint: Arc<Checkpoint>,
    bytes: usize,
}

impl Int8Build {
    /// Builds from `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: Arc<Checkpoint>) -> Self {
        Self { checkpoint, bytes: 0 }
    }

    /// Bytes of what was built so far, without what stays in the mapping.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn table(
        &mut self,
        find: impl for<'a> Fn(&'a Checkpoint) -> Result<Weight<'a>, CheckpointError>,
    ) -> Result<CodeTable, ModelError> {
        let width = self.checkpoint.architecture().d_model;
        let (codes, scale) = match find(&self.checkpoint).map_err(ModelError::player)? {
            Weight::F32(values) => {
                let (codes, scale) = quantize_rows_symmetric(&values, width);
                (TableCodes::Owned(codes), scale)
            }
            Weight::Int8 { codes: Cow::Owned(codes), scale } => (TableCodes::Owned(codes), scale.into_owned()),
            Weight::Int8 { codes: Cow::Borrowed(_), scale } => {
                let mapped = MappedCodes::new(&self.checkpoint, |checkpoint| match find(checkpoint)? {
                    Weight::Int8 { codes: Cow::Borrowed(codes), .. } => Ok::<_, CheckpointError>(codes),
                    _ => Ok(&[]),
                })
                .map_err(ModelError::player)?;
                assert!(mapped.len() == scale.len() * width, "a table is found twice in the same form");
                (TableCodes::Mapped(mapped), scale.into_owned())
            }
        };
        let table = CodeTable { codes, scale, width };
        self.bytes += table.bytes();
        Ok(table)
    }
}

impl Build<Int8> for Int8Build {
    fn tables(&mut self) -> Result<Int8Tables, ModelError> {
        let word = self.table(|checkpoint| Ok(checkpoint.tables()?.word))?;
        let position = self.table(|checkpoint| Ok(checkpoint.tables()?.position))?;
        let token_type = match self.checkpoint.architecture().n_token_types {
            0 => None,
            rows => Some(self.table(|checkpoint| {
                let empty = Weight::F32(Cow::Owned(vec![0.0; rows * checkpoint.architecture().d_model]));
                Ok(checkpoint.tables()?.token_type.unwrap_or(empty))
            })?),
        };
        Ok(Int8Tables { word, position, token_type, positions: self.checkpoint.architecture().positions })
    }

    fn norm(&mut self, slot: NormSlot) -> Result<Int8Norm, ModelError> {
        let norm = self.checkpoint.norm(slot).map_err(ModelError::player)?;
        self.bytes += 2 * size_of_val(norm.gain.as_slice());
        Ok(Int8Norm { gain: norm.gain, bias: norm.bias, eps: norm.eps })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<Int8Linear, ModelError> {
        let linear = self.checkpoint.linear(slot).map_err(ModelError::player)?;
        let packed = Int8Linear::new(&linear.weight, &linear.bias, linear.n_in);
        self.bytes += packed.bytes();
        Ok(packed)
    }
}
