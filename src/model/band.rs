//! Which keys a query sees.

use serde::{Deserialize, Serialize};

/// The attention pattern of one layer: a window around the query, plus leading tokens that see and are seen by all.
///
/// ```text
/// contains(q, k)  ⇔  k < globals  ∨  q < globals  ∨  q − left ≤ k ≤ q + right
/// ```
///
/// `left` and `right` are counts of keys on either side of the query, in tokens; the query itself is always seen.
/// Full attention is the widest band ([`Band::FULL`]). "Window" alone is ambiguous in the literature (ModernBERT's
/// 128 means ±64, Mistral's `W` means `W − 1` to the left), so the sides are named.
///
/// Source: Beltagy et al. 2020, Longformer, §3.1 (sliding window + global attention).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Band {
    /// Keys before the query that are seen.
    pub left: u32,
    /// Keys after the query that are seen.
    pub right: u32,
    /// Leading tokens of each sequence that every query sees and that see every key.
    #[serde(default)]
    pub globals: u32,
}

impl Band {
    /// Every query sees every key.
    pub const FULL: Self = Self { left: u32::MAX, right: u32::MAX, globals: 0 };

    /// A symmetric window of `left = right = width` keys on either side, and `globals` leading global tokens.
    #[must_use]
    pub fn symmetric(width: u32, globals: u32) -> Self {
        Self { left: width, right: width, globals }
    }

    /// Whether the band covers every pair of a sequence of `len` tokens.
    #[must_use]
    pub fn is_full_for(&self, len: usize) -> bool {
        let reach = len.saturating_sub(1).saturating_sub(self.globals as usize);
        self.left as usize >= reach && self.right as usize >= reach
    }

    /// Whether query `query` sees key `key`, both positions inside one sequence.
    ///
    /// This is the definition; loop bounds ([`Band::window`]), masks and tests derive from it.
    #[must_use]
    pub fn contains(&self, query: usize, key: usize) -> bool {
        key < self.globals as usize
            || query < self.globals as usize
            || (key.saturating_add(self.left as usize) >= query && key <= query.saturating_add(self.right as usize))
    }

    /// The half-open range of keys inside the window of `query` in a sequence of `len` tokens, without the globals
    /// that lie before it. A global query's window is the whole sequence.
    #[must_use]
    pub fn window(&self, query: usize, len: usize) -> std::ops::Range<usize> {
        if query < self.globals as usize {
            return 0..len;
        }
        query.saturating_sub(self.left as usize)..query.saturating_add(self.right as usize).saturating_add(1).min(len)
    }

    /// Number of `(query, key)` pairs that are computed for a sequence of `len` tokens.
    #[must_use]
    pub fn n_pairs(&self, len: usize) -> u64 {
        (0..len)
            .map(|query| {
                let window = self.window(query, len);
                let globals_before = (self.globals as usize).min(len).min(window.start);
                (window.len() + globals_before) as u64
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn window_and_globals_are_exactly_the_definition(
            left in 0u32..40, right in 0u32..40, globals in 0u32..6, len in 1usize..64,
        ) {
            let band = Band { left, right, globals };
            let mut pairs = 0;
            for query in 0..len {
                let window = band.window(query, len);
                prop_assert!(window.contains(&query));
                for key in 0..len {
                    let in_loops = window.contains(&key) || key < globals as usize;
                    prop_assert_eq!(in_loops, band.contains(query, key), "query {} key {}", query, key);
                    pairs += u64::from(in_loops);
                }
            }
            prop_assert_eq!(pairs, band.n_pairs(len));
            prop_assert_eq!(band.is_full_for(len), pairs == (len * len) as u64);
        }
    }

    #[test]
    fn full_band_sees_everything_and_does_not_overflow() {
        assert!(Band::FULL.contains(u32::MAX as usize, 0));
        assert_eq!(Band::FULL.window(5, 9), 0..9);
        assert!(Band::FULL.is_full_for(100_000));
    }
}
