//! Wire types: the only serde of the service.
//!
//! Names and shapes are Text Embeddings Inference's and OpenAI's. Unknown fields are ignored, as both do.

mod inference;
mod inputs;
mod score;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use inference::{
    InferParameters, InferRequest, InferResponse, InferTensor, InferredTensor, ModelMetadata, ModelReady,
    RequestedOutput, ServerLive, ServerMetadata, ServerReady, TensorData, TensorMetadata,
};
pub use inputs::{Bounded, IdLists, Input, Item, MAX_ITEMS, Object, Texts};
pub use score::{
    CohereRerankRequest, CohereRerankResponse, CohereResult, Document, DocumentText, PredictInput, PredictRequest,
    Prediction, Predictions, Rank, RerankRequest, Sentence,
};

/// A request body that may name the model it is for, in a field of its API.
pub trait Named {
    /// The name, if one was given.
    fn model(&self) -> Option<&str> {
        None
    }
}

/// In which numbers an embedding is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputDtype {
    /// Single precision.
    #[default]
    #[serde(alias = "float32", alias = "f32")]
    Float,
    /// Half precision (IEEE 754 binary16).
    #[serde(alias = "f16")]
    Float16,
    /// Integers of -127 to 127: the vector scaled so that its largest number is 127. The cosine of two such vectors is
    /// that of the originals but for rounding.
    Int8,
    /// One bit per number, 1 where it is positive, eight to a byte from the most significant bit; each byte less 128.
    Binary,
    /// The same, as bytes of 0 to 255.
    Ubinary,
}

/// Which end of an input that is too long is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, ToSchema)]
pub enum TruncationDirection {
    /// The beginning goes.
    #[serde(alias = "left")]
    Left,
    /// The end goes.
    #[default]
    #[serde(alias = "right")]
    Right,
}

fn yes() -> bool {
    true
}

/// Body of `POST /embed`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct EmbedRequest {
    /// Texts or token ids.
    pub inputs: Input,
    /// Cut inputs that are too long; by default as the server is set.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end is cut off.
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// Name of the prompt that is put before each input.
    #[serde(default)]
    pub prompt_name: Option<String>,
    /// Scale each embedding to unit length.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub normalize: bool,
    /// Keep only so many leading numbers of each embedding.
    #[serde(default)]
    pub dimensions: Option<usize>,
    /// In which numbers embeddings are written.
    #[serde(default)]
    pub output_dtype: Option<OutputDtype>,
}

/// Body of `POST /embed_all`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct EmbedAllRequest {
    /// Texts or token ids.
    pub inputs: Input,
    /// Cut inputs that are too long; by default as the server is set.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end is cut off.
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// Name of the prompt that is put before each input.
    #[serde(default)]
    pub prompt_name: Option<String>,
}

/// Body of `POST /similarity`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct SimilarityRequest {
    /// What is compared.
    #[schema(value_type = SimilarityInput)]
    pub inputs: Object<SimilarityInput>,
    /// How.
    #[serde(default)]
    #[schema(value_type = Option<SimilarityParameters>)]
    pub parameters: Option<Object<SimilarityParameters>>,
}

/// The sentences of `POST /similarity`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct SimilarityInput {
    /// The sentence all others are compared to.
    pub source_sentence: String,
    /// The others.
    #[schema(value_type = Vec<String>)]
    pub sentences: Bounded<String>,
}

/// Parameters of `POST /similarity`.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct SimilarityParameters {
    /// Cut inputs that are too long; by default as the server is set.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end is cut off.
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// Name of the prompt that is put before each sentence.
    #[serde(default)]
    pub prompt_name: Option<String>,
}

/// Body of `POST /tokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// Texts.
    pub inputs: Texts,
    /// Put the special tokens around each text.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub add_special_tokens: bool,
    /// Name of the prompt that is put before each text.
    #[serde(default)]
    pub prompt_name: Option<String>,
}

/// A token of `POST /tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct SimpleToken {
    /// Token id.
    pub id: u32,
    /// The text it stands for.
    pub text: String,
    /// Whether it is a special token.
    pub special: bool,
    /// First byte in the text (prompt included); null for a special token.
    #[schema(nullable)]
    pub start: Option<usize>,
    /// Byte behind the last one; null for a special token.
    #[schema(nullable)]
    pub stop: Option<usize>,
}

/// Body of `POST /decode`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DecodeRequest {
    /// Token ids, or lists of them.
    pub ids: IdLists,
    /// Leave special tokens out.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub skip_special_tokens: bool,
}

/// How `POST /v1/embeddings` writes an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// Base64 of the numbers' bytes, little-endian; single precision unless `output_dtype` says otherwise.
    Base64,
}

/// Body of `POST /v1/embeddings`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct OpenAiRequest {
    /// Texts or token ids.
    pub input: Input,
    /// Which model; anything where there is only one.
    #[serde(default)]
    pub model: Option<String>,
    /// Ignored.
    #[serde(default)]
    pub user: Option<String>,
    /// How embeddings are written.
    #[serde(default)]
    pub encoding_format: Option<EncodingFormat>,
    /// Keep only so many leading numbers of each embedding.
    #[serde(default)]
    pub dimensions: Option<usize>,
    /// In which numbers embeddings are written.
    #[serde(default)]
    pub output_dtype: Option<OutputDtype>,
}

impl Named for EmbedRequest {}
impl Named for EmbedAllRequest {}
impl Named for SimilarityRequest {}
impl Named for TokenizeRequest {}
impl Named for DecodeRequest {}
impl Named for OpenAiRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }
}

/// Tokens of a request to `POST /v1/embeddings`.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiUsage {
    /// Tokens of all inputs, as computed.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}

/// An embedding: numbers (whole ones for `int8`, `binary` and `ubinary`) or base64 of them.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum OpenAiVector {
    /// Numbers.
    Float(Vec<f32>),
    /// Base64.
    Base64(String),
}

/// One embedding of `POST /v1/embeddings`. (The answer is written by hand, this is its description.)
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiEmbedding {
    /// Always `embedding`.
    #[schema(example = "embedding")]
    pub object: &'static str,
    /// The embedding.
    pub embedding: OpenAiVector,
    /// Position of its input.
    pub index: usize,
    /// With `int8`: what the integers are to be multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
}

/// Answer of `POST /v1/embeddings`. (Written by hand, this is its description.)
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiResponse {
    /// Always `list`.
    #[schema(example = "list")]
    pub object: &'static str,
    /// One entry per input.
    pub data: Vec<OpenAiEmbedding>,
    /// Name under which the model is served.
    pub model: String,
    /// Tokens.
    pub usage: OpenAiUsage,
}

/// A model of `GET /v1/models`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct OpenAiModel {
    /// Name under which it is served.
    pub id: String,
    /// Always `model`.
    #[schema(example = "model")]
    pub object: &'static str,
    /// When the service started, in seconds since 1970.
    pub created: u64,
    /// Always `niwaki`.
    #[schema(example = "niwaki")]
    pub owned_by: &'static str,
}

/// Answer of `GET /v1/models`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct OpenAiModels {
    /// Always `list`.
    #[schema(example = "list")]
    pub object: &'static str,
    /// The models, the first of which is meant where none is named.
    pub data: Vec<OpenAiModel>,
}

/// What kind of model is served.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ModelType {
    /// A sentence encoder.
    Embedding {
        /// How token rows become one row.
        pooling: &'static str,
    },
    /// It scores a text or a pair of texts for several labels.
    Classifier {
        /// Labels by their number.
        id2label: BTreeMap<String, String>,
        /// Numbers by their label.
        label2id: BTreeMap<String, usize>,
    },
    /// It scores a pair of texts.
    Reranker {
        /// Its one label.
        id2label: BTreeMap<String, String>,
        /// The same.
        label2id: BTreeMap<String, usize>,
    },
}

/// A model that was loaded anew.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Reloaded {
    /// Its name.
    pub model: String,
    /// Commit or hash of what is served now.
    pub model_sha: Option<String>,
    /// Time that loading and checking took.
    pub took_ms: f64,
}

/// Answer of `POST /admin/reload`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReloadResponse {
    /// The models that were replaced.
    pub reloaded: Vec<Reloaded>,
}

/// Answer of `GET /info`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Info {
    /// Name or path the model was loaded by.
    pub model_id: String,
    /// Commit or hash it was loaded at.
    pub model_sha: Option<String>,
    /// Precision it is computed in.
    pub model_dtype: String,
    /// Name under which it is served.
    pub served_model_name: String,
    /// What kind of model it is.
    pub model_type: ModelType,
    /// Inputs that may be in the service at once.
    pub max_concurrent_requests: usize,
    /// Longest input in tokens.
    pub max_input_length: usize,
    /// Tokens of a batch.
    pub max_batch_tokens: usize,
    /// Sequences of a batch, if limited.
    pub max_batch_requests: Option<usize>,
    /// Inputs of a request.
    pub max_client_batch_size: usize,
    /// Whether inputs that are too long are cut unless a request says otherwise.
    pub auto_truncate: bool,
    /// Threads that tokenize.
    pub tokenization_workers: usize,
    /// Version of the service.
    pub version: &'static str,
    /// Commit it was built from, where known.
    pub sha: Option<&'static str>,
    /// Label of its image, where there is one.
    pub docker_label: Option<&'static str>,
    /// Numbers of an embedding.
    pub dimensions: usize,
    /// Model family.
    pub model_family: String,
    /// How the weights are compressed.
    pub compression: String,
    /// Attention pattern.
    pub attention: String,
    /// Instruction set the kernels run on.
    pub isa: String,
    /// Names of the prompts that `prompt_name` may carry.
    pub prompts: Vec<String>,
}

/// An error of every route but OpenAI's.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody<'a> {
    /// What is wrong.
    #[schema(example = "`inputs` cannot be empty")]
    pub error: &'a str,
    /// Which class of error it is.
    #[schema(example = "Empty")]
    pub error_type: &'a str,
}

/// An error of OpenAI's routes.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiErrorBody<'a> {
    /// The error.
    pub error: OpenAiError<'a>,
}

/// What is inside an error of OpenAI's routes.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiError<'a> {
    /// What is wrong.
    pub message: &'a str,
    /// Which class of error it is, in OpenAI's words.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: &'a str,
    /// The field it is about.
    pub param: Option<&'a str>,
    /// Which error it is.
    #[schema(example = "empty_input")]
    pub code: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_read_in_both_spellings() {
        for (json, direction) in [
            (r#""left""#, TruncationDirection::Left),
            (r#""Left""#, TruncationDirection::Left),
            (r#""right""#, TruncationDirection::Right),
            (r#""Right""#, TruncationDirection::Right),
        ] {
            assert_eq!(serde_json::from_str::<TruncationDirection>(json).unwrap(), direction);
        }
    }
}
