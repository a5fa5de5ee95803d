//! From a recipe to an artefact.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::artefact::{self, CARD_FILE, RECIPE_FILE, REPORT_FILES, WEIGHTS_FILE};
use super::calibration::{CalibrationText, sample};
use super::measure::{Probe, measure_quality};
use super::passes::{PassReport, Stage, Work, owned_encoder};
use super::progress::Progress;
use super::recipe::Recipe;
use super::report::{Report, Speeds, Stop, part_losses};
use super::weights::Weights;
use super::{CompressError, card, golden, report_page};
use crate::checkpoint::{
    ArtefactDir, Calibration, Checkpoint, FORMAT_VERSION, MANIFEST_FILE, Manifest, OpenOptions, Pruning,
    Recipe as RecipeRecord, SizeReport, Source, sha256_hex,
};
use crate::eval::{Contender, Encode, SpeedSettings, compare, encoder, made_up_sequences, measure_speed};
use crate::exec::cost::linear_macs_per_token;
use crate::exec::{Runtime, candle_model};
use crate::model::{Architecture, Forward, HeadSlot, LayerConfig};
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
    /// What to do.
    pub recipe: Recipe,
    /// Longest input in tokens (default: the source's).
    pub max_input_tokens: Option<usize>,
    /// Whether the report tells the speed on this machine; its bytes then differ from run to run.
    pub speed: bool,
}

impl CompressRequest {
    /// `recipe` on `model` into `out`.
    #[must_use]
    pub fn new(model: impl Into<PathBuf>, out: impl Into<PathBuf>, recipe: Recipe) -> Self {
        Self {
            model: model.into(),
            out: out.into(),
            force: false,
            name: None,
            recipe,
            max_input_tokens: None,
            speed: false,
        }
    }

    /// The command that makes the same bytes, with the recipe that the artefact carries. Where files stand, and what the
    /// target and the calibration file are called, is not part of the result.
    fn command(&self, source: &str) -> String {
        let mut words = vec![format!("niwaki compress --recipe {RECIPE_FILE} --model {source} --out OUT")];
        if self.recipe.needs_text() {
            words.push("--calibration TEXTS".to_owned());
        }
        if let Some(name) = &self.name {
            words.push(format!("--name {name}"));
        }
        if let Some(limit) = self.max_input_tokens {
            words.push(format!("--max-input-length {limit}"));
        }
        words.join(" ")
    }
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// Where the artefact is.
    pub out: PathBuf,
    /// Its manifest: sizes, shapes, quality.
    pub manifest: Manifest,
    /// What each pass did, and what is left.
    pub report: Report,
}

/// Compresses a model: the passes of the recipe in order, then write, then measure what was written. The target appears
/// whole or not at all.
///
/// The same model, recipe, text and seed give the same bytes. Without calibration text they are the same on every
/// machine; with it, on machines of the same instruction set, because sums over activations are in floating point.
///
/// # Errors
/// What the user can cause (target exists, calibration missing or no text, impossible settings, no room) is refused
/// before any work.
pub fn compress(
    request: &CompressRequest,
    runtime: &Runtime,
    progress: &dyn Progress,
) -> Result<Outcome, CompressError> {
    let recipe = &request.recipe;
    ArtefactDir::check_place(&request.out, &request.model, request.force)?;
    let options = OpenOptions { max_input_tokens: request.max_input_tokens, ..OpenOptions::default() };
    let source = Checkpoint::open_with(&request.model, &options)?;
    if source.manifest().is_some() {
        return Err(CompressError::AlreadyCompressed(request.model.clone()));
    }
    recipe.check(source.architecture())?;
    recipe.check_tokenizer(source.tokenizer_json(), source.architecture().vocab_size)?;
    check_space(&request.out, source.architecture(), source.tokenizer_json().len() as u64)?;
    let tokenizer = Tokenizer::from_bytes(source.tokenizer_json())?;
    let encode = encoder(&tokenizer, source.architecture().max_input_tokens);
    let text = calibration_text(recipe, &encode)?;

    let dense = Weights::load(&source)?;
    let mut work = Work {
        model: dense.clone(),
        reference: dense.clone(),
        dense: dense.clone(),
        text: text.clone(),
        seed: recipe.seed,
        encode: owned_encoder(source.tokenizer_json(), source.architecture().max_input_tokens)?,
        tokenizer_json: source.tokenizer_json().to_vec(),
        vocab_txt: None,
        runtime,
    };
    let (passes, way) = run_passes(recipe, &mut work, &encode, &source, progress)?;
    let Work { dense: teacher, mut model, tokenizer_json, vocab_txt, .. } = work;
    let encode_now = comparable_encoder(&source, &model, &tokenizer_json)?;
    model.settle();
    let probe = Probe::of(text.as_deref());
    let parts = part_losses(&teacher, &model, &probe, &*encode_now, progress)?;

    let dir = ArtefactDir::create(&request.out, request.force)?;
    progress.phase_started("write", 1);
    let artefact_bytes = artefact::write_weights(&dir, &model)?;
    let mut files = artefact::side_files(&source, &model, tokenizer_json, vocab_txt)?;
    files.insert(RECIPE_FILE.to_owned(), recipe.to_toml().into_bytes());
    let mut manifest = manifest(request, &source, &model, text.as_deref(), &passes)?;
    manifest.size.artefact_bytes = artefact_bytes;
    for (name, bytes) in &files {
        dir.write(name, bytes)?;
    }
    // What is measured is what was written: the artefact is opened from its files, and a pruned one opens only with
    // its manifest.
    dir.write(MANIFEST_FILE, &manifest.to_json()?)?;
    progress.advanced(1);
    progress.phase_finished();
    let written = Arc::new(Checkpoint::open(dir.path())?);
    let held_out = text.as_ref().map_or(&[][..], |text| &text.held_out);
    measure_quality(&mut manifest, &dense, &written, runtime, (&encode, &*encode_now), held_out, progress)?;

    let mut report = Report::new(&source, &written, &manifest, passes, way, parts)?;
    if request.speed {
        report.speed = Some(measure_speeds(&source, &written, runtime, progress)?);
    }
    let [json, html] = REPORT_FILES;
    files.insert(json.to_owned(), report.to_json());
    files.insert(html.to_owned(), report_page::page(&report).into_bytes());
    for name in REPORT_FILES {
        dir.write(name, &files[name])?;
    }
    files.insert(CARD_FILE.to_owned(), card::card(&manifest).into_bytes());
    dir.write(CARD_FILE, &files[CARD_FILE])?;
    manifest.files = files.iter().map(|(name, bytes)| (name.clone(), sha256_hex(bytes))).collect();
    manifest.files.insert(WEIGHTS_FILE.to_owned(), written.weights_sha256());
    dir.write(MANIFEST_FILE, &manifest.to_json()?)?;
    drop(written);
    Ok(Outcome { out: dir.commit()?, manifest, report })
}

/// The source in f32 and the artefact, in turn on made-up inputs.
fn measure_speeds(
    source: &Checkpoint,
    written: &Arc<Checkpoint>,
    runtime: &Runtime,
    progress: &dyn Progress,
) -> Result<Speeds, CompressError> {
    let settings = SpeedSettings { rounds: 3, requests: 20, ..SpeedSettings::default() };
    let sequences = |checkpoint: &Checkpoint| made_up_sequences(checkpoint.architecture(), 64, 0);
    let (before, after) = (sequences(source), sequences(written));
    let mut source_workers: [Box<dyn Forward>; 1] = [Box::new(candle_model(source)?)];
    let mut workers: [Box<dyn Forward>; 1] = [Box::new(runtime.player(written)?)];
    let mut contenders = [
        Contender { workers: &mut source_workers, sequences: &before },
        Contender { workers: &mut workers, sequences: &after },
    ];
    progress.phase_started("measure speed", 2 * (settings.rounds as u64 + 1));
    let speeds = measure_speed(&mut contenders, &settings, |n| progress.advanced(n as u64))?;
    progress.phase_finished();
    let [source, artefact]: [_; 2] = speeds.try_into().expect("one speed of each of two contenders");
    Ok(Speeds { machine: runtime.describe(), source, artefact })
}

type Ways = (Vec<PassReport>, Vec<Stop>);

/// Text to ids as `model` reads it, cut where the source cuts it: an embedding of more text is another embedding.
fn comparable_encoder(
    source: &Checkpoint,
    model: &Weights,
    tokenizer_json: &[u8],
) -> Result<Rc<Encode<'static>>, CompressError> {
    let limit = source.architecture().max_input_tokens.min(model.architecture().max_input_tokens);
    owned_encoder(tokenizer_json, limit)
}

/// The passes in order; `before` is the encoder of the source.
fn run_passes(
    recipe: &Recipe,
    work: &mut Work<'_>,
    before: &Encode<'_>,
    source: &Checkpoint,
    progress: &dyn Progress,
) -> Result<Ways, CompressError> {
    let probe = Probe::of(work.text.as_deref());
    let expected = probe.embeddings(&work.dense, before)?;
    let start = Stop {
        after: "source".to_owned(),
        bytes: source.weights_bytes() as u64,
        macs_per_token: work.dense.macs_per_token(),
        cosine: 1.0,
    };
    let mut way = vec![start];
    let size = |model: &Weights| (model.bytes(), model.macs_per_token());
    let mut reports = Vec::with_capacity(recipe.steps.len());
    let mut stored = false;
    for step in &recipe.steps {
        let behaviour = step.pass.behaviour();
        if !stored {
            work.reference = work.model.clone();
        }
        stored |= behaviour.stage() == Stage::Store;
        let at_first = size(&work.model);
        let report = behaviour.run(work, progress).map_err(|error| recipe.located(step, error))?;
        let after = size(&work.model);
        let encode = comparable_encoder(source, &work.model, &work.tokenizer_json)?;
        let found = compare(&expected, &probe.embeddings(&work.model, &*encode)?)?;
        let cosine = golden::round_cosine(found.mean);
        let (bytes, macs_per_token) = after;
        way.push(Stop { after: step.pass.kind().to_owned(), bytes, macs_per_token, cosine });
        let mut settings = serde_json::to_value(&step.pass).unwrap_or_default();
        if let Some(fields) = settings.as_object_mut() {
            fields.remove("kind");
        }
        reports.push(PassReport {
            kind: step.pass.kind().to_owned(),
            summary: behaviour.summary(),
            settings,
            bytes: (at_first.0, after.0),
            macs_per_token: (at_first.1, after.1),
            cosine: Some(cosine),
            ..report
        });
    }
    Ok((reports, way))
}

fn manifest(
    request: &CompressRequest,
    source: &Checkpoint,
    model: &Weights,
    text: Option<&CalibrationText>,
    passes: &[PassReport],
) -> Result<Manifest, CompressError> {
    let (before, after) = (source.architecture(), model.architecture());
    let license =
        artefact::read_source(source, CARD_FILE)?.and_then(|bytes| card::license_of(&String::from_utf8_lossy(&bytes)));
    let importance = passes.iter().find_map(|pass| pass.settings.get("importance")?.as_str().map(str::to_owned));
    // Of a layer that is gone nothing is left.
    let left = |layer: usize| model.origins().iter().position(|&origin| origin == layer).map(|now| &after.layers[now]);
    let kept = |of: fn(&LayerConfig) -> usize| -> Vec<(usize, usize)> {
        before.layers.iter().enumerate().map(|(layer, config)| (of(config), left(layer).map_or(0, of))).collect()
    };
    let (heads, ffn) = (kept(|layer| layer.n_heads), kept(|layer| layer.d_ffn));
    let pruned = heads.iter().chain(&ffn).any(|(before, after)| before != after);
    Ok(Manifest {
        format_version: FORMAT_VERSION,
        generator: artefact::generator(),
        model: request.name.clone().unwrap_or_else(|| source.name().to_owned()),
        architecture: after.spec(),
        recipe: RecipeRecord {
            command: request.command(source.name()),
            seed: request.recipe.seed,
            passes: passes.iter().map(|pass| format!("{}: {}", pass.kind, pass.summary)).collect(),
        },
        source: Source {
            model: source.name().to_owned(),
            weights_sha256: source.weights_sha256(),
            weights_bytes: source.weights_bytes() as u64,
            license,
        },
        calibration: text.map(|text| Calibration {
            sha256: text.sha256.clone(),
            n_texts: text.n_texts,
            n_tokens: text.n_tokens,
        }),
        pruning: pruned.then(|| Pruning {
            importance: importance.unwrap_or_default(),
            heads,
            ffn,
            macs_per_token: (
                linear_macs_per_token(&before.layers, before.d_model),
                linear_macs_per_token(&after.layers, after.d_model),
            ),
        }),
        schemes: artefact::schemes(model),
        size: SizeReport { source_bytes: source.weights_bytes() as u64, artefact_bytes: 0 },
        quality: None,
        golden: Vec::new(),
        files: BTreeMap::new(),
    })
}

fn calibration_text(recipe: &Recipe, encode: &Encode<'_>) -> Result<Option<Arc<CalibrationText>>, CompressError> {
    match &recipe.calibration.texts {
        Some(texts) if recipe.needs_text() => {
            sample(texts, encode, recipe.calibration.tokens, N_HELD_OUT, recipe.seed).map(|text| Some(Arc::new(text)))
        }
        _ => Ok(None),
    }
}

/// Bytes that a model of this shape takes at most: every matrix INT8 with its scales, and what stands beside it.
fn estimated_bytes(spec: &Architecture) -> u64 {
    let rows = spec.vocab_size + spec.positions.table_len + spec.n_token_types;
    let tables = rows as u64 * (spec.d_model as u64 + 4);
    let linears: u64 = linear_macs_per_token(&spec.layers, spec.d_model);
    // Biases, scales, norms: a few vectors a layer, as wide as the widest.
    let vectors: usize =
        spec.layers.iter().map(|layer| 8 * (layer.d_ffn + 4 * layer.d_context() + 6 * spec.d_model)).sum();
    // A head stays in f32.
    let head = 4 * HeadSlot::n_elements(spec);
    tables + linears + (vectors + head) as u64
}

/// Refuses when the file system of `out` has less room than the artefact takes.
fn check_space(out: &Path, spec: &Architecture, tokenizer_bytes: u64) -> Result<(), CompressError> {
    // The target's folder may have to be made first: then what holds is the nearest that exists.
    let absolute = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    let Some(existing) = absolute.ancestors().skip(1).find(|dir| dir.is_dir()) else { return Ok(()) };
    // A file system that cannot tell its free space is not a reason to refuse.
    let Ok(system) = rustix::fs::statvfs(existing) else { return Ok(()) };
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    let needed = estimated_bytes(spec) + tokenizer_bytes;
    if free < needed { Err(CompressError::NoSpace { path: existing.to_owned(), free, needed }) } else { Ok(()) }
}
