//! What the handlers share.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::http::HeaderValue;
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::api;
use super::config::{ConfigError, ServerConfig};
use super::error::ServerError;
use super::keys::{ApiKeys, is_key};
use super::memory::waiting_bytes;
use super::models::{Model, ModelParts, Models};
use super::tls::Tls;
use crate::telemetry::{Credential, Metrics, Tracer, events};

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
#[derive(Debug, Default)]
pub struct Readiness {
    phase: AtomicU8,
    draining: CancellationToken,
}

impl Readiness {
    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Loading,
            1 => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// Whether the end has begun.
    pub(crate) fn is_draining(&self) -> bool {
        self.phase() == Phase::Draining
    }

    /// Resolves when the end has begun.
    pub(crate) async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// Takes requests from now on, unless draining.
    pub fn set_ready(&self) {
        self.phase.fetch_max(1, Ordering::SeqCst);
    }

    /// Takes no requests any more.
    pub fn set_draining(&self) {
        self.phase.store(2, Ordering::SeqCst);
        self.draining.cancel();
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

/// Loads the model of this name anew; its error is the reason, in one line.
pub type Loader = Box<dyn Fn(&str) -> Result<ModelParts, String> + Send + Sync>;

/// What the handlers share; clones are handles to the same.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Shared>);

/// What an [`AppState`] leads to; its fields are the server's own.
pub struct Shared {
    pub(crate) config: ServerConfig,
    pub(crate) models: Models,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) readiness: Readiness,
    pub(crate) work: Arc<Work>,
    /// In KiB, of bodies and answers over the small size, and of all messages of gRPC's streams.
    pub(crate) body_memory: Arc<Semaphore>,
    /// In bytes, of parts of smaller bodies.
    pub(crate) waiting_memory: Arc<Semaphore>,
    pub(crate) cors_origins: Vec<HeaderValue>,
    pub(crate) keys: ApiKeys,
    pub(crate) tls: Option<Tls>,
    pub(crate) tracer: OnceLock<Tracer>,
    loader: OnceLock<Loader>,
    /// Held while models are loaded anew: one after the other.
    reloading: Mutex<()>,
    /// Held from reading a file of credentials to putting its keys in the place of the old ones: else older ones could come last.
    reading_credentials: Mutex<()>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).field("models", &self.models).finish_non_exhaustive()
    }
}

impl std::ops::Deref for AppState {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl AppState {
    /// Checks the settings, starts the tokenizers' threads. The service is *loading* until
    /// [`Readiness::set_ready`], which [`super::serve()`] calls. The first model is the one that requests without a name
    /// mean.
    ///
    /// # Errors
    /// [`ConfigError`] naming the setting that cannot be.
    pub fn new(mut config: ServerConfig, models: Vec<ModelParts>, metrics: Arc<Metrics>) -> Result<Self, ConfigError> {
        for (name, got, least, most) in [
            ("payload_limit", config.payload_limit, 1, u32::MAX as usize),
            ("max_client_batch_size", config.max_client_batch_size, 1, api::MAX_ITEMS),
            ("max_connections", config.max_connections, 1, Semaphore::MAX_PERMITS),
            // Less is less than hyper reads at once.
            ("max_head_bytes", config.max_head_bytes, 8192, 1 << 20),
            ("max_body_bytes", config.max_body_bytes, config.payload_limit, u32::MAX as usize),
        ] {
            if !(least..=most).contains(&got) {
                return Err(ConfigError::Range { name, got, least, most });
            }
        }
        // Taken out of the settings, so that nothing that shows them shows a key.
        let api_keys = std::mem::take(&mut config.api_keys);
        if !api_keys.iter().all(|key| is_key(key.as_bytes())) {
            return Err(ConfigError::Key);
        }
        let keys = ApiKeys::open(&api_keys, config.api_key_file.as_deref())?;
        let tls = config.tls.clone().map(Tls::open).transpose()?;
        metrics.set_connection_limit(config.max_connections);
        let origin = |origin: &String| {
            let header = HeaderValue::from_str(origin).ok().filter(|_| origin == "*" || origin.contains("://"));
            header.ok_or_else(|| ConfigError::Origin { origin: origin.clone() })
        };
        let any = config.cors_allow_origin.iter().any(|origin| origin == "*");
        let cors_origins: Vec<HeaderValue> = config.cors_allow_origin.iter().map(origin).collect::<Result<_, _>>()?;
        let cors_origins = if any { Vec::new() } else { cors_origins };
        let models = models.into_iter().map(|parts| Model::new(&config, parts, &metrics)).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Shared {
            body_memory: Arc::new(Semaphore::new(config.max_body_bytes / 1024)),
            waiting_memory: Arc::new(Semaphore::new(waiting_bytes(config.max_body_bytes))),
            config,
            models: Models::new(models)?,
            metrics,
            readiness: Readiness::default(),
            work: Arc::default(),
            cors_origins,
            keys,
            tls,
            tracer: OnceLock::new(),
            loader: OnceLock::new(),
            reloading: Mutex::new(()),
            reading_credentials: Mutex::new(()),
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

    /// Resolves when a worker of a model in service has died: the process should end.
    pub async fn died(&self) {
        self.models.died().await;
    }

    /// Has spans made of requests from now on. Only the first call counts.
    pub fn set_tracer(&self, tracer: Tracer) {
        drop(self.tracer.set(tracer));
    }

    /// Sends the spans that are left, for at most `limit`.
    pub async fn close_tracer(&self, limit: Duration) {
        if let Some(tracer) = self.tracer.get() {
            tracer.close(limit).await;
        }
    }

    /// Says how models are loaded anew. Only the first call counts.
    pub fn set_loader(&self, loader: Loader) {
        // A second loader would mean a second composition root.
        drop(self.loader.set(loader));
    }

    /// Loads the model `name`, or the credentials and all models, anew, and puts each that opens and passes its checks in
    /// the place of the old one. What an old model has admitted is still answered by it.
    ///
    /// # Errors
    /// Naming what was refused, and why; that goes on as it was.
    pub async fn reload(&self, name: Option<&str>) -> Result<Vec<api::Reloaded>, ServerError> {
        // A key that is no longer one does not wait for models.
        let mut refused = if name.is_none() { self.reload_credentials().await } else { Vec::new() };
        let _one_at_a_time = self.reloading.lock().await;
        let names: Vec<String> = match name {
            Some(name) => vec![self.models.named(name)?.card.served_name.clone()],
            None => self.models.names().map(str::to_owned).collect(),
        };
        let mut reloaded = Vec::new();
        for name in names {
            let start = Instant::now();
            let (state, of) = (self.clone(), name.clone());
            let loading = tokio::task::spawn_blocking(move || state.load(&of)).await;
            match loading.unwrap_or_else(|_| Err("loading it failed unexpectedly".to_owned())) {
                Ok(model) => {
                    let took = start.elapsed();
                    events::reloaded(&self.metrics, &name, model.card.model_sha.as_deref(), took);
                    let model_sha = model.card.model_sha.clone();
                    self.models.swap(model);
                    reloaded.push(api::Reloaded { model: name, model_sha, took_ms: took.as_secs_f64() * 1e3 });
                }
                Err(reason) => {
                    events::reload_refused(&self.metrics, &name, &reason);
                    refused.push(format!("model `{name}`: {reason}"));
                }
            }
        }
        if refused.is_empty() { Ok(reloaded) } else { Err(ServerError::Reload { reasons: refused.join("; ") }) }
    }

    fn load(&self, name: &str) -> Result<Arc<Model>, String> {
        let loader = self.loader.get().ok_or("this service cannot load models")?;
        let mut parts = loader(name)?;
        // Whatever the new artefact calls itself: its clients know it by this name.
        name.clone_into(&mut parts.model.served_name);
        Model::new(&self.config, parts, &self.metrics).map_err(|error| error.to_string())
    }

    /// Reads the file of API keys and the certificate again, as far as there are any. What cannot be used is told in log
    /// and metrics, and the old one stays. Returns why, for each that was refused.
    pub async fn reload_credentials(&self) -> Vec<String> {
        let _one_at_a_time = self.reading_credentials.lock().await;
        let state = self.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let mut refused = Vec::new();
            match state.keys.reload() {
                Ok(None) => {}
                Ok(Some(n_keys)) => events::keys_reloaded(&state.metrics, n_keys),
                Err(error) => {
                    events::credential_refused(&state.metrics, Credential::ApiKeys, &error);
                    refused.push(error.to_string());
                }
            }
            match state.tls.as_ref().map(Tls::reload) {
                None => {}
                Some(Ok(())) => events::certificate_reloaded(&state.metrics),
                Some(Err(error)) => {
                    events::credential_refused(&state.metrics, Credential::Certificate, &error);
                    refused.push(error.to_string());
                }
            }
            refused
        });
        // Nothing in it panics; if it did, the old keys would stay.
        reading.await.unwrap_or_else(|_| vec!["reading the credentials failed unexpectedly".to_owned()])
    }
}
