//! A request's body: read within limits of size, time and memory, and parsed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, Query, Request};
use axum::http::{HeaderMap, Uri, header};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use super::api::{Named, Object};
use super::error::ServerError;
use super::layers::{Arrival, MODEL, REQUEST_TIMEOUT};
use super::memory::{merged, take_memory, take_waiting};
use super::models::Model;
use super::state::AppState;
use crate::telemetry::{ExpiryStage, Route, Trace, events};

/// Bodies up to this size are parsed where they are read, which takes some 100 µs, and cost no share of the memory for
/// large ones. Larger ones are parsed on the tokenizer's threads.
pub(crate) const SMALL_BODY: usize = 64 * 1024;

/// A deadline further away than this is a mistake.
const MAX_TIMEOUT_MS: u64 = 3_600_000;

/// The service, and the model that a request is for.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) app: AppState,
    pub(crate) model: Arc<Model>,
}

/// The model that a request's address or headers name: `?model=…`, or the header `x-model`.
pub(crate) fn asked_model(uri: &Uri, headers: &HeaderMap) -> Result<Option<String>, ServerError> {
    #[derive(Deserialize)]
    struct Asked {
        model: Option<String>,
    }
    let invalid = || ServerError::Value { field: "model", reason: "must be the name of a model".to_owned() };
    let Query(Asked { model }) = Query::try_from_uri(uri).map_err(|_| invalid())?;
    if model.is_some() {
        return Ok(model);
    }
    headers.get(MODEL).map(|value| value.to_str().map(str::to_owned).map_err(|_| invalid())).transpose()
}

/// A parsed request.
#[derive(Debug)]
pub(crate) struct Call<T> {
    pub(crate) target: Target,
    pub(crate) body: T,
    pub(crate) clock: Clock,
    /// To be held while the request's content is.
    pub(crate) memory: Option<OwnedSemaphorePermit>,
}

/// When a request came, when its answer is no longer of use, and where its times are told.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    pub(crate) start: Instant,
    pub(crate) deadline: Option<Instant>,
    /// Where the times of its stages are told.
    pub(crate) trace: Trace,
}

impl Clock {
    pub(crate) fn of(app: &AppState, arrival: Option<&Arrival>, headers: &HeaderMap) -> Result<Self, ServerError> {
        let start = arrival.map_or_else(Instant::now, |arrival| arrival.start);
        let trace = arrival.map(|arrival| arrival.trace.clone()).unwrap_or_default();
        let timeout = match headers.get(REQUEST_TIMEOUT) {
            None => app.config.default_timeout,
            Some(value) => {
                let millis = value.to_str().ok().and_then(|text| text.trim().parse().ok());
                let millis = millis.filter(|millis| (1..=MAX_TIMEOUT_MS).contains(millis));
                Some(Duration::from_millis(millis.ok_or(ServerError::TimeoutHeader { limit: MAX_TIMEOUT_MS })?))
            }
        };
        Ok(Self { start, deadline: timeout.and_then(|timeout| start.checked_add(timeout)), trace })
    }

    /// Waits for `work`, but not beyond the deadline. A client that leaves meanwhile is counted, as the engine counts those
    /// that leave later.
    pub(crate) async fn within<T>(&self, app: &AppState, work: impl Future<Output = T>) -> Result<T, ServerError> {
        let mut waiting = Waiting(Some(app));
        let done = match self.deadline {
            None => Ok(work.await),
            Some(deadline) => timeout_at(deadline, work).await.map_err(|_| self.expired(app)),
        };
        waiting.0 = None;
        done
    }

    fn expired(&self, app: &AppState) -> ServerError {
        events::expired(&app.metrics, ExpiryStage::Tokenize);
        ServerError::Deadline { waited: self.start.elapsed() }
    }
}

/// A client that waits; dropped before the wait is over, it has left.
struct Waiting<'a>(Option<&'a AppState>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(app) = self.0 {
            events::cancelled(&app.metrics);
        }
    }
}

/// A request that has been read and not parsed: what its body must be may depend on the model.
#[derive(Debug)]
pub(crate) struct Received {
    app: AppState,
    asked: Option<String>,
    bytes: Bytes,
    clock: Clock,
    memory: Option<OwnedSemaphorePermit>,
}

impl Received {
    /// The model that it is for, as far as its address and headers say.
    pub(crate) fn model(&self) -> Result<Arc<Model>, ServerError> {
        self.app.models.find(self.asked.as_deref(), None)
    }

    /// The same request for a model that its path names.
    pub(crate) fn for_model(mut self, name: String) -> Self {
        self.asked = Some(name);
        self
    }

    /// Reads the body as a `T`.
    pub(crate) async fn parse<T: DeserializeOwned + Named + Send + 'static>(self) -> Result<Call<T>, ServerError> {
        let Self { app, asked, bytes, clock, memory } = self;
        let (Object(body), memory): (Object<T>, _) = if bytes.len() <= SMALL_BODY {
            (serde_json::from_slice(&bytes)?, memory)
        } else {
            // That of the body is not known yet; then the first one's threads.
            let model = app.models.find(asked.as_deref(), None)?;
            // The share of the memory stays with the bytes: they wait for a thread, also when nobody waits for them.
            let parsing = model.pool.run(move |_, _| serde_json::from_slice(&bytes).map(|body| (body, memory)));
            clock.within(&app, parsing).await?.map_err(ServerError::Pool)??
        };
        let model = app.models.find(asked.as_deref(), body.model())?;
        Ok(Call { target: Target { app, model }, body, clock, memory })
    }
}

impl FromRequest<AppState> for Received {
    type Rejection = ServerError;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, ServerError> {
        let (head, body) = request.into_parts();
        let arrival = head.extensions.get::<Arrival>();
        // Clients of the Open Inference Protocol, Triton's among them, name a type only for what is not JSON.
        let may_be_silent = arrival.is_some_and(|arrival| arrival.route == Route::Infer);
        let is_silent = may_be_silent && !head.headers.contains_key(header::CONTENT_TYPE);
        let check = || {
            if !is_silent && !is_json(&head.headers) {
                return Err(ServerError::MediaType);
            }
            Ok((Clock::of(app, arrival, &head.headers)?, asked_model(&head.uri, &head.headers)?))
        };
        let (clock, asked) = match check() {
            Ok(checked) => checked,
            Err(error) => {
                discard(&head.headers, body).await;
                return Err(error);
            }
        };
        let limit = app.config.body_timeout;
        let last = clock.start + limit;
        let end = clock.deadline.map_or(last, |deadline| deadline.min(last));
        let (bytes, memory) = match timeout_at(end, read(app, &head.headers, body)).await {
            Ok(read) => read?,
            Err(_) if end < last => return Err(clock.expired(app)),
            Err(_) => return Err(ServerError::BodyTimeout { limit }),
        };
        Ok(Self { app: app.clone(), asked, bytes, clock, memory })
    }
}

impl<T: DeserializeOwned + Named + Send + 'static> FromRequest<AppState> for Call<T> {
    type Rejection = ServerError;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, ServerError> {
        Received::from_request(request, app).await?.parse().await
    }
}

/// `application/json`, or `application/anything+json`.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim();
    let Some((kind, subtype)) = essence.split_once('/') else { return false };
    let json_suffix = subtype.rsplit_once('+').is_some_and(|(_, suffix)| suffix.eq_ignore_ascii_case("json"));
    kind.eq_ignore_ascii_case("application") && (subtype.eq_ignore_ascii_case("json") || json_suffix)
}

fn declared_len(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A body, and its share of the memory if it is large.
type Whole = (Bytes, Option<OwnedSemaphorePermit>);

async fn read(app: &AppState, headers: &HeaderMap, mut body: Body) -> Result<Whole, ServerError> {
    let read = read_within(app, headers, &mut body).await;
    if let Err(ServerError::BodyTooLarge { .. } | ServerError::BodyMemory) = read {
        discard(headers, body).await;
    }
    read
}

async fn read_within(app: &AppState, headers: &HeaderMap, body: &mut Body) -> Result<Whole, ServerError> {
    let limit = app.config.payload_limit;
    let declared = declared_len(headers).map(|len| usize::try_from(len).unwrap_or(usize::MAX));
    if declared.is_some_and(|len| len > limit) {
        return Err(ServerError::BodyTooLarge { limit });
    }
    let large = declared.filter(|&len| len > SMALL_BODY);
    let mut memory = large.map(|len| take_memory(app, len)).transpose()?;
    let mut waiting = None;
    // Most bodies come in one piece, which then is not copied.
    let mut first = Bytes::new();
    let mut whole = Vec::new();
    let mut n_bytes = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| ServerError::Body)?.into_data() else { continue };
        n_bytes += data.len();
        if n_bytes > limit {
            return Err(ServerError::BodyTooLarge { limit });
        }
        if memory.is_none() {
            if n_bytes > SMALL_BODY {
                memory = Some(take_memory(app, limit)?);
                waiting = None;
            } else if !body.is_end_stream() {
                // One that is whole is parsed at once.
                waiting = merged(waiting, Some(take_waiting(app, n_bytes - data.len(), data.len())?));
            }
        }
        if n_bytes == data.len() {
            first = data;
        } else {
            if whole.is_empty() {
                whole.reserve_exact(declared.unwrap_or(SMALL_BODY).max(n_bytes));
                whole.extend_from_slice(&first);
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok((if whole.is_empty() { first } else { whole.into() }, memory))
}

/// Reads a body that nobody wants, up to a bound. Were the connection closed with bytes unread, the client's system
/// would throw the answer away, and a client that sends too much would never learn so.
pub(crate) async fn discard(headers: &HeaderMap, mut body: Body) {
    const MAX_BYTES: usize = 16 << 20;
    const MAX_TIME: Duration = Duration::from_secs(2);
    // Such a client waits for leave to send, and takes the answer as its refusal.
    if headers.contains_key(header::EXPECT) {
        return;
    }
    let all = async {
        let mut n_bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            n_bytes += frame.data_ref().map_or(0, Bytes::len);
            if n_bytes > MAX_BYTES {
                return;
            }
        }
    };
    // Past the time the connection is closed as it is.
    timeout(MAX_TIME, all).await.ok();
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::sleep;

    use super::*;
    use crate::server::api::EmbedRequest;
    use crate::server::memory::FREE;
    use crate::server::testing::{busy_tokenizer, state};

    #[tokio::test]
    async fn a_body_keeps_its_memory_while_it_waits_for_a_thread() {
        let app = state();
        let thread = busy_tokenizer(&app).await;
        let free = app.body_memory.available_permits();
        let bytes = Bytes::from(format!(r#"{{"inputs":"{}"}}"#, "x".repeat(100 * 1024)));
        let start = Instant::now();
        let clock = Clock { start, deadline: Some(start + Duration::from_millis(20)), trace: Trace::default() };
        let memory = Some(take_memory(&app, 100 * 1024).unwrap());
        let received = Received { app: app.clone(), asked: None, bytes, clock, memory };
        assert!(matches!(received.parse::<EmbedRequest>().await, Err(ServerError::Deadline { .. })));
        assert_eq!(app.body_memory.available_permits(), free - 100, "its client has given up, and the body is there");
        drop(thread);
        let freed = async {
            while app.body_memory.available_permits() < free {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), freed).await.unwrap();
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_that_is_refused_is_read_to_its_end() {
        let app = state();
        let _all = take_memory(&app, usize::MAX).unwrap();
        let n_read = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&n_read);
        let pieces = (0..10).map(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(vec![b' '; 20 * 1024])
        });
        let refused = read(&app, &HeaderMap::new(), Body::from_stream(tokio_stream::iter(pieces))).await;
        assert!(matches!(refused, Err(ServerError::BodyMemory)));
        assert_eq!(n_read.load(Ordering::Relaxed), 10, "its client would see a reset instead of the refusal");
    }

    #[tokio::test]
    async fn a_small_body_needs_memory_while_it_waits_for_its_rest() {
        let app = state();
        let pieces_of = |n: usize| {
            let pieces = [vec![b'a'; n], vec![b'b'; n], vec![b'c'; 9]];
            Body::from_stream(tokio_stream::iter(pieces.map(Ok::<_, Infallible>)))
        };
        let pieces = || pieces_of(FREE / 2 + 1);
        let read = async |body| read(&app, &HeaderMap::new(), body).await.map(|(bytes, _)| bytes);
        let free = app.waiting_memory.available_permits();
        let all = take_waiting(&app, FREE, free).unwrap();
        assert!(matches!(read(pieces()).await, Err(ServerError::BodyMemory)));
        assert_eq!(read(Body::from(vec![b'a'; 60_000])).await.unwrap().len(), 60_000, "it came whole");
        assert_eq!(read(pieces_of(FREE / 4)).await.unwrap().len(), FREE / 2 + 9, "it waits with little");
        drop(all);
        assert_eq!(read(pieces()).await.unwrap().len(), FREE + 2 + 9);
        assert_eq!(app.waiting_memory.available_permits(), free);
    }

    #[test]
    fn media_types_of_json() {
        for (value, expected) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/vnd.api+json", true),
            ("text/json", false),
            ("application/jsonx", false),
            ("application/x-www-form-urlencoded", false),
            ("json", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().unwrap())]);
            assert_eq!(is_json(&headers), expected, "{value}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }
}
