//! The verb `attend` of the INT8 player: a group's attention cut into parts, packed, and computed.

use std::sync::PoisonError;

use super::{BLOCK_ROWS, Form, Int8, Int8Act, Int8Error, Lane, WorkspaceLimits};
use crate::kernels::attention::{
    Attention, CacheLine, HalfPanels, Heads, KEY_BLOCK, KeySlots, Queries, QueryKeys, SequenceHeads, SlotRange,
};
use crate::kernels::layout::{PANEL, RowScale};
use crate::kernels::threads::{Cut, RowParts};
use crate::kernels::{Block, CodeRowsMut, KernelSet};
use crate::model::{AttentionSpec, Band, GROUP_GRAIN, ModelError, Ragged};

/// How a layer's attention falls into parts; kept so that making it allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Plan {
    sequences: Vec<Sequence>,
    /// `(sequence, head)` and where its packed lines start.
    heads: Vec<(usize, usize)>,
    lines: Vec<usize>,
    /// `(sequence, first query)` and the rows at which blocks of queries start.
    queries: Vec<(usize, usize)>,
    rows: Vec<usize>,
    /// The lists of keys of all sequences.
    listed: Vec<u32>,
}

#[derive(Debug)]
struct Sequence {
    attention: Attention,
    first_row: usize,
    len: usize,
    /// Its list among `Plan::listed`.
    listed: std::ops::Range<usize>,
    /// Its lines among the packed ones.
    packed: std::ops::Range<usize>,
}

/// Rows of a block of queries that make good tiles on every instruction set.
const QUERY_GRAIN: usize = 8;

/// The most slots that sequences of a group of `n_tokens` tokens take together, each counted in grains of the groups.
fn most_slots(band: Band, n_tokens: usize) -> usize {
    // Every sequence may leave a gap after each of its parts.
    let gaps = n_tokens.div_ceil(GROUP_GRAIN) * KEY_BLOCK;
    let parts = usize::from(band.sees_positions()) * n_tokens;
    let list = |n: usize| if n == 0 { 0 } else { n + gaps };
    let n_pooled = if band.pooled_block() == 0 { 0 } else { n_tokens };
    parts.next_multiple_of(KEY_BLOCK) + list(band.n_listed(n_tokens)) + list(n_pooled)
}

/// Bytes that the packed heads of a layer take at most.
pub(super) fn packed_bytes(kernels: &KernelSet, limits: &WorkspaceLimits) -> usize {
    let n_sequences = limits.group_tokens.div_ceil(GROUP_GRAIN);
    let of_layer = |&(heads, band): &(Heads, Band)| {
        let n_slots = most_slots(band, limits.group_tokens);
        let lines = |attention: Attention| {
            let empty = attention.lines_of_slots(heads, 0);
            attention.lines_of_slots(heads, n_slots) + n_sequences * empty
        };
        let most = kernels.attention_forms(heads).map(|(attention, _)| lines(attention)).max();
        heads.n_heads * most.unwrap_or(0) * size_of::<CacheLine>()
    };
    limits.heads.iter().map(of_layer).max().unwrap_or(0)
}

/// Bytes of scratch that a block of queries takes at most.
pub(super) fn scratch_bytes(kernels: &KernelSet, limits: &WorkspaceLimits) -> usize {
    let tokens = limits.group_tokens.next_multiple_of(KEY_BLOCK);
    let of_layer = |&(heads, band): &(Heads, Band)| {
        let width = tokens + KEY_BLOCK.max(most_slots(band, limits.group_tokens).min(tokens));
        let forms = kernels.attention_forms(heads).map(|(attention, _)| attention.scratch_of_width(heads, width));
        forms.max().unwrap_or(0) * 4
    };
    limits.heads.iter().map(of_layer).max().unwrap_or(0)
}

/// Entries of the lists of a group at most. (Many short sequences have no more than a long one.)
fn most_listed(limits: &WorkspaceLimits) -> usize {
    let tokens = limits.group_tokens;
    let of_band = |band: Band| match band.n_listed(tokens) {
        0 => 0,
        // Every sequence lists its leading tokens once more.
        n => n + tokens,
    };
    limits.heads.iter().map(|&(_, band)| of_band(band)).max().unwrap_or(0)
}

fn slots<'a>(band: Band, listed: &'a [u32]) -> KeySlots<'a> {
    KeySlots { natural: band.sees_positions(), listed, pooled: band.pooled_block() }
}

/// What the query at `position` sees, in slots.
fn query_keys(band: Band, slots: &KeySlots<'_>, position: usize, len: usize) -> QueryKeys {
    let seen = band.seen(position, len);
    let (listed, pooled) = (slots.listed_start(len), slots.pooled_start(len));
    let from = |start: usize, range: &std::ops::Range<usize>| SlotRange::new(start + range.start, start + range.end);
    let mut keys = QueryKeys::default();
    keys.shared[0] = from(0, &seen.leading);
    keys.shared[1] = from(0, &seen.near);
    let lists = seen.listed.each_ref().map(|range| from(listed, range));
    if band.lists_differ() {
        keys.own = lists;
    } else if band.pooled_block() > 0 {
        [keys.shared[2], keys.shared[3]] = seen.pooled.each_ref().map(|range| from(pooled, range));
    } else {
        [keys.shared[2], keys.shared[3]] = lists;
    }
    keys
}

impl Plan {
    /// Gives back what inputs beyond the limits took.
    pub(super) fn shrink(&mut self, limits: &WorkspaceLimits) {
        if self.queries.capacity() > limits.group_tokens || self.listed.capacity() > most_listed(limits) {
            *self = Self::new(limits);
        }
    }

    pub(super) fn new(limits: &WorkspaceLimits) -> Self {
        let tokens = limits.group_tokens;
        let max_heads = limits.heads.iter().map(|(heads, _)| heads.n_heads).max().unwrap_or(0);
        Self {
            sequences: Vec::with_capacity(tokens),
            heads: Vec::with_capacity(tokens * max_heads),
            lines: Vec::with_capacity(tokens * max_heads + 1),
            queries: Vec::with_capacity(tokens),
            rows: Vec::with_capacity(tokens + 1),
            listed: Vec::with_capacity(most_listed(limits)),
        }
    }

    /// Cuts the attention of a group into parts.
    fn make(&mut self, kernels: &KernelSet, heads: Heads, band: Band, batch: &Ragged<'_>, n_cores: usize) {
        self.sequences.clear();
        self.heads.clear();
        self.lines.clear();
        self.queries.clear();
        self.rows.clear();
        self.listed.clear();
        // A lone short text still has a part for every core.
        let most = kernels.block_rows(usize::MAX);
        let block = batch.n_tokens().div_ceil(2 * n_cores).next_multiple_of(QUERY_GRAIN).clamp(QUERY_GRAIN, most);
        let mut end = 0;
        self.lines.push(0);
        self.rows.push(0);
        for (sequence, rows) in batch.sequences().enumerate() {
            let len = rows.len();
            let attention = kernels.attention(heads, band.max_keys(len));
            let first_listed = self.listed.len();
            band.list(len, &mut self.listed);
            let listed = first_listed..self.listed.len();
            let lines = attention.packed_lines(heads, &slots(band, &self.listed[listed.clone()]), len);
            let first_line = end;
            for head in 0..heads.n_heads {
                end += lines;
                self.heads.push((sequence, head));
                self.lines.push(end);
            }
            self.sequences.push(Sequence { attention, first_row: rows.start, len, listed, packed: first_line..end });
            for first in (0..len).step_by(block) {
                self.queries.push((sequence, first));
                self.rows.push(rows.start + (first + block).min(len));
            }
        }
    }
}

impl Int8 {
    /// Context of every token, as codes.
    pub(super) fn attend_rows(
        &mut self,
        qkv: &Int8Act,
        spec: &AttentionSpec,
        batch: &Ragged<'_>,
    ) -> Result<Int8Act, ModelError> {
        let heads = Heads { n_heads: spec.n_heads, d_head: spec.d_head };
        let Form::Half { panels: half, context: range } = &qkv.form else {
            return self.refuse(Int8Error::Form { verb: "attend" });
        };
        if qkv.n != 3 * heads.d_context() || qkv.n_rows != batch.n_tokens() {
            return self.refuse(Int8Error::Width { verb: "attend", expected: 3 * heads.d_context(), got: qkv.n });
        }
        let (n, band) = (heads.d_context(), spec.band);
        let mut to = self.codes(qkv.n_rows, n);
        let stride = to.stride;
        let Self { kernels, cores, seat, workspace, lanes, plan, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        plan.make(kernels, heads, band, batch, seat.n_cores());
        let plan = &*plan;
        let qkv_panels = HalfPanels { data: half, n_rows: qkv.n_rows };
        let sequence = |Sequence { first_row, len, listed, .. }: &Sequence| {
            let slots = slots(band, &plan.listed[listed.clone()]);
            SequenceHeads { qkv: qkv_panels, heads, first_row: *first_row, len: *len, slots }
        };
        let mut packed = workspace.take::<CacheLine>(plan.lines.last().copied().unwrap_or(0));
        let parts = RowParts::new(&mut packed, 1, Cut::At(&plan.lines));
        seat.for_each(&parts, |lane, index, packed: &mut [CacheLine]| {
            let (at, head) = plan.heads[index];
            let at = &plan.sequences[at];
            let mut lane = lanes[lane].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = lane.scratch.first(at.attention.scratch_of_width(heads, 0));
            at.attention.pack_head(&sequence(at), head, packed, scratch);
        });
        let cut = Cut::At(&plan.rows);
        let parts = (RowParts::new(&mut to.codes, stride, cut), RowParts::new(&mut to.scales, 1, cut));
        seat.for_each(&parts, |lane, index, (codes, scales): (&mut [u8], &mut [RowScale])| {
            let (at, first) = plan.queries[index];
            let at = &plan.sequences[at];
            let sequence = sequence(at);
            let n_rows = scales.len();
            let mut keys = [QueryKeys::default(); BLOCK_ROWS];
            let keys = &mut keys[..n_rows];
            for (position, keys) in (first..).zip(keys.iter_mut()) {
                *keys = query_keys(band, &sequence.slots, position, at.len);
            }
            let mut lane = lanes[lane].lock().unwrap_or_else(PoisonError::into_inner);
            let Lane { block, scratch, .. } = &mut *lane;
            let block = block.first::<f32>(n.div_ceil(PANEL) * n_rows * PANEL);
            let scratch = scratch.first(at.attention.scratch(heads, keys));
            let queries = Queries { first, keys, step: band.query_step() };
            at.attention.attend(&sequence, queries, &packed[at.packed.clone()], scratch, block);
            let mut to = CodeRowsMut { codes, stride, scales, range: *range };
            kernels.quantize(Block { data: block, n_rows, n }, 0..n_rows, &mut to);
        });
        Ok(Int8Act { n_rows: qkv.n_rows, n, form: Form::Codes(to) })
    }
}
