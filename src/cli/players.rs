//! Which player runs a model, on which instruction set, with how many threads.

use std::sync::Arc;

use anyhow::Context;

use super::args::{ModelArgs, Precision};
use crate::checkpoint::Checkpoint;
use crate::exec::candle_model;
use crate::exec::int8_build::{GROUP_TOKENS, Int8Model};
use crate::kernels::threads::Cores;
use crate::kernels::{Isa, IsaName, KernelSet};
use crate::model::{Forward, Model, Ops};
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

/// The computing threads that the flags ask for.
pub(super) fn cores(args: &ModelArgs) -> anyhow::Result<Arc<Cores>> {
    Ok(Arc::new(Cores::new(n_threads(args)).context("computing threads")?))
}

/// What a model's players give of each sequence.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// What `serve` answers with: scores, if the model has a classification head.
    Answers,
    /// Embeddings: a classifier's are what its head reads.
    Embeddings,
}

/// Makes `n_workers` players of a model.
pub(super) fn load(checkpoint: &Arc<Checkpoint>, args: &ModelArgs, n_workers: usize) -> anyhow::Result<Loaded> {
    load_on(checkpoint, args, n_workers, || cores(args))
}

/// Makes `n_workers` players of a model without its classification head: what is compared are embeddings, as in the quality
/// that an artefact records.
pub(super) fn load_encoder(checkpoint: &Arc<Checkpoint>, args: &ModelArgs, n_workers: usize) -> anyhow::Result<Loaded> {
    load_rows(checkpoint, args, n_workers, Rows::Embeddings, || cores(args))
}

/// Makes `n_workers` players of a model that compute on `cores`, which several models may share: a seat is a seat,
/// whichever model's worker takes it.
pub(super) fn load_on(
    checkpoint: &Arc<Checkpoint>,
    args: &ModelArgs,
    n_workers: usize,
    cores: impl FnOnce() -> anyhow::Result<Arc<Cores>>,
) -> anyhow::Result<Loaded> {
    load_rows(checkpoint, args, n_workers, Rows::Answers, cores)
}

fn load_rows(
    checkpoint: &Arc<Checkpoint>,
    args: &ModelArgs,
    n_workers: usize,
    rows: Rows,
    cores: impl FnOnce() -> anyhow::Result<Arc<Cores>>,
) -> anyhow::Result<Loaded> {
    let isa = match &args.isa {
        Some(name) => name.parse::<IsaName>().and_then(Isa::force).context("--isa")?,
        None => Isa::detect(),
    };
    let kernels = KernelSet::new(isa);
    let n_threads = n_threads(args);
    let workers: Vec<Box<dyn Forward>> = match args.precision {
        Precision::Int8 => {
            let model = Int8Model::load(checkpoint, kernels)?;
            several(model.worker(cores()?, GROUP_TOKENS), n_workers, rows)
        }
        Precision::F32 => several(candle_model(checkpoint)?, n_workers, rows),
    };
    Ok(Loaded { workers, kernels, isa: isa.to_string(), n_threads })
}

/// `n` of a model, which share its weights.
fn several<O: Ops + Clone + Send + 'static>(model: Model<O>, n: usize, rows: Rows) -> Vec<Box<dyn Forward>>
where
    Model<O>: Forward,
{
    let model = if rows == Rows::Embeddings { model.with_head(None) } else { model };
    let others: Vec<Model<O>> = (1..n).map(|_| model.another()).collect();
    std::iter::once(model).chain(others).map(|model| Box::new(model) as Box<dyn Forward>).collect()
}
