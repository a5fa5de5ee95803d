//! What a checkpoint is made of: bytes by group of tensors, and each matrix with its stored form.

use serde::{Deserialize, Serialize};

use super::{Checkpoint, CheckpointError, hf_names};
use crate::model::{HeadSlot, LinearSlot};
use crate::quant::Weight;

/// Tensors that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TensorGroup {
    /// The word embedding.
    WordEmbedding,
    /// Position and token type embeddings.
    OtherEmbeddings,
    /// Matrices of the attention.
    Attention,
    /// Matrices of the FFN.
    Ffn,
    /// LayerNorms and biases.
    NormsAndBiases,
    /// The classification head.
    Head,
    /// What the encoder does not read.
    Unused,
}

impl TensorGroup {
    /// All, in the order of a forward.
    pub const ALL: [Self; 7] = [
        Self::WordEmbedding,
        Self::OtherEmbeddings,
        Self::Attention,
        Self::Ffn,
        Self::NormsAndBiases,
        Self::Head,
        Self::Unused,
    ];

    /// For readers.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::WordEmbedding => "word embedding",
            Self::OtherEmbeddings => "other embeddings",
            Self::Attention => "attention",
            Self::Ffn => "FFN",
            Self::NormsAndBiases => "norms and biases",
            Self::Head => "head",
            Self::Unused => "unused",
        }
    }
}

/// One group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupSize {
    /// Which.
    pub group: TensorGroup,
    /// Bytes of its tensors, scales and tables of values included.
    pub bytes: u64,
    /// Numbers that they stand for.
    pub elements: u64,
    /// Forms that occur, in order of first use.
    pub forms: Vec<String>,
}

impl GroupSize {
    /// Bits that a number takes, scales included.
    #[must_use]
    pub fn bits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elements.max(1) as f64
    }
}

/// One matrix or table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MatrixInfo {
    /// Its layer; tables have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// What it does: `qkv`, `attention-out`, `ffn-up`, `ffn-down`, `word`, `position`, `token-type`.
    pub role: String,
    /// Output channels, or rows of a table.
    pub rows: usize,
    /// Inputs, or width of a table.
    pub cols: usize,
    /// The stored form in words.
    pub form: String,
    /// Bytes of its tensors, without the bias.
    pub bytes: u64,
    /// Bits that a number takes, scales included.
    pub bits: f64,
    /// Share of its numbers that are zero.
    pub zeros: f64,
    /// Share of its numbers that are neither stored nor multiplied.
    pub skipped: f64,
    /// Rank of a low-rank form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Multiply-accumulates per token; 0 for tables, whose rows are only fetched.
    pub macs: u64,
}

/// A checkpoint's tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// Bytes by group, every group that has a tensor.
    pub groups: Vec<GroupSize>,
    /// Tables, then the matrices of each layer.
    pub matrices: Vec<MatrixInfo>,
}

impl Inventory {
    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.groups.iter().map(|group| group.bytes).sum()
    }

    /// Bytes of a group.
    #[must_use]
    pub fn bytes_of(&self, group: TensorGroup) -> u64 {
        self.groups.iter().filter(|entry| entry.group == group).map(|entry| entry.bytes).sum()
    }

    /// Multiply-accumulates per token of all matrices as they are stored: skipped blocks and low ranks count as less.
    #[must_use]
    pub fn macs_per_token(&self) -> u64 {
        self.matrices.iter().map(|matrix| matrix.macs).sum()
    }

    /// The matrices of a layer.
    #[must_use]
    pub fn of_layer(&self, layer: usize) -> Vec<&MatrixInfo> {
        self.matrices.iter().filter(|matrix| matrix.layer == Some(layer)).collect()
    }

    /// The mean over some matrices, weighted by their size.
    pub fn mean<'a>(matrices: impl Iterator<Item = &'a MatrixInfo>, of: impl Fn(&MatrixInfo) -> f64) -> f64 {
        let (mut sum, mut all) = (0.0, 0.0);
        for matrix in matrices {
            let size = (matrix.rows * matrix.cols) as f64;
            sum += of(matrix) * size;
            all += size;
        }
        sum / all.max(1.0)
    }

    /// Bits that a weight takes in the mean.
    #[must_use]
    pub fn bits(&self) -> f64 {
        Self::mean(self.matrices.iter(), |matrix| matrix.bits)
    }

    /// Share of the weights that are zero.
    #[must_use]
    pub fn zeros(&self) -> f64 {
        Self::mean(self.matrices.iter(), |matrix| matrix.zeros)
    }

    /// Share of the weights that are neither stored nor multiplied.
    #[must_use]
    pub fn skipped(&self) -> f64 {
        Self::mean(self.matrices.iter(), |matrix| matrix.skipped)
    }
}

/// The four products of a layer.
fn slots(layer: usize) -> [(LinearSlot, &'static str, TensorGroup); 4] {
    [
        (LinearSlot::Qkv(layer), "qkv", TensorGroup::Attention),
        (LinearSlot::AttentionOut(layer), "attention-out", TensorGroup::Attention),
        (LinearSlot::FfnUp(layer), "ffn-up", TensorGroup::Ffn),
        (LinearSlot::FfnDown(layer), "ffn-down", TensorGroup::Ffn),
    ]
}

impl Checkpoint {
    /// Lists what is stored.
    ///
    /// # Errors
    /// If a tensor is damaged.
    pub fn inventory(&self) -> Result<Inventory, CheckpointError> {
        let spec = self.architecture();
        let mut matrices = Vec::new();
        let mut groups: Vec<GroupSize> =
            TensorGroup::ALL.map(|group| GroupSize { group, bytes: 0, elements: 0, forms: Vec::new() }).into();
        let mut used = 0;
        let mut add = |group: TensorGroup,
                       layer: Option<usize>,
                       role: &str,
                       (rows, cols): (usize, usize),
                       weight: &Weight<'_>,
                       bytes| {
            let form = weight.scheme();
            let macs = if layer.is_some() { weight.macs(rows, cols) } else { 0 };
            let numbers = weight.to_f32(cols);
            let n_zeros = numbers.iter().filter(|number| **number == 0.0).count();
            let elements = (rows * cols) as u64;
            let entry = &mut groups[group as usize];
            entry.bytes += bytes;
            entry.elements += elements;
            if !entry.forms.contains(&form) {
                entry.forms.push(form.clone());
            }
            used += bytes;
            matrices.push(MatrixInfo {
                layer,
                role: role.to_owned(),
                rows,
                cols,
                form,
                bytes,
                bits: bytes as f64 * 8.0 / elements.max(1) as f64,
                zeros: n_zeros as f64 / elements.max(1) as f64,
                skipped: match weight {
                    Weight::BlockSparse(sparse) => (1.0 - sparse.blocks.len() as f64 / elements.max(1) as f64).max(0.0),
                    _ => 0.0,
                },
                rank: match weight {
                    Weight::LowRank(product) => Some(product.rank),
                    _ => None,
                },
                macs,
            });
        };
        let tables = self.tables()?;
        let width = spec.d_model;
        for (role, name, rows, table, group) in [
            ("word", hf_names::WORD_EMBEDDING, spec.vocab_size, Some(&tables.word), TensorGroup::WordEmbedding),
            (
                "position",
                hf_names::POSITION_EMBEDDING,
                spec.positions.table_len,
                Some(&tables.position),
                TensorGroup::OtherEmbeddings,
            ),
            (
                "token-type",
                hf_names::TOKEN_TYPE_EMBEDDING,
                spec.n_token_types,
                tables.token_type.as_ref(),
                TensorGroup::OtherEmbeddings,
            ),
        ] {
            if let Some(table) = table {
                add(group, None, role, (rows, width), table, self.bytes_under(name));
            }
        }
        for (layer, config) in spec.layers.iter().enumerate() {
            for (slot, role, group) in slots(layer) {
                // Each module's own tensors, or those of all in one, which have a name of their own where they are several.
                let modules = hf_names::linear_modules(spec.family, slot);
                let mut names: Vec<String> = modules.iter().map(|module| format!("{module}.weight")).collect();
                names.push(hf_names::whole_weight(spec.family, slot));
                names.dedup();
                let bytes = names.iter().map(|name| self.bytes_under(name)).sum();
                add(group, Some(layer), role, slot.shape(config, width), &self.linear(slot)?.weight, bytes);
            }
        }
        let mut biases = 0;
        let mut norms = vec![crate::model::NormSlot::Embedding];
        for layer in 0..spec.layers.len() {
            norms.extend([crate::model::NormSlot::Attention(layer), crate::model::NormSlot::Ffn(layer)]);
            for (slot, ..) in slots(layer) {
                for module in hf_names::linear_modules(spec.family, slot) {
                    biases += self.bytes_under(&format!("{module}.bias"));
                }
            }
        }
        for slot in norms {
            biases += self.bytes_under(&format!("{}.", hf_names::norm_module(spec.family, slot)));
        }
        let rest = &mut groups[TensorGroup::NormsAndBiases as usize];
        (rest.bytes, rest.elements, rest.forms) = (biases, biases / 4, vec!["f32".to_owned()]);
        let mut head = 0;
        for slot in HeadSlot::ALL.into_iter().filter(|_| spec.head.is_some()) {
            for part in ["weight", "bias"] {
                head += self.head_tensor(slot, part)?.data.len() as u64;
            }
        }
        let entry = &mut groups[TensorGroup::Head as usize];
        (entry.bytes, entry.elements) = (head, HeadSlot::n_elements(spec) as u64);
        entry.forms = vec!["f32".to_owned()];
        let unused = self.bytes_under_any("").saturating_sub(used + biases + head);
        groups[TensorGroup::Unused as usize].bytes = unused;
        groups.retain(|entry| entry.bytes > 0);
        Ok(Inventory { groups, matrices })
    }

    /// Bytes of all tensors whose name starts so, behind the prefix that this checkpoint has.
    fn bytes_under(&self, start: &str) -> u64 {
        self.bytes_under_any(&format!("{}{start}", self.prefix()))
    }

    fn bytes_under_any(&self, start: &str) -> u64 {
        self.tensor_sizes().filter(|(name, _)| name.starts_with(start)).map(|(_, bytes)| bytes as u64).sum()
    }
}
