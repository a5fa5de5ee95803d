//! Where each weight of a family stands in a Hugging Face checkpoint: the only place with tensor names.

use crate::model::{Family, LinearSlot, NormSlot};

/// Suffix of the per-row scales beside an INT8 weight (the name that the compressed-tensors format uses).
pub const SCALE_SUFFIX: &str = "_scale";

/// Prefixes under which the encoder stands, depending on the head it was saved with.
#[must_use]
pub fn prefixes(family: Family) -> &'static [&'static str] {
    match family {
        Family::Bert => &["", "bert.", "model.", "0.auto_model."],
        Family::Roberta => &["", "roberta.", "xlm_roberta.", "camembert.", "model.", "0.auto_model."],
        Family::Distilbert => &["", "distilbert.", "model.", "0.auto_model."],
    }
}

/// The word embedding, whose presence also tells the prefix.
pub const WORD_EMBEDDING: &str = "embeddings.word_embeddings.weight";
/// The position embedding.
pub const POSITION_EMBEDDING: &str = "embeddings.position_embeddings.weight";
/// The token type embedding.
pub const TOKEN_TYPE_EMBEDDING: &str = "embeddings.token_type_embeddings.weight";

/// The modules whose rows, stacked in order, make up a linear layer (`….weight`, `….bias`).
#[must_use]
pub fn linear_modules(family: Family, slot: LinearSlot) -> Vec<String> {
    match family {
        Family::Bert | Family::Roberta => {
            let layer = format!("encoder.layer.{}", slot.layer());
            match slot {
                LinearSlot::Qkv(_) => {
                    ["query", "key", "value"].map(|part| format!("{layer}.attention.self.{part}")).to_vec()
                }
                LinearSlot::AttentionOut(_) => vec![format!("{layer}.attention.output.dense")],
                LinearSlot::FfnUp(_) => vec![format!("{layer}.intermediate.dense")],
                LinearSlot::FfnDown(_) => vec![format!("{layer}.output.dense")],
            }
        }
        Family::Distilbert => {
            let layer = format!("transformer.layer.{}", slot.layer());
            match slot {
                LinearSlot::Qkv(_) => {
                    ["q_lin", "k_lin", "v_lin"].map(|part| format!("{layer}.attention.{part}")).to_vec()
                }
                LinearSlot::AttentionOut(_) => vec![format!("{layer}.attention.out_lin")],
                LinearSlot::FfnUp(_) => vec![format!("{layer}.ffn.lin1")],
                LinearSlot::FfnDown(_) => vec![format!("{layer}.ffn.lin2")],
            }
        }
    }
}

/// The module of a LayerNorm (`….weight`, `….bias`; `….gamma`, `….beta` in old checkpoints).
#[must_use]
pub fn norm_module(family: Family, slot: NormSlot) -> String {
    match (family, slot) {
        (_, NormSlot::Embedding) => "embeddings.LayerNorm".to_owned(),
        (Family::Bert | Family::Roberta, NormSlot::Attention(layer)) => {
            format!("encoder.layer.{layer}.attention.output.LayerNorm")
        }
        (Family::Bert | Family::Roberta, NormSlot::Ffn(layer)) => format!("encoder.layer.{layer}.output.LayerNorm"),
        (Family::Distilbert, NormSlot::Attention(layer)) => format!("transformer.layer.{layer}.sa_layer_norm"),
        (Family::Distilbert, NormSlot::Ffn(layer)) => format!("transformer.layer.{layer}.output_layer_norm"),
    }
}
