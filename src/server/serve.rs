//! The service on a socket: connections, and the end of them.

use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::connections::{Accepting, Connections};
use super::grpc::grpc_router;
use super::router::{admin_router, public_router, router};
use super::state::AppState;
use crate::telemetry::{Port, events};

/// How long a client that has begun to connect may take to complete it as the service ends: a round trip, and what a busy
/// system adds.
const HANDSHAKE: Duration = Duration::from_millis(50);

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
    let port = |port, listener, app| Accepting::new(port, listener, app, state.config.max_connections);
    let app = if admin.is_some() { public_router(state.clone()) } else { router(state.clone()) };
    let mut http = port(Port::Http, http, app);
    let mut grpc = grpc.map(|listener| port(Port::Grpc, listener, grpc_router(state.clone())));
    let mut admin = admin.map(|listener| port(Port::Admin, listener, admin_router(state.clone())));
    let address = |port: &Option<Accepting>| port.as_ref().map(Accepting::address).transpose();
    let (http_address, grpc_address, admin_address) = (http.address()?, address(&grpc)?, address(&admin)?);
    let connections = Connections::new(&state);
    state.readiness().set_ready();
    events::ready(state.metrics(), http_address, grpc_address, admin_address);
    let start;
    let end;
    {
        let mut accepting = pin!(async {
            let accept = async |other: &mut Option<Accepting>| {
                if let Some(port) = other {
                    connections.accept(port).await;
                }
            };
            tokio::join!(connections.accept(&mut http), accept(&mut grpc), accept(&mut admin));
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
    let ports: Vec<_> = [Some(http), grpc, admin].into_iter().flatten().collect();
    ports.iter().for_each(Accepting::deafen);
    sleep_until(end.min(Instant::now() + HANDSHAKE)).await;
    ports.into_iter().for_each(|port| connections.accept_the_last(port));
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
