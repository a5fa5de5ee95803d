//! Routes of embeddings.

use axum::response::Response;

use crate::engine::Reply;
use crate::model::Want;
use crate::server::api::{
    EmbedAllRequest, EmbedRequest, Item, Object, OpenAiRequest, OpenAiResponse, PredictRequest, RerankRequest,
    SimilarityRequest,
};
use crate::server::compute::{Computed, Work, compute};
use crate::server::config::Task;
use crate::server::error::ServerError;
use crate::server::extract::{Call, Received};
use crate::server::inputs::{Options, Piece, checked_batch, pieces_of};
use crate::server::models::Model;
use crate::server::routes::score;
use crate::server::rows::{Layout, RowsWriter};

/// The width that embeddings are cut to.
pub(crate) fn checked_dimensions(model: &Model, dimensions: Option<usize>) -> Result<usize, ServerError> {
    let limit = model.card.d_model;
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
pub(crate) fn vectors(reply: Reply, dimensions: usize, normalized: bool) -> Vec<Vec<f32>> {
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
pub(crate) async fn embed(call: Call<EmbedRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    target.model.embeds()?;
    let EmbedRequest { inputs, truncate, truncation_direction, prompt_name, normalize, dimensions, output_dtype } =
        body;
    let pieces = pieces_of(&target.app, inputs, "inputs")?;
    let dimensions = checked_dimensions(&target.model, dimensions)?;
    let options = Options { truncate, direction: truncation_direction, prompt_name };
    let work = Work { clock, body_memory: memory, pieces, field: "inputs", echoes: false };
    let Computed { reply, timing, memory } = compute(&target, work, options, Want::Pooled).await?;
    let writer = RowsWriter::new(vectors(reply, dimensions, normalize), Layout::Vectors);
    Ok(timing.on(writer.of(output_dtype.unwrap_or_default()).respond(&target.app.metrics, &timing.clock.trace, memory)))
}

/// What the model is for: the same as `/embed`, or with a reranker `/rerank`, or with a classifier `/predict`.
#[utoipa::path(post, path = "/", operation_id = "root_embed", tag = "Embeddings", request_body = EmbedRequest,
    responses((status = 200, description = "One vector per input", body = Vec<Vec<f32>>)))]
pub(crate) async fn root(received: Received) -> Result<Response, ServerError> {
    match &received.model()?.card.task {
        Task::Embedding { .. } => embed(received.parse().await?).await,
        Task::Classification(head) if head.labels.len() == 1 => {
            score::rerank(received.parse::<RerankRequest>().await?).await
        }
        Task::Classification(_) => score::predict(received.parse::<PredictRequest>().await?).await,
    }
}

/// One vector per token of each input, special tokens included, as the model gives them.
#[utoipa::path(post, path = "/embed_all", tag = "Embeddings", request_body = EmbedAllRequest,
    responses((status = 200, description = "A list of vectors per input", body = Vec<Vec<Vec<f32>>>)))]
pub(crate) async fn embed_all(call: Call<EmbedAllRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    target.model.embeds()?;
    let EmbedAllRequest { inputs, truncate, truncation_direction, prompt_name } = body;
    let pieces = pieces_of(&target.app, inputs, "inputs")?;
    let options = Options { truncate, direction: truncation_direction, prompt_name };
    let work = Work { clock, body_memory: memory, pieces, field: "inputs", echoes: false };
    let Computed { reply, timing, memory } = compute(&target, work, options, Want::PooledAndTokens).await?;
    let rows = reply.rows.into_iter().map(|rows| rows.tokens).collect();
    let writer = RowsWriter::new(rows, Layout::TokenVectors { width: target.model.card.d_model });
    Ok(timing.on(writer.respond(&target.app.metrics, &timing.clock.trace, memory)))
}

/// The cosine of each sentence to the source sentence.
#[utoipa::path(post, path = "/similarity", tag = "Embeddings", request_body = SimilarityRequest,
    responses((status = 200, description = "One cosine per sentence", body = Vec<f32>)))]
pub(crate) async fn similarity(call: Call<SimilarityRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    target.model.embeds()?;
    let SimilarityRequest { inputs, parameters } = body;
    let Object(inputs) = inputs;
    let Object(parameters) = parameters.unwrap_or_default();
    let mut sentences = inputs.sentences;
    if sentences.n_sent == 0 {
        return Err(ServerError::Empty { field: "inputs.sentences" });
    }
    // The source sentence is computed too.
    sentences.n_sent += 1;
    sentences.items.insert(0, inputs.source_sentence);
    let sentences = checked_batch(&target.app, sentences, "inputs.sentences")?;
    let pieces = sentences.into_iter().map(|text| Piece::Item(Item::Text(text))).collect();
    let options = Options {
        truncate: parameters.truncate,
        direction: parameters.truncation_direction,
        prompt_name: parameters.prompt_name,
    };
    let work = Work { clock, body_memory: memory, pieces, field: "inputs", echoes: false };
    let Computed { reply, timing, memory } = compute(&target, work, options, Want::Pooled).await?;
    let (source, others) = reply.rows.split_first().ok_or(ServerError::Internal)?;
    let cosines = others.iter().map(|rows| cosine(&source.pooled, &rows.pooled)).collect();
    // A vector of cosines is written as any other, without the brackets of a list of one.
    let json = RowsWriter::new(vec![cosines], Layout::Vector);
    Ok(timing.on(json.respond(&target.app.metrics, &timing.clock.trace, memory)))
}

/// Vectors of unit length, as OpenAI's API gives them.
#[utoipa::path(post, path = "/v1/embeddings", tag = "OpenAI", request_body = OpenAiRequest,
    responses((status = 200, description = "One vector per input", body = OpenAiResponse)))]
pub(crate) async fn v1_embeddings(call: Call<OpenAiRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    target.model.embeds()?;
    let pieces = pieces_of(&target.app, body.input, "input")?;
    let dimensions = checked_dimensions(&target.model, body.dimensions)?;
    let work = Work { clock, body_memory: memory, pieces, field: "input", echoes: false };
    let Computed { reply, timing, memory } = compute(&target, work, Options::default(), Want::Pooled).await?;
    let layout = Layout::OpenAi {
        format: body.encoding_format.unwrap_or_default(),
        model: target.model.name_json.clone(),
        n_tokens: timing.n_tokens,
    };
    let writer = RowsWriter::new(vectors(reply, dimensions, true), layout);
    Ok(timing.on(writer.of(body.output_dtype.unwrap_or_default()).respond(
        &target.app.metrics,
        &timing.clock.trace,
        memory,
    )))
}

/// The same as `/v1/embeddings`.
#[utoipa::path(post, path = "/embeddings", tag = "OpenAI", request_body = OpenAiRequest,
    responses((status = 200, description = "One vector per input", body = OpenAiResponse)))]
pub(crate) async fn embeddings(call: Call<OpenAiRequest>) -> Result<Response, ServerError> {
    v1_embeddings(call).await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
