//! `attention`: which keys a query sees, layer by layer. The kernels visit no others.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{AttentionReport, CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::golden;
use crate::compress::measure::reference_player;
use crate::compress::progress::Progress;
use crate::compress::weights::Weights;
use crate::eval::{Embeddings, EncodeError, compare, embed};
use crate::model::{Architecture, Band};

/// Documents that fidelity is measured on.
const N_DOCUMENTS: usize = 6;
/// Their longest length in tokens: full attention over them is computed for comparison.
const DOCUMENT_TOKENS: usize = 1_024;

/// A pattern as it is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern(pub Band);

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Pattern;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pattern such as \"window=64,globals=cls\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Pattern, E> {
                text.parse().map(Pattern).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// Gives layers an attention pattern.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// The pattern, as `--attention` takes it.
    pub pattern: Pattern,
    /// These layers, counted from 0 (default: all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Longest input in tokens; beyond the position table, its rows repeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_input_length: Option<usize>,
}

impl Attention {
    fn layers(&self, n_layers: usize) -> Vec<usize> {
        self.layers.clone().unwrap_or_else(|| (0..n_layers).collect())
    }

    /// The architecture with the pattern in it.
    fn applied(&self, architecture: &Architecture) -> Result<Architecture, Refusal> {
        let mut spec = architecture.spec();
        let n_layers = spec.layers.len();
        for layer in self.layers(n_layers) {
            let Some(config) = spec.layers.get_mut(layer) else {
                let reason = format!("there is no layer {layer}, the last is {}", n_layers - 1);
                return Err(Refusal::new("layers", reason));
            };
            config.band = self.pattern.0;
        }
        if let Some(limit) = self.max_input_length {
            // Positions may only be tiled where attention is banded: full attention over tiled positions was never
            // trained.
            let beyond = limit > spec.positions.usable();
            if beyond && spec.layers.iter().all(|layer| layer.band == Band::FULL) {
                let reason = format!("{limit} is beyond the {} positions of the table", spec.positions.usable());
                return Err(Refusal::new(
                    "max_input_length",
                    reason + ", which only a pattern other than `full` can be",
                ));
            }
            spec.positions.tiled |= beyond;
            spec.max_input_tokens = limit;
        }
        Architecture::new(spec).map_err(|error| Refusal::new("max_input_length", error.to_string()))
    }
}

/// Documents of at least `len` tokens: texts one after the other, each document starting at another.
fn documents(work: &Work<'_>, len: usize) -> Vec<String> {
    let texts: Vec<&str> = match work.text.as_ref().filter(|text| !text.held_out.is_empty()) {
        Some(text) => text.held_out.iter().map(String::as_str).collect(),
        None => golden::TEXTS.to_vec(),
    };
    let document = |index: usize| {
        let mut words = String::new();
        // A token is hardly ever longer than ten letters.
        for text in texts.iter().cycle().skip(index * texts.len() / N_DOCUMENTS) {
            if words.len() > 10 * len {
                break;
            }
            words.push_str(text);
            words.push(' ');
        }
        words
    };
    (0..N_DOCUMENTS).map(document).collect()
}

impl CompressionPass for Attention {
    fn stage(&self) -> Stage {
        Stage::Any
    }

    fn needs_text(&self) -> bool {
        false
    }

    fn summary(&self) -> String {
        let layers = match &self.layers {
            None => "every layer".to_owned(),
            Some(layers) => format!("layers {}", layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
        };
        let length = self.max_input_length.map_or(String::new(), |limit| format!(", inputs of up to {limit} tokens"));
        format!("{} in {layers}{length}", self.pattern.0)
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        if self.layers.as_ref().is_some_and(Vec::is_empty) {
            return Err(Refusal::new("layers", "name one at least, or leave it out for all"));
        }
        self.applied(architecture).map(drop)
    }

    fn leaves(&self, architecture: &Architecture) -> Architecture {
        self.applied(architecture).unwrap_or_else(|_| architecture.clone())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let architecture = self
            .applied(work.model.architecture())
            .map_err(|refusal| CompressError::Setting { setting: refusal.field.to_owned(), reason: refusal.reason })?;
        progress.phase_started("attention", 2 * N_DOCUMENTS as u64);
        work.model.set_attention(&architecture)?;
        work.reference.set_attention(&architecture)?;
        work.refresh_encoder()?;
        let len = architecture.max_input_tokens.min(DOCUMENT_TOKENS);
        let documents = documents(work, len);
        let texts: Vec<&str> = documents.iter().map(String::as_str).collect();
        let encode = |text: &str| -> Result<Vec<u32>, EncodeError> {
            let mut ids = (work.encode)(text)?;
            ids.truncate(len);
            Ok(ids)
        };
        let embeddings = |model: &Weights| -> Result<Embeddings, CompressError> {
            let found = embed(&mut reference_player(model, false)?, &encode, &texts, |n| progress.advanced(n as u64))?;
            Ok(found)
        };
        let mut full = work.model.clone();
        let mut spec = architecture.spec();
        spec.layers.iter_mut().for_each(|layer| layer.band = Band::FULL);
        full.set_attention(&Architecture::new(spec)?)?;
        let fidelity = compare(&embeddings(&full)?, &embeddings(&work.model)?)?;
        progress.phase_finished();
        let pairs = |band: Band| band.n_pairs(len) as f64;
        let share = architecture.layers.iter().map(|layer| pairs(layer.band)).sum::<f64>()
            / (architecture.layers.len() as f64 * pairs(Band::FULL)).max(1.0);
        let attention = AttentionReport {
            n_documents: documents.len(),
            n_tokens: len,
            pairs: share,
            cosine_mean: golden::round_cosine(fidelity.mean),
            cosine_min: golden::round_cosine(fidelity.min),
        };
        let notes = vec![attention.to_string()];
        Ok(PassReport { attention: Some(attention), notes, ..PassReport::default() })
    }
}
