//! Where each weight of a family stands in a Hugging Face checkpoint: the only place with tensor names.

use crate::model::{Family, HeadSlot, LinearSlot, NormSlot};

// Suffixes to the name of a matrix, `….weight`. One tensor of the plain name is f32 or INT8; the others are there instead
// of it. What the parts mean is in `quant`.
//
// | form | tensors beside `….weight` or instead of it |
// |---|---|
// | INT8 | `….weight` I8 `[rows, cols]`, `_scale` F32 `[rows, 1]` |
// | INT8 with offset | the same and `_offset` F32 `[rows, 1]` |
// | codebook | `_indices` U8 `[rows, ⌈cols / 2⌉]`, `_table` I8 `[16]`, `_scale` F32 or F16 `[rows, n_groups]`, if need be `_zero` I8 `[rows, n_groups]` |
// | block sparse | `_blocks` I8 `[n_blocks, width, 4]`, `_mask` U8, `_scale` F32 `[rows, 1]` |
// | bitmap | `_values` I8 `[n_values]`, `_mask` U8 `[rows, ⌈cols / 8⌉]`, `_scale` F32 `[rows, 1]` |
// | low rank | two matrices, `….weight_down` `[rank, cols]` and `….weight_up` `[rows, rank]`, each in any other form |

/// Per-row (codebook: per-group) scales; the name that the compressed-tensors format uses.
pub const SCALE_SUFFIX: &str = "_scale";
/// Real-valued offsets of asymmetric INT8.
pub const OFFSET_SUFFIX: &str = "_offset";
/// Packed 4-bit indices.
pub const INDICES_SUFFIX: &str = "_indices";
/// What the indices stand for.
pub const TABLE_SUFFIX: &str = "_table";
/// Integer zero points of a codebook's groups.
pub const ZERO_SUFFIX: &str = "_zero";
/// The blocks of a block-sparse matrix.
pub const BLOCKS_SUFFIX: &str = "_blocks";
/// The elements of a bitmap matrix.
pub const VALUES_SUFFIX: &str = "_values";
/// Which blocks or elements are there.
pub const MASK_SUFFIX: &str = "_mask";
/// The factor next to the input.
pub const DOWN_SUFFIX: &str = "_down";
/// The factor next to the output.
pub const UP_SUFFIX: &str = "_up";

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

/// Name of a linear layer's matrix as a whole: that of its module, or one of our own for stacked modules, which no
/// checkpoint of the ecosystem has.
#[must_use]
pub fn whole_weight(family: Family, slot: LinearSlot) -> String {
    let module = match (family, slot) {
        (Family::Bert | Family::Roberta, LinearSlot::Qkv(layer)) => format!("encoder.layer.{layer}.attention.self.qkv"),
        (Family::Distilbert, LinearSlot::Qkv(layer)) => format!("transformer.layer.{layer}.attention.qkv_lin"),
        _ => linear_modules(family, slot).swap_remove(0),
    };
    format!("{module}.weight")
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

/// The module of a classification head's layer. BERT's first one is part of the encoder (its pooler) and has the
/// encoder's prefix; the others stand at the root.
#[must_use]
pub fn head_module(family: Family, slot: HeadSlot) -> &'static str {
    match (family, slot) {
        (Family::Bert, HeadSlot::Dense) => "pooler.dense",
        (Family::Bert | Family::Distilbert, HeadSlot::Out) => "classifier",
        (Family::Roberta, HeadSlot::Dense) => "classifier.dense",
        (Family::Roberta, HeadSlot::Out) => "classifier.out_proj",
        (Family::Distilbert, HeadSlot::Dense) => "pre_classifier",
    }
}
