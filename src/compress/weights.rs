//! A model under work: all weights in memory as f32, in shapes that passes may change.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::CompressError;
use crate::checkpoint::{CheckpointError, LinearWeights, NormWeights, TableWeights};
use crate::exec::candle::WeightSource;
use crate::model::{Architecture, LinearSlot, NormSlot};
use crate::quant::Weight;

/// A linear layer `y = x Wᵀ + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseLinear {
    /// Rows of the matrix.
    pub n_out: usize,
    /// Columns of the matrix.
    pub n_in: usize,
    /// `[n_out, n_in]`, row-major.
    pub weight: Vec<f32>,
    /// `[n_out]`.
    pub bias: Vec<f32>,
}

#[derive(Debug)]
struct Tables {
    word: Vec<f32>,
    position: Vec<f32>,
    token_type: Option<Vec<f32>>,
}

/// The model under work. Clones share the embedding tables.
#[derive(Debug, Clone)]
pub struct Weights {
    architecture: Architecture,
    linears: BTreeMap<LinearSlot, DenseLinear>,
    norms: BTreeMap<NormSlot, NormWeights>,
    tables: Arc<Tables>,
}

/// Every linear layer of a layer.
pub(super) fn slots(layer: usize) -> [LinearSlot; 4] {
    [LinearSlot::Qkv(layer), LinearSlot::AttentionOut(layer), LinearSlot::FfnUp(layer), LinearSlot::FfnDown(layer)]
}

impl Weights {
    /// Reads a whole model.
    ///
    /// # Errors
    /// If a weight cannot be read.
    pub fn load(source: &dyn WeightSource) -> Result<Self, CompressError> {
        let architecture = source.architecture().clone();
        let mut linears = BTreeMap::new();
        let mut norms = BTreeMap::new();
        norms.insert(NormSlot::Embedding, source.norm(NormSlot::Embedding)?);
        for layer in 0..architecture.layers.len() {
            for slot in slots(layer) {
                let LinearWeights { n_out, n_in, weight, bias } = source.linear(slot)?;
                linears.insert(slot, DenseLinear { n_out, n_in, weight: weight.to_f32(n_in), bias });
            }
            for slot in [NormSlot::Attention(layer), NormSlot::Ffn(layer)] {
                norms.insert(slot, source.norm(slot)?);
            }
        }
        let tables = source.tables()?;
        let width = architecture.d_model;
        let tables = Arc::new(Tables {
            word: tables.word.to_f32(width),
            position: tables.position.to_f32(width),
            token_type: tables.token_type.map(|table| table.to_f32(width)),
        });
        Ok(Self { architecture, linears, norms, tables })
    }

    /// The model's shape.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// A linear layer.
    #[must_use]
    pub fn dense(&self, slot: LinearSlot) -> &DenseLinear {
        &self.linears[&slot]
    }

    /// Replaces the numbers of a linear layer.
    ///
    /// # Panics
    /// If the shape changes: that is what [`Weights::keep_heads`] and [`Weights::keep_neurons`] are for.
    pub fn replace(&mut self, slot: LinearSlot, weight: Vec<f32>, bias: Vec<f32>) {
        let linear = self.linears.get_mut(&slot).expect("every slot of the architecture was loaded");
        assert!(weight.len() == linear.weight.len() && bias.len() == linear.bias.len(), "{slot} changes its shape");
        linear.weight = weight;
        linear.bias = bias;
    }

    /// Keeps only `heads` (indices in rising order) of a layer.
    ///
    /// # Errors
    /// If none is kept.
    pub fn keep_heads(&mut self, layer: usize, heads: &[usize]) -> Result<(), CompressError> {
        let config = self.architecture.layers[layer];
        let context: Vec<usize> =
            heads.iter().flat_map(|head| head * config.d_head..(head + 1) * config.d_head).collect();
        let qkv: Vec<usize> =
            (0..3).flat_map(|part| context.iter().map(move |row| part * config.d_context() + row)).collect();
        self.edit(layer, |spec| spec.n_heads = heads.len())?;
        self.keep_rows(LinearSlot::Qkv(layer), &qkv);
        self.keep_columns(LinearSlot::AttentionOut(layer), &context);
        Ok(())
    }

    /// Keeps only `neurons` (indices in rising order) of a layer's FFN.
    ///
    /// # Errors
    /// If none is kept.
    pub fn keep_neurons(&mut self, layer: usize, neurons: &[usize]) -> Result<(), CompressError> {
        self.edit(layer, |spec| spec.d_ffn = neurons.len())?;
        self.keep_rows(LinearSlot::FfnUp(layer), neurons);
        self.keep_columns(LinearSlot::FfnDown(layer), neurons);
        Ok(())
    }

    fn edit(&mut self, layer: usize, edit: impl FnOnce(&mut crate::model::LayerConfig)) -> Result<(), CompressError> {
        let mut spec = self.architecture.spec();
        edit(&mut spec.layers[layer]);
        self.architecture = Architecture::new(spec)?;
        Ok(())
    }

    fn keep_rows(&mut self, slot: LinearSlot, rows: &[usize]) {
        let linear = self.linears.get_mut(&slot).expect("every slot of the architecture was loaded");
        let n_in = linear.n_in;
        linear.weight = rows.iter().flat_map(|row| &linear.weight[row * n_in..(row + 1) * n_in]).copied().collect();
        linear.bias = rows.iter().map(|&row| linear.bias[row]).collect();
        linear.n_out = rows.len();
    }

    fn keep_columns(&mut self, slot: LinearSlot, columns: &[usize]) {
        let linear = self.linears.get_mut(&slot).expect("every slot of the architecture was loaded");
        linear.weight =
            linear.weight.chunks_exact(linear.n_in).flat_map(|row| columns.iter().map(|&col| row[col])).collect();
        linear.n_in = columns.len();
    }
}

impl WeightSource for Weights {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn linear(&self, slot: LinearSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        let linear = self.dense(slot);
        let weight = Weight::F32(Cow::Borrowed(&linear.weight));
        Ok(LinearWeights { n_out: linear.n_out, n_in: linear.n_in, weight, bias: linear.bias.clone() })
    }

    fn norm(&self, slot: NormSlot) -> Result<NormWeights, CheckpointError> {
        Ok(self.norms[&slot].clone())
    }

    fn tables(&self) -> Result<TableWeights<'_>, CheckpointError> {
        let borrow = |values| Weight::F32(Cow::Borrowed(values));
        Ok(TableWeights {
            word: borrow(&self.tables.word[..]),
            position: borrow(&self.tables.position[..]),
            token_type: self.tables.token_type.as_deref().map(borrow),
        })
    }
}
