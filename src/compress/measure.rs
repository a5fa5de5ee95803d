//! What an artefact is worth: its embeddings, played from the written files as `serve` plays them, against the
//! uncompressed model's.
//!
//! The self-check's cosines must not depend on the machine, because they are part of the artefact, whose bytes are
//! reproducible. Their reference is played in f64, where the order of sums changes digits far beyond those of the f32 that
//! is stored; the artefact is played by the portable kernels, whose every operation is the same on all machines. Cosines
//! on held-out text, which only recipes with calibration text have, come from the machine's own kernels: they are
//! rounded to 4 decimals, because 200 texts would take the portable ones minutes.

use std::sync::Arc;

use super::CompressError;
use super::calibration::CalibrationText;
use super::golden;
use super::progress::Progress;
use super::weights::Weights;
use crate::checkpoint::{Checkpoint, Manifest, Quality};
use crate::eval::{Embeddings, Encode, compare, embed};
use crate::exec::Runtime;
use crate::exec::candle::{CandleBuild, CandleF32, GROUP_TOKENS, WeightSource};
use crate::model::{Encoder, ForwardMemory, Head, Model, ModelError};

/// The reference player on a model in memory, in f32 or f64; without a classification head.
pub(super) fn reference_player(source: &dyn WeightSource, double: bool) -> Result<Model<CandleF32>, ModelError> {
    let architecture = Arc::new(source.architecture().clone());
    let mut build = if double { CandleBuild::double(source) } else { CandleBuild::new(source) };
    let encoder = Encoder::build(&architecture, &mut build)?;
    Ok(Model::new(architecture, encoder.into(), CandleF32, GROUP_TOKENS, |_| ForwardMemory::default()))
}

/// Texts that a model in memory is looked at with.
#[derive(Debug)]
pub(super) struct Probe {
    texts: Vec<String>,
    double: bool,
}

impl Probe {
    /// Texts that are enough to tell layers apart.
    const N_TEXTS: usize = 100;

    /// Held-out texts, in f32; without them the self-check's, in f64, so that what is found is the same on all machines.
    pub(super) fn of(text: Option<&CalibrationText>) -> Self {
        match text.filter(|text| !text.held_out.is_empty()) {
            Some(text) => Self { texts: text.held_out.iter().take(Self::N_TEXTS).cloned().collect(), double: false },
            None => Self { texts: golden::TEXTS.map(str::to_owned).to_vec(), double: true },
        }
    }

    /// Their embeddings by `model`.
    pub(super) fn embeddings(&self, model: &Weights, encode: &Encode<'_>) -> Result<Embeddings, CompressError> {
        let texts: Vec<&str> = self.texts.iter().map(String::as_str).collect();
        Ok(embed(&mut reference_player(model, self.double)?, encode, &texts, |_| ())?)
    }
}

/// Fills in the self-check and the cosines on `held_out` texts, or on the self-check's when there are none. `encoders` are
/// those of the uncompressed model and of the artefact.
pub(super) fn measure_quality(
    manifest: &mut Manifest,
    dense: &Weights,
    written: &Arc<Checkpoint>,
    runtime: &Runtime,
    encoders: (&Encode<'_>, &Encode<'_>),
    held_out: &[String],
    progress: &dyn Progress,
) -> Result<(), CompressError> {
    progress.phase_started("measure quality", (2 * (held_out.len() + golden::TEXTS.len())) as u64);
    let (before, encode) = encoders;
    let mut step = |n: usize| progress.advanced(n as u64);
    let expected = embed(&mut reference_player(dense, true)?, before, &golden::TEXTS, &mut step)?;
    let got = embed(&mut runtime.portable().player(written)?.with_head(None), encode, &golden::TEXTS, &mut step)?;
    manifest.golden = golden::entries(&expected, &got, encode)?;
    if written.architecture().head.is_some() {
        let head = Head::build(dense.architecture(), &mut CandleBuild::double(dense))?;
        let mut reference = reference_player(dense, true)?.with_head(head.map(Arc::new));
        golden::add_scores(&mut manifest.golden, &mut reference, &mut runtime.portable().player(written)?)?;
    }
    let (measured_on, fidelity) = if held_out.is_empty() {
        ("the self-check texts", compare(&expected, &got)?)
    } else {
        let texts: Vec<&str> = held_out.iter().map(String::as_str).collect();
        let expected = embed(&mut reference_player(dense, false)?, before, &texts, &mut step)?;
        let got = embed(&mut runtime.player(written)?.with_head(None), encode, &texts, &mut step)?;
        ("lines of the calibration file that were not used", compare(&expected, &got)?)
    };
    manifest.quality = Some(Quality {
        measured_on: measured_on.to_owned(),
        n_texts: fidelity.n_texts,
        cosine_mean: golden::round_cosine(fidelity.mean),
        cosine_p1: golden::round_cosine(fidelity.p1),
        cosine_min: golden::round_cosine(fidelity.min),
    });
    progress.phase_finished();
    Ok(())
}
