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
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::{Service as _, service_fn};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// What a connection is at.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests whose answer has not been handed to the connection in full.
    n_requests: AtomicUsize,
    /// Requests so far.
    n_begun: AtomicU64,
    /// Whether bytes wait for the client to take them.
    writing: AtomicBool,
    /// Whether they waited for too long.
    given_up: AtomicBool,
    /// Answers that the connection could take more of, by request, and since when it has not: a client of HTTP/2 that
    /// gives no leave to send holds an answer up while the connection itself is free.
    held: Mutex<BTreeMap<u64, Instant>>,
}

impl Activity {
    /// Resolves when the connection is at nothing: no request, or only the beginning of one.
    pub(crate) async fn ended(&self) {
        // Two looks, so that an answer on its way from a stream of HTTP/2 to the connection is not overlooked.
        let mut n_looks = 0;
        while n_looks < 2 {
            sleep(Duration::from_millis(10)).await;
            let at_work = self.n_requests.load(Ordering::Relaxed) > 0 || self.writing.load(Ordering::Relaxed);
            n_looks = if at_work { 0 } else { n_looks + 1 };
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

    /// Resolves when an answer has been held up for `limit` by a client that takes nothing of it, and at the latest after
    /// one and a half that time.
    pub(crate) async fn stalled(&self, limit: Duration) {
        loop {
            sleep(limit / 2).await;
            if self.held().values().min().is_some_and(|since| since.elapsed() >= limit) {
                return;
            }
        }
    }

    /// Whether the client took nothing for too long.
    pub(crate) fn was_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request on a connection, until its answer has been handed over or given up.
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

    /// Whether it is for the client to take more.
    fn set_held(&self, held: bool) {
        let mut all = self.activity.held();
        if held {
            all.insert(self.id, Instant::now());
        } else {
            all.remove(&self.id);
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.set_held(false);
        self.activity.n_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body that keeps its request active.
pub(crate) struct ActiveBody {
    body: Body,
    active: Active,
}

impl hyper::body::Body for ActiveBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        // Asked for more, so the client takes it; from what is given now on, it is the client's turn again.
        self.active.set_held(false);
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(Some(_))) {
            self.active.set_held(true);
        }
        polled
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
        let active = Active::new(&activity);
        let answering = app.call(request);
        async move {
            let response = answering.await?;
            active.set_held(true);
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
        let answer = Active::new(&activity);
        for _ in 0..5 {
            answer.set_held(true);
            sleep(Duration::from_secs(9)).await;
            answer.set_held(false);
        }
        // What the service takes its time for is not the client's fault.
        sleep(Duration::from_secs(60)).await;
        assert!(!stalled.is_finished());
        answer.set_held(true);
        stalled.await.unwrap();
        assert!((115..=120).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        drop(answer);
        assert!(activity.held().is_empty());
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
