//! The serving player: s8 weights, u8 activations per token, f32 residual stream, nothing allocated per batch.
//!
//! A layer is played over one group of sequences. Between verbs live only the residual stream (f32 and its codes), the
//! codes of the hidden layers, and queries, keys and values in binary16. What a matrix product yields before it becomes one
//! of these stays in a block of at most `BLOCK_ROWS` rows per thread, which fits the L2 cache.
//!
//! Rows are split over threads; with few rows the columns are, because then the weights are the traffic. Which it is never
//! changes a result: integer sums are exact, and everything else is computed per row.

mod attend;
mod factors;
mod lanes;
mod plain;

use std::ops::Range;
use std::sync::Arc;

use self::attend::Plan;
use self::lanes::{Lane, Lanes};
use super::int8_build::{Int8Linear, Int8Norm, Int8Weights};
use super::int8_tables::Int8Tables;
use super::workspace::{Buffer, Workspace};
use crate::kernels::attention::Heads;
use crate::kernels::forms::PackedMatrix;
use crate::kernels::layout::{CodeRows, PANEL, RowScale, RowSums, RowTop, block_index, code_stride};
use crate::kernels::threads::{Cores, Cut, PanelRowParts, RowParts, Seat, Shares};
use crate::kernels::{Block, CodeRowsMut, KernelSet, Nonlinearity, Norm, Reduction, Stream, half_to_f32};
use crate::model::{Activation, Architecture, AttentionSpec, Band, ForwardMemory, ModelError, Ops, Pooling, Ragged};

/// Most rows of a thread's block: at 1,536 columns of f32 it takes 0.5 MB of the L2 cache. Beyond those that kernels are fastest with
/// ([`KernelSet::block_rows`]) there is room for what a thread can do more of than a slower one.
const BLOCK_ROWS: usize = KernelSet::MOST_BLOCK_ROWS + 16;
/// Up to this many tokens, columns are split over threads instead of rows.
const COLUMN_SPLIT_ROWS: usize = 32;

/// What sizes the workspace at construction. A longer sequence than `group_tokens` makes it grow once.
#[derive(Debug, Clone)]
pub struct WorkspaceLimits {
    /// Tokens of a group of sequences.
    pub group_tokens: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Widest FFN of a layer.
    pub d_ffn: usize,
    /// Heads of each layer, and which keys its queries see.
    pub heads: Vec<(Heads, Band)>,
    /// Widest row between the factors of a matrix of low rank; 0 without.
    pub rank: usize,
}

impl WorkspaceLimits {
    /// Limits for groups of `group_tokens` tokens of `architecture`.
    #[must_use]
    pub fn new(architecture: &Architecture, group_tokens: usize) -> Self {
        let heads = architecture
            .layers
            .iter()
            .map(|layer| (Heads { n_heads: layer.n_heads, d_head: layer.d_head }, layer.band));
        Self {
            group_tokens: group_tokens.max(1),
            d_model: architecture.d_model,
            d_ffn: architecture.layers.iter().map(|layer| layer.d_ffn).max().unwrap_or(0),
            heads: heads.collect(),
            rank: 0,
        }
    }

    fn d_context(&self) -> usize {
        self.heads.iter().map(|(heads, _)| heads.d_context()).max().unwrap_or(0)
    }

    /// Columns of the widest product.
    fn widest(&self) -> usize {
        self.d_ffn.max(self.d_model).max(self.d_context()).max(self.rank).next_multiple_of(PANEL)
    }
}

/// Plays the score in INT8.
#[derive(Debug)]
pub struct Int8 {
    kernels: KernelSet,
    cores: Arc<Cores>,
    /// Held from the first verb of a group to its results.
    seat: Option<Seat>,
    workspace: Workspace,
    lanes: Lanes,
    plan: Plan,
    limits: WorkspaceLimits,
    weight_bytes: usize,
}

/// Codes and scales of rows.
#[derive(Debug)]
struct Codes {
    codes: Buffer<u8>,
    scales: Buffer<RowScale>,
    stride: usize,
}

/// Activations of the INT8 player.
#[derive(Debug)]
pub struct Int8Act {
    n_rows: usize,
    n: usize,
    form: Form,
}

#[derive(Debug)]
enum Form {
    /// The residual stream: values and their codes.
    Stream { rows: Buffer<f32>, codes: Codes },
    /// Input of a linear layer.
    Codes(Codes),
    /// Queries, keys and values: binary16 in panels, and the range of what attention makes of them where it is fixed.
    Half { panels: Buffer<u16>, context: Option<RowScale> },
    /// Pooled rows.
    Rows(Buffer<f32>),
}

/// A verb was given activations that it has no use for; the score never does that.
#[derive(Debug, thiserror::Error)]
enum Int8Error {
    #[error("{verb}: activations of another verb were expected")]
    Form { verb: &'static str },
    #[error("{verb}: expected {expected} columns, got {got}")]
    Width { verb: &'static str, expected: usize, got: usize },
}

impl Codes {
    fn view(&self, rows: Range<usize>) -> CodeRows<'_> {
        CodeRows::new(&self.codes[rows.start * self.stride..], self.stride, &self.scales[rows])
    }
}

/// Another player of the same encoder on the same threads, with a workspace of its own.
impl Clone for Int8 {
    fn clone(&self) -> Self {
        let lanes = self.lanes.another(&self.kernels, &self.limits);
        Self::with_lanes(self.kernels, Arc::clone(&self.cores), &self.limits, self.weight_bytes, lanes)
    }
}

impl Int8 {
    /// A player with its own workspace. `weight_bytes` is what the encoder that it will play holds.
    #[must_use]
    pub fn new(kernels: KernelSet, cores: Arc<Cores>, limits: &WorkspaceLimits, weight_bytes: usize) -> Self {
        let lanes = Lanes::new(&kernels, &cores, limits);
        Self::with_lanes(kernels, cores, limits, weight_bytes, lanes)
    }

    fn with_lanes(
        kernels: KernelSet,
        cores: Arc<Cores>,
        limits: &WorkspaceLimits,
        weight_bytes: usize,
        lanes: Lanes,
    ) -> Self {
        let (tokens, widest) = (limits.group_tokens, limits.widest());
        let qkv = limits.heads.iter().map(|(heads, _)| heads.qkv_panels() * PANEL * tokens * 2).max().unwrap_or(0);
        let scales = tokens * size_of::<RowScale>();
        // Queries, keys and values are gone when the hidden layer comes; pooled rows are few (`GROUP_GRAIN`) and fit elsewhere.
        let in_turn = qkv.max(tokens * code_stride(limits.d_ffn));
        let workspace = Workspace::new(&[
            tokens * limits.d_model * 4,
            in_turn,
            tokens * code_stride(limits.d_model),
            tokens * code_stride(limits.d_model.max(limits.d_context())),
            attend::packed_bytes(&kernels, limits),
            COLUMN_SPLIT_ROWS * widest * 4,
            scales,
            scales,
            scales,
            COLUMN_SPLIT_ROWS * code_stride(limits.rank),
            COLUMN_SPLIT_ROWS * size_of::<RowScale>(),
            if kernels.turns() { COLUMN_SPLIT_ROWS * code_stride(limits.widest()) } else { 0 },
        ]);
        let plan = Plan::new(limits);
        Self { kernels, cores, seat: None, workspace, lanes, plan, limits: limits.clone(), weight_bytes }
    }

    /// The kernels it calls.
    #[must_use]
    pub fn kernels(&self) -> &KernelSet {
        &self.kernels
    }

    /// Bytes of the workspace.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.workspace.bytes() + self.lanes.bytes()
    }

    /// Most bytes of the workspace that activations have taken at once.
    #[must_use]
    pub fn peak_bytes(&self) -> usize {
        self.workspace.peak_bytes()
    }

    /// What it and its encoder hold.
    #[must_use]
    pub fn memory(&self) -> ForwardMemory {
        ForwardMemory { weights: self.weight_bytes, workspace: self.bytes(), workspace_peak: self.peak_bytes() }
    }

    /// Gives back, as a group of `n_tokens` tokens starts, what earlier and longer ones needed.
    fn settle(&mut self, n_tokens: usize) {
        if !self.workspace.is_due(n_tokens <= self.limits.group_tokens) {
            return;
        }
        self.workspace.shrink();
        self.plan.shrink(&self.limits);
        self.lanes.shrink();
    }

    /// Gives the seat up and reports that activations do not fit the verb.
    fn refuse<T>(&mut self, error: Int8Error) -> Result<T, ModelError> {
        self.seat = None;
        Err(ModelError::player(error))
    }

    fn codes(&self, n_rows: usize, n: usize) -> Codes {
        let stride = code_stride(n);
        Codes { codes: self.workspace.take(n_rows * stride), scales: self.workspace.take(n_rows), stride }
    }

    /// `x Wᵀ + b` of a few rows, columns split over threads; a block of all rows.
    fn columns(&mut self, packed: &PackedMatrix, x: &Codes, n_rows: usize) -> Buffer<f32> {
        let Self { kernels, cores, seat, workspace, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let mut block = workspace.take::<f32>(packed.n_panels() * n_rows * PANEL);
        let mut room = None;
        let x = turned(kernels, workspace, packed, x.view(0..n_rows), &mut room);
        let shares = column_shares(packed.n_panels(), seat);
        let cut = shares.cut();
        let parts = RowParts::new(&mut block, n_rows * PANEL, cut);
        seat.for_each_share(cut, parts, |_, index, out: &mut [f32]| {
            let panels = cut.rows(index);
            for (panel, out) in panels.clone().zip(out.chunks_exact_mut(n_rows * PANEL)) {
                kernels.product_f32(&x, packed, panel..panels.end, out);
            }
        });
        block
    }

    /// Whether so few rows are better served by splitting columns.
    fn splits_columns(&mut self, n_rows: usize) -> bool {
        let Self { cores, seat, .. } = self;
        n_rows <= COLUMN_SPLIT_ROWS && seat.get_or_insert_with(|| cores.enter()).n_cores() > 1
    }

    /// Queries, keys and values.
    fn half(&mut self, linear: &Int8Linear, x: &Codes, n_rows: usize) -> Buffer<u16> {
        let few = self.splits_columns(n_rows);
        let middle = few.then(|| self.middle(&linear.layer, x, n_rows)).flatten();
        let Self { kernels, cores, seat, workspace, lanes, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let mut out = workspace.take::<u16>(linear.layer.n_out().div_ceil(PANEL) * n_rows * PANEL);
        if few {
            let (x, packed) = (middle.as_ref().unwrap_or(x), linear.layer.last());
            let mut room = None;
            let x = turned(kernels, workspace, packed, x.view(0..n_rows), &mut room);
            let shares = column_shares(packed.n_panels(), seat);
            let cut = shares.cut();
            let parts = RowParts::new(&mut out, n_rows * PANEL, cut);
            seat.for_each_share(cut, parts, |_, index, out: &mut [u16]| {
                let panels = cut.rows(index);
                for (panel, out) in panels.clone().zip(out.chunks_exact_mut(n_rows * PANEL)) {
                    kernels.product_half(&x, packed, panel..panels.end, out);
                }
            });
        } else {
            let shares = row_shares(n_rows, kernels.block_rows(linear.layer.n_in()), seat);
            let cut = shares.cut();
            let parts = PanelRowParts::new(&mut out, n_rows, PANEL, cut);
            seat.for_each_share(cut, parts, |lane, index, mut out| {
                let mut lane = lanes.of(lane);
                let (x, packed) = lane.middle.enter(kernels, &linear.layer, x.view(cut.rows(index)));
                for panel in 0..packed.n_panels() {
                    kernels.product_half(&x, packed, panel..packed.n_panels(), out.panel(panel));
                }
            });
        }
        out
    }

    /// Inputs of the next linear layer.
    fn hidden(&mut self, linear: &Int8Linear, x: &Codes, n_rows: usize, then: Nonlinearity) -> Codes {
        let n = linear.layer.n_out();
        let mut to = self.codes(n_rows, n);
        let stride = to.stride;
        let columns = self.splits_columns(n_rows).then(|| self.layer_columns(&linear.layer, x, n_rows));
        let Self { kernels, seat, cores, lanes, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let shares = row_shares(n_rows, kernels.block_rows(linear.layer.n_in()), seat);
        let cut = shares.cut();
        let parts = (RowParts::new(&mut to.codes, stride, cut), RowParts::new(&mut to.scales, 1, cut));
        seat.for_each_share(cut, parts, |lane, index, (codes, scales): (&mut [u8], &mut [RowScale])| {
            let rows = cut.rows(index);
            let mut to = CodeRowsMut { codes, stride, scales, range: linear.out_range };
            if let Some(block) = &columns {
                kernels.quantize_activated(Block { data: block, n_rows, n }, rows, then, None, &mut to);
                return;
            }
            let mut lane = lanes.of(lane);
            let Lane { block, middle, .. } = &mut *lane;
            let (x, packed) = middle.enter(kernels, &linear.layer, x.view(rows.clone()));
            let block = block.first::<f32>(packed.n_panels() * rows.len() * PANEL);
            let mut tops = [RowTop::EMPTY; BLOCK_ROWS];
            let tops = &mut tops[..rows.len()];
            for (panel, out) in block.chunks_exact_mut(rows.len() * PANEL).enumerate() {
                kernels.product_topped(&x, packed, panel..packed.n_panels(), tops, out);
            }
            let block = Block { data: block, n_rows: rows.len(), n };
            kernels.quantize_activated(block, 0..rows.len(), then, Some(tops), &mut to);
        });
        to
    }
}

/// Codes of a few rows in the form that all parts of a product with `weights` read; they may take `room`.
fn turned<'a>(
    kernels: &KernelSet,
    workspace: &Workspace,
    weights: &PackedMatrix,
    x: CodeRows<'a>,
    room: &'a mut Option<Buffer<u8>>,
) -> CodeRows<'a> {
    kernels.turn(x, weights, |n| room.insert(workspace.take(n)))
}

/// Rows for the threads of the next loop, about `block` of them to a part, and more to that of a faster thread.
fn row_shares(n_rows: usize, block: usize, seat: &mut Seat) -> Shares {
    seat.shares(n_rows, block, BLOCK_ROWS, 1)
}

/// Runs of panels for the threads of the next loop.
fn column_shares(n_panels: usize, seat: &mut Seat) -> Shares {
    let most = n_panels.max(1);
    seat.shares(n_panels, most, most, 1)
}

/// LayerNorm of rows of the residual stream and those of `block`, if there is one.
fn add_norm(
    kernels: &KernelSet,
    block: Option<(Block<'_>, Range<usize>)>,
    rows: &mut [f32],
    norm: &Int8Norm,
    to: &mut CodeRowsMut<'_>,
) {
    let mut sums = [RowSums::EMPTY; BLOCK_ROWS];
    let mut stream = Stream { rows, n: norm.gain.len(), sums: &mut sums[..to.scales.len()] };
    kernels.add(block, &mut stream);
    kernels.normalize(&mut stream, norm.view(), to);
}

fn nonlinearity(activation: Activation) -> Option<Nonlinearity> {
    match activation {
        Activation::Identity => None,
        Activation::Gelu => Some(Nonlinearity::Gelu),
        Activation::GeluTanh => Some(Nonlinearity::GeluTanh),
        Activation::Relu => Some(Nonlinearity::Relu),
        Activation::Tanh => Some(Nonlinearity::Tanh),
    }
}

impl Ops for Int8 {
    type Act = Int8Act;
    type Tables = Int8Tables;
    type Linear = Int8Weights;
    type Norm = Int8Norm;

    fn embed(&mut self, tables: &Int8Tables, norm: &Int8Norm, batch: &Ragged<'_>) -> Result<Int8Act, ModelError> {
        tables.check(batch)?;
        let d_model = tables.word.width();
        if norm.gain.len() != d_model {
            return self.refuse(Int8Error::Width { verb: "embed", expected: d_model, got: norm.gain.len() });
        }
        let n_rows = batch.n_tokens();
        self.settle(n_rows);
        let mut rows = self.workspace.take::<f32>(n_rows * d_model);
        let mut codes = self.codes(n_rows, d_model);
        let stride = codes.stride;
        let Self { kernels, cores, seat, lanes, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let shares = row_shares(n_rows, KernelSet::MOST_BLOCK_ROWS, seat);
        let cut = shares.cut();
        let parts = (
            RowParts::new(&mut rows, d_model, cut),
            RowParts::new(&mut codes.codes, stride, cut),
            RowParts::new(&mut codes.scales, 1, cut),
        );
        seat.for_each_share(
            cut,
            parts,
            |lane, index, (rows, codes, scales): (&mut [f32], &mut [u8], &mut [RowScale])| {
                let mut lane = lanes.of(lane);
                tables.sum(kernels, batch, cut.rows(index).start, rows, &mut lane.gather);
                let mut to = CodeRowsMut { codes, stride, scales, range: norm.range };
                add_norm(kernels, None, rows, norm, &mut to);
            },
        );
        Ok(Int8Act { n_rows, n: d_model, form: Form::Stream { rows, codes } })
    }

    fn linear(&mut self, linear: &Int8Weights, x: &Int8Act, then: Activation) -> Result<Int8Act, ModelError> {
        let linear = match linear {
            Int8Weights::Packed(linear) => linear,
            Int8Weights::Plain(linear) => return self.plain(linear, x, then),
        };
        let (Form::Stream { codes, .. } | Form::Codes(codes)) = &x.form else {
            return self.refuse(Int8Error::Form { verb: "linear" });
        };
        let n_in = linear.layer.n_in();
        if x.n != n_in {
            return self.refuse(Int8Error::Width { verb: "linear", expected: n_in, got: x.n });
        }
        let form = match nonlinearity(then) {
            None => Form::Half { panels: self.half(linear, codes, x.n_rows), context: linear.out_range },
            Some(then) => Form::Codes(self.hidden(linear, codes, x.n_rows, then)),
        };
        Ok(Int8Act { n_rows: x.n_rows, n: linear.layer.n_out(), form })
    }

    fn attend(&mut self, qkv: Int8Act, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Int8Act, ModelError> {
        self.attend_rows(&qkv, spec, batch)
    }

    fn linear_add_norm(
        &mut self,
        linear: &Int8Weights,
        x: Int8Act,
        residual: Int8Act,
        norm: &Int8Norm,
    ) -> Result<Int8Act, ModelError> {
        let Int8Weights::Packed(linear) = linear else {
            return self.refuse(Int8Error::Form { verb: "linear_add_norm" });
        };
        let (Form::Stream { codes: input, .. } | Form::Codes(input)) = &x.form else {
            return self.refuse(Int8Error::Form { verb: "linear_add_norm" });
        };
        let Form::Stream { mut rows, mut codes } = residual.form else {
            return self.refuse(Int8Error::Form { verb: "linear_add_norm" });
        };
        let (n_rows, n) = (residual.n_rows, linear.layer.n_out());
        for (expected, got) in [(linear.layer.n_in(), x.n), (residual.n, n), (n, norm.gain.len()), (n_rows, x.n_rows)] {
            if expected != got {
                return self.refuse(Int8Error::Width { verb: "linear_add_norm", expected, got });
            }
        }
        let columns = self.splits_columns(n_rows).then(|| self.layer_columns(&linear.layer, input, n_rows));
        let Self { kernels, seat, cores, lanes, .. } = self;
        let seat = seat.get_or_insert_with(|| cores.enter());
        let stride = codes.stride;
        let shares = row_shares(n_rows, kernels.block_rows(linear.layer.n_in()), seat);
        let cut = shares.cut();
        let parts = (
            RowParts::new(&mut rows, n, cut),
            RowParts::new(&mut codes.codes, stride, cut),
            RowParts::new(&mut codes.scales, 1, cut),
        );
        seat.for_each_share(
            cut,
            parts,
            |lane, index, (residual, codes, scales): (&mut [f32], &mut [u8], &mut [RowScale])| {
                let rows = cut.rows(index);
                let mut to = CodeRowsMut { codes, stride, scales, range: norm.range };
                if let Some(block) = &columns {
                    add_norm(kernels, Some((Block { data: block, n_rows, n }, rows)), residual, norm, &mut to);
                    return;
                }
                let mut lane = lanes.of(lane);
                let Lane { block, middle, .. } = &mut *lane;
                let (x, packed) = middle.enter(kernels, &linear.layer, input.view(rows.clone()));
                let room = block.first::<f32>(rows.len() * PANEL);
                let mut sums = [RowSums::EMPTY; BLOCK_ROWS];
                let mut stream = Stream { rows: residual, n, sums: &mut sums[..rows.len()] };
                for panel in 0..packed.n_panels() {
                    kernels.product_add(&x, packed, panel..packed.n_panels(), &mut stream, room);
                }
                kernels.normalize(&mut stream, norm.view(), &mut to);
            },
        );
        Ok(Int8Act { n_rows, n, form: Form::Stream { rows, codes } })
    }

    fn pool(&mut self, x: &Int8Act, pooling: Pooling, batch: &Ragged<'_>) -> Result<Int8Act, ModelError> {
        let Form::Stream { rows, .. } = &x.form else {
            return self.refuse(Int8Error::Form { verb: "pool" });
        };
        if x.n_rows != batch.n_tokens() {
            return self.refuse(Int8Error::Width { verb: "pool", expected: batch.n_tokens(), got: x.n_rows });
        }
        let (n_seqs, n) = (batch.n_seqs(), x.n);
        let mut out = self.workspace.take::<f32>(n_seqs * n);
        let Self { kernels, cores, seat, .. } = self;
        let mut seat = seat.take().unwrap_or_else(|| cores.enter());
        let parts = RowParts::new(&mut out, n, Cut::Even { n_rows: n_seqs, block: 1 });
        seat.for_each(parts, |_, index, out: &mut [f32]| {
            let range = batch.rows(index);
            #[allow(clippy::cast_precision_loss, reason = "lengths are at most 2^20")]
            let len = range.len() as f32;
            let tokens = &rows[range.start * n..range.end * n];
            match pooling {
                Pooling::Cls => out.copy_from_slice(&tokens[..n]),
                Pooling::LastToken => out.copy_from_slice(&tokens[tokens.len() - n..]),
                Pooling::Max => kernels.reduce(Reduction::Max, tokens, out),
                Pooling::Mean => kernels.reduce(Reduction::Sum { factor: 1.0 / len }, tokens, out),
                Pooling::MeanSqrtLen => kernels.reduce(Reduction::Sum { factor: 1.0 / len.sqrt() }, tokens, out),
            }
        });
        Ok(Int8Act { n_rows: n_seqs, n, form: Form::Rows(out) })
    }

    fn read(&mut self, x: &Int8Act, out: &mut Vec<f32>) -> Result<(), ModelError> {
        self.seat = None;
        match &x.form {
            Form::Stream { rows, .. } | Form::Rows(rows) => out.extend_from_slice(rows),
            Form::Codes(Codes { codes, scales, stride }) => {
                for (row, scale) in codes.chunks_exact(*stride).zip(scales.iter()) {
                    out.extend(row[..x.n].iter().map(|&code| scale.low + scale.scale * f32::from(code)));
                }
            }
            Form::Half { panels: half, .. } => {
                for row in 0..x.n_rows {
                    out.extend((0..x.n).map(|column| half_to_f32(half[block_index(x.n_rows, row, column)])));
                }
            }
        }
        Ok(())
    }
}

impl Int8Norm {
    fn view(&self) -> Norm<'_> {
        Norm { gain: &self.gain, bias: &self.bias, eps: self.eps }
    }
}

#[cfg(test)]
#[path = "int8/tests.rs"]
mod tests;
