//! `niwaki serve`: models, their workers, and the service in front of them.

mod load;
mod selfcheck;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::args::ServeArgs;
use super::players;
use crate::server::{AppState, Listeners, ServerConfig, TlsFiles, serve, termination};
use crate::telemetry::{Metrics, TraceConfig, Tracer, events, process, subscriber};
use load::Models;

/// How long the last spans may take to reach their collector.
const TRACE_GRACE: Duration = Duration::from_secs(2);

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let format = if args.json_output { subscriber::LogFormat::Json } else { subscriber::LogFormat::Text };
    subscriber::init(format, std::env::var("LOG_LEVEL").ok().as_deref())?;
    let metrics = Metrics::new();
    let n_threads = players::n_threads(&args.model);
    metrics.set_threads(n_threads);
    // The computing threads do the work; the reactor only moves bytes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(n_threads.div_ceil(4))
        .thread_name("reactor")
        .enable_all()
        .build()
        .context("the async runtime")?;
    // Before the models: loading may take minutes, and the first process of a container has no handlers but its own.
    let (signals, loading) = {
        let _context = runtime.enter();
        Signals::register().context("signal handlers")?
    };
    let (models, parts) = Models::load(args, Arc::clone(&metrics))?;
    let state = AppState::new(server_config(args), parts, metrics)?;
    state.set_loader(Box::new(move |name| models.load_again(name).map_err(|error| format!("{error:#}"))));
    loading.store(false, Ordering::SeqCst);
    let worker_died = runtime.block_on(listen(args, state, signals))?;
    // Threads that wait for a client or a lock must not hold the process up.
    runtime.shutdown_timeout(Duration::from_millis(100));
    if worker_died {
        bail!("a worker thread died; the process ends so that its supervisor starts a whole one");
    }
    Ok(())
}

/// The signals that a server minds.
struct Signals {
    /// Cancelled by the first one that asks it to end.
    ended: CancellationToken,
    hangup: Signal,
}

impl Signals {
    /// In the context of a runtime. While what is returned beside them is true, a signal to end ends the process at once:
    /// nobody waits for an answer. One to read everything again is minded later.
    fn register() -> std::io::Result<(Self, Arc<AtomicBool>)> {
        let (hangup, terminated) = (signal(SignalKind::hangup())?, termination()?);
        let (ended, loading) = (CancellationToken::new(), Arc::new(AtomicBool::new(true)));
        let (told, is_loading) = (ended.clone(), Arc::clone(&loading));
        tokio::spawn(async move {
            terminated.await;
            if is_loading.load(Ordering::SeqCst) {
                events::stopped_while_loading();
                std::process::exit(0);
            }
            told.cancel();
        });
        Ok((Self { ended, hangup }, loading))
    }
}

/// Serves until a signal comes or a worker dies; tells whether one died.
async fn listen(args: &ServeArgs, state: AppState, signals: Signals) -> anyhow::Result<bool> {
    let Signals { ended, mut hangup } = signals;
    if let Some(endpoint) = &args.otlp_endpoint {
        let config = TraceConfig {
            endpoint: endpoint.clone(),
            service_name: args.otlp_service_name.clone(),
            sample_ratio: args.otlp_sample_ratio,
        };
        state.set_tracer(Tracer::start(&config, state.metrics())?);
    }
    let bind = async |port: u16| {
        let listener = crate::server::bind(&args.hostname, port).await;
        listener.with_context(|| format!("cannot listen on {}:{port}", args.hostname))
    };
    let http = bind(args.port).await?;
    let other = async |port: Option<u16>| match port {
        Some(port) => bind(port).await.map(Some),
        None => Ok(None),
    };
    let (grpc, admin) = (other(args.grpc_port).await?, other(args.prometheus_port).await?);
    let died = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&died);
    let watched = state.clone();
    let shutdown = async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = watched.died() => noted.store(true, Ordering::Relaxed),
        }
    };
    let (reloaded, ending) = (state.clone(), state.clone());
    let reloading = tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            // What was refused has been told in log and metrics, and the old keys, certificates and models go on serving.
            reloaded.reload(None).await.ok();
        }
    });
    serve(Listeners { http, grpc, admin }, state, shutdown, Duration::from_secs(args.shutdown_grace)).await?;
    reloading.abort();
    ending.close_tracer(TRACE_GRACE).await;
    Ok(died.load(Ordering::Relaxed))
}

fn timeout(args: &ServeArgs) -> Option<Duration> {
    (args.default_timeout_ms > 0).then(|| Duration::from_millis(args.default_timeout_ms))
}

fn files_allowed() -> usize {
    let n_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    n_files.map_or(usize::MAX, |n_files| usize::try_from(n_files).unwrap_or(usize::MAX))
}

/// Connections of each port: three quarters of the files that may be open, so that models, logs and downloads have theirs,
/// in equal parts, so that one port that is full leaves the others what is theirs.
fn default_connections(n_files: usize, n_ports: usize) -> usize {
    (n_files / 4 * 3 / n_ports).clamp(1, ServerConfig::default().max_connections)
}

/// Bytes for large bodies and answers: no more than a quarter of what the container has, as the model, the queue and what the
/// tokenizer makes of a text need the rest; but one body always.
fn body_bytes(most: usize, container: Option<u64>, payload_limit: usize) -> usize {
    let quarter = container.map_or(usize::MAX, |bytes| usize::try_from(bytes / 4).unwrap_or(usize::MAX));
    most.min(quarter).max(payload_limit)
}

fn server_config(args: &ServeArgs) -> ServerConfig {
    let defaults = ServerConfig::default();
    let n_threads = NonZeroUsize::new(players::n_threads(&args.model));
    let n_ports = 1 + usize::from(args.grpc_port.is_some()) + usize::from(args.prometheus_port.is_some());
    let n_connections = args.max_connections.map(NonZeroUsize::get);
    ServerConfig {
        api_keys: args.api_key.iter().cloned().collect(),
        api_key_file: args.api_key_file.clone(),
        tls: args.tls_cert.clone().zip(args.tls_key.clone()).map(|(cert, key)| TlsFiles { cert, key }),
        max_connections: n_connections.unwrap_or_else(|| default_connections(files_allowed(), n_ports)),
        max_head_bytes: args.max_header_size,
        cors_allow_origin: args.cors_allow_origin.clone(),
        payload_limit: args.payload_limit,
        max_body_bytes: body_bytes(defaults.max_body_bytes, process::memory_limit(), args.payload_limit),
        max_client_batch_size: args.max_client_batch_size,
        auto_truncate: args.auto_truncate,
        default_timeout: timeout(args),
        slow_request: (args.slow_request_ms > 0).then(|| Duration::from_millis(args.slow_request_ms)),
        tokenization_workers: args.tokenization_workers.or(n_threads).unwrap_or(NonZeroUsize::MIN),
        ..defaults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_bodies_leave_a_small_container_its_memory() {
        for (container, payload_limit, expected) in [
            (None, 2_000_000, 64_000_000),
            (Some(4_000_000_000), 2_000_000, 64_000_000),
            (Some(120_000_000), 2_000_000, 30_000_000),
            (Some(120_000_000), 50_000_000, 50_000_000),
            (None, 100_000_000, 100_000_000),
            (Some(1), 2_000_000, 2_000_000),
        ] {
            assert_eq!(body_bytes(64_000_000, container, payload_limit), expected, "{container:?} {payload_limit}");
        }
    }

    #[test]
    fn all_ports_together_leave_a_quarter_of_the_files() {
        for (n_files, n_ports, expected) in [
            (1024, 1, 768),
            (1024, 2, 384),
            (1024, 3, 256),
            (1_000_000, 3, 16_384),
            (usize::MAX, 3, 16_384),
            (20_000, 1, 15_000),
            (3, 3, 1),
        ] {
            assert_eq!(default_connections(n_files, n_ports), expected, "{n_files} files, {n_ports} ports");
        }
    }
}
