//! Banded attention as data: heads, bands, and where packed keys and values lie.
//!
//! The work of a layer falls into two loops. The first packs the keys and values of one head of one sequence; the
//! second computes a block of queries of one sequence, all heads, over the packed keys in their band. Every number
//! depends on one sequence only, and a query's result does not depend on the block it is computed in: masked keys weigh
//! exactly 0, and sums run over absolute key positions.

use std::ops::Range;

use super::layout::PANEL;

/// Keys of a packed block.
pub const KEY_BLOCK: usize = 32;

/// One cache line of packed keys and values; what lies in it is known to the kernel that packed it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct CacheLine(pub(super) [f32; 16]);

impl CacheLine {
    /// A line of zeros.
    pub const ZERO: Self = Self([0.0; 16]);
}

/// The arithmetic of scores and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionForm {
    /// Scores, probabilities and sums in f32.
    F32,
    /// s8 queries per token, s8 keys and values per head and dimension, u8 probabilities per chunk of keys, f32 sums.
    Int8,
}

/// Which keys a query sees, in counts that fit a sequence: see `model::Band`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyBand {
    /// Keys before the query.
    pub left: usize,
    /// Keys after the query.
    pub right: usize,
    /// Leading tokens that see and are seen by all.
    pub globals: usize,
}

impl KeyBand {
    /// Every key.
    pub const FULL: Self = Self { left: usize::MAX, right: usize::MAX, globals: 0 };

    /// Keys around `query` in a sequence of `len` tokens, without the globals before them.
    #[must_use]
    pub fn window(&self, query: usize, len: usize) -> Range<usize> {
        if query < self.globals {
            return 0..len;
        }
        query.saturating_sub(self.left)..query.saturating_add(self.right).saturating_add(1).min(len)
    }

    /// Largest number of keys that the queries `queries` see together, rounded up to blocks.
    #[must_use]
    pub fn reach(&self, queries: &Range<usize>, len: usize) -> usize {
        self.segments(queries, len).iter().map(|blocks| blocks.len() * KEY_BLOCK).sum()
    }

    /// Blocks of keys that the queries see: those of the globals, and those of the windows; disjoint and ascending.
    pub(super) fn segments(&self, queries: &Range<usize>, len: usize) -> [Range<usize>; 2] {
        let globals = self.globals.min(len).div_ceil(KEY_BLOCK);
        let last = queries.end.saturating_sub(1);
        let start = if queries.start < self.globals { 0 } else { self.window(queries.start, len).start };
        // Windows end later for later queries, except that a global query's ends with the sequence.
        let end = if queries.start < self.globals { len } else { self.window(last, len).end };
        let start = (start / KEY_BLOCK).max(globals);
        [0..globals, start..end.div_ceil(KEY_BLOCK).max(start)]
    }
}

/// Heads of a layer and their place in `qkv` (queries, keys, values; heads contiguous).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Heads.
    pub n_heads: usize,
    /// Width of a head.
    pub d_head: usize,
}

impl Heads {
    /// Width of all heads.
    #[must_use]
    pub fn d_context(&self) -> usize {
        self.n_heads * self.d_head
    }

    /// Width of a packed head.
    #[must_use]
    pub fn d_padded(&self) -> usize {
        self.d_head.next_multiple_of(KEY_BLOCK)
    }

    /// Panels of `qkv`.
    #[must_use]
    pub fn qkv_panels(&self) -> usize {
        (3 * self.d_context()).div_ceil(PANEL)
    }
}

/// `[n_panels][n_rows][PANEL]` in IEEE binary16.
#[derive(Debug, Clone, Copy)]
pub struct HalfPanels<'a> {
    /// The numbers.
    pub data: &'a [u16],
    /// Rows.
    pub n_rows: usize,
}

/// One sequence of one layer.
#[derive(Debug, Clone, Copy)]
pub struct SequenceHeads<'a> {
    /// Queries, keys and values of the group of sequences.
    pub qkv: HalfPanels<'a>,
    /// Its heads.
    pub heads: Heads,
    /// The sequence's first row.
    pub first_row: usize,
    /// Its length.
    pub len: usize,
    /// Which keys a query sees.
    pub band: KeyBand,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_every_seen_key_once() {
        for len in [1, 5, 31, 32, 33, 70, 200] {
            for (left, right, globals) in [(0, 0, 0), (3, 5, 0), (40, 2, 1), (7, 7, 40), (usize::MAX, usize::MAX, 0)] {
                let band = KeyBand { left, right, globals };
                for start in 0..len {
                    let queries = start..(start + 6).min(len);
                    let segments = band.segments(&queries, len);
                    assert!(segments[0].end <= segments[1].start || segments[0].is_empty());
                    for query in queries.clone() {
                        let window = band.window(query, len);
                        for key in (0..len).filter(|&key| window.contains(&key) || key < globals) {
                            let n = segments.iter().filter(|blocks| blocks.contains(&(key / KEY_BLOCK))).count();
                            assert_eq!(n, 1, "len {len} {band:?} query {query} key {key}");
                        }
                    }
                }
            }
        }
    }
}
