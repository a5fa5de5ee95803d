//! Probes, pages, metrics, and what browsers need.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::Request;
use niwaki::server::openapi;
use niwaki::telemetry::Route;
use serde_json::json;

use crate::service::{MAX_TOKENS, post, service};

#[tokio::test]
async fn info_is_teis_and_more() {
    let service = service(|setup| {
        setup.model.prompts = [("query".to_owned(), "query: ".to_owned())].into();
        setup.config.tokenization_workers = 3.try_into().unwrap();
    });
    let info = service.get("/info").await.json();
    let expected = json!({
        "model_id": "test/arithmetic", "model_sha": "0123abc", "model_dtype": "float32",
        "served_model_name": "arithmetic", "model_type": {"embedding": {"pooling": "mean"}},
        "max_concurrent_requests": 512, "max_input_length": MAX_TOKENS, "max_batch_tokens": 16384,
        "max_batch_requests": null, "max_client_batch_size": 32, "auto_truncate": true, "tokenization_workers": 3,
        "version": env!("CARGO_PKG_VERSION"), "sha": info["sha"], "docker_label": info["docker_label"],
        "dimensions": 8, "model_family": "bert", "compression": "none", "attention": "full", "isa": "portable",
        "prompts": ["query"],
    });
    assert_eq!(info, expected);
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let service = service(|_| {});
    let list = service.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let entry = &list["data"][0];
    assert_eq!((&entry["id"], &entry["object"]), (&json!("arithmetic"), &json!("model")));
    assert!(entry["created"].as_u64().unwrap() > 1_700_000_000);
    for name in ["arithmetic", "test/arithmetic", "test%2Farithmetic"] {
        assert_eq!(&service.get(&format!("/v1/models/{name}")).await.json(), entry, "{name}");
    }
    assert_eq!(service.metrics.responses(Route::Model, 200), 3);
}

#[tokio::test]
async fn probes_tell_loading_ready_and_draining_apart() {
    let service = service(|setup| setup.ready = false);
    let probe = async || {
        let mut codes = Vec::new();
        for path in ["/health/live", "/health/ready", "/health", "/ping", "/"] {
            let answer = service.get(path).await;
            assert_eq!(answer.body.is_empty(), answer.status == 200, "{path}");
            codes.push(answer.status);
        }
        codes.push(service.post("/embed", json!({"inputs": "a"})).await.status);
        codes
    };
    assert_eq!(probe().await, [200, 503, 503, 503, 503, 503]);
    service.state.readiness().set_ready();
    assert_eq!(probe().await, [200, 200, 200, 200, 200, 200]);
    service.state.readiness().set_draining();
    assert_eq!(probe().await, [200, 503, 200, 200, 200, 503]);
    service.state.readiness().set_ready();
    assert_eq!(probe().await[1], 503, "there is no way back");
}

#[tokio::test]
async fn metrics_are_complete_before_the_first_request() {
    let service = service(|_| {});
    let answer = service.get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    let text = String::from_utf8(answer.body).unwrap();
    for route in Route::ALL {
        for code in route.codes() {
            let label = format!("{{code=\"{code}\",route=\"{route}\"}} 0");
            assert!(text.contains(&label), "{label}");
        }
    }
    let after = String::from_utf8(service.get("/metrics").await.body).unwrap();
    assert!(after.contains("{code=\"200\",route=\"/metrics\"} 1"));
}

#[tokio::test]
async fn the_document_lists_every_route_and_resolves() {
    let service = service(|_| {});
    let answer = service.get("/api-doc/openapi.json").await;
    let document = answer.json();
    assert_eq!(document, serde_json::to_value(openapi::document()).unwrap());
    let paths: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let routes: BTreeSet<&str> = Route::ALL
        .iter()
        .filter(|route| !matches!(route, Route::Other | Route::Docs | Route::OpenApi) && !route.is_grpc())
        .map(|route| route.label())
        .collect();
    assert_eq!(paths, routes);
    assert!(document["paths"]["/"]["get"].is_object() && document["paths"]["/"]["post"].is_object());
    let mut ids = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            assert!(ids.insert(operation["operationId"].as_str().unwrap()), "{path} {method}");
            // The route is there: anything but 404 and 405.
            let uri = path.replace("{id}", "arithmetic").replace("{name}", "arithmetic");
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(uri).body(Body::empty());
            let status = service.ask(request.unwrap()).await.status;
            let expected = match (method.as_str(), path.as_str()) {
                ("get", _) => 200,
                (_, "/admin/reload") => 401,
                // Its clients name no type for JSON.
                (_, "/v2/models/{name}/infer") => 400,
                _ => 415,
            };
            assert_eq!(status, expected, "{method} {path}");
        }
    }
    // Every reference points at something.
    let text = String::from_utf8(answer.body).unwrap();
    let references = text.split("\"$ref\":\"#/components/schemas/").skip(1).map(|rest| rest.split('"').next().unwrap());
    for name in references.collect::<BTreeSet<_>>() {
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    // What the OpenAPI document calls an input is what is read.
    assert_eq!(document["components"]["schemas"]["EmbedRequest"]["required"], json!(["inputs"]));
}

#[tokio::test]
async fn the_documentation_is_served_without_a_network() {
    let service = service(|_| {});
    let answer = service.get("/docs").await;
    assert_eq!((answer.status, answer.header("location")), (303, "/docs/"));
    let page = String::from_utf8(service.get("/docs/").await.body).unwrap();
    assert!(page.contains("swagger-ui") && !page.contains("https://"), "{page}");
    assert_eq!(service.get("/docs/swagger-ui.css").await.status, 200);
    assert_eq!(service.metrics.responses(Route::Docs, 200), 2);
    assert_eq!(service.metrics.responses(Route::Docs, 303), 1);
}

#[tokio::test]
async fn browsers_may_call_with_a_key() {
    let service = service(|setup| setup.config.api_keys = vec!["key".to_owned()]);
    let preflight = Request::options("/embed")
        .header("origin", "https://example.org")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-request-timeout-ms")
        .body(Body::empty());
    let answer = service.ask(preflight.unwrap()).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("access-control-allow-origin"), "*");
    assert!(answer.header("access-control-allow-methods").contains("POST"));
    let allowed = answer.header("access-control-allow-headers").to_ascii_lowercase();
    for name in ["authorization", "content-type", "x-api-key", "x-request-timeout-ms"] {
        assert!(allowed.contains(name), "{allowed}");
    }
    assert_eq!(service.metrics.responses(Route::Embed, 200), 1, "a preflight is counted too");
    let mut request = post("/embed", &json!({"inputs": "a"}));
    request.headers_mut().insert("origin", "https://example.org".parse().unwrap());
    let refused = service.ask(request).await;
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (401, "*"));
    assert!(refused.header("access-control-expose-headers").contains("x-request-id"));
}

#[tokio::test]
async fn origins_can_be_restricted() {
    let service =
        service(|setup| setup.config.cors_allow_origin = vec!["https://a.org".to_owned(), "https://b.org".to_owned()]);
    for (origin, allowed) in
        [("https://a.org", "https://a.org"), ("https://b.org", "https://b.org"), ("https://c.org", "")]
    {
        let mut request = post("/embed", &json!({"inputs": "a"}));
        request.headers_mut().insert("origin", origin.parse().unwrap());
        assert_eq!(service.ask(request).await.header("access-control-allow-origin"), allowed);
    }
}

#[tokio::test]
async fn large_answers_are_compressed_when_that_is_accepted() {
    let service = service(|setup| setup.config.max_client_batch_size = 1000);
    let ask = async |n_inputs: usize, accept: Option<&str>| {
        let mut request = post("/embed", &json!({"inputs": vec!["the tree"; n_inputs]}));
        if let Some(accept) = accept {
            request.headers_mut().insert("accept-encoding", accept.parse().unwrap());
        }
        service.ask(request).await
    };
    let plain = ask(500, None).await;
    assert_eq!((plain.header("content-encoding"), plain.json().as_array().unwrap().len()), ("", 500));
    let small = ask(1, Some("gzip, deflate")).await;
    assert_eq!(small.header("content-encoding"), "");
    let large = ask(500, Some("gzip, deflate")).await;
    assert_eq!(large.header("content-encoding"), "gzip");
    assert_eq!(large.body[..2], [0x1f, 0x8b]);
    assert!(large.body.len() < plain.body.len() / 2);
    assert_eq!(large.header("vary").to_ascii_lowercase().matches("accept-encoding").count(), 1);
}
