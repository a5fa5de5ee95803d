//! Spans on their way to a collector: a bounded queue, and a task that empties it in batches.
//!
//! Nothing waits for the collector. A span that finds the queue full is dropped, one whose batch is not taken in time is
//! lost; both are counted.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::labels::SpanResult;
use super::{Metrics, events};

/// Spans that may wait: at about a kilobyte each, two megabytes.
const QUEUE: usize = 2048;

/// Spans of one batch.
const BATCH: usize = 512;

/// How long a batch is waited for to fill.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a collector may take for a batch.
const TIMEOUT: Duration = Duration::from_secs(5);

/// After a batch that was not taken.
const PAUSE: Duration = Duration::from_secs(1);

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// An address that is not understood.
    #[error("--otlp-endpoint {endpoint}: it must be the address of a collector's gRPC, such as http://localhost:4317")]
    Endpoint {
        /// As given.
        endpoint: String,
    },
    /// The exporter cannot be made, for the sake of `OTEL_…` variables mostly.
    #[error("--otlp-endpoint {endpoint}: {reason}")]
    Exporter {
        /// As given.
        endpoint: String,
        /// Why.
        reason: String,
    },
}

/// The queue's end where spans go in.
#[derive(Debug)]
pub(super) struct Queue {
    spans: mpsc::Sender<SpanData>,
    metrics: Arc<Metrics>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.metrics.count_spans(SpanResult::Dropped, 1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The task that sends.
#[derive(Debug)]
pub(super) struct Exporter {
    closing: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Exporter {
    /// Starts the task on the runtime that this is called on.
    pub(super) fn start(
        endpoint: &str,
        resource: &Resource,
        metrics: &Arc<Metrics>,
    ) -> Result<(Queue, Self), ExportError> {
        // No TLS: a collector's agent runs on the same machine or in the same cluster.
        if !endpoint.strip_prefix("http://").is_some_and(|rest| rest.starts_with(|c: char| c != '/' && c != ':')) {
            return Err(ExportError::Endpoint { endpoint: endpoint.to_owned() });
        }
        let builder = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(TIMEOUT);
        let mut exporter = builder
            .build()
            .map_err(|error| ExportError::Exporter { endpoint: endpoint.to_owned(), reason: error.to_string() })?;
        exporter.set_resource(resource);
        let (spans, waiting) = mpsc::channel(QUEUE);
        let closing = CancellationToken::new();
        let task = tokio::spawn(send(exporter, waiting, closing.clone(), Arc::clone(metrics)));
        let exporter = Self { closing, task: Mutex::new(Some(task)) };
        Ok((Queue { spans, metrics: Arc::clone(metrics) }, exporter))
    }

    /// Sends what is left, for at most `limit`.
    pub(super) async fn close(&self, limit: Duration) {
        self.closing.cancel();
        if let Some(mut task) = self.task.lock().await.take()
            && timeout(limit, &mut task).await.is_err()
        {
            task.abort();
        }
    }
}

async fn send(
    exporter: SpanExporter,
    mut waiting: mpsc::Receiver<SpanData>,
    closing: CancellationToken,
    metrics: Arc<Metrics>,
) {
    let mut is_failing = false;
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            _ = waiting.recv_many(&mut batch, BATCH) => {}
            () = closing.cancelled() => waiting.close(),
        }
        let full = Instant::now() + INTERVAL;
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            tokio::select! {
                more = timeout_at(full, waiting.recv_many(&mut batch, room)) => match more {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => break,
                },
                () = closing.cancelled(), if !waiting.is_closed() => waiting.close(),
            }
        }
        if batch.is_empty() {
            if waiting.is_closed() {
                return;
            }
            continue;
        }
        let n_spans = batch.len();
        // The exporter tries again by itself, within its time; the second bound is for what it does not see.
        let sent = timeout(TIMEOUT * 2, exporter.export(batch)).await;
        let reason = match sent {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer".to_owned()),
        };
        let result = if reason.is_none() { SpanResult::Exported } else { SpanResult::Failed };
        metrics.count_spans(result, n_spans as u64);
        if is_failing != reason.is_some() {
            is_failing = reason.is_some();
            events::export_changed(reason.as_deref());
        }
        if is_failing && !closing.is_cancelled() {
            tokio::select! {
                () = sleep(PAUSE) => {}
                () = closing.cancelled() => {}
            }
        }
    }
}
