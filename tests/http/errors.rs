//! Every way to be refused.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::Request;
use niwaki::server::error::ErrorClass;
use niwaki::telemetry::{ExpiryStage, RejectReason, Route};
use serde_json::{Value, json};

use crate::service::{Answer, SLOW_TIME, Service, Setup, post, service};

/// A body that never ends.
struct Endless;

impl hyper::body::Body for Endless {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

const WORK: [Route; 13] = [
    Route::Embed,
    Route::EmbedAll,
    Route::Similarity,
    Route::Tokenize,
    Route::Decode,
    Route::OpenAiEmbeddings,
    Route::Embeddings,
    Route::Root,
    Route::Predict,
    Route::Rerank,
    Route::CohereRerank,
    Route::CohereRerank2,
    Route::Infer,
];

/// Where `route` is found.
fn path_of(route: Route) -> String {
    route.label().replace("{name}", "arithmetic")
}

/// A body that `route` takes, about `text`.
fn body(route: Route, text: &str) -> Value {
    match route {
        Route::OpenAiEmbeddings | Route::Embeddings => json!({"input": text}),
        Route::Similarity => json!({"inputs": {"source_sentence": text, "sentences": ["a"]}}),
        Route::Decode => json!({"ids": [4, 5]}),
        Route::Rerank => json!({"query": "a", "texts": [text]}),
        Route::CohereRerank | Route::CohereRerank2 => json!({"query": "a", "documents": [text]}),
        Route::Infer => {
            json!({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]})
        }
        _ => json!({"inputs": text}),
    }
}

fn is_openai(route: Route) -> bool {
    matches!(
        route,
        Route::OpenAiEmbeddings
            | Route::Embeddings
            | Route::Models
            | Route::Model
            | Route::CohereRerank
            | Route::CohereRerank2
    )
}

/// Checks the shape of a failure; returns its class in TEI's words, or OpenAI's code.
#[track_caller]
fn failure(answer: &Answer, openai: bool) -> String {
    assert_eq!(answer.header("content-type"), "application/json");
    assert!(!answer.header("x-request-id").is_empty());
    let json = answer.json();
    if openai {
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
        assert_eq!(error.keys().collect::<BTreeSet<_>>().len(), 4, "{json}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
        assert!(error["type"].as_str().unwrap().ends_with("_error"));
        assert!(error["param"].is_null() || error["param"].is_string());
        error["code"].as_str().unwrap().to_owned()
    } else {
        assert!(json["error"].as_str().is_some_and(|message| !message.is_empty()), "{json}");
        json["error_type"].as_str().unwrap().to_owned()
    }
}

/// Provokes every status that is documented for `route`, but 500, which only a bug can give.
async fn provoke(route: Route, status: u16) -> (Service, Answer) {
    let path = &path_of(route);
    let with = |change: fn(&mut Setup)| {
        service(|setup| {
            if matches!(route, Route::Predict | Route::Rerank | Route::CohereRerank | Route::CohereRerank2) {
                setup.classify(&["LABEL_0"]);
            }
            change(setup);
        })
    };
    let json_post = || Request::post(path).header("content-type", "application/json");
    match status {
        400 => {
            let service = with(|_| {});
            let answer = service.ask(json_post().body(Body::from("{\"inputs\": ")).unwrap()).await;
            (service, answer)
        }
        401 => {
            let service = with(|setup| setup.config.api_keys = vec!["key".to_owned()]);
            let answer = service.ask(post(path, &body(route, "a"))).await;
            (service, answer)
        }
        404 => {
            let service = with(|_| {});
            let path = match route {
                Route::Infer => "/v2/models/none/infer".to_owned(),
                _ => format!("{path}?model=none"),
            };
            let answer = service.ask(post(&path, &body(route, "a"))).await;
            (service, answer)
        }
        408 => {
            let service = with(|setup| setup.config.body_timeout = Duration::from_millis(30));
            let answer = service.ask(json_post().body(Body::new(Endless)).unwrap()).await;
            (service, answer)
        }
        413 => {
            let service = with(|setup| setup.config.payload_limit = 10);
            let answer = service.ask(post(path, &body(route, "the tree"))).await;
            (service, answer)
        }
        415 => {
            let service = with(|_| {});
            let request = Request::post(path).header("content-type", "text/plain");
            let answer = service.ask(request.body(Body::from(body(route, "a").to_string())).unwrap()).await;
            (service, answer)
        }
        422 => {
            let service = with(|_| {});
            let answer =
                service.post(path, json!({"inputs": {"a": 1}, "input": {"a": 1}, "ids": "a", "query": 1})).await;
            (service, answer)
        }
        424 => {
            let service = with(|_| {});
            let answer = service.ask(post(path, &body(route, "poison"))).await;
            (service, answer)
        }
        429 => {
            // All memory for large bodies is taken by one that does not arrive.
            let service = with(|setup| {
                setup.config.max_body_bytes = 200_000;
                setup.config.payload_limit = 200_000;
            });
            let large = || json_post().header("content-length", "150000").body(Body::new(Endless)).unwrap();
            let router = service.router.clone();
            let first = tokio::spawn(tower::ServiceExt::oneshot(router, large()));
            while service.metrics.requests_in_flight() == 0 {
                tokio::task::yield_now().await;
            }
            let second = json_post().header("content-length", "150000").body(Body::from(vec![b' '; 150_000])).unwrap();
            let answer = service.ask(second).await;
            first.abort();
            (service, answer)
        }
        503 => {
            let service = with(|setup| setup.ready = false);
            let answer = service.ask(post(path, &body(route, "a"))).await;
            (service, answer)
        }
        504 => {
            let service = with(|_| {});
            let request = json_post().header("x-request-timeout-ms", "20").body(Body::new(Endless)).unwrap();
            let answer = service.ask(request).await;
            (service, answer)
        }
        _ => panic!("nothing here gives {status}"),
    }
}

#[tokio::test]
async fn every_documented_status_of_every_working_route_can_happen() {
    let document = service(|_| {}).get("/api-doc/openapi.json").await.json();
    for route in WORK {
        let responses = document["paths"][route.label()]["post"]["responses"].as_object().unwrap();
        let documented: BTreeSet<u16> = responses.keys().map(|status| status.parse().unwrap()).collect();
        let possible: BTreeSet<u16> = ErrorClass::of(route).iter().map(|class| class.words().status.as_u16()).collect();
        assert_eq!(documented, possible.into_iter().chain([200]).collect(), "{route}");
        for status in documented.into_iter().filter(|status| ![200, 500].contains(status)) {
            let (service, answer) = provoke(route, status).await;
            assert_eq!(answer.status, status, "{route}: {}", String::from_utf8_lossy(&answer.body));
            failure(&answer, is_openai(route));
            assert_eq!(service.metrics.responses(route, status), 1, "{route} {status}");
            assert_eq!(answer.headers.contains_key("retry-after"), [429, 503].contains(&status), "{route} {status}");
            // The series was there before.
            assert!(route.codes().contains(&status), "{route} {status}");
        }
    }
}

#[tokio::test]
async fn classes_are_told_in_the_words_of_the_dialect() {
    struct Case {
        tei: (&'static str, Value),
        openai: Value,
        status: u16,
        error_type: &'static str,
        code: &'static str,
        param: Option<&'static str>,
    }
    let case = |inputs: Value, status, error_type, code, param| Case {
        tei: ("/embed", json!({"inputs": inputs})),
        openai: json!({"input": inputs}),
        status,
        error_type,
        code,
        param,
    };
    let cases = [
        case(json!(""), 400, "Empty", "empty_input", Some("input")),
        case(json!([]), 400, "Empty", "empty_input", Some("input")),
        case(json!(["a", ""]), 400, "Empty", "empty_input", Some("input")),
        case(json!([[]]), 400, "Empty", "empty_input", Some("input")),
        case(json!(null), 422, "Validation", "invalid_type", None),
        case(json!([1.5]), 422, "Validation", "invalid_type", None),
        case(json!([4, 99]), 422, "Validation", "invalid_token_id", Some("input")),
        case(json!([4_294_967_295u32]), 422, "Validation", "invalid_token_id", Some("input")),
        case(json!(vec!["a"; 33]), 422, "Validation", "batch_too_large", Some("input")),
        case(json!("poison"), 424, "Backend", "backend_error", None),
        case(json!("nan"), 424, "Backend", "backend_error", None),
    ];
    let service = service(|_| {});
    for Case { tei: (path, body), openai, status, error_type, code, param } in cases {
        let answer = service.post(path, body.clone()).await;
        assert_eq!((answer.status, failure(&answer, false).as_str()), (status, error_type), "{body}");
        let answer = service.post("/v1/embeddings", openai).await;
        assert_eq!((answer.status, failure(&answer, true).as_str()), (status, code), "{body}");
        assert_eq!(answer.json()["error"]["param"], json!(param), "{body}");
    }
    for (dimensions, param) in [(0, "dimensions"), (9, "dimensions")] {
        let answer = service.post("/v1/embeddings", json!({"input": "a", "dimensions": dimensions})).await;
        assert_eq!((answer.status, answer.json()["error"]["param"].clone()), (422, json!(param)));
        assert_eq!(service.post("/embed", json!({"inputs": "a", "dimensions": dimensions})).await.status, 422);
    }
    assert_eq!(service.metrics.rejections(RejectReason::ClientBatch), 2);
    assert_eq!(service.metrics.inference_errors(), 4);
}

#[tokio::test]
async fn a_long_wrong_value_is_not_sent_back_whole() {
    let service = service(|_| {});
    let answer = service.post("/embed", json!({"inputs": "a", "truncate": "x".repeat(100_000)})).await;
    assert_eq!(answer.status, 422);
    assert!(answer.body.len() < 1000, "{}", answer.body.len());
    let answer = service.post("/embed", json!({"inputs": "a", "prompt_name": "é".repeat(1000)})).await;
    assert_eq!(answer.status, 422);
    assert!(answer.body.len() < 400, "{}", answer.body.len());
}

#[tokio::test]
async fn what_is_not_there_is_told_in_json() {
    let service = service(|_| {});
    for path in ["/nowhere", "/embed/", "/v1", "/docs/nothing.here", "/%ff"] {
        let answer = service.get(path).await;
        assert_eq!((answer.status, failure(&answer, false).as_str()), (404, "NotFound"), "{path}");
    }
    for (path, code) in [("/v1/nowhere", "not_found"), ("/v1/models/other/one", "model_not_found")] {
        let answer = service.get(path).await;
        assert_eq!((answer.status, failure(&answer, true).as_str()), (404, code), "{path}");
    }
    let answer = service.get("/embed").await;
    assert_eq!((answer.status, failure(&answer, false).as_str()), (405, "MethodNotAllowed"));
    assert!(answer.header("allow").contains("POST"), "{}", answer.header("allow"));
    let answer = service.get("/v1/embeddings").await;
    assert_eq!((answer.status, failure(&answer, true).as_str()), (405, "method_not_allowed"));
    assert_eq!(service.post("/health", json!({})).await.status, 405);
    assert_eq!(service.metrics.responses(Route::Embed, 405), 1);
    assert_eq!(service.metrics.responses(Route::Other, 404), 5);
    assert_eq!(service.metrics.responses(Route::Docs, 404), 1);
}

#[tokio::test]
async fn overload_is_429_with_a_time_to_retry() {
    let service = service(|setup| {
        setup.limits.max_concurrent_requests = 1;
        setup.n_workers = 1;
    });
    let first =
        tokio::spawn(tower::ServiceExt::oneshot(service.router.clone(), post("/embed", &json!({"inputs": "slow"}))));
    while service.engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
    let answer = service.post("/embed", json!({"inputs": "a"})).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.json(), json!({"error": "Model is overloaded", "error_type": "Overloaded"}));
    assert!((1..=30).contains(&answer.header("retry-after").parse::<u64>().unwrap()));
    let answer = service.post("/v1/embeddings", json!({"input": "a"})).await;
    assert_eq!((answer.status, failure(&answer, true).as_str()), (429, "overloaded"));
    assert_eq!(first.await.unwrap().unwrap().status().as_u16(), 200);
    assert_eq!(service.metrics.rejections(RejectReason::Overload), 2);
    // More than could ever be admitted is the client's mistake.
    let answer = service.post("/embed", json!({"inputs": ["a", "b"]})).await;
    assert_eq!((answer.status, failure(&answer, false).as_str()), (422, "Validation"));
}

#[tokio::test]
async fn deadlines_come_from_the_header_or_the_server() {
    let service = service(|setup| {
        setup.n_workers = 1;
        setup.config.default_timeout = Some(SLOW_TIME / 8);
    });
    let ask = async |text: &str, timeout: Option<&str>| {
        let mut request = post("/embed", &json!({"inputs": text}));
        if let Some(timeout) = timeout {
            request.headers_mut().insert("x-request-timeout-ms", timeout.parse().unwrap());
        }
        service.ask(request).await
    };
    assert_eq!(ask("slow", None).await.status, 504, "the server's default");
    assert_eq!(service.metrics.expirations(ExpiryStage::Infer), 1);
    // The worker is still at it: this one passes its deadline waiting, and costs nothing.
    let answer = ask("a", Some("30")).await;
    assert_eq!((answer.status, failure(&answer, false).as_str()), (504, "Timeout"));
    assert_eq!(service.metrics.expirations(ExpiryStage::Queue), 1);
    assert_eq!(ask("slow", Some("5000")).await.status, 200, "a client may ask for more");
    for bad in ["0", "-1", "soon", "1.5", "99999999999", ""] {
        let answer = ask("a", Some(bad)).await;
        assert_eq!((answer.status, failure(&answer, false).as_str()), (422, "Validation"), "{bad}");
    }
    assert_eq!(service.metrics.rejections(RejectReason::Deadline), 2);
}

#[tokio::test]
async fn a_dead_worker_makes_the_service_unhealthy() {
    let service = service(|setup| setup.n_workers = 1);
    assert_eq!(service.get("/health").await.status, 200);
    let answer = service.post("/embed", json!({"inputs": "die"})).await;
    assert_eq!((answer.status, failure(&answer, false).as_str()), (503, "Unhealthy"));
    let answer = service.get("/health").await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.json(), json!({"error": "unhealthy", "error_type": "Unhealthy"}));
    assert_eq!(service.get("/health/ready").await.status, 503);
    assert_eq!(service.get("/health/live").await.status, 200);
    assert_eq!(service.post("/embed", json!({"inputs": "a"})).await.status, 503);
}

#[tokio::test]
async fn keys_open_what_is_locked() {
    let service = service(|setup| setup.config.api_keys = vec!["first-key".to_owned(), "second".to_owned()]);
    let ask = async |method: &str, path: &str, header: Option<(&str, &str)>| {
        let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        service.ask(request.body(Body::from(r#"{"inputs":"a","input":"a"}"#)).unwrap()).await
    };
    let locked = [
        ("POST", "/embed"),
        ("POST", "/"),
        ("POST", "/embed_all"),
        ("POST", "/similarity"),
        ("POST", "/tokenize"),
        ("POST", "/decode"),
        ("POST", "/v1/embeddings"),
        ("POST", "/embeddings"),
        ("GET", "/info"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/arithmetic"),
        ("POST", "/predict"),
        ("POST", "/rerank"),
        ("POST", "/v1/rerank"),
        ("POST", "/v2/rerank"),
        ("GET", "/v2"),
        ("GET", "/v2/models/arithmetic"),
        ("POST", "/v2/models/arithmetic/infer"),
        ("POST", "/admin/reload"),
    ];
    for (method, path) in locked {
        for wrong in [
            None,
            Some(("authorization", "Bearer wrong")),
            Some(("authorization", "Bearer first-ke")),
            Some(("authorization", "Bearer first-keyy")),
            Some(("authorization", "first-key")),
            Some(("authorization", "Basic first-key")),
            Some(("authorization", "Bearer ")),
            Some(("x-api-key", "")),
        ] {
            let answer = ask(method, path, wrong).await;
            assert_eq!(answer.status, 401, "{path} {wrong:?}");
            assert_eq!(answer.header("www-authenticate"), "Bearer");
            let openai = path.starts_with("/v1") || ["/embeddings", "/v2/rerank"].contains(&path);
            assert_eq!(failure(&answer, openai), if openai { "invalid_api_key" } else { "Unauthorized" });
        }
        for right in
            [("authorization", "Bearer first-key"), ("authorization", "bearer second"), ("x-api-key", "second")]
        {
            assert_ne!(ask(method, path, Some(right)).await.status, 401, "{path} {right:?}");
        }
    }
    // The token may be for somebody else.
    for (bearer, key, expected) in [("other", "second", 200), ("second", "other", 200), ("other", "wrong", 401)] {
        let request =
            Request::get("/info").header("authorization", format!("Bearer {bearer}")).header("x-api-key", key);
        let answer = service.ask(request.body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, expected, "{bearer} {key}");
    }
    for path in
        ["/health", "/health/live", "/health/ready", "/ping", "/", "/metrics", "/docs/", "/api-doc/openapi.json"]
    {
        assert_eq!(ask("GET", path, None).await.status, 200, "{path}");
    }
    assert_eq!(service.metrics.rejections(RejectReason::Auth), (locked.len() * 8 + 1) as u64);
}
