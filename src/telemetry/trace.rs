//! Traces: which requests belong together, and where each spent its time.
//!
//! A request that a client has put into a trace (W3C `traceparent`) stays in it; another begins one of its own. A request
//! that is sampled gives a span, and a span for each of its stages; [`super::export`] sends them away. A span says where a
//! request went, how long it took and how it ended. It never holds a text, an address or a header's value of the user's.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, Span};

use super::export::{ExportError, Exporter};
use super::{Metrics, Route, Stage};

/// Where traces go, and which.
#[derive(Debug, Clone)]
pub struct TraceConfig {
    /// A collector's OTLP over gRPC, `http://host:port`.
    pub endpoint: String,
    /// What the service is called there.
    pub service_name: String,
    /// Share of the traces that begin here which are sampled. Of those that a client began, the client decides.
    pub sample_ratio: f64,
}

/// Makes spans of requests.
pub struct Tracer {
    sdk: SdkTracer,
    provider: SdkTracerProvider,
    exporter: Exporter,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").finish_non_exhaustive()
    }
}

/// The headers that say what trace a request is in, as far as they are text.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceHeaders<'a> {
    /// `traceparent`.
    pub parent: Option<&'a str>,
    /// `tracestate`.
    pub state: Option<&'a str>,
}

impl Extractor for TraceHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.parent.filter(|parent| is_traceparent(parent)),
            // The standard's least that must be passed on; what is longer serves nobody.
            "tracestate" => self.state.filter(|state| state.len() <= 512),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// Whether `text` has the form `version-trace-parent-flags` of W3C's Trace Context, 3.2: lower-case digits, as many as it
/// says. (The propagator would fill up shorter ids, which then are of no trace that the client knows.)
fn is_traceparent(text: &str) -> bool {
    let mut parts = text.split('-');
    let mut digits = |n| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        parts.next().is_some_and(|part| part.len() == n && part.bytes().all(is_digit))
    };
    let well_formed = [2, 32, 16, 2].into_iter().all(&mut digits);
    // A later version may have more behind it.
    well_formed && (parts.next().is_none() || !text.starts_with("00"))
}

/// The trace that a client has put its request into.
fn context_of(headers: TraceHeaders<'_>) -> SpanContext {
    // A context of its own: nothing here depends on which thread runs it.
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    context.span().span_context().clone()
}

impl Tracer {
    /// Starts the export; must be called on the runtime that it is to run on. A collector that cannot be reached is no
    /// error: spans are then dropped and counted.
    ///
    /// # Errors
    /// If the endpoint is no address that spans can be sent to.
    pub fn start(config: &TraceConfig, metrics: &Arc<Metrics>) -> Result<Self, ExportError> {
        let resource = Resource::builder()
            .with_service_name(config.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let (queue, exporter) = Exporter::start(&config.endpoint, &resource, metrics)?;
        let provider = SdkTracerProvider::builder()
            .with_span_processor(queue)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio))))
            .with_resource(resource)
            .build();
        Ok(Self { sdk: provider.tracer("niwaki"), provider, exporter })
    }

    /// Begins the span of a request.
    #[must_use]
    pub fn begin(&self, headers: TraceHeaders<'_>, method: &'static str, route: Route) -> RequestSpan {
        let client = context_of(headers);
        // The sampler would take a parent that says nothing for one that does not want to be sampled.
        let parent = match client.is_valid() {
            true => Context::new().with_remote_span_context(client),
            false => Context::new(),
        };
        let kind = if route.is_grpc() {
            [KeyValue::new("rpc.system", "grpc"), KeyValue::new("rpc.service", &route.label()[1..])]
        } else {
            [KeyValue::new("http.request.method", method), KeyValue::new("http.route", route.label())]
        };
        let name = if route.is_grpc() { route.label()[1..].into() } else { format!("{method} {route}").into() };
        let builder = SpanBuilder { name, ..SpanBuilder::default() };
        let span = builder.with_kind(SpanKind::Server).with_attributes(kind).start_with_context(&self.sdk, &parent);
        let context = span.span_context().clone();
        let stages = context.is_sampled().then(|| self.sdk.clone());
        RequestSpan { trace: Trace(Some(Arc::new(Place { context, stages }))), span: Some(span) }
    }

    /// Sends what is left, for at most `limit`.
    pub async fn close(&self, limit: Duration) {
        // Nothing is refused by the queue; a second call finds it closed.
        self.provider.shutdown().ok();
        self.exporter.close(limit).await;
    }
}

struct Place {
    /// The request's span here; without a tracer, the client's.
    context: SpanContext,
    /// For the spans of stages, if the trace is sampled.
    stages: Option<SdkTracer>,
}

/// A request's place in a trace, if it has one; clones are of the same.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Place>>);

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trace").field(&self.id()).finish()
    }
}

impl Trace {
    /// The trace that a client has put its request into, where this service makes no spans.
    #[must_use]
    pub fn of_client(headers: TraceHeaders<'_>) -> Self {
        // Nearly all requests have none: not worth a look by the propagator.
        let context = headers.parent.map(|_| context_of(headers)).filter(SpanContext::is_valid);
        Self(context.map(|context| Arc::new(Place { context, stages: None })))
    }

    /// The trace's id, for logs.
    #[must_use]
    pub fn id(&self) -> Option<String> {
        self.0.as_ref().map(|place| place.context.trace_id().to_string())
    }

    /// A stage of the request ended `before` now and took `took`.
    pub fn stage(&self, stage: Stage, before: Duration, took: Duration, counts: &[(&'static str, usize)]) {
        let Some((place, tracer)) = self.0.as_ref().and_then(|place| Some((place, place.stages.as_ref()?))) else {
            return;
        };
        let end = SystemTime::now() - before;
        let counts = counts.iter().map(|&(name, n)| KeyValue::new(name, i64::try_from(n).unwrap_or(i64::MAX)));
        let parent = Context::new().with_remote_span_context(place.context.clone());
        let builder = SpanBuilder::from_name(stage.label()).with_start_time(end - took).with_attributes(counts);
        builder.start_with_context(tracer, &parent).end_with_timestamp(end);
    }
}

/// The span of a request; it ends when it is dropped, as that of a client that left.
#[derive(Debug)]
pub struct RequestSpan {
    trace: Trace,
    span: Option<Span>,
}

impl RequestSpan {
    /// Of a service that makes no spans.
    #[must_use]
    pub fn none(headers: TraceHeaders<'_>) -> Self {
        Self { trace: Trace::of_client(headers), span: None }
    }

    /// The request's place in its trace.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// `traceparent` for the answer; `None` where this service makes no spans.
    #[must_use]
    pub fn header(&self) -> Option<String> {
        let context = self.span.as_ref()?.span_context();
        let flags = context.trace_flags().to_u8() & 1;
        Some(format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id()))
    }

    /// Ends with an answer of this code.
    pub fn end(mut self, code: u16, request_id: &str) {
        let Some(mut span) = self.span.take() else { return };
        if span.is_recording() {
            span.set_attribute(KeyValue::new("http.response.status_code", i64::from(code)));
            span.set_attribute(KeyValue::new("niwaki.request_id", request_id.to_owned()));
            if code >= 500 {
                span.set_attribute(KeyValue::new("error.type", code.to_string()));
                span.set_status(Status::error(""));
            }
        }
        span.end();
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        if let Some(span) = &mut self.span {
            span.set_attribute(KeyValue::new("error.type", "cancelled"));
            span.set_status(Status::error("the client left"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn id(parent: &str) -> Option<String> {
        Trace::of_client(TraceHeaders { parent: Some(parent), state: None }).id()
    }

    #[test]
    fn a_clients_trace_is_read_and_nonsense_is_none() {
        assert_eq!(id(PARENT).as_deref(), Some("0af7651916cd43dd8448eb211c80319c"));
        assert_eq!(Trace::of_client(TraceHeaders::default()).id(), None);
        for wrong in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319\u{e9}-b7ad6b7169203331-01",
            "-------",
            "00-0af7656cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-af-1-1",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        ] {
            assert_eq!(id(wrong), None, "{wrong}");
        }
        let later = format!("cc{}-more", &PARENT[2..]);
        assert_eq!(id(&later).as_deref(), Some("0af7651916cd43dd8448eb211c80319c"), "a version to come");
        let long = "x".repeat(100_000);
        assert_eq!(id(&long), None);
        let headers = TraceHeaders { parent: Some(PARENT), state: Some(&long) };
        assert_eq!(context_of(headers).trace_state().header(), "");
        let headers = TraceHeaders { parent: Some(PARENT), state: Some("a=1,b=2") };
        assert_eq!(context_of(headers).trace_state().header(), "a=1,b=2");
    }
}
