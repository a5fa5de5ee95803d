//! The Open Inference Protocol.

use niwaki::telemetry::Route;
use serde_json::{Value, json};

use crate::service::{D_MODEL, Service, id, ids, logits, pair, pooled, service, unit};

async fn infer(service: &Service, body: Value) -> Value {
    let answer = service.post("/v2/models/arithmetic/infer", body).await;
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    assert!(!answer.header("x-inference-time").is_empty());
    answer.json()
}

fn floats(output: &Value) -> Vec<f32> {
    serde_json::from_value(output["data"].clone()).unwrap()
}

#[allow(clippy::needless_pass_by_value, reason = "callers make it on the spot")]
fn text(texts: Value, n: usize) -> Value {
    json!({"name": "text", "datatype": "BYTES", "shape": [n], "data": texts})
}

#[tokio::test]
async fn the_server_and_its_models_describe_themselves() {
    let service = service(|setup| setup.others = vec![("labels", &["a", "b", "c"])]);
    let server = service.get("/v2").await.json();
    assert_eq!(server, json!({"name": "niwaki", "version": env!("CARGO_PKG_VERSION"), "extensions": []}));
    assert_eq!(service.get("/v2/health/live").await.json(), json!({"live": true}));
    assert_eq!(service.get("/v2/health/ready").await.json(), json!({"ready": true}));
    let model = service.get("/v2/models/arithmetic").await.json();
    assert_eq!((model["name"].clone(), model["versions"].clone()), (json!("arithmetic"), json!(["0123abc"])));
    assert_eq!(model["outputs"], json!([{"name": "embedding", "datatype": "FP32", "shape": [-1, D_MODEL]}]));
    assert_eq!(model["inputs"][0], json!({"name": "text", "datatype": "BYTES", "shape": [-1]}));
    let model = service.get("/v2/models/labels").await.json();
    assert_eq!(model["outputs"][1], json!({"name": "logits", "datatype": "FP32", "shape": [-1, 3]}));
    assert_eq!(model["inputs"][1]["name"], "text_pair");
    assert_eq!(service.get("/v2/models/labels/ready").await.json(), json!({"name": "labels", "ready": true}));
    for path in ["/v2/models/none", "/v2/models/none/ready"] {
        let answer = service.get(path).await;
        assert_eq!((answer.status, answer.json()["error"].is_string()), (404, true), "{path}");
    }
    assert_eq!(service.post("/v2/models/none/infer", json!({"inputs": []})).await.status, 404);
    // By a name with a slash in it, and by version.
    let other = service.get("/v2/models/labels").await.json();
    for path in ["test/labels", "test%2Flabels", "labels/versions/0123abc", "test/labels/versions/0123abc"] {
        assert_eq!(service.get(&format!("/v2/models/{path}")).await.json(), other, "{path}");
        assert_eq!(service.get(&format!("/v2/models/{path}/ready")).await.status, 200, "{path}");
        let body = json!({"inputs": [text(json!(["a"]), 1)]});
        let answer = service.post(&format!("/v2/models/{path}/infer"), body).await;
        assert_eq!((answer.status, answer.json()["model_name"].clone()), (200, json!("labels")), "{path}");
    }
    let wrong = "/v2/models/labels/versions/1";
    assert_eq!(service.get(wrong).await.status, 404);
    assert_eq!(service.get(&format!("{wrong}/ready")).await.status, 404);
    let body = json!({"inputs": [text(json!(["a"]), 1)]});
    assert_eq!(service.post(&format!("{wrong}/infer"), body).await.status, 404);
    assert_eq!(service.metrics.responses(Route::Infer, 200), 4);
    for (method, path, allowed) in
        [("POST", "labels", "GET,HEAD"), ("POST", "labels/ready", "GET,HEAD"), ("GET", "labels/infer", "POST")]
    {
        let request = axum::http::Request::builder().method(method).uri(format!("/v2/models/{path}"));
        let answer = service.ask(request.body(axum::body::Body::empty()).unwrap()).await;
        assert_eq!((answer.status, answer.header("allow")), (405, allowed), "{path}");
    }
    service.state.readiness().set_draining();
    assert_eq!(service.get("/v2/health/ready").await.status, 503);
    assert_eq!(service.get("/v2/models/labels/ready").await.status, 503);
    assert_eq!(service.get("/v2/health/live").await.status, 200);
}

#[tokio::test]
async fn texts_and_ids_become_embeddings() {
    let service = service(|_| {});
    // As Triton's client sends it: without a type.
    let body = json!({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}).to_string();
    for (kind, expected) in [(None, 200), (Some("application/json"), 200), (Some("application/octet-stream"), 415)] {
        let mut request = axum::http::Request::post("/v2/models/arithmetic/infer");
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        assert_eq!(service.ask(request.body(body.clone().into()).unwrap()).await.status, expected, "{kind:?}");
    }
    let (first, second) = (unit(&pooled(&ids("the tree"))), unit(&pooled(&ids("a b c"))));
    for (texts, shape) in
        [(json!(["the tree", "a b c"]), json!([2])), (json!([["the tree"], ["a b c"]]), json!([2, 1]))]
    {
        let input = json!({"name": "text", "datatype": "BYTES", "shape": shape, "data": texts});
        let answer = infer(&service, json!({"id": "x", "inputs": [input]})).await;
        assert_eq!((answer["id"].clone(), answer["model_name"].clone()), (json!("x"), json!("arithmetic")));
        let output = &answer["outputs"][0];
        assert_eq!((output["name"].clone(), output["datatype"].clone()), (json!("embedding"), json!("FP32")));
        assert_eq!(output["shape"], json!([2, D_MODEL]));
        assert_eq!(floats(output), [first.clone(), second.clone()].concat());
    }
    let parameters = json!({"normalize": false, "dimensions": 3});
    let body =
        json!({"inputs": [text(json!(["the tree"]), 1)], "parameters": parameters, "outputs": [{"name": "embedding"}]});
    assert_eq!(floats(&infer(&service, body).await["outputs"][0]), pooled(&ids("the tree"))[..3]);
    // Ids, padded as other servers need it.
    let (tree, garden) = (id("tree"), id("garden"));
    let matrix = |name: &str, data: Value| json!({"name": name, "datatype": "INT64", "shape": [2, 4], "data": data});
    let body = json!({"inputs": [
        matrix("input_ids", json!([[2, tree, garden, 3], [2, tree, 3, 0]])),
        matrix("attention_mask", json!([1, 1, 1, 1, 1, 1, 1, 0])),
        matrix("token_type_ids", json!([[0, 0, 1, 1], [0, 0, 0, 0]])),
    ]});
    let found = floats(&infer(&service, body).await["outputs"][0]);
    assert_eq!(found, [unit(&pooled(&[2, tree, garden, 3])), unit(&pooled(&[2, tree, 3]))].concat());
}

#[tokio::test]
async fn pairs_become_scores() {
    let service = service(|setup| setup.classify(&["LABEL_0"]));
    let second = json!({"name": "text_pair", "datatype": "BYTES", "shape": [2], "data": ["garden", "d"]});
    let body = json!({"inputs": [text(json!(["the tree", "a"]), 2), second]});
    let answer = infer(&service, body.clone()).await;
    let expected: Vec<f32> = [("the tree", "garden"), ("a", "d")]
        .iter()
        .map(|(a, b)| {
            let (ids, types) = pair(a, b);
            logits(&ids, &types, 1)[0]
        })
        .collect();
    let (scores, numbers) = (&answer["outputs"][0], &answer["outputs"][1]);
    assert_eq!((scores["name"].clone(), numbers["name"].clone()), (json!("scores"), json!("logits")));
    assert_eq!(floats(numbers), expected);
    for (score, number) in floats(scores).iter().zip(expected) {
        assert!((f64::from(*score) - 1.0 / (1.0 + (-f64::from(number)).exp())).abs() < 1e-6);
    }
    let mut only = body;
    // An empty list, or none, means all of them.
    for (outputs, names) in [
        (json!([{"name": "logits"}]), vec!["logits"]),
        (json!([]), vec!["scores", "logits"]),
        (Value::Null, vec!["scores", "logits"]),
    ] {
        only["outputs"] = outputs;
        let answer = infer(&service, only.clone()).await;
        let found: Vec<_> = answer["outputs"].as_array().unwrap().iter().map(|output| output["name"].clone()).collect();
        assert_eq!(found, names);
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_its_place() {
    let service = service(|_| {});
    let ids =
        |data: Value, shape: Value| json!({"name": "input_ids", "datatype": "INT64", "shape": shape, "data": data});
    let good = text(json!(["a"]), 1);
    for (inputs, status, place) in [
        (json!([]), 422, "inputs"),
        (json!([{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a"]}]), 422, "shape"),
        (json!([{"name": "text", "datatype": "FP32", "shape": [1], "data": ["a"]}]), 422, "datatype"),
        (json!([{"name": "text", "datatype": "BYTES", "shape": [1], "data": [1]}]), 422, "data"),
        (json!([{"name": "text", "datatype": "BYTES", "shape": [0], "data": []}]), 400, "inputs"),
        (json!([{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["a"]}]), 422, "inputs"),
        (json!([good, good]), 422, "inputs"),
        (json!([good, ids(json!([[2, 3]]), json!([1, 2]))]), 422, "inputs"),
        (json!([ids(json!([2, 3, 4]), json!([2, 2]))]), 422, "shape"),
        (json!([ids(json!([]), json!([1, 0]))]), 422, "shape"),
        (json!([ids(json!([-2]), json!([1, 1]))]), 422, "input_ids"),
        (json!([ids(json!([99]), json!([1, 1]))]), 422, "token id 99"),
        (json!([ids(json!(vec![4; 17]), json!([1, 17]))]), 200, ""),
        (json!([ids(json!(vec![4; 33]), json!([33, 1]))]), 422, "batch size 33"),
        // What is too much is not looked at.
        (json!([ids(json!(vec![-2; 33]), json!([33, 1]))]), 422, "batch size 33"),
        (json!([text(json!(vec![""; 17_000]), 17_000)]), 422, "batch size 17000"),
        (json!([ids(json!([4]), json!([usize::MAX, usize::MAX]))]), 422, "shape"),
        (json!([text(json!([""]), 1)]), 400, "inputs"),
        (json!([["text", [1], "BYTES", ["a"]]]), 422, "object"),
    ] {
        let answer = service.post("/v2/models/arithmetic/infer", json!({"inputs": inputs})).await;
        assert_eq!(answer.status, status, "{inputs}");
        let message = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(message.contains(place), "{inputs}: {message}");
    }
    let body = json!({"inputs": [good], "outputs": [{"name": "logits"}]});
    assert_eq!(service.post("/v2/models/arithmetic/infer", body).await.status, 422);
    let masked = json!({"name": "attention_mask", "datatype": "INT64", "shape": [1, 2], "data": [0, 0]});
    let body = json!({"inputs": [ids(json!([4, 5]), json!([1, 2])), masked]});
    assert_eq!(service.post("/v2/models/arithmetic/infer", body).await.status, 400, "nothing is left");
}
