//! Names of the matrices of a model.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::passes::MatrixReport;
use crate::model::LinearSlot;

/// A matrix whose storage is a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MatrixSlot {
    /// The word embedding.
    Word,
    /// The position embedding.
    Position,
    /// The token type embedding.
    TokenType,
    /// A linear layer.
    Linear(LinearSlot),
}

/// A group of matrices that recipes can treat apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Every matrix.
    #[default]
    All,
    /// Queries, keys, values and the attention's output.
    Attention,
    /// Both matrices of the feed-forward part.
    Ffn,
    /// The embedding tables.
    Embedding,
}

/// Every linear layer of a layer.
pub(super) fn linear_slots(layer: usize) -> [LinearSlot; 4] {
    [LinearSlot::Qkv(layer), LinearSlot::AttentionOut(layer), LinearSlot::FfnUp(layer), LinearSlot::FfnDown(layer)]
}

impl MatrixSlot {
    /// The group it belongs to.
    #[must_use]
    pub fn group(self) -> Group {
        match self {
            Self::Word | Self::Position | Self::TokenType => Group::Embedding,
            Self::Linear(LinearSlot::Qkv(_) | LinearSlot::AttentionOut(_)) => Group::Attention,
            Self::Linear(LinearSlot::FfnUp(_) | LinearSlot::FfnDown(_)) => Group::Ffn,
        }
    }

    /// A report's line that names it.
    #[must_use]
    pub fn report(self) -> MatrixReport {
        let layer = match self {
            Self::Linear(slot) => Some(slot.layer()),
            _ => None,
        };
        MatrixReport { matrix: self.to_string(), group: self.group().to_string(), layer, ..MatrixReport::default() }
    }
}

impl fmt::Display for MatrixSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word => f.write_str("word embedding"),
            Self::Position => f.write_str("position embedding"),
            Self::TokenType => f.write_str("token type embedding"),
            Self::Linear(slot) => slot.fmt(f),
        }
    }
}

impl Group {
    /// Whether a matrix belongs to it.
    #[must_use]
    pub fn contains(self, slot: MatrixSlot) -> bool {
        self == Self::All || self == slot.group()
    }
}

impl Group {
    /// Whether a matrix can belong to both.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self == Self::All || other == Self::All || self == other
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Attention => "attention",
            Self::Ffn => "ffn",
            Self::Embedding => "embedding",
        })
    }
}
