//! A worker: a named thread that owns a model and runs one batch after another.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::time::Instant;

use super::error::EngineError;
use super::handle::Shared;
use super::pending::Job;
use super::queue::Taken;
use super::request::SequenceRows;
use crate::model::{Forward, ModelError, Outputs, RaggedBatch, Want};
use crate::telemetry::events::{self, BatchStats};

/// Token rows of a batch are kept for the next one up to this size; the default model's batches of a few hundred tokens
/// fit, and a single batch of long texts does not swell the process for ever.
const KEPT_TOKEN_ROWS_BYTES: usize = 4 << 20;

/// Batch, outputs and lists are reused: in the steady state a batch allocates nothing but the rows it hands out.
pub(crate) struct Worker {
    index: usize,
    shared: Arc<Shared>,
    model: Box<dyn Forward>,
    batch: RaggedBatch,
    out: Outputs,
    jobs: Vec<Job>,
    shed: Vec<Job>,
    /// What it took last and has not ended, as the queue counts it.
    taken: Option<Taken>,
}

impl Worker {
    pub(crate) fn new(index: usize, shared: Arc<Shared>, model: Box<dyn Forward>) -> Self {
        Self {
            index,
            shared,
            model,
            batch: RaggedBatch::new(),
            out: Outputs::default(),
            jobs: Vec::new(),
            shed: Vec::new(),
            taken: None,
        }
    }

    /// The thread's life. A panic ends it: the batch under way gets [`EngineError::WorkerDied`], and with the last
    /// worker all that waits does. The model is not used again, its state may be anything.
    pub(crate) fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.work()));
        if outcome.is_ok() {
            return;
        }
        let orphans = self.shared.worker_died(self.index, self.taken.take());
        for job in self.jobs.drain(..).chain(self.shed.drain(..)).chain(orphans) {
            job.pending.fail(EngineError::WorkerDied);
        }
    }

    fn work(&mut self) {
        while let Some(taken) = self.shared.next(self.taken.take(), &mut self.jobs, &mut self.shed) {
            self.taken = Some(taken);
            let now = Instant::now();
            for job in self.shed.drain(..) {
                job.pending.expire(now);
            }
            if taken.n_seqs > 0 {
                for job in &self.jobs {
                    job.pending.start();
                }
                self.run_jobs(now);
                self.shared.note_memory(self.index, &*self.model);
                if mem::size_of_val(&*self.out.tokens) > KEPT_TOKEN_ROWS_BYTES {
                    self.out.tokens = Vec::new();
                }
            }
        }
    }

    /// Runs `self.jobs` as one batch and answers them. If the batch fails, each runs alone, so that only those fail that
    /// cannot run.
    fn run_jobs(&mut self, taken_at: Instant) {
        let started = Instant::now();
        let result = self.forward();
        let finished = Instant::now();
        let compute = finished.saturating_duration_since(started);
        let waits = self.jobs.iter().map(|job| taken_at.saturating_duration_since(job.pending.admitted));
        let queue_wait = waits.max().unwrap_or_default();
        let (n_seqs, n_tokens) = (self.batch.n_seqs(), self.batch.n_tokens());
        events::batch_finished(
            &self.shared.metrics,
            &BatchStats { worker: self.index, n_seqs, n_tokens, queue_wait, compute },
        );
        match result {
            Ok(()) => {
                self.shared.counters.batch(n_seqs, n_tokens);
                let widths = Widths { pooled: self.model.width(), token: self.model.architecture().d_model };
                let view = self.batch.view(0..n_seqs);
                for (slot, job) in self.jobs.drain(..).enumerate() {
                    let queue = taken_at.saturating_duration_since(job.pending.admitted);
                    match rows(&self.out, slot, view.rows(slot), widths, job.pending.want) {
                        Some(rows) => job.pending.complete(job.index, rows, queue, compute),
                        None => job.pending.fail(EngineError::NotFinite),
                    }
                }
            }
            Err(error) if self.jobs.len() == 1 => {
                let job = self.jobs.pop().expect("there is one job");
                job.pending.fail(error.into());
            }
            Err(_) => {
                let mut all = mem::take(&mut self.jobs);
                for job in all.drain(..) {
                    self.jobs.push(job);
                    self.run_jobs(taken_at);
                }
            }
        }
    }

    /// The forward pass of `self.jobs`: rows for every token if any of them asks for it (reading them out costs little
    /// beside computing them).
    fn forward(&mut self) -> Result<(), ModelError> {
        self.batch.clear();
        let mut want = Want::Pooled;
        for job in &self.jobs {
            self.batch.push_typed(&job.sequence.ids, &job.sequence.token_types)?;
            if job.pending.want == Want::PooledAndTokens {
                want = Want::PooledAndTokens;
            }
        }
        self.model.forward(&self.batch, want, &mut self.out)
    }
}

/// Numbers of a row.
#[derive(Clone, Copy)]
struct Widths {
    pooled: usize,
    token: usize,
}

/// Copies the rows of sequence `slot` out; `None` if one of them is not finite.
///
/// # Panics
/// If the model gave fewer rows than it must: a defect of the model, which ends the worker.
fn rows(
    out: &Outputs,
    slot: usize,
    token_rows: std::ops::Range<usize>,
    widths: Widths,
    want: Want,
) -> Option<SequenceRows> {
    let cut =
        |all: &[f32], rows: std::ops::Range<usize>, width: usize| all[rows.start * width..rows.end * width].to_vec();
    let pooled = cut(&out.pooled, slot..slot + 1, widths.pooled);
    let tokens = match want {
        Want::Pooled => Vec::new(),
        Want::PooledAndTokens => cut(&out.tokens, token_rows, widths.token),
    };
    let finite = pooled.iter().chain(&tokens).all(|value| value.is_finite());
    finite.then_some(SequenceRows { pooled, tokens })
}
