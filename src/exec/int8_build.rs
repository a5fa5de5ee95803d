//! From a checkpoint to the handles of the INT8 player: linear layers packed, embeddings left where they are mapped.

use std::borrow::Cow;
use std::sync::Arc;

use super::int8::{Int8, WorkspaceLimits};
use super::int8_tables::{Found, Int8Tables, Table};
use super::timed::{Timed, TimedBuild};
use crate::checkpoint::Checkpoint;
use crate::kernels::KernelSet;
use crate::kernels::layout::RowScale;
use crate::kernels::threads::Cores;
use crate::model::{Architecture, Build, Encoder, Head, HeadSlot, LinearSlot, Model, ModelError, NormSlot, ValueRange};
use crate::quant::{PackedLayer, Weight};

/// A linear layer.
#[derive(Debug)]
pub struct Int8Linear {
    pub(super) layer: PackedLayer,
    /// The range of the input that its result becomes, after attention or an activation, where it is fixed.
    pub(super) out_range: Option<RowScale>,
}

/// A linear layer of the classification head, in f32: it is played once per sequence, so that its cost is nothing
/// beside the encoder's and its precision is free.
#[derive(Debug)]
pub struct F32Linear {
    /// `[n_out, n_in]`.
    pub(super) weight: Vec<f32>,
    /// `[n_out]`.
    pub(super) bias: Vec<f32>,
    pub(super) n_in: usize,
}

/// A linear layer in the form that it is played in.
#[derive(Debug)]
pub enum Int8Weights {
    /// Of the encoder.
    Packed(Box<Int8Linear>),
    /// Of the classification head.
    Plain(F32Linear),
}

impl From<Int8Linear> for Int8Weights {
    fn from(linear: Int8Linear) -> Self {
        Self::Packed(Box::new(linear))
    }
}

/// A LayerNorm.
#[derive(Debug)]
pub struct Int8Norm {
    pub(super) gain: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) eps: f32,
    /// The range of its result as an input, where it is fixed.
    pub(super) range: Option<RowScale>,
}

/// `low + scale · code`, code in 0..=255.
fn row_scale(range: ValueRange) -> RowScale {
    RowScale { scale: (range.high - range.low) / 255.0, low: range.low }
}

impl Int8Linear {
    /// A layer of the given weights, `[bias.len(), n_in]`, for `kernels`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    #[must_use]
    pub fn new(kernels: &KernelSet, weight: &Weight<'_>, bias: &[f32], n_in: usize) -> Self {
        Self { layer: PackedLayer::new(weight, bias, n_in).fit(kernels), out_range: None }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layer.bytes()
    }
}

/// An INT8 encoder that any number of workers play.
#[derive(Debug, Clone)]
pub struct Int8Model {
    kernels: KernelSet,
    architecture: Arc<Architecture>,
    encoder: Arc<Encoder<Int8>>,
    head: Option<Arc<Head<Int8>>>,
    bytes: usize,
    /// Largest width between two factors.
    rank: usize,
}

/// Tokens of a group of sequences: their activations and a layer's weights share a core's L2 cache of 2 MB.
pub const GROUP_TOKENS: usize = 512;

impl Int8Model {
    /// Packs the weights of `checkpoint` for `kernels`, quantizing those that are not.
    ///
    /// # Errors
    /// Naming the tensor that is missing or damaged.
    pub fn load(checkpoint: &Arc<Checkpoint>, kernels: KernelSet) -> Result<Self, ModelError> {
        let architecture = Arc::new(checkpoint.architecture().clone());
        let mut build = Int8Build::new(Arc::clone(checkpoint), kernels);
        let encoder = Arc::new(Encoder::build(&architecture, &mut build)?);
        let head = Head::build(&architecture, &mut build)?.map(Arc::new);
        Ok(Self { kernels, architecture, encoder, head, bytes: build.bytes(), rank: build.rank })
    }

    /// A model without a head, of an encoder that is built for `kernels`.
    pub(super) fn of_encoder(
        kernels: KernelSet,
        architecture: Arc<Architecture>,
        encoder: Arc<Encoder<Int8>>,
        bytes: usize,
    ) -> Self {
        Self { kernels, architecture, encoder, head: None, bytes, rank: 0 }
    }

    /// Bytes of the weights that the workers share, without what stays in the mapping.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The model for a worker, with its own workspace; for more workers on the same threads, make [`Model::another`] of it.
    #[must_use]
    pub fn worker(&self, cores: Arc<Cores>, group_tokens: usize) -> Model<Int8> {
        let limits = WorkspaceLimits { rank: self.rank, ..WorkspaceLimits::new(&self.architecture, group_tokens) };
        let player = Int8::new(self.kernels, cores, &limits, self.bytes);
        let (architecture, encoder) = (Arc::clone(&self.architecture), Arc::clone(&self.encoder));
        Model::new(architecture, encoder, player, group_tokens, Int8::memory).with_head(self.head.clone())
    }
}

/// The model of `checkpoint` with a player that tells where its time goes.
///
/// # Errors
/// Naming the tensor that is missing or damaged.
pub fn timed_model(
    checkpoint: &Arc<Checkpoint>,
    kernels: KernelSet,
    cores: Arc<Cores>,
    group_tokens: usize,
) -> Result<Model<Timed<Int8>>, ModelError> {
    let architecture = Arc::new(checkpoint.architecture().clone());
    let mut build = TimedBuild(Int8Build::new(Arc::clone(checkpoint), kernels));
    let encoder = Arc::new(Encoder::build(&architecture, &mut build)?);
    let limits = WorkspaceLimits { rank: build.0.rank, ..WorkspaceLimits::new(&architecture, group_tokens) };
    let player = Timed::new(Int8::new(kernels, cores, &limits, build.0.bytes()));
    Ok(Model::new(architecture, encoder, player, group_tokens, |player| player.inner().memory()))
}

/// Takes weights from a checkpoint; f32 weights are quantized on the way.
#[derive(Debug)]
pub struct Int8Build {
    checkpoint: Arc<Checkpoint>,
    kernels: KernelSet,
    bytes: usize,
    rank: usize,
}

impl Int8Build {
    /// Builds from `checkpoint` for `kernels`.
    #[must_use]
    pub fn new(checkpoint: Arc<Checkpoint>, kernels: KernelSet) -> Self {
        Self { checkpoint, kernels, bytes: 0, rank: 0 }
    }

    /// Bytes of what was built so far, without what stays in the mapping.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn table(&mut self, find: impl for<'a> Fn(&'a Checkpoint) -> Found<'a>) -> Result<Table, ModelError> {
        let width = self.checkpoint.architecture().d_model;
        let table = Table::load(&self.checkpoint, width, find).map_err(ModelError::player)?;
        self.bytes += table.bytes();
        self.rank = self.rank.max(table.rank());
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
        let ranges = |layer| self.checkpoint.architecture().ranges_of(layer);
        // What a norm's result is fed to next.
        let range = match slot {
            NormSlot::Embedding => ranges(0).attention_in,
            NormSlot::Attention(layer) => ranges(layer).ffn_in,
            NormSlot::Ffn(layer) => ranges(layer + 1).attention_in,
        };
        Ok(Int8Norm { gain: norm.gain, bias: norm.bias, eps: norm.eps, range: range.map(row_scale) })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<Int8Weights, ModelError> {
        let linear = self.checkpoint.linear(slot).map_err(ModelError::player)?;
        let mut linear = Int8Linear::new(&self.kernels, &linear.weight, &linear.bias, linear.n_in);
        let ranges = self.checkpoint.architecture().ranges_of(slot.layer());
        linear.out_range = match slot {
            LinearSlot::Qkv(_) => ranges.context,
            LinearSlot::FfnUp(_) => ranges.hidden,
            LinearSlot::AttentionOut(_) | LinearSlot::FfnDown(_) => None,
        }
        .map(row_scale);
        self.bytes += linear.bytes();
        self.rank = self.rank.max(linear.layer.rank());
        Ok(linear.into())
    }

    fn head(&mut self, slot: HeadSlot) -> Result<Int8Weights, ModelError> {
        let linear = self.checkpoint.head(slot).map_err(ModelError::player)?;
        let (weight, n_in) = (linear.weight.to_f32(linear.n_in), linear.n_in);
        self.bytes += size_of_val(&weight[..]) + size_of_val(&linear.bias[..]);
        Ok(Int8Weights::Plain(F32Linear { weight, bias: linear.bias, n_in }))
    }
}
