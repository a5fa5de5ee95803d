//! What answers each method.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::sleep;
use tonic::Status;

use super::context::{Context, Head};
use super::incoming::Messages;
use super::messages::{
    DecodeRequest, DecodeResponse, EmbedAllRequest, EmbedAllResponse, EmbedRequest, EmbedResponse, EmbedSparseRequest,
    EmbedSparseResponse, EncodeRequest, EncodeResponse, HealthCheckRequest, HealthCheckResponse, InfoRequest,
    InfoResponse, Metadata, ModelType, PredictPairRequest, PredictRequest, PredictResponse, Prediction, Rank,
    RerankRequest, RerankResponse, RerankStreamRequest, ServingStatus, SimpleToken, TokenEmbedding,
    TruncationDirection,
};
use super::outgoing::Answer;
use crate::model::Want;
use crate::server::api::{self, Item, Sentence};
use crate::server::compute::{Computed, Timing, Work, compute_above};
use crate::server::config::Task;
use crate::server::error::ServerError;
use crate::server::inputs::{Options, Piece, check_chars, checked_len, prompt, prompted, tokenizing};
use crate::server::memory::{merged, take_above};
use crate::server::routes::embed::{checked_dimensions, vectors};
use crate::server::routes::ops::is_ready;
use crate::server::routes::score::{pairs, piece, predictions, ranked};
use crate::server::routes::text::{text_of, tokens};
use crate::server::state::AppState;

/// The services that can be asked for their health.
const SERVICES: [&str; 6] = ["", "tei.v1.Info", "tei.v1.Embed", "tei.v1.Predict", "tei.v1.Rerank", "tei.v1.Tokenize"];

/// How often a watched health is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(250);

fn options(truncate: bool, direction: i32, prompt_name: Option<String>) -> Options {
    let direction = match TruncationDirection::try_from(direction) {
        Ok(TruncationDirection::Left) => api::TruncationDirection::Left,
        _ => api::TruncationDirection::Right,
    };
    Options { truncate: Some(truncate), direction, prompt_name }
}

fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn metadata(timing: &Timing) -> Option<Metadata> {
    Some(Metadata {
        compute_chars: narrow(timing.n_chars),
        compute_tokens: narrow(timing.n_tokens),
        total_time_ns: nanos(timing.clock.start.elapsed()),
        tokenization_time_ns: nanos(timing.tokenize),
        queue_time_ns: nanos(timing.queue),
        inference_time_ns: nanos(timing.infer),
    })
}

async fn run(context: Context, pieces: Vec<Piece>, options: Options, want: Want) -> Result<Computed, ServerError> {
    run_as(context, pieces, options, want, false).await
}

/// The same; `echoes` if the answer gives texts back.
async fn run_as(
    context: Context,
    pieces: Vec<Piece>,
    options: Options,
    want: Want,
    echoes: bool,
) -> Result<Computed, ServerError> {
    let Context { target, clock, memory, small } = context;
    let work = Work { clock, body_memory: memory, pieces, field: "inputs", echoes };
    compute_above(small, &target, work, options, want).await
}

pub(super) async fn info(context: Context, _: InfoRequest) -> Result<Answer<InfoResponse>, ServerError> {
    let (config, model) = (&context.target.app.config, &context.target.model);
    let limits = model.engine.limits();
    let model_type = match &model.card.task {
        Task::Embedding { .. } => ModelType::Embedding,
        Task::Classification(head) if head.labels.len() == 1 => ModelType::Reranker,
        Task::Classification(_) => ModelType::Classifier,
    };
    let message = InfoResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        sha: option_env!("NIWAKI_BUILD_SHA").map(str::to_owned),
        docker_label: option_env!("NIWAKI_IMAGE_LABEL").map(str::to_owned),
        model_id: model.card.model_id.clone(),
        model_sha: model.card.model_sha.clone(),
        model_dtype: model.card.dtype.clone(),
        model_type: model_type.into(),
        max_concurrent_requests: narrow(limits.max_concurrent_requests),
        max_input_length: narrow(model.max_input_tokens),
        max_batch_tokens: narrow(limits.max_batch_tokens),
        max_batch_requests: limits.max_batch_requests.map(narrow),
        max_client_batch_size: narrow(config.max_client_batch_size),
        tokenization_workers: narrow(config.tokenization_workers.get()),
    };
    Ok(message.into())
}

pub(super) async fn embed(context: Context, request: EmbedRequest) -> Result<Answer<EmbedResponse>, ServerError> {
    let model = &context.target.model;
    model.embeds()?;
    let dimensions = checked_dimensions(model, request.dimensions.map(|width| width as usize))?;
    let options = options(request.truncate, request.truncation_direction, request.prompt_name);
    let pieces = vec![Piece::Item(Item::Text(request.inputs))];
    let Computed { reply, timing, memory } = run(context, pieces, options, Want::Pooled).await?;
    let embeddings = vectors(reply, dimensions, request.normalize.unwrap_or(true)).pop().unwrap_or_default();
    Ok(Answer { message: EmbedResponse { embeddings, metadata: metadata(&timing) }, memory })
}

pub(super) async fn embed_sparse(
    _: Context,
    _: EmbedSparseRequest,
) -> Result<Answer<EmbedSparseResponse>, ServerError> {
    Err(ServerError::MethodNotAllowed)
}

pub(super) async fn embed_all(
    context: Context,
    request: EmbedAllRequest,
) -> Result<Answer<EmbedAllResponse>, ServerError> {
    let model = &context.target.model;
    model.embeds()?;
    let width = model.card.d_model;
    let options = options(request.truncate, request.truncation_direction, request.prompt_name);
    let pieces = vec![Piece::Item(Item::Text(request.inputs))];
    let Computed { mut reply, timing, memory } = run(context, pieces, options, Want::PooledAndTokens).await?;
    let rows = reply.rows.pop().unwrap_or_default().tokens;
    let rows = rows.chunks_exact(width).map(|row| TokenEmbedding { embeddings: row.to_vec() });
    let message = EmbedAllResponse { token_embeddings: rows.collect(), metadata: metadata(&timing) };
    Ok(Answer { message, memory })
}

pub(super) async fn predict(context: Context, request: PredictRequest) -> Result<Answer<PredictResponse>, ServerError> {
    let PredictRequest { inputs, truncate, raw_scores, truncation_direction } = request;
    predicted(context, Sentence::One(inputs), options(truncate, truncation_direction, None), raw_scores).await
}

pub(super) async fn predict_pair(
    context: Context,
    request: PredictPairRequest,
) -> Result<Answer<PredictResponse>, ServerError> {
    let PredictPairRequest { mut inputs, truncate, raw_scores, truncation_direction } = request;
    let sentence = match (inputs.pop(), inputs.pop(), inputs.is_empty()) {
        (Some(text), None, true) => Sentence::One(text),
        (Some(second), Some(first), true) => Sentence::Two(first, second),
        _ => {
            let reason = "must have one or two elements".to_owned();
            return Err(ServerError::Value { field: "inputs", reason });
        }
    };
    predicted(context, sentence, options(truncate, truncation_direction, None), raw_scores).await
}

async fn predicted(
    context: Context,
    sentence: Sentence,
    options: Options,
    raw: bool,
) -> Result<Answer<PredictResponse>, ServerError> {
    let model = Arc::clone(&context.target.model);
    let head = model.head()?;
    let Computed { mut reply, timing, memory } = run(context, vec![piece(sentence)], options, Want::Pooled).await?;
    let values = reply.rows.pop().unwrap_or_default().pooled;
    let message = |prediction: api::Prediction| Prediction { score: prediction.score, label: prediction.label };
    let predictions = predictions(head, values, raw).into_iter().map(message).collect();
    Ok(Answer { message: PredictResponse { predictions, metadata: metadata(&timing) }, memory })
}

pub(super) async fn rerank(context: Context, request: RerankRequest) -> Result<Answer<RerankResponse>, ServerError> {
    let RerankRequest { query, texts, truncate, raw_scores, return_text, truncation_direction } = request;
    checked_len(&context.target.app, texts.len(), "texts")?;
    let model = Arc::clone(&context.target.model);
    let head = model.reranker()?;
    let mut kept = if return_text { texts.iter().cloned().map(Some).collect() } else { vec![None; texts.len()] };
    let options = options(truncate, truncation_direction, None);
    let pieces = pairs(&query, texts);
    let Computed { reply, timing, memory } = run_as(context, pieces, options, Want::Pooled, return_text).await?;
    let rank = |(index, score): (usize, f32)| Rank { index: narrow(index), text: kept[index].take(), score };
    let ranks = ranked(head, reply, raw_scores).into_iter().map(rank).collect();
    Ok(Answer { message: RerankResponse { ranks, metadata: metadata(&timing) }, memory })
}

pub(super) async fn rerank_stream(
    head: Head,
    mut messages: Messages<RerankStreamRequest>,
) -> Result<Answer<RerankResponse>, ServerError> {
    let mut whole: Option<RerankRequest> = None;
    let mut memory: Option<OwnedSemaphorePermit> = None;
    while let Some((message, share)) = messages.next_of_many().await? {
        memory = merged(memory, share);
        let RerankStreamRequest { query, text, truncate, raw_scores, return_text, truncation_direction } = message;
        let whole = whole.get_or_insert_with(|| RerankRequest {
            query,
            texts: Vec::new(),
            truncate,
            raw_scores,
            return_text,
            truncation_direction,
        });
        whole.texts.push(text);
        checked_len(&head.app, whole.texts.len(), "texts")?;
    }
    rerank(head.context(memory)?, whole.unwrap_or_default()).await
}

pub(super) async fn tokenize(context: Context, request: EncodeRequest) -> Result<Answer<EncodeResponse>, ServerError> {
    let EncodeRequest { inputs, add_special_tokens, prompt_name } = request;
    if inputs.is_empty() {
        return Err(ServerError::Empty { field: "inputs" });
    }
    let Context { target, clock, memory, small } = context;
    let ((tokens, memory), _) = tokenizing(&target, &clock, inputs.len(), move |target, tokenizer, _| {
        let prompt = prompt(&target.model, prompt_name.as_deref())?;
        check_chars(&target.model, &[prompt.unwrap_or_default(), &inputs])?;
        // The share of the memory stays with the text, also when its client has left.
        Ok((tokens(tokenizer, &prompted(prompt, &inputs), add_special_tokens)?, memory))
    })
    .await?;
    drop(memory);
    let n_bytes = tokens.iter().map(|token| size_of::<api::SimpleToken>() + token.text.len()).sum();
    let memory = take_above(small, &target.app, n_bytes)?;
    let message = |token: api::SimpleToken| SimpleToken {
        id: token.id,
        text: token.text,
        special: token.special,
        start: token.start.map(narrow),
        stop: token.stop.map(narrow),
    };
    Ok(Answer { message: EncodeResponse { tokens: tokens.into_iter().map(message).collect() }, memory })
}

pub(super) async fn decode(context: Context, request: DecodeRequest) -> Result<Answer<DecodeResponse>, ServerError> {
    let DecodeRequest { ids, skip_special_tokens } = request;
    if ids.is_empty() {
        return Err(ServerError::Empty { field: "ids" });
    }
    let Context { target, clock, memory, small } = context;
    let ((text, memory), _) = tokenizing(&target, &clock, 4 * ids.len(), move |target, tokenizer, _| {
        Ok((text_of(&target.model, tokenizer, &ids, skip_special_tokens)?, memory))
    })
    .await?;
    drop(memory);
    let memory = take_above(small, &target.app, text.len())?;
    Ok(Answer { message: DecodeResponse { text }, memory })
}

fn serving(app: &AppState) -> HealthCheckResponse {
    let status = if is_ready(app).is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
    HealthCheckResponse { status: status.into() }
}

pub(super) async fn health(
    context: Context,
    request: HealthCheckRequest,
) -> Result<Answer<HealthCheckResponse>, ServerError> {
    if !SERVICES.contains(&request.service.as_str()) {
        return Err(ServerError::NotFound);
    }
    Ok(serving(&context.target.app).into())
}

/// The health now and whenever it changes, until the client leaves or the service ends.
pub(super) fn watch_health(
    app: AppState,
    request: HealthCheckRequest,
) -> mpsc::Receiver<Result<HealthCheckResponse, Status>> {
    let (out, answers) = mpsc::channel(1);
    tokio::spawn(async move {
        if !SERVICES.contains(&request.service.as_str()) {
            let unknown = HealthCheckResponse { status: ServingStatus::ServiceUnknown.into() };
            // Told once, and kept open: the service might be added, the protocol says.
            if out.send(Ok(unknown)).await.is_ok() {
                out.closed().await;
            }
            return;
        }
        let mut last = None;
        loop {
            let now = serving(&app);
            if last != Some(now) {
                last = Some(now);
                if out.send(Ok(now)).await.is_err() {
                    return;
                }
                if now.status == i32::from(ServingStatus::NotServing) && app.readiness.is_draining() {
                    return;
                }
            }
            tokio::select! {
                () = sleep(WATCH_EVERY) => {}
                () = out.closed() => return,
            }
        }
    });
    answers
}
