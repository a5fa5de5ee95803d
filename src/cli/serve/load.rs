//! From a model's place to what serves it: opened, checked against its golden inputs, started.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};

use super::selfcheck::self_check;
use super::timeout;
use crate::checkpoint::Checkpoint;
use crate::cli::args::{Place, Precision, ServeArgs};
use crate::cli::model;
use crate::cli::players::{self, Loaded};
use crate::engine::{Engine, EngineLimits};
use crate::kernels::threads::Cores;
use crate::model::Architecture;
use crate::server::{ModelParts, ServedModel, Task};
use crate::telemetry::allocator::GivingBack;
use crate::telemetry::{Metrics, ModelInfo, events};
use crate::text::Tokenizer;

/// The models of the flags, by the names they are served under.
pub(super) struct Models {
    args: ServeArgs,
    metrics: Arc<Metrics>,
    /// Shared by all models.
    cores: Arc<Cores>,
    places: Vec<(String, Option<Place>)>,
}

impl Models {
    /// Loads all models for the first time.
    pub(super) fn load(args: &ServeArgs, metrics: Arc<Metrics>) -> anyhow::Result<(Self, Vec<ModelParts>)> {
        let cores = players::cores(&args.model)?;
        let mut models = Self { args: args.clone(), metrics, cores, places: Vec::new() };
        let places: Vec<Option<Place>> = match &args.model.model[..] {
            [] => vec![None],
            places => places.iter().cloned().map(Some).collect(),
        };
        if places.len() > 1 {
            if let Some(Place { dir, .. }) = places.iter().flatten().find(|place| place.name.is_none()) {
                bail!("--model {}: of several models each needs a name, NAME=DIR", dir.display());
            }
            if args.served_model_name.is_some() {
                bail!("--served-model-name names a single model; several are named by --model NAME=DIR");
            }
        }
        let mut parts = Vec::new();
        for place in places {
            let part = models.start(place.as_ref(), None)?;
            let name = part.model.served_name.clone();
            if models.places.iter().any(|(other, _)| *other == name) {
                bail!("two models are named `{name}`");
            }
            models.places.push((name, place));
            parts.push(part);
        }
        Ok((models, parts))
    }

    /// Loads the model that is served as `name` from where it came.
    pub(super) fn load_again(&self, name: &str) -> anyhow::Result<ModelParts> {
        let (_, place) = self.places.iter().find(|(other, _)| other == name).context("there is no such model")?;
        self.start(place.as_ref(), Some(name))
    }

    /// Opens, checks and starts a model; `served` is the name it is known by already.
    fn start(&self, place: Option<&Place>, served: Option<&str>) -> anyhow::Result<ModelParts> {
        let Self { args, metrics, cores, .. } = self;
        let started = Instant::now();
        let _giving_back = GivingBack::at_once();
        let checkpoint = model::open_place(place, &args.model)?;
        let tokenizer = Arc::new(Tokenizer::from_bytes(checkpoint.tokenizer_json()).context("tokenizer.json")?);
        let n_workers = cores.n_cores();
        let mut loaded = players::load_on(&checkpoint, &args.model, n_workers, || Ok(Arc::clone(cores)))?;
        let mut model = served_model(args, place, &checkpoint, &loaded)?;
        if let Some(served) = served {
            served.clone_into(&mut model.served_name);
        }
        self_check(&checkpoint, &args.model, &mut *loaded.workers[0], metrics, &model.served_name)?;
        checkpoint.release_pages();
        metrics.set_build_info(env!("CARGO_PKG_VERSION"), &loaded.isa);
        let limits = engine_limits(args, checkpoint.architecture());
        let engine = Engine::start_named(&model.served_name, loaded.workers, limits, Arc::clone(metrics))?;
        let info = ModelInfo {
            model: model.served_name.clone(),
            family: model.family.clone(),
            scheme: model.compression.clone(),
            precision: model.dtype.clone(),
            attention: model.attention.clone(),
        };
        events::model_loaded(metrics, &info, started.elapsed());
        Ok(ModelParts { model, tokenizer, engine })
    }
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

fn served_model(
    args: &ServeArgs,
    place: Option<&Place>,
    checkpoint: &Checkpoint,
    loaded: &Loaded,
) -> anyhow::Result<ServedModel> {
    let architecture = checkpoint.architecture();
    let model_id = match (place, &args.model.model_id) {
        (Some(Place { dir, .. }), _) => dir.display().to_string(),
        (None, Some(id)) => id.clone(),
        (None, None) => checkpoint.name().to_owned(),
    };
    let named = place.and_then(|place| place.name.clone()).or_else(|| args.served_model_name.clone());
    let from_hub = || place.map_or_else(|| args.model.model_id.clone(), |_| None);
    let compression = match checkpoint.manifest() {
        Some(manifest) => {
            manifest.schemes.iter().map(|(group, scheme)| format!("{group}: {scheme}")).collect::<Vec<_>>()
        }
        None => Vec::new(),
    };
    let prompts = prompts(checkpoint)?;
    let default_prompt = match (&args.default_prompt_name, &args.default_prompt) {
        (Some(name), _) => match prompts.get(name) {
            Some(prompt) => Some(prompt.clone()),
            None => bail!("--default-prompt-name: the model has no prompt `{name}`"),
        },
        (None, prompt) => prompt.clone(),
    };
    Ok(ServedModel {
        served_name: named.or_else(from_hub).unwrap_or_else(|| checkpoint.name().to_owned()),
        model_sha: checkpoint.manifest().and_then(|manifest| manifest.files.get("model.safetensors").cloned()),
        model_id,
        family: format!("{:?}", architecture.family).to_lowercase(),
        compression: if compression.is_empty() { "none".to_owned() } else { compression.join(", ") },
        dtype: match args.model.precision {
            Precision::Int8 => "int8".to_owned(),
            Precision::F32 => "float32".to_owned(),
        },
        attention: attention(architecture),
        isa: loaded.isa.clone(),
        task: match &architecture.head {
            Some(head) => Task::Classification(head.clone()),
            None => Task::Embedding { pooling: architecture.pooling },
        },
        d_model: architecture.d_model,
        vocab_size: architecture.vocab_size,
        n_token_types: architecture.n_token_types,
        max_input_tokens: architecture.max_input_tokens,
        file_bytes: checkpoint.weights_bytes(),
        prompts,
        default_prompt,
    })
}

fn attention(architecture: &Architecture) -> String {
    let band = architecture.layers[0].band;
    if architecture.layers.iter().all(|layer| layer.band.is_full_for(architecture.max_input_tokens)) {
        "full".to_owned()
    } else {
        band.to_string()
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
