//! How much the sentence embedding feels an error, everywhere at once.
//!
//! As for importance, the embedding is probed by random signs `v`: with `L = v · e(x)` the gradient `g = ∂L/∂y` at any
//! place `y` has `E_v[g gᵀ] = Jᵀ J`, `J = ∂e/∂y`. An error `δ` there moves the embedding by `δᵀ E[g gᵀ] δ` in the mean
//! square, to first order.

use candle_core::{Device, Tensor, Var};
use faer::Mat;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::CompressError;
use super::calibration::CalibrationText;
use super::progress::Progress;
use super::weights::Weights;
use crate::exec::candle::{
    CandleBuild, CandleF32, CandleLinear, CandleNorm, CandleTables, activate, embedding_sum, normalize,
};
use crate::model::{Activation, AttentionSpec, Encoder, LinearSlot, ModelError, Ops, Pooling, Ragged};
use std::collections::BTreeMap;

/// What was felt.
#[derive(Debug)]
pub(super) struct Sensitivities {
    /// Per output of each linear layer, the mean square of its gradient.
    pub(super) outputs: BTreeMap<LinearSlot, Vec<f64>>,
    /// `E[g gᵀ]` at the sum of the embeddings, `[d_model, d_model]`.
    pub(super) embedding: Mat<f64>,
}

/// The f32 player with a zero variable added wherever a gradient is asked for.
#[derive(Default)]
struct Probing {
    embedding: Option<Var>,
    outputs: Vec<(LinearSlot, Var)>,
}

fn probe(y: &Tensor) -> candle_core::Result<(Tensor, Var)> {
    let probe = Var::zeros(y.shape(), y.dtype(), y.device())?;
    Ok(((y + probe.as_tensor())?, probe))
}

impl Probing {
    fn apply(&mut self, linear: &CandleLinear, x: &Tensor) -> candle_core::Result<Tensor> {
        let (y, probe) = probe(&linear.apply(x)?)?;
        self.outputs.push((linear.slot, probe));
        Ok(y)
    }
}

impl Ops for Probing {
    type Act = Tensor;
    type Tables = CandleTables;
    type Linear = CandleLinear;
    type Norm = CandleNorm;

    fn embed(&mut self, tables: &CandleTables, norm: &CandleNorm, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        let mut play = || {
            let (sum, probe) = probe(&embedding_sum(tables, batch)?)?;
            self.embedding = Some(probe);
            norm.apply(&sum)
        };
        play().map_err(ModelError::player)
    }

    fn linear(&mut self, linear: &CandleLinear, x: &Tensor, then: Activation) -> Result<Tensor, ModelError> {
        self.apply(linear, x).and_then(|y| activate(y, then)).map_err(ModelError::player)
    }

    fn attend(&mut self, qkv: Tensor, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        CandleF32.attend(qkv, spec, batch)
    }

    fn linear_add_norm(
        &mut self,
        linear: &CandleLinear,
        x: Tensor,
        residual: Tensor,
        norm: &CandleNorm,
    ) -> Result<Tensor, ModelError> {
        self.apply(linear, &x).and_then(|y| norm.apply(&(y + residual)?)).map_err(ModelError::player)
    }

    fn pool(&mut self, x: &Tensor, pooling: Pooling, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        CandleF32.pool(x, pooling, batch)
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<(), ModelError> {
        CandleF32.read(x, out)
    }
}

/// Plays the text through `model`, forward and backward.
///
/// # Errors
/// If the player fails or a gradient is cut.
pub(super) fn sense(
    model: &Weights,
    text: &CalibrationText,
    seed: u64,
    progress: &dyn Progress,
) -> Result<Sensitivities, CompressError> {
    let spec = model.architecture();
    let width = spec.d_model;
    let encoder: Encoder<Probing> = Encoder::build(spec, &mut CandleBuild::new(model))?;
    let mut outputs: BTreeMap<LinearSlot, Vec<f64>> = BTreeMap::new();
    let mut embedding = vec![0.0f64; width * width];
    let mut rng = StdRng::seed_from_u64(seed);
    progress.phase_started("measure sensitivities", text.n_tokens as u64);
    for batch in &text.batches {
        let view = batch.view(0..batch.n_seqs());
        let mut player = Probing::default();
        let rows = encoder.forward(&mut player, &view)?;
        let pooled = normalize(&player.pool(&rows, spec.pooling, &view)?)?;
        let signs: Vec<f32> =
            (0..batch.n_seqs() * width).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect();
        let signs = Tensor::from_vec(signs, (batch.n_seqs(), width), &Device::Cpu)?;
        let gradients = (pooled * signs)?.sum_all()?.backward()?;
        for (slot, probe) in &player.outputs {
            let gradient = gradients.get(probe).ok_or(CompressError::NoGradient { slot: *slot })?;
            let squares: Vec<f32> = gradient.sqr()?.sum(0)?.to_vec1()?;
            let sums = outputs.entry(*slot).or_insert_with(|| vec![0.0; squares.len()]);
            sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += f64::from(square));
        }
        if let Some(gradient) = player.embedding.as_ref().and_then(|probe| gradients.get(probe)) {
            let square: Vec<f32> = gradient.t()?.contiguous()?.matmul(gradient)?.flatten_all()?.to_vec1()?;
            embedding.iter_mut().zip(square).for_each(|(sum, square)| *sum += f64::from(square));
        }
        progress.advanced(batch.n_tokens() as u64);
    }
    progress.phase_finished();
    let n_tokens = text.n_tokens.max(1) as f64;
    outputs.values_mut().flatten().for_each(|sum| *sum /= n_tokens);
    Ok(Sensitivities { outputs, embedding: Mat::from_fn(width, width, |i, j| embedding[i * width + j] / n_tokens) })
}
