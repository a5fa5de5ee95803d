//! Small real models behind the whole service: deadlines, clients that leave, overload, fair shares, and the binary itself
//! with its signals.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod service;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use niwaki::checkpoint::Checkpoint;
use niwaki::compress::{CompressRequest, Recipe, Silent, compress};
use niwaki::engine::{Engine, EngineLimits, Sequence, Submission};
use niwaki::exec::Runtime;
use niwaki::exec::int8_build::{GROUP_TOKENS, Int8Model};
use niwaki::kernels::threads::Cores;
use niwaki::kernels::{Isa, KernelSet};
use niwaki::model::{Forward, Want};
use niwaki::server::{AppState, ModelParts, ServedModel, ServerConfig, Task, serve};
use niwaki::telemetry::{ExpiryStage, Metrics, RejectReason};
use niwaki::text::Tokenizer;
use serde_json::{Value, json};
use service::Client;
use service::process::Process;
use tokio::net::TcpListener;

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model)
}

/// A small BERT on one core, which the test can keep for itself.
struct Real {
    cores: Arc<Cores>,
    engine: Engine,
    metrics: Arc<Metrics>,
    address: SocketAddr,
}

fn engine_of(name: &str, dir: &Path, cores: &Arc<Cores>, limits: EngineLimits, metrics: &Arc<Metrics>) -> Engine {
    let kernels = KernelSet::new(Isa::detect());
    let model = Int8Model::load(&Arc::new(Checkpoint::open(dir).unwrap()), kernels).unwrap();
    let worker = model.worker(Arc::clone(cores), GROUP_TOKENS);
    let others: Vec<_> = (1..cores.n_cores()).map(|_| worker.another()).collect();
    let workers = others.into_iter().chain([worker]).map(|worker| Box::new(worker) as Box<dyn Forward>).collect();
    Engine::start_named(name, workers, limits, Arc::clone(metrics)).unwrap()
}

async fn real(limits: EngineLimits) -> Real {
    let checkpoint = Checkpoint::open(&golden("bert")).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_bytes(checkpoint.tokenizer_json()).unwrap());
    let metrics = Metrics::new();
    let cores = Arc::new(Cores::new(1).unwrap());
    let engine = engine_of("bert", &golden("bert"), &cores, limits, &metrics);
    let architecture = checkpoint.architecture();
    let model = ServedModel {
        model_id: "bert".to_owned(),
        model_sha: None,
        served_name: "bert".to_owned(),
        family: "bert".to_owned(),
        compression: "none".to_owned(),
        dtype: "int8".to_owned(),
        attention: "full".to_owned(),
        isa: Isa::detect().to_string(),
        task: Task::Embedding { pooling: architecture.pooling },
        d_model: architecture.d_model,
        vocab_size: architecture.vocab_size,
        n_token_types: architecture.n_token_types,
        max_input_tokens: architecture.max_input_tokens,
        file_bytes: checkpoint.weights_bytes(),
        prompts: BTreeMap::new(),
        default_prompt: None,
    };
    let parts = ModelParts { model, tokenizer, engine: engine.clone() };
    let state = AppState::new(ServerConfig::default(), vec![parts], Arc::clone(&metrics)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, state, std::future::pending(), Duration::from_secs(1)));
    Real { cores, engine, metrics, address }
}

fn request(text: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let body = json!({"inputs": text}).to_string();
    let headers = [&[("content-type", "application/json")], headers].concat();
    Client::request("POST", "/embed", &headers, body.as_bytes())
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_passes_before_compute_and_a_client_that_left_costs_none() {
    let real = real(EngineLimits::default()).await;
    let send = async |text: &str, headers: &[(&str, &str)]| {
        let mut client = Client::connect(real.address).await.unwrap();
        client.send(&request(text, headers)).await.unwrap();
        client
    };
    let seat = real.cores.enter();
    let mut running = send("the pine tree", &[]).await;
    until("the worker waits for the core", || real.engine.load().running_sequences == 1).await;
    let mut late = send("rain", &[("x-request-timeout-ms", "400")]).await;
    let left = send("stones and rain", &[]).await;
    until("both wait", || real.engine.load().queued_sequences == 2).await;
    let answer = late.answer().await.unwrap();
    assert_eq!((answer.status, answer.json()["error_type"].clone()), (504, json!("Timeout")));
    drop(left);
    until("it left the queue", || real.engine.load().queued_sequences == 0).await;
    drop(seat);
    assert_eq!(running.answer().await.unwrap().status, 200);
    real.engine.drained().await;
    assert_eq!(real.metrics.batches().1, 1, "only the first was computed");
    assert_eq!((real.metrics.expirations(ExpiryStage::Queue), real.metrics.cancellations()), (1, 1));
    assert_eq!(running.post("/embed", &json!({"inputs": "rain"})).await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_what_the_measured_rate_says() {
    let limits = EngineLimits { max_queue_tokens: 80, ..EngineLimits::default() };
    let real = real(limits).await;
    let mut client = Client::connect(real.address).await.unwrap();
    let text = "the pine tree in the garden and the rain on the stones of the evening";
    // A slow core: one batch that takes more than a second.
    let seat = real.cores.enter();
    client.send(&request(text, &[])).await.unwrap();
    until("the worker has it", || real.engine.load().running_sequences == 1).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    drop(seat);
    let answer = client.answer().await.unwrap();
    let n_tokens: usize = answer.header("x-compute-tokens").parse().unwrap();
    until("it has been counted", || real.engine.tokens_per_second().is_some()).await;
    let rate = real.engine.tokens_per_second().unwrap();
    assert!(rate < n_tokens as f64 / 1.2 + 1.0, "{rate} tokens/s of {n_tokens}");
    // Now fill the queue.
    let seat = real.cores.enter();
    let mut waiting = Vec::new();
    loop {
        let mut client = Client::connect(real.address).await.unwrap();
        client.send(&request(text, &[])).await.unwrap();
        let before = waiting.len();
        until("it is in or out", || {
            let load = real.engine.load();
            load.running_sequences + load.queued_sequences > before
                || real.metrics.rejections(RejectReason::Overload) > 0
        })
        .await;
        if real.metrics.rejections(RejectReason::Overload) > 0 {
            let refused = client.answer().await.unwrap();
            assert_eq!(refused.status, 429);
            let outstanding = (waiting.len() * n_tokens) as f64;
            let expected = (outstanding / rate).ceil().clamp(1.0, 30.0);
            let retry_after: f64 = refused.header("retry-after").parse().unwrap();
            assert!((retry_after - expected).abs() <= 1.0 && retry_after > 1.0, "{retry_after} for {expected}");
            break;
        }
        waiting.push(client);
    }
    drop(seat);
    for mut client in waiting {
        assert_eq!(client.answer().await.unwrap().status, 200);
    }
}

/// Two busy models on the same cores: neither starves the other.
#[tokio::test(flavor = "multi_thread")]
async fn models_share_the_cores_fairly() {
    let metrics = Metrics::new();
    let cores = Arc::new(Cores::new(2).unwrap());
    let engines =
        ["first", "second"].map(|name| engine_of(name, &golden("bert"), &cores, EngineLimits::default(), &metrics));
    let end = Instant::now() + Duration::from_millis(1500);
    let mut clients = Vec::new();
    for engine in &engines {
        for _ in 0..8 {
            let engine = engine.clone();
            clients.push(tokio::spawn(async move {
                while Instant::now() < end {
                    let sequences = vec![Sequence::new(vec![7; 20]); 16];
                    engine.submit(Submission { sequences, want: Want::Pooled, deadline: None }).await.unwrap();
                }
            }));
        }
    }
    for client in clients {
        client.await.unwrap();
    }
    let ((first, _), (second, _)) = (metrics.computed("first"), metrics.computed("second"));
    let ratio = first as f64 / second as f64;
    println!("sequences: {first} and {second}, ratio {ratio:.3}");
    assert!((0.5..2.0).contains(&ratio), "{first} and {second}");
}

#[test]
fn the_binary_serves_several_models_and_reloads_them_on_a_signal() {
    let parent = tempfile::tempdir().unwrap();
    let out = |name: &str| parent.path().join(name);
    let make = |model: &str, name: &str, force: bool| {
        let request = CompressRequest { force, ..CompressRequest::new(golden(model), out(name), Recipe::new(0)) };
        compress(&request, &Runtime::new(Isa::detect(), 1).unwrap(), &Silent).unwrap();
    };
    make("bert", "encoder", false);
    make("bert-classifier", "labels", false);
    let place = |name: &str| format!("{name}={}", out(name).display());
    let server = Process::start(&["--model", &place("encoder"), "--model", &place("labels"), "--api-key", "key"]);
    let embed = || server.ask("POST", "/embed", &json!({"inputs": "the pine tree"}));
    let (status, vector) = embed();
    assert_eq!(status, 200, "{vector}");
    let (status, labels) = server.ask("POST", "/predict?model=labels", &json!({"inputs": ["rain", "stones"]}));
    assert_eq!(status, 200, "{labels}");
    let labels: Vec<Value> = serde_json::from_str(&labels).unwrap();
    let sum: f64 = labels.iter().map(|label| label["score"].as_f64().unwrap()).sum();
    assert!(labels.len() == 3 && (sum - 1.0).abs() < 1e-5, "{labels:?}");
    assert!(server.metric("niwaki_selfcheck_cosine") > 0.99);
    // A damaged artefact is refused; the old one goes on.
    let weights = out("encoder").join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 8]).unwrap();
    server.signal("HUP");
    server.until_metric("niwaki_model_reloads_total{model=\"encoder\",result=\"refused\"}", 1.0);
    server.until_metric("niwaki_model_reloads_total{model=\"labels\",result=\"swapped\"}", 1.0);
    assert_eq!(embed(), (200, vector.clone()));
    let (status, reason) = server.ask("POST", "/admin/reload?model=encoder", &Value::Null);
    assert_eq!(status, 422);
    assert!(reason.contains("model.safetensors"), "{reason}");
    // A whole one is taken: the same weights, and so the same vector.
    make("bert", "encoder", true);
    server.signal("HUP");
    server.until_metric("niwaki_model_reloads_total{model=\"encoder\",result=\"swapped\"}", 1.0);
    assert_eq!(embed(), (200, vector));
    server.until_metric("niwaki_queue_capacity", 2.0 * 262_144.0);
    server.signal("TERM");
    let mut server = server;
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn a_band_at_serve_time_is_checked_by_what_fits_its_window() {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("encoder");
    let request = CompressRequest::new(golden("bert"), &out, Recipe::new(0));
    compress(&request, &Runtime::new(Isa::detect(), 1).unwrap(), &Silent).unwrap();
    let dir = out.display().to_string();
    // 20 tokens at most: all of them see each other.
    let server = Process::start(&["--model", &dir, "--attention", "window=32,globals=cls"]);
    assert!(server.metric("niwaki_selfcheck_cosine") > 0.99);
    // A window of one token: only the shortest inputs say something, and with another pooling none.
    let server = Process::start(&["--model", &dir, "--attention", "window=1", "--pooling", "cls"]);
    assert!(server.metric("niwaki_selfcheck_cosine").is_nan());
    // Damage shows through a band.
    let manifest = std::fs::read_to_string(out.join("niwaki.json")).unwrap();
    let mut manifest: Value = serde_json::from_str(&manifest).unwrap();
    for golden in manifest["golden"].as_array_mut().unwrap() {
        golden["reference"].as_array_mut().unwrap().reverse();
    }
    std::fs::write(out.join("niwaki.json"), manifest.to_string()).unwrap();
    let refused = Command::new(env!("CARGO_BIN_EXE_niwaki"))
        .args(["serve", "--port", "0", "--model", &dir, "--attention", "window=32"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("self-check"), "{refused:?}");
}
