//! The finished model as files.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::CompressError;
use super::slots::{Group, MatrixSlot};
use super::vocabulary::NewIds;
use super::weights::Weights;
use crate::checkpoint::{
    ArtefactDir, CONFIG_FILE, Checkpoint, CheckpointError, Dtype, TensorOut, hf_names, linear_tensors, matrix_tensors,
    write_safetensors,
};
use crate::exec::candle::WeightSource;
use crate::model::{Architecture, HeadSlot, NormSlot, Pooling};
use crate::quant::{Weight, quantize_rows_symmetric};

/// The weights file.
pub(super) const WEIGHTS_FILE: &str = "model.safetensors";
/// The recipe, with every setting spelt out.
pub(super) const RECIPE_FILE: &str = "recipe.toml";
/// The report, as data and as a page.
pub(super) const REPORT_FILES: [&str; 2] = ["report.json", "report.html"];
/// The model card.
pub(super) const CARD_FILE: &str = "README.md";

/// What other programs read beside the tokenizer itself.
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// Files of the source that are carried over, when they exist: as they are, unless a pass has changed the vocabulary.
const COPIED: [&str; 4] =
    [TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "vocab.txt", "config_sentence_transformers.json"];

/// Storage scheme of each group of tensors, for the manifest; forms that differ within a group are listed.
pub(super) fn schemes(model: &Weights) -> BTreeMap<String, String> {
    let forms = |groups: &[Group]| {
        let forms: BTreeSet<String> = model
            .slots()
            .into_iter()
            .filter(|slot| groups.iter().any(|group| group.contains(*slot)))
            .map(|slot| match model.report(slot).form {
                form if form.is_empty() => "int8-per-row".to_owned(),
                form => form,
            })
            .collect();
        forms.into_iter().collect::<Vec<_>>().join(", ")
    };
    let mut schemes = BTreeMap::from(
        [
            ("attention.weight", forms(&[Group::Attention])),
            ("ffn.weight", forms(&[Group::Ffn])),
            ("linear.input", inputs_scheme(model.architecture()).to_owned()),
            ("linear.bias", "f32".to_owned()),
            ("embeddings", forms(&[Group::Embedding])),
            ("norms", "f32".to_owned()),
        ]
        .map(|(group, scheme)| (group.to_owned(), scheme)),
    );
    if model.architecture().head.is_some() {
        schemes.insert("head".to_owned(), "f32".to_owned());
    }
    schemes
}

/// How the inputs of matrices are coded.
fn inputs_scheme(architecture: &Architecture) -> &'static str {
    let mut inputs = (0..architecture.layers.len()).flat_map(|layer| architecture.ranges_of(layer).all());
    if inputs.all(|range| range.is_none()) {
        "uint8-per-token-dynamic"
    } else if (0..architecture.layers.len())
        .all(|layer| architecture.ranges_of(layer).all().iter().all(Option::is_some))
    {
        "uint8-static"
    } else {
        "uint8-per-token-dynamic, uint8-static"
    }
}

fn f32_tensor(name: String, shape: Vec<usize>, values: &[f32]) -> TensorOut<'static> {
    TensorOut { name, dtype: Dtype::F32, shape, data: bytemuck::cast_slice(values).to_vec().into() }
}

/// The form that a matrix is written in: INT8 per row when no pass has fixed one.
fn form_of(model: &Weights, slot: MatrixSlot) -> Cow<'_, Weight<'static>> {
    match model.form(slot) {
        Some(form) => Cow::Borrowed(form),
        None => {
            let (codes, scale) = quantize_rows_symmetric(model.values(slot), model.shape(slot).1);
            Cow::Owned(Weight::Int8 { codes: codes.into(), scale: scale.into() })
        }
    }
}

/// Every tensor of the artefact: matrices and tables in their stored form, the rest f32.
pub(super) fn tensors(model: &Weights) -> Result<Vec<TensorOut<'static>>, CompressError> {
    let spec = model.architecture();
    let width = spec.d_model;
    let mut out = Vec::new();
    for slot in model.slots() {
        let form = form_of(model, slot);
        let (rows, cols) = model.shape(slot);
        let name = match slot {
            MatrixSlot::Linear(linear) => {
                out.extend(linear_tensors(spec.family, linear, &form, &model.dense(linear).bias, cols));
                continue;
            }
            MatrixSlot::Word => hf_names::WORD_EMBEDDING,
            MatrixSlot::Position => hf_names::POSITION_EMBEDDING,
            MatrixSlot::TokenType => hf_names::TOKEN_TYPE_EMBEDDING,
        };
        out.extend(matrix_tensors(name, &form, rows, cols));
    }
    let mut norms = vec![NormSlot::Embedding];
    for layer in 0..spec.layers.len() {
        norms.extend([NormSlot::Attention(layer), NormSlot::Ffn(layer)]);
    }
    for slot in norms {
        let norm = model.norm(slot)?;
        let module = hf_names::norm_module(spec.family, slot);
        out.push(f32_tensor(format!("{module}.weight"), vec![width], &norm.gain));
        out.push(f32_tensor(format!("{module}.bias"), vec![width], &norm.bias));
    }
    if spec.head.is_some() {
        for slot in HeadSlot::ALL {
            let linear = model.head(slot)?;
            let module = hf_names::head_module(spec.family, slot);
            let values = linear.weight.to_f32(linear.n_in);
            out.push(f32_tensor(format!("{module}.weight"), vec![linear.n_out, linear.n_in], &values));
            out.push(f32_tensor(format!("{module}.bias"), vec![linear.n_out], &linear.bias));
        }
    }
    Ok(out)
}

/// The source's `config.json` with a `quantization_config` in the compressed-tensors layout, which has no word for forms
/// other than INT8: then it names this program alone. Widths that pruning made
/// differ from layer to layer have no place in that file; they are in the manifest.
fn config(source: &Checkpoint, model: &Weights, new_ids: Option<&NewIds>) -> Result<Value, CompressError> {
    let json = |source| CheckpointError::Json { file: CONFIG_FILE.to_owned(), source };
    let bytes = read_source(source, CONFIG_FILE)?.unwrap_or_else(|| b"{}".to_vec());
    let mut config: Value = serde_json::from_slice(&bytes).map_err(json)?;
    if let Some(config) = config.as_object_mut() {
        let now = model.architecture();
        // Names of the same in different families.
        let shapes =
            [("vocab_size", now.vocab_size), ("num_hidden_layers", now.layers.len()), ("n_layers", now.layers.len())];
        for (field, value) in shapes {
            config.entry(field).and_modify(|old| *old = json!(value));
        }
        if let Some(new_ids) = new_ids {
            new_ids.renumber_config(config);
        }
    }
    let weights = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false});
    let inputs = json!({"num_bits": 8, "type": "int", "symmetric": false, "strategy": "token", "dynamic": true});
    let all_int8 = model.slots().into_iter().all(|slot| matches!(model.form(slot), None | Some(Weight::Int8 { .. })))
        && model.architecture().ranges.is_empty();
    if let Some(config) = config.as_object_mut()
        && !all_int8
    {
        config.insert("quantization_config".to_owned(), json!({"quant_method": "niwaki"}));
    } else if let Some(config) = config.as_object_mut() {
        config.insert(
            "quantization_config".to_owned(),
            json!({
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "quantization_status": "compressed",
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs},
                    "group_1": {"targets": ["Embedding"], "weights": weights},
                },
                "ignore": [],
            }),
        );
        config.insert("torch_dtype".to_owned(), json!("float32"));
    }
    Ok(config)
}

/// A file of the source, from where the model was opened: its configuration stands with the weights, the tokenizer's files and
/// the card in the model's own folder or else there.
pub(super) fn read_source(source: &Checkpoint, file: &str) -> Result<Option<Vec<u8>>, CompressError> {
    let (Some(dir), Some(transformer)) = (source.dir(), source.transformer_dir()) else { return Ok(None) };
    let places = if file == CONFIG_FILE { [transformer, dir] } else { [dir, transformer] };
    for path in places.map(|place| place.join(file)) {
        match std::fs::read(&path) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(CheckpointError::Io { path, source }.into()),
        }
    }
    Ok(None)
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// The files beside the weights and the manifest.
pub(super) fn side_files(
    source: &Checkpoint,
    model: &Weights,
    tokenizer_json: Vec<u8>,
    vocab_txt: Option<Vec<u8>>,
) -> Result<BTreeMap<String, Vec<u8>>, CompressError> {
    let architecture = model.architecture();
    let new_ids = vocab_txt.is_some().then(|| NewIds::between(source.tokenizer_json(), &tokenizer_json));
    let mut files = BTreeMap::from([
        ("tokenizer.json".to_owned(), tokenizer_json),
        (CONFIG_FILE.to_owned(), pretty(&config(source, model, new_ids.as_ref())?)),
    ]);
    // A classifier is no sentence encoder: the modules of one would mislead other programs.
    if architecture.head.is_none() {
        files.extend(sentence_files(architecture));
    }
    for file in COPIED {
        if let Some(bytes) = read_source(source, file)? {
            files.insert(file.to_owned(), bytes);
        }
    }
    if let (Some(new_ids), Some(file)) = (&new_ids, files.get_mut(TOKENIZER_CONFIG_FILE))
        && let Ok(mut config) = serde_json::from_slice(file)
    {
        new_ids.renumber_tokenizer_config(&mut config);
        *file = pretty(&Value::Object(config));
    }
    if let Some(vocab_txt) = vocab_txt.filter(|_| files.contains_key("vocab.txt")) {
        files.insert("vocab.txt".to_owned(), vocab_txt);
    }
    Ok(files)
}

/// What makes a directory a sentence encoder.
fn sentence_files(architecture: &Architecture) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::from([
        (
            "sentence_bert_config.json".to_owned(),
            pretty(&json!({"max_seq_length": architecture.max_input_tokens, "do_lower_case": false})),
        ),
        ("1_Pooling/config.json".to_owned(), pretty(&pooling_config(architecture))),
    ]);
    let mut modules = vec![("", "Transformer"), ("1_Pooling", "Pooling")];
    if architecture.normalize {
        modules.push(("2_Normalize", "Normalize"));
    }
    let modules: Vec<Value> = modules
        .iter()
        .enumerate()
        .map(|(idx, (path, kind))| {
            let kind = format!("sentence_transformers.models.{kind}");
            json!({"idx": idx, "name": idx.to_string(), "path": path, "type": kind})
        })
        .collect();
    files.insert("modules.json".to_owned(), pretty(&Value::Array(modules)));
    files
}

fn pooling_config(architecture: &Architecture) -> Value {
    let mut config = json!({"word_embedding_dimension": architecture.d_model});
    for (flag, pooling) in [
        ("pooling_mode_cls_token", Pooling::Cls),
        ("pooling_mode_mean_tokens", Pooling::Mean),
        ("pooling_mode_max_tokens", Pooling::Max),
        ("pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
        ("pooling_mode_lasttoken", Pooling::LastToken),
    ] {
        config[flag] = json!(architecture.pooling == pooling);
    }
    config
}

/// Writes the weights into a directory under construction; returns the bytes of all tensors.
pub(super) fn write_weights(dir: &ArtefactDir, model: &Weights) -> Result<u64, CompressError> {
    let tensors = tensors(model)?;
    let n_bytes = tensors.iter().map(|tensor| tensor.data.len() as u64).sum();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("generator".to_owned(), generator())]);
    write_safetensors(&dir.path().join(WEIGHTS_FILE), tensors, &metadata)?;
    Ok(n_bytes)
}

/// The program and its version.
pub(super) fn generator() -> String {
    concat!("niwaki ", env!("CARGO_PKG_VERSION")).to_owned()
}
