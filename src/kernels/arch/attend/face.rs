//! The safe face of attention: lengths are checked here once.

use std::ops::Range;

use super::table::AttentionTable;
use super::tile::Tile;
use super::{Attend, Head, QueryKeys};
use crate::kernels::attention::{AttentionForm, CacheLine, Heads, KeySlots, Queries, SequenceHeads, SlotRange};
use crate::kernels::isa::Isa;
use crate::kernels::layout::{PANEL, rows_fit};

/// Attention of one instruction set in one form.
#[derive(Clone, Copy)]
pub struct Attention {
    isa: Isa,
    table: &'static AttentionTable,
}

impl std::fmt::Debug for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attention").field("isa", &self.isa).field("form", &self.table.form).finish()
    }
}

impl Attention {
    pub(in crate::kernels::arch) fn new(isa: Isa, table: &'static AttentionTable) -> Self {
        Self { isa, table }
    }

    /// Its arithmetic.
    #[must_use]
    pub fn form(&self) -> AttentionForm {
        self.table.form
    }

    /// Cache lines of one packed head of a sequence of `len` tokens.
    #[must_use]
    pub fn packed_lines(&self, heads: Heads, slots: &KeySlots<'_>, len: usize) -> usize {
        self.lines_of_slots(heads, slots.n_slots(len))
    }

    /// Cache lines of one packed head of `n_slots` slots.
    #[must_use]
    pub fn lines_of_slots(&self, heads: Heads, n_slots: usize) -> usize {
        (self.table.lines)(n_slots, heads.d_padded())
    }

    /// Floats of scratch for packing, and for computing a block of queries that visits up to `width` slots.
    #[must_use]
    pub fn scratch_of_width(&self, heads: Heads, width: usize) -> usize {
        (self.table.scratch)(width, heads.d_padded())
    }

    /// Floats of scratch for computing a block of queries.
    #[must_use]
    pub fn scratch(&self, heads: Heads, queries: &[QueryKeys]) -> usize {
        // A tile visits no more than all queries of the block together would.
        let whole = Tile::new(queries, 0, 1, queries.len(), false);
        self.scratch_of_width(heads, whole.shared + whole.own)
    }

    fn head<'a>(&self, sequence: &SequenceHeads<'a>, head: usize) -> Head<'a> {
        let SequenceHeads { qkv, heads, first_row, len, slots } = *sequence;
        assert!(head < heads.n_heads && heads.d_head > 0 && len > 0, "head {head} of {heads:?}, {len} tokens");
        assert!(heads.d_head <= self.form().max_d_head(), "{heads:?} in {:?}", self.form());
        let columns = heads.n_heads.checked_mul(heads.d_head).and_then(|n| n.checked_mul(3));
        assert!(columns.is_some(), "{heads:?} have more than 2^64 columns");
        let panel = qkv.n_rows.checked_mul(PANEL).expect("a panel has less than 2^64 elements");
        assert!(first_row <= qkv.n_rows && len <= qkv.n_rows - first_row, "{len} tokens from {first_row} on");
        assert!(rows_fit(qkv.data.len(), heads.qkv_panels(), panel, panel), "{heads:?} in {} numbers", qkv.data.len());
        Head { qkv: qkv.data.as_ptr(), n_rows: qkv.n_rows, heads, first_row, len, slots, head }
    }

    /// Packs keys and values of head `head` of a sequence into `packed` (`packed_lines` of them).
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn pack_head(&self, sequence: &SequenceHeads<'_>, head: usize, packed: &mut [CacheLine], scratch: &mut [f32]) {
        let args = self.head(sequence, head);
        let slots = &sequence.slots;
        assert!(slots.listed.iter().all(|&key| (key as usize) < sequence.len), "a listed key is not in the sequence");
        assert_eq!(packed.len(), self.packed_lines(sequence.heads, slots, sequence.len));
        assert!(scratch.len() >= self.scratch_of_width(sequence.heads, 0), "{} floats of scratch", scratch.len());
        // SAFETY: `Isa` proves the instruction set; sizes are checked above and in `head`.
        unsafe { (self.table.pack)(&args, packed.as_mut_ptr(), scratch.as_mut_ptr()) }
    }

    /// Attention of a block of queries over packed heads, of which there are those of `run`; `out` is a block of as many rows,
    /// its first column that of the first of these heads.
    ///
    /// # Panics
    /// If the sizes do not fit, the first of the heads does not start a panel ([`Heads::panel_grain`]), or a query sees a slot that
    /// there is not.
    pub fn attend(
        &self,
        sequence: &SequenceHeads<'_>,
        run: Range<usize>,
        queries: Queries<'_>,
        packed: &[CacheLine],
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let (heads, n) = (sequence.heads, queries.keys.len());
        if n == 0 {
            return;
        }
        let n_slots = sequence.slots.n_slots(sequence.len);
        let lines = self.lines_of_slots(heads, n_slots);
        let inside = n <= sequence.len && queries.first <= sequence.len - n;
        assert!(inside && queries.step > 0, "{n} from {}", queries.first);
        assert!(run.end <= heads.n_heads && run.start.is_multiple_of(heads.panel_grain()), "{run:?} of {heads:?}");
        assert_eq!(packed.len(), lines * run.len());
        assert!(out.len() >= (run.len() * heads.d_head).div_ceil(PANEL) * n * PANEL, "{} results", out.len());
        assert!(scratch.len() >= self.scratch(heads, queries.keys), "{} floats of scratch", scratch.len());
        let inside = |range: &SlotRange| range.is_empty() || range.end as usize <= n_slots;
        let all_inside = |keys: &QueryKeys| keys.shared.iter().all(inside) && keys.own.iter().all(inside);
        assert!(queries.keys.iter().all(all_inside), "a slot beyond {n_slots}");
        let uniform = queries.keys.iter().all(|keys| *keys == queries.keys[0]);
        for (index, head) in run.clone().enumerate() {
            let args = Attend {
                head: self.head(sequence, head),
                first_head: run.start,
                first: queries.first,
                keys: queries.keys,
                uniform,
                step: queries.step,
                packed: packed[index * lines..].as_ptr(),
                scratch: scratch.as_mut_ptr(),
                out: out.as_mut_ptr(),
            };
            // SAFETY: `Isa` proves the instruction set; sizes are checked above and in `head`.
            unsafe { (self.table.attend)(&args) }
        }
    }
}
