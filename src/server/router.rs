//! Which path leads where.

use axum::Router;
use axum::routing::{any, get, post};
use utoipa_swagger_ui::SwaggerUi;

use super::routes::{embed, inference, ops, score, text};
use super::state::AppState;
use super::{layers, openapi};

/// The whole service on one port, without a socket.
#[allow(clippy::needless_pass_by_value, reason = "the router keeps the state; a handle is what callers have")]
pub fn router(state: AppState) -> Router {
    let routes = work().merge(probes()).merge(operations()).with_state(state.clone());
    layers::around(routes.merge(documentation(openapi::document())), &state)
}

/// The service without what is for those who run it; [`admin_router`] has that.
#[allow(clippy::needless_pass_by_value, reason = "as above")]
pub fn public_router(state: AppState) -> Router {
    let routes = work().merge(probes()).with_state(state.clone());
    layers::around(routes.merge(documentation(openapi::public_document())), &state)
}

/// Metrics, administration and probes, for a port of their own. No browser's page has business here: there is no CORS.
#[allow(clippy::needless_pass_by_value, reason = "as above")]
pub fn admin_router(state: AppState) -> Router {
    layers::around_admin(operations().merge(probes()).with_state(state.clone()), &state)
}

fn documentation(document: utoipa::openapi::OpenApi) -> Router {
    SwaggerUi::new("/docs").url("/api-doc/openapi.json", document).into()
}

fn probes() -> Router<AppState> {
    Router::new()
        .route("/health", get(ops::health))
        .route("/health/live", get(ops::live))
        .route("/health/ready", get(ops::ready))
        .route("/ping", get(ops::ping))
}

fn operations() -> Router<AppState> {
    Router::new().route("/metrics", get(ops::metrics)).route("/admin/reload", post(ops::reload))
}

fn work() -> Router<AppState> {
    Router::new()
        .route("/", get(ops::root).post(embed::root))
        .route("/embed", post(embed::embed))
        .route("/embed_all", post(embed::embed_all))
        .route("/similarity", post(embed::similarity))
        .route("/embeddings", post(embed::embeddings))
        .route("/v1/embeddings", post(embed::v1_embeddings))
        .route("/predict", post(score::predict))
        .route("/rerank", post(score::rerank))
        .route("/v1/rerank", post(score::v1_rerank))
        .route("/v2/rerank", post(score::v2_rerank))
        .route("/v2", get(inference::server))
        .route("/v2/health/live", get(inference::live))
        .route("/v2/health/ready", get(inference::ready))
        .route(inference::MODEL_PATH, any(inference::of_model))
        .route("/v1/models", get(ops::models))
        .route(layers::MODEL_PATH, get(ops::model))
        .route("/tokenize", post(text::tokenize))
        .route("/decode", post(text::decode))
        .route("/info", get(ops::info))
}
