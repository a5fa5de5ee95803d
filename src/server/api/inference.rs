//! Bodies of the Open Inference Protocol, version 2 (`open-inference-protocol`, `inference_rest.md`).

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{Array, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::inputs::{Bounded, Object};
use super::{Named, TruncationDirection};

/// Answer of `GET /v2`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerMetadata {
    /// Name of the server.
    #[schema(example = "niwaki")]
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Extensions of the protocol; none.
    pub extensions: Vec<String>,
}

/// Answer of `GET /v2/health/live`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerLive {
    /// Always true: otherwise there is no answer.
    pub live: bool,
}

/// Answer of `GET /v2/health/ready`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerReady {
    /// True; a server that is not ready answers 503.
    pub ready: bool,
}

/// Answer of `GET /v2/models/{name}/ready`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelReady {
    /// Name of the model.
    pub name: String,
    /// True; a model that is not ready answers 503.
    pub ready: bool,
}

/// A tensor that a model takes or gives.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TensorMetadata {
    /// Its name.
    pub name: &'static str,
    /// Its element type.
    pub datatype: &'static str,
    /// Its shape; -1 is any size.
    pub shape: Vec<i64>,
}

/// Answer of `GET /v2/models/{name}`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelMetadata {
    /// Name of the model.
    pub name: String,
    /// Versions that are served: one, the hash of its weights where known.
    pub versions: Vec<String>,
    /// What runs it.
    #[schema(example = "niwaki")]
    pub platform: &'static str,
    /// What it takes: `text` (and `text_pair`), or `input_ids` (with `attention_mask` and `token_type_ids`).
    pub inputs: Vec<TensorMetadata>,
    /// What it gives.
    pub outputs: Vec<TensorMetadata>,
}

/// Numbers or strings of a tensor, row-major: flat, or nested as its shape is.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorData {
    /// Nothing.
    Empty,
    /// Of the type `BYTES`.
    Text(Bounded<String>),
    /// Of integer types.
    Integers(Vec<i64>),
}

impl<'de> Deserialize<'de> for TensorData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Data;
        impl<'de> Visitor<'de> for Data {
            type Value = TensorData;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of strings or of integers, flat or nested")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<TensorData, A::Error> {
                let mut all = TensorData::Empty;
                while let Some(Entry(entry)) = seq.next_element()? {
                    all = all.and(entry).ok_or_else(|| A::Error::custom("strings and integers are mixed"))?;
                }
                Ok(all)
            }
        }
        /// An element, or a list of them.
        struct Entry(TensorData);
        impl<'de> Deserialize<'de> for Entry {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct EntryVisitor;
                impl<'de> Visitor<'de> for EntryVisitor {
                    type Value = Entry;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a string, an integer, or a list of them")
                    }
                    fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
                        Ok(Entry(TensorData::Text(Bounded { items: vec![text.to_owned()], n_sent: 1 })))
                    }
                    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Entry, E> {
                        let value = i64::try_from(value).map_err(|_| E::custom("an integer does not fit 64 bits"))?;
                        Ok(Entry(TensorData::Integers(vec![value])))
                    }
                    fn visit_i64<E>(self, value: i64) -> Result<Entry, E> {
                        Ok(Entry(TensorData::Integers(vec![value])))
                    }
                    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Entry, A::Error> {
                        Data.visit_seq(seq).map(Entry)
                    }
                }
                deserializer.deserialize_any(EntryVisitor)
            }
        }
        deserializer.deserialize_seq(Data)
    }
}

impl TensorData {
    /// Both, one after the other; `None` if they are of different types.
    fn and(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Empty, data) | (data, Self::Empty) => Some(data),
            (Self::Text(mut a), Self::Text(b)) => {
                a.append(b);
                Some(Self::Text(a))
            }
            (Self::Integers(mut a), Self::Integers(b)) => {
                a.extend(b);
                Some(Self::Integers(a))
            }
            _ => None,
        }
    }
}

impl PartialSchema for TensorData {
    fn schema() -> RefOr<Schema> {
        RefOr::T(Schema::Array(Array::new(Value::schema())))
    }
}
impl ToSchema for TensorData {}

/// An input tensor.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InferTensor {
    /// `text` or `text_pair` (BYTES); `input_ids`, `attention_mask` or `token_type_ids` (INT64).
    pub name: String,
    /// `[n]` or `[n, 1]` for texts, `[n, length]` for ids.
    pub shape: Vec<usize>,
    /// Element type.
    pub datatype: String,
    /// The elements, row-major, flat or nested.
    pub data: TensorData,
}

/// An output that is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct RequestedOutput {
    /// Its name.
    pub name: String,
}

/// Parameters of an inference; those that are not known are ignored.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct InferParameters {
    /// Scale embeddings to unit length; true by default.
    #[serde(default)]
    pub normalize: Option<bool>,
    /// Keep only so many leading numbers of each embedding.
    #[serde(default)]
    pub dimensions: Option<usize>,
    /// Cut inputs that are too long; by default as the server is set.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end is cut off.
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
}

/// Body of `POST /v2/models/{name}/infer`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InferRequest {
    /// Sent back in the answer.
    #[serde(default)]
    pub id: Option<String>,
    /// How.
    #[serde(default)]
    #[schema(value_type = Option<InferParameters>)]
    pub parameters: Option<Object<InferParameters>>,
    /// The input tensors.
    #[schema(value_type = Vec<InferTensor>)]
    pub inputs: Vec<Object<InferTensor>>,
    /// The outputs wanted; all of them by default, and if the list is empty.
    #[serde(default)]
    #[schema(value_type = Option<Vec<RequestedOutput>>)]
    pub outputs: Option<Vec<Object<RequestedOutput>>>,
}

impl Named for InferRequest {}

/// An output tensor.
#[derive(Debug, Serialize, ToSchema)]
pub struct InferredTensor {
    /// `embedding`; or `scores` and `logits` of a classifier.
    pub name: &'static str,
    /// `[n, numbers]`.
    pub shape: [usize; 2],
    /// Element type.
    #[schema(example = "FP32")]
    pub datatype: &'static str,
    /// The numbers, row-major.
    pub data: Vec<f32>,
}

/// Answer of `POST /v2/models/{name}/infer`.
#[derive(Debug, Serialize, ToSchema)]
pub struct InferResponse {
    /// Name of the model.
    pub model_name: String,
    /// Version of the model, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_version: Option<String>,
    /// The request's, if it had one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The output tensors.
    pub outputs: Vec<InferredTensor>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::api::MAX_ITEMS;

    #[test]
    fn data_is_flat_or_nested() {
        let read = |json: &str| serde_json::from_str::<TensorData>(json);
        let text = |items: &[&str]| {
            let items: Vec<String> = items.iter().map(|&item| item.to_owned()).collect();
            TensorData::Text(Bounded { n_sent: items.len(), items })
        };
        assert_eq!(read(r#"["a", "b"]"#).unwrap(), text(&["a", "b"]));
        assert_eq!(read(r#"[["a"], ["b"]]"#).unwrap(), text(&["a", "b"]));
        assert_eq!(read("[[1, 2], [3, -4]]").unwrap(), TensorData::Integers(vec![1, 2, 3, -4]));
        assert_eq!(read("[[], []]").unwrap(), TensorData::Empty);
        for wrong in ["1", "{}", r#"["a", 1]"#, "[1.5]", "[null]", "[true]", "[18446744073709551615]"] {
            assert!(read(wrong).unwrap_err().is_data(), "{wrong}");
        }
    }

    #[test]
    fn texts_beyond_the_limit_are_counted_and_not_kept() {
        let n_texts = MAX_ITEMS + 10;
        for entry in ["\"\"", "[\"\"]"] {
            let json = format!("[{}]", vec![entry; n_texts].join(","));
            let TensorData::Text(texts) = serde_json::from_str(&json).unwrap() else { panic!("{entry} is a text") };
            assert_eq!((texts.items.len(), texts.n_sent), (MAX_ITEMS, n_texts));
        }
    }
}
