//! Several models in one service, and the replacing of one by a new artefact.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use niwaki::server::{ModelParts, ServedModel};
use niwaki::telemetry::RejectReason;
use serde_json::json;

use crate::service::{Client, Service, Setup, ids, parts, pooled, post, service, serving, unit};

fn several(setup: &mut Setup) {
    setup.others = vec![("second", &[]), ("ranker", &["LABEL_0"]), ("org/labels", &["a", "b"])];
}

#[tokio::test]
async fn requests_name_their_model_in_every_way() {
    let service = service(several);
    let list = service.get("/v1/models").await.json();
    let names: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["arithmetic", "second", "ranker", "org/labels"]);
    for name in ["second", "org/labels", "test/second", "org%2Flabels"] {
        assert_eq!(service.get(&format!("/v1/models/{name}")).await.status, 200, "{name}");
    }
    // By an API's own field.
    let openai = async |name: &str| service.post("/v1/embeddings", json!({"input": "a", "model": name})).await;
    assert_eq!(openai("second").await.json()["model"], "second");
    assert_eq!(openai("arithmetic").await.json()["model"], "arithmetic");
    let unknown = openai("third").await;
    assert_eq!((unknown.status, unknown.json()["error"]["code"].clone()), (404, json!("model_not_found")));
    let ranked = service.post("/v1/rerank", json!({"query": "a", "documents": ["b"], "model": "ranker"})).await.json();
    assert_eq!(ranked["model"], "ranker");
    // By the address or a header, where it has none.
    let body = json!({"query": "a", "texts": ["b"]});
    assert_eq!(service.post("/rerank?model=ranker", body.clone()).await.status, 200);
    assert_eq!(service.post("/?model=ranker", body.clone()).await.status, 200);
    assert_eq!(service.post("/rerank", body.clone()).await.status, 424, "the first model is an encoder");
    let labels = service.post("/predict?model=org%2Flabels", json!({"inputs": "a"})).await.json();
    assert!(labels[0]["label"].is_string(), "{labels}");
    let mut request = post("/rerank", &body);
    request.headers_mut().insert("x-model", "ranker".parse().unwrap());
    assert_eq!(service.ask(request).await.status, 200);
    assert_eq!(service.post("/tokenize?model=second", json!({"inputs": "a"})).await.status, 200);
    for path in ["/embed?model=third", "/tokenize?model=third", "/decode?model=", "/?model=third"] {
        let answer = service.post(path, json!({"inputs": "a", "ids": [4]})).await;
        assert_eq!((answer.status, answer.json()["error_type"].clone()), (404, json!("NotFound")), "{path}");
    }
    assert_eq!(service.get("/info?model=ranker").await.json()["served_model_name"], "ranker");
    assert_eq!(service.get("/info").await.json()["served_model_name"], "arithmetic");
    assert_eq!(service.get("/info?model=third").await.status, 404);
    // Each has series of its own.
    let text = String::from_utf8(service.get("/metrics").await.body).unwrap();
    for line in [
        "niwaki_model_queue_capacity{model=\"ranker\"} 262144",
        "niwaki_queue_capacity 1048576",
        "niwaki_model_queue_depth{model=\"org/labels\"} 0",
        "niwaki_model_reloads_total{model=\"second\",result=\"refused\"} 0",
        "niwaki_memory_bytes{kind=\"model_file\"} 12000",
        "niwaki_memory_bytes{kind=\"weights\"} 4000",
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
    }
    assert_eq!(service.metrics.computed("ranker").0, 4);
    assert_eq!(service.metrics.computed("second").0, 1);
}

#[tokio::test]
async fn with_a_single_model_a_field_may_say_anything_and_an_address_may_not() {
    let service = service(|_| {});
    assert_eq!(service.post("/v1/embeddings", json!({"input": "a", "model": "gpt"})).await.status, 200);
    assert_eq!(service.post("/v1/embeddings?model=gpt", json!({"input": "a"})).await.status, 404);
    assert_eq!(service.post("/embed?model=arithmetic", json!({"inputs": "a"})).await.status, 200);
}

#[tokio::test]
async fn a_dead_worker_of_any_model_makes_the_service_unhealthy() {
    let service = service(|setup| {
        several(setup);
        setup.n_workers = 1;
    });
    let died = {
        let state = service.state.clone();
        tokio::spawn(async move { state.died().await })
    };
    assert_eq!(service.post("/embed?model=second", json!({"inputs": "die"})).await.status, 503);
    assert_eq!(service.get("/health").await.status, 503);
    tokio::time::timeout(Duration::from_secs(5), died).await.unwrap().unwrap();
}

/// Loads what `next` says: a model of this hash, or a reason.
fn set_loader(
    service: &Service,
    model: &ServedModel,
    next: impl Fn() -> Result<&'static str, String> + Send + Sync + 'static,
) {
    let (metrics, model) = (Arc::clone(&service.metrics), model.clone());
    service.state.set_loader(Box::new(move |name| -> Result<ModelParts, String> {
        let sha = next()?;
        // An artefact's own name is not the one it is served under.
        let card = ServedModel { model_sha: Some(sha.to_owned()), served_name: "other".to_owned(), ..model.clone() };
        assert!(["arithmetic", "second"].contains(&name));
        Ok(parts(card, 2, Duration::ZERO, &niwaki::engine::EngineLimits::default(), &metrics))
    }));
}

fn with_key(path: &str) -> axum::http::Request<axum::body::Body> {
    axum::http::Request::post(path).header("authorization", "Bearer key").body(axum::body::Body::empty()).unwrap()
}

#[tokio::test]
async fn reload_needs_a_key_and_tells_what_it_did() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "old\n").unwrap();
    let service = service(|setup| {
        setup.others = vec![("second", &[])];
        setup.config.api_keys = vec!["key".to_owned()];
        setup.config.api_key_file = Some(keys.path().to_owned());
    });
    let accepted = async |key: &str| {
        let request = axum::http::Request::get("/info").header("x-api-key", key);
        service.ask(request.body(axum::body::Body::empty()).unwrap()).await.status == 200
    };
    let turn = Arc::new(AtomicU64::new(0));
    let of_loader = Arc::clone(&turn);
    set_loader(&service, &Setup::default().model, move || match of_loader.fetch_add(1, Ordering::SeqCst) {
        0..=2 => Ok("new"),
        _ => Err("tensor `x` is missing".to_owned()),
    });
    assert_eq!(service.post("/admin/reload", json!({})).await.status, 401);
    std::fs::write(keys.path(), "new\n").unwrap();
    let answer = service.ask(with_key("/admin/reload?model=second")).await.json();
    assert!(accepted("old").await && !accepted("new").await, "a model was named");
    assert_eq!(
        (answer["reloaded"][0]["model"].clone(), answer["reloaded"][0]["model_sha"].clone()),
        (json!("second"), json!("new"))
    );
    let info = |name: &str| {
        let request = axum::http::Request::get(format!("/info?model={name}")).header("x-api-key", "key");
        service.ask(request.body(axum::body::Body::empty()).unwrap())
    };
    assert_eq!(info("second").await.json()["model_sha"], "new");
    assert_eq!(info("arithmetic").await.json()["model_sha"], "0123abc");
    let all = service.ask(with_key("/admin/reload")).await.json();
    assert_eq!(all["reloaded"].as_array().unwrap().len(), 2);
    assert!(!accepted("old").await && accepted("new").await, "keys are read again with all models");
    assert_eq!(info("arithmetic").await.json()["model_sha"], "new");
    let refused = service.ask(with_key("/admin/reload?model=arithmetic")).await;
    assert_eq!(refused.status, 422);
    let message = "reload refused: model `arithmetic`: tensor `x` is missing";
    assert_eq!(refused.json(), json!({"error": message, "error_type": "Validation"}));
    assert_eq!(service.ask(with_key("/admin/reload?model=third")).await.status, 404);
    assert_eq!(service.metrics.reloads("arithmetic"), (1, 1));
    assert_eq!(service.metrics.reloads("second"), (2, 0));
    std::fs::write(keys.path(), "no key\n").unwrap();
    let refused = service.ask(with_key("/admin/reload")).await;
    let message = refused.json()["error"].to_string();
    assert!(refused.status == 422 && message.contains("line 1") && message.contains("tensor `x`"), "{message}");
    assert!(accepted("new").await);
    // A service without keys has no administrators.
    let open = self::service(|_| {});
    assert_eq!(open.post("/admin/reload", json!({})).await.status, 401);
    assert_eq!(open.metrics.rejections(RejectReason::Auth), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_nobody_notices_a_reload_and_a_refused_one_changes_nothing() {
    const CLIENTS: usize = 16;
    let mut serving = serving(Duration::from_secs(10), |setup| {
        setup.batch_time = Duration::from_millis(2);
        setup.limits.max_batch_requests = Some(2);
    })
    .await;
    let turn = Arc::new(AtomicU64::new(0));
    let of_loader = Arc::clone(&turn);
    set_loader(&serving.service, &Setup::default().model, move || match of_loader.fetch_add(1, Ordering::SeqCst) % 3 {
        0 => Err("damaged".to_owned()),
        1 => Ok("even"),
        _ => Ok("odd"),
    });
    let stop = Arc::new(AtomicBool::new(false));
    let address = serving.address;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|index| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let text = ["the tree", "a b c d", "gardens"][index % 3];
                let expected = vec![unit(&pooled(&ids(text)))];
                let mut client = Client::connect(address).await.unwrap();
                let mut n_answers = 0;
                while !stop.load(Ordering::SeqCst) {
                    let answer = client.post("/embed", &json!({"inputs": text})).await.unwrap();
                    assert_eq!(answer.read::<Vec<Vec<f32>>>(), expected);
                    n_answers += 1;
                }
                n_answers
            })
        })
        .collect();
    let (mut swapped, mut refused) = (0, 0);
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        match serving.service.state.reload(None).await {
            Ok(_) => swapped += 1,
            Err(error) => {
                assert!(error.to_string().ends_with("damaged"), "{error}");
                refused += 1;
            }
        }
    }
    stop.store(true, Ordering::SeqCst);
    let mut n_answers = 0u64;
    for client in clients {
        n_answers += client.await.unwrap();
    }
    assert_eq!((swapped, refused), (20, 10));
    let metrics = &serving.service.metrics;
    assert_eq!(metrics.reloads("arithmetic"), (20, 10));
    assert!(n_answers > 200, "{n_answers}");
    // This loader's engines count under the artefact's own name.
    let computed = metrics.computed("arithmetic").0 + metrics.computed("other").0;
    assert_eq!(computed, n_answers, "computed once each, by the old or the new");
    assert_eq!(metrics.cancellations(), 0);
    // The old ones are gone, with their queues and their memory; the test itself holds the first one's engine.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    loop {
        let text = metrics.render();
        if text.contains("niwaki_queue_capacity 524288\n") && text.contains("{kind=\"model_file\"} 3000\n") {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{text}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    serving.stop();
    serving.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_request_ends_with_the_model_it_began_with() {
    let service = service(|setup| setup.n_workers = 1);
    set_loader(&service, &Setup::default().model, || Ok("new"));
    let slow =
        tokio::spawn(tower::ServiceExt::oneshot(service.router.clone(), post("/embed", &json!({"inputs": "slow"}))));
    while service.engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
    service.state.reload(None).await.unwrap();
    assert_eq!(service.get("/info").await.json()["model_sha"], "new");
    assert_eq!(
        service.post("/embed", json!({"inputs": "a"})).await.status,
        200,
        "the new one does not wait for the old"
    );
    assert!(!slow.is_finished());
    assert_eq!(slow.await.unwrap().unwrap().status().as_u16(), 200);
}
