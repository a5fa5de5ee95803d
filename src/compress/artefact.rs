//! The finished model as files.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::CompressError;
use super::slots::{Group, linear_slots};
use super::weights::Weights;
use crate::checkpoint::{ArtefactDir, Checkpoint, CheckpointError, Dtype, TensorOut, hf_names, write_safetensors};
use crate::exec::candle::WeightSource;
use crate::model::{Architecture, LinearSlot, NormSlot, Pooling};
use crate::quant::{Weight, quantize_rows_symmetric};

/// The weights file.
pub(super) const WEIGHTS_FILE: &str = "model.safetensors";
/// The recipe, with every setting spelt out.
pub(super) const RECIPE_FILE: &str = "recipe.toml";
/// The model card.
pub(super) const CARD_FILE: &str = "README.md";

/// Files of the source that are carried over as they are, when they exist.
const COPIED: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config_sentence_transformers.json"];

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
    [
        ("attention.weight", forms(&[Group::Attention])),
        ("ffn.weight", forms(&[Group::Ffn])),
        ("linear.input", "uint8-per-token-dynamic".to_owned()),
        ("linear.bias", "f32".to_owned()),
        ("embeddings", forms(&[Group::Embedding])),
        ("norms", "f32".to_owned()),
    ]
    .map(|(group, scheme)| (group.to_owned(), scheme))
    .into()
}

fn f32_tensor(name: String, shape: Vec<usize>, values: &[f32]) -> TensorOut<'static> {
    TensorOut { name, dtype: Dtype::F32, shape, data: bytemuck::cast_slice(values).to_vec().into() }
}

/// The tensors of a matrix in its stored form; INT8 per row when no pass has fixed one.
fn matrix_tensors(name: &str, form: Weight<'_>, cols: usize) -> Vec<TensorOut<'static>> {
    let (codes, scale) = match form {
        Weight::Int8 { codes, scale } => (codes.into_owned(), scale.into_owned()),
        Weight::F32(values) => quantize_rows_symmetric(&values, cols),
    };
    let rows = scale.len();
    vec![
        TensorOut {
            name: name.to_owned(),
            dtype: Dtype::I8,
            shape: vec![rows, cols],
            data: bytemuck::cast_slice(&codes).to_vec().into(),
        },
        f32_tensor(format!("{name}{}", hf_names::SCALE_SUFFIX), vec![rows, 1], &scale),
    ]
}

/// The rows `rows` of a matrix: linear layers that are played as one stand apart in files.
fn rows_of(form: &Weight<'_>, rows: std::ops::Range<usize>, cols: usize) -> Weight<'static> {
    let elements = rows.start * cols..rows.end * cols;
    match form {
        Weight::F32(values) => Weight::F32(values[elements].to_vec().into()),
        Weight::Int8 { codes, scale } => {
            Weight::Int8 { codes: codes[elements].to_vec().into(), scale: scale[rows].to_vec().into() }
        }
    }
}

/// Every tensor of the artefact: matrices and tables in their stored form, the rest f32.
pub(super) fn tensors(model: &Weights) -> Result<Vec<TensorOut<'static>>, CompressError> {
    let spec = model.architecture();
    let width = spec.d_model;
    let mut out = Vec::new();
    let tables = model.tables()?;
    out.extend(matrix_tensors(hf_names::WORD_EMBEDDING, tables.word, width));
    out.extend(matrix_tensors(hf_names::POSITION_EMBEDDING, tables.position, width));
    if let Some(table) = tables.token_type {
        out.extend(matrix_tensors(hf_names::TOKEN_TYPE_EMBEDDING, table, width));
    }
    let mut norms = vec![NormSlot::Embedding];
    for layer in 0..spec.layers.len() {
        norms.extend([NormSlot::Attention(layer), NormSlot::Ffn(layer)]);
        for slot in linear_slots(layer) {
            out.extend(linear_tensors(spec, model, slot)?);
        }
    }
    for slot in norms {
        let norm = model.norm(slot)?;
        let module = hf_names::norm_module(spec.family, slot);
        out.push(f32_tensor(format!("{module}.weight"), vec![width], &norm.gain));
        out.push(f32_tensor(format!("{module}.bias"), vec![width], &norm.bias));
    }
    Ok(out)
}

fn linear_tensors(
    spec: &Architecture,
    model: &Weights,
    slot: LinearSlot,
) -> Result<Vec<TensorOut<'static>>, CompressError> {
    let linear = model.linear(slot)?;
    let modules = hf_names::linear_modules(spec.family, slot);
    let rows = linear.n_out / modules.len();
    let mut out = Vec::new();
    for (index, (module, bias)) in modules.iter().zip(linear.bias.chunks_exact(rows)).enumerate() {
        let part = rows_of(&linear.weight, index * rows..(index + 1) * rows, linear.n_in);
        out.extend(matrix_tensors(&format!("{module}.weight"), part, linear.n_in));
        out.push(f32_tensor(format!("{module}.bias"), vec![rows], bias));
    }
    Ok(out)
}

/// The source's `config.json` with a `quantization_config` in the compressed-tensors layout. Widths that pruning made
/// differ from layer to layer have no place in that file; they are in the manifest.
fn config(source: &Checkpoint) -> Result<Value, CompressError> {
    let file = "config.json";
    let json = |source| CheckpointError::Json { file: file.to_owned(), source };
    let bytes = read_source(source, file)?.unwrap_or_else(|| b"{}".to_vec());
    let mut config: Value = serde_json::from_slice(&bytes).map_err(json)?;
    let weights = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false});
    let inputs = json!({"num_bits": 8, "type": "int", "symmetric": false, "strategy": "token", "dynamic": true});
    if let Some(config) = config.as_object_mut() {
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

/// A file of the source's transformer, wherever `modules.json` puts it.
pub(super) fn read_source(source: &Checkpoint, file: &str) -> Result<Option<Vec<u8>>, CompressError> {
    let Some(dir) = source.dir() else { return Ok(None) };
    let transformer = std::fs::read(dir.join("modules.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
        .and_then(|modules| modules.pointer("/0/path").and_then(Value::as_str).map(str::to_owned))
        .unwrap_or_default();
    for path in [dir.join(file), dir.join(transformer).join(file)] {
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
    architecture: &Architecture,
) -> Result<BTreeMap<String, Vec<u8>>, CompressError> {
    let mut files = BTreeMap::from([
        ("tokenizer.json".to_owned(), source.tokenizer_json().to_vec()),
        ("config.json".to_owned(), pretty(&config(source)?)),
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
    for file in COPIED {
        if let Some(bytes) = read_source(source, file)? {
            files.insert(file.to_owned(), bytes);
        }
    }
    Ok(files)
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
    let metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("generator".to_owned(), generator()),
        ("quantization".to_owned(), "int8, one scale per row".to_owned()),
    ]);
    write_safetensors(&dir.path().join(WEIGHTS_FILE), tensors, &metadata)?;
    Ok(n_bytes)
}

/// The program and its version.
pub(super) fn generator() -> String {
    concat!("niwaki ", env!("CARGO_PKG_VERSION")).to_owned()
}
