//! What every request passes on its way in and out.
//!
//! ```text
//! front: clock, request id, count  →  CORS  →  guard: key, phase  →  gzip  →  catch panics  →  route
//!        bodies of errors       ←
//! ```
//!
//! CORS stands before the key, because a browser's preflight carries none, and because it must be let read a 401.

use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tokio::time::Instant;
use tower::ServiceBuilder;
use tower_http::CompressionLevel;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};
use tracing::Instrument;
use uuid::Uuid;

use super::compute::TIMING_HEADERS;
use super::connection::Crowded;
use super::error::{Dialect, ServerError, Unwritten};
use super::extract;
use super::grpc;
use super::routes::inference;
use super::state::{AppState, Phase};
use crate::telemetry::events::{ResponseStats, StageTimes};
use crate::telemetry::{RejectReason, RequestSpan, Route, Trace, TraceHeaders, events};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The model that a request is for, where its API has no field for it.
pub(crate) const MODEL: HeaderName = HeaderName::from_static("x-model");
pub(crate) const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The wildcard route of models: their names hold slashes.
pub(crate) const MODEL_PATH: &str = "/v1/models/{*id}";

/// Below this, gzip costs more time than the bytes it saves take on a network: a single embedding stays as it is.
const GZIP_ABOVE: u64 = 32 * 1024;

/// What is known of a request on arrival.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) start: Instant,
    pub(crate) route: Route,
    pub(crate) trace: Trace,
}

/// A request's id.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// Puts the layers around all routes, and around what matches none.
pub(crate) fn around(router: Router, state: &AppState) -> Router {
    let gzip_when = SizeAbove::new(GZIP_ABOVE).and(NotForContentType::const_new("text/event-stream"));
    let layers = ServiceBuilder::new()
        .layer(from_fn_with_state(state.clone(), front))
        .layer(cors(&state.cors_origins))
        .layer(from_fn_with_state(state.clone(), guard))
        .layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(gzip_when))
        .layer(CatchPanicLayer::custom(|_| ServerError::Internal.into_response()));
    router.layer(layers)
}

/// The layers of the port for administration: no browsers; the text of metrics is long.
pub(crate) fn around_admin(router: Router, state: &AppState) -> Router {
    let layers = ServiceBuilder::new()
        .layer(from_fn_with_state(state.clone(), front))
        .layer(from_fn_with_state(state.clone(), guard))
        .layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(SizeAbove::new(1024)))
        .layer(CatchPanicLayer::custom(|_| ServerError::Internal.into_response()));
    router.layer(layers)
}

/// The layers of gRPC: neither browsers nor gzip.
pub(crate) fn around_grpc(router: Router, state: &AppState) -> Router {
    let layers = ServiceBuilder::new()
        .layer(from_fn_with_state(state.clone(), front))
        .layer(from_fn_with_state(state.clone(), guard))
        .layer(CatchPanicLayer::custom(|_| ServerError::Internal.into_response()));
    router.layer(layers)
}

fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let exposed = TIMING_HEADERS.into_iter().chain([REQUEST_ID, header::RETRY_AFTER, TRACEPARENT]);
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::CONTENT_TYPE,
            header::AUTHORIZATION,
            API_KEY,
            REQUEST_ID,
            REQUEST_TIMEOUT,
            MODEL,
            TRACEPARENT,
        ])
        .expose_headers(exposed.collect::<Vec<_>>())
        .max_age(Duration::from_secs(3600));
    if origins.is_empty() { layer.allow_origin(Any) } else { layer.allow_origin(AllowOrigin::list(origins.to_vec())) }
}

fn route_of(request: &Request) -> Route {
    match request.extensions().get::<MatchedPath>().map(MatchedPath::as_str) {
        None => Route::Other,
        Some(MODEL_PATH) => Route::Model,
        Some(inference::MODEL_PATH) => inference::route_of(request.uri().path()),
        Some(path) => Route::matched(path),
    }
}

/// Times, names and counts every response, and writes the bodies of errors.
async fn front(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    let (start, route) = (Instant::now(), route_of(&request));
    let work = is_work(route, request.method());
    let span = begin_span(&app, &request, route, work);
    let dialect = Dialect::of(route, request.uri().path());
    let request_id = request_id(request.headers());
    let trace_id = span.trace().id();
    let said_in = events::request_span(request_id.to_str().unwrap_or_default(), trace_id.as_deref());
    let old_protocol = request.version() < Version::HTTP_2;
    let _in_flight = app.metrics.in_flight();
    request.extensions_mut().insert(Arrival { start, route, trace: span.trace().clone() });
    request.extensions_mut().insert(RequestId(request_id.to_str().unwrap_or_default().to_owned()));
    let answering = async { write_error(&app, next.run(request).await, dialect, work) };
    let mut response = answering.instrument(said_in).await;
    // In HTTP/2 the connection is told to go away by a frame of its own.
    if old_protocol && app.readiness.phase() == Phase::Draining {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let stats = ResponseStats {
        route,
        code: grpc::counted_code(&response),
        duration: start.elapsed(),
        request_id: request_id.to_str().unwrap_or_default(),
        trace_id: trace_id.as_deref(),
    };
    if response.extensions().get::<grpc::Streamed>().is_none() {
        count(&app, &stats, work, response.extensions().get::<StageTimes>().copied());
    }
    if let Some(parent) = span.header().and_then(|parent| HeaderValue::try_from(parent).ok()) {
        response.headers_mut().insert(TRACEPARENT, parent);
    }
    span.end(stats.code, stats.request_id);
    response.headers_mut().insert(REQUEST_ID, request_id);
    response
}

/// Counts an answer, and tells of work that was slow.
pub(crate) fn count(app: &AppState, stats: &ResponseStats<'_>, work: bool, stages: Option<StageTimes>) {
    events::response_sent(&app.metrics, stats);
    if work && app.config.slow_request.is_some_and(|limit| stats.duration >= limit) {
        events::slow_request(stats, stages);
    }
}

/// The span of a request for work; of probes and pages there are none.
fn begin_span(app: &AppState, request: &Request, route: Route, work: bool) -> RequestSpan {
    let text = |name: &HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
    let headers = TraceHeaders { parent: text(&TRACEPARENT), state: text(&TRACESTATE) };
    match app.tracer.get().filter(|_| work) {
        // Work comes by one method only.
        Some(tracer) => tracer.begin(headers, "POST", route),
        None => RequestSpan::none(headers),
    }
}

/// The client's id if it can be written to a log as it is, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    const MAX_LEN: usize = 128;
    let acceptable = |id: &&HeaderValue| {
        (1..=MAX_LEN).contains(&id.len())
            && id.as_bytes().iter().all(|&byte| byte.is_ascii_alphanumeric() || b"-_.:/+=@~".contains(&byte))
    };
    headers.get(REQUEST_ID).filter(acceptable).cloned().unwrap_or_else(|| {
        let mut text = Uuid::encode_buffer();
        let text = Uuid::now_v7().hyphenated().encode_lower(&mut text);
        HeaderValue::from_str(text).expect("a UUID is made of hexadecimal digits and hyphens")
    })
}

/// Gives a failure its body and counts it. A probe that is told to wait is no refusal.
fn write_error(app: &AppState, mut response: Response, dialect: Dialect, work: bool) -> Response {
    let error = match response.extensions_mut().remove::<Unwritten>() {
        Some(Unwritten(error)) => error,
        // Made by the router or by the pages of the documentation.
        None => match ServerError::of_status(response.status()) {
            Some(error) => error.into(),
            None => return response,
        },
    };
    if let Some(reason) = error.reject_reason().filter(|&reason| work || reason == RejectReason::Auth) {
        events::rejected(&app.metrics, reason);
    }
    if dialect == Dialect::Grpc {
        return grpc::refusal(&error);
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(error.body(dialect));
    response
}

/// Whether `route` asks something of the tokenizer or the model.
fn is_work(route: Route, method: &Method) -> bool {
    match route {
        Route::Embed
        | Route::EmbedAll
        | Route::Similarity
        | Route::Tokenize
        | Route::Decode
        | Route::OpenAiEmbeddings
        | Route::Embeddings
        | Route::Predict
        | Route::Rerank
        | Route::CohereRerank
        | Route::CohereRerank2
        | Route::Infer
        | Route::GrpcEmbed
        | Route::GrpcPredict
        | Route::GrpcRerank
        | Route::GrpcTokenize
        | Route::Root => method == Method::POST,
        Route::Models
        | Route::Inference
        | Route::InferenceLive
        | Route::InferenceReady
        | Route::InferenceModel
        | Route::InferenceModelReady
        | Route::Reload
        | Route::GrpcInfo
        | Route::GrpcHealth
        | Route::Model
        | Route::Info
        | Route::Health
        | Route::HealthLive
        | Route::HealthReady
        | Route::Ping
        | Route::Metrics
        | Route::Docs
        | Route::OpenApi
        | Route::Other => false,
    }
}

/// Whether `route` is behind the key: work, and what tells about the model.
fn needs_key(route: Route, method: &Method) -> bool {
    is_work(route, method)
        || matches!(
            route,
            Route::Models
                | Route::Model
                | Route::Info
                | Route::Inference
                | Route::InferenceModel
                | Route::Reload
                | Route::GrpcInfo
        )
}

fn has_key(app: &AppState, headers: &HeaderMap) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).and_then(|value| {
        let (scheme, key) = value.split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
    });
    // A token may be for a proxy on the way, or for nobody here.
    let own = headers.get(API_KEY).map(HeaderValue::as_bytes);
    [bearer, own].into_iter().flatten().any(|key| app.keys.accept(key))
}

/// Lets in who has the key, and work only while the service is ready.
async fn guard(State(app): State<AppState>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<Arrival>().map_or(Route::Other, |arrival| arrival.route);
    // What changes the service is never open to everyone.
    let locked = needs_key(route, request.method()) && (route == Route::Reload || app.keys.are_set());
    if locked && !has_key(&app, request.headers()) {
        return refuse(request, ServerError::Unauthorized).await;
    }
    if !is_work(route, request.method()) {
        return next.run(request).await;
    }
    if request.extensions().get::<Crowded>().is_some() {
        return refuse(request, ServerError::Crowded).await;
    }
    let _work = app.work.begin();
    match app.readiness.phase() {
        Phase::Ready => next.run(request).await,
        Phase::Loading => refuse(request, ServerError::Loading).await,
        Phase::Draining => refuse(request, ServerError::DRAINING).await,
    }
}

async fn refuse(request: Request, error: ServerError) -> Response {
    let (head, body) = request.into_parts();
    if !body.is_end_stream() {
        extract::discard(&head.headers, body).await;
    }
    error.into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::routing::post;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::server::testing::{TOKENIZER, state};
    use crate::server::{ModelParts, ServedModel, ServerConfig};
    use crate::telemetry::Metrics;
    use crate::text::Tokenizer;

    async fn bug() -> Response {
        panic!("as the test asks")
    }

    #[tokio::test]
    async fn a_bug_is_a_500_in_json_and_costs_one_request() {
        let state = state();
        let routes = Router::new().route("/embed", post(bug)).route("/v1/embeddings", post(bug));
        let app = around(routes, &state);
        for (path, expected) in [
            ("/embed", r#"{"error":"internal error","error_type":"Internal"}"#),
            (
                "/v1/embeddings",
                r#"{"error":{"message":"internal error","type":"server_error","param":null,"code":"internal_error"}}"#,
            ),
        ] {
            let request = Request::post(path).body(Body::empty()).unwrap();
            let response = app.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status().as_u16(), 500);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), expected);
        }
        assert_eq!(state.metrics.responses(Route::Embed, 500), 1);
        assert_eq!(state.metrics.requests_in_flight(), 0);
        assert_eq!(state.work.count(), 0, "the request is over");
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        use crate::server::ConfigError;
        let state = state();
        let new = |change: &dyn Fn(&mut ServerConfig, &mut ServedModel)| {
            let first = state.models.first();
            let (mut config, mut model) = (state.config.clone(), first.card.clone());
            change(&mut config, &mut model);
            let tokenizer = Arc::new(Tokenizer::from_bytes(TOKENIZER).unwrap());
            let parts = ModelParts { model, tokenizer, engine: first.engine.clone() };
            AppState::new(config, vec![parts], Metrics::new()).map(drop)
        };
        assert!(new(&|_, _| ()).is_ok());
        let range = |result: Result<(), ConfigError>, expected: &str| match result {
            Err(ConfigError::Range { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        };
        range(new(&|config, _| config.payload_limit = 0), "payload_limit");
        range(new(&|config, _| config.max_client_batch_size = 0), "max_client_batch_size");
        range(new(&|config, _| config.max_client_batch_size = 1 << 20), "max_client_batch_size");
        range(new(&|config, _| config.max_body_bytes = 10), "max_body_bytes");
        range(new(&|config, _| config.max_connections = 0), "max_connections");
        range(new(&|config, _| config.max_head_bytes = 100), "max_head_bytes");
        range(new(&|_, model| model.max_input_tokens = 0), "max_input_tokens");
        assert!(matches!(new(&|config, _| config.api_keys = vec![String::new()]), Err(ConfigError::Key)));
        assert!(matches!(new(&|config, _| config.api_keys = vec!["a b".to_owned()]), Err(ConfigError::Key)));
        let origin = |origin: &str| new(&|config, _| config.cors_allow_origin = vec![origin.to_owned()]);
        assert!(matches!(origin("example.org"), Err(ConfigError::Origin { .. })));
        assert!(origin("https://example.org").is_ok() && origin("*").is_ok());
        let too_long = new(&|config, model| {
            config.auto_truncate = false;
            model.max_input_tokens = 1 << 20;
        });
        assert!(matches!(too_long, Err(ConfigError::Batch { .. })));
        let none = AppState::new(ServerConfig::default(), Vec::new(), Metrics::new());
        assert!(matches!(none, Err(ConfigError::NoModel)));
    }
}
