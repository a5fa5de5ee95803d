//! What the service is told at its start.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::tls::TlsFiles;
use crate::model::{HeadConfig, Pooling};

/// What a model is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// It makes embeddings.
    Embedding {
        /// How token rows become one row.
        pooling: Pooling,
    },
    /// It gives scores to a text or a pair of texts: a reranker with one label, a classifier with several.
    Classification(HeadConfig),
}

/// The model, as the service presents it.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// Name or path it was loaded by.
    pub model_id: String,
    /// Commit or hash it was loaded at.
    pub model_sha: Option<String>,
    /// Name in answers.
    pub served_name: String,
    /// Model family.
    pub family: String,
    /// How the weights are compressed.
    pub compression: String,
    /// Precision it is computed in.
    pub dtype: String,
    /// Attention pattern.
    pub attention: String,
    /// Instruction set of the kernels.
    pub isa: String,
    /// What it is for.
    pub task: Task,
    /// Numbers of an embedding.
    pub d_model: usize,
    /// Rows of the embedding table; ids beyond are refused.
    pub vocab_size: usize,
    /// Token types; those of a tokenizer that knows more are dropped.
    pub n_token_types: usize,
    /// Longest input in tokens.
    pub max_input_tokens: usize,
    /// Bytes of its weights on disk.
    pub file_bytes: usize,
    /// Prompts by name.
    pub prompts: BTreeMap<String, String>,
    /// Prompt of requests that name none.
    pub default_prompt: Option<String>,
}

/// Settings of the service. The defaults are Text Embeddings Inference's where it has the setting.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Keys that clients may use; without any, and without a file, no key is needed.
    pub api_keys: Vec<String>,
    /// A file of further keys, one a line.
    pub api_key_file: Option<PathBuf>,
    /// Certificate and key; without them no TLS is spoken.
    pub tls: Option<TlsFiles>,
    /// Origins that browsers may call from; none means any.
    pub cors_allow_origin: Vec<String>,
    /// Largest request body in bytes.
    pub payload_limit: usize,
    /// Inputs of one request.
    pub max_client_batch_size: usize,
    /// Whether inputs that are too long are cut unless the request says otherwise.
    pub auto_truncate: bool,
    /// Deadline of requests that name none, from their arrival.
    pub default_timeout: Option<Duration>,
    /// Requests that take longer are told in the log, with their ids and stages.
    pub slow_request: Option<Duration>,
    /// Threads that tokenize, for each model.
    pub tokenization_workers: NonZeroUsize,
    /// Connections of each port at once.
    pub max_connections: usize,
    /// Bytes of a request's head.
    pub max_head_bytes: usize,
    /// Time a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// Time a request's head may take to arrive, and a connection may be idle.
    pub head_timeout: Duration,
    /// Time a request's body may take to arrive, and a client may take nothing of its answer.
    pub body_timeout: Duration,
    /// Bytes of request bodies and answers over 64 KiB that may be held at once, and of all messages of gRPC's streams. Smaller
    /// bodies of which a part has come have a quarter as much beside it.
    pub max_body_bytes: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            api_key_file: None,
            tls: None,
            cors_allow_origin: Vec::new(),
            payload_limit: 2_000_000,
            max_client_batch_size: 32,
            auto_truncate: true,
            default_timeout: None,
            slow_request: None,
            tokenization_workers: NonZeroUsize::MIN,
            max_connections: 16_384,
            max_head_bytes: 32 * 1024,
            handshake_timeout: Duration::from_secs(10),
            // Longer than load balancers keep idle connections (60 s is common), so that they close first.
            head_timeout: Duration::from_secs(75),
            body_timeout: Duration::from_secs(30),
            // Thirty-two bodies of the largest size.
            max_body_bytes: 64_000_000,
        }
    }
}

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A number out of range.
    #[error("`{name}` is {got}, it must be between {least} and {most}")]
    Range {
        /// The setting.
        name: &'static str,
        /// As given.
        got: usize,
        /// Smallest value.
        least: usize,
        /// Largest value.
        most: usize,
    },
    /// An origin that no browser sends.
    #[error("`cors_allow_origin`: {origin:?} is no origin such as https://example.org")]
    Origin {
        /// As given.
        origin: String,
    },
    /// No model to serve.
    #[error("there is no model to serve")]
    NoModel,
    /// Two models of one name.
    #[error("two models are named `{name}`")]
    ModelName {
        /// The name.
        name: String,
    },
    /// A key that cannot be sent in a header.
    #[error("an API key must be made of visible ASCII characters")]
    Key,
    /// A file of keys that cannot be used.
    #[error(transparent)]
    KeyFile(#[from] super::keys::KeyFileError),
    /// A certificate or key that cannot be used.
    #[error(transparent)]
    Tls(#[from] super::tls::TlsError),
    /// The longest input would fit no batch, and may not be cut.
    #[error(
        "the longest input of {max_input_tokens} tokens fits no batch of {max_batch_tokens}, and inputs are not cut"
    )]
    Batch {
        /// Longest input.
        max_input_tokens: usize,
        /// Largest batch.
        max_batch_tokens: usize,
    },
    /// The tokenizer's threads.
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
}
