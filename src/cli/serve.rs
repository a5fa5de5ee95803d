//! `niwaki serve`: a model, its workers, and the service in front of them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::args::{ModelArgs, Precision, ServeArgs};
use super::players::Loaded;
use super::{model, players};
use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, EngineLimits};
use crate::model::{Architecture, Forward, Outputs, RaggedBatch, Want};
use crate::server::{AppState, ServedModel, ServerConfig, serve, termination};
use crate::telemetry::{MemoryKind, Metrics, ModelInfo, events, subscriber};
use crate::text::Tokenizer;

/// How far the answer to a golden input may be from the one measured when the artefact was made: other instruction
/// sets round other last bits, anything beyond is damage.
const SELF_CHECK_SLACK: f64 = 0.005;

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let format = if args.json_output { subscriber::LogFormat::Json } else { subscriber::LogFormat::Text };
    subscriber::init(format, std::env::var("LOG_LEVEL").ok().as_deref())?;
    let started = Instant::now();
    let metrics = Metrics::new();
    let checkpoint = model::open(&args.model)?;
    let tokenizer = Arc::new(Tokenizer::from_bytes(checkpoint.tokenizer_json()).context("tokenizer.json")?);
    let n_threads = players::n_threads(&args.model);
    let mut loaded = players::load(&checkpoint, &args.model, n_threads)?;
    self_check(&checkpoint, &args.model, &mut *loaded.workers[0], &metrics)?;
    checkpoint.release_pages();

    let config = server_config(args, &checkpoint, &loaded)?;
    report_model(&metrics, &config.model, &checkpoint, &loaded, started);
    let engine = Engine::start(loaded.workers, engine_limits(args, checkpoint.architecture()), Arc::clone(&metrics))?;
    let state = AppState::new(config, tokenizer, engine.clone(), metrics)?;

    // The computing threads do the work; the reactor only moves bytes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(n_threads.div_ceil(4))
        .thread_name("reactor")
        .enable_all()
        .build()
        .context("the async runtime")?;
    let worker_died = runtime.block_on(listen(args, state, engine))?;
    // Threads that wait for a client or a lock must not hold the process up.
    runtime.shutdown_timeout(Duration::from_millis(100));
    if worker_died {
        bail!("a worker thread died; the process ends so that its supervisor starts a whole one");
    }
    Ok(())
}

/// Serves until a signal comes or a worker dies; tells whether one died.
async fn listen(args: &ServeArgs, state: AppState, engine: Engine) -> anyhow::Result<bool> {
    let signal = termination().context("signal handlers")?;
    let address = (args.hostname.as_str(), args.port);
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", args.hostname, args.port))?;
    let died = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&died);
    let shutdown = async move {
        tokio::select! {
            () = signal => {}
            () = engine.died() => noted.store(true, Ordering::Relaxed),
        }
    };
    serve(listener, state, shutdown, Duration::from_secs(args.shutdown_grace)).await?;
    Ok(died.load(Ordering::Relaxed))
}

fn engine_limits(args: &ServeArgs, architecture: &Architecture) -> EngineLimits {
    let defaults = EngineLimits::default();
    EngineLimits {
        // A text that the model takes must fit a batch, unless a flag says that batches are smaller.
        max_batch_tokens: args.max_batch_tokens,
        max_batch_requests: args.max_batch_requests,
        max_concurrent_requests: args.max_concurrent_requests,
        max_queue_tokens: args.max_queue_tokens.max(architecture.max_input_tokens.min(args.max_batch_tokens)),
        default_timeout: timeout(args),
        ..defaults
    }
}

fn timeout(args: &ServeArgs) -> Option<Duration> {
    (args.default_timeout_ms > 0).then(|| Duration::from_millis(args.default_timeout_ms))
}

fn server_config(args: &ServeArgs, checkpoint: &Checkpoint, loaded: &Loaded) -> anyhow::Result<ServerConfig> {
    let prompts = prompts(checkpoint)?;
    let default_prompt = match (&args.default_prompt_name, &args.default_prompt) {
        (Some(name), _) => match prompts.get(name) {
            Some(prompt) => Some(prompt.clone()),
            None => bail!("--default-prompt-name: the model has no prompt `{name}`"),
        },
        (None, prompt) => prompt.clone(),
    };
    let mut config = ServerConfig::new(served_model(args, checkpoint, loaded));
    config.api_keys = args.api_key.iter().cloned().collect();
    config.cors_allow_origin.clone_from(&args.cors_allow_origin);
    config.payload_limit = args.payload_limit;
    config.max_body_bytes = config.max_body_bytes.max(args.payload_limit);
    config.max_client_batch_size = args.max_client_batch_size;
    config.auto_truncate = args.auto_truncate;
    config.default_timeout = timeout(args);
    config.prompts = prompts;
    config.default_prompt = default_prompt;
    config.tokenization_workers =
        args.tokenization_workers.or_else(|| NonZeroUsize::new(loaded.n_threads)).unwrap_or(NonZeroUsize::MIN);
    Ok(config)
}

fn served_model(args: &ServeArgs, checkpoint: &Checkpoint, loaded: &Loaded) -> ServedModel {
    let architecture = checkpoint.architecture();
    let model_id = match (&args.model.model, &args.model.model_id) {
        (Some(dir), _) => dir.display().to_string(),
        (None, Some(id)) => id.clone(),
        (None, None) => checkpoint.name().to_owned(),
    };
    let compression = match checkpoint.manifest() {
        Some(manifest) => {
            manifest.schemes.iter().map(|(group, scheme)| format!("{group}: {scheme}")).collect::<Vec<_>>()
        }
        None => Vec::new(),
    };
    let band = architecture.layers[0].band;
    let full = architecture.layers.iter().all(|layer| layer.band.is_full_for(architecture.max_input_tokens));
    ServedModel {
        served_name: args
            .served_model_name
            .clone()
            .or_else(|| args.model.model_id.clone())
            .unwrap_or_else(|| checkpoint.name().to_owned()),
        model_sha: checkpoint.manifest().and_then(|manifest| manifest.files.get("model.safetensors").cloned()),
        model_id,
        family: format!("{:?}", architecture.family).to_lowercase(),
        compression: if compression.is_empty() { "none".to_owned() } else { compression.join(", ") },
        dtype: match args.model.precision {
            Precision::Int8 => "int8".to_owned(),
            Precision::F32 => "float32".to_owned(),
        },
        attention: if full { "full".to_owned() } else { band.to_string() },
        isa: loaded.isa.clone(),
        pooling: architecture.pooling,
        d_model: architecture.d_model,
        vocab_size: architecture.vocab_size,
        max_input_tokens: architecture.max_input_tokens,
    }
}

/// `prompts` of `config_sentence_transformers.json`.
fn prompts(checkpoint: &Checkpoint) -> anyhow::Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize, Default)]
    struct SentenceConfig {
        #[serde(default)]
        prompts: BTreeMap<String, String>,
    }
    const FILE: &str = "config_sentence_transformers.json";
    let Some(dir) = checkpoint.dir() else { return Ok(BTreeMap::new()) };
    match std::fs::read(dir.join(FILE)) {
        Ok(bytes) => Ok(serde_json::from_slice::<SentenceConfig>(&bytes).context(FILE)?.prompts),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error).context(FILE),
    }
}

/// Plays the artefact's golden inputs and compares with the uncompressed model's answers.
fn self_check(
    checkpoint: &Checkpoint,
    args: &ModelArgs,
    worker: &mut dyn Forward,
    metrics: &Metrics,
) -> anyhow::Result<()> {
    let golden = checkpoint.manifest().map(|manifest| manifest.golden.as_slice()).unwrap_or_default();
    // Overrides change what the model computes, so the recorded answers say nothing.
    let overridden = args.attention.is_some() || args.pooling.is_some();
    let limit = checkpoint.architecture().max_input_tokens;
    let mut checked: Option<(f64, f64, f64)> = None;
    let mut out = Outputs::default();
    for (index, golden) in golden.iter().enumerate().filter(|(_, golden)| !overridden && golden.ids.len() <= limit) {
        let batch = RaggedBatch::from_sequences(&[&golden.ids])?;
        worker.forward(&batch, Want::Pooled, &mut out)?;
        let cosine = cosine(&out.pooled, &golden.reference);
        let bound = golden.cosine - SELF_CHECK_SLACK;
        // A NaN must not pass.
        if cosine.is_nan() || cosine < bound {
            bail!("self-check: golden input {index} has cosine {cosine:.5} to its reference, less than {bound:.5}");
        }
        let fall = golden.cosine - cosine;
        let (worst, promised, drift) = checked.unwrap_or((cosine, bound, fall));
        checked = Some((worst.min(cosine), promised.min(bound), drift.max(fall)));
    }
    // Without golden inputs nothing was checked, and the metric stays NaN.
    if let Some((worst, promised, drift)) = checked {
        events::self_checked(metrics, worst, promised, drift);
    }
    Ok(())
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn report_model(metrics: &Metrics, served: &ServedModel, checkpoint: &Checkpoint, loaded: &Loaded, started: Instant) {
    metrics.set_build_info(env!("CARGO_PKG_VERSION"), &loaded.isa);
    metrics.set_threads(loaded.n_threads);
    metrics.set_memory(MemoryKind::ModelFile, checkpoint.weights_bytes());
    let info = ModelInfo {
        model: served.served_name.clone(),
        family: served.family.clone(),
        scheme: served.compression.clone(),
        precision: served.dtype.clone(),
        attention: served.attention.clone(),
    };
    events::model_loaded(metrics, &info, started.elapsed());
}
