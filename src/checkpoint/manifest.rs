//! `niwaki.json`: what an artefact is, where it comes from and how good it was measured to be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::model::ArchitectureSpec;

/// The file's name; its presence makes a model directory an artefact.
pub const MANIFEST_FILE: &str = "niwaki.json";

/// The newest format that this build reads and the one that it writes. Version 2 added forms of stored matrices (see
/// `hf_names`); what version 1 wrote means the same.
pub const FORMAT_VERSION: u32 = 2;

/// The manifest of an artefact. Fields that a newer build of the same format version adds are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format_version: u32,
    /// The program that wrote the artefact.
    pub generator: String,
    /// Name of the model.
    pub model: String,
    /// The shape of the compressed model, layer by layer.
    pub architecture: ArchitectureSpec,
    /// How it was made.
    pub recipe: Recipe,
    /// What it was made from.
    pub source: Source,
    /// The text that importances and reconstructions were measured on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// What was removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pruning: Option<Pruning>,
    /// Storage scheme of each group of tensors, such as `"linear": "int8-per-channel"`.
    pub schemes: BTreeMap<String, String>,
    /// Sizes.
    pub size: SizeReport,
    /// Measured quality against the uncompressed model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,
    /// Inputs with the answers that the artefact must give.
    #[serde(default)]
    pub golden: Vec<Golden>,
    /// sha256 of the artefact's other files.
    pub files: BTreeMap<String, String>,
}

/// How an artefact was made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The command line that makes the same bytes from the same inputs.
    pub command: String,
    /// Seed of every random choice.
    pub seed: u64,
    /// Passes in order, with their settings.
    pub passes: Vec<String>,
}

/// What an artefact was made from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Name of the source model.
    pub model: String,
    /// sha256 of its weights.
    pub weights_sha256: String,
    /// Bytes of its weights.
    pub weights_bytes: u64,
    /// Its licence, when the model card names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
}

/// Calibration text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// sha256 of the file.
    pub sha256: String,
    /// Texts used.
    pub n_texts: usize,
    /// Tokens used, no padding.
    pub n_tokens: usize,
}

/// What structured pruning removed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Pruning {
    /// How importance was measured.
    pub importance: String,
    /// Heads before and after, per layer.
    pub heads: Vec<(usize, usize)>,
    /// FFN neurons before and after, per layer.
    pub ffn: Vec<(usize, usize)>,
    /// Multiply-accumulates per token of the encoder's linear layers, before and after.
    pub macs_per_token: (u64, u64),
}

/// Bytes before and after.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SizeReport {
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the artefact's tensors.
    pub artefact_bytes: u64,
}

/// Quality against the uncompressed model on held-out or calibration text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// What was measured on.
    pub measured_on: String,
    /// Texts.
    pub n_texts: usize,
    /// Mean cosine to the uncompressed model's embeddings.
    pub cosine_mean: f64,
    /// First percentile of that cosine.
    pub cosine_p1: f64,
    /// The smallest cosine.
    pub cosine_min: f64,
}

/// One input of the self-check.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// The text.
    pub text: String,
    /// Its token ids, special tokens included.
    pub ids: Vec<u32>,
    /// The uncompressed model's embedding, normalised.
    pub reference: Vec<f32>,
    /// Cosine between the artefact's embedding and `reference`, as measured when it was written.
    pub cosine: f64,
    /// With a classification head: the uncompressed model's numbers, one per label.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
    /// Largest difference of the artefact's numbers to `scores`, as measured when it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score_error: Option<f64>,
}

impl Manifest {
    /// Parses and checks the version first, so that a newer format is named as such.
    ///
    /// # Errors
    /// If the JSON is damaged, a field is missing or the format is newer.
    pub fn parse(bytes: &[u8]) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let json = |source| CheckpointError::Json { file: MANIFEST_FILE.to_owned(), source };
        let Version { format_version } = serde_json::from_slice(bytes).map_err(json)?;
        if format_version > FORMAT_VERSION {
            return Err(CheckpointError::NewerManifest { got: format_version, supported: FORMAT_VERSION });
        }
        serde_json::from_slice(bytes).map_err(json)
    }

    /// The form that is written: stable order, indented.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn to_json(&self) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|source| CheckpointError::Json { file: MANIFEST_FILE.to_owned(), source })?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}
