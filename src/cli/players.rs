//! Which player runs a model, on which instruction set, with how many threads.

use std::sync::Arc;

use anyhow::Context;

use super::args::{ModelArgs, Precision};
use crate::checkpoint::Checkpoint;
use crate::exec::candle_model;
use crate::exec::int8_build::{GROUP_TOKENS, Int8Model};
use crate::kernels::threads::Cores;
use crate::kernels::{Isa, IsaName, KernelSet};
use crate::model::Forward;
use crate::telemetry::process;

/// Models ready to compute.
pub(super) struct Loaded {
    /// They share weights and the right to compute.
    pub(super) workers: Vec<Box<dyn Forward>>,
    /// Kernels of the INT8 player.
    pub(super) kernels: KernelSet,
    /// Name of the instruction set.
    pub(super) isa: String,
    /// Threads that compute.
    pub(super) n_threads: usize,
}

/// Threads that compute: what the flag says, else what the processor quota allows.
pub(super) fn n_threads(args: &ModelArgs) -> usize {
    args.threads.map_or_else(process::available_cpus, std::num::NonZeroUsize::get)
}

/// Makes `n_workers` players of a model.
pub(super) fn load(checkpoint: &Arc<Checkpoint>, args: &ModelArgs, n_workers: usize) -> anyhow::Result<Loaded> {
    let isa = match &args.isa {
        Some(name) => name.parse::<IsaName>().and_then(Isa::force).context("--isa")?,
        None => Isa::detect(),
    };
    let kernels = KernelSet::new(isa);
    let n_threads = n_threads(args);
    let workers: Vec<Box<dyn Forward>> = match args.precision {
        Precision::Int8 => {
            let model = Int8Model::load(checkpoint)?;
            let cores = Arc::new(Cores::new(n_threads).context("computing threads")?);
            (0..n_workers)
                .map(|_| Box::new(model.worker(kernels, Arc::clone(&cores), GROUP_TOKENS)) as Box<dyn Forward>)
                .collect()
        }
        Precision::F32 => {
            let model = candle_model(checkpoint)?;
            (0..n_workers).map(|_| Box::new(model.another()) as Box<dyn Forward>).collect()
        }
    };
    Ok(Loaded { workers, kernels, isa: isa.to_string(), n_threads })
}
