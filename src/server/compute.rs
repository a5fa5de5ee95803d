//! What all routes share that run a model: inputs in, rows and their times out.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use tokio::sync::OwnedSemaphorePermit;

use super::error::ServerError;
use super::extract::{Clock, SMALL_BODY, Target};
use super::inputs::{Options, Piece, encode};
use super::memory::{merged, take_above};
use crate::engine::{Reply, Submission};
use crate::model::Want;
use crate::telemetry::Stage;
use crate::telemetry::events::StageTimes;

/// Text Embeddings Inference's headers, in the order of [`Timing::write`], and the standard one.
pub(crate) const TIMING_HEADERS: [HeaderName; 9] = [
    HeaderName::from_static("x-compute-type"),
    HeaderName::from_static("x-compute-time"),
    HeaderName::from_static("x-compute-characters"),
    HeaderName::from_static("x-compute-tokens"),
    HeaderName::from_static("x-total-time"),
    HeaderName::from_static("x-tokenization-time"),
    HeaderName::from_static("x-queue-time"),
    HeaderName::from_static("x-inference-time"),
    HeaderName::from_static("server-timing"),
];

/// What the headers tell of an answer.
#[derive(Debug)]
pub(crate) struct Timing {
    pub(crate) clock: Clock,
    pub(crate) n_chars: usize,
    pub(crate) n_tokens: usize,
    pub(crate) tokenize: Duration,
    pub(crate) queue: Duration,
    pub(crate) infer: Duration,
}

impl Timing {
    /// Text Embeddings Inference counts in whole milliseconds, which says little here: `server-timing` has fractions.
    fn write(&self, headers: &mut HeaderMap) {
        let total = self.clock.start.elapsed();
        let millis = |duration: Duration| HeaderValue::from(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        let exact = |duration: Duration| duration.as_secs_f64() * 1e3;
        let server_timing = format!(
            "tokenize;dur={:.3}, queue;dur={:.3}, infer;dur={:.3}, total;dur={:.3}",
            exact(self.tokenize),
            exact(self.queue),
            exact(self.infer),
            exact(total),
        );
        let values = [
            HeaderValue::from_static("cpu"),
            millis(total),
            self.n_chars.into(),
            self.n_tokens.into(),
            millis(total),
            millis(self.tokenize),
            millis(self.queue),
            millis(self.infer),
            HeaderValue::from_str(&server_timing).expect("names and numbers are visible ASCII"),
        ];
        headers.reserve(values.len());
        for (name, value) in TIMING_HEADERS.into_iter().zip(values) {
            headers.insert(name, value);
        }
    }

    pub(crate) fn on(&self, mut response: Response) -> Response {
        self.write(response.headers_mut());
        let Self { tokenize, queue, infer, n_tokens, .. } = *self;
        response.extensions_mut().insert(StageTimes { tokenize, queue, infer, n_tokens });
        response
    }
}

/// What is to be computed for a request.
pub(crate) struct Work {
    pub(crate) clock: Clock,
    /// The share of the memory for bodies that the pieces take.
    pub(crate) body_memory: Option<OwnedSemaphorePermit>,
    pub(crate) pieces: Vec<Piece>,
    /// What the request calls its inputs.
    pub(crate) field: &'static str,
    /// Whether the answer gives texts back: it then holds their share.
    pub(crate) echoes: bool,
}

/// What the engine computed for a request.
pub(crate) struct Computed {
    pub(crate) reply: Reply,
    pub(crate) timing: Timing,
    /// The share of the memory for answers: of the rows, if they are many, and of texts that are given back.
    pub(crate) memory: Option<OwnedSemaphorePermit>,
}

/// Tokenizes and computes.
pub(crate) async fn compute(
    target: &Target,
    work: Work,
    options: Options,
    want: Want,
) -> Result<Computed, ServerError> {
    compute_above(SMALL_BODY, target, work, options, want).await
}

/// The same, with a share of the memory for answers of more than `small` bytes.
pub(crate) async fn compute_above(
    small: usize,
    target: &Target,
    work: Work,
    options: Options,
    want: Want,
) -> Result<Computed, ServerError> {
    let Work { clock, body_memory, pieces, field, echoes } = work;
    let mut encoded = encode(target, &clock, pieces, options, field, body_memory).await?;
    let body_memory = encoded.memory.take().filter(|_| echoes);
    // The engine lets go of an answer's memory when it hands it out, but the client may take its time.
    let model = &target.model;
    let token_floats =
        if want == Want::PooledAndTokens { encoded.n_tokens.saturating_mul(model.card.d_model) } else { 0 };
    let n_floats = encoded.sequences.len().saturating_mul(model.width()).saturating_add(token_floats);
    let n_bytes = n_floats.saturating_mul(size_of::<f32>());
    let memory = merged(take_above(small, &target.app, n_bytes)?, body_memory);
    let submission = Submission { sequences: encoded.sequences, want, deadline: clock.deadline };
    let reply = model.engine.submit(submission).await?;
    let n_tokens = [("niwaki.tokens", encoded.n_tokens)];
    clock.trace.stage(Stage::Queue, reply.infer, reply.queue, &[]);
    clock.trace.stage(Stage::Infer, Duration::ZERO, reply.infer, &n_tokens);
    let timing = Timing {
        clock,
        n_chars: encoded.n_chars,
        n_tokens: encoded.n_tokens,
        tokenize: encoded.took,
        queue: reply.queue,
        infer: reply.infer,
    };
    Ok(Computed { reply, timing, memory })
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep, timeout};

    use super::*;
    use crate::server::api::Item;
    use crate::server::memory::take_memory;
    use crate::server::testing::{busy_tokenizer, state};
    use crate::telemetry::Trace;

    #[tokio::test]
    async fn a_text_keeps_its_memory_while_it_waits_for_a_thread() {
        let app = state();
        let thread = busy_tokenizer(&app).await;
        let free = app.body_memory.available_permits();
        let target = Target { model: app.models.first(), app: app.clone() };
        let start = Instant::now();
        let clock = Clock { start, deadline: Some(start + Duration::from_millis(20)), trace: Trace::default() };
        let text = "tree ".repeat(20 * 1024);
        let body_memory = Some(take_memory(&app, text.len()).unwrap());
        let pieces = vec![Piece::Item(Item::Text(text))];
        let work = Work { clock, body_memory, pieces, field: "inputs", echoes: false };
        let late = compute(&target, work, Options::default(), Want::Pooled).await;
        assert!(matches!(late, Err(ServerError::Deadline { .. })));
        assert_eq!(app.body_memory.available_permits(), free - 100, "its client has given up, and the text is there");
        drop(thread);
        let freed = async {
            while app.body_memory.available_permits() < free {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), freed).await.unwrap();
        assert_eq!(app.metrics.cancellations(), 0, "it was told that it is late");
    }

    #[tokio::test]
    async fn a_client_that_leaves_while_its_text_waits_is_counted_once() {
        let app = state();
        let thread = busy_tokenizer(&app).await;
        let target = Target { model: app.models.first(), app: app.clone() };
        let work = || {
            let clock = Clock { start: Instant::now(), deadline: None, trace: Trace::default() };
            let pieces = vec![Piece::Item(Item::Text("tree ".repeat(1000)))];
            Work { clock, body_memory: None, pieces, field: "inputs", echoes: false }
        };
        let short = Duration::from_millis(20);
        assert!(timeout(short, compute(&target, work(), Options::default(), Want::Pooled)).await.is_err());
        assert_eq!(app.metrics.cancellations(), 1);
        drop(thread);
        // The model fails, which is an answer.
        assert!(compute(&target, work(), Options::default(), Want::Pooled).await.is_err());
        assert_eq!(app.metrics.cancellations(), 1);
    }
}
