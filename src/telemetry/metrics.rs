//! Every metric: name, help, labels, buckets.
//!
//! Conventions of Prometheus: prefix `niwaki_`, base units, counters end in `_total`. Handles are resolved once;
//! counting is one atomic addition. A [`Metrics`] has a registry of its own, so tests do not share counters.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use super::labels::{Credential, Dropped, ExpiryStage, MemoryKind, Port, RejectReason, Route, SpanResult, Stage};
use super::models::{ModelCounters, ModelSeries, QueueReading, RELOAD_RESULTS};
use super::{allocator, process};

/// 100 µs to 52 s, each the double of the one before: a short text takes half a millisecond, a long batch on a small
/// machine tens of seconds.
fn second_buckets() -> Vec<f64> {
    powers_of_two(1e-4, 20)
}

fn powers_of_two(start: f64, count: i32) -> Vec<f64> {
    (0..count).map(|exponent| start * 2f64.powi(exponent)).collect()
}

/// What `niwaki_model_info` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelInfo {
    /// Name under which the model is served.
    pub model: String,
    /// Model family.
    pub family: String,
    /// Compression scheme of the weights on disk.
    pub scheme: String,
    /// Precision it is computed in.
    pub precision: String,
    /// Attention pattern.
    pub attention: String,
}

impl ModelInfo {
    pub(super) fn labels(&self) -> [&str; 5] {
        [&self.model, &self.family, &self.scheme, &self.precision, &self.attention]
    }
}

/// What every name of ours starts with.
#[cfg(test)]
const PREFIX: &str = "niwaki_";

/// Reads bytes; `None` when what held them is no more.
type Source = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// All metrics of a process.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    /// Per route, the codes known beforehand; a linear search over a dozen is faster than hashing the labels.
    requests_by_code: Vec<Vec<(u16, IntCounter)>>,
    request_duration: Vec<Histogram>,
    stage_duration: Vec<Histogram>,
    requests_in_flight: IntGauge,
    connections: Vec<IntGauge>,
    connection_limit: IntGauge,
    dropped: Vec<IntCounter>,
    spans: Vec<IntCounter>,
    queue_depth: IntGauge,
    queue_tokens: IntGauge,
    queue_capacity: IntGauge,
    concurrency_limit: IntGauge,
    rejected: Vec<IntCounter>,
    cancelled: IntCounter,
    expired: Vec<IntCounter>,
    batch_size: Histogram,
    batch_tokens: Histogram,
    batch_duration: Histogram,
    input_tokens_total: IntCounter,
    input_tokens: Histogram,
    truncated: IntCounter,
    inference_errors: IntCounter,
    memory: Vec<IntGauge>,
    memory_sources: Mutex<Vec<(MemoryKind, Source)>>,
    threads: IntGauge,
    selfcheck_cosine: Gauge,
    selfcheck_drift: Gauge,
    ready: IntGauge,
    models: ModelSeries,
    credential_reloads: Vec<[IntCounter; 2]>,
    build_info: IntGaugeVec,
    model_load: Gauge,
}

/// Registers and resolves; the names are constants, so that nothing here can fail at run time but passes the tests.
struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<M: prometheus::core::Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let metric = metric.expect("metric names and labels are valid: `all_series_exist_before_the_first_request`");
        self.0
            .register(Box::new(metric.clone()))
            .expect("metric names are distinct: `all_series_exist_before_the_first_request`");
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn real_gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    fn seconds(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Iterator<Item = &'static str>,
    ) -> Vec<Histogram> {
        let opts = HistogramOpts::new(name, help).buckets(second_buckets());
        let family: HistogramVec = self.add(HistogramVec::new(opts, &[label]));
        values.map(|value| family.with_label_values(&[value])).collect()
    }
}

impl Metrics {
    /// All metrics, every series at zero, in a registry of their own.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        let register = Register(&registry);
        let requests = register.counters(
            "niwaki_requests_total",
            "Responses sent, by matched route and status code.",
            &["route", "code"],
        );
        let requests_by_code = Route::ALL
            .iter()
            .map(|route| {
                let series =
                    |&code: &u16| (code, requests.with_label_values(&[route.label(), code_label(code).as_str()]));
                route.codes().iter().map(series).collect()
            })
            .collect();
        let rejected = register.counters(
            "niwaki_rejected_total",
            "Requests answered without their result, by reason.",
            &["reason"],
        );
        let expired = register.counters(
            "niwaki_expired_total",
            "Requests whose deadline passed, by the stage they were in.",
            &["stage"],
        );
        let connections = register.gauges("niwaki_connections", "Connections open now, by port.", &["port"]);
        let dropped = register.counters(
            "niwaki_connections_dropped_total",
            "Connections ended or not let in by a limit of the server, by reason.",
            &["reason"],
        );
        let spans = register.counters("niwaki_trace_spans_total", "Spans of sampled traces, by result.", &["result"]);
        let memory = register.gauges(
            "niwaki_memory_bytes",
            "Memory held, by what for; rss is the process's, the others are parts or views of it.",
            &["kind"],
        );
        let cgroup_memory_limit = register
            .real_gauge("niwaki_cgroup_memory_limit_bytes", "Memory limit of the control group, +Inf without one.");
        let limit = process::memory_limit();
        cgroup_memory_limit.set(limit.map_or(f64::INFINITY, |bytes| bytes as f64));
        let credential_reloads = register.counters(
            "niwaki_credential_reloads_total",
            "Attempts to read API keys or a certificate again, by result.",
            &["credential", "result"],
        );
        let credential_reloads = Credential::ALL.iter().map(|credential| {
            RELOAD_RESULTS.map(|result| credential_reloads.with_label_values(&[credential.label(), result]))
        });
        // No padding anywhere: the series is there to be looked at, and nothing can add to it.
        register.counter("niwaki_batch_padding_tokens_total", "Tokens computed only to fill a batch; zero by design.");
        let metrics = Self {
            requests_by_code,
            requests,
            request_duration: register.seconds(
                "niwaki_request_duration_seconds",
                "Time from a request's head to the end of its response's head, by matched route.",
                "route",
                Route::ALL.iter().map(|route| route.label()),
            ),
            stage_duration: register.seconds(
                "niwaki_stage_duration_seconds",
                "Time a request spent in a stage; for a request of many inputs the mean over them.",
                "stage",
                Stage::ALL.iter().map(|stage| stage.label()),
            ),
            requests_in_flight: register.gauge("niwaki_requests_in_flight", "Requests being answered now."),
            connections: Port::ALL.iter().map(|port| connections.with_label_values(&[port.label()])).collect(),
            connection_limit: register.gauge("niwaki_connection_limit", "Connections that a port may have at once."),
            dropped: Dropped::ALL.iter().map(|reason| dropped.with_label_values(&[reason.label()])).collect(),
            spans: SpanResult::ALL.iter().map(|result| spans.with_label_values(&[result.label()])).collect(),
            queue_depth: register.gauge("niwaki_queue_depth", "Sequences that wait for a worker."),
            queue_tokens: register.gauge("niwaki_queue_tokens", "Tokens of the sequences that wait for a worker."),
            queue_capacity: register
                .gauge("niwaki_queue_capacity", "Tokens that may wait before requests are refused."),
            concurrency_limit: register
                .gauge("niwaki_concurrency_limit", "Inputs that may be in the server before requests are refused."),
            rejected: RejectReason::ALL.iter().map(|reason| rejected.with_label_values(&[reason.label()])).collect(),
            cancelled: register.counter("niwaki_cancelled_total", "Requests whose client left before the result."),
            expired: ExpiryStage::ALL.iter().map(|stage| expired.with_label_values(&[stage.label()])).collect(),
            batch_size: register.histogram("niwaki_batch_size", "Sequences in a batch.", powers_of_two(1.0, 11)),
            batch_tokens: register.histogram("niwaki_batch_tokens", "Tokens in a batch.", powers_of_two(1.0, 16)),
            batch_duration: register.histogram(
                "niwaki_batch_duration_seconds",
                "Time of a batch's forward pass.",
                second_buckets(),
            ),
            input_tokens_total: register.counter("niwaki_input_tokens_total", "Tokens of all admitted sequences."),
            input_tokens: register.histogram(
                "niwaki_input_tokens",
                "Tokens of an admitted sequence.",
                powers_of_two(1.0, 16),
            ),
            truncated: register.counter("niwaki_truncated_total", "Inputs cut to the model's length."),
            inference_errors: register.counter("niwaki_inference_errors_total", "Requests that failed in the model."),
            memory: MemoryKind::ALL.iter().map(|kind| memory.with_label_values(&[kind.label()])).collect(),
            memory_sources: Mutex::new(Vec::new()),
            threads: register.gauge("niwaki_threads", "Threads that compute."),
            selfcheck_cosine: register.real_gauge(
                "niwaki_selfcheck_cosine",
                "Lowest cosine of the golden inputs of all models to their expected outputs at load; NaN when none was run.",
            ),
            selfcheck_drift: register.real_gauge(
                "niwaki_selfcheck_drift",
                "Largest fall of a golden input's cosine below the one recorded for it, over 1 + 4 sin of its angle, at start; NaN when none was run.",
            ),
            ready: register.gauge("niwaki_ready", "1 while the service takes requests, else 0."),
            models: ModelSeries::new(
                [
                    register.gauges(
                        "niwaki_model_info",
                        "The models served; always 1.",
                        &["model", "family", "scheme", "precision", "attention"],
                    ),
                    register.gauges("niwaki_model_queue_depth", "Sequences that wait for a model's worker.", &["model"]),
                    register.gauges("niwaki_model_queue_tokens", "Tokens that wait for a model's worker.", &["model"]),
                    register.gauges(
                        "niwaki_model_queue_capacity",
                        "Tokens that may wait for a model before requests are refused.",
                        &["model"],
                    ),
                ],
                [
                    register.counters("niwaki_model_sequences_total", "Sequences that a model computed.", &["model"]),
                    register.counters("niwaki_model_tokens_total", "Tokens that a model computed.", &["model"]),
                    register.counters(
                        "niwaki_model_reloads_total",
                        "Attempts to replace a model by a new artefact, by result.",
                        &["model", "result"],
                    ),
                ],
            ),
            credential_reloads: credential_reloads.collect(),
            build_info: register.gauges(
                "niwaki_build_info",
                "Version and instruction set in use; always 1.",
                &["version", "isa"],
            ),
            model_load: register.real_gauge(
                "niwaki_model_load_seconds",
                "Time from the start of loading until the model could answer.",
            ),
            registry,
        };
        metrics.selfcheck_cosine.set(f64::NAN);
        metrics.selfcheck_drift.set(f64::NAN);
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("`process_*` names are distinct from `niwaki_*`");
        metrics.memory_source(MemoryKind::Rss, || Some(process::resident_bytes().unwrap_or(0)));
        metrics.memory_source(MemoryKind::AllocatorAllocated, || Some(allocator::allocated_bytes()));
        metrics.memory_source(MemoryKind::AllocatorResident, || Some(allocator::committed_bytes()));
        Arc::new(metrics)
    }

    /// All metrics in Prometheus' text format, version 0.0.4. Memory is read now.
    #[must_use]
    pub fn render(&self) -> String {
        let mut bytes = vec![0u64; MemoryKind::ALL.len()];
        self.memory_sources.lock().unwrap_or_else(PoisonError::into_inner).retain(|(kind, read)| {
            let read = read();
            bytes[*kind as usize] += read.unwrap_or(0);
            read.is_some()
        });
        for (gauge, bytes) in self.memory.iter().zip(bytes) {
            gauge.set(gauge_value(bytes));
        }
        let queue = self.models.read_queues();
        self.queue_depth.set(gauge_value(queue.depth as u64));
        self.queue_tokens.set(gauge_value(queue.tokens as u64));
        self.queue_capacity.set(gauge_value(queue.capacity as u64));
        self.concurrency_limit.set(gauge_value(queue.inputs as u64));
        let mut text = String::with_capacity(64 << 10);
        TextEncoder::new()
            .encode_utf8(&self.registry.gather(), &mut text)
            .expect("every family has a sample: the vectors are filled, empty ones are left out by `gather`");
        text
    }

    /// The content type of [`Metrics::render`].
    pub const CONTENT_TYPE: &'static str = prometheus::TEXT_FORMAT;

    /// Counts a request as in flight until the guard is dropped.
    #[must_use]
    pub fn in_flight(&self) -> InFlight {
        InFlight::new(&self.requests_in_flight)
    }

    /// Counts a connection as open until the guard is dropped.
    #[must_use]
    pub fn connection(&self, port: Port) -> InFlight {
        InFlight::new(&self.connections[port as usize])
    }

    /// How many connections a port may have.
    pub fn set_connection_limit(&self, n_connections: usize) {
        self.connection_limit.set(gauge_value(n_connections as u64));
    }

    /// Has a model's queue read at each [`Metrics::render`], until `read` gives `None`.
    pub fn queue_source(&self, model: &str, read: impl Fn() -> Option<QueueReading> + Send + Sync + 'static) {
        self.models.add_queue(model, Box::new(read));
    }

    /// Counters of a model; all its series exist from now on.
    #[must_use]
    pub fn model_counters(&self, model: &str) -> ModelCounters {
        self.models.counters(model)
    }

    /// How many threads compute.
    pub fn set_threads(&self, n_threads: usize) {
        self.threads.set(gauge_value(n_threads as u64));
    }

    /// Has memory read at each [`Metrics::render`], until `read` gives `None`; sources of one kind add up.
    pub fn memory_source(&self, kind: MemoryKind, read: impl Fn() -> Option<u64> + Send + Sync + 'static) {
        self.memory_sources.lock().unwrap_or_else(PoisonError::into_inner).push((kind, Box::new(read)));
    }

    /// The version and the instruction set the kernels run on.
    pub fn set_build_info(&self, version: &str, isa: &str) {
        self.build_info.reset();
        self.build_info.with_label_values(&[version, isa]).set(1);
    }

    pub(super) fn set_model(&self, info: &ModelInfo, load: Duration) {
        self.models.set_info(info);
        self.model_load.set(load.as_secs_f64());
    }

    pub(super) fn set_selfcheck(&self, model: &str, found: Option<(f64, f64)>) {
        let (cosine, drift) = self.models.set_selfcheck(model, found);
        self.selfcheck_cosine.set(cosine);
        self.selfcheck_drift.set(drift);
    }

    pub(super) fn count_reload(&self, model: &str, swapped: bool) {
        self.models.reloads.with_label_values(&[model, RELOAD_RESULTS[usize::from(!swapped)]]).inc();
    }

    pub(super) fn count_credential(&self, credential: Credential, swapped: bool) {
        self.credential_reloads[credential as usize][usize::from(!swapped)].inc();
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.set(i64::from(ready));
    }

    pub(super) fn count_response(&self, route: Route, code: u16, duration: Duration) {
        match self.requests_by_code[route as usize].iter().find(|(known, _)| *known == code) {
            Some((_, counter)) => counter.inc(),
            None => self.requests.with_label_values(&[route.label(), code_label(code).as_str()]).inc(),
        }
        self.request_duration[route as usize].observe(duration.as_secs_f64());
    }

    pub(super) fn observe_stage(&self, stage: Stage, duration: Duration) {
        self.stage_duration[stage as usize].observe(duration.as_secs_f64());
    }

    pub(super) fn count_rejected(&self, reason: RejectReason) {
        self.rejected[reason as usize].inc();
    }

    pub(super) fn count_expired(&self, stage: ExpiryStage) {
        self.expired[stage as usize].inc();
    }

    pub(super) fn count_dropped(&self, reason: Dropped) {
        self.dropped[reason as usize].inc();
    }

    pub(super) fn count_spans(&self, result: SpanResult, n_spans: u64) {
        self.spans[result as usize].inc_by(n_spans);
    }

    pub(super) fn count_cancelled(&self) {
        self.cancelled.inc();
    }

    pub(super) fn count_truncated(&self) {
        self.truncated.inc();
    }

    pub(super) fn count_inference_error(&self) {
        self.inference_errors.inc();
    }

    pub(super) fn count_input(&self, n_tokens: usize) {
        self.input_tokens_total.inc_by(n_tokens as u64);
        self.input_tokens.observe(n_tokens as f64);
    }

    pub(super) fn observe_batch(&self, n_seqs: usize, n_tokens: usize, duration: Duration) {
        self.batch_size.observe(n_seqs as f64);
        self.batch_tokens.observe(n_tokens as f64);
        self.batch_duration.observe(duration.as_secs_f64());
    }

    /// Responses of `route` with `code` so far.
    #[must_use]
    pub fn responses(&self, route: Route, code: u16) -> u64 {
        self.requests.with_label_values(&[route.label(), code_label(code).as_str()]).get()
    }

    /// Rejections for `reason` so far.
    #[must_use]
    pub fn rejections(&self, reason: RejectReason) -> u64 {
        self.rejected[reason as usize].get()
    }

    /// Spans with `result` so far.
    #[must_use]
    pub fn spans(&self, result: SpanResult) -> u64 {
        self.spans[result as usize].get()
    }

    /// Connections open at `port` now.
    #[must_use]
    pub fn connections(&self, port: Port) -> i64 {
        self.connections[port as usize].get()
    }

    /// Connections ended for `reason` so far.
    #[must_use]
    pub fn dropped(&self, reason: Dropped) -> u64 {
        self.dropped[reason as usize].get()
    }

    /// Requests that expired in `stage` so far.
    #[must_use]
    pub fn expirations(&self, stage: ExpiryStage) -> u64 {
        self.expired[stage as usize].get()
    }

    /// Requests cancelled so far.
    #[must_use]
    pub fn cancellations(&self) -> u64 {
        self.cancelled.get()
    }

    /// Requests that failed in the model so far.
    #[must_use]
    pub fn inference_errors(&self) -> u64 {
        self.inference_errors.get()
    }

    /// Observations of `stage` so far.
    #[must_use]
    pub fn stages(&self, stage: Stage) -> u64 {
        self.stage_duration[stage as usize].get_sample_count()
    }

    /// Batches, and the sequences and tokens in them, so far.
    #[must_use]
    pub fn batches(&self) -> (u64, u64, u64) {
        let sum = |histogram: &Histogram| histogram.get_sample_sum() as u64;
        (self.batch_size.get_sample_count(), sum(&self.batch_size), sum(&self.batch_tokens))
    }

    /// Sequences and tokens that wait now, in the queues of all models.
    #[must_use]
    pub fn queue(&self) -> (usize, usize) {
        let queue = self.models.read_queues();
        (queue.depth, queue.tokens)
    }

    /// Attempts to reload `model` so far: swapped, and refused.
    #[must_use]
    pub fn reloads(&self, model: &str) -> (u64, u64) {
        let count = |result| self.models.reloads.with_label_values(&[model, result]).get();
        (count(RELOAD_RESULTS[0]), count(RELOAD_RESULTS[1]))
    }

    /// Attempts to read `credential` again so far: swapped, and refused.
    #[must_use]
    pub fn credential_reloads(&self, credential: Credential) -> (u64, u64) {
        let [swapped, refused] = &self.credential_reloads[credential as usize];
        (swapped.get(), refused.get())
    }

    /// Sequences and tokens that `model` has computed so far.
    #[must_use]
    pub fn computed(&self, model: &str) -> (u64, u64) {
        let counters = self.models.counters(model);
        (counters.sequences.get(), counters.tokens.get())
    }

    /// Requests in flight now.
    #[must_use]
    pub fn requests_in_flight(&self) -> i64 {
        self.requests_in_flight.get()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// A request in flight, or an open connection; counted until dropped.
#[derive(Debug)]
pub struct InFlight(IntGauge);

impl InFlight {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn code_label(code: u16) -> String {
    code.to_string()
}

/// Gauges are signed in the crate; nothing here comes near 2^63.
fn gauge_value(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
