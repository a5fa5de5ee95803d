//! Routes that run the model.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use tokio::sync::OwnedSemaphorePermit;

use crate::engine::{Reply, Submission};
use crate::model::Want;
use crate::server::api::{
    EmbedAllRequest, EmbedRequest, Item, Object, OpenAiRequest, OpenAiResponse, SimilarityRequest, TruncationDirection,
};
use crate::server::error::ServerError;
use crate::server::extract::{Call, Clock, SMALL_BODY, take_memory};
use crate::server::inputs::{Options, checked_batch, encode, items_of};
use crate::server::rows::{Layout, RowsWriter};
use crate::server::state::AppState;

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
struct Timing {
    clock: Clock,
    n_chars: usize,
    n_tokens: usize,
    tokenize: Duration,
    queue: Duration,
    infer: Duration,
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

    fn on(&self, mut response: Response) -> Response {
        self.write(response.headers_mut());
        response
    }
}

/// What is to be computed for a request.
struct Work {
    clock: Clock,
    body_memory: Option<OwnedSemaphorePermit>,
    items: Vec<Item>,
    /// What the request calls its inputs.
    field: &'static str,
}

/// What the engine computed for a request.
struct Computed {
    reply: Reply,
    timing: Timing,
    /// The rows' share of the memory for answers, if they are many.
    memory: Option<OwnedSemaphorePermit>,
}

/// Tokenizes and computes.
async fn compute(app: &AppState, work: Work, options: Options, want: Want) -> Result<Computed, ServerError> {
    let Work { clock, body_memory, items, field } = work;
    let encoded = encode(app, clock, items, options, field).await?;
    // The texts are gone by now.
    drop(body_memory);
    // The engine lets go of an answer's memory when it hands it out, but the client may take its time.
    let n_rows = encoded.sequences.len() + if want == Want::PooledAndTokens { encoded.n_tokens } else { 0 };
    let n_bytes = n_rows.saturating_mul(app.config.model.d_model * size_of::<f32>());
    let memory = if n_bytes > SMALL_BODY { Some(take_memory(app, n_bytes)?) } else { None };
    let submission = Submission { sequences: encoded.sequences, want, deadline: clock.deadline };
    let reply = app.engine.submit(submission).await?;
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

fn checked_dimensions(app: &AppState, dimensions: Option<usize>) -> Result<usize, ServerError> {
    let limit = app.config.model.d_model;
    match dimensions {
        None => Ok(limit),
        Some(got) if (1..=limit).contains(&got) => Ok(got),
        Some(got) => Err(ServerError::Dimensions { got, limit }),
    }
}

/// `x / max(‖x‖₂, 10⁻¹²)`, as PyTorch's `normalize`; the norm is summed in double precision.
fn normalize(vector: &mut [f32]) {
    let norm = norm(vector).max(1e-12);
    for value in vector {
        *value = (f64::from(*value) / norm) as f32;
    }
}

fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}

/// `a·b / (‖a‖₂ ‖b‖₂)`, 0 if one of them is zero.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    (dot / (norm(a) * norm(b)).max(1e-24)) as f32
}

/// The vectors of a reply: cut first, then scaled, so that a shortened vector has unit length too.
fn vectors(reply: Reply, dimensions: usize, normalized: bool) -> Vec<Vec<f32>> {
    let vector = |mut vector: Vec<f32>| {
        vector.truncate(dimensions);
        if normalized {
            normalize(&mut vector);
        }
        vector
    };
    reply.rows.into_iter().map(|rows| vector(rows.pooled)).collect()
}

/// One vector per input.
#[utoipa::path(post, path = "/embed", tag = "Embeddings", request_body = EmbedRequest,
    responses((status = 200, description = "One vector per input", body = Vec<Vec<f32>>)))]
pub(crate) async fn embed(State(app): State<AppState>, call: Call<EmbedRequest>) -> Result<Response, ServerError> {
    let EmbedRequest { inputs, truncate, truncation_direction, prompt_name, normalize, dimensions } = call.body;
    let items = items_of(&app, inputs, "inputs")?;
    let dimensions = checked_dimensions(&app, dimensions)?;
    let options = Options { truncate, direction: truncation_direction, prompt_name };
    let work = Work { clock: call.clock, body_memory: call.memory, items, field: "inputs" };
    let Computed { reply, timing, memory } = compute(&app, work, options, Want::Pooled).await?;
    let writer = RowsWriter::new(vectors(reply, dimensions, normalize), Layout::Vectors);
    Ok(timing.on(writer.respond(&app.metrics, memory)))
}

/// The same as `/embed`.
#[utoipa::path(post, path = "/", operation_id = "root_embed", tag = "Embeddings", request_body = EmbedRequest,
    responses((status = 200, description = "One vector per input", body = Vec<Vec<f32>>)))]
pub(crate) async fn root(state: State<AppState>, call: Call<EmbedRequest>) -> Result<Response, ServerError> {
    embed(state, call).await
}

/// One vector per token of each input, special tokens included, as the model gives them.
#[utoipa::path(post, path = "/embed_all", tag = "Embeddings", request_body = EmbedAllRequest,
    responses((status = 200, description = "A list of vectors per input", body = Vec<Vec<Vec<f32>>>)))]
pub(crate) async fn embed_all(
    State(app): State<AppState>,
    call: Call<EmbedAllRequest>,
) -> Result<Response, ServerError> {
    let EmbedAllRequest { inputs, truncate, truncation_direction, prompt_name } = call.body;
    let items = items_of(&app, inputs, "inputs")?;
    let options = Options { truncate, direction: truncation_direction, prompt_name };
    let work = Work { clock: call.clock, body_memory: call.memory, items, field: "inputs" };
    let Computed { reply, timing, memory } = compute(&app, work, options, Want::PooledAndTokens).await?;
    let rows = reply.rows.into_iter().map(|rows| rows.tokens).collect();
    let writer = RowsWriter::new(rows, Layout::TokenVectors { width: app.config.model.d_model });
    Ok(timing.on(writer.respond(&app.metrics, memory)))
}

/// The cosine of each sentence to the source sentence.
#[utoipa::path(post, path = "/similarity", tag = "Embeddings", request_body = SimilarityRequest,
    responses((status = 200, description = "One cosine per sentence", body = Vec<f32>)))]
pub(crate) async fn similarity(
    State(app): State<AppState>,
    call: Call<SimilarityRequest>,
) -> Result<Response, ServerError> {
    let SimilarityRequest { inputs, parameters } = call.body;
    let Object(inputs) = inputs;
    let Object(parameters) = parameters.unwrap_or_default();
    let mut sentences = inputs.sentences;
    if sentences.n_sent == 0 {
        return Err(ServerError::Empty { field: "inputs.sentences" });
    }
    // The source sentence is computed too.
    sentences.n_sent += 1;
    sentences.items.insert(0, inputs.source_sentence);
    let items = checked_batch(&app, sentences, "inputs.sentences")?.into_iter().map(Item::Text).collect();
    let options = Options {
        truncate: parameters.truncate,
        direction: parameters.truncation_direction,
        prompt_name: parameters.prompt_name,
    };
    let work = Work { clock: call.clock, body_memory: call.memory, items, field: "inputs" };
    let Computed { reply, timing, memory } = compute(&app, work, options, Want::Pooled).await?;
    let (source, others) = reply.rows.split_first().ok_or(ServerError::Internal)?;
    let cosines = others.iter().map(|rows| cosine(&source.pooled, &rows.pooled)).collect();
    // A vector of cosines is written as any other, without the brackets of a list of one.
    let json = RowsWriter::new(vec![cosines], Layout::Vector);
    Ok(timing.on(json.respond(&app.metrics, memory)))
}

/// Vectors of unit length, as OpenAI's API gives them.
#[utoipa::path(post, path = "/v1/embeddings", tag = "OpenAI", request_body = OpenAiRequest,
    responses((status = 200, description = "One vector per input", body = OpenAiResponse)))]
pub(crate) async fn v1_embeddings(
    State(app): State<AppState>,
    call: Call<OpenAiRequest>,
) -> Result<Response, ServerError> {
    let items = items_of(&app, call.body.input, "input")?;
    let dimensions = checked_dimensions(&app, call.body.dimensions)?;
    let options = Options { truncate: None, direction: TruncationDirection::Right, prompt_name: None };
    let work = Work { clock: call.clock, body_memory: call.memory, items, field: "input" };
    let Computed { reply, timing, memory } = compute(&app, work, options, Want::Pooled).await?;
    let layout = Layout::OpenAi {
        format: call.body.encoding_format.unwrap_or_default(),
        model: app.served_name_json.clone(),
        n_tokens: timing.n_tokens,
    };
    let writer = RowsWriter::new(vectors(reply, dimensions, true), layout);
    Ok(timing.on(writer.respond(&app.metrics, memory)))
}

/// The same as `/v1/embeddings`.
#[utoipa::path(post, path = "/embeddings", tag = "OpenAI", request_body = OpenAiRequest,
    responses((status = 200, description = "One vector per input", body = OpenAiResponse)))]
pub(crate) async fn embeddings(state: State<AppState>, call: Call<OpenAiRequest>) -> Result<Response, ServerError> {
    v1_embeddings(state, call).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SequenceRows;

    #[test]
    fn vectors_are_cut_before_they_are_scaled() {
        let reply = || Reply {
            rows: vec![SequenceRows { pooled: vec![3.0, 4.0, 12.0], tokens: vec![] }],
            queue: Duration::ZERO,
            infer: Duration::ZERO,
        };
        assert_eq!(vectors(reply(), 2, true), [[0.6, 0.8]]);
        assert_eq!(vectors(reply(), 3, false), [[3.0, 4.0, 12.0]]);
        assert!((norm(&vectors(reply(), 3, true)[0]) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn zero_has_no_direction() {
        let mut zero = [0.0f32; 3];
        normalize(&mut zero);
        assert_eq!(zero, [0.0; 3]);
        assert_eq!(cosine(&zero, &[1.0, 0.0, 0.0]), 0.0);
        assert_eq!(cosine(&[2.0, 0.0], &[3.0, 0.0]), 1.0);
        assert_eq!(cosine(&[1e-3, 0.0], &[-5.0, 0.0]), -1.0);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 1.0]), 0.0);
    }
}
