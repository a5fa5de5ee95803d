//! Connections from their acceptance to their end, within limits of number, size and time.
//!
//! | a client that | is given |
//! |---|---|
//! | does not finish its TLS handshake | `handshake_timeout` |
//! | does not send a head, or is idle | `head_timeout` |
//! | sends a larger head than `max_head_bytes` | 431 |
//! | does not send its body (`extract.rs`, `grpc/call.rs`) | `body_timeout` |
//! | does not take its answer | `body_timeout` without taking anything, and for a piece that and a second for each 4 KiB |
//! | is one too many | 429 for work, an answer to probes, and the end (HTTP/2: after `SPARE_TIMEOUT`) |

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::connection::{Activity, WriteTimeout, service};
use super::listen::deafen;
use super::state::AppState;
use crate::telemetry::{Dropped, Port, events};

/// Streams of an HTTP/2 connection at once; a client of more opens another connection.
const MAX_STREAMS: u32 = 256;

/// How often an HTTP/2 client is asked whether it is still there.
const HTTP2_PING: Duration = Duration::from_secs(30);

/// Connections beyond the limit that are still answered: probes as ever, work with a refusal.
const N_SPARE: usize = 64;

/// How long a connection beyond the limit may be idle, and one of HTTP/2 may last: its client would be refused on it for
/// ever, even when there is room again, and is told to connect anew. As long again it may take to end.
const SPARE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection that is told to end must have been at nothing before it is cut. One of HTTP/1 ends by itself after
/// its answer. On one of HTTP/2 the client is asked to end it and may have requests on the way until it has read that,
/// so that only one that does not answer is cut.
const QUIET_HTTP1: Duration = Duration::from_millis(20);
const QUIET_HTTP2: Duration = Duration::from_secs(2);

/// How long a connection that was accepted may still take to say something once the service has begun to close: its
/// client had connected before, and may have its request on the way.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A listener and what its connections enter by.
pub(super) struct Accepting {
    listener: TcpListener,
    door: Door,
}

/// What answers the connections of a port, and the room for them.
struct Door {
    port: Port,
    app: Router,
    room: Arc<Semaphore>,
    spare: Arc<Semaphore>,
}

impl Accepting {
    pub(super) fn new(port: Port, listener: TcpListener, app: Router, max_connections: usize) -> Self {
        let (room, spare) = (Arc::new(Semaphore::new(max_connections)), Arc::new(Semaphore::new(N_SPARE)));
        Self { listener, door: Door { port, app, room, spare } }
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Lets no other client begin to connect.
    pub(super) fn deafen(&self) {
        if let Err(error) = deafen(&self.listener) {
            debug!(%error, "a client that connects in the last moment may be cut off");
        }
    }
}

/// All connections of the service.
pub(super) struct Connections {
    tasks: TaskTracker,
    /// Finish the request at hand, take no other.
    closing: CancellationToken,
    /// Stop now.
    cut: CancellationToken,
    state: AppState,
}

impl Connections {
    pub(super) fn new(state: &AppState) -> Self {
        Self {
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            cut: CancellationToken::new(),
            state: state.clone(),
        }
    }

    /// Accepts connections for ever.
    pub(super) async fn accept(&self, port: &mut Accepting) {
        loop {
            match port.listener.accept().await {
                Ok((stream, _)) => self.admit(&port.door, stream),
                Err(error) if is_the_clients(&error) => debug!(%error, "connection lost before it was accepted"),
                Err(error) => {
                    // Mostly too many open files: more of the same would come at once, and closing some takes time.
                    warn!(%error, "cannot accept connections");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Accepts what the system holds for the listener, and closes it: to their clients these connections are
    /// established, and closing the listener alone would reset them.
    pub(super) fn accept_the_last(&self, port: Accepting) {
        let Accepting { listener, door } = port;
        let Ok(listener) = listener.into_std() else { return };
        loop {
            match listener.accept() {
                Ok((stream, _)) => match stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
                    Ok(stream) => self.admit(&door, stream),
                    Err(error) => debug!(%error, "connection lost as it was accepted"),
                },
                Err(error) if is_the_clients(&error) || error.kind() == io::ErrorKind::Interrupted => {}
                // Mostly that there are no more.
                Err(_) => return,
            }
        }
    }

    /// Serves a connection in a task of its own, if there is room for it.
    fn admit(&self, door: &Door, stream: TcpStream) {
        let metrics = &self.state.metrics;
        let (permit, crowded) = match Arc::clone(&door.room).try_acquire_owned() {
            Ok(permit) => (permit, false),
            Err(_) => match Arc::clone(&door.spare).try_acquire_owned() {
                Ok(permit) => (permit, true),
                Err(_) => return events::connection_dropped(metrics, Dropped::Limit),
            },
        };
        if crowded {
            events::connection_dropped(metrics, Dropped::Limit);
        }
        let open = metrics.connection(door.port);
        let connection = self.connection(crowded);
        let (app, cut) = (door.app.clone(), self.cut.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = connection.serve(stream, app) => {}
                () = cut.cancelled() => {}
            }
            drop((open, permit));
        });
    }

    fn connection(&self, crowded: bool) -> Connection {
        let config = &self.state.config;
        let head_timeout = if crowded { SPARE_TIMEOUT.min(config.head_timeout) } else { config.head_timeout };
        Connection {
            state: self.state.clone(),
            closing: self.closing.clone(),
            activity: Arc::default(),
            head_timeout,
            crowded,
        }
    }

    /// Lets connections finish what they are at, until `end`; returns how many had to be cut.
    pub(super) async fn close(&self, end: Instant) -> usize {
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

/// One connection.
struct Connection {
    state: AppState,
    closing: CancellationToken,
    activity: Arc<Activity>,
    head_timeout: Duration,
    crowded: bool,
}

impl Connection {
    async fn serve(self, stream: TcpStream, app: Router) {
        // Answers are written in one piece: waiting to fill a packet only delays them.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "cannot set TCP_NODELAY");
        }
        let closing = self.closing.clone();
        let mut begin = pin!(self.begin(stream));
        let begun = tokio::select! {
            biased;
            begun = begin.as_mut() => Some(begun),
            () = closing.cancelled() => timeout(LAST_WORDS, begin.as_mut()).await.ok(),
        };
        let Some(begun) = begun else { return };
        let result = match begun {
            Ok(Some(Begun::Plain(stream, version))) => self.speak(stream, version, app).await,
            Ok(Some(Begun::Secure(stream, version))) => self.speak(*stream, version, app).await,
            Ok(None) => return,
            Err(dropped) => Err(dropped),
        };
        if let Err(dropped) = result {
            events::connection_dropped(&self.state.metrics, dropped);
        }
    }

    /// Finds out what the client speaks; `None` if it leaves.
    async fn begin(&self, stream: TcpStream) -> Result<Option<Begun>, Dropped> {
        let limit = self.state.config.body_timeout;
        let watched = |stream| WriteTimeout::new(stream, limit, Arc::clone(&self.activity));
        let Some(tls) = &self.state.tls else {
            let version = timeout(self.head_timeout, version(&stream)).await.map_err(|_| Dropped::HeadTimeout)?;
            return Ok(version.ok().flatten().map(|version| Begun::Plain(watched(stream), version)));
        };
        let handshake = tls.acceptor().accept(watched(stream));
        let stream = match timeout(self.state.config.handshake_timeout, handshake).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                debug!(%error, "TLS handshake failed");
                return Err(Dropped::Handshake);
            }
            Err(_) => return Err(Dropped::Handshake),
        };
        let version = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Version::Http2,
            _ => Version::Http1,
        };
        Ok(Some(Begun::Secure(Box::new(stream), version)))
    }

    async fn speak<S>(&self, stream: S, version: Version, app: Router) -> Result<(), Dropped>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let activity = &self.activity;
        let config = &self.state.config;
        let service = service(app, Arc::clone(activity), self.crowded);
        let io = TokioIo::new(stream);
        /// Drives a connection to its end, its last request, or the end of the client's patience.
        macro_rules! drive {
            ($connection:expr, $idle:expr, $stalled:expr, $ended:expr) => {{
                let mut connection = pin!($connection);
                tokio::select! {
                    // First what the client has sent already: a request that is there is answered, whatever else is true.
                    biased;
                    result = connection.as_mut() => result.map_err(|error| self.reason(&error)),
                    () = $stalled => Err(Some(Dropped::SlowReader)),
                    () = async { tokio::select! { () = self.closing.cancelled() => {} () = $idle => {} } } => {
                        connection.as_mut().graceful_shutdown();
                        tokio::select! {
                            result = connection.as_mut() => result.map_err(|error| self.reason(&error)),
                            () = $stalled => Err(Some(Dropped::SlowReader)),
                            () = $ended => Ok(()),
                        }
                    }
                }
            }};
        }
        let stalled = || activity.stalled(config.body_timeout);
        let result = match version {
            Version::Http1 => {
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new())
                    .header_read_timeout(self.head_timeout)
                    .max_buf_size(config.max_head_bytes)
                    .keep_alive(!self.crowded);
                let connection = http.serve_connection(io, service);
                // Seen on the connection itself: hyper waits for heads.
                let ended = activity.ended(QUIET_HTTP1);
                drive!(connection, std::future::pending::<()>(), stalled(), ended)
            }
            Version::Http2 => {
                let mut http = http2::Builder::new(TokioExecutor::new());
                http.timer(TokioTimer::new())
                    .keep_alive_interval(HTTP2_PING)
                    .max_header_list_size(u32::try_from(config.max_head_bytes).unwrap_or(u32::MAX))
                    .max_concurrent_streams(MAX_STREAMS);
                let connection = http.serve_connection(io, service);
                let idle = async {
                    tokio::select! { () = activity.idle(self.head_timeout) => {} () = self.outstayed() => {} }
                };
                let ended = async {
                    tokio::select! { () = activity.ended(QUIET_HTTP2) => {} () = self.outstayed() => {} }
                };
                drive!(connection, idle, stalled(), ended)
            }
        };
        match result {
            Err(Some(dropped)) => Err(dropped),
            // The client left, or spoke no HTTP.
            Ok(()) | Err(None) => Ok(()),
        }
    }

    /// Resolves when a connection beyond the limit has had its time; never for one within it.
    async fn outstayed(&self) {
        if !self.crowded {
            std::future::pending::<()>().await;
        }
        sleep(self.head_timeout).await;
    }

    /// By which limit, if by any, a connection ended early.
    fn reason(&self, error: &hyper::Error) -> Option<Dropped> {
        debug!(%error, "connection ended early");
        if self.activity.was_given_up() {
            Some(Dropped::SlowReader)
        } else if error.is_parse_too_large() {
            Some(Dropped::HeadSize)
        } else if error.is_timeout() {
            Some(Dropped::HeadTimeout)
        } else {
            None
        }
    }
}

/// A connection whose client has said what it speaks.
enum Begun {
    Plain(WriteTimeout<TcpStream>, Version),
    Secure(Box<tokio_rustls::server::TlsStream<WriteTimeout<TcpStream>>>, Version),
}

#[derive(Clone, Copy)]
enum Version {
    Http1,
    Http2,
}

/// What a client that speaks HTTP/2 outright begins with.
const HTTP2_GREETING: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the first bytes say, without taking them; `None` if there are none.
async fn version(stream: &TcpStream) -> io::Result<Option<Version>> {
    let mut first = [0; HTTP2_GREETING.len()];
    loop {
        let n_bytes = stream.peek(&mut first).await?;
        return Ok(match &first[..n_bytes] {
            b"" => None,
            greeting if greeting == HTTP2_GREETING => Some(Version::Http2),
            // No request of HTTP/1 begins so; a client that sends its greeting in pieces is rare enough to ask again.
            // (It is waited for here, because nothing limits its time later.)
            part if part.starts_with(b"PRI") && HTTP2_GREETING.starts_with(part) => {
                sleep(Duration::from_millis(10)).await;
                continue;
            }
            _ => Some(Version::Http1),
        });
    }
}
