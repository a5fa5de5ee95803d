//! A service for unit tests, whose model is never asked.

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};

use tokio::sync::oneshot;

use super::{AppState, ModelParts, ServedModel, ServerConfig, Task};
use crate::engine::{Engine, EngineLimits};
use crate::model::{
    Activation, Architecture, ArchitectureSpec, Band, Family, Forward, ForwardMemory, LayerConfig, ModelError, Outputs,
    Pooling, Positions, RaggedBatch, Want,
};
use crate::telemetry::Metrics;
use crate::text::Tokenizer;

/// A tokenizer of one word.
pub(crate) const TOKENIZER: &[u8] = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
    "normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,
    "model":{"type":"WordLevel","vocab":{"tree":0,"?":1},"unk_token":"?"}}"#;

/// Never asked.
struct Nothing(Architecture);

impl Forward for Nothing {
    fn architecture(&self) -> &Architecture {
        &self.0
    }
    fn forward(&mut self, _: &RaggedBatch, _: Want, _: &mut Outputs) -> Result<(), ModelError> {
        Err(ModelError::EmptySequence)
    }
    fn memory(&self) -> ForwardMemory {
        ForwardMemory::default()
    }
}

/// A service that is ready, with one thread that tokenizes.
pub(crate) fn state() -> AppState {
    let spec = ArchitectureSpec {
        ranges: Vec::new(),
        family: Family::Bert,
        vocab_size: 4,
        n_token_types: 0,
        positions: Positions { table_len: 4, offset: 0, tiled: false },
        d_model: 4,
        norm_eps: 1e-12,
        activation: Activation::Gelu,
        layers: vec![LayerConfig { n_heads: 1, d_head: 4, d_ffn: 4, band: Band::FULL }],
        pooling: Pooling::Mean,
        normalize: true,
        max_input_tokens: 4,
        head: None,
    };
    let text = || "test".to_owned();
    let model = ServedModel {
        model_id: text(),
        model_sha: None,
        served_name: text(),
        family: text(),
        compression: text(),
        dtype: text(),
        attention: text(),
        isa: text(),
        task: Task::Embedding { pooling: Pooling::Mean },
        d_model: 4,
        vocab_size: 4,
        n_token_types: 0,
        max_input_tokens: 4,
        file_bytes: 0,
        prompts: BTreeMap::new(),
        default_prompt: None,
    };
    let metrics = Metrics::new();
    let worker = Box::new(Nothing(Architecture::new(spec).unwrap()));
    let engine = Engine::start(vec![worker], EngineLimits::default(), Arc::clone(&metrics)).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_bytes(TOKENIZER).unwrap());
    let parts = ModelParts { model, tokenizer, engine };
    let state = AppState::new(ServerConfig::default(), vec![parts], metrics).unwrap();
    state.readiness().set_ready();
    state
}

/// Keeps the only thread that tokenizes busy until what is returned is dropped.
pub(crate) async fn busy_tokenizer(app: &AppState) -> mpsc::Sender<()> {
    let (release, released) = mpsc::channel();
    let (started, has_started) = oneshot::channel();
    let model = app.models.first();
    tokio::spawn(async move {
        let job = model.pool.run(move |_, _| {
            started.send(()).unwrap();
            released.recv().unwrap_err();
        });
        job.await.unwrap();
    });
    has_started.await.unwrap();
    release
}
