//! `config.json` and the sentence-transformers files beside it, read into an [`ArchitectureSpec`].

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::CheckpointError;
use crate::model::{
    Activation, ArchitectureSpec, Band, Family, HeadConfig, LayerConfig, Pooling, Positions, ScoreFunction,
};

/// A model without a pooling module is pooled by the mean, as sentence-transformers does.
const DEFAULT_POOLING: Pooling = Pooling::Mean;

/// What `modules.json` and its neighbours say.
#[derive(Debug, Default)]
pub(super) struct SentenceModules {
    /// Folder of the transformer, relative to the model's.
    pub(super) transformer: PathBuf,
    pub(super) pooling: Option<Pooling>,
    pub(super) normalize: bool,
    pub(super) max_seq_length: Option<usize>,
}

#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

fn read_json(path: &Path, file: &str) -> Result<Option<Value>, CheckpointError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| CheckpointError::Json { file: file.to_owned(), source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CheckpointError::Io { path: path.to_owned(), source }),
    }
}

impl SentenceModules {
    /// Reads `modules.json` (absent: a plain transformer), the pooling configuration and the length limit.
    pub(super) fn read(dir: &Path) -> Result<Self, CheckpointError> {
        const FILE: &str = "modules.json";
        let mut found = Self::default();
        if let Some(value) = read_json(&dir.join(FILE), FILE)? {
            let modules: Vec<Module> = serde_json::from_value(value)
                .map_err(|source| CheckpointError::Json { file: FILE.to_owned(), source })?;
            for module in &modules {
                let path = Path::new(&module.path);
                if !path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                    return Err(CheckpointError::field(FILE, "path", format!("`{}` leaves the model", module.path)));
                }
                match module.kind.rsplit('.').next().unwrap_or_default() {
                    "Transformer" => found.transformer = path.to_owned(),
                    "Pooling" => {
                        let file = path.join("config.json");
                        let name = file.to_string_lossy().into_owned();
                        let hint = "the pooling module's configuration";
                        let value = read_json(&dir.join(&file), &name)?
                            .ok_or(CheckpointError::MissingFile { path: dir.join(&file), hint })?;
                        found.pooling = Some(pooling(&value, &name)?);
                    }
                    "Normalize" => found.normalize = true,
                    other => {
                        let reason = format!("module `{other}` is not supported (Transformer, Pooling, Normalize are)");
                        return Err(CheckpointError::field(FILE, "type", reason));
                    }
                }
            }
        }
        const LENGTH_FILE: &str = "sentence_bert_config.json";
        for folder in [dir.join(&found.transformer), dir.to_owned()] {
            if let Some(value) = read_json(&folder.join(LENGTH_FILE), LENGTH_FILE)? {
                found.max_seq_length = optional_usize(&value, LENGTH_FILE, "max_seq_length")?;
                break;
            }
        }
        Ok(found)
    }
}

/// Reads both the flag form (`pooling_mode_mean_tokens: true`) and the newer `pooling_mode: "mean"`.
fn pooling(config: &Value, file: &str) -> Result<Pooling, CheckpointError> {
    if let Some(mode) = config.get("pooling_mode").and_then(Value::as_str) {
        return match mode {
            "cls" => Ok(Pooling::Cls),
            "mean" => Ok(Pooling::Mean),
            "max" => Ok(Pooling::Max),
            "lasttoken" => Ok(Pooling::LastToken),
            "mean_sqrt_len_tokens" => Ok(Pooling::MeanSqrtLen),
            other => Err(CheckpointError::field(file, "pooling_mode", format!("`{other}` is not supported"))),
        };
    }
    const FLAGS: [(&str, Option<Pooling>); 6] = [
        ("pooling_mode_cls_token", Some(Pooling::Cls)),
        ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("pooling_mode_max_tokens", Some(Pooling::Max)),
        ("pooling_mode_mean_sqrt_len_tokens", Some(Pooling::MeanSqrtLen)),
        ("pooling_mode_lasttoken", Some(Pooling::LastToken)),
        ("pooling_mode_weightedmean_tokens", None),
    ];
    let set: Vec<_> =
        FLAGS.iter().filter(|(flag, _)| config.get(flag).and_then(Value::as_bool) == Some(true)).collect();
    match set[..] {
        [&(_, Some(pooling))] => Ok(pooling),
        [] => Err(CheckpointError::field(file, "pooling_mode_*", "no mode is set")),
        [&(flag, None)] => Err(CheckpointError::field(file, flag, "is not supported")),
        _ => Err(CheckpointError::field(file, "pooling_mode_*", "more than one mode is set (concatenation)")),
    }
}

/// The transformer's configuration.
pub const CONFIG_FILE: &str = "config.json";

fn optional_usize(config: &Value, file: &str, key: &str) -> Result<Option<usize>, CheckpointError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| CheckpointError::field(file, key, format!("`{value}` is not a non-negative integer"))),
    }
}

fn required_usize(config: &Value, key: &str) -> Result<usize, CheckpointError> {
    optional_usize(config, CONFIG_FILE, key)?.ok_or_else(|| CheckpointError::field(CONFIG_FILE, key, "is missing"))
}

fn activation(config: &Value, key: &str) -> Result<Activation, CheckpointError> {
    match config.get(key).and_then(Value::as_str) {
        None | Some("gelu") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some("relu") => Ok(Activation::Relu),
        Some(other) => Err(CheckpointError::field(CONFIG_FILE, key, format!("`{other}` is not supported"))),
    }
}

/// The classification head of `…ForSequenceClassification`, with Hugging Face's choice of what makes scores of its
/// numbers (`TextClassificationPipeline`); `None` for other models.
fn head(config: &Value, family: Family) -> Result<Option<HeadConfig>, CheckpointError> {
    let architectures = config.get("architectures").and_then(Value::as_array);
    let names = architectures.into_iter().flatten().filter_map(Value::as_str);
    if !names.into_iter().any(|name| name.ends_with("ForSequenceClassification")) {
        return Ok(None);
    }
    let labels = match config.get("id2label") {
        None | Some(Value::Null) => {
            // Hugging Face leaves out what is its default: two labels.
            let n_labels = optional_usize(config, CONFIG_FILE, "num_labels")?.unwrap_or(2);
            if n_labels > 1 << 16 {
                return Err(CheckpointError::field(CONFIG_FILE, "num_labels", format!("{n_labels} are too many")));
            }
            (0..n_labels).map(|id| format!("LABEL_{id}")).collect()
        }
        Some(Value::Object(map)) => (0..map.len())
            .map(|id| map.get(&id.to_string()).and_then(Value::as_str).map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| CheckpointError::field(CONFIG_FILE, "id2label", "does not number labels from 0"))?,
        Some(other) => {
            return Err(CheckpointError::field(CONFIG_FILE, "id2label", format!("`{other}` is not an object")));
        }
    };
    let function = match config.get("problem_type").and_then(Value::as_str) {
        Some("regression") => ScoreFunction::Identity,
        Some("multi_label_classification") => ScoreFunction::Sigmoid,
        _ if labels.len() == 1 => ScoreFunction::Sigmoid,
        None | Some("single_label_classification") => ScoreFunction::Softmax,
        Some(other) => {
            return Err(CheckpointError::field(CONFIG_FILE, "problem_type", format!("`{other}` is not supported")));
        }
    };
    let dense = match family {
        Family::Bert | Family::Roberta => Activation::Tanh,
        Family::Distilbert => Activation::Relu,
    };
    Ok(Some(HeadConfig { dense, labels, function }))
}

/// Builds the specification of an uncompressed model. Sizes are checked later, by `Architecture::new`.
pub(super) fn architecture(
    config: &Value,
    modules: &SentenceModules,
    pooling: Option<Pooling>,
) -> Result<ArchitectureSpec, CheckpointError> {
    let model_type = config
        .get("model_type")
        .and_then(Value::as_str)
        .ok_or_else(|| CheckpointError::field(CONFIG_FILE, "model_type", "is missing"))?;
    let family = match model_type {
        "bert" => Family::Bert,
        "roberta" | "xlm-roberta" | "camembert" => Family::Roberta,
        "distilbert" => Family::Distilbert,
        other => return Err(CheckpointError::UnknownArchitecture(other.to_owned())),
    };
    if let Some(kind) = config.get("position_embedding_type").and_then(Value::as_str).filter(|&kind| kind != "absolute")
    {
        let reason = format!("`{kind}` is not supported");
        return Err(CheckpointError::field(CONFIG_FILE, "position_embedding_type", reason));
    }
    if config.get("is_decoder").and_then(Value::as_bool) == Some(true) {
        return Err(CheckpointError::field(CONFIG_FILE, "is_decoder", "decoders are not supported"));
    }
    if config.get("sinusoidal_pos_embds").and_then(Value::as_bool) == Some(true) {
        tracing::debug!("sinusoidal positions are read from the stored table");
    }
    let keys = match family {
        Family::Bert | Family::Roberta => {
            ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"]
        }
        Family::Distilbert => ["dim", "n_layers", "n_heads", "hidden_dim", "activation"],
    };
    let d_model = required_usize(config, keys[0])?;
    let n_layers = required_usize(config, keys[1])?;
    let n_heads = required_usize(config, keys[2])?;
    let d_ffn = required_usize(config, keys[3])?;
    if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
        let reason = format!("{n_heads} heads do not divide a width of {d_model}");
        return Err(CheckpointError::field(CONFIG_FILE, keys[2], reason));
    }
    if n_layers > 1_024 {
        return Err(CheckpointError::field(CONFIG_FILE, keys[1], format!("{n_layers} layers are more than 1024")));
    }
    let offset = match family {
        Family::Roberta => optional_usize(config, CONFIG_FILE, "pad_token_id")?.unwrap_or(1).saturating_add(1),
        Family::Bert | Family::Distilbert => 0,
    };
    let positions = Positions { table_len: required_usize(config, "max_position_embeddings")?, offset, tiled: false };
    let usable = positions.table_len.saturating_sub(offset);
    let layer = LayerConfig { n_heads, d_head: d_model / n_heads, d_ffn, band: Band::FULL };
    #[allow(clippy::cast_possible_truncation, reason = "an epsilon needs no more than f32")]
    let norm_eps = config.get("layer_norm_eps").and_then(Value::as_f64).unwrap_or(1e-12) as f32;
    let head = head(config, family)?;
    Ok(ArchitectureSpec {
        ranges: Vec::new(),
        family,
        vocab_size: required_usize(config, "vocab_size")?,
        n_token_types: match family {
            Family::Distilbert => 0,
            // Hugging Face's default for both: a table that is there is not left out because nobody says so.
            Family::Bert | Family::Roberta => optional_usize(config, CONFIG_FILE, "type_vocab_size")?.unwrap_or(2),
        },
        positions,
        d_model,
        norm_eps,
        activation: activation(config, keys[4])?,
        layers: vec![layer; n_layers],
        // A head reads the first token, whatever is asked for.
        pooling: match head {
            Some(_) => Pooling::Cls,
            None => pooling.or(modules.pooling).unwrap_or(DEFAULT_POOLING),
        },
        normalize: modules.normalize && head.is_none(),
        max_input_tokens: modules.max_seq_length.unwrap_or(usable).min(usable),
        head,
    })
}

/// Parses `config.json` of the transformer folder.
pub(super) fn read_config(dir: &Path) -> Result<Value, CheckpointError> {
    let path = dir.join(CONFIG_FILE);
    read_json(&path, CONFIG_FILE)?
        .ok_or(CheckpointError::MissingFile { path, hint: "a model directory holds config.json" })
}
