//! A model under work: all weights in memory as f32, in shapes that passes may change, and the stored form of those
//! matrices that a pass has fixed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::CompressError;
use super::passes::MatrixReport;
use super::slots::{MatrixSlot, linear_slots};
use crate::checkpoint::{CheckpointError, LinearWeights, NormWeights, TableWeights};
use crate::exec::candle::WeightSource;
use crate::model::{Architecture, HeadSlot, LayerConfig, LayerRanges, LinearSlot, NormSlot};
use crate::quant::{Weight, quantize_rows_symmetric};

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

/// The same place in another layer.
fn moved(slot: LinearSlot, layer: usize) -> LinearSlot {
    match slot {
        LinearSlot::Qkv(_) => LinearSlot::Qkv(layer),
        LinearSlot::AttentionOut(_) => LinearSlot::AttentionOut(layer),
        LinearSlot::FfnUp(_) => LinearSlot::FfnUp(layer),
        LinearSlot::FfnDown(_) => LinearSlot::FfnDown(layer),
    }
}

/// A form's name in reports and manifests.
fn form_name(form: &Weight<'_>) -> &'static str {
    match form {
        Weight::F32(_) => "f32",
        Weight::Int8 { .. } => "int8-per-row",
        Weight::Int8Affine { .. } => "int8-per-row-with-offset",
        Weight::Int8Grouped(grouped) if grouped.offset.is_some() => "int8-per-group-with-offset",
        Weight::Int8Grouped(_) => "int8-per-group",
        Weight::Codebook4(codebook) if codebook.n_groups > 1 => "codebook4-per-group",
        Weight::Codebook4(_) => "codebook4-per-row",
        Weight::LowRank(_) => "low-rank",
        Weight::BlockSparse(_) => "block-sparse-int8",
        Weight::Bitmap(_) => "bitmap-int8",
    }
}

/// Which heads and neurons of the model that was loaded a layer still has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Heads, in rising order.
    pub heads: Vec<usize>,
    /// FFN neurons, in rising order.
    pub neurons: Vec<usize>,
}

impl Kept {
    /// Rows that are still there, `[n]` each: of queries, keys and values, and of the FFN's first matrix. `loaded` is the
    /// layer as it was loaded.
    pub(super) fn rows(&self, loaded: &LayerConfig) -> candle_core::Result<[Tensor; 2]> {
        let head = |part: usize, head: usize| part * loaded.d_context() + head * loaded.d_head;
        let context = |part| self.heads.iter().flat_map(move |&at| head(part, at)..head(part, at) + loaded.d_head);
        let tensor = |rows: Vec<usize>| {
            let rows: Vec<i64> = rows.into_iter().map(|row| row as i64).collect();
            let n = rows.len();
            Tensor::from_vec(rows, n, &Device::Cpu)
        };
        Ok([tensor((0..3).flat_map(context).collect())?, tensor(self.neurons.clone())?])
    }
}

/// The model under work. Clones share embedding tables and stored forms.
#[derive(Debug, Clone)]
pub struct Weights {
    architecture: Architecture,
    linears: BTreeMap<LinearSlot, DenseLinear>,
    norms: BTreeMap<NormSlot, NormWeights>,
    tables: BTreeMap<MatrixSlot, Arc<Vec<f32>>>,
    forms: BTreeMap<MatrixSlot, Arc<Weight<'static>>>,
    kept: Vec<Kept>,
    /// Which layer of the source each layer was.
    origins: Vec<usize>,
    /// The classification head; no pass changes it.
    head: BTreeMap<HeadSlot, DenseLinear>,
}

impl From<LinearWeights<'_>> for DenseLinear {
    fn from(linear: LinearWeights<'_>) -> Self {
        let LinearWeights { n_out, n_in, weight, bias } = linear;
        Self { n_out, n_in, weight: weight.to_f32(n_in), bias }
    }
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
            for slot in linear_slots(layer) {
                linears.insert(slot, source.linear(slot)?.into());
            }
            for slot in [NormSlot::Attention(layer), NormSlot::Ffn(layer)] {
                norms.insert(slot, source.norm(slot)?);
            }
        }
        let width = architecture.d_model;
        let found = source.tables()?;
        let mut tables = BTreeMap::from([
            (MatrixSlot::Word, Arc::new(found.word.to_f32(width))),
            (MatrixSlot::Position, Arc::new(found.position.to_f32(width))),
        ]);
        if let Some(table) = found.token_type {
            tables.insert(MatrixSlot::TokenType, Arc::new(table.to_f32(width)));
        }
        let mut head = BTreeMap::new();
        if architecture.head.is_some() {
            for slot in HeadSlot::ALL {
                head.insert(slot, source.head(slot)?.into());
            }
        }
        let whole =
            |layer: &LayerConfig| Kept { heads: (0..layer.n_heads).collect(), neurons: (0..layer.d_ffn).collect() };
        let kept = architecture.layers.iter().map(whole).collect();
        let origins = (0..architecture.layers.len()).collect();
        Ok(Self { architecture, linears, norms, tables, forms: BTreeMap::new(), kept, origins, head })
    }

    /// The model's shape.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// What a layer still has of the model that was loaded.
    #[must_use]
    pub fn kept(&self, layer: usize) -> &Kept {
        &self.kept[layer]
    }

    /// A linear layer.
    #[must_use]
    pub fn dense(&self, slot: LinearSlot) -> &DenseLinear {
        &self.linears[&slot]
    }

    /// Replaces the numbers of a linear layer; a form that was stored before no longer holds.
    ///
    /// # Panics
    /// If the shape changes: that is what [`Weights::keep_heads`] and [`Weights::keep_neurons`] are for.
    pub fn replace(&mut self, slot: LinearSlot, weight: Vec<f32>, bias: Vec<f32>) {
        let linear = self.linears.get_mut(&slot).expect("every slot of the architecture was loaded");
        assert!(weight.len() == linear.weight.len() && bias.len() == linear.bias.len(), "{slot} changes its shape");
        linear.weight = weight;
        linear.bias = bias;
        self.forms.remove(&MatrixSlot::Linear(slot));
    }

    /// Replaces a bias; the matrix and its form stay.
    ///
    /// # Panics
    /// If the length changes.
    pub fn replace_bias(&mut self, slot: LinearSlot, bias: Vec<f32>) {
        let linear = self.linears.get_mut(&slot).expect("every slot of the architecture was loaded");
        assert!(bias.len() == linear.bias.len(), "{slot} changes its shape");
        linear.bias = bias;
    }

    /// Every matrix: tables first, then layer by layer.
    #[must_use]
    pub fn slots(&self) -> Vec<MatrixSlot> {
        let tables = self.tables.keys().copied();
        tables.chain(self.linears.keys().map(|&slot| MatrixSlot::Linear(slot))).collect()
    }

    /// The numbers of a matrix, row-major: those of its stored form, when it has one.
    ///
    /// # Panics
    /// If the model has no such matrix.
    #[must_use]
    pub fn values(&self, slot: MatrixSlot) -> &[f32] {
        match slot {
            MatrixSlot::Linear(slot) => &self.linears[&slot].weight,
            table => &self.tables[&table],
        }
    }

    /// `(rows, columns)` of a matrix.
    ///
    /// # Panics
    /// If the model has no such matrix.
    #[must_use]
    pub fn shape(&self, slot: MatrixSlot) -> (usize, usize) {
        match slot {
            MatrixSlot::Linear(slot) => (self.linears[&slot].n_out, self.linears[&slot].n_in),
            table => (self.tables[&table].len() / self.architecture.d_model, self.architecture.d_model),
        }
    }

    /// Fixes how a matrix is stored, and replaces its numbers by what that form stands for.
    ///
    /// # Panics
    /// If the model has no such matrix or the form is of another shape.
    pub fn store(&mut self, slot: MatrixSlot, form: Weight<'static>) {
        let values = form.to_f32(self.shape(slot).1);
        assert!(values.len() == self.values(slot).len(), "{slot} changes its shape");
        match slot {
            MatrixSlot::Linear(linear) => {
                self.linears.get_mut(&linear).expect("its shape was found").weight = values;
            }
            table => drop(self.tables.insert(table, Arc::new(values))),
        }
        self.forms.insert(slot, Arc::new(form));
    }

    /// How a matrix is stored, when a pass has fixed it; others get INT8 per row when they are written.
    #[must_use]
    pub fn form(&self, slot: MatrixSlot) -> Option<&Weight<'static>> {
        self.forms.get(&slot).map(|form| &**form)
    }

    /// Bytes of a matrix as it would be written.
    #[must_use]
    pub fn matrix_bytes(&self, slot: MatrixSlot) -> u64 {
        let (rows, cols) = self.shape(slot);
        (match self.form(slot) {
            Some(form) => form.n_bytes(),
            None => rows * cols + 4 * rows,
        }) as u64
    }

    /// Bytes of all tensors as they would be written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let matrices: u64 = self.slots().into_iter().map(|slot| self.matrix_bytes(slot)).sum();
        let biases: usize = self.linears.values().map(|linear| linear.bias.len()).sum();
        let norms: usize = self.norms.values().map(|norm| norm.gain.len() + norm.bias.len()).sum();
        let head: usize = self.head.values().map(|linear| linear.weight.len() + linear.bias.len()).sum();
        matrices + 4 * (biases + norms + head) as u64
    }

    /// A report's line on a matrix as it is stored now.
    #[must_use]
    pub fn report(&self, slot: MatrixSlot) -> MatrixReport {
        let form = self.form(slot).map_or("", form_name);
        let bits = self.matrix_bytes(slot) as f64 * 8.0 / self.values(slot).len() as f64;
        MatrixReport { form: form.to_owned(), bits: Some(bits), ..slot.report() }
    }

    /// Multiply-accumulates per token of the linear layers, as they are stored.
    #[must_use]
    pub fn macs_per_token(&self) -> u64 {
        let of = |(&slot, linear): (&LinearSlot, &DenseLinear)| match self.form(MatrixSlot::Linear(slot)) {
            Some(form) => form.macs(linear.n_out, linear.n_in),
            None => (linear.n_out * linear.n_in) as u64,
        };
        self.linears.iter().map(of).sum()
    }

    /// Bytes of the matrices of a layer, or of the tables.
    #[must_use]
    pub fn bytes_of(&self, layer: Option<usize>) -> u64 {
        let is_of = |slot: &MatrixSlot| match slot {
            MatrixSlot::Linear(linear) => layer == Some(linear.layer()),
            _ => layer.is_none(),
        };
        self.slots().into_iter().filter(is_of).map(|slot| self.matrix_bytes(slot)).sum()
    }

    /// Gives what no pass has stored the form that it is written in: INT8 per row.
    pub fn settle(&mut self) {
        for slot in self.slots() {
            if self.form(slot).is_none() {
                let (codes, scale) = quantize_rows_symmetric(self.values(slot), self.shape(slot).1);
                self.store(slot, Weight::Int8 { codes: codes.into(), scale: scale.into() });
            }
        }
    }

    /// Which layer of the source each layer was.
    #[must_use]
    pub fn origins(&self) -> &[usize] {
        &self.origins
    }

    /// Replaces a LayerNorm.
    ///
    /// # Panics
    /// If the width changes.
    pub fn replace_norm(&mut self, slot: NormSlot, norm: NormWeights) {
        assert!(norm.gain.len() == self.architecture.d_model, "a norm changes its width");
        self.norms.insert(slot, norm);
    }

    /// Keeps only `layers` (indices in rising order).
    ///
    /// # Errors
    /// If none is kept.
    pub fn keep_layers(&mut self, layers: &[usize]) -> Result<(), CompressError> {
        let mut spec = self.architecture.spec();
        spec.layers = layers.iter().map(|&layer| spec.layers[layer]).collect();
        self.architecture = Architecture::new(spec)?;
        self.origins = layers.iter().map(|&layer| self.origins[layer]).collect();
        self.kept = layers.iter().map(|&layer| self.kept[layer].clone()).collect();
        let place = |layer: usize| layers.iter().position(|&kept| kept == layer);
        let linears = std::mem::take(&mut self.linears).into_iter();
        self.linears = linears.filter_map(|(slot, linear)| Some((moved(slot, place(slot.layer())?), linear))).collect();
        let norms = std::mem::take(&mut self.norms).into_iter().filter_map(|(slot, norm)| {
            let slot = match slot {
                NormSlot::Embedding => slot,
                NormSlot::Attention(layer) => NormSlot::Attention(place(layer)?),
                NormSlot::Ffn(layer) => NormSlot::Ffn(place(layer)?),
            };
            Some((slot, norm))
        });
        self.norms = norms.collect();
        let forms = std::mem::take(&mut self.forms).into_iter().filter_map(|(slot, form)| match slot {
            MatrixSlot::Linear(linear) => Some((MatrixSlot::Linear(moved(linear, place(linear.layer())?)), form)),
            table => Some((table, form)),
        });
        self.forms = forms.collect();
        Ok(())
    }

    /// Keeps only `rows` (in rising order) of the word embedding.
    ///
    /// # Errors
    /// If none is kept.
    pub fn keep_words(&mut self, rows: &[u32]) -> Result<(), CompressError> {
        let width = self.architecture.d_model;
        let mut spec = self.architecture.spec();
        spec.vocab_size = rows.len();
        self.architecture = Architecture::new(spec)?;
        let old = &self.tables[&MatrixSlot::Word];
        let kept = rows.iter().flat_map(|&row| &old[row as usize * width..(row as usize + 1) * width]);
        let kept: Vec<f32> = kept.copied().collect();
        self.tables.insert(MatrixSlot::Word, Arc::new(kept));
        self.forms.remove(&MatrixSlot::Word);
        Ok(())
    }

    /// Takes attention patterns, the longest input and whether positions repeat from `other`.
    ///
    /// # Errors
    /// If they do not fit.
    pub fn set_attention(&mut self, other: &Architecture) -> Result<(), CompressError> {
        let mut spec = self.architecture.spec();
        spec.layers.iter_mut().zip(&other.layers).for_each(|(layer, other)| layer.band = other.band);
        spec.positions.tiled = other.positions.tiled;
        spec.max_input_tokens = other.max_input_tokens;
        self.architecture = Architecture::new(spec)?;
        Ok(())
    }

    /// Fixes the ranges of the inputs of all layers.
    ///
    /// # Errors
    /// If they are not one entry a layer, or no ranges.
    pub fn set_ranges(&mut self, ranges: Vec<LayerRanges>) -> Result<(), CompressError> {
        let mut spec = self.architecture.spec();
        spec.ranges = ranges;
        self.architecture = Architecture::new(spec)?;
        Ok(())
    }

    /// Takes a whole layer from `other`, which must be as wide.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn take_layer(&mut self, layer: usize, other: &Self, of_other: usize) -> Result<(), CompressError> {
        let mut spec = self.architecture.spec();
        spec.layers[layer] = other.architecture.layers[of_other];
        self.architecture = Architecture::new(spec)?;
        for (to, from) in linear_slots(layer).into_iter().zip(linear_slots(of_other)) {
            self.linears.insert(to, other.linears[&from].clone());
            self.forms.remove(&MatrixSlot::Linear(to));
        }
        self.norms.insert(NormSlot::Attention(layer), other.norms[&NormSlot::Attention(of_other)].clone());
        self.norms.insert(NormSlot::Ffn(layer), other.norms[&NormSlot::Ffn(of_other)].clone());
        Ok(())
    }

    /// Takes the embedding tables from `other`, which must have as many rows.
    pub fn take_tables(&mut self, other: &Self) {
        self.tables.clone_from(&other.tables);
        self.norms.insert(NormSlot::Embedding, other.norms[&NormSlot::Embedding].clone());
        self.forms.retain(|slot, _| matches!(slot, MatrixSlot::Linear(_)));
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
        let kept = &mut self.kept[layer].heads;
        *kept = heads.iter().map(|&head| kept[head]).collect();
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
        let kept = &mut self.kept[layer].neurons;
        *kept = neurons.iter().map(|&neuron| kept[neuron]).collect();
        self.keep_rows(LinearSlot::FfnUp(layer), neurons);
        self.keep_columns(LinearSlot::FfnDown(layer), neurons);
        Ok(())
    }

    fn lend(&self, slot: MatrixSlot) -> Weight<'_> {
        match self.form(slot) {
            Some(form) => form.clone(),
            None => Weight::F32(Cow::Borrowed(self.values(slot))),
        }
    }

    fn edit(&mut self, layer: usize, edit: impl FnOnce(&mut LayerConfig)) -> Result<(), CompressError> {
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
        self.forms.remove(&MatrixSlot::Linear(slot));
    }

    fn keep_columns(&mut self, slot: LinearSlot, columns: &[usize]) {
        let linear = self.linears.get_mut(&slot).expect("every slot of the architecture was loaded");
        linear.weight =
            linear.weight.chunks_exact(linear.n_in).flat_map(|row| columns.iter().map(|&col| row[col])).collect();
        linear.n_in = columns.len();
        self.forms.remove(&MatrixSlot::Linear(slot));
    }
}

impl WeightSource for Weights {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn linear(&self, slot: LinearSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        let linear = self.dense(slot);
        let weight = self.lend(MatrixSlot::Linear(slot));
        Ok(LinearWeights { n_out: linear.n_out, n_in: linear.n_in, weight, bias: linear.bias.clone() })
    }

    fn head(&self, slot: HeadSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        let linear = self.head.get(&slot).ok_or_else(|| CheckpointError::MissingTensor(slot.to_string()))?;
        let weight = Weight::F32(Cow::Borrowed(&linear.weight));
        Ok(LinearWeights { n_out: linear.n_out, n_in: linear.n_in, weight, bias: linear.bias.clone() })
    }

    fn norm(&self, slot: NormSlot) -> Result<NormWeights, CheckpointError> {
        Ok(self.norms[&slot].clone())
    }

    fn tables(&self) -> Result<TableWeights<'_>, CheckpointError> {
        Ok(TableWeights {
            word: self.lend(MatrixSlot::Word),
            position: self.lend(MatrixSlot::Position),
            token_type: self.tables.contains_key(&MatrixSlot::TokenType).then(|| self.lend(MatrixSlot::TokenType)),
        })
    }
}
