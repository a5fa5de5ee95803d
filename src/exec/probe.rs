//! How long a layer of a given shape takes on this machine, for choosing shapes by time.

use std::sync::Arc;
use std::time::Instant;

use super::int8::Int8;
use super::int8_build::{GROUP_TOKENS, Int8Linear, Int8Model, Int8Norm, Int8Weights};
use super::int8_tables::Int8Tables;
use super::load::Runtime;
use crate::kernels::KernelSet;
use crate::kernels::threads::Cores;
use crate::model::{
    Architecture, Build, Encoder, Forward, LayerConfig, LinearSlot, Model, ModelError, NormSlot, Outputs, Positions,
    RaggedBatch, Want,
};
use crate::quant::Weight;

/// Made-up weights.
struct MadeUp<'a> {
    kernels: KernelSet,
    spec: &'a Architecture,
}

/// Small numbers of both signs, so that activations stay in the range of trained ones, and most near zero as trained weights are:
/// kernels may take longer for large ones.
fn made_up(n: usize) -> Vec<f32> {
    let even = |i: usize, step: usize, of: usize| f32::from((i * step % of) as u8) / of as f32;
    (0..n).map(|i| (even(i, 37, 101) + even(i, 53, 103) + even(i, 71, 107) - 1.5) / 20.0).collect()
}

impl Build<Int8> for MadeUp<'_> {
    fn tables(&mut self) -> Result<Int8Tables, ModelError> {
        let spec = self.spec;
        let rows = |n: usize| made_up(n * spec.d_model);
        let types = (spec.n_token_types > 0).then(|| rows(spec.n_token_types));
        Ok(Int8Tables::of_rows(
            spec.d_model,
            &rows(spec.vocab_size),
            &rows(spec.positions.table_len),
            types.as_deref(),
            spec.positions,
        ))
    }

    fn norm(&mut self, _slot: NormSlot) -> Result<Int8Norm, ModelError> {
        let width = self.spec.d_model;
        Ok(Int8Norm { gain: vec![1.0; width], bias: vec![0.0; width], eps: 1e-12, range: None })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<Int8Weights, ModelError> {
        let (width, layer) = (self.spec.d_model, &self.spec.layers[slot.layer()]);
        let (n_out, n_in) = match slot {
            LinearSlot::Qkv(_) => (3 * layer.d_context(), width),
            LinearSlot::AttentionOut(_) => (width, layer.d_context()),
            LinearSlot::FfnUp(_) => (layer.d_ffn, width),
            LinearSlot::FfnDown(_) => (width, layer.d_ffn),
        };
        Ok(Int8Linear::new(&self.kernels, &Weight::F32(made_up(n_out * n_in).into()), &vec![0.0; n_out], n_in).into())
    }
}

/// Times single layers of the shapes `shapes` on `batches`, on one computing thread as under load: nanoseconds of the
/// fastest of `rounds` passes over all batches, shape by shape. All shapes are played in every round, so that what
/// disturbs the machine disturbs all. What stands around a layer (embedding, pooling) is part of every figure.
///
/// # Errors
/// If a layer cannot be played.
pub fn time_layers(
    runtime: &Runtime,
    architecture: &Architecture,
    shapes: &[LayerConfig],
    lens: &[Vec<usize>],
    rounds: usize,
    mut progress: impl FnMut(),
) -> Result<Vec<u64>, ModelError> {
    /// Rows of the made-up word table.
    const N_WORDS: usize = 64;
    let longest = lens.iter().flatten().copied().max().unwrap_or(1);
    let mut spec = architecture.spec();
    spec.vocab_size = N_WORDS;
    spec.head = None;
    spec.positions = Positions { table_len: longest, offset: 0, tiled: true };
    spec.max_input_tokens = longest;
    let cores = Arc::new(Cores::new(1).map_err(ModelError::player)?);
    let kernels = KernelSet::new(runtime.isa());
    let mut players: Vec<Model<Int8>> = Vec::with_capacity(shapes.len());
    for shape in shapes {
        spec.layers = vec![*shape];
        let spec = Arc::new(Architecture::new(spec.clone())?);
        let encoder = Arc::new(Encoder::build(&spec, &mut MadeUp { kernels, spec: &spec })?);
        let model = Int8Model::of_encoder(kernels, spec, encoder, 0);
        players.push(model.worker(Arc::clone(&cores), GROUP_TOKENS));
    }
    let ids: Vec<u32> = (0..longest as u32).map(|i| i * 29 % N_WORDS as u32).collect();
    let batches = lens
        .iter()
        .map(|lens| RaggedBatch::from_sequences(&lens.iter().map(|&len| &ids[..len]).collect::<Vec<_>>()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut best = vec![u64::MAX; shapes.len()];
    let mut out = Outputs::default();
    for round in 0..=rounds {
        for (player, best) in players.iter_mut().zip(&mut best) {
            let started = Instant::now();
            for batch in &batches {
                player.forward(batch, Want::Pooled, &mut out)?;
            }
            let nanoseconds = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            // The first round warms up.
            if round > 0 {
                *best = nanoseconds.min(*best);
            }
            progress();
        }
    }
    Ok(best)
}
