//! Headers that say what trace a request is in, and its id: two bytes choose which there are, lines are their values. Whatever
//! they say, the request is answered, in a trace that is a valid one, and the span is made and encoded for a collector.

use std::sync::LazyLock;

use axum::body::Body;
use axum::http::{HeaderValue, Request};
use http_body_util::BodyExt;
use niwaki::telemetry::{Trace, TraceConfig, TraceHeaders, Tracer};
use serde_json::Value;
use tower::ServiceExt;

use super::requests::SERVICE;

const NAMES: [&str; 6] =
    ["traceparent", "tracestate", "x-request-id", "baggage", "grpc-trace-bin", "x-request-timeout-ms"];

/// Spans of sampled traces go to a collector that nobody runs.
static TRACED: LazyLock<()> = LazyLock::new(|| {
    let _inside = SERVICE.runtime.enter();
    let config =
        TraceConfig { endpoint: "http://127.0.0.1:9".to_owned(), service_name: "fuzz".to_owned(), sample_ratio: 0.5 };
    SERVICE.state.set_tracer(Tracer::start(&config, SERVICE.state.metrics()).unwrap());
});

fn is_hex(text: &str, n: usize) -> bool {
    text.len() == n && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// One request with the headers in `data`.
pub(crate) fn run(data: &[u8]) {
    LazyLock::force(&TRACED);
    let Some((&which, rest)) = data.split_first() else { return };
    let values: Vec<&[u8]> = rest.split(|&byte| byte == b'\n').collect();
    if let (Ok(parent), state) =
        (std::str::from_utf8(values[0]), values.get(1).and_then(|v| std::str::from_utf8(v).ok()))
    {
        let trace = Trace::of_client(TraceHeaders { parent: Some(parent), state });
        assert!(trace.id().is_none_or(|id| is_hex(&id, 32) && parent.to_lowercase().contains(&id)), "{parent:?}");
    }
    let mut request = Request::post("/embed").header("content-type", "application/json");
    let names = NAMES.iter().enumerate().filter(|(index, _)| which >> index & 1 == 1);
    for ((_, name), value) in names.zip(&values) {
        let Ok(value) = HeaderValue::from_bytes(value) else { continue };
        request = request.header(*name, value);
    }
    let request = request.body(Body::from(r#"{"inputs":"the pine tree"}"#)).unwrap();
    let sent = request.headers().clone();
    let (head, body) = SERVICE.runtime.block_on(async {
        let (head, body) = SERVICE.http.clone().oneshot(request).await.unwrap().into_parts();
        (head, body.collect().await.unwrap().to_bytes())
    });
    // A header that sets no right time is refused, a very short time passes.
    let may_fail = sent.contains_key("x-request-timeout-ms");
    let status = head.status.as_u16();
    assert!(
        status == 200 || may_fail && [400, 422, 504].contains(&status),
        "{status}: {}",
        String::from_utf8_lossy(&body)
    );
    serde_json::from_slice::<Value>(&body).unwrap();
    let parent = head.headers["traceparent"].to_str().unwrap();
    let parts: Vec<&str> = parent.split('-').collect();
    assert!(
        parts.len() == 4 && parts[0] == "00" && is_hex(parts[1], 32) && is_hex(parts[2], 16) && is_hex(parts[3], 2),
        "{parent}"
    );
    assert!(parts[1].bytes().any(|digit| digit != b'0'), "{parent}");
    let id = head.headers["x-request-id"].to_str().unwrap();
    assert!((1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic()), "{id:?}");
}
