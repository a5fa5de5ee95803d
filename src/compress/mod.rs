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
mod moments;
mod observe;
mod progress;
mod prune;
mod reconstruct;
mod run;
mod simulate;
mod sparsity;
mod surgeon;
mod vocabulary;
mod weights;

pub use allocate::{Choice, Ranking, allocate, choose};
pub use budget::{LayerPrices, monotone, plan_within};
pub use calibration::{CalibrationText, sample};
pub use error::CompressError;
pub use importance::{Importance, LayerRanking, Measurements, measure, sensitivities};
pub use lowrank::{Factorization, Factors, break_even, factorize};
pub use progress::{Progress, Silent};
pub use prune::{FFN_PANEL, Plan, apply, plan};
pub use reconstruct::{Reconstruction, Refit, Target, reconstruct};
pub use run::{CompressRequest, Report, compress};
pub use simulate::{RoundedActivations, round_weights};
pub use sparsity::{Pattern, Score, Sparse, relative_error, sparsify};
pub use vocabulary::{PrunedVocabulary, Vocabulary, VocabularyError};
pub use weights::{DenseLinear, Weights};
