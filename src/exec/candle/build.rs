//! Weights into candle tensors, as constants or as variables of a gradient.

use candle_core::{DType, Device, Tensor, Var};

use super::{CandleLinear, CandleNorm, CandleTables};
use crate::checkpoint::{Checkpoint, CheckpointError, LinearWeights, NormWeights, TableWeights};
use crate::model::{Architecture, Build, HeadSlot, LinearSlot, ModelError, NormSlot, Ops};

/// Something that holds a whole model's weights: a directory, or a model under work in memory.
pub trait WeightSource {
    /// The model's shape.
    fn architecture(&self) -> &Architecture;
    /// A linear layer.
    ///
    /// # Errors
    /// If it cannot be read.
    fn linear(&self, slot: LinearSlot) -> Result<LinearWeights<'_>, CheckpointError>;
    /// A LayerNorm.
    ///
    /// # Errors
    /// If it cannot be read.
    fn norm(&self, slot: NormSlot) -> Result<NormWeights, CheckpointError>;
    /// A linear layer of the classification head.
    ///
    /// # Errors
    /// If it cannot be read.
    fn head(&self, slot: HeadSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        Err(CheckpointError::MissingTensor(slot.to_string()))
    }
    /// The embedding tables.
    ///
    /// # Errors
    /// If they cannot be read.
    fn tables(&self) -> Result<TableWeights<'_>, CheckpointError>;
}

impl WeightSource for Checkpoint {
    fn architecture(&self) -> &Architecture {
        self.architecture()
    }

    fn linear(&self, slot: LinearSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        self.linear(slot)
    }

    fn norm(&self, slot: NormSlot) -> Result<NormWeights, CheckpointError> {
        self.norm(slot)
    }

    fn head(&self, slot: HeadSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        self.head(slot)
    }

    fn tables(&self) -> Result<TableWeights<'_>, CheckpointError> {
        self.tables()
    }
}

/// Builds encoders for the f32 player and for every decorator that keeps its handles. Stored INT8 is dequantized.
pub struct CandleBuild<'a> {
    source: &'a dyn WeightSource,
    trainable: bool,
    dtype: DType,
    vars: Vec<(String, Var)>,
}

impl std::fmt::Debug for CandleBuild<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CandleBuild").field("trainable", &self.trainable).finish_non_exhaustive()
    }
}

impl<'a> CandleBuild<'a> {
    /// Weights as constants.
    #[must_use]
    pub fn new(source: &'a dyn WeightSource) -> Self {
        Self { source, trainable: false, dtype: DType::F32, vars: Vec::new() }
    }

    /// Weights as f64 constants: the whole forward is played in f64, in which the order of sums, which depends on the
    /// machine, does not show in results rounded to f32.
    #[must_use]
    pub fn double(source: &'a dyn WeightSource) -> Self {
        Self { source, trainable: false, dtype: DType::F64, vars: Vec::new() }
    }

    /// Weights as variables: gradients reach every one of them.
    #[must_use]
    pub fn trainable(source: &'a dyn WeightSource) -> Self {
        Self { source, trainable: true, dtype: DType::F32, vars: Vec::new() }
    }

    /// The variables handed out so far, with names to tell them by.
    #[must_use]
    pub fn vars(&self) -> &[(String, Var)] {
        &self.vars
    }

    fn tensor(&mut self, name: String, values: Vec<f32>, shape: &[usize]) -> Result<Tensor, ModelError> {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)
            .and_then(|tensor| tensor.to_dtype(self.dtype))
            .map_err(ModelError::player)?;
        if !self.trainable {
            return Ok(tensor);
        }
        let var = Var::from_tensor(&tensor).map_err(ModelError::player)?;
        let tensor = var.as_tensor().clone();
        self.vars.push((name, var));
        Ok(tensor)
    }
}

impl<O> Build<O> for CandleBuild<'_>
where
    O: Ops<Tables = CandleTables, Linear = CandleLinear, Norm = CandleNorm>,
{
    fn tables(&mut self) -> Result<CandleTables, ModelError> {
        let source = self.source;
        let spec = source.architecture();
        let tables = source.tables().map_err(ModelError::player)?;
        let width = spec.d_model;
        let word = self.tensor("word embedding".into(), tables.word.to_f32(width), &[spec.vocab_size, width])?;
        let rows = [spec.positions.table_len, width];
        let position = self.tensor("position embedding".into(), tables.position.to_f32(width), &rows)?;
        let token_type = match &tables.token_type {
            None => None,
            Some(table) => {
                let rows = [spec.n_token_types, width];
                Some(self.tensor("token type embedding".into(), table.to_f32(width), &rows)?)
            }
        };
        Ok(CandleTables { word, position, token_type, positions: spec.positions })
    }

    fn norm(&mut self, slot: NormSlot) -> Result<CandleNorm, ModelError> {
        let NormWeights { gain, bias, eps } = self.source.norm(slot).map_err(ModelError::player)?;
        let width = gain.len();
        let gain = self.tensor(format!("{slot:?} gain"), gain, &[width])?;
        let bias = self.tensor(format!("{slot:?} bias"), bias, &[width])?;
        Ok(CandleNorm { slot, gain, bias, eps })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<CandleLinear, ModelError> {
        let LinearWeights { n_out, n_in, weight, bias } = self.source.linear(slot).map_err(ModelError::player)?;
        let weight = self.tensor(format!("{slot} weight"), weight.to_f32(n_in), &[n_out, n_in])?;
        let bias = self.tensor(format!("{slot} bias"), bias, &[n_out])?;
        Ok(CandleLinear { slot, weight, bias })
    }

    fn head(&mut self, slot: HeadSlot) -> Result<CandleLinear, ModelError> {
        let LinearWeights { n_out, n_in, weight, bias } = self.source.head(slot).map_err(ModelError::player)?;
        let last = self.source.architecture().layers.len() - 1;
        let weight = self.tensor(format!("{slot} weight"), weight.to_f32(n_in), &[n_out, n_in])?;
        let bias = self.tensor(format!("{slot} bias"), bias, &[n_out])?;
        Ok(CandleLinear { slot: LinearSlot::FfnDown(last), weight, bias })
    }
}
