//! Requests: a line `METHOD /path`, header lines, an empty line, and the body, as on the wire but for the framing. Small real
//! models answer: an encoder, a classifier and a reranker. Nothing is a bug of the server's, every answer is readable.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::BodyExt;
use niwaki::checkpoint::Checkpoint;
use niwaki::engine::{Engine, EngineLimits};
use niwaki::exec::Runtime;
use niwaki::kernels::Isa;
use niwaki::model::Forward;
use niwaki::server::grpc::grpc_router;
use niwaki::server::{AppState, ModelParts, ServedModel, ServerConfig, Task, router};
use niwaki::telemetry::Metrics;
use niwaki::text::Tokenizer;
use tower::ServiceExt;

use super::golden;

/// A service without sockets.
pub(crate) struct Service {
    pub(crate) http: Router,
    grpc: Router,
    pub(crate) state: AppState,
    pub(crate) runtime: tokio::runtime::Runtime,
    engines: Vec<Engine>,
}

pub(crate) static SERVICE: LazyLock<Service> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let cores = Runtime::new(Isa::detect(), 1).unwrap();
    let metrics = Metrics::new();
    let parts: Vec<ModelParts> =
        ["bert", "bert-classifier", "roberta-reranker"].iter().map(|name| parts(name, &cores, &metrics)).collect();
    let engines = parts.iter().map(|parts| parts.engine.clone()).collect();
    let config = ServerConfig { api_keys: Vec::new(), ..ServerConfig::default() };
    let state = AppState::new(config, parts, metrics).unwrap();
    state.readiness().set_ready();
    Service { http: router(state.clone()), grpc: grpc_router(state.clone()), state, runtime, engines }
});

fn parts(name: &str, cores: &Runtime, metrics: &Arc<Metrics>) -> ModelParts {
    let checkpoint = Arc::new(Checkpoint::open(&golden(name)).unwrap());
    let spec = checkpoint.architecture();
    let model = ServedModel {
        model_id: name.to_owned(),
        model_sha: None,
        served_name: name.to_owned(),
        family: format!("{:?}", spec.family).to_lowercase(),
        compression: "none".to_owned(),
        dtype: "int8".to_owned(),
        attention: "full".to_owned(),
        isa: Isa::detect().to_string(),
        task: match &spec.head {
            Some(head) => Task::Classification(head.clone()),
            None => Task::Embedding { pooling: spec.pooling },
        },
        d_model: spec.d_model,
        vocab_size: spec.vocab_size,
        n_token_types: spec.n_token_types,
        max_input_tokens: spec.max_input_tokens,
        file_bytes: checkpoint.weights_bytes(),
        prompts: BTreeMap::from([("query".to_owned(), "the ".to_owned())]),
        default_prompt: None,
    };
    let worker = Box::new(cores.player(&checkpoint).unwrap()) as Box<dyn Forward>;
    let engine = Engine::start_named(name, vec![worker], EngineLimits::default(), Arc::clone(metrics)).unwrap();
    ModelParts { model, tokenizer: Arc::new(Tokenizer::from_bytes(checkpoint.tokenizer_json()).unwrap()), engine }
}

/// The request that `data` stands for, if it is one that a connection would let through.
fn request(data: &[u8]) -> Option<Request<Body>> {
    let split = data.windows(2).position(|pair| pair == b"\n\n").unwrap_or(data.len());
    let (head, body) = data.split_at(split);
    let mut lines = head.split(|&byte| byte == b'\n');
    let mut first = lines.next()?.splitn(2, |&byte| byte == b' ');
    let method = Method::from_bytes(first.next()?).ok()?;
    let uri = Uri::try_from(first.next()?).ok()?;
    if !uri.path().starts_with('/') {
        return None;
    }
    let mut request = Request::builder().method(method).uri(uri);
    for line in lines {
        let colon = line.iter().position(|&byte| byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        request = request.header(name, value);
    }
    request.body(Body::from(body.get(2..).unwrap_or_default().to_owned())).ok()
}

/// Answers the request in `data`.
pub(crate) fn run(data: &[u8]) {
    let Some(request) = request(data) else { return };
    let service = &*SERVICE;
    let is_grpc = ["/tei.", "/grpc."].iter().any(|prefix| request.uri().path().starts_with(prefix));
    if is_grpc && request.uri().path().ends_with("/Watch") {
        return; // it answers for as long as somebody listens
    }
    let method = request.method().clone();
    let timed = request.headers().keys().any(|name| name.as_str().contains("timeout"));
    let router = if is_grpc { service.grpc.clone() } else { service.http.clone() };
    let (status, kind, body) = service.runtime.block_on(async {
        let (head, body) = router.oneshot(request).await.unwrap().into_parts();
        let body = body.collect().await.expect("an answer's body does not break off");
        let trailed = body.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
        let grpc = trailed.or_else(|| head.headers.get("grpc-status").cloned());
        if is_grpc {
            let code = grpc.map_or(String::new(), |code| code.to_str().unwrap().to_owned());
            // Unknown, internal, data loss: bugs.
            assert!(!["", "2", "13", "15"].contains(&code.as_str()), "gRPC status {code:?}, {:?}", head.headers);
        }
        (head.status.as_u16(), head.headers.get("content-type").cloned(), body.to_bytes())
    });
    assert!(status < 500 || status == 504 && timed, "{status}: {}", String::from_utf8_lossy(&body));
    let is_json = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if !is_grpc && is_json && method != Method::HEAD {
        let value = serde_json::from_slice::<serde_json::Value>(&body);
        let value = value.unwrap_or_else(|error| panic!("{status}, {error}: {}", String::from_utf8_lossy(&body)));
        assert!(status < 400 || value.get("error").is_some(), "{status}: {value}");
    } else if !is_grpc && status >= 400 && method != Method::HEAD {
        panic!("{status} without a body in JSON: {}", String::from_utf8_lossy(&body));
    }
    // A stream that ended early gives up what it had begun a moment later.
    let end = Instant::now() + Duration::from_secs(5);
    while service.engines.iter().any(|engine| engine.load().queued_sequences > 0) {
        assert!(Instant::now() < end, "a place in the queue is still taken");
        std::thread::yield_now();
    }
}
