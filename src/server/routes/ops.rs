//! Routes for those who run the service.
//!
//! None of them waits for the model: a probe is answered while a long batch runs.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};

use crate::server::api::{Info, OpenAiModel, OpenAiModels, ReloadResponse};
use crate::server::error::ServerError;
use crate::server::extract::asked_model;
use crate::server::models::json as to_json;
use crate::server::state::{AppState, Phase};
use crate::telemetry::Metrics;

/// A body that is JSON already.
pub(crate) fn json(body: impl Into<Bytes>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body.into())
}

/// The model and the limits.
#[utoipa::path(get, path = "/info", tag = "Operations",
    responses((status = 200, description = "The model and the limits", body = Info)))]
pub(crate) async fn info(State(app): State<AppState>, uri: Uri, headers: HeaderMap) -> Result<Response, ServerError> {
    let model = app.models.find(asked_model(&uri, &headers)?.as_deref(), None)?;
    Ok(json(model.info.clone()).into_response())
}

/// Whether the model can answer: 200, also while the service drains.
#[utoipa::path(get, path = "/health", tag = "Operations",
    responses((status = 200, description = "The model can answer")))]
pub(crate) async fn health(State(app): State<AppState>) -> Result<StatusCode, ServerError> {
    if app.readiness.phase() == Phase::Loading {
        return Err(ServerError::Loading);
    }
    if app.models.are_alive() { Ok(StatusCode::OK) } else { Err(ServerError::Unhealthy) }
}

/// The same as `/health`.
#[utoipa::path(get, path = "/ping", tag = "Operations",
    responses((status = 200, description = "The model can answer")))]
pub(crate) async fn ping(state: State<AppState>) -> Result<StatusCode, ServerError> {
    health(state).await
}

/// The same as `/health`.
#[utoipa::path(get, path = "/", operation_id = "root_health", tag = "Operations",
    responses((status = 200, description = "The model can answer")))]
pub(crate) async fn root(state: State<AppState>) -> Result<StatusCode, ServerError> {
    health(state).await
}

/// Whether the process runs: 200 always. A process that can answer this need not be restarted.
#[utoipa::path(get, path = "/health/live", tag = "Operations",
    responses((status = 200, description = "The process runs")))]
pub(crate) async fn live() -> StatusCode {
    StatusCode::OK
}

/// Whether requests are taken: 503 while the service starts and while it drains.
#[utoipa::path(get, path = "/health/ready", tag = "Operations",
    responses((status = 200, description = "Requests are taken")))]
pub(crate) async fn ready(State(app): State<AppState>) -> Result<StatusCode, ServerError> {
    is_ready(&app).map(|()| StatusCode::OK)
}

/// Whether requests are taken, and why not.
pub(crate) fn is_ready(app: &AppState) -> Result<(), ServerError> {
    match app.readiness.phase() {
        Phase::Loading => Err(ServerError::Loading),
        Phase::Draining => Err(ServerError::Draining { retry_after: std::time::Duration::from_secs(1) }),
        Phase::Ready if app.models.are_alive() => Ok(()),
        Phase::Ready => Err(ServerError::Unhealthy),
    }
}

/// All metrics, for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "Operations",
    responses((status = 200, description = "All metrics in Prometheus' text format", body = String,
        content_type = "text/plain")))]
pub(crate) async fn metrics(State(app): State<AppState>) -> Result<Response, ServerError> {
    // A millisecond of formatting and files of the kernel: not on the reactor.
    let metrics = Arc::clone(&app.metrics);
    let text = tokio::task::spawn_blocking(move || metrics.render()).await.map_err(|_| ServerError::Internal)?;
    let content_type = HeaderValue::from_static(Metrics::CONTENT_TYPE);
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

/// The models, the default one first.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI",
    responses((status = 200, description = "The models", body = OpenAiModels)))]
pub(crate) async fn models(State(app): State<AppState>) -> Response {
    let data = app.models.all().iter().map(|model| model.openai.clone()).collect();
    json(to_json(&OpenAiModels { object: "list", data })).into_response()
}

/// A model, by the name it is served under or the one it was loaded by.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "OpenAI",
    params(("id" = String, Path, description = "Name of the model")),
    responses((status = 200, description = "The model", body = OpenAiModel)))]
pub(crate) async fn model(State(app): State<AppState>, Path(id): Path<String>) -> Result<Response, ServerError> {
    Ok(json(to_json(&app.models.named(&id)?.openai)).into_response())
}

/// Loads a model (`?model=NAME`), or all of them, anew from where they came, and replaces each that passes its checks;
/// what the old one has admitted is still answered. A new artefact that is damaged is refused, and the old one goes on
/// serving. Without a name the file of API keys and the certificate are read again first. Needs an API key; a server
/// without keys takes SIGHUP instead.
#[utoipa::path(post, path = "/admin/reload", tag = "Operations",
    responses((status = 200, description = "The models that were replaced", body = ReloadResponse)))]
pub(crate) async fn reload(State(app): State<AppState>, uri: Uri, headers: HeaderMap) -> Result<Response, ServerError> {
    let name = asked_model(&uri, &headers)?;
    // Goes on when the client leaves: half a reload would help nobody.
    let reloading = tokio::spawn(async move { app.reload(name.as_deref()).await });
    let reloaded = reloading.await.map_err(|_| ServerError::Internal)??;
    Ok(json(to_json(&ReloadResponse { reloaded })).into_response())
}
