//! The models that are served, each with its engine and its tokenizer, and the replacing of one by a new artefact.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use tokio::sync::Notify;

use super::api;
use super::config::{ConfigError, ServedModel, ServerConfig, Task};
use super::error::ServerError;
use crate::engine::Engine;
use crate::model::{HeadConfig, Pooling};
use crate::telemetry::{MemoryKind, Metrics};
use crate::text::{Pool, Tokenizer};

/// What makes up a model that can be served.
#[derive(Debug)]
pub struct ModelParts {
    /// What is said of it.
    pub model: ServedModel,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its engine, running.
    pub engine: Engine,
}

/// A model in service. A request holds the one that it began with, so that a replaced model ends with its last request.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) card: ServedModel,
    pub(crate) pool: Pool,
    pub(crate) engine: Engine,
    /// Longest input: the model's, but no longer than a batch.
    pub(crate) max_input_tokens: usize,
    /// `/info`, written once.
    pub(crate) info: Bytes,
    pub(crate) openai: api::OpenAiModel,
    /// The served name as a JSON string.
    pub(crate) name_json: String,
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

fn model_type(task: &Task) -> api::ModelType {
    match task {
        Task::Embedding { pooling } => api::ModelType::Embedding { pooling: pooling_name(*pooling) },
        Task::Classification(head) => {
            let id2label = head.id2label();
            let label2id = head.labels.iter().enumerate().map(|(id, label)| (label.clone(), id)).collect();
            match head.labels.len() {
                1 => api::ModelType::Reranker { id2label, label2id },
                _ => api::ModelType::Classifier { id2label, label2id },
            }
        }
    }
}

pub(super) fn json(value: &impl serde::Serialize) -> Bytes {
    serde_json::to_vec(value).expect("a struct of strings and numbers is always JSON").into()
}

impl Model {
    /// Checks the settings for this model and starts the tokenizer's threads.
    pub(crate) fn new(
        config: &ServerConfig,
        parts: ModelParts,
        metrics: &Arc<Metrics>,
    ) -> Result<Arc<Self>, ConfigError> {
        let ModelParts { model: card, tokenizer, engine } = parts;
        let limits = engine.limits();
        let (got, least) = (card.max_input_tokens, tokenizer.n_special() + 1);
        if got < least {
            return Err(ConfigError::Range { name: "max_input_tokens", got, least, most: usize::MAX });
        }
        let (max_input_tokens, max_batch_tokens) = (card.max_input_tokens, limits.max_batch_tokens);
        if max_input_tokens > max_batch_tokens && !config.auto_truncate {
            return Err(ConfigError::Batch { max_input_tokens, max_batch_tokens });
        }
        let max_input_tokens = max_input_tokens.min(max_batch_tokens);
        let info = api::Info {
            model_id: card.model_id.clone(),
            model_sha: card.model_sha.clone(),
            model_dtype: card.dtype.clone(),
            served_model_name: card.served_name.clone(),
            model_type: model_type(&card.task),
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
            dimensions: card.d_model,
            model_family: card.family.clone(),
            compression: card.compression.clone(),
            attention: card.attention.clone(),
            isa: card.isa.clone(),
            prompts: card.prompts.keys().cloned().collect(),
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let openai = api::OpenAiModel { id: card.served_name.clone(), object: "model", created, owned_by: "niwaki" };
        let name_json = serde_json::to_string(&card.served_name).expect("a string is always JSON");
        // As many jobs may wait as sequences may be in the engine: beyond, a request would be refused there.
        let pool = Pool::start(tokenizer, config.tokenization_workers, limits.max_concurrent_requests)?;
        let info = json(&info);
        let model = Arc::new(Self { card, pool, engine, max_input_tokens, info, openai, name_json });
        let source = |kind, read: fn(&Self) -> usize| {
            let model = Arc::downgrade(&model);
            metrics.memory_source(kind, move || Some(read(&*model.upgrade()?) as u64));
        };
        source(MemoryKind::Tokenizer, |model| model.pool.tokenizer().bytes());
        source(MemoryKind::ModelFile, |model| model.card.file_bytes);
        Ok(model)
    }

    /// Refuses a model that makes no embeddings.
    pub(crate) fn embeds(&self) -> Result<(), ServerError> {
        match self.card.task {
            Task::Embedding { .. } => Ok(()),
            Task::Classification(_) => Err(ServerError::Task { expected: "an embedding" }),
        }
    }

    /// The classification head, or a refusal.
    pub(crate) fn head(&self) -> Result<&HeadConfig, ServerError> {
        match &self.card.task {
            Task::Classification(head) => Ok(head),
            Task::Embedding { .. } => Err(ServerError::Task { expected: "a classifier" }),
        }
    }

    /// The head of a model of one label, or a refusal.
    pub(crate) fn reranker(&self) -> Result<&HeadConfig, ServerError> {
        self.head().ok().filter(|head| head.labels.len() == 1).ok_or(ServerError::Task { expected: "a re-ranker" })
    }

    /// Numbers of a reply's pooled row.
    pub(crate) fn width(&self) -> usize {
        match &self.card.task {
            Task::Embedding { .. } => self.card.d_model,
            Task::Classification(head) => head.labels.len(),
        }
    }
}

/// The models by name. The first is the one that is meant when a request names none.
#[derive(Debug)]
pub(crate) struct Models {
    slots: Vec<Slot>,
    swapped: Notify,
}

#[derive(Debug)]
struct Slot {
    name: String,
    current: RwLock<Arc<Model>>,
}

impl Slot {
    fn get(&self) -> Arc<Model> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Models {
    pub(crate) fn new(models: Vec<Arc<Model>>) -> Result<Self, ConfigError> {
        let mut slots: Vec<Slot> = Vec::with_capacity(models.len());
        for model in models {
            let name = model.card.served_name.clone();
            if slots.iter().any(|slot| slot.name == name) {
                return Err(ConfigError::ModelName { name });
            }
            slots.push(Slot { name, current: RwLock::new(model) });
        }
        if slots.is_empty() { Err(ConfigError::NoModel) } else { Ok(Self { slots, swapped: Notify::new() }) }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().map(|slot| slot.name.as_str())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Model>> {
        self.slots.iter().map(Slot::get).collect()
    }

    pub(crate) fn first(&self) -> Arc<Model> {
        self.slots[0].get()
    }

    /// The model of this name, or that was loaded by it.
    pub(crate) fn named(&self, name: &str) -> Result<Arc<Model>, ServerError> {
        let by_name = self.slots.iter().find(|slot| slot.name == name).map(Slot::get);
        by_name
            .or_else(|| self.all().into_iter().find(|model| model.card.model_id == name))
            .ok_or(ServerError::NoSuchModel)
    }

    /// The model that a request is for: `asked` is what its address or headers say, `in_body` what an API's own field
    /// says. With a single model the latter may be anything: clients of OpenAI's API must put something there.
    pub(crate) fn find(&self, asked: Option<&str>, in_body: Option<&str>) -> Result<Arc<Model>, ServerError> {
        match (asked, in_body) {
            (Some(name), _) => self.named(name),
            (None, Some(name)) if self.slots.len() > 1 => self.named(name),
            _ => Ok(self.first()),
        }
    }

    /// Puts `model` in the place of the one of its name.
    pub(crate) fn swap(&self, model: Arc<Model>) {
        if let Some(slot) = self.slots.iter().find(|slot| slot.name == model.card.served_name) {
            let old = {
                let mut current = slot.current.write().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *current, model)
            };
            self.swapped.notify_waiters();
            drop(old);
        }
    }

    /// Whether all workers of all models are well.
    pub(crate) fn are_alive(&self) -> bool {
        self.slots.iter().all(|slot| slot.get().engine.is_alive())
    }

    /// Resolves when a worker of a model in service has died.
    pub(crate) async fn died(&self) {
        loop {
            let swapped = self.swapped.notified();
            tokio::pin!(swapped);
            // Registered before looking, so that a swap in between is not missed.
            swapped.as_mut().enable();
            let models = self.all();
            let mut deaths: Vec<_> = models.iter().map(|model| Box::pin(model.engine.died())).collect();
            let any = std::future::poll_fn(|context| {
                let died = deaths.iter_mut().any(|death| death.as_mut().poll(context).is_ready());
                if died { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
            });
            tokio::select! {
                () = any => return,
                () = swapped => {}
            }
        }
    }
}
