//! One function per event: it writes the log line and counts.
//!
//! Levels: `error` needs a person, `warn` may, `info` is said a few times in a process's life or when a request was
//! refused by a fault of the service, `debug` is said per request or batch. Text of a user is no argument of any of them.

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use tracing::{debug, error, info, warn};

use super::{Credential, Dropped, ExpiryStage, Metrics, ModelInfo, RejectReason, Route, Stage};

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A response was sent.
#[derive(Debug, Clone, Copy)]
pub struct ResponseStats<'a> {
    /// Route as matched.
    pub route: Route,
    /// Status code.
    pub code: u16,
    /// From the request's head to the response's; of a stream's message, from its arrival until there was an answer.
    pub duration: Duration,
    /// Id of the request, checked by the server.
    pub request_id: &'a str,
    /// Id of its trace, if it has one.
    pub trace_id: Option<&'a str>,
}

/// Where the time of an answered request went.
#[derive(Debug, Clone, Copy)]
pub struct StageTimes {
    /// Text to ids.
    pub tokenize: Duration,
    /// Wait for a worker.
    pub queue: Duration,
    /// Forward pass.
    pub infer: Duration,
    /// Tokens of all inputs.
    pub n_tokens: usize,
}

/// What events that concern a request are said in, so that they carry its ids.
#[must_use]
pub fn request_span(request_id: &str, trace_id: Option<&str>) -> tracing::Span {
    tracing::error_span!("request", request_id, trace_id)
}

/// A response took longer than the operator cares to see.
pub fn slow_request(stats: &ResponseStats<'_>, stages: Option<StageTimes>) {
    let ResponseStats { route, code, duration, request_id, trace_id } = *stats;
    let stage = |of: fn(&StageTimes) -> Duration| stages.as_ref().map(of).map(millis);
    warn!(
        %route,
        code,
        duration_ms = millis(duration),
        tokenize_ms = stage(|stages| stages.tokenize),
        queue_ms = stage(|stages| stages.queue),
        infer_ms = stage(|stages| stages.infer),
        n_tokens = stages.map(|stages| stages.n_tokens),
        request_id,
        trace_id,
        "slow request"
    );
}

/// A response was sent. Called once per response, whoever made it; of a stream, once per answer to a message.
pub fn response_sent(metrics: &Metrics, stats: &ResponseStats<'_>) {
    let ResponseStats { route, code, duration, request_id, trace_id } = *stats;
    metrics.count_response(route, code, duration);
    let duration_ms = millis(duration);
    if code >= 500 && code != 503 && code != 504 {
        warn!(%route, code, duration_ms, request_id, trace_id, "request failed");
    } else {
        debug!(%route, code, duration_ms, request_id, trace_id, "request answered");
    }
}

/// A request passed a stage; once per request and stage.
pub fn stage_passed(metrics: &Metrics, stage: Stage, duration: Duration) {
    metrics.observe_stage(stage, duration);
}

/// A request was refused. Deadlines are told by [`expired`].
pub fn rejected(metrics: &Metrics, reason: RejectReason) {
    metrics.count_rejected(reason);
    debug!(%reason, "request refused");
}

/// A request's deadline passed.
pub fn expired(metrics: &Metrics, stage: ExpiryStage) {
    metrics.count_rejected(RejectReason::Deadline);
    metrics.count_expired(stage);
    debug!(%stage, "deadline passed");
}

/// The client of a request left before the result; once per request.
pub fn cancelled(metrics: &Metrics) {
    metrics.count_cancelled();
    debug!("request cancelled");
}

/// An input was cut to the model's length.
pub fn truncated(metrics: &Metrics) {
    metrics.count_truncated();
}

/// A sequence of `n_tokens` was admitted to the queue.
pub fn sequence_admitted(metrics: &Metrics, n_tokens: usize) {
    metrics.count_input(n_tokens);
}

/// What a batch was.
#[derive(Debug, Clone, Copy)]
pub struct BatchStats {
    /// Which worker ran it.
    pub worker: usize,
    /// Sequences in it.
    pub n_seqs: usize,
    /// Tokens in it.
    pub n_tokens: usize,
    /// Longest wait of a sequence in it.
    pub queue_wait: Duration,
    /// Time of the forward pass.
    pub compute: Duration,
}

/// A batch was computed, with or without success.
pub fn batch_finished(metrics: &Metrics, stats: &BatchStats) {
    let BatchStats { worker, n_seqs, n_tokens, queue_wait, compute } = *stats;
    metrics.observe_batch(n_seqs, n_tokens, compute);
    debug!(
        worker,
        n_seqs,
        n_tokens,
        queue_wait_ms = millis(queue_wait),
        compute_ms = millis(compute),
        "batch finished"
    );
}

/// A request failed in the model; once per request.
pub fn inference_failed(metrics: &Metrics, error: &(dyn Error + 'static)) {
    metrics.count_inference_error();
    error!(error, "inference failed");
}

/// A worker panicked; its model is lost.
pub fn worker_died(metrics: &Metrics, worker: usize, workers_left: usize) {
    metrics.set_ready(false);
    error!(worker, workers_left, "worker died");
}

/// The workers are up.
pub fn engine_started(model: &str, n_workers: usize, queue_capacity_tokens: usize, concurrency_limit: usize) {
    info!(model, n_workers, queue_capacity_tokens, concurrency_limit, "engine started");
}

/// The model is loaded and can answer.
pub fn model_loaded(metrics: &Metrics, model: &ModelInfo, load: Duration) {
    metrics.set_model(model, load);
    let ModelInfo { model, family, scheme, precision, attention } = model;
    info!(model, family, scheme, precision, attention, load_ms = millis(load), "model loaded");
}

/// The golden inputs were run when the model was loaded; `cosine` is the lowest, `bound` what the artefact promises,
/// `drift` the largest fall of an input's cosine below the one recorded for it, divided by what rounding moves it more where
/// the artefact is far from its source.
pub fn self_checked(metrics: &Metrics, model: &str, cosine: f64, bound: f64, drift: f64) {
    metrics.set_selfcheck(model, Some((cosine, drift)));
    if cosine >= bound {
        info!(model, cosine, bound, drift, "self-check passed");
    } else {
        warn!(model, cosine, bound, drift, "self-check below its bound");
    }
}

/// There were no golden inputs that say something about how the model is run.
pub fn not_self_checked(metrics: &Metrics, model: &str) {
    metrics.set_selfcheck(model, None);
    debug!(model, "no self-check");
}

/// A classifier's golden inputs were run: the largest difference of a number to the uncompressed model's.
pub fn scores_checked(model: &str, difference: f64, bound: f64) {
    info!(model, difference, bound, "self-check of the scores passed");
}

/// A model was replaced by a new artefact; what it had admitted is still answered.
pub fn reloaded(metrics: &Metrics, model: &str, sha: Option<&str>, took: Duration) {
    metrics.count_reload(model, true);
    info!(model, sha, took_ms = millis(took), "model reloaded");
}

/// A new artefact was not taken; the old one goes on serving.
pub fn reload_refused(metrics: &Metrics, model: &str, reason: &str) {
    metrics.count_reload(model, false);
    error!(model, reason, "reload refused");
}

/// Spans reach no collector for `reason`, or reach it again. Said when that changes, not for every batch.
pub fn export_changed(reason: Option<&str>) {
    match reason {
        Some(reason) => warn!(reason, "spans reach no collector"),
        None => info!("spans reach the collector"),
    }
}

/// The file of API keys was read again.
pub fn keys_reloaded(metrics: &Metrics, n_keys: usize) {
    metrics.count_credential(Credential::ApiKeys, true);
    info!(n_keys, "API keys reloaded");
}

/// The certificate and its key were read again; connections that begin now use them.
pub fn certificate_reloaded(metrics: &Metrics) {
    metrics.count_credential(Credential::Certificate, true);
    info!("certificate reloaded");
}

/// A connection was ended, or not let in. Said per connection, so that only `debug` shows it.
pub fn connection_dropped(metrics: &Metrics, reason: Dropped) {
    metrics.count_dropped(reason);
    debug!(%reason, "connection dropped");
}

/// A file of keys, or a certificate, was not taken; the old one stays.
pub fn credential_refused(metrics: &Metrics, credential: Credential, reason: &dyn std::fmt::Display) {
    metrics.count_credential(credential, false);
    error!(%credential, %reason, "reload refused");
}

/// The service takes requests at `address`, those of gRPC at `grpc`; metrics and administration are at `admin`, or at
/// `address` if they have no port of their own.
pub fn ready(metrics: &Metrics, address: SocketAddr, grpc: Option<SocketAddr>, admin: Option<SocketAddr>) {
    metrics.set_ready(true);
    info!(%address, grpc = grpc.map(tracing::field::display), admin = admin.map(tracing::field::display), "ready");
}

/// The end was asked for before there was anything to finish.
pub fn stopped_while_loading() {
    info!("stopped while loading");
}

/// No new work is taken; what was admitted is finished within `grace`.
pub fn draining(metrics: &Metrics, grace: Duration) {
    metrics.set_ready(false);
    info!(grace_ms = millis(grace), "draining");
}

/// The drain ended: in time, or with `n_cut` requests cut off.
pub fn drained(n_cut: usize, took: Duration) {
    if n_cut == 0 {
        info!(took_ms = millis(took), "drained");
    } else {
        warn!(n_cut, took_ms = millis(took), "drain ran out of time");
    }
}
