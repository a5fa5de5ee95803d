//! A connection's stream and service, watched: what is it at, and does its client take what is sent?

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use hyper::body::{Buf, Frame, Incoming, SizeHint};
use hyper::service::{Service as _, service_fn};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// How often a connection that is to end is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Bytes of an answer that its client takes in a second, at least: slowly enough for many answers on one poor line. One that
/// takes a byte now and then would hold the memory of an answer for days.
const SLOWEST: u64 = 4096;

/// What a connection is at.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests whose answer has not been written in full.
    n_requests: AtomicUsize,
    /// Requests so far.
    n_begun: AtomicU64,
    /// Whether bytes wait for the client to take them.
    writing: AtomicBool,
    /// Whether they waited for too long.
    given_up: AtomicBool,
    /// Requests of whose answer pieces wait to be written: a client of HTTP/2 that gives no leave to send holds an answer
    /// up while the connection itself is free.
    held: Mutex<BTreeMap<u64, Held>>,
}

/// Pieces of an answer that wait to be written.
#[derive(Debug)]
struct Held {
    n_pieces: usize,
    /// When the client last took some of it.
    since: Instant,
    /// Since when its first piece has been waiting, and bytes that were taken since.
    begun: Instant,
    n_taken: u64,
}

impl Held {
    fn new() -> Self {
        let now = Instant::now();
        Self { n_pieces: 0, since: now, begun: now, n_taken: 0 }
    }

    fn is_late(&self, limit: Duration) -> bool {
        let all = limit + Duration::from_millis(1000 * self.n_taken / SLOWEST);
        self.since.elapsed() >= limit || self.begun.elapsed() >= all
    }
}

impl Activity {
    /// Resolves when the connection has been at nothing for `quiet`: no request, or only the beginning of one.
    pub(crate) async fn ended(&self, quiet: Duration) {
        let mut since = Instant::now();
        loop {
            sleep(LOOK).await;
            if self.n_requests.load(Ordering::Relaxed) > 0 || self.writing.load(Ordering::Relaxed) {
                since = Instant::now();
            } else if since.elapsed() >= quiet {
                return;
            }
        }
    }

    /// Resolves when there has been no request for `limit`, and at the latest after twice that time.
    pub(crate) async fn idle(&self, limit: Duration) {
        loop {
            let n_begun = self.n_begun.load(Ordering::Relaxed);
            sleep(limit).await;
            let none = self.n_requests.load(Ordering::Relaxed) == 0;
            if none && self.n_begun.load(Ordering::Relaxed) == n_begun {
                return;
            }
        }
    }

    /// Resolves when an answer has been held up for `limit` by a client that takes nothing of it, or for that and the time that
    /// what it took may take; and at the latest half of `limit` later.
    pub(crate) async fn stalled(&self, limit: Duration) {
        loop {
            sleep(limit / 2).await;
            if self.held().values().any(|held| held.is_late(limit)) {
                return;
            }
        }
    }

    /// Whether the client took nothing for too long.
    pub(crate) fn was_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<u64, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request on a connection, until its answer has been written or given up.
struct Active {
    activity: Arc<Activity>,
    id: u64,
}

impl Active {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.n_requests.fetch_add(1, Ordering::Relaxed);
        let id = activity.n_begun.fetch_add(1, Ordering::Relaxed);
        Self { activity: Arc::clone(activity), id }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.activity.n_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A piece of an answer that keeps its request active until it is written. Having handed it to the connection is not
/// enough: HTTP/2 takes a piece of any size as soon as the client gives leave to send one byte, and keeps the rest.
pub(crate) struct ActivePiece {
    bytes: Bytes,
    active: Arc<Active>,
}

impl ActivePiece {
    fn new(bytes: Bytes, active: &Arc<Active>) -> Self {
        let mut held = active.activity.held();
        held.entry(active.id).or_insert_with(Held::new).n_pieces += 1;
        Self { bytes, active: Arc::clone(active) }
    }
}

impl Drop for ActivePiece {
    fn drop(&mut self) {
        let mut all = self.active.activity.held();
        if let Some(held) = all.get_mut(&self.active.id) {
            held.n_pieces -= 1;
            if held.n_pieces == 0 {
                all.remove(&self.active.id);
            } else {
                // The next one has its own time.
                (held.begun, held.n_taken) = (Instant::now(), 0);
            }
        }
    }
}

impl Buf for ActivePiece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, n_bytes: usize) {
        self.bytes.advance(n_bytes);
        if let Some(held) = self.active.activity.held().get_mut(&self.active.id) {
            held.since = Instant::now();
            held.n_taken += n_bytes as u64;
        }
    }
}

/// A body that keeps its request active.
pub(crate) struct ActiveBody {
    body: Body,
    active: Arc<Active>,
}

impl hyper::body::Body for ActiveBody {
    type Data = ActivePiece;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<ActivePiece>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        polled.map_ok(|frame| frame.map_data(|bytes| ActivePiece::new(bytes, &self.active)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Marks the requests of a connection that is one too many.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Crowded;

/// The router as a service of one connection.
pub(crate) fn service(
    app: Router,
    activity: Arc<Activity>,
    crowded: bool,
) -> impl hyper::service::HttpService<
    Incoming,
    ResBody = ActiveBody,
    Error = Infallible,
    Future: Future<Output = Result<Response<ActiveBody>, Infallible>> + Send,
> {
    let app = TowerToHyperService::new(app);
    service_fn(move |mut request: Request<Incoming>| {
        if crowded {
            request.extensions_mut().insert(Crowded);
        }
        let active = Arc::new(Active::new(&activity));
        let answering = app.call(request);
        async move {
            let response = answering.await?;
            Ok(response.map(|body| ActiveBody { body, active }))
        }
    })
}

/// A stream whose writes fail when the other side takes nothing for too long. Without that a client which never reads
/// its answer would keep it in memory.
pub(crate) struct WriteTimeout<S> {
    stream: S,
    limit: Duration,
    /// Set while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
    activity: Arc<Activity>,
}

impl<S: AsyncWrite + Unpin> WriteTimeout<S> {
    pub(crate) fn new(stream: S, limit: Duration, activity: Arc<Activity>) -> Self {
        Self { stream, limit, waiting: None, activity }
    }

    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let result = write(Pin::new(&mut self.stream), context);
        if result.is_ready() {
            if self.waiting.take().is_some() {
                self.activity.writing.store(false, Ordering::Relaxed);
            }
            return result;
        }
        self.activity.writing.store(true, Ordering::Relaxed);
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(waiting.as_mut().poll(context));
        self.activity.given_up.store(true, Ordering::Relaxed);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteTimeout<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.watch(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.watch(context, |stream, context| stream.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watch(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watch(context, |stream, context| stream.poll_shutdown(context))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteTimeout<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_without_requests_and_stalled_by_one() {
        let activity = Arc::new(Activity::default());
        let limit = Duration::from_secs(10);
        let start = Instant::now();
        activity.idle(limit).await;
        assert_eq!(start.elapsed(), limit);
        // A request in between, and one that goes on.
        let watching = Arc::clone(&activity);
        let idle = tokio::spawn(async move { watching.idle(limit).await });
        sleep(Duration::from_secs(5)).await;
        drop(Active::new(&activity));
        sleep(Duration::from_secs(9)).await;
        let long = Active::new(&activity);
        sleep(Duration::from_secs(30)).await;
        assert!(!idle.is_finished());
        drop(long);
        idle.await.unwrap();
        // The client takes a part every nine seconds, then none.
        let start = Instant::now();
        let watching = Arc::clone(&activity);
        let stalled = tokio::spawn(async move { watching.stalled(limit).await });
        let answer = Arc::new(Active::new(&activity));
        let piece = || ActivePiece::new(Bytes::from(vec![7; 50 * 4096]), &answer);
        let (mut first, next) = (piece(), piece());
        for _ in 0..5 {
            sleep(Duration::from_secs(9)).await;
            first.advance(10 * 4096);
        }
        drop((first, next));
        // What the service takes its time for is not the client's fault.
        sleep(Duration::from_secs(60)).await;
        assert!(!stalled.is_finished());
        let last = piece();
        stalled.await.unwrap();
        assert!((115..=120).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        drop(last);
        assert!(activity.held().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_a_byte_now_and_then_is_given_up() {
        let activity = Arc::new(Activity::default());
        let watching = Arc::clone(&activity);
        let start = Instant::now();
        let stalled = tokio::spawn(async move { watching.stalled(Duration::from_secs(30)).await });
        let mut piece = ActivePiece::new(Bytes::from_static(&[7; 100]), &Arc::new(Active::new(&activity)));
        while !stalled.is_finished() {
            piece.advance(1);
            sleep(Duration::from_secs(1)).await;
        }
        assert!((30..=46).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn each_piece_of_an_answer_has_its_own_time() {
        let activity = Arc::new(Activity::default());
        let watching = Arc::clone(&activity);
        let stalled = tokio::spawn(async move { watching.stalled(Duration::from_secs(30)).await });
        let answer = Arc::new(Active::new(&activity));
        // One behind the other waits for longer than all of them together may.
        let pieces: Vec<_> = (0..4).map(|_| ActivePiece::new(Bytes::from(vec![7; 30 * 4096]), &answer)).collect();
        for mut piece in pieces {
            for _ in 0..5 {
                sleep(Duration::from_secs(10)).await;
                piece.advance(6 * 4096);
            }
        }
        assert!(!stalled.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_at_work_until_its_last_piece_is_written() {
        let activity = Arc::new(Activity::default());
        let mut body = ActiveBody { body: Body::from(vec![7; 100]), active: Arc::new(Active::new(&activity)) };
        let mut piece = body.frame().await.unwrap().unwrap().into_data().ok().unwrap();
        assert!(hyper::body::Body::is_end_stream(&body));
        drop(body);
        let watching = Arc::clone(&activity);
        let ended = tokio::spawn(async move { watching.ended(Duration::from_secs(2)).await });
        let watching = Arc::clone(&activity);
        let idle = tokio::spawn(async move { watching.idle(Duration::from_secs(5)).await });
        for _ in 0..10 {
            sleep(Duration::from_secs(6)).await;
            piece.advance(10);
        }
        assert!(!ended.is_finished() && !idle.is_finished());
        let start = Instant::now();
        drop(piece);
        ended.await.unwrap();
        let took = start.elapsed();
        assert!((1900..2100).contains(&took.as_millis()), "{took:?}");
        idle.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_given_up() {
        let (near, mut far) = duplex(16);
        let mut near = WriteTimeout::new(near, Duration::from_secs(30), Arc::default());
        let start = Instant::now();
        let writing = tokio::spawn(async move { near.write_all(&[7; 100]).await.map_err(|error| error.kind()) });
        sleep(Duration::from_secs(20)).await;
        // Taking some starts the time anew.
        let mut some = [0; 10];
        far.read_exact(&mut some).await.unwrap();
        assert_eq!(writing.await.unwrap(), Err(io::ErrorKind::TimedOut));
        assert_eq!(start.elapsed().as_secs(), 50);
    }
}
