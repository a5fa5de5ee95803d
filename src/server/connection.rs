//! A connection's stream and service, watched: what is it at, and does its client take what is sent?

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::{Service as _, service_fn};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// What a connection is at.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests whose answer has not been handed to the connection in full.
    n_requests: AtomicUsize,
    /// Whether bytes wait for the client to take them.
    writing: AtomicBool,
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
}

struct Active(Arc<Activity>);

impl Active {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.n_requests.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(activity))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.n_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body that keeps its request active.
pub(crate) struct ActiveBody {
    body: Body,
    _active: Active,
}

impl hyper::body::Body for ActiveBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The router as a service of one connection.
pub(crate) fn service(
    app: Router,
    activity: Arc<Activity>,
) -> impl hyper::service::HttpService<
    Incoming,
    ResBody = ActiveBody,
    Error = Infallible,
    Future: Future<Output = Result<Response<ActiveBody>, Infallible>> + Send,
> {
    let app = TowerToHyperService::new(app);
    service_fn(move |request: Request<Incoming>| {
        let active = Active::new(&activity);
        let answering = app.call(request);
        async move { Ok(answering.await?.map(|body| ActiveBody { body, _active: active })) }
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
