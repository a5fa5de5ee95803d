use std::borrow::Cow;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::exec::int8_build::Int8Model;
use crate::exec::int8_tables::Table;
use crate::kernels::{AttentionForm, Isa};
use crate::model::{
    ArchitectureSpec, Build, Encoder, Family, Forward, LayerConfig, LinearSlot, Model, NormSlot, Outputs, Positions,
    RaggedBatch, Want,
};
use crate::quant::Weight;

fn detected() -> KernelSet {
    KernelSet::new(Isa::detect())
}

/// A model of random weights, with layers of different widths, one of them not a multiple of anything.
struct Random {
    kernels: KernelSet,
    architecture: Arc<Architecture>,
    rng: StdRng,
}

impl Random {
    fn new(kernels: KernelSet, band: Band, d_model: usize) -> Self {
        let layer = |n_heads, d_head, d_ffn| LayerConfig { n_heads, d_head, d_ffn, band };
        let spec = ArchitectureSpec {
            ranges: Vec::new(),
            family: Family::Bert,
            vocab_size: 300,
            n_token_types: 2,
            positions: Positions { table_len: 64, offset: 0, tiled: true },
            d_model,
            norm_eps: 1e-12,
            activation: Activation::Gelu,
            layers: vec![layer(3, 32, 192), layer(2, 20, 77), layer(1, 64, 4)],
            pooling: Pooling::Mean,
            normalize: false,
            max_input_tokens: 1000,
            head: None,
        };
        let architecture = Arc::new(Architecture::new(spec).unwrap());
        Self { kernels, architecture, rng: StdRng::seed_from_u64(7) }
    }

    fn values(&mut self, n: usize, around: f32, width: f32) -> Vec<f32> {
        (0..n).map(|_| around + self.rng.random_range(-width..width)).collect()
    }

    fn model(&mut self) -> Int8Model {
        let architecture = Arc::clone(&self.architecture);
        let encoder = Encoder::build(&architecture, self).unwrap();
        Int8Model::of_encoder(self.kernels, architecture, encoder.into(), 0)
    }
}

impl Build<Int8> for Random {
    fn tables(&mut self) -> Result<Int8Tables, ModelError> {
        let d = self.architecture.d_model;
        let positions = self.architecture.positions;
        let mut table = |rows| {
            let values = self.values(rows * d, 0.0, 1.0);
            Table::new(&Weight::F32(Cow::Owned(values)), d)
        };
        Ok(Int8Tables { word: table(300), position: table(64), token_type: Some(table(2)), positions })
    }

    fn norm(&mut self, _: NormSlot) -> Result<Int8Norm, ModelError> {
        let d = self.architecture.d_model;
        Ok(Int8Norm { gain: self.values(d, 1.0, 0.3), bias: self.values(d, 0.0, 0.3), eps: 1e-12, range: None })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<Int8Weights, ModelError> {
        let (n_out, n_in) = slot.shape(&self.architecture.layers[slot.layer()], self.architecture.d_model);
        // Most near zero, as trained ones are: kernels may take another way for such weights.
        let mut weight = self.values(n_out * n_in, 0.0, 0.1);
        for _ in 0..2 {
            let more = self.values(n_out * n_in, 0.0, 0.1);
            weight.iter_mut().zip(more).for_each(|(weight, more)| *weight += more);
        }
        let weight = Weight::F32(Cow::Owned(weight));
        let bias = self.values(n_out, 0.0, 0.2);
        Ok(Int8Linear::new(&self.kernels, &weight, &bias, n_in).into())
    }
}

fn batch(lens: &[usize]) -> RaggedBatch {
    let mut batch = RaggedBatch::new();
    for &len in lens {
        // A sequence's content follows from its length, so that it can be found again in another batch.
        let mut rng = StdRng::seed_from_u64(len as u64);
        let ids: Vec<u32> = (0..len).map(|_| rng.random_range(0..300)).collect();
        let types: Vec<u8> = (0..len).map(|i| u8::from(i > len / 2)).collect();
        batch.push_typed(&ids, &types).unwrap();
    }
    batch
}

fn cores(n: usize) -> Arc<Cores> {
    Arc::new(Cores::new(n).unwrap())
}

fn forward(model: &mut Model<Int8>, lens: &[usize]) -> Outputs {
    let mut out = Outputs::default();
    model.forward(&batch(lens), Want::PooledAndTokens, &mut out).unwrap();
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|value| value.is_finite()));
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every kernel set of the machine, with every form of attention that it has.
fn kernel_sets() -> Vec<KernelSet> {
    Isa::all_supported()
        .into_iter()
        .flat_map(|isa| AttentionForm::ALL.map(|form| KernelSet::new(isa).with_attention(form)))
        .flatten()
        .collect()
}

#[test]
fn a_sequence_is_bit_identical_alone_and_in_any_batch_group_and_number_of_threads() {
    let lens = [1, 130, 16, 7, 33, 48, 300, 2, 16, 64];
    let patterns =
        ["full", "window=9,globals=1", "window=40:3", "dilated=4:3,sinks=2", "strided=16", "fixed=32:3", "pooled=16"];
    for band in patterns.map(|pattern| pattern.parse().unwrap()) {
        // A width that is not a multiple of anything need not meet every pattern.
        let widths: &[usize] = if band == Band::FULL { &[96, 100] } else { &[96] };
        for &d_model in widths {
            for kernels in kernel_sets() {
                let shared = Random::new(kernels, band, d_model).model();
                let alone: Vec<Outputs> = {
                    let mut worker = shared.worker(cores(1), 512);
                    lens.iter().map(|&len| forward(&mut worker, &[len])).collect()
                };
                for (n_cores, group_tokens) in [(1, 64), (2, 1), (2, 2048), (3, 200)] {
                    let mut worker = shared.worker(cores(n_cores), group_tokens);
                    let together = forward(&mut worker, &lens);
                    let (mut pooled, mut tokens) = (0, 0);
                    for (index, alone) in alone.iter().enumerate() {
                        let what = format!("{kernels:?} {band:?} {n_cores} {group_tokens} sequence {index}");
                        let rows = alone.pooled.len();
                        assert_eq!(bits(&together.pooled[pooled..pooled + rows]), bits(&alone.pooled), "{what}");
                        pooled += rows;
                        let rows = alone.tokens.len();
                        assert_eq!(bits(&together.tokens[tokens..tokens + rows]), bits(&alone.tokens), "{what}");
                        tokens += rows;
                    }
                    assert_eq!((pooled, tokens), (together.pooled.len(), together.tokens.len()));
                }
            }
        }
    }
}

#[test]
fn instruction_sets_agree() {
    let shared = |kernels| Random::new(kernels, Band::symmetric(20, 1), 96).model();
    let lens = [5, 70, 16];
    let results: Vec<(KernelSet, Outputs)> = kernel_sets()
        .into_iter()
        .map(|kernels| (kernels, forward(&mut shared(kernels).worker(cores(2), 512), &lens)))
        .collect();
    let (_, first) = &results[0];
    for (kernels, other) in &results[1..] {
        let cosine = cosine(&first.tokens, &other.tokens);
        assert!(cosine > 0.9995, "{kernels:?}: {cosine}");
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn the_seat_is_given_back_after_results_and_after_errors() {
    let shared = Random::new(detected(), Band::FULL, 96).model();
    let one = cores(1);
    let mut first = shared.worker(Arc::clone(&one), 512);
    let mut second = shared.worker(Arc::clone(&one), 512);
    for _ in 0..3 {
        // With one core either would wait forever if the other had kept its seat.
        forward(&mut first, &[3, 4]);
        forward(&mut second, &[40]);
        let refused =
            first.forward(&RaggedBatch::from_sequences(&[[300u32]]).unwrap(), Want::Pooled, &mut Outputs::default());
        assert!(matches!(refused, Err(ModelError::TokenOutOfRange { id: 300, vocab_size: 300 })), "{refused:?}");
    }
    // Activations of the wrong kind are an error, not a hang.
    let (encoder, player) = first.parts();
    let batch = batch(&[3]);
    let view = batch.view(0..1);
    let rows = encoder.forward(player, &view).unwrap();
    let spec = AttentionSpec { layer: 0, n_heads: 1, d_head: 32, band: Band::FULL };
    let pooled = player.pool(&rows, Pooling::Cls, &view).unwrap();
    assert!(player.attend(pooled, &spec, &view).is_err());
    forward(&mut second, &[5]);
}

#[test]
fn pooling_is_what_it_says() {
    let shared = Random::new(detected(), Band::FULL, 96).model();
    let mut worker = shared.worker(cores(2), 512);
    let (encoder, player) = worker.parts();
    let batch = batch(&[4, 1]);
    let view = batch.view(0..2);
    let rows = encoder.forward(player, &view).unwrap();
    let mut tokens = Vec::new();
    player.read(&rows, &mut tokens).unwrap();
    let column = |token: usize| f64::from(tokens[token * 96 + 5]);
    let sum: f64 = (0..4).map(column).sum();
    for (pooling, expected) in [
        (Pooling::Cls, column(0)),
        (Pooling::LastToken, column(3)),
        (Pooling::Mean, sum / 4.0),
        (Pooling::MeanSqrtLen, sum / 2.0),
        (Pooling::Max, (0..4).map(column).fold(f64::NEG_INFINITY, f64::max)),
    ] {
        let mut pooled = Vec::new();
        let act = player.pool(&rows, pooling, &view).unwrap();
        player.read(&act, &mut pooled).unwrap();
        assert_eq!(pooled.len(), 2 * 96);
        assert!((f64::from(pooled[5]) - expected).abs() < 1e-5, "{pooling:?}");
        assert_eq!(pooled[96 + 5], tokens[4 * 96 + 5], "{pooling:?} of one token");
    }
}

#[test]
fn an_empty_view_has_empty_results() {
    let shared = Random::new(detected(), Band::FULL, 96).model();
    let mut worker = shared.worker(cores(2), 512);
    let mut out = Outputs::default();
    worker.forward(&RaggedBatch::new(), Want::PooledAndTokens, &mut out).unwrap();
    assert!(out.pooled.is_empty() && out.tokens.is_empty());
}

#[test]
fn workers_on_many_threads_share_the_lanes_of_the_helpers() {
    let shared = Random::new(detected(), Band::FULL, 96).model();
    let bytes = |n_cores: usize| {
        let first = shared.worker(cores(n_cores), 256);
        let another = first.another();
        (first.memory().workspace, another.memory().workspace)
    };
    let (alone, eight, sixteen) = (bytes(1), bytes(8), bytes(16));
    assert_eq!(alone.0, alone.1);
    // A lane each for seven helpers, for fifteen: as many as threads, and in the first worker alone.
    assert_eq!((sixteen.0 - alone.0) * 7, (eight.0 - alone.0) * 15);
    assert!(eight.0 > alone.0 && eight.1 == alone.1 && sixteen.1 == alone.1);
    // They compute what the first does, at once.
    let many = cores(4);
    let first = shared.worker(Arc::clone(&many), 256);
    let mut workers: Vec<_> = (0..4).map(|_| first.another()).collect();
    let expected = forward(&mut first.another(), &[40, 3, 17]).pooled;
    std::thread::scope(|scope| {
        for worker in &mut workers {
            scope.spawn(|| (0..20).for_each(|_| assert_eq!(forward(worker, &[40, 3, 17]).pooled, expected)));
        }
    });
}

#[test]
fn the_workspace_is_sized_at_construction_and_grows_only_for_longer_inputs() {
    let shared = Random::new(detected(), Band::FULL, 96).model();
    let mut worker = shared.worker(cores(2), 256);
    let at_start = worker.memory();
    assert_eq!(at_start.workspace_peak, 0);
    for lens in [&[256][..], &[1; 256], &[100, 100, 56], &[31], &[33, 223], &[64; 4]] {
        forward(&mut worker, lens);
        assert_eq!(worker.memory().workspace, at_start.workspace, "{lens:?}");
    }
    let peak = worker.memory().workspace_peak;
    assert!(peak > 256 * 96 * 4 && peak <= at_start.workspace, "{peak} of {}", at_start.workspace);
    forward(&mut worker, &[900]);
    let grown = worker.memory().workspace;
    assert!(grown > at_start.workspace);
    // Long inputs now and then keep their room; when they stay away it is given back.
    for _ in 0..3 {
        (0..10).for_each(|_| drop(forward(&mut worker, &[100])));
        forward(&mut worker, &[900]);
        // Which thread took which part decides how many of them needed more room.
        assert!(worker.memory().workspace >= grown);
    }
    (0..16).for_each(|_| drop(forward(&mut worker, &[100])));
    assert_eq!(worker.memory().workspace, at_start.workspace);
    let (one, other) = (forward(&mut worker, &[100]), forward(&mut worker, &[900]));
    assert_eq!(bits(&forward(&mut worker, &[100, 900]).pooled), bits(&[one.pooled, other.pooled].concat()));
}
