//! Attention alone: every form that the machine has, at the lengths and patterns that matter.
//!
//! `cargo bench --bench attention [-- FILTER]`; the figure is tokens per second of one layer of 12 heads of width 32 on
//! one thread, packing included. Nanoseconds per token and layer are its inverse.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use niwaki::kernels::attention::{
    Attention, CacheLine, HalfPanels, Heads, KeySlots, Queries, QueryKeys, SequenceHeads, SlotRange,
};
use niwaki::kernels::layout::PANEL;
use niwaki::kernels::{AttentionForm, Isa, KernelSet, f32_to_half};

const HEADS: Heads = Heads { n_heads: 12, d_head: 32 };
/// Keys of every query: all, or a window of this many on either side.
fn keys(len: usize, window: Option<usize>) -> Vec<QueryKeys> {
    let Some(window) = window else { return vec![QueryKeys::range(0, len); len] };
    let one = |query: usize| {
        let mut keys = QueryKeys::default();
        keys.shared[1] = SlotRange::new(query.saturating_sub(window), (query + window + 1).min(len));
        keys
    };
    (0..len).map(one).collect()
}

struct Layer {
    qkv: Vec<u16>,
    len: usize,
    /// Queries of a block, as the INT8 player takes them.
    block: usize,
    keys: Vec<QueryKeys>,
    packed: Vec<CacheLine>,
    scratch: Vec<f32>,
    out: Vec<f32>,
}

impl Layer {
    fn new(attention: &Attention, block: usize, len: usize, window: Option<usize>) -> Self {
        let value = |i: usize| f32_to_half(((i * 2_654_435_761) % 2_000) as f32 / 500.0 - 2.0);
        let keys = keys(len, window);
        let widest = keys.chunks(block).map(|keys| attention.scratch(HEADS, keys)).max().unwrap_or(0);
        Self {
            qkv: (0..HEADS.qkv_panels() * len * PANEL).map(value).collect(),
            len,
            block,
            keys,
            packed: vec![CacheLine::ZERO; HEADS.n_heads * attention.packed_lines(HEADS, &KeySlots::NATURAL, len)],
            scratch: vec![0.0; widest],
            out: vec![0.0; HEADS.d_context().div_ceil(PANEL) * block * PANEL],
        }
    }

    fn run(&mut self, attention: &Attention) {
        let qkv = HalfPanels { data: &self.qkv, n_rows: self.len };
        let sequence = SequenceHeads { qkv, heads: HEADS, first_row: 0, len: self.len, slots: KeySlots::NATURAL };
        let lines = attention.packed_lines(HEADS, &KeySlots::NATURAL, self.len);
        for (head, packed) in self.packed.chunks_exact_mut(lines).enumerate() {
            attention.pack_head(&sequence, head, packed, &mut self.scratch);
        }
        for (index, keys) in self.keys.chunks(self.block).enumerate() {
            let queries = Queries { first: index * self.block, keys, step: 1 };
            attention.attend(
                &sequence,
                0..sequence.heads.n_heads,
                queries,
                &self.packed,
                &mut self.scratch,
                &mut self.out,
            );
            black_box(&self.out);
        }
    }
}

fn attention(c: &mut Criterion) {
    let cases = [
        (16, None),
        (64, None),
        (128, None),
        (512, None),
        (2048, None),
        (512, Some(64)),
        (2048, Some(64)),
        (2048, Some(128)),
        (8192, Some(64)),
    ];
    for (len, window) in cases {
        let mut group = c.benchmark_group(match window {
            None => format!("full {len}"),
            Some(window) => format!("window {window} of {len}"),
        });
        group.throughput(Throughput::Elements(len as u64));
        group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800)).sample_size(10);
        for isa in Isa::all_supported() {
            for form in AttentionForm::ALL {
                let Some(set) = KernelSet::new(isa).with_attention(form) else { continue };
                let attention = set.attention(HEADS, 1);
                let mut layer = Layer::new(&attention, set.most_block_rows(), len, window);
                group.bench_function(BenchmarkId::new(format!("{isa}"), format!("{form:?}")), |b| {
                    b.iter(|| layer.run(&attention));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
