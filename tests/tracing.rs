//! Traces, from a client's `traceparent` to what a collector decodes; and the log beside them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod service;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use niwaki::server::grpc::messages::{EmbedRequest, EmbedResponse};
use niwaki::server::{Listeners, serve};
use niwaki::telemetry::{SpanResult, TraceConfig, Tracer};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use service::process::{Process, refused};
use service::{Answer, Service, Setup, post, service};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tonic::transport::Endpoint;

/// A stand-in for a collector: what it was sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse { partial_success: None }))
    }
}

impl Collector {
    /// On a free port.
    async fn start() -> (Self, SocketAddr) {
        let collector = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
        let app = Router::new().route_service(path, TraceServiceServer::new(collector.clone()));
        tokio::spawn(async move { axum::serve(listener, app).await });
        (collector, address)
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.0.lock().unwrap();
        let scopes = requests.iter().flat_map(|request| &request.resource_spans).flat_map(|spans| &spans.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// Everything that it was sent, as text to search in.
    fn bytes(&self) -> String {
        let bytes: Vec<u8> = self.0.lock().unwrap().iter().flat_map(Message::encode_to_vec).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    async fn until(&self, n_spans: usize) -> Vec<Span> {
        let start = Instant::now();
        while self.spans().len() < n_spans {
            assert!(start.elapsed() < Duration::from_secs(10), "{} of {n_spans} spans", self.spans().len());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.spans()
    }
}

fn attributes(span: &Span) -> BTreeMap<String, Value> {
    let value = |value: &AnyValue| match value {
        AnyValue::StringValue(text) => json!(text),
        AnyValue::IntValue(number) => json!(number),
        other => panic!("{other:?}"),
    };
    let pairs = span.attributes.iter();
    pairs.map(|pair| (pair.key.clone(), value(pair.value.as_ref().unwrap().value.as_ref().unwrap()))).collect()
}

fn traced(service: &Service, address: SocketAddr, sample_ratio: f64) {
    let config = TraceConfig { endpoint: format!("http://{address}"), service_name: "garden".to_owned(), sample_ratio };
    service.state.set_tracer(Tracer::start(&config, &service.metrics).unwrap());
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn parent(flags: &str) -> String {
    format!("00-{TRACE}-{PARENT}-{flags}")
}

async fn ask(service: &Service, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
    let mut request = post(path, body);
    for (name, value) in headers {
        let name = axum::http::HeaderName::from_bytes(name.as_bytes()).unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    service.ask(request).await
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name} is not among {spans:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_trace_goes_on_with_a_span_for_each_stage() {
    let (collector, address) = Collector::start().await;
    let service = service(|setup| setup.batch_time = Duration::from_millis(20));
    traced(&service, address, 0.0);
    let before = SystemTime::now();
    let headers = [
        ("traceparent", parent("01")),
        ("tracestate", "vendor=7".to_owned()),
        ("x-request-id", "request-7".to_owned()),
        ("user-agent", "secret-agent".to_owned()),
    ];
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let body = json!({"inputs": ["the tree", "secret words of the garden"]});
    let answer = ask(&service, "/embed?secret=yes", &body, &headers).await;
    assert_eq!(answer.status, 200);
    let spans = collector.until(5).await;
    assert_eq!(spans.len(), 5);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let root = named(&spans, "POST /embed");
    assert_eq!((hex(&root.parent_span_id).as_str(), root.trace_state.as_str()), (PARENT, "vendor=7"));
    assert_eq!(root.kind, 2, "a server");
    let expected = json!({"http.request.method": "POST", "http.route": "/embed", "http.response.status_code": 200,
        "niwaki.request_id": "request-7"});
    assert_eq!(json!(attributes(root)), expected);
    // The answer names the span.
    assert_eq!(answer.header("traceparent"), format!("00-{TRACE}-{}-01", hex(&root.span_id)));
    let nanos =
        |time: SystemTime| u64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()).unwrap();
    assert!(root.start_time_unix_nano >= nanos(before) && root.end_time_unix_nano <= nanos(SystemTime::now()));
    let mut last = root.start_time_unix_nano;
    for stage in ["tokenize", "queue", "infer", "serialize"] {
        let span = named(&spans, stage);
        assert_eq!(hex(&span.trace_id), TRACE);
        assert_eq!(span.parent_span_id, root.span_id, "{stage}");
        // One after the other; clocks of two kinds are compared, so a little may be missing.
        assert!(span.start_time_unix_nano + 2_000_000 >= last, "{stage}");
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano, "{stage}");
        assert!(span.end_time_unix_nano <= root.end_time_unix_nano, "{stage}");
        last = span.end_time_unix_nano;
    }
    let infer = named(&spans, "infer");
    assert!(infer.end_time_unix_nano - infer.start_time_unix_nano >= 20_000_000);
    let n_tokens: usize = answer.header("x-compute-tokens").parse().unwrap();
    assert_eq!(json!(attributes(infer)), json!({"niwaki.tokens": n_tokens}));
    // Who serves, and not a word of the user's.
    let bytes = collector.bytes();
    assert!(bytes.contains("garden") && bytes.contains("service.version"));
    assert!(!bytes.contains("secret") && !bytes.contains("tree"), "{bytes}");
    service.state.close_tracer(Duration::from_secs(2)).await;
    assert_eq!(service.metrics.spans(SpanResult::Exported), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_decides_about_its_trace_and_the_ratio_about_others() {
    for (ratio, header, expected) in [
        (1.0, None, 5),
        (0.0, None, 0),
        (1.0, Some(parent("00")), 0),
        (0.0, Some(parent("01")), 5),
        // What cannot be read is as none.
        (1.0, Some("00-zz".to_owned()), 5),
        (0.0, Some("00-zz".to_owned()), 0),
    ] {
        let (collector, address) = Collector::start().await;
        let service = service(|_| {});
        traced(&service, address, ratio);
        let headers: Vec<(&str, &str)> = header.iter().map(|value| ("traceparent", value.as_str())).collect();
        let answer = ask(&service, "/embed", &json!({"inputs": "a"}), &headers).await;
        let given = answer.header("traceparent").to_owned();
        let flags = if expected > 0 { "-01" } else { "-00" };
        assert!(given.starts_with("00-") && given.ends_with(flags) && given.len() == 55, "{given}");
        assert_eq!(given.contains(TRACE), header.as_ref().is_some_and(|header| header.contains(TRACE)));
        service.state.close_tracer(Duration::from_secs(5)).await;
        assert_eq!(collector.spans().len(), expected, "{ratio} {header:?}");
        assert_eq!(service.metrics.spans(SpanResult::Exported), expected as u64);
    }
    // About half of them.
    let (collector, address) = Collector::start().await;
    let service = service(|_| {});
    traced(&service, address, 0.5);
    for _ in 0..200 {
        ask(&service, "/embed", &json!({"inputs": "a"}), &[]).await;
    }
    service.state.close_tracer(Duration::from_secs(5)).await;
    let n_roots = collector.spans().iter().filter(|span| span.name == "POST /embed").count();
    assert!((60..=140).contains(&n_roots), "{n_roots} of 200");
    assert_eq!(collector.spans().len(), 5 * n_roots, "a trace is whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_and_clients_that_leave_are_told_and_probes_are_not() {
    let (collector, address) = Collector::start().await;
    let service = service(|_| {});
    traced(&service, address, 1.0);
    for (body, status) in [(json!({"inputs": ""}), 400), (json!({"inputs": "nan"}), 424), (json!({"inputs": 7}), 422)] {
        assert_eq!(ask(&service, "/embed", &body, &[]).await.status, status);
    }
    assert_eq!(
        ask(&service, "/embed", &json!({"inputs": "slow"}), &[("x-request-timeout-ms", "50")]).await.status,
        504
    );
    for path in ["/health", "/metrics", "/nowhere", "/info", "/docs/"] {
        let answer = service.get(path).await;
        assert_eq!(answer.header("traceparent"), "", "{path}");
    }
    let body = json!({"inputs": {"source_sentence": "slow", "sentences": ["a"]}});
    tokio::time::timeout(Duration::from_millis(50), ask(&service, "/similarity", &body, &[])).await.unwrap_err();
    service.state.close_tracer(Duration::from_secs(5)).await;
    let spans = collector.spans();
    let roots: Vec<&Span> = spans.iter().filter(|span| span.parent_span_id.is_empty()).collect();
    let mut codes: Vec<Value> = roots
        .iter()
        .filter(|span| span.name == "POST /embed")
        .map(|span| attributes(span)["http.response.status_code"].clone())
        .collect();
    codes.sort_by_key(Value::as_i64);
    assert_eq!(json!(codes), json!([400, 422, 424, 504]));
    let of = |code: i64| {
        let is = |span: &&&Span| attributes(span).get("http.response.status_code") == Some(&json!(code));
        roots.iter().find(is).unwrap().status.as_ref().map_or(0, |status| status.code)
    };
    assert_eq!((of(504), of(400)), (2, 0), "an error of the server's is one of the span's");
    assert_eq!(attributes(named(&spans, "POST /similarity"))["error.type"], "cancelled");
    assert_eq!(roots.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_grpc_has_the_stages_of_all_its_messages() {
    let (collector, address) = Collector::start().await;
    let service = service(|_| {});
    traced(&service, address, 0.0);
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (http, grpc) = (bind().await, bind().await);
    let endpoint = Endpoint::from_shared(format!("http://{}", grpc.local_addr().unwrap())).unwrap();
    let listeners = Listeners { http, grpc: Some(grpc), admin: None };
    tokio::spawn(serve(listeners, service.state.clone(), std::future::pending(), Duration::from_secs(1)));
    let mut client = tonic::client::Grpc::new(endpoint.connect().await.unwrap());
    client.ready().await.unwrap();
    let message = || EmbedRequest { inputs: "the tree".to_owned(), ..EmbedRequest::default() };
    let mut request = tonic::Request::new(tokio_stream::iter([message(), message(), message()]));
    request.metadata_mut().insert("traceparent", parent("01").parse().unwrap());
    let path = "/tei.v1.Embed/EmbedStream".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<EmbedRequest, EmbedResponse>::default();
    let answer = client.streaming(request, path, codec).await.unwrap();
    assert!(answer.metadata().get("traceparent").unwrap().to_str().unwrap().contains(TRACE));
    assert_eq!(answer.into_inner().collect::<Vec<_>>().await.len(), 3);
    service.state.close_tracer(Duration::from_secs(5)).await;
    let spans = collector.spans();
    let root = named(&spans, "tei.v1.Embed");
    let about = attributes(root);
    assert_eq!((&about["rpc.system"], &about["rpc.service"]), (&json!("grpc"), &json!("tei.v1.Embed")));
    for stage in ["tokenize", "queue", "infer"] {
        let of_stage = spans.iter().filter(|span| span.name == stage && span.parent_span_id == root.span_id);
        assert_eq!(of_stage.count(), 3, "{stage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_not_there_costs_nothing() {
    // One that refuses, and one that takes connections and never answers.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for address in [closed, silent.local_addr().unwrap()] {
        let service = service(|_| {});
        traced(&service, address, 1.0);
        let start = Instant::now();
        for _ in 0..700 {
            assert_eq!(ask(&service, "/embed", &json!({"inputs": "a"}), &[]).await.status, 200);
        }
        // Long before an export is given up.
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        let count = |result| service.metrics.spans(result);
        // 3,500 spans: of them 2,048 wait, up to 512 are being sent at a time.
        assert!(count(SpanResult::Dropped) >= 300, "{} were dropped", count(SpanResult::Dropped));
        let start = Instant::now();
        service.state.close_tracer(Duration::from_millis(300)).await;
        assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
        assert_eq!(count(SpanResult::Exported), 0);
        assert!(count(SpanResult::Dropped) + count(SpanResult::Failed) <= 3500);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_a_clients_trace_is_left_alone() {
    let service = service(|_: &mut Setup| {});
    let answer = ask(&service, "/embed", &json!({"inputs": "a"}), &[("traceparent", &parent("01"))]).await;
    assert_eq!((answer.status, answer.header("traceparent")), (200, ""));
    let request = Request::get("/health").header("traceparent", "\u{7f}").body(Body::empty());
    assert!(request.is_err() || service.ask(request.unwrap()).await.status == 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_binary_logs_ids_with_what_concerns_a_request_and_sends_its_last_spans() {
    for endpoint in ["localhost:4317", "https://localhost:4317", "http://", "http:///x", "ftp://localhost"] {
        let output = tokio::task::spawn_blocking(move || refused(&["--otlp-endpoint", endpoint])).await.unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{endpoint}: {message}");
        assert!(message.contains("--otlp-endpoint"), "{message}");
    }
    let (collector, address) = Collector::start().await;
    let log = tokio::task::spawn_blocking(move || {
        let endpoint = format!("http://{address}");
        let arguments = ["--otlp-endpoint", &endpoint, "--otlp-service-name", "of-the-test", "--slow-request-ms", "1"];
        let mut server = Process::start_at("info,niwaki=debug", &arguments);
        let traceparent = format!("\r\ntraceparent: {}\r\nx-request-id: request-9", parent("01"));
        let long = "secret words ".repeat(2000);
        assert_eq!(server.ask_with(&format!("key{traceparent}"), "POST", "/embed", &json!({"inputs": long})).0, 200);
        assert_eq!(server.ask_with(&format!("key{traceparent}"), "POST", "/embed", &json!({"inputs": ""})).0, 400);
        server.signal("TERM");
        assert!(server.child.wait().unwrap().success());
        std::thread::sleep(Duration::from_millis(100));
        server.log()
    })
    .await
    .unwrap();
    let find = |message: &str| {
        let found = log.iter().find(|event| event["message"] == message);
        found.unwrap_or_else(|| panic!("{message} is not in {log:#?}")).clone()
    };
    let slow = find("slow request");
    assert_eq!((&slow["request_id"], &slow["trace_id"]), (&json!("request-9"), &json!(TRACE)));
    assert_eq!((&slow["route"], &slow["code"]), (&json!("/embed"), &json!(200)));
    let parts: f64 = ["tokenize_ms", "queue_ms", "infer_ms"].iter().map(|stage| slow[stage].as_f64().unwrap()).sum();
    assert!(parts > 0.0 && parts <= slow["duration_ms"].as_f64().unwrap() + 0.1, "{slow}");
    assert!(slow["n_tokens"].as_u64().unwrap() > 100, "{slow}");
    let refused = find("request refused");
    assert_eq!(
        (&refused["span"]["request_id"], &refused["span"]["trace_id"]),
        (&json!("request-9"), &json!(TRACE)),
        "{refused}"
    );
    let answered = find("request answered");
    assert_eq!(answered["trace_id"], TRACE);
    assert!(!Value::Array(log.clone()).to_string().contains("secret"));
    // The process has sent all of them before it ended.
    let spans = collector.spans();
    assert_eq!(spans.iter().filter(|span| span.name == "POST /embed").count(), 2, "{spans:?}");
    assert!(collector.bytes().contains("of-the-test") && !collector.bytes().contains("secret"));
}
