//! A smaller vocabulary: rows of the word embedding that text hardly needs go, and their words split into pieces that
//! stay.

mod ids;

pub(super) use ids::NewIds;

use serde_json::{Map, Value};

/// What a tokenizer's vocabulary can be told apart by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// Not a WordPiece model.
    #[error(
        "tokenizer.json: its model is {0}; only WordPiece vocabularies can be pruned, because only there a word whose \
         entry goes splits into shorter entries"
    )]
    Model(String),
    /// A field that is missing or of another type.
    #[error("tokenizer.json: {0} is missing or not what it should be")]
    Field(String),
    /// The vocabulary and the table differ.
    #[error("tokenizer.json: token `{token}` has id {id}, but the word embedding has {rows} rows")]
    Range {
        /// The token.
        token: String,
        /// Its id.
        id: u64,
        /// Rows of the table.
        rows: usize,
    },
    /// Fewer entries than must stay.
    #[error("{asked} entries are fewer than the {needed} that must stay: special tokens and single characters")]
    TooFew {
        /// Entries wanted.
        asked: usize,
        /// Entries that cannot go.
        needed: usize,
    },
}

/// A WordPiece vocabulary as it stands in a `tokenizer.json`.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    json: Value,
    /// Tokens in order of id, with their ids.
    entries: Vec<(String, u32)>,
    /// Whether an entry must stay.
    fixed: Vec<bool>,
}

/// A vocabulary with fewer entries.
#[derive(Debug, Clone, PartialEq)]
pub struct PrunedVocabulary {
    /// Old ids in rising order; the new id is the place in this list.
    pub kept: Vec<u32>,
    /// The new `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// The new `vocab.txt`: one token a line, in order of id.
    pub vocab_txt: Vec<u8>,
}

fn field(name: &str) -> VocabularyError {
    VocabularyError::Field(name.to_owned())
}

impl Vocabulary {
    /// Reads a `tokenizer.json` for a word embedding of `rows` rows.
    ///
    /// # Errors
    /// If it is not WordPiece or not consistent.
    pub fn read(tokenizer_json: &[u8], rows: usize) -> Result<Self, VocabularyError> {
        let json: Value = serde_json::from_slice(tokenizer_json).map_err(|_| field("the file as a whole"))?;
        let model = &json["model"];
        let vocab = model["vocab"].as_object();
        // Old files name no type; WordPiece is told by its prefix of continuations.
        let kind = model["type"].as_str().unwrap_or(if model["continuing_subword_prefix"].is_string() {
            "WordPiece"
        } else {
            "of unknown type"
        });
        if kind != "WordPiece" {
            return Err(VocabularyError::Model(kind.to_owned()));
        }
        let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("##").to_owned();
        let vocab = vocab.ok_or_else(|| field("model.vocab"))?;
        let mut entries = Vec::with_capacity(vocab.len());
        let mut insert = |token: &str, id: &Value| {
            let id = id.as_u64().ok_or_else(|| field("model.vocab"))?;
            if id >= rows as u64 {
                return Err(VocabularyError::Range { token: token.to_owned(), id, rows });
            }
            #[allow(clippy::cast_possible_truncation, reason = "below the rows of a table, of which there are 2^24")]
            entries.push((token.to_owned(), id as u32));
            Ok(())
        };
        for (token, id) in vocab {
            insert(token, id)?;
        }
        let mut special: Vec<String> = model["unk_token"].as_str().map(str::to_owned).into_iter().collect();
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let token = added["content"].as_str().ok_or_else(|| field("added_tokens[].content"))?;
            if !vocab.contains_key(token) {
                insert(token, &added["id"])?;
            }
            special.push(token.to_owned());
        }
        entries.sort_by_key(|(_, id)| *id);
        let single = |token: &str| token.strip_prefix(prefix.as_str()).unwrap_or(token).chars().count() <= 1;
        let fixed = entries.iter().map(|(token, _)| single(token) || special.iter().any(|s| s == token)).collect();
        Ok(Self { json, entries, fixed })
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Entries that must stay: special tokens, and single characters, so that every word that could be split still can
    /// be.
    #[must_use]
    pub fn n_fixed(&self) -> usize {
        self.fixed.iter().filter(|&&fixed| fixed).count()
    }

    /// Keeps the `n_kept` entries that occur most often by `counts[id]`. Among entries that occur equally often those
    /// with the lower id stay: vocabularies are written in order of frequency.
    ///
    /// # Errors
    /// If more must stay, or the file's other parts name what is not in the vocabulary.
    pub fn prune(&self, counts: &[u64], n_kept: usize) -> Result<PrunedVocabulary, VocabularyError> {
        if n_kept < self.n_fixed() {
            return Err(VocabularyError::TooFew { asked: n_kept, needed: self.n_fixed() });
        }
        let count = |id: u32| counts.get(id as usize).copied().unwrap_or(0);
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        order.sort_by_key(|&index| {
            (!self.fixed[index], std::cmp::Reverse(count(self.entries[index].1)), self.entries[index].1)
        });
        let mut kept: Vec<&(String, u32)> = order.iter().take(n_kept).map(|&index| &self.entries[index]).collect();
        kept.sort_by_key(|(_, id)| *id);
        let new_id = |token: &str| {
            let place = kept.iter().position(|(kept, _)| kept == token);
            place.and_then(|place| u32::try_from(place).ok())
        };
        let mut json = self.json.clone();
        let vocab: Map<String, Value> =
            kept.iter().enumerate().map(|(id, (token, _))| (token.clone(), Value::from(id))).collect();
        for added in json["added_tokens"].as_array_mut().into_iter().flatten() {
            let token = added["content"].as_str().unwrap_or_default();
            added["id"] = new_id(token).ok_or_else(|| field("added_tokens[].content"))?.into();
        }
        renumber_post_processor(&mut json["post_processor"], &new_id)?;
        if let Some(padding) = json.get_mut("padding").and_then(Value::as_object_mut) {
            let token = padding.get("pad_token").and_then(Value::as_str).unwrap_or_default();
            let id = new_id(token).ok_or_else(|| field("padding.pad_token"))?;
            padding.insert("pad_id".to_owned(), id.into());
        }
        json["model"]["vocab"] = Value::Object(vocab);
        let tokenizer_json = serde_json::to_vec(&json).map_err(|_| field("the file as a whole"))?;
        let vocab_txt = kept.iter().flat_map(|(token, _)| [token.as_bytes(), b"\n"].concat()).collect();
        Ok(PrunedVocabulary { kept: kept.iter().map(|(_, id)| *id).collect(), tokenizer_json, vocab_txt })
    }
}

/// `TemplateProcessing` lists ids per special token; BERT's and RoBERTa's processors hold `[token, id]` pairs.
fn renumber_post_processor(
    processor: &mut Value,
    new_id: &impl Fn(&str) -> Option<u32>,
) -> Result<(), VocabularyError> {
    match processor["type"].as_str() {
        Some("TemplateProcessing") => {
            for special in processor["special_tokens"].as_object_mut().into_iter().flat_map(Map::values_mut) {
                let tokens = special["tokens"].as_array().ok_or_else(|| field("post_processor.special_tokens"))?;
                let ids: Option<Vec<Value>> =
                    tokens.iter().map(|token| Some(Value::from(new_id(token.as_str()?)?))).collect();
                special["ids"] = Value::Array(ids.ok_or_else(|| field("post_processor.special_tokens"))?);
            }
        }
        Some("BertProcessing" | "RobertaProcessing") => {
            for end in ["sep", "cls"] {
                let token = processor[end][0].as_str().unwrap_or_default().to_owned();
                processor[end][1] = new_id(&token).ok_or_else(|| field("post_processor"))?.into();
            }
        }
        Some("Sequence") => {
            for part in processor["processors"].as_array_mut().into_iter().flatten() {
                renumber_post_processor(part, new_id)?;
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
#[path = "vocabulary/tests.rs"]
mod tests;
