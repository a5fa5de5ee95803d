//! INT8 in f32: weights and activations rounded as the INT8 runtime rounds them, played by the f32 player.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::weights::{Weights, slots};
use crate::exec::candle::{CandleF32, CandleLinear, CandleNorm, CandleTables, activate};
use crate::model::{Activation, AttentionSpec, ModelError, Ops, Pooling, Ragged};
use crate::quant::{Weight, quantize_rows_symmetric};

/// The f32 player with inputs of linear layers rounded to u8 per token (256 levels between a row's extremes).
#[derive(Debug, Clone, Copy, Default)]
pub struct RoundedActivations;

struct RoundRows;

impl CustomOp1 for RoundRows {
    fn name(&self) -> &'static str {
        "round rows to u8"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values: &[f32] = storage.as_slice()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(candle_core::Error::RequiresContiguous { op: "round rows" }.bt());
        };
        let mut out = values[start..end].to_vec();
        for row in out.chunks_exact_mut(layout.dims()[layout.dims().len() - 1]) {
            let (low, high) =
                row.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &v| (low.min(v), high.max(v)));
            let step = (high - low) / 255.0;
            if step > 0.0 {
                row.iter_mut().for_each(|value| *value = ((*value - low) / step).round_ties_even() * step + low);
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

fn round(x: &Tensor) -> std::result::Result<Tensor, ModelError> {
    x.contiguous().and_then(|x| x.apply_op1_no_bwd(&RoundRows)).map_err(ModelError::player)
}

impl Ops for RoundedActivations {
    type Act = Tensor;
    type Tables = CandleTables;
    type Linear = CandleLinear;
    type Norm = CandleNorm;

    fn embed(
        &mut self,
        tables: &CandleTables,
        norm: &CandleNorm,
        batch: &Ragged<'_>,
    ) -> std::result::Result<Tensor, ModelError> {
        CandleF32.embed(tables, norm, batch)
    }

    fn linear(
        &mut self,
        linear: &CandleLinear,
        x: &Tensor,
        then: Activation,
    ) -> std::result::Result<Tensor, ModelError> {
        linear.apply(&round(x)?).and_then(|y| activate(y, then)).map_err(ModelError::player)
    }

    fn attend(
        &mut self,
        qkv: Tensor,
        spec: &AttentionSpec,
        batch: &Ragged<'_>,
    ) -> std::result::Result<Tensor, ModelError> {
        CandleF32.attend(qkv, spec, batch)
    }

    fn linear_add_norm(
        &mut self,
        linear: &CandleLinear,
        x: Tensor,
        residual: Tensor,
        norm: &CandleNorm,
    ) -> std::result::Result<Tensor, ModelError> {
        CandleF32.linear_add_norm(linear, round(&x)?, residual, norm)
    }

    fn pool(&mut self, x: &Tensor, pooling: Pooling, batch: &Ragged<'_>) -> std::result::Result<Tensor, ModelError> {
        CandleF32.pool(x, pooling, batch)
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> std::result::Result<(), ModelError> {
        CandleF32.read(x, out)
    }
}

/// Every matrix rounded to INT8 per row and back.
#[must_use]
pub fn round_weights(model: &Weights) -> Weights {
    let mut rounded = model.clone();
    for layer in 0..model.architecture().layers.len() {
        for slot in slots(layer) {
            let linear = model.dense(slot);
            let (codes, scale) = quantize_rows_symmetric(&linear.weight, linear.n_in);
            let weight = Weight::Int8 { codes: codes.into(), scale: scale.into() }.to_f32(linear.n_in);
            rounded.replace(slot, weight, linear.bias.clone());
        }
    }
    rounded
}
