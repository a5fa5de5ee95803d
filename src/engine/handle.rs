//! The engine's handle: what the service calls.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};

use super::admission::{Admission, Ask, DrainRate};
use super::error::{EngineError, StartError};
use super::limits::EngineLimits;
use super::pending::{Answer, Job, Pending};
use super::queue::{Queue, Taken};
use super::request::{Reply, Sequence, Submission};
use super::worker::Worker;
use crate::model::{Architecture, Forward, ModelError, Want};
use crate::telemetry::{ExpiryStage, MemoryKind, Metrics, ModelCounters, QueueReading, Stage, events};

/// A running engine; clones are handles to the same one. The workers end when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    _stop: Arc<StopOnDrop>,
}

/// What is in the engine at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequences of submissions admitted and not answered.
    pub admitted_sequences: usize,
    /// Bytes set aside for them.
    pub admitted_bytes: usize,
    /// Sequences that wait for a worker.
    pub queued_sequences: usize,
    /// Tokens that wait for a worker.
    pub queued_tokens: usize,
    /// Sequences that are being computed, those of clients that have left included.
    pub running_sequences: usize,
}

/// Bytes a worker's model holds, as of its last batch.
#[derive(Debug, Default)]
struct WorkerMemory {
    weights: AtomicUsize,
    workspace: AtomicUsize,
    workspace_peak: AtomicUsize,
}

/// What handles and workers share.
#[derive(Debug)]
pub(crate) struct Shared {
    limits: EngineLimits,
    architecture: Architecture,
    /// Numbers of a reply's pooled row.
    width: usize,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) counters: ModelCounters,
    state: Mutex<State>,
    /// Something waits, or the workers shall stop.
    work: Condvar,
    /// The engine may have become empty.
    emptied: Notify,
    died: Notify,
    alive: AtomicBool,
    memory: Box<[WorkerMemory]>,
}

#[derive(Debug)]
struct State {
    queue: Queue<Job>,
    admission: Admission,
    drain: DrainRate,
    running_sequences: usize,
    running_tokens: usize,
    /// Workers between taking something and asking for the next; the others are free, also while they wake up.
    busy_workers: usize,
    workers_left: usize,
    /// No new submissions.
    closed: bool,
    /// No new batches.
    stopped: bool,
}

impl State {
    fn idle_workers(&self) -> usize {
        self.workers_left - self.busy_workers
    }

    fn is_empty(&self) -> bool {
        self.admission.used().0 == 0 && self.running_sequences == 0
    }
}

#[derive(Debug)]
struct StopOnDrop(Arc<Shared>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.state().stopped = true;
        self.0.work.notify_all();
    }
}

impl Engine {
    /// The engine of a process that serves one model.
    ///
    /// # Errors
    /// As [`Engine::start_named`].
    pub fn start(
        workers: Vec<Box<dyn Forward>>,
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StartError> {
        Self::start_named("model", workers, limits, metrics)
    }

    /// Starts one named thread per worker; `name` is the model's in metrics.
    ///
    /// # Errors
    /// [`StartError`] if there is no worker, a limit is zero, or the system gives no thread.
    pub fn start_named(
        name: &str,
        workers: Vec<Box<dyn Forward>>,
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StartError> {
        limits.check()?;
        let first = workers.first().ok_or(StartError::NoWorkers)?;
        let (architecture, width) = (first.architecture().clone(), first.width());
        let n_workers = workers.len();
        let memory: Box<[WorkerMemory]> = workers.iter().map(|_| WorkerMemory::default()).collect();
        let state = State {
            queue: Queue::new(limits.policy()),
            admission: Admission::new(limits.admission()),
            drain: DrainRate::new(Instant::now()),
            running_sequences: 0,
            running_tokens: 0,
            busy_workers: 0,
            workers_left: n_workers,
            closed: false,
            stopped: false,
        };
        let shared = Arc::new(Shared {
            limits,
            architecture,
            width,
            counters: metrics.model_counters(name),
            metrics,
            state: Mutex::new(state),
            work: Condvar::new(),
            emptied: Notify::new(),
            died: Notify::new(),
            alive: AtomicBool::new(true),
            memory,
        });
        shared.tell_memory();
        shared.tell_queue(name);
        let engine = Self { _stop: Arc::new(StopOnDrop(Arc::clone(&shared))), shared };
        for (index, model) in workers.into_iter().enumerate() {
            engine.shared.note_memory(index, &*model);
            let worker = Worker::new(index, Arc::clone(&engine.shared), model);
            thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || worker.run())
                .map_err(StartError::Thread)?;
        }
        let limits = &engine.shared.limits;
        events::engine_started(name, n_workers, limits.max_queue_tokens, limits.max_concurrent_requests);
        Ok(engine)
    }

    /// Runs a submission. Dropping the future cancels it: what waits leaves the queue at once, what runs is computed for
    /// nobody. Every outcome is counted here.
    ///
    /// # Errors
    /// See [`EngineError`]. The deadline, if there is one, holds for the whole call.
    pub async fn submit(&self, work: Submission) -> Result<Reply, EngineError> {
        let answer = self.shared.submit(work).await;
        let metrics = &self.shared.metrics;
        match &answer {
            Ok(reply) => {
                events::stage_passed(metrics, Stage::Queue, reply.queue);
                events::stage_passed(metrics, Stage::Infer, reply.infer);
            }
            Err(EngineError::DeadlineExceeded { stage, .. }) => events::expired(metrics, *stage),
            Err(error) => match error.reject_reason() {
                Some(reason) => events::rejected(metrics, reason),
                None => events::inference_failed(metrics, error),
            },
        }
        answer
    }

    /// Takes no more submissions; what was admitted still runs.
    pub fn close(&self) {
        self.shared.state().closed = true;
    }

    /// Resolves when nothing is admitted and nothing runs. (Without [`Engine::close`] that may change again.)
    pub async fn drained(&self) {
        self.shared.until(&self.shared.emptied, || self.shared.state().is_empty()).await;
    }

    /// Whether all workers are well.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// Resolves when a worker has died. Its memory may be anything: the process should end.
    pub async fn died(&self) {
        self.shared.until(&self.shared.died, || !self.is_alive()).await;
    }

    /// What is in the engine now.
    #[must_use]
    pub fn load(&self) -> Load {
        let state = self.shared.state();
        let (admitted_sequences, admitted_bytes) = state.admission.used();
        Load {
            admitted_sequences,
            admitted_bytes,
            queued_sequences: state.queue.len(),
            queued_tokens: state.queue.tokens(),
            running_sequences: state.running_sequences,
        }
    }

    /// The limits it was started with.
    #[must_use]
    pub fn limits(&self) -> &EngineLimits {
        &self.shared.limits
    }

    /// Tokens per second that the workers have finished together while working; `None` before the first batch.
    #[must_use]
    pub fn tokens_per_second(&self) -> Option<f64> {
        self.shared.state().drain.tokens_per_second()
    }
}

/// What a submission holds, from admission until its future ends.
struct Admitted<'a> {
    shared: &'a Shared,
    ask: Ask,
    tickets: Range<u64>,
    /// Whether the submission's future has come to an end of its own.
    answered: bool,
}

impl Admitted<'_> {
    /// Removes what still waits; returns how many sequences that were.
    fn withdraw(&self) -> usize {
        let withdrawn = self.shared.state().queue.cancel(&self.tickets);
        withdrawn.len()
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        if !self.answered {
            events::cancelled(&self.shared.metrics);
        }
        let mut state = self.shared.state();
        let withdrawn = state.queue.cancel(&self.tickets);
        state.admission.release(self.ask);
        self.shared.tell_emptied(&state);
        drop(state);
        drop(withdrawn);
    }
}

impl Shared {
    /// The lock is never held while anything can panic but arithmetic on our own counts.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn until(&self, changed: &Notify, done: impl Fn() -> bool) {
        loop {
            let notified = changed.notified();
            tokio::pin!(notified);
            // Registered before looking, so that a change in between is not missed.
            notified.as_mut().enable();
            if done() {
                return;
            }
            notified.await;
        }
    }

    async fn submit(&self, work: Submission) -> Result<Reply, EngineError> {
        let arrived = Instant::now();
        let ask = self.check(&work)?;
        let deadline = work.deadline.or_else(|| arrived.checked_add(self.limits.default_timeout?));
        if deadline.is_some_and(|deadline| deadline <= arrived) {
            return Err(EngineError::DeadlineExceeded { stage: ExpiryStage::Admission, waited: Duration::ZERO });
        }
        let (tickets, answer) = self.admit(ask, work, arrived, deadline)?;
        let mut admitted = Admitted { shared: self, ask, tickets, answered: false };
        let answer = match deadline {
            None => answer.await,
            Some(deadline) => match timeout_at(deadline, answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    let all_waited = admitted.withdraw() == ask.sequences;
                    let stage = if all_waited { ExpiryStage::Queue } else { ExpiryStage::Infer };
                    Ok(Err(EngineError::DeadlineExceeded { stage, waited: arrived.elapsed() }))
                }
            },
        };
        admitted.answered = true;
        // The channel closes without an answer if a dying worker takes a sequence with it.
        answer.unwrap_or(Err(EngineError::WorkerDied))
    }

    /// Everything about a submission that does not depend on the others. A sequence that the model would refuse is
    /// refused here, so that it cannot fail a batch.
    fn check(&self, work: &Submission) -> Result<Ask, EngineError> {
        if work.sequences.is_empty() {
            return Err(EngineError::Empty);
        }
        let (pooled_bytes, token_bytes) = (self.width * size_of::<f32>(), self.architecture.d_model * size_of::<f32>());
        let mut ask = Ask { sequences: work.sequences.len(), tokens: 0, bytes: 0 };
        for sequence in &work.sequences {
            self.check_sequence(sequence)?;
            let n_tokens = sequence.ids.len();
            let reply = match work.want {
                Want::Pooled => pooled_bytes,
                Want::PooledAndTokens => pooled_bytes.saturating_add(n_tokens.saturating_mul(token_bytes)),
            };
            ask.tokens = ask.tokens.saturating_add(n_tokens);
            ask.bytes = ask.bytes.saturating_add(size_of_val(&*sequence.ids) + sequence.token_types.len());
            ask.bytes = ask.bytes.saturating_add(reply);
        }
        Admission::check(&self.limits.admission(), ask)?;
        Ok(ask)
    }

    fn check_sequence(&self, sequence: &Sequence) -> Result<(), EngineError> {
        let Sequence { ids, token_types } = sequence;
        let architecture = &self.architecture;
        if ids.is_empty() {
            return Err(ModelError::EmptySequence.into());
        }
        if ids.len() > architecture.max_input_tokens {
            return Err(ModelError::SequenceTooLong { got: ids.len(), limit: architecture.max_input_tokens }.into());
        }
        if ids.len() > self.limits.max_batch_tokens {
            return Err(EngineError::TooLarge { tokens: ids.len(), limit: self.limits.max_batch_tokens });
        }
        let vocab_size = architecture.vocab_size;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { id, vocab_size }.into());
        }
        if !token_types.is_empty() && token_types.len() != ids.len() {
            return Err(ModelError::TokenTypes { expected: ids.len(), got: token_types.len() }.into());
        }
        let n_token_types = architecture.n_token_types.max(1);
        if let Some(&token_type) = token_types.iter().find(|&&token_type| usize::from(token_type) >= n_token_types) {
            return Err(ModelError::TokenTypeOutOfRange { token_type, n_token_types }.into());
        }
        Ok(())
    }

    /// Takes all of `ask` and queues the sequences, or nothing. No handle to the [`Pending`] stays here: the channel
    /// must close when the workers have let go of it.
    fn admit(
        &self,
        ask: Ask,
        work: Submission,
        arrived: Instant,
        deadline: Option<Instant>,
    ) -> Result<(Range<u64>, oneshot::Receiver<Answer>), EngineError> {
        let (pending, answer) = Pending::new(ask.sequences, work.want, arrived);
        let mut state = self.state();
        if state.workers_left == 0 {
            return Err(EngineError::WorkerDied);
        }
        let outstanding = state.queue.tokens() + state.running_tokens;
        if state.closed {
            return Err(EngineError::Draining { retry_after: state.drain.retry_after(outstanding) });
        }
        let queued_tokens = state.queue.tokens();
        if let Err(reason) = state.admission.admit(ask, queued_tokens) {
            return Err(EngineError::Overloaded { reason, retry_after: state.drain.retry_after(outstanding) });
        }
        let start = state.queue.next_ticket();
        for (index, sequence) in work.sequences.into_iter().enumerate() {
            let n_tokens = sequence.ids.len();
            events::sequence_admitted(&self.metrics, n_tokens);
            state.queue.push(n_tokens, deadline, Job { pending: Arc::clone(&pending), index, sequence });
        }
        let tickets = start..state.queue.next_ticket();
        if state.idle_workers() > 0 {
            self.work.notify_one();
        }
        Ok((tickets, answer))
    }

    /// For a worker: ends what it took last, if anything, and waits for the next, which it finds in `jobs`, or for
    /// expired sequences, which it finds in `shed`. `None` when the worker shall end.
    pub(crate) fn next(&self, last: Option<Taken>, jobs: &mut Vec<Job>, shed: &mut Vec<Job>) -> Option<Taken> {
        let mut state = self.state();
        if let Some(last) = last {
            self.end(&mut state, last, last.n_tokens);
        }
        loop {
            if state.stopped {
                return None;
            }
            let now = Instant::now();
            let idle_workers = state.idle_workers();
            let seconds_per_token = state.drain.tokens_per_second().map(|rate| state.workers_left as f64 / rate);
            let horizon = state.queue.horizon(now, idle_workers, seconds_per_token);
            let taken = state.queue.take(horizon, idle_workers, jobs, shed);
            if !jobs.is_empty() || !shed.is_empty() {
                state.busy_workers += 1;
                if taken.n_seqs > 0 {
                    state.running_sequences += taken.n_seqs;
                    state.running_tokens += taken.n_tokens;
                    state.drain.started(now);
                }
                // Each worker wakes the next while there is something left: one submission wakes as many as it needs.
                if state.queue.len() > 0 && state.idle_workers() > 0 {
                    self.work.notify_one();
                }
                return Some(taken);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, state: &mut State, last: Taken, drained_tokens: usize) {
        state.busy_workers -= 1;
        if last.n_seqs > 0 {
            state.running_sequences -= last.n_seqs;
            state.running_tokens -= last.n_tokens;
            state.drain.finished(drained_tokens, Instant::now());
            self.tell_emptied(state);
        }
    }

    /// A worker panicked, with `last` under way. Returns the sequences that nobody will run any more.
    pub(crate) fn worker_died(&self, index: usize, last: Option<Taken>) -> Vec<Job> {
        self.alive.store(false, Ordering::Release);
        let mut state = self.state();
        if let Some(last) = last {
            self.end(&mut state, last, 0);
        }
        state.workers_left -= 1;
        let workers_left = state.workers_left;
        let all = 0..state.queue.next_ticket();
        let orphans = if workers_left == 0 { state.queue.cancel(&all) } else { Vec::new() };
        drop(state);
        events::worker_died(&self.metrics, index, workers_left);
        self.died.notify_waiters();
        orphans
    }

    /// Has the queue metrics read this queue, as long as it is there.
    fn tell_queue(self: &Arc<Self>, name: &str) {
        let shared: Weak<Self> = Arc::downgrade(self);
        self.metrics.queue_source(name, move || {
            let shared = shared.upgrade()?;
            let state = shared.state();
            let (depth, tokens) = (state.queue.len(), state.queue.tokens());
            drop(state);
            let EngineLimits { max_queue_tokens: capacity, max_concurrent_requests: inputs, .. } = shared.limits;
            Some(QueueReading { depth, tokens, capacity, inputs })
        });
    }

    fn tell_emptied(&self, state: &State) {
        if state.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Called by a worker after each batch.
    pub(crate) fn note_memory(&self, worker: usize, model: &dyn Forward) {
        let held = model.memory();
        let note = &self.memory[worker];
        note.weights.store(held.weights, Ordering::Relaxed);
        note.workspace.store(held.workspace, Ordering::Relaxed);
        note.workspace_peak.store(held.workspace_peak, Ordering::Relaxed);
    }

    /// Has the memory metrics read the workers' notes.
    fn tell_memory(self: &Arc<Self>) {
        let source = |kind, read: fn(&[WorkerMemory]) -> usize| {
            let shared: Weak<Self> = Arc::downgrade(self);
            self.metrics.memory_source(kind, move || Some(read(&shared.upgrade()?.memory) as u64));
        };
        // All workers share one set of weights.
        source(MemoryKind::Weights, |all| {
            all.iter().map(|note| note.weights.load(Ordering::Relaxed)).max().unwrap_or(0)
        });
        source(MemoryKind::Workspace, |all| all.iter().map(|note| note.workspace.load(Ordering::Relaxed)).sum());
        source(MemoryKind::WorkspacePeak, |all| {
            all.iter().map(|note| note.workspace_peak.load(Ordering::Relaxed)).sum()
        });
    }
}
