//! A port of their own for metrics and administration.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use niwaki::server::{Listeners, admin_router, public_router, serve};
use niwaki::telemetry::{RejectReason, Route};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::ServiceExt;

use crate::service::process::{Process, ask};
use crate::service::{Client, service};

#[tokio::test]
async fn each_port_has_its_routes_and_no_others() {
    let service = service(|setup| setup.config.api_keys = vec!["key".to_owned()]);
    let (public, admin) = (public_router(service.state.clone()), admin_router(service.state.clone()));
    let status = async |router: &axum::Router, method: &str, path: &str, key: Option<&str>| {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap().status().as_u16()
    };
    for path in ["/health", "/health/live", "/health/ready", "/ping"] {
        assert_eq!((status(&public, "GET", path, None).await, status(&admin, "GET", path, None).await), (200, 200));
    }
    for (method, path) in [("GET", "/metrics"), ("POST", "/admin/reload"), ("GET", "/admin/reload")] {
        assert_eq!(status(&public, method, path, Some("key")).await, 404, "{path}");
    }
    for (method, path) in
        [("POST", "/embed"), ("GET", "/info"), ("GET", "/v1/models"), ("GET", "/docs/"), ("POST", "/"), ("GET", "/")]
    {
        assert_eq!(status(&admin, method, path, Some("key")).await, 404, "{path}");
        assert_ne!(status(&public, method, path, Some("key")).await, 404, "{path}");
    }
    assert_eq!(status(&admin, "GET", "/metrics", None).await, 200);
    // This service cannot load models, and says so to who has the key.
    for (key, expected) in [(None, 401), (Some("wrong"), 401), (Some("key"), 422)] {
        assert_eq!(status(&admin, "POST", "/admin/reload", key).await, expected, "{key:?}");
    }
    assert_eq!(service.metrics.rejections(RejectReason::Auth), 2);
    assert_eq!(service.metrics.responses(Route::Other, 404), 9);
    // The document of a port lists what the port has.
    let request = Request::get("/api-doc/openapi.json").body(Body::empty()).unwrap();
    let answer = public.clone().oneshot(request).await.unwrap();
    let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
    let document: Value = serde_json::from_slice(&body).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/embed") && !paths.contains_key("/metrics") && !paths.contains_key("/admin/reload"));
}

#[tokio::test]
async fn a_service_without_keys_has_no_administrators_on_any_port() {
    let service = service(|_| {});
    for router in [admin_router(service.state.clone()), service.router.clone()] {
        for key in ["", "key"] {
            let request = Request::post("/admin/reload").header("x-api-key", key).body(Body::empty()).unwrap();
            assert_eq!(router.clone().oneshot(request).await.unwrap().status().as_u16(), 401);
        }
    }
}

#[tokio::test]
async fn both_ports_drain_together() {
    let service = service(|_| {});
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (http, admin) = (bind().await, bind().await);
    let (main, at_admin) = (http.local_addr().unwrap(), admin.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async move {
        stopped.await.ok();
    };
    let listeners = Listeners { http, grpc: None, admin: Some(admin) };
    let ended = tokio::spawn(serve(listeners, service.state.clone(), shutdown, Duration::from_secs(5)));
    let connect = async |address| Client::connect(address).await.unwrap();
    let mut client = connect(main).await;
    assert_eq!(client.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
    assert_eq!(client.get("/metrics").await.unwrap().status, 404);
    let mut operator = connect(at_admin).await;
    let text = String::from_utf8(operator.get("/metrics").await.unwrap().body).unwrap();
    assert!(text.contains("niwaki_requests_total{code=\"200\",route=\"/embed\"} 1\n"), "{text}");
    assert_eq!(operator.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 404);
    // While work is under way, the other port tells that the end has begun.
    let slow = tokio::spawn(async move { client.post("/embed", &json!({"inputs": "slow"})).await.unwrap().status });
    while service.engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
    stop.send(()).unwrap();
    let ready = async || connect(at_admin).await.get("/health/ready").await.unwrap().status;
    while ready().await == 200 {}
    assert_eq!(ready().await, 503);
    assert_eq!(slow.await.unwrap(), 200);
    tokio::time::timeout(Duration::from_secs(3), ended).await.unwrap().unwrap().unwrap();
}

#[test]
fn the_binary_moves_them_by_a_flag_of_either_name() {
    for flag in ["--prometheus-port", "--admin-port"] {
        let server = Process::start(&[flag, "0", "--api-key", "key"]);
        assert_ne!(server.address, server.admin);
        let at = |address, path| ask(address, "key", "GET", path, &Value::Null).0;
        assert_eq!((at(server.address, "/metrics"), at(server.admin, "/metrics")), (404, 200));
        assert_eq!((at(server.address, "/health/ready"), at(server.admin, "/health/ready")), (200, 200));
        assert_eq!(server.metric("niwaki_ready"), 1.0);
        let reload = |key| ask(server.admin, key, "POST", "/admin/reload", &Value::Null).0;
        assert_eq!((reload("wrong"), reload("key")), (401, 200));
    }
}
