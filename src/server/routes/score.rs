//! Routes of models with a classification head.

use std::sync::Arc;

use axum::Extension;
use axum::response::{IntoResponse, Response};

use crate::engine::Reply;
use crate::model::{HeadConfig, ScoreFunction, Want};
use crate::server::api::{
    CohereRerankRequest, CohereRerankResponse, CohereResult, DocumentText, Item, OpenAiUsage, PredictInput,
    PredictRequest, Prediction, Predictions, Rank, RerankRequest, Sentence,
};
use crate::server::compute::{Computed, Work, compute};
use crate::server::error::ServerError;
use crate::server::extract::Call;
use crate::server::inputs::{Options, Piece, checked_batch};
use crate::server::layers::RequestId;
use crate::server::memory::held;
use crate::server::models::json as to_json;
use crate::server::routes::ops::json;

/// The numbers of a sequence as scores, unless they are wanted as they are.
pub(crate) fn scores(head: &HeadConfig, mut values: Vec<f32>, raw: bool) -> Vec<f32> {
    let function = if raw { ScoreFunction::Identity } else { head.function };
    function.apply(&mut values);
    values
}

/// Labels with their scores, best first.
pub(crate) fn predictions(head: &HeadConfig, values: Vec<f32>, raw: bool) -> Vec<Prediction> {
    let scores = scores(head, values, raw).into_iter().zip(&head.labels);
    let mut predictions: Vec<_> = scores.map(|(score, label)| Prediction { score, label: label.clone() }).collect();
    predictions.sort_by(|a, b| b.score.total_cmp(&a.score));
    predictions
}

/// Positions of the sequences with their scores, best first; like scores stay in order.
pub(crate) fn ranked(head: &HeadConfig, reply: Reply, raw: bool) -> Vec<(usize, f32)> {
    let score = |values: Vec<f32>| scores(head, values, raw).first().copied().unwrap_or_default();
    let mut ranked: Vec<_> = reply.rows.into_iter().map(|rows| score(rows.pooled)).enumerate().collect();
    ranked.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    ranked
}

/// `query` with each of `texts`.
pub(crate) fn pairs(query: &str, texts: impl IntoIterator<Item = String>) -> Vec<Piece> {
    let query: Arc<str> = query.into();
    texts.into_iter().map(|text| Piece::Pair(Arc::clone(&query), text)).collect()
}

/// What becomes the sequence of a text or a pair.
pub(crate) fn piece(sentence: Sentence) -> Piece {
    match sentence {
        Sentence::One(text) => Piece::Item(Item::Text(text)),
        Sentence::Two(first, second) => Piece::Pair(first.into(), second),
    }
}

/// The labels of each text or pair of texts with their scores, best first.
#[utoipa::path(post, path = "/predict", tag = "Classification", request_body = PredictRequest,
    responses((status = 200, description = "The labels of the text or pair; for a list of them, a list per entry",
        body = Predictions)))]
pub(crate) async fn predict(call: Call<PredictRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    let head = target.model.head()?;
    let PredictRequest { inputs, truncate, truncation_direction, raw_scores } = body;
    let (sentences, is_list) = match inputs {
        PredictInput::One(sentence) => (vec![sentence], false),
        PredictInput::Many(many) => (checked_batch(&target.app, many, "inputs")?, true),
    };
    let pieces = sentences.into_iter().map(piece).collect();
    let options = Options { truncate, direction: truncation_direction, prompt_name: None };
    let work = Work { clock, body_memory: memory, pieces, field: "inputs", echoes: false };
    let Computed { reply, timing, memory } = compute(&target, work, options, Want::Pooled).await?;
    let mut answers: Vec<_> = reply.rows.into_iter().map(|rows| predictions(head, rows.pooled, raw_scores)).collect();
    let answer = match is_list {
        true => Predictions::Many(answers),
        false => Predictions::One(answers.pop().unwrap_or_default()),
    };
    Ok(timing.on(json(held(to_json(&answer), memory)).into_response()))
}

/// How well each text answers the query, best first.
#[utoipa::path(post, path = "/rerank", tag = "Classification", request_body = RerankRequest,
    responses((status = 200, description = "The texts' positions and scores, best first", body = Vec<Rank>)))]
pub(crate) async fn rerank(call: Call<RerankRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    let RerankRequest { query, texts, truncate, truncation_direction, raw_scores, return_text } = body;
    if texts.n_sent == 0 {
        return Err(ServerError::Empty { field: "texts" });
    }
    let head = target.model.reranker()?;
    let texts = checked_batch(&target.app, texts, "texts")?;
    let mut kept: Vec<_> =
        if return_text { texts.iter().cloned().map(Some).collect() } else { vec![None; texts.len()] };
    let options = Options { truncate, direction: truncation_direction, prompt_name: None };
    let pieces = pairs(&query, texts);
    let work = Work { clock, body_memory: memory, pieces, field: "texts", echoes: return_text };
    let Computed { reply, timing, memory } = compute(&target, work, options, Want::Pooled).await?;
    let rank = |(index, score): (usize, f32)| Rank { index, text: kept[index].take(), score };
    let ranks: Vec<_> = ranked(head, reply, raw_scores).into_iter().map(rank).collect();
    Ok(timing.on(json(held(to_json(&ranks), memory)).into_response()))
}

/// How well each document answers the query, best first, in the words of Cohere's and Jina's APIs.
#[utoipa::path(post, path = "/v1/rerank", tag = "Classification", request_body = CohereRerankRequest,
    responses((status = 200, description = "The best documents, best first", body = CohereRerankResponse)))]
pub(crate) async fn v1_rerank(
    Extension(RequestId(id)): Extension<RequestId>,
    call: Call<CohereRerankRequest>,
) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    let CohereRerankRequest { query, documents, top_n, return_documents, .. } = body;
    let head = target.model.reranker()?;
    if top_n == Some(0) {
        return Err(ServerError::Value { field: "top_n", reason: "must be at least 1".to_owned() });
    }
    let texts: Vec<String> =
        checked_batch(&target.app, documents, "documents")?.into_iter().map(|document| document.0).collect();
    let echoes = return_documents == Some(true);
    let mut kept: Vec<_> = match echoes {
        true => texts.iter().map(|text| Some(DocumentText { text: text.clone() })).collect(),
        false => vec![None; texts.len()],
    };
    let work = Work { clock, body_memory: memory, pieces: pairs(&query, texts), field: "documents", echoes };
    let Computed { reply, timing, memory } = compute(&target, work, Options::default(), Want::Pooled).await?;
    let mut ranked = ranked(head, reply, false);
    ranked.truncate(top_n.unwrap_or(usize::MAX));
    let result =
        |(index, relevance_score): (usize, f32)| CohereResult { index, relevance_score, document: kept[index].take() };
    let response = CohereRerankResponse {
        id,
        object: "list",
        model: target.model.card.served_name.clone(),
        results: ranked.into_iter().map(result).collect(),
        usage: OpenAiUsage { prompt_tokens: timing.n_tokens, total_tokens: timing.n_tokens },
    };
    Ok(timing.on(json(held(to_json(&response), memory)).into_response()))
}

/// The same as `/v1/rerank`.
#[utoipa::path(post, path = "/v2/rerank", tag = "Classification", request_body = CohereRerankRequest,
    responses((status = 200, description = "The best documents, best first", body = CohereRerankResponse)))]
pub(crate) async fn v2_rerank(
    id: Extension<RequestId>,
    call: Call<CohereRerankRequest>,
) -> Result<Response, ServerError> {
    v1_rerank(id, call).await
}
