//! The report of a compression: what every pass did, what is left of every group of tensors, what each layer's share of
//! the loss is. As data (`report.json`) and as a page (`report.html`), both in the artefact.
//!
//! Nothing in it depends on the machine's speed, unless speed was asked for: reports belong to the artefact, whose bytes
//! are reproducible.

use serde::Serialize;

use super::CompressError;
use super::measure::Probe;
use super::passes::PassReport;
use super::progress::Progress;
use super::weights::Weights;
use crate::checkpoint::{Checkpoint, GroupSize, Manifest, Quality, TensorGroup};
use crate::eval::{Encode, Speed, compare};
use crate::model::{Architecture, Band};

/// Sequence length that the pairs of attention patterns are counted at.
pub(super) const PATTERN_TOKENS: usize = 512;

/// A model on the way from the source to what was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stop {
    /// After which pass.
    pub after: String,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Multiply-accumulates per token of the linear layers.
    pub macs_per_token: u64,
    /// Mean cosine to the source's embeddings.
    pub cosine: f64,
}

/// What a part costs alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartLoss {
    /// `embedding` or a layer of the source.
    pub part: String,
    /// `1 − cosine` of the sentence embedding in the mean when this part alone is as in the artefact and all others as in
    /// the source.
    pub loss: f64,
    /// Bytes of the part in the artefact.
    pub bytes: u64,
}

/// A layer's attention pattern.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerPattern {
    /// The layer of the artefact.
    pub layer: usize,
    /// The pattern as it is typed.
    pub pattern: String,
    /// Share of the pairs of query and key that are visited, at a length of 512 tokens.
    pub pairs: f64,
    #[serde(skip)]
    pub(super) band: Band,
}

/// Speed of the source in f32 and of the artefact, measured in turn.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Speeds {
    /// Instruction set and threads.
    pub machine: String,
    /// The source, by the f32 player.
    pub source: Speed,
    /// The artefact, by the INT8 player.
    pub artefact: Speed,
}

/// Everything that is known about a compression.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the artefact.
    pub model: String,
    /// Name of the source.
    pub source: String,
    /// The program that made it.
    pub generator: String,
    /// The command that makes it again.
    pub command: String,
    /// Tensors of the source by group.
    pub before: Vec<GroupSize>,
    /// Tensors of the artefact by group.
    pub after: Vec<GroupSize>,
    /// The way from the source to the artefact.
    pub way: Vec<Stop>,
    /// What each part costs alone.
    pub parts: Vec<PartLoss>,
    /// Attention patterns of the artefact.
    pub attention: Vec<LayerPattern>,
    /// Cosine of the written files to the source.
    pub quality: Option<Quality>,
    /// What each pass did.
    pub passes: Vec<PassReport>,
    /// Measured speed, when it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speeds>,
}

/// What each part of `model` costs alone: `dense` with only this part as in `model`, which reads the same vocabulary.
///
/// # Errors
/// If a player fails.
pub(super) fn part_losses(
    dense: &Weights,
    model: &Weights,
    probe: &Probe,
    encode: &Encode<'_>,
    progress: &dyn Progress,
) -> Result<Vec<PartLoss>, CompressError> {
    let n_layers = dense.architecture().layers.len();
    progress.phase_started("loss of each layer", n_layers as u64 + 1);
    let expected = probe.embeddings(dense, encode)?;
    let mut parts = Vec::with_capacity(n_layers + 1);
    let mut add = |part: String, candidate: &Weights, bytes: u64| -> Result<(), CompressError> {
        let loss = (1.0 - compare(&expected, &probe.embeddings(candidate, encode)?)?.mean).max(0.0);
        // Digits beyond these depend on the order of sums.
        parts.push(PartLoss { part, loss: (loss * 1e5).round() / 1e5, bytes });
        progress.advanced(1);
        Ok(())
    };
    let mut candidate = dense.clone();
    candidate.take_tables(model);
    add("embedding".to_owned(), &candidate, model.bytes_of(None))?;
    for layer in 0..n_layers {
        let now = model.origins().iter().position(|&origin| origin == layer);
        let mut candidate = dense.clone();
        match now {
            Some(now) => candidate.take_layer(layer, model, now)?,
            None => candidate.keep_layers(&(0..n_layers).filter(|&other| other != layer).collect::<Vec<_>>())?,
        }
        let part = if now.is_some() { format!("layer {layer}") } else { format!("layer {layer}, gone") };
        add(part, &candidate, now.map_or(0, |now| model.bytes_of(Some(now))))?;
    }
    progress.phase_finished();
    Ok(parts)
}

/// The patterns of all layers.
pub(super) fn patterns(architecture: &Architecture) -> Vec<LayerPattern> {
    let len = PATTERN_TOKENS.min(architecture.max_input_tokens);
    let all = Band::FULL.n_pairs(len) as f64;
    let of = |(layer, config): (usize, &crate::model::LayerConfig)| LayerPattern {
        layer,
        pattern: config.band.to_string(),
        pairs: config.band.n_pairs(len) as f64 / all,
        band: config.band,
    };
    architecture.layers.iter().enumerate().map(of).collect()
}

impl Report {
    /// Puts together what is known.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub(super) fn new(
        source: &Checkpoint,
        written: &Checkpoint,
        manifest: &Manifest,
        passes: Vec<PassReport>,
        mut way: Vec<Stop>,
        parts: Vec<PartLoss>,
    ) -> Result<Self, CompressError> {
        let inventory = written.inventory()?;
        if let Some(quality) = &manifest.quality {
            way.push(Stop {
                after: "as written".to_owned(),
                bytes: manifest.size.artefact_bytes,
                macs_per_token: inventory.macs_per_token(),
                cosine: quality.cosine_mean,
            });
        }
        Ok(Self {
            model: manifest.model.clone(),
            source: manifest.source.model.clone(),
            generator: manifest.generator.clone(),
            command: manifest.recipe.command.clone(),
            before: source.inventory()?.groups,
            after: inventory.groups,
            way,
            parts,
            attention: patterns(written.architecture()),
            quality: manifest.quality.clone(),
            passes,
            speed: None,
        })
    }

    /// The form that is written: stable order, indented.
    ///
    /// # Panics
    /// Never: a report is plain values.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a report is plain values");
        bytes.push(b'\n');
        bytes
    }

    /// Bytes of a group before and after.
    pub(super) fn bytes_of(&self, group: TensorGroup) -> (u64, u64) {
        let of = |groups: &[GroupSize]| groups.iter().find(|size| size.group == group).map_or(0, |size| size.bytes);
        (of(&self.before), of(&self.after))
    }
}
