//! What the handlers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::http::HeaderValue;
use subtle::ConstantTimeEq;
use tokio::sync::{Notify, Semaphore};

use super::api;
use super::config::{ConfigError, ServerConfig};
use crate::engine::Engine;
use crate::model::Pooling;
use crate::telemetry::{MemoryKind, Metrics};
use crate::text::{Pool, Tokenizer};

/// Where the service is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not yet ready.
    Loading,
    /// Takes requests.
    Ready,
    /// Finishes what it has.
    Draining,
}

/// A latch: loading, ready, draining, never back.
#[derive(Debug)]
pub struct Readiness(AtomicU8);

impl Readiness {
    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.0.load(Ordering::SeqCst) {
            0 => Phase::Loading,
            1 => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// Takes requests from now on, unless draining.
    pub fn set_ready(&self) {
        self.0.fetch_max(1, Ordering::SeqCst);
    }

    /// Takes no requests any more.
    pub fn set_draining(&self) {
        self.0.store(2, Ordering::SeqCst);
    }
}

/// Requests whose answer is being made, so that a drain can wait for them.
///
/// A request is counted *before* the phase is looked at, and a drain changes the phase *before* it looks at the count:
/// in the one order of all these operations either the request sees the drain, or the drain sees the request.
#[derive(Debug, Default)]
pub(crate) struct Work {
    n_requests: AtomicUsize,
    ended: Notify,
}

impl Work {
    pub(crate) fn begin(self: &Arc<Self>) -> WorkGuard {
        self.n_requests.fetch_add(1, Ordering::SeqCst);
        WorkGuard(Arc::clone(self))
    }

    pub(crate) fn count(&self) -> usize {
        self.n_requests.load(Ordering::SeqCst)
    }

    /// Resolves when no request is being answered.
    pub(crate) async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before looking, so that the last end cannot be missed.
            ended.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            ended.await;
        }
    }
}

#[derive(Debug)]
pub(crate) struct WorkGuard(Arc<Work>);

impl Drop for WorkGuard {
    fn drop(&mut self) {
        if self.0.n_requests.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

/// What the handlers share; clones are handles to the same.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Shared>);

/// What an [`AppState`] leads to; its fields are the server's own.
#[derive(Debug)]
pub struct Shared {
    pub(crate) config: ServerConfig,
    pub(crate) pool: Pool,
    pub(crate) engine: Engine,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) readiness: Readiness,
    pub(crate) work: Arc<Work>,
    /// In KiB, of bodies over the small size.
    pub(crate) body_memory: Arc<Semaphore>,
    /// Longest input: the model's, but no longer than a batch.
    pub(crate) max_input_tokens: usize,
    /// Token ids from here on are refused.
    pub(crate) vocab_size: usize,
    pub(crate) cors_origins: Vec<HeaderValue>,
    /// `/info` and `/v1/models…`, written once.
    pub(crate) info: Bytes,
    pub(crate) models: Bytes,
    pub(crate) model: Bytes,
    /// The served name as a JSON string.
    pub(crate) served_name_json: String,
}

impl std::ops::Deref for AppState {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

fn pooling_name(pooling: Pooling) -> &'static str {
    match pooling {
        Pooling::Cls => "cls",
        Pooling::Mean => "mean",
        Pooling::Max => "max",
        Pooling::LastToken => "last_token",
        Pooling::MeanSqrtLen => "mean_sqrt_len",
    }
}

fn json(value: &impl serde::Serialize) -> Bytes {
    serde_json::to_vec(value).expect("a struct of strings and numbers is always JSON").into()
}

impl AppState {
    /// Checks the settings, starts the tokenizer's threads. The service is *loading* until
    /// [`Readiness::set_ready`], which [`super::serve()`] calls.
    ///
    /// # Errors
    /// [`ConfigError`] naming the setting that cannot be.
    pub fn new(
        config: ServerConfig,
        tokenizer: Arc<Tokenizer>,
        engine: Engine,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ConfigError> {
        let limits = engine.limits();
        let model = &config.model;
        for (name, got, least, most) in [
            ("payload_limit", config.payload_limit, 1, u32::MAX as usize),
            ("max_client_batch_size", config.max_client_batch_size, 1, api::MAX_ITEMS),
            ("max_input_tokens", model.max_input_tokens, tokenizer.n_special() + 1, usize::MAX),
            ("max_body_bytes", config.max_body_bytes, config.payload_limit, u32::MAX as usize),
        ] {
            if !(least..=most).contains(&got) {
                return Err(ConfigError::Range { name, got, least, most });
            }
        }
        if config.api_keys.iter().any(|key| key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(ConfigError::Key);
        }
        let origin = |origin: &String| {
            let header = HeaderValue::from_str(origin).ok().filter(|_| origin == "*" || origin.contains("://"));
            header.ok_or_else(|| ConfigError::Origin { origin: origin.clone() })
        };
        let any = config.cors_allow_origin.iter().any(|origin| origin == "*");
        let cors_origins: Vec<HeaderValue> = config.cors_allow_origin.iter().map(origin).collect::<Result<_, _>>()?;
        let cors_origins = if any { Vec::new() } else { cors_origins };
        let (max_input_tokens, max_batch_tokens) = (model.max_input_tokens, limits.max_batch_tokens);
        if max_input_tokens > max_batch_tokens && !config.auto_truncate {
            return Err(ConfigError::Batch { max_input_tokens, max_batch_tokens });
        }
        let max_input_tokens = max_input_tokens.min(max_batch_tokens);
        let info = api::Info {
            model_id: model.model_id.clone(),
            model_sha: model.model_sha.clone(),
            model_dtype: model.dtype.clone(),
            served_model_name: model.served_name.clone(),
            model_type: api::ModelType::Embedding { pooling: pooling_name(model.pooling) },
            max_concurrent_requests: limits.max_concurrent_requests,
            max_input_length: max_input_tokens,
            max_batch_tokens,
            max_batch_requests: limits.max_batch_requests,
            max_client_batch_size: config.max_client_batch_size,
            auto_truncate: config.auto_truncate,
            tokenization_workers: config.tokenization_workers.get(),
            version: env!("CARGO_PKG_VERSION"),
            sha: option_env!("NIWAKI_BUILD_SHA"),
            docker_label: option_env!("NIWAKI_IMAGE_LABEL"),
            dimensions: model.d_model,
            model_family: model.family.clone(),
            compression: model.compression.clone(),
            attention: model.attention.clone(),
            isa: model.isa.clone(),
            prompts: config.prompts.keys().cloned().collect(),
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let openai = api::OpenAiModel { id: model.served_name.clone(), object: "model", created, owned_by: "niwaki" };
        let served_name_json = serde_json::to_string(&model.served_name).expect("a string is always JSON");
        metrics.set_memory(MemoryKind::Tokenizer, tokenizer.bytes());
        let vocab_size = model.vocab_size;
        // As many jobs may wait as sequences may be in the engine: beyond, a request would be refused there.
        let pool = Pool::start(tokenizer, config.tokenization_workers, limits.max_concurrent_requests)?;
        Ok(Self(Arc::new(Shared {
            body_memory: Arc::new(Semaphore::new(config.max_body_bytes / 1024)),
            config,
            pool,
            engine,
            metrics,
            readiness: Readiness(AtomicU8::new(0)),
            work: Arc::default(),
            max_input_tokens,
            vocab_size,
            cors_origins,
            info: json(&info),
            models: json(&api::OpenAiModels { object: "list", data: vec![openai.clone()] }),
            model: json(&openai),
            served_name_json,
        })))
    }

    /// The latch that decides whether requests are taken.
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// The metrics.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Whether `key` is one of the keys. The time taken does not tell how much of a key of the right length was right.
    pub(crate) fn accepts(&self, key: &[u8]) -> bool {
        let equal = self.config.api_keys.iter().map(|known| known.as_bytes().ct_eq(key));
        equal.fold(subtle::Choice::from(0), |any, one| any | one).into()
    }
}
