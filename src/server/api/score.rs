//! Bodies of the routes that score texts and pairs of texts.

use std::fmt;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::openapi::schema::{AnyOf, Array, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::inputs::{Bounded, Object};
use super::{Named, OpenAiUsage, TruncationDirection};

/// A text, or two that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sentence {
    /// One text.
    One(String),
    /// A pair.
    Two(String, String),
}

impl<'de> Deserialize<'de> for Sentence {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Sentence;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of one string or two")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Sentence, A::Error> {
                let first = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(0, &self))?;
                rest_of_sentence(first, seq)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// What follows the first string of a list of one or two.
fn rest_of_sentence<'de, A: SeqAccess<'de>>(first: String, mut seq: A) -> Result<Sentence, A::Error> {
    let Some(second) = seq.next_element()? else { return Ok(Sentence::One(first)) };
    match seq.next_element::<String>()? {
        None => Ok(Sentence::Two(first, second)),
        Some(_) => Err(A::Error::invalid_length(3, &"a list of one string or two")),
    }
}

/// The inputs of `POST /predict`: `"s"`, `["s"]` or `["a", "b"]` (a pair), or a list of lists of one or two strings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PredictInput {
    /// One text or pair.
    One(Sentence),
    /// A list of them.
    Many(Bounded<Sentence>),
}

impl<'de> Deserialize<'de> for PredictInput {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// The first entry of a list says what the list is.
        enum First {
            Text(String),
            Sentence(Sentence),
        }
        impl<'de> Deserialize<'de> for First {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct FirstVisitor;
                impl<'de> Visitor<'de> for FirstVisitor {
                    type Value = First;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a string, or a list of one string or two")
                    }
                    fn visit_str<E>(self, text: &str) -> Result<First, E> {
                        Ok(First::Text(text.to_owned()))
                    }
                    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<First, A::Error> {
                        Sentence::deserialize(SeqAccessDeserializer::new(seq)).map(First::Sentence)
                    }
                }
                deserializer.deserialize_any(FirstVisitor)
            }
        }
        struct InputVisitor;
        impl<'de> Visitor<'de> for InputVisitor {
            type Value = PredictInput;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of one string or two, or a list of such lists")
            }
            fn visit_str<E>(self, text: &str) -> Result<PredictInput, E> {
                Ok(PredictInput::One(Sentence::One(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PredictInput, A::Error> {
                let mut many = Bounded::new();
                match seq.next_element()? {
                    None => Ok(PredictInput::Many(many)),
                    Some(First::Text(first)) => rest_of_sentence(first, seq).map(PredictInput::One),
                    Some(First::Sentence(sentence)) => {
                        many.push(sentence);
                        many.fill(seq).map(PredictInput::Many)
                    }
                }
            }
        }
        deserializer.deserialize_any(InputVisitor)
    }
}

/// Body of `POST /predict`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct PredictRequest {
    /// Texts or pairs of texts.
    pub inputs: PredictInput,
    /// Cut inputs that are too long; by default as the server is set.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end is cut off.
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// The model's numbers as they are, instead of scores between 0 and 1.
    #[serde(default)]
    pub raw_scores: bool,
}

/// A label and its score.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    /// How much the label fits.
    pub score: f32,
    /// The label.
    pub label: String,
}

/// Answer of `POST /predict`: as many as were asked for.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Predictions {
    /// Labels of the text or pair.
    One(Vec<Prediction>),
    /// Labels of each of a list of them.
    Many(Vec<Vec<Prediction>>),
}

/// Body of `POST /rerank`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct RerankRequest {
    /// What is asked.
    pub query: String,
    /// What may answer it.
    #[schema(value_type = Vec<String>)]
    pub texts: Bounded<String>,
    /// Cut pairs that are too long, the longer text first; by default as the server is set.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end is cut off.
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// The model's numbers as they are, instead of scores between 0 and 1.
    #[serde(default)]
    pub raw_scores: bool,
    /// Send the texts back with their scores.
    #[serde(default)]
    pub return_text: bool,
}

/// A text's place in the answer of `POST /rerank`, best first.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Rank {
    /// Position of the text in the request.
    pub index: usize,
    /// The text, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// How well it answers.
    pub score: f32,
}

/// A document of `POST /v1/rerank`: a string, or an object with a `text`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document(pub String);

/// A document as an object.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct DocumentText {
    /// Its text.
    pub text: String,
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DocumentVisitor;
        impl<'de> Visitor<'de> for DocumentVisitor {
            type Value = Document;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an object with a `text`")
            }
            fn visit_str<E>(self, text: &str) -> Result<Document, E> {
                Ok(Document(text.to_owned()))
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Document, A::Error> {
                let object = serde::de::value::MapAccessDeserializer::new(map);
                Object::<DocumentText>::deserialize(object).map(|Object(object)| Document(object.text))
            }
        }
        deserializer.deserialize_any(DocumentVisitor)
    }
}

/// Body of `POST /v1/rerank`, of Cohere's and Jina's APIs.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CohereRerankRequest {
    /// Which model; anything where there is only one.
    #[serde(default)]
    pub model: Option<String>,
    /// What is asked.
    pub query: String,
    /// What may answer it: strings, or objects with a `text`.
    #[schema(value_type = Vec<Document>)]
    pub documents: Bounded<Document>,
    /// How many of the best to answer with; all by default.
    #[serde(default)]
    pub top_n: Option<usize>,
    /// Send the documents back.
    #[serde(default)]
    pub return_documents: Option<bool>,
}

/// A document's place in the answer of `POST /v1/rerank`, best first.
#[derive(Debug, Serialize, ToSchema)]
pub struct CohereResult {
    /// Position of the document in the request.
    pub index: usize,
    /// How well it answers.
    pub relevance_score: f32,
    /// The document, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<DocumentText>,
}

/// Answer of `POST /v1/rerank`.
#[derive(Debug, Serialize, ToSchema)]
pub struct CohereRerankResponse {
    /// The request's id.
    pub id: String,
    /// Always `list`.
    #[schema(example = "list")]
    pub object: &'static str,
    /// Name under which the model is served.
    pub model: String,
    /// The best documents, best first.
    pub results: Vec<CohereResult>,
    /// Tokens.
    pub usage: OpenAiUsage,
}

impl Named for PredictRequest {}
impl Named for RerankRequest {}
impl Named for CohereRerankRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }
}

fn text_schema() -> Schema {
    Schema::Object(ObjectBuilder::new().schema_type(SchemaType::Type(Type::String)).build())
}

fn any_of(schemas: impl IntoIterator<Item = RefOr<Schema>>) -> RefOr<Schema> {
    let mut any = AnyOf::new();
    any.items = schemas.into_iter().collect();
    RefOr::T(Schema::AnyOf(any))
}

impl PartialSchema for PredictInput {
    fn schema() -> RefOr<Schema> {
        let mut sentence = Array::new(text_schema());
        (sentence.min_items, sentence.max_items) = (Some(1), Some(2));
        let sentences = Array::new(Schema::Array(sentence.clone()));
        any_of([RefOr::T(text_schema()), RefOr::T(Schema::Array(sentence)), RefOr::T(Schema::Array(sentences))])
    }
}
impl ToSchema for PredictInput {}

impl PartialSchema for Document {
    fn schema() -> RefOr<Schema> {
        any_of([RefOr::T(text_schema()), RefOr::Ref(Ref::from_schema_name("DocumentText"))])
    }
}
impl ToSchema for Document {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push(("DocumentText".to_owned(), DocumentText::schema()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_asked_for_in_every_shape() {
        let read = |json: &str| serde_json::from_str::<PredictInput>(json);
        let one = |text: &str| Sentence::One(text.to_owned());
        let two = |a: &str, b: &str| Sentence::Two(a.to_owned(), b.to_owned());
        assert_eq!(read(r#""a""#).unwrap(), PredictInput::One(one("a")));
        assert_eq!(read(r#"["a"]"#).unwrap(), PredictInput::One(one("a")));
        assert_eq!(read(r#"["a", "b"]"#).unwrap(), PredictInput::One(two("a", "b")));
        let many = Bounded { items: vec![one("a"), two("b", "c")], n_sent: 2 };
        assert_eq!(read(r#"[["a"], ["b", "c"]]"#).unwrap(), PredictInput::Many(many));
        assert_eq!(read("[]").unwrap(), PredictInput::Many(Bounded { items: vec![], n_sent: 0 }));
        for wrong in ["null", "1", "{}", r#"["a","b","c"]"#, "[[]]", r#"[["a","b","c"]]"#, r#"["a",["b"]]"#, "[[1]]"] {
            assert!(read(wrong).unwrap_err().is_data(), "{wrong}");
        }
    }

    #[test]
    fn documents_are_strings_or_objects() {
        let read = |json: &str| serde_json::from_str::<Document>(json).map(|document| document.0);
        assert_eq!(read(r#""a""#).unwrap(), "a");
        assert_eq!(read(r#"{"text": "a", "title": "t"}"#).unwrap(), "a");
        assert!(read("{}").is_err() && read("1").is_err() && read(r#"["a"]"#).is_err());
    }
}
