//! What a recipe can ask for: one file per pass, one line in the list below.

mod activations;
mod attention;
mod correct_bias;
mod drop_layers;
mod low_rank;
mod mixed_precision;
mod prune_blocks;
mod prune_structured;
mod prune_unstructured;
mod quantize;
mod reconstruct;
mod report;
mod sensitivity;
mod smooth;
mod vocabulary;
mod zeros;

use std::rc::Rc;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::CompressError;
use super::calibration::CalibrationText;
use super::progress::Progress;
use super::slots::Group;
use super::weights::Weights;
use crate::eval::{Encode, encoder};
use crate::exec::Runtime;
use crate::model::Architecture;
use crate::text::Tokenizer;

use activations::Activations;
pub use attention::{Attention, Pattern as AttentionPattern};
pub use correct_bias::CorrectBias;
pub use drop_layers::DropLayers;
pub use low_rank::{LowRank, Metric};
pub use mixed_precision::MixedPrecision;
pub use prune_blocks::PruneBlocks;
pub use prune_structured::PruneStructured;
pub use prune_unstructured::PruneUnstructured;
pub use quantize::{Compensate, Format, Per, Quantize, Weighting};
pub use reconstruct::Reconstruct;
pub(super) use report::relative_error;
pub use report::{AttentionReport, LayerReport, MatrixReport, PassReport};
pub use sensitivity::Sensitivity;
pub use smooth::Smooth;
pub use vocabulary::Vocabulary as VocabularyPass;
use vocabulary::Vocabulary;

/// What passes work on.
pub struct Work<'a> {
    /// The model as it came: the teacher of everything that is fitted.
    pub dense: Weights,
    /// The model under work.
    pub model: Weights,
    /// The model as it was before the first pass that stores: of the same shape, in full precision.
    pub reference: Weights,
    /// The calibration text, when a pass of the recipe needs it.
    pub text: Option<Arc<CalibrationText>>,
    /// Seed of every random choice.
    pub seed: u64,
    /// Text to token ids, as the model under work reads it.
    pub encode: Rc<Encode<'static>>,
    /// The tokenizer of the model under work.
    pub tokenizer_json: Vec<u8>,
    /// Its vocabulary as a list, when a pass has changed it.
    pub vocab_txt: Option<Vec<u8>>,
    /// The serving player on this machine, for what is measured rather than counted.
    pub runtime: &'a Runtime,
}

impl std::fmt::Debug for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("seed", &self.seed).finish_non_exhaustive()
    }
}

impl Work<'_> {
    /// The calibration text of a pass that [needs it](CompressionPass::needs_text).
    ///
    /// # Errors
    /// If there is none.
    pub fn text(&self) -> Result<Arc<CalibrationText>, CompressError> {
        self.text.clone().ok_or(CompressError::NoText)
    }
}

impl Work<'_> {
    /// Makes [`Work::encode`] anew, after the tokenizer or the longest input has changed.
    ///
    /// # Errors
    /// If the tokenizer cannot be read.
    pub(super) fn refresh_encoder(&mut self) -> Result<(), CompressError> {
        self.encode = owned_encoder(&self.tokenizer_json, self.model.architecture().max_input_tokens)?;
        Ok(())
    }
}

/// An encoder that owns its tokenizer.
///
/// # Errors
/// If the tokenizer cannot be read.
pub(super) fn owned_encoder(tokenizer_json: &[u8], max_tokens: usize) -> Result<Rc<Encode<'static>>, CompressError> {
    let tokenizer = Tokenizer::from_bytes(tokenizer_json)?;
    Ok(Rc::new(move |text: &str| encoder(&tokenizer, max_tokens)(text)))
}

/// Where in a recipe a pass may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Changes shapes or full-precision numbers; must come before any [`Stage::Store`].
    Shape,
    /// Fixes how matrices are stored.
    Store,
    /// Makes up for what storing cost; must come after a [`Stage::Store`].
    Correct,
    /// Stands anywhere: what it does holds for stored matrices too.
    Any,
}

/// A setting that cannot be, known before any work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The pass's field; empty when it is the pass as a whole.
    pub field: &'static str,
    /// What is wrong, with the values.
    pub reason: String,
}

impl Refusal {
    /// Refuses a field's value.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self { field, reason: reason.into() }
    }
}

/// A pass: its fields are the TOML fields of its kind.
pub trait CompressionPass {
    /// Where it may stand.
    fn stage(&self) -> Stage;

    /// Whether it measures on calibration text.
    fn needs_text(&self) -> bool;

    /// One line for the manifest and the card.
    fn summary(&self) -> String;

    /// Refuses what can be known to be impossible for a model of this shape, which is what earlier passes leave.
    ///
    /// # Errors
    /// Naming the field.
    fn check(&self, architecture: &Architecture) -> Result<(), Refusal>;

    /// The shape that it leaves of one that it accepts, as far as that is known before any work: later passes are checked on it.
    fn leaves(&self, architecture: &Architecture) -> Architecture {
        architecture.clone()
    }

    /// Refuses what can be known to be impossible for a tokenizer whose word embedding has `rows` rows.
    ///
    /// # Errors
    /// Naming the field.
    fn check_tokenizer(&self, _tokenizer_json: &[u8], _rows: usize) -> Result<(), Refusal> {
        Ok(())
    }

    /// The matrices whose stored form it fixes; those of two passes may not overlap.
    fn stores(&self) -> Option<Group> {
        None
    }

    /// Does it.
    ///
    /// # Errors
    /// If a player or a factorisation fails.
    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError>;
}

/// The list of passes: the enum, its TOML names, and how each is read.
macro_rules! passes {
    ($($kind:literal => $name:ident),* $(,)?) => {
        /// A pass of a recipe.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(tag = "kind")]
        pub enum Pass {
            $(#[doc = concat!("`", $kind, "`")] #[serde(rename = $kind)] $name($name),)*
        }

        impl Pass {
            /// Every kind, by its name in recipes.
            pub const KINDS: &'static [&'static str] = &[$($kind),*];

            /// The name in recipes.
            #[must_use]
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$name(_) => $kind,)* }
            }

            /// What it does.
            #[must_use]
            pub fn behaviour(&self) -> &dyn CompressionPass {
                match self { $(Self::$name(pass) => pass,)* }
            }

            /// Reads the fields of a kind; `None` if there is no such kind.
            pub(super) fn read(
                kind: &str,
                fields: toml::de::ValueDeserializer<'_>,
            ) -> Option<Result<Self, toml::de::Error>> {
                match kind { $($kind => Some($name::deserialize(fields).map(Self::$name)),)* _ => None }
            }
        }

        $(impl From<$name> for Pass {
            fn from(pass: $name) -> Self {
                Self::$name(pass)
            }
        })*
    };
}

passes! {
    "vocabulary" => Vocabulary,
    "drop-layers" => DropLayers,
    "attention" => Attention,
    "prune-structured" => PruneStructured,
    "reconstruct" => Reconstruct,
    "smooth" => Smooth,
    "prune-blocks" => PruneBlocks,
    "prune-unstructured" => PruneUnstructured,
    "low-rank" => LowRank,
    "quantize" => Quantize,
    "mixed-precision" => MixedPrecision,
    "correct-bias" => CorrectBias,
    "activations" => Activations,
    "sensitivity" => Sensitivity,
}
