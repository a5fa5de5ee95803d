//! From a checkpoint to a model with its player, behind the erased face.

use std::sync::Arc;

use super::candle::{CandleBuild, CandleF32, GROUP_TOKENS, memory};
use crate::checkpoint::Checkpoint;
use crate::model::{Encoder, Model, ModelError};

/// The f32 model of a checkpoint; quantized weights are expanded.
///
/// # Errors
/// Naming the tensor that is missing or damaged.
pub fn candle_model(checkpoint: &Checkpoint) -> Result<Model<CandleF32>, ModelError> {
    let architecture = Arc::new(checkpoint.architecture().clone());
    let encoder = Encoder::build(&architecture, &mut CandleBuild::new(checkpoint))?;
    Ok(Model::new(architecture, encoder.into(), CandleF32, GROUP_TOKENS, memory))
}
