//! The verb `attend` of the INT8 player: a group's attention cut into parts, packed, and computed.
//!
//! Blocks of queries are the parts, after a loop in which every head of every sequence is packed; with few rows heads are,
//! each packed and computed by the same thread, because tiles of queries would be half empty otherwise.

use std::ops::Range;

use super::{BLOCK_ROWS, COLUMN_SPLIT_ROWS, Form, Int8, Int8Act, Int8Error, Lane, WorkspaceLimits};
use crate::exec::workspace::Aligned;
use crate::kernels::attention::{
    Attention, CacheLine, HalfPanels, Heads, KEY_BLOCK, KeySlots, Queries, QueryKeys, SequenceHeads, SlotRange,
};
use crate::kernels::layout::{PANEL, RowScale};
use crate::kernels::threads::{Cut, RowParts, Shares};
use crate::kernels::{Block, CodeRowsMut, KernelSet};
use crate::model::{AttentionSpec, Band, GROUP_GRAIN, ModelError, Ragged};

/// How a layer's attention falls into parts; kept so that making it allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Plan {
    sequences: Vec<Sequence>,
    /// `(sequence, run of heads)`, packed by one thread, and where the packed lines start.
    runs: Vec<(usize, Range<usize>)>,
    lines: Vec<usize>,
    /// Rows of panels of results at which runs start, if they are computed by the same thread too.
    results: Vec<usize>,
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
    listed: Range<usize>,
    /// Its lines among the packed ones.
    packed: Range<usize>,
}

/// Rows of a block of queries that make good tiles on every instruction set.
const QUERY_GRAIN: usize = 8;
/// The same for the largest tiles, of blocks that are as large as threads are fast.
const LARGE_QUERY_GRAIN: usize = 16;

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
    let from = |start: usize, range: &Range<usize>| SlotRange::new(start + range.start, start + range.end);
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
            runs: Vec::with_capacity(tokens * max_heads),
            lines: Vec::with_capacity(tokens * max_heads + 1),
            results: Vec::with_capacity(COLUMN_SPLIT_ROWS * max_heads + 1),
            queries: Vec::with_capacity(tokens),
            rows: Vec::with_capacity(tokens + 1),
            listed: Vec::with_capacity(most_listed(limits)),
        }
    }

    /// Cuts the attention of a group into parts. With a size of `run`, runs of so many heads are packed and computed at once. `lone` is
    /// how the queries of a group of one sequence are cut; those of others fall into blocks of even sizes.
    fn make(
        &mut self,
        kernels: &KernelSet,
        (heads, band): (Heads, Band),
        batch: &Ragged<'_>,
        run: Option<usize>,
        lone: Option<Cut<'_>>,
        n_cores: usize,
    ) {
        self.sequences.clear();
        self.runs.clear();
        self.lines.clear();
        self.results.clear();
        self.queries.clear();
        self.rows.clear();
        self.listed.clear();
        // A lone short text still has a part for every core.
        let most = kernels.most_block_rows();
        let block = batch.n_tokens().div_ceil(2 * n_cores).next_multiple_of(QUERY_GRAIN).clamp(QUERY_GRAIN, most);
        let (mut end, mut results) = (0, 0);
        self.lines.push(0);
        self.results.push(0);
        self.rows.push(0);
        for (sequence, rows) in batch.sequences().enumerate() {
            let len = rows.len();
            let attention = kernels.attention(heads, band.max_keys(len));
            let first_listed = self.listed.len();
            band.list(len, &mut self.listed);
            let listed = first_listed..self.listed.len();
            let lines = attention.packed_lines(heads, &slots(band, &self.listed[listed.clone()]), len);
            let first_line = end;
            for head in (0..heads.n_heads).step_by(run.unwrap_or(1)) {
                let of_run = head..(head + run.unwrap_or(1)).min(heads.n_heads);
                end += lines * of_run.len();
                self.lines.push(end);
                if run.is_some() {
                    results += (of_run.len() * heads.d_head).div_ceil(PANEL) * len;
                    self.results.push(results);
                }
                self.runs.push((sequence, of_run));
            }
            self.sequences.push(Sequence { attention, first_row: rows.start, len, listed, packed: first_line..end });
            let cut = lone.unwrap_or(Cut::Even { n_rows: len, block });
            for of_block in (0..cut.n_parts()).map(|index| cut.rows(index)) {
                self.queries.push((sequence, of_block.start));
                self.rows.push(rows.start + of_block.end);
            }
        }
    }
}

/// Heads of a run if few rows are split by heads, so that each of `n_cores` threads has a run; they take whole panels of the
/// results. None if that would leave one run.
fn head_run(heads: Heads, n_cores: usize) -> Option<usize> {
    let grain = heads.panel_grain();
    let run = grain * heads.n_heads.div_ceil(grain).div_ceil(n_cores);
    (run < heads.n_heads).then_some(run)
}

/// A layer's attention, for the threads that compute it.
struct Layer<'a> {
    heads: Heads,
    band: Band,
    qkv: HalfPanels<'a>,
    plan: &'a Plan,
}

impl<'a> Layer<'a> {
    fn sequence(&self, Sequence { first_row, len, listed, .. }: &Sequence) -> SequenceHeads<'a> {
        let slots = slots(self.band, &self.plan.listed[listed.clone()]);
        SequenceHeads { qkv: self.qkv, heads: self.heads, first_row: *first_row, len: *len, slots }
    }

    /// Packs the heads of run `index`.
    fn pack(&self, index: usize, packed: &mut [CacheLine], scratch: &mut Aligned) {
        let (at, run) = &self.plan.runs[index];
        let at = &self.plan.sequences[*at];
        let scratch = scratch.first(at.attention.scratch_of_width(self.heads, 0));
        let lines = packed.len() / run.len();
        for (head, packed) in run.clone().zip(packed.chunks_exact_mut(lines)) {
            at.attention.pack_head(&self.sequence(at), head, packed, scratch);
        }
    }

    /// Contexts of `n` queries of `at` from position `first` on, of the heads of `run`, which are in `packed`.
    fn attend(
        &self,
        at: &Sequence,
        run: Range<usize>,
        (first, n): (usize, usize),
        packed: &[CacheLine],
        scratch: &mut Aligned,
        out: &mut [f32],
    ) {
        let sequence = self.sequence(at);
        let mut keys = [QueryKeys::default(); BLOCK_ROWS];
        let keys = &mut keys[..n];
        for (position, keys) in (first..).zip(keys.iter_mut()) {
            *keys = query_keys(self.band, &sequence.slots, position, at.len);
        }
        let scratch = scratch.first(at.attention.scratch(self.heads, keys));
        let queries = Queries { first, keys, step: self.band.query_step() };
        at.attention.attend(&sequence, run, queries, packed, scratch, out);
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
        let panel_columns = n.div_ceil(PANEL) * PANEL;
        let mut to = self.codes(qkv.n_rows, n);
        let stride = to.stride;
        let few = self.splits_columns(qkv.n_rows);
        let Self { kernels, cores, seat, workspace, lanes, plan, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let run = head_run(heads, seat.n_cores()).filter(|_| few);
        let most = kernels.most_block_rows();
        let shares = (batch.n_seqs() == 1).then(|| seat.shares(qkv.n_rows, most, BLOCK_ROWS, LARGE_QUERY_GRAIN));
        let lone = shares.as_ref().and_then(Shares::each);
        plan.make(kernels, (heads, band), batch, run, lone, seat.n_cores());
        let plan = &*plan;
        let layer = Layer { heads, band, qkv: HalfPanels { data: half, n_rows: qkv.n_rows }, plan };
        let mut packed = workspace.take::<CacheLine>(plan.lines.last().copied().unwrap_or(0));
        let packs = RowParts::new(&mut packed, 1, Cut::At(&plan.lines));
        let contexts = if run.is_some() {
            let mut contexts = workspace.take::<f32>(qkv.n_rows * panel_columns);
            let parts = (packs, RowParts::new(&mut contexts, PANEL, Cut::At(&plan.results)));
            seat.for_each(parts, |lane, index, (packed, out): (&mut [CacheLine], &mut [f32])| {
                let mut lane = lanes.of(lane);
                layer.pack(index, packed, &mut lane.scratch);
                let (at, run) = &plan.runs[index];
                let at = &plan.sequences[*at];
                layer.attend(at, run.clone(), (0, at.len), packed, &mut lane.scratch, out);
            });
            Some(contexts)
        } else {
            seat.for_each(packs, |lane, index, packed: &mut [CacheLine]| {
                layer.pack(index, packed, &mut lanes.of(lane).scratch);
            });
            None
        };
        let cut = Cut::At(&plan.rows);
        let parts = (RowParts::new(&mut to.codes, stride, cut), RowParts::new(&mut to.scales, 1, cut));
        seat.for_each(parts, |lane, index, (codes, scales): (&mut [u8], &mut [RowScale])| {
            let (at, first) = plan.queries[index];
            let (at, n_rows) = (&plan.sequences[at], scales.len());
            let mut to = CodeRowsMut { codes, stride, scales, range: *range };
            if let Some(contexts) = &contexts {
                let data = &contexts[at.first_row * panel_columns..];
                kernels.quantize(Block { data, n_rows: at.len, n }, first..first + n_rows, &mut to);
                return;
            }
            let mut lane = lanes.of(lane);
            let Lane { block, scratch, .. } = &mut *lane;
            let block = block.first::<f32>(n_rows * panel_columns);
            layer.attend(at, 0..heads.n_heads, (first, n_rows), &packed[at.packed.clone()], scratch, block);
            kernels.quantize(Block { data: block, n_rows, n }, 0..n_rows, &mut to);
        });
        Ok(Int8Act { n_rows: qkv.n_rows, n, form: Form::Codes(to) })
    }
}
