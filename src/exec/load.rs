//! From a checkpoint to a model with its player, behind the erased face.

use std::sync::Arc;

use super::candle::{CandleBuild, CandleF32, GROUP_TOKENS, memory};
use super::int8::Int8;
use super::int8_build::{GROUP_TOKENS as INT8_GROUP_TOKENS, Int8Model};
use crate::checkpoint::Checkpoint;
use crate::kernels::threads::Cores;
use crate::kernels::{Isa, IsaName, KernelSet};
use crate::model::{Encoder, Head, Model, ModelError};

/// The f32 model of a checkpoint; quantized weights are expanded.
///
/// # Errors
/// Naming the tensor that is missing or damaged.
pub fn candle_model(checkpoint: &Checkpoint) -> Result<Model<CandleF32>, ModelError> {
    let architecture = Arc::new(checkpoint.architecture().clone());
    let mut build = CandleBuild::new(checkpoint);
    let encoder = Encoder::build(&architecture, &mut build)?;
    let head = Head::build(&architecture, &mut build)?.map(Arc::new);
    Ok(Model::new(architecture, encoder.into(), CandleF32, GROUP_TOKENS, memory).with_head(head))
}

/// The serving player's surroundings on this machine: its kernels and its computing threads.
#[derive(Debug, Clone)]
pub struct Runtime {
    isa: Isa,
    cores: Arc<Cores>,
}

impl Runtime {
    /// Kernels of `isa` on `n_threads` threads.
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(isa: Isa, n_threads: usize) -> std::io::Result<Self> {
        Ok(Self { isa, cores: Arc::new(Cores::new(n_threads)?) })
    }

    /// The kernels that give the same bits on every machine, on the same threads.
    ///
    /// # Panics
    /// Never: every machine has them.
    #[must_use]
    pub fn portable(&self) -> Self {
        let isa = Isa::force(IsaName::Portable).expect("the portable kernels run everywhere");
        Self { isa, cores: Arc::clone(&self.cores) }
    }

    /// The kernels' instruction set.
    #[must_use]
    pub(super) fn isa(&self) -> Isa {
        self.isa
    }

    /// Instruction set and threads, for reports.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{} threads, {}", self.cores.n_cores(), self.isa)
    }

    /// The INT8 player of a checkpoint, as `serve` runs it.
    ///
    /// # Errors
    /// Naming the tensor that is missing or damaged.
    pub fn player(&self, checkpoint: &Arc<Checkpoint>) -> Result<Model<Int8>, ModelError> {
        let model = Int8Model::load(checkpoint, KernelSet::new(self.isa))?;
        Ok(model.worker(Arc::clone(&self.cores), INT8_GROUP_TOKENS))
    }
}
