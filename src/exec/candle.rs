//! The f32 player: the reference that everything else is measured against, and the base of gradients.
//!
//! It is composed of operations that candle can differentiate. candle's fused `softmax_last_dim`, `layer_norm` and
//! `rms_norm` have no backward and cut gradients without a word, so they are not used (`.clippy.toml` bans them).
//!
//! Rows do not depend on their batch-mates except through the order of f32 sums inside a matrix product.

mod attention;
mod build;
mod gelu;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::layer_norm_slow;

use crate::model::{
    Activation, AttentionSpec, ForwardMemory, LinearSlot, ModelError, NormSlot, Ops, Pooling, Positions, Ragged,
};

pub use build::{CandleBuild, WeightSource};

/// Sequences of one group are played together; about this many tokens keep the matrix products efficient.
pub const GROUP_TOKENS: usize = 2_048;

/// The f32 player.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleF32;

/// A linear layer as the f32 player and its decorators hold it.
#[derive(Debug, Clone)]
pub struct CandleLinear {
    /// Where in the encoder it stands, for players that observe. (They play no classification head; its layers carry
    /// the slot that feeds them, the last layer's [`LinearSlot::FfnDown`].)
    pub slot: LinearSlot,
    /// `[n_out, n_in]`.
    pub weight: Tensor,
    /// `[n_out]`.
    pub bias: Tensor,
}

/// A LayerNorm.
#[derive(Debug, Clone)]
pub struct CandleNorm {
    /// Where in the model it stands.
    pub slot: NormSlot,
    /// `[d_model]`.
    pub gain: Tensor,
    /// `[d_model]`.
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f32,
}

/// The embedding tables.
#[derive(Debug, Clone)]
pub struct CandleTables {
    /// `[vocab_size, d_model]`.
    pub word: Tensor,
    /// `[positions.table_len, d_model]`.
    pub position: Tensor,
    /// `[n_token_types, d_model]`.
    pub token_type: Option<Tensor>,
    /// Which row a position reads.
    pub positions: Positions,
}

/// What this player holds besides the weights: nothing that lasts.
#[must_use]
pub fn memory(_player: &CandleF32) -> ForwardMemory {
    ForwardMemory::default()
}

impl CandleLinear {
    /// `x Wᵀ + b`: `[n_tokens, n_out]`.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }
}

impl CandleNorm {
    /// `LayerNorm(x)`, differentiable.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        layer_norm_slow(x, &self.gain, &self.bias, self.eps)
    }
}

/// The activation function, differentiable.
///
/// # Errors
/// If candle fails.
pub fn activate(x: Tensor, then: Activation) -> candle_core::Result<Tensor> {
    match then {
        Activation::Identity => Ok(x),
        Activation::Gelu if x.dtype() == DType::F64 => x.gelu_erf(),
        Activation::Gelu => gelu::gelu(&x),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::Tanh => x.tanh(),
    }
}

fn index(rows: Vec<u32>) -> candle_core::Result<Tensor> {
    let len = rows.len();
    Tensor::from_vec(rows, len, &Device::Cpu)
}

/// `word[id] + position[p] + type[t]`: `[n_tokens, d_model]`, before the LayerNorm.
///
/// # Errors
/// If candle fails.
pub fn embedding_sum(tables: &CandleTables, batch: &Ragged<'_>) -> candle_core::Result<Tensor> {
    let positions = batch.sequences().flat_map(|rows| 0..rows.len()).map(|position| {
        u32::try_from(tables.positions.row(position)).expect("Architecture::new limits the table to 2^20 rows")
    });
    let mut sum = tables
        .word
        .index_select(&index(batch.ids().to_vec())?, 0)?
        .add(&tables.position.index_select(&index(positions.collect())?, 0)?)?;
    if let Some(table) = &tables.token_type {
        let types = batch.token_types().iter().map(|&token_type| u32::from(token_type)).collect();
        sum = sum.add(&table.index_select(&index(types)?, 0)?)?;
    }
    Ok(sum)
}

fn pool(x: &Tensor, pooling: Pooling, batch: &Ragged<'_>) -> candle_core::Result<Tensor> {
    let rows: Vec<Tensor> = batch
        .sequences()
        .map(|rows| {
            let len = rows.len();
            match pooling {
                Pooling::Cls => x.narrow(0, rows.start, 1),
                Pooling::LastToken => x.narrow(0, rows.end - 1, 1),
                Pooling::Mean => x.narrow(0, rows.start, len)?.sum_keepdim(0)?.affine(1.0 / len as f64, 0.0),
                Pooling::MeanSqrtLen => {
                    x.narrow(0, rows.start, len)?.sum_keepdim(0)?.affine(1.0 / (len as f64).sqrt(), 0.0)
                }
                Pooling::Max => x.narrow(0, rows.start, len)?.max_keepdim(0),
            }
        })
        .collect::<candle_core::Result<_>>()?;
    Tensor::cat(&rows, 0)
}

/// Rows scaled to length 1, differentiable: `x / max(‖x‖₂, 1e-12)`, as sentence-transformers does.
///
/// # Errors
/// If candle fails.
pub fn normalize(x: &Tensor) -> candle_core::Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?;
    x.broadcast_div(&length)
}

impl Ops for CandleF32 {
    type Act = Tensor;
    type Tables = CandleTables;
    type Linear = CandleLinear;
    type Norm = CandleNorm;

    fn embed(&mut self, tables: &CandleTables, norm: &CandleNorm, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        embedding_sum(tables, batch).and_then(|sum| norm.apply(&sum)).map_err(ModelError::player)
    }

    fn linear(&mut self, linear: &CandleLinear, x: &Tensor, then: Activation) -> Result<Tensor, ModelError> {
        linear.apply(x).and_then(|y| activate(y, then)).map_err(ModelError::player)
    }

    fn attend(&mut self, qkv: Tensor, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        attention::attend(&qkv, spec, batch).map_err(ModelError::player)
    }

    fn linear_add_norm(
        &mut self,
        linear: &CandleLinear,
        x: Tensor,
        residual: Tensor,
        norm: &CandleNorm,
    ) -> Result<Tensor, ModelError> {
        linear.apply(&x).and_then(|y| norm.apply(&(y + residual)?)).map_err(ModelError::player)
    }

    fn pool(&mut self, x: &Tensor, pooling: Pooling, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        pool(x, pooling, batch).map_err(ModelError::player)
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<(), ModelError> {
        let values = x
            .flatten_all()
            .and_then(|x| x.to_dtype(DType::F32))
            .and_then(|x| x.to_vec1::<f32>())
            .map_err(ModelError::player)?;
        out.extend_from_slice(&values);
        Ok(())
    }
}
