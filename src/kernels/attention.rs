//! Attention as data: heads, which keys a query sees, and where packed keys and values lie.
//!
//! The work of a layer falls into two steps. The first packs the keys and values of one head of one sequence; the
//! second computes a block of queries of one sequence, all heads or a run of them, over the packed keys that they see.
//!
//! Keys are packed in *slots*. The order of the slots is chosen by the caller so that what a query sees is a few ranges
//! of slots ([`QueryKeys`]): kernels know ranges, and nothing of the pattern behind them.
//!
//! Every number depends on one sequence only, and a query's result does not depend on the block it is computed in: hidden
//! slots weigh exactly 0, and sums run over absolute slots.

use std::ops::Range;

use super::layout::PANEL;

pub use super::arch::Attention;

/// Slots of a packed block.
pub const KEY_BLOCK: usize = 16;

/// Most ranges of slots that a query shares with its neighbours.
pub const SHARED: usize = 4;
/// Most ranges of slots that a query has for itself.
pub const OWN: usize = 2;

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
    /// Scores, probabilities and sums in f32. *Error*: relative to the largest |v|, 2e-6 for up to a few thousand keys.
    F32,
    /// 12-bit codes in s16: queries per token, keys and values per head and dimension, probabilities of 1/4095 of the
    /// row's largest; integer sums. *Error*: 3e-3 relative to the context's size, measured up to 1,500 keys.
    Int16,
    /// The same in bytes, probabilities of 1/255. *Error*: 4e-2 up to 512 keys; beyond that a step of probability is
    /// too coarse for rows that are nearly flat.
    Int8,
}

impl AttentionForm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Int16, Self::Int8];

    /// Most keys of a row for which the stated error holds.
    #[must_use]
    pub const fn max_keys(self) -> usize {
        match self {
            Self::F32 | Self::Int16 => usize::MAX,
            Self::Int8 => 512,
        }
    }

    /// Largest width of a head for which the sums fit.
    #[must_use]
    pub fn max_d_head(self) -> usize {
        match self {
            Self::F32 => usize::MAX,
            Self::Int16 => 512,
            Self::Int8 => 65_536,
        }
    }
}

/// In which order keys are packed; each part starts at a multiple of [`KEY_BLOCK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySlots<'a> {
    /// Whether the first part is the sequence's keys in order.
    pub natural: bool,
    /// The second part: positions in the sequence.
    pub listed: &'a [u32],
    /// The third part: means of this many consecutive keys and values each, standing for as many; 0 for none.
    pub pooled: usize,
}

impl KeySlots<'static> {
    /// The sequence's keys in order.
    pub const NATURAL: Self = Self { natural: true, listed: &[], pooled: 0 };
}

impl KeySlots<'_> {
    /// Slots of a sequence of `len` tokens, gaps between the parts included.
    #[must_use]
    pub fn n_slots(&self, len: usize) -> usize {
        self.pooled_start(len) + self.n_pooled(len).next_multiple_of(KEY_BLOCK)
    }

    /// The first slot of the second part.
    #[must_use]
    pub fn listed_start(&self, len: usize) -> usize {
        if self.natural { len.next_multiple_of(KEY_BLOCK) } else { 0 }
    }

    /// The first slot of the third part.
    #[must_use]
    pub fn pooled_start(&self, len: usize) -> usize {
        self.listed_start(len) + self.listed.len().next_multiple_of(KEY_BLOCK)
    }

    fn n_pooled(&self, len: usize) -> usize {
        if self.pooled == 0 { 0 } else { len.div_ceil(self.pooled) }
    }

    /// Positions of the keys that slot `slot` stands for; empty for a gap.
    pub(super) fn keys(&self, slot: usize, len: usize) -> Range<usize> {
        let pooled_start = self.pooled_start(len);
        if slot >= pooled_start {
            let first = (slot - pooled_start) * self.pooled;
            return first.min(len)..(first + self.pooled).min(len);
        }
        let listed_start = self.listed_start(len);
        if slot < listed_start {
            return slot.min(len)..(slot + 1).min(len);
        }
        match self.listed.get(slot - listed_start) {
            Some(&key) => key as usize..key as usize + 1,
            None => 0..0,
        }
    }
}

/// What a query sees, in slots. All ranges are disjoint, some may be empty, one is not. Ranges of the same index should
/// lie near those of neighbouring queries, because a tile of queries visits all that lies between the ends of theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueryKeys {
    /// Visited together with the neighbours.
    pub shared: [SlotRange; SHARED],
    /// Visited for this query alone.
    pub own: [SlotRange; OWN],
}

/// Slots `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlotRange {
    /// The first slot.
    pub start: u32,
    /// The slot after the last one; not beyond `start` when empty.
    pub end: u32,
}

impl SlotRange {
    /// `start..end`.
    ///
    /// # Panics
    /// If the end does not fit 32 bits.
    #[must_use]
    pub fn new(start: usize, end: usize) -> Self {
        let end = u32::try_from(end.max(start)).expect("sequences are shorter than 2^32");
        Self { start: u32::try_from(start).unwrap_or(end), end }
    }

    /// Whether there is no slot in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// As a range.
    #[must_use]
    pub fn slots(&self) -> Range<usize> {
        self.start as usize..(self.end as usize).max(self.start as usize)
    }
}

impl QueryKeys {
    /// One range.
    #[must_use]
    pub fn range(start: usize, end: usize) -> Self {
        let mut keys = Self::default();
        keys.shared[0] = SlotRange::new(start, end);
        keys
    }

    /// All ranges.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.shared.iter().chain(&self.own).map(SlotRange::slots)
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

/// Packed heads are a multiple of this wide, so that a vector of bytes is whole on every instruction set.
const HEAD_GRAIN: usize = 32;

impl Heads {
    /// Width of all heads.
    #[must_use]
    pub fn d_context(&self) -> usize {
        self.n_heads * self.d_head
    }

    /// Width of a packed head.
    #[must_use]
    pub fn d_padded(&self) -> usize {
        self.d_head.next_multiple_of(HEAD_GRAIN)
    }

    /// Heads that take whole panels together.
    #[must_use]
    pub fn panel_grain(&self) -> usize {
        // `PANEL` is a power of two.
        PANEL >> self.d_head.trailing_zeros().min(PANEL.trailing_zeros())
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
    /// The order of its keys.
    pub slots: KeySlots<'a>,
}

/// A block of queries.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// Position of the first one.
    pub first: usize,
    /// What each sees, in order of position.
    pub keys: &'a [QueryKeys],
    /// Queries this far apart are computed together; 1 for neighbours.
    pub step: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_panels_are_the_fewest_heads() {
        for d_head in 1..200 {
            let heads = Heads { n_heads: 1, d_head };
            let fewest = (1..).find(|n| (n * d_head).is_multiple_of(PANEL)).unwrap();
            assert_eq!(heads.panel_grain(), fewest, "{d_head}");
        }
    }

    #[test]
    fn slots_stand_for_the_keys_of_their_part() {
        let listed = [7, 0, 19];
        let slots = KeySlots { natural: true, listed: &listed, pooled: 8 };
        assert_eq!((slots.listed_start(20), slots.pooled_start(20), slots.n_slots(20)), (32, 48, 64));
        let all: Vec<Range<usize>> = (0..64).map(|slot| slots.keys(slot, 20)).collect();
        assert_eq!(all[..20], (0..20).map(|key| key..key + 1).collect::<Vec<_>>()[..]);
        assert_eq!(all[32..35], [7..8, 0..1, 19..20]);
        assert_eq!(all[48..51], [0..8, 8..16, 16..20]);
        let n_gaps = all.iter().filter(|keys| keys.is_empty()).count();
        assert_eq!(n_gaps, 64 - 20 - 3 - 3);
        let listed = KeySlots { natural: false, ..slots };
        assert_eq!((listed.listed_start(20), listed.n_slots(20), listed.keys(2, 20)), (0, 32, 19..20));
    }
}
