//! Which slots a tile of queries visits, and which of them a query does not see.

use super::Head;
use crate::kernels::attention::{KEY_BLOCK, QueryKeys, SHARED, SlotRange};

/// Slots that are not seen; below every score, and 2^x of it is 0.
pub(super) const MASKED: f32 = -1e30;

/// Blocks of slots that the queries of a tile visit, and which queries these are.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Index of the first query in the block, and distance to the next one.
    pub(super) first: usize,
    pub(super) step: usize,
    pub(super) blocks: [SlotRange; SHARED],
    /// Slots visited together, and at most by one query for itself.
    pub(super) shared: usize,
    pub(super) own: usize,
    /// Whether every query sees all the slots that are visited together.
    pub(super) all_seen: bool,
}

pub(super) fn blocks(range: SlotRange) -> SlotRange {
    if range.is_empty() {
        return SlotRange::default();
    }
    SlotRange::new(range.start as usize / KEY_BLOCK, (range.end as usize).div_ceil(KEY_BLOCK))
}

fn width(ranges: &[SlotRange]) -> usize {
    ranges.iter().map(|range| range.slots().len() * KEY_BLOCK).sum()
}

impl Tile {
    pub(super) fn new(keys: &[QueryKeys], first: usize, step: usize, n: usize, uniform: bool) -> Self {
        let mut tile = Self { first, step, blocks: Default::default(), shared: 0, own: 0, all_seen: false };
        let whole = |slot: u32| (slot as usize).is_multiple_of(KEY_BLOCK);
        tile.all_seen = uniform && n > 0 && keys[first].shared.iter().all(|seen| whole(seen.start) && whole(seen.end));
        // As in full attention.
        let n = if uniform { n.min(1) } else { n };
        for query in 0..n {
            let keys = &keys[first + query * step];
            for (all, range) in tile.blocks.iter_mut().zip(keys.shared) {
                let one = blocks(range);
                if all.is_empty() {
                    *all = one;
                } else if !one.is_empty() {
                    *all = SlotRange { start: all.start.min(one.start), end: all.end.max(one.end) };
                }
            }
            tile.own = tile.own.max(width(&keys.own.map(blocks)));
        }
        tile.shared = width(&tile.blocks);
        tile
    }
}

/// Hides the slots of visited blocks that a query does not see, and adds what pooled slots have for standing for many.
pub(super) unsafe fn mask(scores: *mut f32, visited: &[SlotRange], seen: &[SlotRange], pooled: &Pooled) {
    let mut column = 0;
    for (blocks, seen) in visited.iter().zip(seen) {
        let slots = blocks.start as usize * KEY_BLOCK..blocks.end as usize * KEY_BLOCK;
        let seen = seen.slots();
        let seen = if seen.is_empty() { slots.end..slots.end } else { seen };
        // SAFETY: the slots are in the visited blocks, whose columns start at `column`.
        unsafe {
            for hidden in [slots.start..seen.start.min(slots.end), seen.end.max(slots.start)..slots.end] {
                for slot in hidden {
                    *scores.add(column + slot - slots.start) = MASKED;
                }
            }
            for slot in seen.start.max(pooled.start)..seen.end {
                *scores.add(column + slot - slots.start) +=
                    if slot == pooled.last { pooled.rest } else { pooled.whole };
            }
        }
        column += slots.len();
    }
}

/// What is added to the scores of pooled slots, in the unit of the row's scores.
pub(super) struct Pooled {
    start: usize,
    last: usize,
    whole: f32,
    rest: f32,
}

impl Pooled {
    #[allow(clippy::cast_precision_loss, reason = "blocks are far below 2^24")]
    pub(super) fn new(head: &Head<'_>, scale: f32) -> Self {
        let (len, block) = (head.len, head.slots.pooled);
        if block == 0 {
            return Self { start: usize::MAX, last: usize::MAX, whole: 0.0, rest: 0.0 };
        }
        let start = head.slots.pooled_start(len);
        let last = len.div_ceil(block) - 1;
        let part = |n: usize| (n as f32).log2() / scale;
        Self { start, last: start + last, whole: part(block), rest: part(len - last * block) }
    }
}
