//! A model under measurement: opened, loaded, with its tokenizer and what it takes.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::args::{ModelArgs, Place, Precision};
use super::model;
use super::players::{self, Loaded};
use crate::checkpoint::Checkpoint;
use crate::eval::{EncodeError, EvalError, Speed, SpeedSettings, batches, encoder, made_up_sequences, play};
use crate::telemetry::process;
use crate::text::Tokenizer;

/// The model inside the binary, where a directory is asked for.
const BUILTIN: &str = "@builtin";
/// Inputs that a model plays before its memory is read.
const WARM_UP_INPUTS: usize = 32;

/// A directory with the numbers to compute with: `DIR`, `DIR@f32`, `DIR@int8` or `@builtin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    /// `None` is the model inside the binary.
    pub(super) dir: Option<PathBuf>,
    /// As given.
    pub(super) precision: Option<Precision>,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, precision) = match text.rsplit_once('@') {
            Some((name, "f32")) => (name, Some(Precision::F32)),
            Some((name, "int8")) => (name, Some(Precision::Int8)),
            _ => (text, None),
        };
        match name {
            "" => Err(format!("`{text}` names no model")),
            BUILTIN => Ok(Self { dir: None, precision }),
            _ => Ok(Self { dir: Some(name.into()), precision }),
        }
    }
}

impl Named {
    /// The flags that open this model; where it names no precision, `precision` is used.
    pub(super) fn args(
        &self,
        precision: Precision,
        threads: Option<std::num::NonZeroUsize>,
        isa: Option<&str>,
    ) -> ModelArgs {
        ModelArgs {
            model: self.dir.iter().map(|dir| Place { name: None, dir: dir.clone() }).collect(),
            model_id: None,
            revision: "main".to_owned(),
            hf_token: None,
            huggingface_hub_cache: None,
            precision: self.precision.unwrap_or(precision),
            pooling: None,
            attention: None,
            max_input_length: None,
            threads,
            isa: isa.map(str::to_owned),
        }
    }
}

/// A model ready to be measured: what it gives are embeddings, also of a classifier.
pub(super) struct Subject {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) tokenizer: Tokenizer,
    pub(super) loaded: Loaded,
    pub(super) precision: Precision,
    /// By how much the process grew when the model was loaded and first used, before the next model was opened.
    grown: Option<u64>,
}

impl Subject {
    pub(super) fn open(args: &ModelArgs, n_workers: usize) -> anyhow::Result<Self> {
        let resident_before = process::resident_bytes();
        let checkpoint = model::open(args)?;
        let tokenizer = Tokenizer::from_bytes(checkpoint.tokenizer_json())?;
        let mut loaded = players::load_encoder(&checkpoint, args, n_workers)?;
        // As serving does: what was read once to be checked need not stay.
        checkpoint.release_pages();
        // Every worker's workspace, and the pages that any input touches.
        let inputs = made_up_sequences(checkpoint.architecture(), WARM_UP_INPUTS, 0);
        let inputs = batches(&inputs, SpeedSettings::default().batch_tokens, None)?;
        loaded.workers.iter_mut().try_for_each(|worker| play(std::slice::from_mut(worker), &inputs).map(drop))?;
        let grown = process::resident_bytes().zip(resident_before).map(|(now, then)| now.saturating_sub(then));
        Ok(Self { checkpoint, tokenizer, loaded, precision: args.precision, grown })
    }

    /// What to call it: its name, with the precision where the files do not tell it.
    pub(super) fn name(&self) -> String {
        match (self.precision, self.checkpoint.manifest()) {
            (Precision::F32, _) => format!("{} (f32)", self.checkpoint.name()),
            (Precision::Int8, None) => format!("{} (INT8 at load)", self.checkpoint.name()),
            (Precision::Int8, Some(_)) => self.checkpoint.name().to_owned(),
        }
    }

    /// Tokens of the longest text that it reads whole.
    pub(super) fn max_tokens(&self) -> usize {
        self.checkpoint.architecture().max_input_tokens
    }

    /// Text to token ids for this model.
    pub(super) fn encode(&self) -> impl Fn(&str) -> Result<Vec<u32>, EncodeError> + use<'_> {
        encoder(&self.tokenizer, self.max_tokens())
    }

    /// Token ids of texts.
    pub(super) fn sequences(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>, EvalError> {
        let encode = self.encode();
        texts.iter().map(|text| encode(text)).collect::<Result<_, _>>().map_err(EvalError::Encode)
    }

    /// Bytes of its weight files, and of its other files where it has a directory.
    pub(super) fn size_on_disk(&self) -> u64 {
        let other = |name: &str| {
            let dir = self.checkpoint.dir()?;
            Some(std::fs::metadata(dir.join(name)).ok()?.len())
        };
        self.checkpoint.weights_bytes() as u64
            + other("tokenizer.json").unwrap_or(self.checkpoint.tokenizer_json().len() as u64)
    }

    /// Bytes held in memory: those that the model counts itself now, and the growth of the process when it was opened and played
    /// inputs of up to 128 tokens. Other models are not counted; what the loading of earlier ones left behind can be reused.
    pub(super) fn memory(&self) -> Value {
        let workers = self.loaded.workers.iter().map(|worker| worker.memory());
        json!({
            "on_disk_bytes": self.size_on_disk(),
            "weight_file_bytes": self.checkpoint.weights_bytes(),
            "weights_bytes": workers.clone().map(|memory| memory.weights).max(),
            "workspace_peak_bytes": workers.map(|memory| memory.workspace_peak).sum::<usize>(),
            "resident_growth_bytes": self.grown,
        })
    }
}

/// One line for a reader.
pub(super) fn speed_line(speed: &Speed, n_threads: usize) -> String {
    format!(
        "single request p50 {:.2} ms, p99 {:.2} ms; load {:.0} tokens/s, {:.0} inputs/s ({} inputs of {:.1} tokens in \
         the mean, {n_threads} threads)",
        speed.p50_ms,
        speed.p99_ms,
        speed.tokens_per_s,
        speed.sequences_per_s,
        speed.n_sequences,
        speed.n_tokens as f64 / speed.n_sequences as f64
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_with_their_precision() {
        let named = |text: &str| text.parse::<Named>();
        let dir = |name: &str| Some(PathBuf::from(name));
        assert_eq!(named("a/b"), Ok(Named { dir: dir("a/b"), precision: None }));
        assert_eq!(named("a@b@f32"), Ok(Named { dir: dir("a@b"), precision: Some(Precision::F32) }));
        assert_eq!(named("m@int8"), Ok(Named { dir: dir("m"), precision: Some(Precision::Int8) }));
        assert_eq!(named("@builtin"), Ok(Named { dir: None, precision: None }));
        assert_eq!(named("@builtin@f32"), Ok(Named { dir: None, precision: Some(Precision::F32) }));
        assert!(named("@f32").is_err() && named("").is_err());
    }
}
