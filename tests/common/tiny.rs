//! A tiny BERT sentence encoder with reproducible weights, written as a Hugging Face directory.

use std::collections::BTreeMap;
use std::fs;

use niwaki::checkpoint::{Dtype, TensorOut, write_safetensors};
use rand::{RngExt, SeedableRng};

/// A change to a tensor before it is written.
pub(crate) type TensorEdit = fn(&mut TensorOut<'static>);

/// What to vary.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TinyModel {
    /// Seed of the weights.
    pub(crate) seed: u64,
    /// Prefix of the tensor names.
    pub(crate) prefix: &'static str,
    /// `gamma` and `beta` instead of `weight` and `bias`.
    pub(crate) old_norm_names: bool,
    /// Stored as F16.
    pub(crate) half: bool,
    /// A change to one tensor.
    pub(crate) edit: Option<(&'static str, TensorEdit)>,
    /// Width.
    pub(crate) d_model: usize,
    /// Heads.
    pub(crate) n_heads: usize,
    /// FFN neurons.
    pub(crate) d_ffn: usize,
    /// Layers.
    pub(crate) n_layers: usize,
    /// Words.
    pub(crate) vocab_size: usize,
    /// Positions.
    pub(crate) n_positions: usize,
    /// `max_seq_length`.
    pub(crate) max_seq_length: usize,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            seed: 1,
            prefix: "",
            old_norm_names: false,
            half: false,
            edit: None,
            d_model: 32,
            n_heads: 2,
            d_ffn: 64,
            n_layers: 2,
            vocab_size: 40,
            n_positions: 16,
            max_seq_length: 12,
        }
    }
}

/// Words of the tiny vocabulary after the special tokens.
pub(crate) const WORDS: [&str; 35] = [
    "a", "tree", "garden", "small", "is", "the", "of", "and", "to", "in", "pine", "cut", "leaf", "root", "branch",
    "##s", "##ed", "##ing", "water", "stone", "moss", "path", "light", "old", "young", "grow", "keep", "shape", ".",
    ",", "?", "!", "b", "c", "d",
];

/// A WordPiece tokenizer file over [`WORDS`].
pub(crate) fn tokenizer_json(vocab_size: usize) -> serde_json::Value {
    let mut vocab = serde_json::Map::new();
    let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    for (id, word) in specials.iter().chain(&WORDS).take(vocab_size).enumerate() {
        vocab.insert((*word).to_owned(), id.into());
    }
    let added: Vec<_> = specials
        .iter()
        .enumerate()
        .map(|(id, content)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab}
    })
}

/// Writes the model into a fresh directory.
pub(crate) fn tiny_dir(model: &TinyModel) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (d, ffn) = (model.d_model, model.d_ffn);
    let mut rng = rand::rngs::StdRng::seed_from_u64(model.seed);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, around: f32| {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| around + rng.random_range(-0.3f32..0.3)).collect();
        let (dtype, data): (_, Vec<u8>) = if model.half {
            (Dtype::F16, values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect())
        } else {
            (Dtype::F32, bytemuck::cast_slice(&values).to_vec())
        };
        tensors.push(TensorOut { name: format!("{}{name}", model.prefix), dtype, shape, data: data.into() });
    };
    let (gain, shift) = if model.old_norm_names { ("gamma", "beta") } else { ("weight", "bias") };
    add("embeddings.word_embeddings.weight".into(), vec![model.vocab_size, d], 0.0);
    add("embeddings.position_embeddings.weight".into(), vec![model.n_positions, d], 0.0);
    add("embeddings.token_type_embeddings.weight".into(), vec![2, d], 0.0);
    add(format!("embeddings.LayerNorm.{gain}"), vec![d], 1.0);
    add(format!("embeddings.LayerNorm.{shift}"), vec![d], 0.0);
    for layer in 0..model.n_layers {
        let layer = format!("encoder.layer.{layer}");
        for (module, rows, cols) in [
            ("attention.self.query", d, d),
            ("attention.self.key", d, d),
            ("attention.self.value", d, d),
            ("attention.output.dense", d, d),
            ("intermediate.dense", ffn, d),
            ("output.dense", d, ffn),
        ] {
            add(format!("{layer}.{module}.weight"), vec![rows, cols], 0.0);
            add(format!("{layer}.{module}.bias"), vec![rows], 0.0);
        }
        for module in ["attention.output.LayerNorm", "output.LayerNorm"] {
            add(format!("{layer}.{module}.{gain}"), vec![d], 1.0);
            add(format!("{layer}.{module}.{shift}"), vec![d], 0.0);
        }
    }
    if let Some((name, edit)) = model.edit {
        let name = format!("{}{name}", model.prefix);
        edit(tensors.iter_mut().find(|tensor| tensor.name == name).expect("the tensor to edit exists"));
    }
    write_safetensors(&dir.path().join("model.safetensors"), tensors, &BTreeMap::new()).expect("weights are written");
    let json = |value: serde_json::Value| value.to_string();
    let write = |file: &str, text: String| {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().expect("inside the directory")).expect("folder");
        fs::write(path, text).expect("file");
    };
    write(
        "config.json",
        json(serde_json::json!({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": d,
            "num_hidden_layers": model.n_layers, "num_attention_heads": model.n_heads, "intermediate_size": ffn,
            "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": model.n_positions,
            "type_vocab_size": 2, "vocab_size": model.vocab_size, "pad_token_id": 0})),
    );
    write("tokenizer.json", json(tokenizer_json(model.vocab_size)));
    write(
        "modules.json",
        json(serde_json::json!([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])),
    );
    write(
        "1_Pooling/config.json",
        json(serde_json::json!({"word_embedding_dimension": d, "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false})),
    );
    write(
        "sentence_bert_config.json",
        json(serde_json::json!({"max_seq_length": model.max_seq_length, "do_lower_case": false})),
    );
    dir
}
