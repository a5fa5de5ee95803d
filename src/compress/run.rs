//! From a request to an artefact.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::artefact::{self, CARD_FILE, WEIGHTS_FILE};
use super::calibration::{CalibrationText, sample};
use super::importance::{Importance, measure};
use super::progress::Progress;
use super::prune::{FFN_PANEL, apply, check_share, plan};
use super::reconstruct::{Reconstruction, Refit, reconstruct};
use super::simulate::RoundedActivations;
use super::weights::Weights;
use super::{CompressError, card, golden};
use crate::checkpoint::{
    ArtefactDir, Calibration, Checkpoint, FORMAT_VERSION, MANIFEST_FILE, Manifest, OpenOptions, Pruning, Quality,
    Recipe, SizeReport, Source, sha256_hex,
};
use crate::eval::{Encode, compare, embed, encoder};
use crate::exec::candle::{CandleBuild, CandleF32, CandleLinear, CandleNorm, CandleTables, GROUP_TOKENS, WeightSource};
use crate::exec::cost::linear_macs_per_token;
use crate::model::{Band, Encoder, Forward, ForwardMemory, Model, ModelError, Ops};
use crate::text::Tokenizer;

/// Texts kept apart from calibration to measure the result on.
const N_HELD_OUT: usize = 200;

/// What to make.
#[derive(Debug, Clone)]
pub struct CompressRequest {
    /// The uncompressed Hugging Face directory.
    pub model: PathBuf,
    /// Where the artefact goes.
    pub out: PathBuf,
    /// Whether `out` may be replaced.
    pub force: bool,
    /// Name of the model in the artefact (default: that of the source).
    pub name: Option<String>,
    /// Text for importance and reconstruction, one a line; needed for pruning.
    pub calibration: Option<PathBuf>,
    /// Tokens of it to use.
    pub calibration_tokens: usize,
    /// Share of all attention heads to remove, 0 to 0.9.
    pub prune_heads: f64,
    /// Share of all FFN neurons to remove, 0 to 0.9.
    pub prune_ffn: f64,
    /// How importance is measured.
    pub importance: Importance,
    /// A band for every layer.
    pub band: Option<Band>,
    /// Longest input in tokens (default: the source's).
    pub max_input_tokens: Option<usize>,
    /// Seed of every random choice.
    pub seed: u64,
}

impl CompressRequest {
    /// Plain INT8 of `model` into `out`.
    #[must_use]
    pub fn new(model: impl Into<PathBuf>, out: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            out: out.into(),
            force: false,
            name: None,
            calibration: None,
            calibration_tokens: 30_000,
            prune_heads: 0.0,
            prune_ffn: 0.0,
            importance: Importance::default(),
            band: None,
            max_input_tokens: None,
            seed: 0,
        }
    }

    fn prunes(&self) -> bool {
        self.prune_heads > 0.0 || self.prune_ffn > 0.0
    }

    /// The command that makes the same bytes. Paths are reduced to names: where files stand is not part of the result.
    fn command(&self) -> String {
        let mut words = vec!["niwaki compress".to_owned(), format!("--model {}", name_of(&self.model))];
        words.push(format!("--out {}", name_of(&self.out)));
        if let Some(name) = &self.name {
            words.push(format!("--name {name}"));
        }
        if self.prunes() {
            if let Some(file) = &self.calibration {
                words.push(format!("--calibration {}", name_of(file)));
            }
            words.push(format!("--calibration-tokens {}", self.calibration_tokens));
            words.push(format!("--prune-heads {} --prune-ffn {}", self.prune_heads, self.prune_ffn));
            words.push(format!("--importance {} --seed {}", self.importance, self.seed));
        }
        if let Some(band) = &self.band {
            words.push(format!("--attention {band}"));
        }
        if let Some(limit) = self.max_input_tokens {
            words.push(format!("--max-input-length {limit}"));
        }
        words.join(" ")
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// What came out.
#[derive(Debug)]
pub struct Report {
    /// Where the artefact is.
    pub out: PathBuf,
    /// Its manifest: sizes, shapes, quality.
    pub manifest: Manifest,
    /// Errors of the refitted matrices, when there was pruning.
    pub refits: Vec<Refit>,
}

/// Compresses a model: prune, refit, quantize, write, measure. The target appears whole or not at all; the same inputs,
/// settings and seed give the same bytes on the same kind of machine.
///
/// # Errors
/// What the user can cause (target exists, calibration missing or no text, impossible shares) is refused before any
/// work.
pub fn compress(request: &CompressRequest, progress: &dyn Progress) -> Result<Report, CompressError> {
    ArtefactDir::check_target(&request.out, request.force)?;
    let options =
        OpenOptions { band: request.band, max_input_tokens: request.max_input_tokens, ..OpenOptions::default() };
    let source = Checkpoint::open_with(&request.model, &options)?;
    if source.manifest().is_some() {
        return Err(CompressError::AlreadyCompressed(request.model.clone()));
    }
    let layers = source.architecture().layers.clone();
    check_share("prune-heads", layers.iter().map(|layer| layer.n_heads), 1, request.prune_heads)?;
    check_share("prune-ffn", layers.iter().map(|layer| layer.d_ffn), FFN_PANEL, request.prune_ffn)?;
    let tokenizer = Tokenizer::from_bytes(source.tokenizer_json())?;
    let encode = encoder(&tokenizer, source.architecture().max_input_tokens);
    let text = request.prunes().then(|| calibration_text(request, &encode)).transpose()?;

    let dense = Weights::load(&source)?;
    let mut model = dense.clone();
    let mut passes = Vec::new();
    let mut refits = Vec::new();
    if let Some(text) = &text {
        let rankings = measure(&dense, text, request.seed, progress)?.rank(&dense, request.importance, progress)?;
        apply(&mut model, &plan(&dense, &rankings, request.prune_heads, request.prune_ffn)?)?;
        let settings = Reconstruction::default();
        refits = reconstruct(&dense, &mut model, text, settings, progress)?;
        passes.push(format!(
            "prune: {} of the heads, {} of the FFN neurons, by {}",
            request.prune_heads, request.prune_ffn, request.importance
        ));
        passes.push(format!("reconstruct: output matrices by least squares, ridge {}", settings.ridge));
    }
    passes.push("quantize: INT8, one scale per output channel and per embedding row".to_owned());

    let architecture = model.architecture().clone();
    let dir = ArtefactDir::create(&request.out, request.force)?;
    progress.phase_started("write", 1);
    let artefact_bytes = artefact::write_weights(&dir, &model)?;
    let mut files = artefact::side_files(&source, &architecture)?;
    let license =
        artefact::read_source(&source, CARD_FILE)?.and_then(|bytes| card::license_of(&String::from_utf8_lossy(&bytes)));
    let mut manifest = Manifest {
        format_version: FORMAT_VERSION,
        generator: artefact::generator(),
        model: request.name.clone().unwrap_or_else(|| source.name().to_owned()),
        architecture: architecture.spec(),
        recipe: Recipe { command: request.command(), seed: request.seed, passes },
        source: Source {
            model: source.name().to_owned(),
            weights_sha256: source.weights_sha256(),
            weights_bytes: source.weights_bytes() as u64,
            license,
        },
        calibration: text.as_ref().map(|text| Calibration {
            sha256: text.sha256.clone(),
            n_texts: text.n_texts,
            n_tokens: text.n_tokens,
        }),
        pruning: text.is_some().then(|| Pruning {
            importance: request.importance.to_string(),
            heads: layers.iter().zip(&architecture.layers).map(|(a, b)| (a.n_heads, b.n_heads)).collect(),
            ffn: layers.iter().zip(&architecture.layers).map(|(a, b)| (a.d_ffn, b.d_ffn)).collect(),
            macs_per_token: (
                linear_macs_per_token(&layers, architecture.d_model),
                linear_macs_per_token(&architecture.layers, architecture.d_model),
            ),
        }),
        schemes: artefact::schemes(),
        size: SizeReport { source_bytes: source.weights_bytes() as u64, artefact_bytes },
        quality: None,
        golden: Vec::new(),
        files: std::collections::BTreeMap::new(),
    };
    for (name, bytes) in &files {
        dir.write(name, bytes)?;
    }
    // What is measured is what was written: the artefact is opened from its files, and a pruned one opens only with
    // its manifest.
    dir.write(MANIFEST_FILE, &manifest.to_json()?)?;
    progress.advanced(1);
    progress.phase_finished();
    let written = Checkpoint::open(dir.path())?;
    let held_out = text.map(|text| text.held_out).unwrap_or_default();
    measure_quality(&mut manifest, &dense, &written, &encode, &held_out, progress)?;

    files.insert(CARD_FILE.to_owned(), card::card(&manifest).into_bytes());
    dir.write(CARD_FILE, &files[CARD_FILE])?;
    manifest.files = files.iter().map(|(name, bytes)| (name.clone(), sha256_hex(bytes))).collect();
    manifest.files.insert(WEIGHTS_FILE.to_owned(), written.weights_sha256());
    dir.write(MANIFEST_FILE, &manifest.to_json()?)?;
    drop(written);
    Ok(Report { out: dir.commit()?, manifest, refits })
}

fn calibration_text(request: &CompressRequest, encode: &Encode<'_>) -> Result<CalibrationText, CompressError> {
    let refuse = |setting, reason: &str| CompressError::Setting { setting, reason: reason.to_owned() };
    let path = request
        .calibration
        .as_deref()
        .ok_or_else(|| refuse("calibration", "pruning needs a file of texts, one a line, to measure importance on"))?;
    if request.calibration_tokens == 0 {
        return Err(refuse("calibration-tokens", "0 tokens show nothing"));
    }
    sample(path, encode, request.calibration_tokens, N_HELD_OUT, request.seed)
}

fn player<O>(source: &dyn WeightSource, ops: O) -> Result<Model<O>, ModelError>
where
    O: Ops<Tables = CandleTables, Linear = CandleLinear, Norm = CandleNorm>,
{
    let architecture = Arc::new(source.architecture().clone());
    let encoder = Encoder::build(&architecture, &mut CandleBuild::new(source))?;
    Ok(Model::new(architecture, encoder.into(), ops, GROUP_TOKENS, |_| ForwardMemory::default()))
}

/// Fills in what the artefact is worth: cosines on texts that it was not fitted to, and the self-check.
fn measure_quality(
    manifest: &mut Manifest,
    dense: &Weights,
    written: &Checkpoint,
    encode: &Encode<'_>,
    held_out: &[String],
    progress: &dyn Progress,
) -> Result<(), CompressError> {
    let (measured_on, texts): (_, Vec<&str>) = if held_out.is_empty() {
        ("the self-check texts", golden::TEXTS.to_vec())
    } else {
        ("lines of the calibration file that were not used", held_out.iter().map(String::as_str).collect())
    };
    progress.phase_started("measure quality", 2 * texts.len() as u64);
    let mut reference: Box<dyn Forward> = Box::new(player(dense, CandleF32)?);
    let mut artefact: Box<dyn Forward> = Box::new(player(written, RoundedActivations)?);
    let expected = embed(&mut *reference, encode, &texts, |n| progress.advanced(n as u64))?;
    let got = embed(&mut *artefact, encode, &texts, |n| progress.advanced(n as u64))?;
    let fidelity = compare(&expected, &got)?;
    manifest.quality = Some(Quality {
        measured_on: measured_on.to_owned(),
        n_texts: fidelity.n_texts,
        cosine_mean: golden::round_cosine(fidelity.mean),
        cosine_p1: golden::round_cosine(fidelity.p1),
        cosine_min: golden::round_cosine(fidelity.min),
    });
    let golden_reference = golden::reference(&mut *reference, encode)?;
    manifest.golden = golden::entries(&golden_reference, &mut *artefact, encode)?;
    progress.phase_finished();
    Ok(())
}
