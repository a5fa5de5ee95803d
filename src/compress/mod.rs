//! The workshop: a model in, a smaller one out.

mod allocate;
mod artefact;
mod calibration;
mod card;
mod error;
mod golden;
mod importance;
mod moments;
mod observe;
mod progress;
mod prune;
mod reconstruct;
mod run;
mod simulate;
mod surgeon;
mod weights;

pub use allocate::{Ranking, allocate};
pub use calibration::{CalibrationText, sample};
pub use error::CompressError;
pub use importance::{Importance, LayerRanking, Measurements, measure};
pub use progress::{Progress, Silent};
pub use prune::{FFN_PANEL, Plan, apply, plan};
pub use reconstruct::{Reconstruction, Refit, Target, reconstruct};
pub use run::{CompressRequest, Report, compress};
pub use simulate::{RoundedActivations, round_weights};
pub use weights::{DenseLinear, Weights};
