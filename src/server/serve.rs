//! The service on a socket: connections, and the end of them.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::connection::{Activity, WriteTimeout, service};
use super::grpc::grpc_router;
use super::router::{admin_router, public_router, router};
use super::state::AppState;
use crate::telemetry::events;

/// Streams of an HTTP/2 connection at once; a client of more opens another connection.
const MAX_STREAMS: u32 = 256;

/// How often an HTTP/2 client is asked whether it is still there.
const HTTP2_PING: Duration = Duration::from_secs(30);

/// Where the service listens.
#[derive(Debug)]
pub struct Listeners {
    /// For HTTP with JSON.
    pub http: TcpListener,
    /// For gRPC.
    pub grpc: Option<TcpListener>,
    /// For metrics and administration, which `http` then does not have.
    pub admin: Option<TcpListener>,
}

impl From<TcpListener> for Listeners {
    fn from(http: TcpListener) -> Self {
        Self { http, grpc: None, admin: None }
    }
}

/// Serves until `shutdown` resolves, then drains: readiness is 503 from then on, new work is refused, and what was
/// accepted is finished, all within `grace`. New connections are accepted to the last, so that probes and clients get
/// an answer instead of a refused connection.
///
/// # Errors
/// If the listener has no address.
pub async fn serve(
    listeners: impl Into<Listeners>,
    state: AppState,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) -> io::Result<()> {
    let Listeners { http, grpc, admin } = listeners.into();
    let grpc = match grpc {
        Some(listener) => Some((listener.local_addr()?, grpc_router(state.clone()), listener)),
        None => None,
    };
    let admin = match admin {
        Some(listener) => Some((listener.local_addr()?, admin_router(state.clone()), listener)),
        None => None,
    };
    let address = http.local_addr()?;
    let connections = Connections::new(&state);
    state.readiness().set_ready();
    let other = |port: &Option<(SocketAddr, Router, TcpListener)>| port.as_ref().map(|(address, ..)| *address);
    events::ready(state.metrics(), address, other(&grpc), other(&admin));
    let start;
    let end;
    {
        let app = if admin.is_some() { public_router(state.clone()) } else { router(state.clone()) };
        let mut accepting = pin!(async {
            let accept = async |port: &Option<(SocketAddr, Router, TcpListener)>| {
                if let Some((_, app, listener)) = port {
                    connections.accept(listener, app).await;
                }
            };
            tokio::join!(connections.accept(&http, &app), accept(&grpc), accept(&admin));
        });
        tokio::select! {
            () = accepting.as_mut() => {}
            () = shutdown => {}
        }
        start = Instant::now();
        // A grace beyond the clock's range is a year.
        end = start.checked_add(grace).unwrap_or_else(|| start + Duration::from_secs(86_400 * 365));
        state.readiness().set_draining();
        events::draining(state.metrics(), grace);
        tokio::select! {
            () = accepting => {}
            () = state.work.ended() => {}
            () = sleep_until(end) => {}
        }
    }
    drop((http, grpc, admin));
    // All that was accepted has been handed in by now, or has run out of time.
    let models = state.models.all();
    models.iter().for_each(|model| model.engine.close());
    let n_cut = connections.close(end).await;
    // What is left is computed for nobody; a worker in the middle of a batch is not waited for beyond the grace.
    for model in &models {
        timeout_at(end, model.engine.drained()).await.ok();
    }
    events::drained(n_cut, start.elapsed());
    Ok(())
}

struct Connections {
    tasks: TaskTracker,
    /// Finish the request at hand, take no other.
    closing: CancellationToken,
    /// Stop now.
    cut: CancellationToken,
    head_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    write_timeout: Duration,
}

impl Connections {
    fn new(state: &AppState) -> Self {
        Self {
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            cut: CancellationToken::new(),
            head_timeout: state.config.head_timeout,
            write_timeout: state.config.body_timeout,
        }
    }

    /// Accepts connections for ever.
    async fn accept(&self, listener: &TcpListener, app: &Router) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.spawn(stream, app.clone()),
                Err(error) if is_the_clients(&error) => debug!(%error, "connection lost before it was accepted"),
                Err(error) => {
                    // Mostly too many open files: more of the same would come at once, and closing some takes time.
                    warn!(%error, "cannot accept connections");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, app: Router) {
        // Answers are written in one piece: waiting to fill a packet only delays them.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "cannot set TCP_NODELAY");
        }
        let activity = Arc::new(Activity::default());
        let service = service(app, Arc::clone(&activity));
        let (closing, cut) = (self.closing.clone(), self.cut.clone());
        let (head_timeout, write_timeout) = (self.head_timeout, self.write_timeout);
        /// Drives `connection` to its end, its last request, or the cut.
        macro_rules! drive {
            ($connection:expr) => {{
                let mut connection = pin!($connection);
                tokio::select! {
                    result = connection.as_mut() => result,
                    () = closing.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        tokio::select! {
                            result = connection.as_mut() => result,
                            () = activity.ended() => Ok(()),
                        }
                    }
                }
            }};
        }
        self.tasks.spawn(async move {
            let serving = async {
                let version = tokio::select! {
                    version = timeout(head_timeout, protocol(&stream)) => version,
                    () = closing.cancelled() => return,
                };
                let Ok(Ok(Some(version))) = version else { return };
                let io = TokioIo::new(WriteTimeout::new(stream, write_timeout, Arc::clone(&activity)));
                let result = match version {
                    Protocol::Http1 => {
                        let mut http = http1::Builder::new();
                        http.timer(TokioTimer::new()).header_read_timeout(head_timeout);
                        drive!(http.serve_connection(io, service))
                    }
                    Protocol::Http2 => {
                        let mut http = http2::Builder::new(TokioExecutor::new());
                        http.timer(TokioTimer::new())
                            .keep_alive_interval(HTTP2_PING)
                            .max_concurrent_streams(MAX_STREAMS);
                        drive!(http.serve_connection(io, service))
                    }
                };
                if let Err(error) = result {
                    debug!(%error, "connection ended early");
                }
            };
            tokio::select! {
                () = serving => {}
                () = cut.cancelled() => {}
            }
        });
    }

    /// Lets connections finish what they are at, until `end`; returns how many had to be cut.
    async fn close(&self, end: Instant) -> usize {
        self.closing.cancel();
        self.tasks.close();
        if timeout_at(end, self.tasks.wait()).await.is_ok() {
            return 0;
        }
        let n_cut = self.tasks.len();
        self.cut.cancel();
        self.tasks.wait().await;
        n_cut
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

enum Protocol {
    Http1,
    Http2,
}

/// What a client that speaks HTTP/2 outright begins with.
const HTTP2_GREETING: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the first bytes say, without taking them; `None` if there are none.
async fn protocol(stream: &TcpStream) -> io::Result<Option<Protocol>> {
    let mut first = [0; HTTP2_GREETING.len()];
    loop {
        let n_bytes = stream.peek(&mut first).await?;
        return Ok(match &first[..n_bytes] {
            b"" => None,
            greeting if greeting == HTTP2_GREETING => Some(Protocol::Http2),
            // No request of HTTP/1 begins so; a client that sends its greeting in pieces is rare enough to ask again.
            // (It is waited for here, because nothing limits its time later.)
            part if part.starts_with(b"PRI") && HTTP2_GREETING.starts_with(part) => {
                sleep(Duration::from_millis(10)).await;
                continue;
            }
            _ => Some(Protocol::Http1),
        });
    }
}
