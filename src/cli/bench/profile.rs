//! Where the time of a forward goes.

use std::sync::Arc;

use anyhow::Context;
use serde_json::{Value, json};

use super::super::args::ModelArgs;
use super::super::players;
use crate::checkpoint::Checkpoint;
use crate::exec::int8_build::{GROUP_TOKENS, timed_model};
use crate::kernels::KernelSet;
use crate::kernels::threads::Cores;
use crate::model::{Forward, Outputs, RaggedBatch, Want};

/// Plays `batches` `rounds` times; microseconds per round and share of the whole for each operation.
pub(super) fn profile(
    checkpoint: &Arc<Checkpoint>,
    args: &ModelArgs,
    kernels: KernelSet,
    batches: &[RaggedBatch],
    rounds: usize,
) -> anyhow::Result<Vec<Value>> {
    let cores = Arc::new(Cores::new(players::n_threads(args)).context("computing threads")?);
    let mut model = timed_model(checkpoint, kernels, cores, GROUP_TOKENS)?;
    let mut out = Outputs::default();
    let mut play = |model: &mut crate::model::Model<_>| {
        batches.iter().try_for_each(|batch| model.forward(batch, Want::Pooled, &mut out))
    };
    play(&mut model)?;
    model.ops_mut().take_times();
    for _ in 0..rounds {
        play(&mut model)?;
    }
    let times = model.ops_mut().take_times();
    let total: f64 = times.iter().map(|(_, time)| time.as_secs_f64()).sum();
    let row = |(operation, time): (crate::exec::timed::Operation, std::time::Duration)| {
        let seconds = time.as_secs_f64();
        json!({"operation": operation.name(), "us": seconds * 1e6 / rounds as f64, "share": seconds / total})
    };
    Ok(times.into_iter().map(row).collect())
}
