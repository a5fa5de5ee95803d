//! Models of straw and a farm of them.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use niwaki::engine::{Engine, EngineError, EngineLimits, Load, Reply, Sequence, Submission};
use niwaki::model::{
    Activation, Architecture, ArchitectureSpec, Band, Family, Forward, ForwardMemory, LayerConfig, ModelError, Outputs,
    Pooling, Positions, RaggedBatch, Want,
};
use niwaki::telemetry::Metrics;
use niwaki::telemetry::allocator::thread_allocations;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Ids with a meaning for [`Straw`].
pub(crate) const PANIC: u32 = 990;
pub(crate) const FAIL: u32 = 991;
pub(crate) const NAN: u32 = 992;
pub(crate) const VOCAB: usize = 1000;
const D_MODEL: usize = 3;

fn architecture() -> Architecture {
    Architecture::new(ArchitectureSpec {
        ranges: Vec::new(),
        family: Family::Bert,
        vocab_size: VOCAB,
        n_token_types: 2,
        positions: Positions { table_len: 512, offset: 0, tiled: false },
        d_model: D_MODEL,
        norm_eps: 1e-12,
        activation: Activation::Gelu,
        layers: vec![LayerConfig { n_heads: 1, d_head: 16, d_ffn: 16, band: Band::FULL }],
        pooling: Pooling::Mean,
        normalize: true,
        max_input_tokens: 512,
        head: None,
    })
    .unwrap()
}

/// A door that models wait at.
#[derive(Default)]
pub(crate) struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
    pub(crate) n_waiting: AtomicUsize,
}

impl Gate {
    pub(crate) fn pass(&self) {
        self.n_waiting.fetch_add(1, SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
        self.n_waiting.fetch_sub(1, SeqCst);
    }

    pub(crate) fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// What the models of a test have in common.
#[derive(Default)]
pub(crate) struct Field {
    pub(crate) gate: Gate,
    /// Batches in the order they were started: the lengths of their sequences.
    pub(crate) batches: Mutex<Vec<Vec<usize>>>,
    pub(crate) record: bool,
    pub(crate) nanos_per_token: u64,
    pub(crate) n_dropped: AtomicUsize,
    /// Allocations of a worker's thread between two batches, and the rows it had handed out.
    pub(crate) allocations: Mutex<Vec<(u64, usize)>>,
}

/// A model whose pooled row is `[Σ ids, n_tokens, Σ types]` and whose token row is `[id, position, type]`.
struct Straw {
    architecture: Architecture,
    pub(crate) field: Arc<Field>,
    last: Option<(u64, usize)>,
}

#[derive(Debug)]
struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("straw broke")
    }
}

impl Error for Broken {}

impl Forward for Straw {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn forward(&mut self, batch: &RaggedBatch, want: Want, out: &mut Outputs) -> Result<(), ModelError> {
        let allocations_before = thread_allocations();
        if self.field.record {
            let lens = (0..batch.n_seqs()).map(|index| batch.sequence(index).len()).collect();
            self.field.batches.lock().unwrap().push(lens);
            if let Some((allocations, n_rows)) = self.last {
                self.field.allocations.lock().unwrap().push((allocations_before - allocations, n_rows));
            }
        }
        self.field.gate.pass();
        let end = Instant::now() + Duration::from_nanos(self.field.nanos_per_token * batch.n_tokens() as u64);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        out.pooled.clear();
        out.tokens.clear();
        let view = batch.view(0..batch.n_seqs());
        for rows in view.sequences() {
            let (ids, types) = (&view.ids()[rows.clone()], &view.token_types()[rows]);
            assert!(!ids.contains(&PANIC), "straw caught fire");
            if ids.contains(&FAIL) {
                return Err(ModelError::player(Broken));
            }
            let sum = if ids.contains(&NAN) { f32::NAN } else { ids.iter().sum::<u32>() as f32 };
            out.pooled.extend([sum, ids.len() as f32, types.iter().map(|&t| f32::from(t)).sum()]);
            if want == Want::PooledAndTokens {
                let rows = ids.iter().zip(types).enumerate();
                out.tokens.extend(rows.flat_map(|(at, (&id, &t))| [id as f32, at as f32, f32::from(t)]));
            }
        }
        self.last = Some((thread_allocations(), batch.n_seqs()));
        Ok(())
    }

    fn memory(&self) -> ForwardMemory {
        ForwardMemory { weights: 1000, workspace: 200, workspace_peak: 150 }
    }
}

impl Drop for Straw {
    fn drop(&mut self) {
        self.field.n_dropped.fetch_add(1, SeqCst);
    }
}

pub(crate) struct Farm {
    pub(crate) engine: Engine,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) field: Arc<Field>,
}

/// Limits that no test reaches unless it says so.
pub(crate) fn wide() -> EngineLimits {
    EngineLimits { max_concurrent_requests: 100_000, max_queue_tokens: 10_000_000, ..EngineLimits::default() }
}

pub(crate) fn start(n_workers: usize, limits: EngineLimits, field: Field) -> Farm {
    let field = Arc::new(field);
    let workers = (0..n_workers).map(|_| worker(&field)).collect();
    let metrics = Metrics::new();
    let engine = Engine::start(workers, limits, Arc::clone(&metrics)).unwrap();
    Farm { engine, metrics, field }
}

pub(crate) fn open() -> Field {
    let field = Field { record: true, ..Field::default() };
    field.gate.open();
    field
}

pub(crate) fn shut() -> Field {
    Field { record: true, ..Field::default() }
}

pub(crate) fn work(sequences: &[Vec<u32>]) -> Submission {
    let sequences = sequences.iter().cloned().map(Sequence::new).collect();
    Submission { sequences, want: Want::Pooled, deadline: None }
}

/// `n` sequences of `len` ids 1.
pub(crate) fn ones(n: usize, len: usize) -> Submission {
    work(&vec![vec![1; len]; n])
}

pub(crate) fn due(mut work: Submission, timeout: Duration) -> Submission {
    work.deadline = Some(Instant::now() + timeout);
    work
}

pub(crate) const MS: Duration = Duration::from_millis(1);

pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        sleep(MS).await;
    }
    panic!("{what}: not within 5 s");
}

impl Farm {
    pub(crate) fn spawn(&self, work: Submission) -> JoinHandle<Result<Reply, EngineError>> {
        let engine = self.engine.clone();
        tokio::spawn(async move { engine.submit(work).await })
    }

    /// Has `n` workers wait at the gate with a sequence of one token each; the gate must be shut.
    pub(crate) async fn occupy(&self, n: usize) -> Vec<JoinHandle<Result<Reply, EngineError>>> {
        let mut tasks = Vec::new();
        for already in 0..n {
            tasks.push(self.spawn(ones(1, 1)));
            until("a worker takes it", || self.field.gate.n_waiting.load(SeqCst) > already).await;
        }
        tasks
    }

    pub(crate) fn empty(&self) -> bool {
        self.engine.load() == Load::default() && self.metrics.queue() == (0, 0)
    }
}

/// One more worker of `field`.
pub(crate) fn worker(field: &Arc<Field>) -> Box<dyn Forward> {
    Box::new(Straw { architecture: architecture(), field: Arc::clone(field), last: None })
}
