//! The workshop: a model in, a smaller one out.

mod allocate;
mod artefact;
mod budget;
mod calibration;
mod card;
mod error;
mod golden;
mod importance;
mod lowrank;
mod measure;
mod moments;
mod observe;
mod passes;
mod progress;
mod prune;
mod recipe;
mod reconstruct;
mod rounding;
mod run;
mod sense;
mod slots;
mod sparsity;
mod surgeon;
mod vocabulary;
mod walk;
mod weights;

pub use allocate::{Choice, Ranking, allocate, choose};
pub use budget::{Budget, LayerPrices, monotone, plan_within};
pub use calibration::{CalibrationText, sample};
pub use error::CompressError;
pub use importance::{Importance, LayerRanking, Measurements, measure, sensitivities};
pub use lowrank::{Factorization, Factors, break_even, factorize};
pub use passes::{
    Compensate, CompressionPass, CorrectBias, Format, LayerReport, MatrixReport, MixedPrecision, Pass, PassReport, Per,
    PruneStructured, Quantize, Reconstruct, Refusal, Sensitivity, Smooth, Stage, Weighting, Work,
};
pub use progress::{Progress, Silent};
pub use prune::{FFN_PANEL, Plan, apply, plan};
pub use recipe::{CalibrationSettings, Recipe, Step};
pub use reconstruct::{Reconstruction, Refit, Target, reconstruct};
pub use rounding::RangeMethod;
pub use run::{CompressRequest, Outcome, compress};
pub use slots::{Group, MatrixSlot};
pub use sparsity::{Pattern, Score, Sparse, relative_error, sparsify};
pub use vocabulary::{PrunedVocabulary, Vocabulary, VocabularyError};
pub use weights::{DenseLinear, Weights};
