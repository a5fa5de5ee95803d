//! The f32 player: candle tensors, differentiable throughout. The reference of every parity test, and the base of
//! calibration and training.
//!
//! Only ops with a backward are used: candle's fused LayerNorm and softmax cut the gradient without an error.

use candle_core::{D, DType, Device, Tensor};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::model::{
    Activation, Architecture, AttentionSpec, Band, Build, Encoder, ForwardMemory, LinearSlot, Model, ModelError,
    NormSlot, Ops, Pooling, Positions, Ragged,
};

/// Longest group that is played at once; scores of a sequence are `len²` per head.
const GROUP_TOKENS: usize = 2_048;

/// Plays the score in f32.
#[derive(Debug, Default)]
pub struct Candle {
    weights_bytes: usize,
}

/// Word, position and type tables.
#[derive(Debug)]
pub struct CandleTables {
    word: Tensor,
    position: Tensor,
    token_type: Option<Tensor>,
    positions: Positions,
}

/// `y = x Wᵀ + b`, with the slot it fills, so that decorators can tell layers apart.
#[derive(Debug, Clone)]
pub struct CandleLinear {
    /// Which layer of the encoder this is.
    pub slot: LinearSlot,
    /// `[n_out, n_in]`.
    pub weight: Tensor,
    /// `[n_out]`.
    pub bias: Tensor,
}

/// Gain and bias of a LayerNorm.
#[derive(Debug)]
pub struct CandleNorm {
    /// `[d_model]`.
    pub gain: Tensor,
    /// `[d_model]`.
    pub bias: Tensor,
    eps: f32,
}

fn player(error: candle_core::Error) -> ModelError {
    ModelError::player(error)
}

/// Additive mask of a sequence: 0 where [`Band::contains`], −∞ elsewhere. `[len, len]`.
fn mask(band: &Band, len: usize) -> candle_core::Result<Option<Tensor>> {
    if band.is_full_for(len) {
        return Ok(None);
    }
    let mut values = vec![f32::NEG_INFINITY; len * len];
    for query in 0..len {
        for key in 0..len {
            if band.contains(query, key) {
                values[query * len + key] = 0.0;
            }
        }
    }
    Tensor::from_vec(values, (len, len), &Device::Cpu).map(Some)
}

fn activate(x: Tensor, then: Activation) -> candle_core::Result<Tensor> {
    match then {
        Activation::Identity => Ok(x),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
    }
}

impl Candle {
    fn affine(linear: &CandleLinear, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&linear.weight.t()?)?.broadcast_add(&linear.bias)
    }

    fn normalize(norm: &CandleNorm, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::ops::layer_norm_slow(x, &norm.gain, &norm.bias, norm.eps)
    }

    /// Softmax attention of one sequence; `qkv: [len, 3 · n_heads · d_head]`.
    fn attend_sequence(qkv: &Tensor, spec: &AttentionSpec) -> candle_core::Result<Tensor> {
        let len = qkv.dim(0)?;
        let width = spec.n_heads * spec.d_head;
        let part = |index: usize| -> candle_core::Result<Tensor> {
            qkv.narrow(1, index * width, width)?
                .reshape((len, spec.n_heads, spec.d_head))?
                .transpose(0, 1)?
                .contiguous()
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let mut scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (spec.d_head as f64).sqrt())?;
        if let Some(mask) = mask(&spec.band, len)? {
            scores = scores.broadcast_add(&mask)?;
        }
        let probabilities = candle_nn::ops::softmax(&scores, D::Minus1)?;
        probabilities.matmul(&v)?.transpose(0, 1)?.reshape((len, width))
    }

    fn pool_sequence(rows: &Tensor, pooling: Pooling) -> candle_core::Result<Tensor> {
        let len = rows.dim(0)?;
        match pooling {
            Pooling::Cls => rows.get(0),
            Pooling::Mean => rows.mean(0),
            Pooling::Max => rows.max(0),
            Pooling::LastToken => rows.get(len - 1),
            Pooling::MeanSqrtLen => rows.sum(0)? / (len as f64).sqrt(),
        }
    }
}

impl Ops for Candle {
    type Act = Tensor;
    type Tables = CandleTables;
    type Linear = CandleLinear;
    type Norm = CandleNorm;

    fn embed(&mut self, tables: &CandleTables, norm: &CandleNorm, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        #[allow(clippy::cast_possible_truncation, reason = "a table has at most 2^20 rows")]
        let rows: Vec<u32> = batch
            .sequences()
            .flat_map(|sequence| (0..sequence.len()).map(|position| tables.positions.row(position) as u32))
            .collect();
        let select = |table: &Tensor, ids: Vec<u32>| -> candle_core::Result<Tensor> {
            let n = ids.len();
            table.index_select(&Tensor::from_vec(ids, n, &Device::Cpu)?, 0)
        };
        let sum = || -> candle_core::Result<Tensor> {
            let mut sum = (select(&tables.word, batch.ids().to_vec())? + select(&tables.position, rows)?)?;
            if let Some(table) = &tables.token_type {
                sum = (sum + select(table, batch.token_types().iter().map(|&t| u32::from(t)).collect())?)?;
            }
            Self::normalize(norm, &sum)
        };
        sum().map_err(player)
    }

    fn linear(&mut self, linear: &CandleLinear, x: &Tensor, then: Activation) -> Result<Tensor, ModelError> {
        Self::affine(linear, x).and_then(|y| activate(y, then)).map_err(player)
    }

    fn attend(&mut self, qkv: Tensor, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        let attend = || -> candle_core::Result<Tensor> {
            let contexts = batch
                .sequences()
                .map(|rows| Self::attend_sequence(&qkv.narrow(0, rows.start, rows.len())?, spec))
                .collect::<candle_core::Result<Vec<_>>>()?;
            Tensor::cat(&contexts, 0)
        };
        attend().map_err(player)
    }

    fn linear_add_norm(
        &mut self,
        linear: &CandleLinear,
        x: Tensor,
        residual: Tensor,
        norm: &CandleNorm,
    ) -> Result<Tensor, ModelError> {
        Self::affine(linear, &x).and_then(|y| y + residual).and_then(|sum| Self::normalize(norm, &sum)).map_err(player)
    }

    fn pool(&mut self, x: &Tensor, pooling: Pooling, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        let pool = || -> candle_core::Result<Tensor> {
            let rows = batch
                .sequences()
                .map(|rows| Self::pool_sequence(&x.narrow(0, rows.start, rows.len())?, pooling))
                .collect::<candle_core::Result<Vec<_>>>()?;
            Tensor::stack(&rows, 0)
        };
        pool().map_err(player)
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<(), ModelError> {
        let values = x.to_dtype(DType::F32).and_then(|x| x.flatten_all()).and_then(|x| x.to_vec1()).map_err(player)?;
        out.extend::<Vec<f32>>(values);
        Ok(())
    }
}

/// Builds handles of the f32 player from a checkpoint; quantized weights are expanded.
#[derive(Debug)]
pub struct CandleBuild<'a> {
    checkpoint: &'a Checkpoint,
    weights_bytes: usize,
}

impl<'a> CandleBuild<'a> {
    /// Takes weights from `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, weights_bytes: 0 }
    }

    fn tensor(&mut self, values: Vec<f32>, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        self.weights_bytes += values.len() * size_of::<f32>();
        Tensor::from_vec(values, (rows, cols), &Device::Cpu).map_err(player)
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Tensor, ModelError> {
        self.weights_bytes += values.len() * size_of::<f32>();
        let n = values.len();
        Tensor::from_vec(values, n, &Device::Cpu).map_err(player)
    }
}

fn checkpoint_error(error: CheckpointError) -> ModelError {
    ModelError::player(error)
}

impl Build<Candle> for CandleBuild<'_> {
    fn tables(&mut self) -> Result<CandleTables, ModelError> {
        let spec = self.checkpoint.architecture().clone();
        let weights = self.checkpoint.tables().map_err(checkpoint_error)?;
        let d_model = spec.d_model;
        let token_type = match &weights.token_type {
            Some(table) => Some(self.tensor(table.to_f32(d_model), spec.n_token_types, d_model)?),
            None => None,
        };
        Ok(CandleTables {
            word: self.tensor(weights.word.to_f32(d_model), spec.vocab_size, d_model)?,
            position: self.tensor(weights.position.to_f32(d_model), spec.positions.table_len, d_model)?,
            token_type,
            positions: spec.positions,
        })
    }

    fn norm(&mut self, slot: NormSlot) -> Result<CandleNorm, ModelError> {
        let weights = self.checkpoint.norm(slot).map_err(checkpoint_error)?;
        Ok(CandleNorm { gain: self.vector(weights.gain)?, bias: self.vector(weights.bias)?, eps: weights.eps })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<CandleLinear, ModelError> {
        let weights = self.checkpoint.linear(slot).map_err(checkpoint_error)?;
        let (n_out, n_in) = (weights.n_out, weights.n_in);
        Ok(CandleLinear {
            slot,
            weight: self.tensor(weights.weight.to_f32(n_in), n_out, n_in)?,
            bias: self.vector(weights.bias)?,
        })
    }
}

/// The f32 model of a checkpoint.
///
/// # Errors
/// Naming the tensor that is missing or damaged.
pub fn candle_model(checkpoint: &Checkpoint) -> Result<Model<Candle>, ModelError> {
    let architecture: Architecture = checkpoint.architecture().clone();
    let mut build = CandleBuild::new(checkpoint);
    let encoder = Encoder::build(&architecture, &mut build)?;
    let ops = Candle { weights_bytes: build.weights_bytes };
    let memory = |ops: &Candle| ForwardMemory { weights: ops.weights_bytes, ..ForwardMemory::default() };
    Ok(Model::new(architecture.into(), encoder.into(), ops, GROUP_TOKENS, memory))
}
