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
mod report;
mod report_page;
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
pub use importance::{Importance, LayerRanking, Measurements, measure};
pub use lowrank::{Factorization, Factors, break_even, factorize};
pub use passes::{
    Attention, AttentionPattern, AttentionReport, Compensate, CompressionPass, CorrectBias, DropLayers, Format,
    LayerReport, LowRank, MatrixReport, Metric, MixedPrecision, Pass, PassReport, Per, PruneBlocks, PruneStructured,
    PruneUnstructured, Quantize, Reconstruct, Refusal, Sensitivity, Smooth, Stage, VocabularyPass, Weighting, Work,
};
pub use progress::{Progress, Silent};
pub use prune::{FFN_PANEL, Plan, apply, plan};
pub use recipe::{CalibrationSettings, Recipe, Step};
pub use reconstruct::{Reconstruction, Refit, Target, reconstruct};
pub use report::{LayerPattern, PartLoss, Report, Speeds, Stop};
pub use rounding::RangeMethod;
pub use run::{CompressRequest, Outcome, compress};
pub use slots::{Group, MatrixSlot};
pub use sparsity::{Pattern, Score, Sparse, output_error, sparsify};
pub use vocabulary::{PrunedVocabulary, Vocabulary, VocabularyError};
pub use weights::{DenseLinear, Weights};
