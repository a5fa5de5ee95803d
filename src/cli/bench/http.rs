//! Load on a running server: closed loop (each client waits for its answer) or open loop (requests arrive at a rate).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::super::args::BenchArgs;
use super::super::output::print;
use super::{input, percentile};

/// Where requests go, and what they say.
struct Target {
    authority: String,
    path: String,
    bodies: Vec<Bytes>,
    next: AtomicUsize,
    api_key: Option<String>,
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    /// Seconds of each answered request that counts.
    latencies: Vec<f64>,
    statuses: BTreeMap<String, usize>,
}

/// The part of the run that counts.
#[derive(Clone, Copy)]
struct Window {
    from: Instant,
    to: Instant,
}

pub(super) fn run(url: &str, args: &BenchArgs) -> anyhow::Result<()> {
    if !(args.seconds > 0.0 && args.seconds <= 86_400.0) {
        bail!("--seconds {}: not in 0..=86400", args.seconds);
    }
    if args.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e6)) {
        bail!("--rate {}: not in 0..=1000000", args.rate.unwrap_or_default());
    }
    let uri: Uri = url.parse().with_context(|| format!("--http {url}"))?;
    let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        bail!("--http {url}: not of the form http://host:port");
    };
    let port = authority.port_u16().unwrap_or(80);
    let body = |input: &input::Input| json!({"inputs": input.to_json()}).to_string().into();
    let bodies = input::inputs(args, input::COMMON_IDS)?.iter().map(body).collect();
    let target = Arc::new(Target {
        authority: format!("{}:{port}", authority.host()),
        path: args.route.clone(),
        bodies,
        next: AtomicUsize::new(0),
        api_key: std::env::var("API_KEY").ok(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the async runtime")?;
    let report = runtime.block_on(measure(&target, args))?;
    Ok(print(|out| if args.json { writeln!(out, "{report}") } else { write_table(&report, out) })?)
}

async fn measure(target: &Arc<Target>, args: &BenchArgs) -> anyhow::Result<Value> {
    // One request first: a wrong address should say so once, not 64 times.
    let mut first = connect(target).await.with_context(|| format!("no connection to {}", target.authority))?;
    send(target, &mut first).await.with_context(|| format!("no answer from {}", target.authority))?;
    let begin = Instant::now();
    let from = begin + Duration::from_secs_f64(args.seconds / 5.0);
    let window = Window { from, to: from + Duration::from_secs_f64(args.seconds) };
    let seen = match args.rate {
        None => closed(target, args.clients.get(), window).await?,
        Some(rate) => open(target, args.clients.get(), rate, begin, window).await?,
    };
    let Seen { mut latencies, statuses } = seen;
    latencies.sort_by(f64::total_cmp);
    let ok = statuses.get("200").copied().unwrap_or(0);
    let total: usize = statuses.values().sum();
    let latency = match latencies.as_slice() {
        [] => Value::Null,
        sorted => {
            let ms = |share| percentile(sorted, share) * 1e3;
            json!({"p50": ms(0.5), "p90": ms(0.9), "p95": ms(0.95), "p99": ms(0.99), "max": ms(1.0)})
        }
    };
    Ok(json!({
        "url": format!("http://{}{}", target.authority, target.path),
        "clients": args.clients.get(),
        "offered_per_s": args.rate,
        "seconds": args.seconds,
        "requests": total,
        "answered_200": ok,
        "requests_per_s": ok as f64 / args.seconds,
        "statuses": statuses,
        "latency_ms": latency,
        "server": server_memory(target).await,
    }))
}

/// Each client sends as soon as it has its answer.
async fn closed(target: &Arc<Target>, n_clients: usize, window: Window) -> anyhow::Result<Seen> {
    let clients = (0..n_clients).map(|_| {
        let target = Arc::clone(target);
        tokio::spawn(async move {
            let mut seen = Seen::default();
            let mut connection = None;
            while Instant::now() < window.to {
                let started = Instant::now();
                let status = exchange(&target, &mut connection).await;
                seen.note(&status, started, Instant::now(), window);
            }
            seen
        })
    });
    let mut all = Seen::default();
    for client in clients.collect::<Vec<_>>() {
        all.merge(client.await.context("a client failed")?);
    }
    Ok(all)
}

/// Requests fall due at a steady rate; each is sent by a free client and its latency counts from when it was due, so that
/// waiting for a client is part of it.
async fn open(
    target: &Arc<Target>,
    n_clients: usize,
    rate: f64,
    begin: Instant,
    window: Window,
) -> anyhow::Result<Seen> {
    let due = Arc::new(AtomicUsize::new(0));
    let clients = (0..n_clients).map(|_| {
        let (target, due) = (Arc::clone(target), Arc::clone(&due));
        tokio::spawn(async move {
            let mut seen = Seen::default();
            let mut connection = None;
            loop {
                let at = begin + Duration::from_secs_f64(due.fetch_add(1, Ordering::Relaxed) as f64 / rate);
                if at >= window.to {
                    return seen;
                }
                tokio::time::sleep_until(at.into()).await;
                let status = exchange(&target, &mut connection).await;
                seen.note(&status, at, Instant::now(), window);
            }
        })
    });
    let mut all = Seen::default();
    for client in clients.collect::<Vec<_>>() {
        all.merge(client.await.context("a client failed")?);
    }
    Ok(all)
}

impl Seen {
    /// Counts a request that was due inside the window.
    fn note(&mut self, status: &str, due: Instant, answered: Instant, window: Window) {
        if due < window.from || due >= window.to {
            return;
        }
        *self.statuses.entry(status.to_owned()).or_default() += 1;
        if status == "200" {
            self.latencies.push(answered.duration_since(due).as_secs_f64());
        }
    }

    fn merge(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
    }
}

type Connection = SendRequest<Full<Bytes>>;

async fn connect(target: &Target) -> anyhow::Result<Connection> {
    let stream = TcpStream::connect(&target.authority).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with its sender; what went wrong shows in the exchange.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// One request and its whole answer; the status, or `error` if there was none. A broken connection is replaced.
async fn exchange(target: &Target, connection: &mut Option<Connection>) -> String {
    let mut sender = match connection.take() {
        Some(sender) if !sender.is_closed() => sender,
        _ => match connect(target).await {
            Ok(sender) => sender,
            Err(_) => {
                // A refused connection must not become a busy loop.
                tokio::time::sleep(Duration::from_millis(10)).await;
                return "error".to_owned();
            }
        },
    };
    match send(target, &mut sender).await {
        Ok(status) => {
            *connection = Some(sender);
            status
        }
        Err(_) => "error".to_owned(),
    }
}

async fn send(target: &Target, sender: &mut Connection) -> anyhow::Result<String> {
    let body = &target.bodies[target.next.fetch_add(1, Ordering::Relaxed) % target.bodies.len()];
    let mut request =
        Request::post(&target.path).header("host", &target.authority).header("content-type", "application/json");
    if let Some(key) = &target.api_key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    sender.ready().await?;
    let response = sender.send_request(request.body(Full::new(body.clone()))?).await?;
    let status = response.status().as_u16().to_string();
    response.into_body().collect().await?;
    Ok(status)
}

/// Resident memory as the server reports it, where it does.
async fn server_memory(target: &Target) -> Value {
    let read = async {
        let mut sender = connect(target).await?;
        let request = Request::get("/metrics").header("host", &target.authority).body(Full::default())?;
        let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
        anyhow::Ok(String::from_utf8_lossy(&body).into_owned())
    };
    let text = read.await.unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    json!({"resident_bytes": value("process_resident_memory_bytes")})
}

fn write_table(report: &Value, out: &mut dyn Write) -> io::Result<()> {
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap_or_default();
    match report["offered_per_s"].as_f64() {
        Some(rate) => writeln!(out, "{}: {rate} requests/s offered", report["url"].as_str().unwrap_or_default())?,
        None => writeln!(out, "{}: {} clients", report["url"].as_str().unwrap_or_default(), report["clients"])?,
    }
    writeln!(out, "answered       {:.1} requests/s over {} s", number("/requests_per_s"), report["seconds"])?;
    if !report["latency_ms"].is_null() {
        writeln!(
            out,
            "latency        p50 {:.2} ms   p90 {:.2}   p95 {:.2}   p99 {:.2}   max {:.2}",
            number("/latency_ms/p50"),
            number("/latency_ms/p90"),
            number("/latency_ms/p95"),
            number("/latency_ms/p99"),
            number("/latency_ms/max")
        )?;
    }
    writeln!(out, "statuses       {}", report["statuses"])?;
    if let Some(bytes) = report.pointer("/server/resident_bytes").and_then(Value::as_f64) {
        writeln!(out, "server memory  {:.1} MB resident", bytes / 1e6)?;
    }
    Ok(())
}
