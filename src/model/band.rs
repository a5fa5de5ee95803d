//! Which keys a query sees.

mod seen;
mod text;

use serde::{Deserialize, Serialize};

pub use seen::Seen;
pub use text::BandError;

/// The attention pattern of one layer: surroundings of the query, leading tokens, and for some shapes distant keys.
///
/// ```text
/// contains(q, k)  ⇔  k < max(globals, sinks)  ∨  q < globals  ∨  shape(q, k)
/// Window:   q − left ≤ k ≤ q + right
/// ```
///
/// `left` and `right` are counts of keys on either side of the query, in tokens; the query itself is always seen.
/// Full attention is the widest band ([`Band::FULL`]). "Window" alone is ambiguous in the literature (ModernBERT's
/// 128 means ±64, Mistral's `W` means `W − 1` to the left), so the sides are named.
///
/// Everything that depends on the pattern follows from [`Band::contains`] and [`Band::seen`]: the loop bounds of the
/// kernels, the masks of the f32 reference, costs, and tests, which hold the two to each other.
///
/// Source: Beltagy et al. 2020, Longformer, §3.1 (sliding window, global attention); Xiao et al. 2023, StreamingLLM, §3
/// (attention sinks: leading tokens that all see).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Band {
    /// Keys before the query that are seen.
    pub left: u32,
    /// Keys after the query that are seen.
    pub right: u32,
    /// Leading tokens of each sequence that every query sees and that see every key.
    #[serde(default)]
    pub globals: u32,
    /// Leading tokens of each sequence that every query sees, without seeing more than others themselves.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sinks: u32,
    /// What the surroundings look like, and what is seen beyond them.
    #[serde(default, skip_serializing_if = "Shape::is_window")]
    pub shape: Shape,
}

/// How a band continues beyond its simplest form. Patterns made for decoders are taken in both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Shape {
    /// All keys from `q − left` to `q + right`.
    #[default]
    Window,
    /// Every `step`-th key: `step | k − q`, and `left` and `right` count steps. Source: Longformer, §3.1.
    Dilated {
        /// Distance of seen keys, at least 1.
        step: u32,
    },
    /// The window, and every key a multiple of `stride` away.
    ///
    /// Source: Child et al. 2019, Sparse Transformer, §4.2, strided attention: `A₁ = {q − l, …, q}`,
    /// `A₂ = {k : l | q − k}`, here one set `A₁ ∪ A₂` for all heads and on both sides of the query.
    Strided {
        /// Distance of seen keys, at least 1.
        stride: u32,
    },
    /// The query's own block, and the last `columns` keys of every block; `left` and `right` mean nothing.
    ///
    /// Source: Child et al. 2019, §4.2, fixed attention: `A₁ = {k : ⌊k/l⌋ = ⌊q/l⌋}`, `A₂ = {k : k mod l ≥ l − c}`,
    /// here one set for all heads and on both sides of the query.
    Fixed {
        /// Tokens of a block, at least 1.
        block: u32,
        /// Columns of a block that all see, at most the block.
        columns: u32,
    },
    /// Whole blocks: the query's own, `left` before and `right` after it; and one summary of every other block, whose key
    /// and value are the means of the block's and which weighs as much as the block has tokens.
    ///
    /// With all keys of a block equal this is full attention. A training-free relative of the coarse level in Zhu and
    /// Soricut 2021, H-Transformer-1D, §4.
    Pooled {
        /// Tokens of a block, at least 1.
        block: u32,
    },
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Shape {
    fn is_window(&self) -> bool {
        *self == Self::Window
    }
}

/// As many as fit the address space.
fn count(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl Band {
    /// Every query sees every key.
    pub const FULL: Self = Self { left: u32::MAX, right: u32::MAX, globals: 0, sinks: 0, shape: Shape::Window };

    /// A symmetric window of `left = right = width` keys on either side, and `globals` leading global tokens.
    #[must_use]
    pub fn symmetric(width: u32, globals: u32) -> Self {
        Self { left: width, right: width, globals, ..Self::FULL }
    }

    /// The same with another shape.
    #[must_use]
    pub fn with_shape(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// Leading tokens that all see.
    fn leading(&self) -> usize {
        count(self.globals.max(self.sinks))
    }

    /// Whether query `query` sees key `key`, both positions inside one sequence. Summaries of [`Shape::Pooled`] are seen
    /// besides.
    ///
    /// This is the definition; loop bounds ([`Band::seen`]), masks and tests derive from it.
    #[must_use]
    pub fn contains(&self, query: usize, key: usize) -> bool {
        if key < self.leading() || query < count(self.globals) {
            return true;
        }
        let (left, right) = (count(self.left), count(self.right));
        let near = key.saturating_add(left) >= query && key <= query.saturating_add(right);
        match self.shape {
            Shape::Window => near,
            Shape::Dilated { step } => {
                let (step, distance) = (count(step).max(1), key.abs_diff(query));
                distance.is_multiple_of(step) && distance / step <= if key < query { left } else { right }
            }
            Shape::Strided { stride } => near || key.abs_diff(query).is_multiple_of(count(stride).max(1)),
            Shape::Fixed { block, columns } => {
                let block = count(block).max(1);
                key / block == query / block || key % block >= block.saturating_sub(count(columns))
            }
            Shape::Pooled { block } => {
                let block = count(block).max(1);
                let (query, key) = (query / block, key / block);
                key.saturating_add(left) >= query && key <= query.saturating_add(right)
            }
        }
    }

    /// Whether the band covers every pair of a sequence of `len` tokens.
    #[must_use]
    pub fn is_full_for(&self, len: usize) -> bool {
        let last = len.saturating_sub(1);
        match self.shape {
            Shape::Window => {
                count(self.left) >= last.saturating_sub(self.leading())
                    && count(self.right) >= last.saturating_sub(count(self.globals))
            }
            _ => (0..len).all(|query| self.seen(query, len).n_keys() == len),
        }
    }

    /// Number of `(query, key)` pairs that are computed for a sequence of `len` tokens, summaries included.
    #[must_use]
    pub fn n_pairs(&self, len: usize) -> u64 {
        (0..len).map(|query| self.seen(query, len).n_all() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_band_sees_everything_and_does_not_overflow() {
        assert!(Band::FULL.contains(u32::MAX as usize, 0));
        assert_eq!(Band::FULL.seen(5, 9).near, 0..9);
        assert!(Band::FULL.is_full_for(100_000));
    }

    #[test]
    fn the_patterns_of_the_papers() {
        let seen = |band: Band, query: usize| (0..24).filter(|&key| band.contains(query, key)).collect::<Vec<_>>();
        let dilated = Band::symmetric(2, 0).with_shape(Shape::Dilated { step: 3 });
        assert_eq!(seen(dilated, 10), [4, 7, 10, 13, 16]);
        let strided = Band::symmetric(2, 0).with_shape(Shape::Strided { stride: 8 });
        assert_eq!(seen(strided, 10), [2, 8, 9, 10, 11, 12, 18]);
        let fixed = Band::FULL.with_shape(Shape::Fixed { block: 6, columns: 1 });
        assert_eq!(seen(fixed, 7), [5, 6, 7, 8, 9, 10, 11, 17, 23]);
        let sinks = Band { left: 1, right: 1, sinks: 2, ..Band::FULL };
        assert_eq!(seen(sinks, 10), [0, 1, 9, 10, 11]);
        assert_eq!(seen(sinks, 0), [0, 1]);
        let pooled = Band::symmetric(1, 0).with_shape(Shape::Pooled { block: 4 });
        assert_eq!(seen(pooled, 10), (4..16).collect::<Vec<_>>());
        assert_eq!(pooled.seen(10, 22).pooled, [0..1, 4..6]);
    }

    #[test]
    fn stored_bands_of_older_manifests_open_and_are_written_as_before() {
        let old = r#"{"left":64,"right":64,"globals":1}"#;
        let band: Band = serde_json::from_str(old).unwrap();
        assert_eq!(band, Band::symmetric(64, 1));
        assert_eq!(serde_json::to_string(&band).unwrap(), old);
        assert_eq!(serde_json::from_str::<Band>(r#"{"left":1,"right":2}"#).unwrap().globals, 0);
        let new = Band { sinks: 4, ..Band::symmetric(2, 0).with_shape(Shape::Fixed { block: 64, columns: 4 }) };
        assert_eq!(serde_json::from_str::<Band>(&serde_json::to_string(&new).unwrap()).unwrap(), new);
    }
}
