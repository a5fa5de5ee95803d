//! A model directory as a whole: the architecture, and its weights by slot.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::hf_config::{self, SentenceModules};
use super::manifest::{MANIFEST_FILE, Manifest};
use super::matrix::{self, Tensors};
use super::reader::{TensorFile, TensorView};
use super::weights::{LinearWeights, NormWeights, TableWeights};
use super::writer::sha256_hex;
use super::{CheckpointError, hf_names};
use crate::model::{Architecture, Band, HeadSlot, LinearSlot, NormSlot, Pooling};
use crate::quant::Weight;

const WEIGHTS_FILE: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
const TOKENIZER_FILE: &str = "tokenizer.json";

/// What a caller may override when opening a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// Sentence pooling.
    pub pooling: Option<Pooling>,
    /// A band for every layer.
    pub band: Option<Band>,
    /// Longest input in tokens; beyond the position table only together with a band (positions are then tiled).
    pub max_input_tokens: Option<usize>,
    /// Skips hashing the weights against the manifest.
    pub trust_files: bool,
}

/// The parts of an artefact that is compiled into a program.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedArtefact {
    /// `niwaki.json`.
    pub manifest: &'static [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'static [u8],
    /// `model.safetensors`.
    pub weights: &'static [u8],
}

/// A model directory with its weights mapped.
pub struct Checkpoint {
    name: String,
    dir: Option<PathBuf>,
    /// Where its configuration and weights stand, which may be a folder of `dir`.
    transformer_dir: Option<PathBuf>,
    architecture: Architecture,
    manifest: Option<Manifest>,
    tokenizer: Cow<'static, [u8]>,
    files: Vec<TensorFile>,
    prefix: &'static str,
}

/// What a directory or the program holds, before it is checked.
struct Parts {
    name: String,
    dir: Option<PathBuf>,
    transformer_dir: Option<PathBuf>,
    manifest: Option<Manifest>,
    tokenizer: Cow<'static, [u8]>,
    files: Vec<TensorFile>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("name", &self.name).field("files", &self.files).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a Hugging Face directory or an artefact.
    ///
    /// # Errors
    /// Naming the file, field or tensor that is wrong.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(dir, &OpenOptions::default())
    }

    /// Opens a directory with overrides.
    ///
    /// # Errors
    /// Naming the file, field or tensor that is wrong.
    pub fn open_with(dir: &Path, options: &OpenOptions) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NotADirectory(dir.to_owned()));
        }
        let manifest_path = dir.join(MANIFEST_FILE);
        let manifest = match std::fs::read(&manifest_path) {
            Ok(bytes) => Some(Manifest::parse(&bytes)?),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(CheckpointError::Io { path: manifest_path, source }),
        };
        let modules = if manifest.is_some() { SentenceModules::default() } else { SentenceModules::read(dir)? };
        let model_dir = dir.join(&modules.transformer);
        let spec = match &manifest {
            Some(manifest) => manifest.architecture.clone(),
            None => hf_config::architecture(&hf_config::read_config(&model_dir)?, &modules, options.pooling)?,
        };
        let files = open_weights(&model_dir)?;
        if let (Some(manifest), false) = (&manifest, options.trust_files) {
            verify(manifest, &files)?;
        }
        let tokenizer = [dir.join(TOKENIZER_FILE), model_dir.join(TOKENIZER_FILE)]
            .iter()
            .find_map(|path| match std::fs::read(path) {
                Ok(bytes) => Some(Ok(bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(source) => Some(Err(CheckpointError::Io { path: path.clone(), source })),
            })
            .ok_or_else(|| CheckpointError::MissingFile {
                path: dir.join(TOKENIZER_FILE),
                hint: "save the model's fast tokenizer (tokenizer.save_pretrained) to get it",
            })??;
        let name = match &manifest {
            Some(manifest) => manifest.model.clone(),
            None => dir
                .canonicalize()
                .ok()
                .and_then(|dir| dir.file_name().map(|name| name.to_string_lossy().into_owned()))
                .unwrap_or_else(|| "model".to_owned()),
        };
        let (dir, transformer_dir) = (Some(dir.to_owned()), Some(model_dir));
        let parts = Parts { name, dir, transformer_dir, manifest, tokenizer: tokenizer.into(), files };
        let file = if parts.manifest.is_some() { MANIFEST_FILE } else { hf_config::CONFIG_FILE };
        let architecture = Architecture::new(spec).map_err(|source| CheckpointError::Model { file, source })?;
        Self::assemble(parts, &architecture, options)
    }

    /// Opens the artefact that is part of the program.
    ///
    /// # Errors
    /// If it was built in damaged, or the overrides do not fit it.
    pub fn embedded(artefact: &EmbeddedArtefact, options: &OpenOptions) -> Result<Self, CheckpointError> {
        let manifest = Manifest::parse(artefact.manifest)?;
        let files = vec![TensorFile::from_static(artefact.weights, WEIGHTS_FILE)?];
        let architecture = Architecture::new(manifest.architecture.clone())
            .map_err(|source| CheckpointError::Model { file: MANIFEST_FILE, source })?;
        let name = manifest.model.clone();
        let (manifest, tokenizer) = (Some(manifest), artefact.tokenizer.into());
        let parts = Parts { name, dir: None, transformer_dir: None, manifest, tokenizer, files };
        Self::assemble(parts, &architecture, options)
    }

    fn assemble(parts: Parts, architecture: &Architecture, options: &OpenOptions) -> Result<Self, CheckpointError> {
        let Parts { name, dir, transformer_dir, manifest, tokenizer, files } = parts;
        let architecture = override_architecture(architecture, options)?;
        let family = architecture.family;
        let prefix = hf_names::prefixes(family)
            .iter()
            .copied()
            .find(|prefix| matrix::has_matrix(InFiles { files: &files, prefix }, hf_names::WORD_EMBEDDING))
            .ok_or_else(|| CheckpointError::MissingTensor(hf_names::WORD_EMBEDDING.to_owned()))?;
        let checkpoint = Self { name, dir, transformer_dir, architecture, manifest, tokenizer, files, prefix };
        checkpoint.check_all()?;
        Ok(checkpoint)
    }

    /// Looks every tensor up once, so that a directory that opens is complete.
    fn check_all(&self) -> Result<(), CheckpointError> {
        let spec = &self.architecture;
        let d_model = spec.d_model;
        self.expect_table(hf_names::WORD_EMBEDDING, spec.vocab_size)?;
        self.expect_table(hf_names::POSITION_EMBEDDING, spec.positions.table_len)?;
        if spec.n_token_types > 0 {
            self.expect_table(hf_names::TOKEN_TYPE_EMBEDDING, spec.n_token_types)?;
        }
        self.norm(NormSlot::Embedding)?;
        for (layer, config) in spec.layers.iter().enumerate() {
            for slot in [
                LinearSlot::Qkv(layer),
                LinearSlot::AttentionOut(layer),
                LinearSlot::FfnUp(layer),
                LinearSlot::FfnDown(layer),
            ] {
                let (n_out, n_in) = slot.shape(config, d_model);
                let modules = hf_names::linear_modules(spec.family, slot);
                let rows = n_out / modules.len();
                let whole = hf_names::whole_weight(spec.family, slot);
                let is_whole = modules.len() > 1 && matrix::has_matrix(self.in_files(), &whole);
                if is_whole {
                    matrix::check_matrix(self.in_files(), &whole, n_out, n_in)?;
                }
                for module in &modules {
                    if !is_whole {
                        matrix::check_matrix(self.in_files(), &format!("{module}.weight"), rows, n_in)?;
                    }
                    self.tensor(&format!("{module}.bias"))?.expect_shape(&[rows])?;
                }
            }
            self.norm(NormSlot::Attention(layer))?;
            self.norm(NormSlot::Ffn(layer))?;
        }
        if spec.head.is_some() {
            for slot in HeadSlot::ALL {
                self.head(slot)?;
            }
        }
        Ok(())
    }

    fn expect_table(&self, name: &str, rows: usize) -> Result<(), CheckpointError> {
        matrix::check_matrix(self.in_files(), name, rows, self.architecture.d_model)
    }

    /// Name of the model.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory; `None` for the one inside the program.
    #[must_use]
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Where its configuration and weights stand: its directory, or the folder that `modules.json` names.
    #[must_use]
    pub fn transformer_dir(&self) -> Option<&Path> {
        self.transformer_dir.as_deref()
    }

    /// Its shape.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The manifest, if it is an artefact.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// `tokenizer.json`.
    #[must_use]
    pub fn tokenizer_json(&self) -> &[u8] {
        &self.tokenizer
    }

    /// Bytes of the weight files.
    #[must_use]
    pub fn weights_bytes(&self) -> usize {
        self.files.iter().map(|file| file.bytes().len()).sum()
    }

    /// sha256 over the weight files in order.
    #[must_use]
    pub fn weights_sha256(&self) -> String {
        match &self.files[..] {
            [file] => sha256_hex(file.bytes()),
            files => sha256_hex(files.iter().map(|file| sha256_hex(file.bytes())).collect::<String>().as_bytes()),
        }
    }

    /// Tells the kernel that the mapped pages may leave memory; they come back when touched.
    pub fn release_pages(&self) {
        for file in &self.files {
            file.release_pages();
        }
    }

    fn in_files(&self) -> InFiles<'_> {
        InFiles { files: &self.files, prefix: self.prefix }
    }

    /// Names and bytes of all tensors.
    pub(super) fn tensor_sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.files.iter().flat_map(TensorFile::sizes)
    }

    /// What stands before every name.
    pub(super) fn prefix(&self) -> &'static str {
        self.prefix
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        self.in_files().find(name)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor.expect_shape(&[len])?;
        Ok(tensor.to_f32()?.into_owned())
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight<'_>, CheckpointError> {
        matrix::matrix(self.in_files(), name, rows, cols)
    }

    /// A linear layer.
    ///
    /// # Errors
    /// Naming the tensor that is missing, misshapen or damaged.
    pub fn linear(&self, slot: LinearSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        let config = &self.architecture.layers[slot.layer()];
        let (n_out, n_in) = slot.shape(config, self.architecture.d_model);
        let modules = hf_names::linear_modules(self.architecture.family, slot);
        let rows = n_out / modules.len();
        let mut bias = Vec::with_capacity(n_out);
        for module in &modules {
            bias.extend(self.vector(&format!("{module}.bias"), rows)?);
        }
        let whole = hf_names::whole_weight(self.architecture.family, slot);
        let weight = if modules.len() == 1 || matrix::has_matrix(self.in_files(), &whole) {
            self.matrix(&whole, n_out, n_in)?
        } else {
            let names = modules.iter().map(|module| format!("{module}.weight"));
            let parts = names
                .map(|name| Ok((self.matrix(&name, rows, n_in)?, name)))
                .collect::<Result<Vec<_>, CheckpointError>>()?;
            stack(&parts, n_in, &whole)?
        };
        Ok(LinearWeights { n_out, n_in, weight, bias })
    }

    /// A tensor of the classification head, which stands at the root or, as a pooler does, behind the prefix.
    pub(super) fn head_tensor(&self, slot: HeadSlot, part: &str) -> Result<TensorView<'_>, CheckpointError> {
        let name = format!("{}.{part}", hf_names::head_module(self.architecture.family, slot));
        let at_root = self.files.iter().find(|file| file.contains(&name));
        at_root.map_or_else(|| self.tensor(&name), |file| file.tensor(&name))
    }

    /// A linear layer of the classification head.
    ///
    /// # Errors
    /// Naming the tensor that is missing, misshapen or damaged.
    pub fn head(&self, slot: HeadSlot) -> Result<LinearWeights<'_>, CheckpointError> {
        let (n_out, n_in) = slot.shape(&self.architecture);
        let (weight, bias) = (self.head_tensor(slot, "weight")?, self.head_tensor(slot, "bias")?);
        weight.expect_shape(&[n_out, n_in])?;
        bias.expect_shape(&[n_out])?;
        Ok(LinearWeights { n_out, n_in, weight: Weight::F32(weight.to_f32()?), bias: bias.to_f32()?.into_owned() })
    }

    /// A LayerNorm.
    ///
    /// # Errors
    /// Naming the tensor that is missing, misshapen or damaged.
    pub fn norm(&self, slot: NormSlot) -> Result<NormWeights, CheckpointError> {
        let d_model = self.architecture.d_model;
        let module = hf_names::norm_module(self.architecture.family, slot);
        let named = |new: &str, old: &str| -> Result<Vec<f32>, CheckpointError> {
            let old_name = format!("{module}.{old}");
            let exists = self.files.iter().any(|file| file.contains(&format!("{}{old_name}", self.prefix)));
            if exists { self.vector(&old_name, d_model) } else { self.vector(&format!("{module}.{new}"), d_model) }
        };
        Ok(NormWeights {
            gain: named("weight", "gamma")?,
            bias: named("bias", "beta")?,
            eps: self.architecture.norm_eps,
        })
    }

    /// The embedding tables.
    ///
    /// # Errors
    /// Naming the tensor that is missing, misshapen or damaged.
    pub fn tables(&self) -> Result<TableWeights<'_>, CheckpointError> {
        let spec = &self.architecture;
        let token_type = match spec.n_token_types {
            0 => None,
            rows => Some(self.matrix(hf_names::TOKEN_TYPE_EMBEDDING, rows, spec.d_model)?),
        };
        Ok(TableWeights {
            word: self.matrix(hf_names::WORD_EMBEDDING, spec.vocab_size, spec.d_model)?,
            position: self.matrix(hf_names::POSITION_EMBEDDING, spec.positions.table_len, spec.d_model)?,
            token_type,
        })
    }
}

/// Tensors of several files under a prefix.
#[derive(Clone, Copy)]
struct InFiles<'a> {
    files: &'a [TensorFile],
    prefix: &'static str,
}

impl<'a> InFiles<'a> {
    fn find(self, name: &str) -> Result<TensorView<'a>, CheckpointError> {
        let full = format!("{}{name}", self.prefix);
        match self.files.iter().find(|file| file.contains(&full)) {
            Some(file) => file.tensor(&full),
            None => Err(CheckpointError::MissingTensor(full)),
        }
    }
}

impl<'a> Tensors<'a> for InFiles<'a> {
    fn has(self, name: &str) -> bool {
        let full = format!("{}{name}", self.prefix);
        self.files.iter().any(|file| file.contains(&full))
    }

    fn get(self, name: &str) -> Result<TensorView<'a>, CheckpointError> {
        self.find(name)
    }
}

/// Stacks f32 and INT8 matrices of `cols` columns; mixed ones become f32.
fn stack(parts: &[(Weight<'_>, String)], cols: usize, whole: &str) -> Result<Weight<'static>, CheckpointError> {
    let (mut all_codes, mut all_scales) = (Vec::new(), Vec::new());
    let mut n_float = 0;
    for (part, name) in parts {
        match part {
            Weight::Int8 { codes, scale } => {
                all_codes.extend_from_slice(codes);
                all_scales.extend_from_slice(scale);
            }
            Weight::F32(_) => n_float += 1,
            other => {
                let reason =
                    format!("stored as {}, which stacked layers have only as a whole, `{whole}`", other.scheme());
                return Err(CheckpointError::Form { name: name.clone(), reason });
            }
        }
    }
    if n_float == 0 {
        return Ok(Weight::Int8 { codes: all_codes.into(), scale: all_scales.into() });
    }
    Ok(Weight::F32(parts.iter().flat_map(|(part, _)| part.to_f32(cols)).collect()))
}

fn override_architecture(architecture: &Architecture, options: &OpenOptions) -> Result<Architecture, CheckpointError> {
    let mut spec = architecture.spec();
    if let Some(pooling) = options.pooling.filter(|_| spec.head.is_none()) {
        spec.pooling = pooling;
    }
    if let Some(band) = options.band {
        for layer in &mut spec.layers {
            layer.band = band;
        }
    }
    // Positions may only be tiled where attention is banded: full attention over tiled positions was never trained.
    let usable = spec.positions.usable();
    match options.band {
        Some(Band::FULL) => {
            spec.positions.tiled = false;
            spec.max_input_tokens = options.max_input_tokens.unwrap_or(spec.max_input_tokens.min(usable));
        }
        band => {
            spec.max_input_tokens = options.max_input_tokens.unwrap_or(spec.max_input_tokens);
            spec.positions.tiled |= band.is_some() && spec.max_input_tokens > usable;
        }
    }
    Architecture::new(spec).map_err(CheckpointError::Override)
}

fn open_weights(dir: &Path) -> Result<Vec<TensorFile>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let single = dir.join(WEIGHTS_FILE);
    if single.is_file() {
        return Ok(vec![TensorFile::open(&single)?]);
    }
    let index_path = dir.join(WEIGHTS_INDEX);
    match std::fs::read(&index_path) {
        Ok(bytes) => {
            let index: Index = serde_json::from_slice(&bytes)
                .map_err(|source| CheckpointError::Json { file: WEIGHTS_INDEX.to_owned(), source })?;
            let shards: std::collections::BTreeSet<_> = index.weight_map.values().collect();
            if let Some(shard) = shards.iter().find(|shard| Path::new(shard).components().count() != 1) {
                let reason = format!("`{shard}` leaves the model's folder");
                return Err(CheckpointError::field(WEIGHTS_INDEX, "weight_map", reason));
            }
            shards.iter().map(|shard| TensorFile::open(&dir.join(shard))).collect()
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(CheckpointError::MissingFile {
            path: single,
            hint: "save the model as safetensors (save_pretrained, safe_serialization=True) to get it",
        }),
        Err(source) => Err(CheckpointError::Io { path: index_path, source }),
    }
}

fn verify(manifest: &Manifest, files: &[TensorFile]) -> Result<(), CheckpointError> {
    if let (Some(expected), [file]) = (manifest.files.get(WEIGHTS_FILE), files) {
        let got = sha256_hex(file.bytes());
        if *expected != got {
            return Err(CheckpointError::Checksum { file: WEIGHTS_FILE.to_owned(), expected: expected.clone(), got });
        }
    }
    Ok(())
}
