//! Series of single models, and the sums over all of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec};

use super::ModelInfo;

/// What waits in a model's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueReading {
    /// Sequences.
    pub depth: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Tokens that may wait.
    pub capacity: usize,
    /// Inputs that may wait or be computed.
    pub inputs: usize,
}

/// Reads a queue; `None` when it is no more.
type Read = Box<dyn Fn() -> Option<QueueReading> + Send + Sync>;

/// Counters of one model, resolved once.
#[derive(Debug, Clone)]
pub struct ModelCounters {
    pub(super) sequences: IntCounter,
    pub(super) tokens: IntCounter,
}

impl ModelCounters {
    /// A batch of the model was computed.
    pub fn batch(&self, n_seqs: usize, n_tokens: usize) {
        self.sequences.inc_by(n_seqs as u64);
        self.tokens.inc_by(n_tokens as u64);
    }
}

/// The families with a label `model`, and what is read when they are shown.
pub(super) struct ModelSeries {
    pub(super) info: IntGaugeVec,
    pub(super) queue_depth: IntGaugeVec,
    pub(super) queue_tokens: IntGaugeVec,
    pub(super) queue_capacity: IntGaugeVec,
    pub(super) sequences: IntCounterVec,
    pub(super) tokens: IntCounterVec,
    pub(super) reloads: IntCounterVec,
    queues: Mutex<Vec<(String, Read)>>,
    state: Mutex<BTreeMap<String, State>>,
}

/// What was last said about a model.
#[derive(Default)]
struct State {
    info: Option<ModelInfo>,
    /// Lowest cosine, largest drift.
    selfcheck: Option<(f64, f64)>,
}

/// The label values of `niwaki_model_reloads_total`.
pub(super) const RELOAD_RESULTS: [&str; 2] = ["swapped", "refused"];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gauge_value(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl ModelSeries {
    /// The families, registered in this order: info, queue depth, tokens, capacity; sequences, tokens, reloads.
    pub(super) fn new(gauges: [IntGaugeVec; 4], counters: [IntCounterVec; 3]) -> Self {
        let [info, queue_depth, queue_tokens, queue_capacity] = gauges;
        let [sequences, tokens, reloads] = counters;
        Self {
            info,
            queue_depth,
            queue_tokens,
            queue_capacity,
            sequences,
            tokens,
            reloads,
            queues: Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// Counters of `model`; all its series exist from now on.
    pub(super) fn counters(&self, model: &str) -> ModelCounters {
        for result in RELOAD_RESULTS {
            self.reloads.with_label_values(&[model, result]);
        }
        ModelCounters {
            sequences: self.sequences.with_label_values(&[model]),
            tokens: self.tokens.with_label_values(&[model]),
        }
    }

    pub(super) fn add_queue(&self, model: &str, read: Read) {
        lock(&self.queues).push((model.to_owned(), read));
        self.read_queues();
    }

    /// Sets the queue gauges of every model, and returns the sum. (While a model is being replaced, its old and its new
    /// queue count together.)
    pub(super) fn read_queues(&self) -> QueueReading {
        let mut by_model: BTreeMap<String, QueueReading> = BTreeMap::new();
        let mut sum = QueueReading::default();
        lock(&self.queues).retain(|(model, read)| {
            let Some(reading) = read() else { return false };
            for total in [&mut sum, by_model.entry(model.clone()).or_default()] {
                total.depth += reading.depth;
                total.tokens += reading.tokens;
                total.capacity += reading.capacity;
                total.inputs += reading.inputs;
            }
            true
        });
        for (model, reading) in by_model {
            self.queue_depth.with_label_values(&[&model]).set(gauge_value(reading.depth));
            self.queue_tokens.with_label_values(&[&model]).set(gauge_value(reading.tokens));
            self.queue_capacity.with_label_values(&[&model]).set(gauge_value(reading.capacity));
        }
        sum
    }

    /// Replaces what is said about a model.
    pub(super) fn set_info(&self, info: &ModelInfo) {
        let mut state = lock(&self.state);
        let old = state.entry(info.model.clone()).or_default().info.replace(info.clone());
        if let Some(old) = old {
            // Fails if it is not there, which is as well.
            self.info.remove_label_values(&old.labels()).ok();
        }
        self.info.with_label_values(&info.labels()).set(1);
    }

    /// Notes a model's self-check (`None`: none was run); returns the lowest cosine and the largest drift of all models,
    /// NaN without any.
    pub(super) fn set_selfcheck(&self, model: &str, found: Option<(f64, f64)>) -> (f64, f64) {
        let mut state = lock(&self.state);
        state.entry(model.to_owned()).or_default().selfcheck = found;
        let all = state.values().filter_map(|state| state.selfcheck);
        all.fold((f64::NAN, f64::NAN), |(cosine, drift), (c, d)| (cosine.min(c), drift.max(d)))
    }
}
