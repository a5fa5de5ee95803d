//! The messages of `tei.proto` and of gRPC's health service, written by hand.
#![allow(missing_docs, reason = "the fields are described in tei.proto")]

#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoRequest {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoResponse {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(string, optional, tag = "2")]
    pub sha: Option<String>,
    #[prost(string, optional, tag = "3")]
    pub docker_label: Option<String>,
    #[prost(string, tag = "4")]
    pub model_id: String,
    #[prost(string, optional, tag = "5")]
    pub model_sha: Option<String>,
    #[prost(string, tag = "6")]
    pub model_dtype: String,
    #[prost(enumeration = "ModelType", tag = "7")]
    pub model_type: i32,
    #[prost(uint32, tag = "8")]
    pub max_concurrent_requests: u32,
    #[prost(uint32, tag = "9")]
    pub max_input_length: u32,
    #[prost(uint32, tag = "10")]
    pub max_batch_tokens: u32,
    #[prost(uint32, optional, tag = "11")]
    pub max_batch_requests: Option<u32>,
    #[prost(uint32, tag = "12")]
    pub max_client_batch_size: u32,
    #[prost(uint32, tag = "13")]
    pub tokenization_workers: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    #[prost(uint32, tag = "1")]
    pub compute_chars: u32,
    #[prost(uint32, tag = "2")]
    pub compute_tokens: u32,
    #[prost(uint64, tag = "3")]
    pub total_time_ns: u64,
    #[prost(uint64, tag = "4")]
    pub tokenization_time_ns: u64,
    #[prost(uint64, tag = "5")]
    pub queue_time_ns: u64,
    #[prost(uint64, tag = "6")]
    pub inference_time_ns: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EmbedRequest {
    #[prost(string, tag = "1")]
    pub inputs: String,
    #[prost(bool, tag = "2")]
    pub truncate: bool,
    #[prost(bool, optional, tag = "3")]
    pub normalize: Option<bool>,
    #[prost(enumeration = "TruncationDirection", tag = "4")]
    pub truncation_direction: i32,
    #[prost(string, optional, tag = "5")]
    pub prompt_name: Option<String>,
    #[prost(uint32, optional, tag = "6")]
    pub dimensions: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EmbedResponse {
    #[prost(float, repeated, tag = "1")]
    pub embeddings: Vec<f32>,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EmbedSparseRequest {
    #[prost(string, tag = "1")]
    pub inputs: String,
    #[prost(bool, tag = "2")]
    pub truncate: bool,
    #[prost(enumeration = "TruncationDirection", tag = "3")]
    pub truncation_direction: i32,
    #[prost(string, optional, tag = "4")]
    pub prompt_name: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SparseValue {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(float, tag = "2")]
    pub value: f32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EmbedSparseResponse {
    #[prost(message, repeated, tag = "1")]
    pub sparse_embeddings: Vec<SparseValue>,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EmbedAllRequest {
    #[prost(string, tag = "1")]
    pub inputs: String,
    #[prost(bool, tag = "2")]
    pub truncate: bool,
    #[prost(enumeration = "TruncationDirection", tag = "3")]
    pub truncation_direction: i32,
    #[prost(string, optional, tag = "4")]
    pub prompt_name: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TokenEmbedding {
    #[prost(float, repeated, tag = "1")]
    pub embeddings: Vec<f32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EmbedAllResponse {
    #[prost(message, repeated, tag = "1")]
    pub token_embeddings: Vec<TokenEmbedding>,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PredictRequest {
    #[prost(string, tag = "1")]
    pub inputs: String,
    #[prost(bool, tag = "2")]
    pub truncate: bool,
    #[prost(bool, tag = "3")]
    pub raw_scores: bool,
    #[prost(enumeration = "TruncationDirection", tag = "4")]
    pub truncation_direction: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PredictPairRequest {
    #[prost(string, repeated, tag = "1")]
    pub inputs: Vec<String>,
    #[prost(bool, tag = "2")]
    pub truncate: bool,
    #[prost(bool, tag = "3")]
    pub raw_scores: bool,
    #[prost(enumeration = "TruncationDirection", tag = "4")]
    pub truncation_direction: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Prediction {
    #[prost(float, tag = "1")]
    pub score: f32,
    #[prost(string, tag = "2")]
    pub label: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PredictResponse {
    #[prost(message, repeated, tag = "1")]
    pub predictions: Vec<Prediction>,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RerankRequest {
    #[prost(string, tag = "1")]
    pub query: String,
    #[prost(string, repeated, tag = "2")]
    pub texts: Vec<String>,
    #[prost(bool, tag = "3")]
    pub truncate: bool,
    #[prost(bool, tag = "4")]
    pub raw_scores: bool,
    #[prost(bool, tag = "5")]
    pub return_text: bool,
    #[prost(enumeration = "TruncationDirection", tag = "6")]
    pub truncation_direction: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RerankStreamRequest {
    #[prost(string, tag = "1")]
    pub query: String,
    #[prost(string, tag = "2")]
    pub text: String,
    #[prost(bool, tag = "3")]
    pub truncate: bool,
    #[prost(bool, tag = "4")]
    pub raw_scores: bool,
    #[prost(bool, tag = "5")]
    pub return_text: bool,
    #[prost(enumeration = "TruncationDirection", tag = "6")]
    pub truncation_direction: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Rank {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(string, optional, tag = "2")]
    pub text: Option<String>,
    #[prost(float, tag = "3")]
    pub score: f32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RerankResponse {
    #[prost(message, repeated, tag = "1")]
    pub ranks: Vec<Rank>,
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EncodeRequest {
    #[prost(string, tag = "1")]
    pub inputs: String,
    #[prost(bool, tag = "2")]
    pub add_special_tokens: bool,
    #[prost(string, optional, tag = "3")]
    pub prompt_name: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SimpleToken {
    #[prost(uint32, tag = "1")]
    pub id: u32,
    #[prost(string, tag = "2")]
    pub text: String,
    #[prost(bool, tag = "3")]
    pub special: bool,
    #[prost(uint32, optional, tag = "4")]
    pub start: Option<u32>,
    #[prost(uint32, optional, tag = "5")]
    pub stop: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EncodeResponse {
    #[prost(message, repeated, tag = "1")]
    pub tokens: Vec<SimpleToken>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DecodeRequest {
    #[prost(uint32, repeated, tag = "1")]
    pub ids: Vec<u32>,
    #[prost(bool, tag = "2")]
    pub skip_special_tokens: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DecodeResponse {
    #[prost(string, tag = "1")]
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ModelType {
    Embedding = 0,
    Classifier = 1,
    Reranker = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum TruncationDirection {
    Right = 0,
    Left = 1,
}

/// Of `grpc.health.v1`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    pub service: String,
}

/// Of `grpc.health.v1`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct HealthCheckResponse {
    #[prost(enumeration = "ServingStatus", tag = "1")]
    pub status: i32,
}

/// Of `grpc.health.v1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ServingStatus {
    Unknown = 0,
    Serving = 1,
    NotServing = 2,
    ServiceUnknown = 3,
}
