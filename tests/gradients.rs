//! The f32 player is differentiable: no gradient is cut, and gradients are right.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use candle_core::Tensor;
use common::tiny::{TinyModel, tiny_dir};
use niwaki::checkpoint::Checkpoint;
use niwaki::exec::candle::{CandleBuild, CandleF32, normalize};
use niwaki::model::{Band, Encoder, LayerConfig, Ops, Pooling, RaggedBatch};

const SEQUENCES: [&[u32]; 3] = [&[2, 7, 9, 3], &[2, 5, 6, 8, 30, 11, 3], &[2, 12, 3]];

struct Differentiable {
    checkpoint: Checkpoint,
    encoder: Encoder<CandleF32>,
    vars: Vec<(String, candle_core::Var)>,
    projection: Tensor,
}

impl Differentiable {
    fn new() -> Self {
        let dir = tiny_dir(&TinyModel { vocab_size: 40, ..TinyModel::default() });
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let mut build = CandleBuild::trainable(&checkpoint);
        let encoder = Encoder::build(checkpoint.architecture(), &mut build).unwrap();
        let vars = build.vars().to_vec();
        let d_model = checkpoint.architecture().d_model;
        // A fixed direction per sequence: the sum of all coordinates of normalised rows would have little gradient.
        let values: Vec<f32> = (0..SEQUENCES.len() * d_model).map(|i| ((i * 37 % 19) as f32 - 9.0) / 9.0).collect();
        let projection = Tensor::from_vec(values, (SEQUENCES.len(), d_model), &candle_core::Device::Cpu).unwrap();
        Self { checkpoint, encoder, vars, projection }
    }

    fn loss(&self) -> Tensor {
        let batch = RaggedBatch::from_sequences(&SEQUENCES).unwrap();
        let view = batch.view(0..batch.n_seqs());
        let mut player = CandleF32;
        let rows = self.encoder.forward(&mut player, &view).unwrap();
        let pooled = player.pool(&rows, self.checkpoint.architecture().pooling, &view).unwrap();
        normalize(&pooled).unwrap().mul(&self.projection).unwrap().sum_all().unwrap()
    }
}

#[test]
fn every_weight_gets_a_finite_gradient_that_is_not_zero() {
    let model = Differentiable::new();
    let gradients = model.loss().backward().unwrap();
    // Tables, the embedding norm, and per layer four linear layers and two norms of two tensors each.
    assert_eq!(model.vars.len(), 3 + 2 + 2 * 12);
    for (name, var) in &model.vars {
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("no gradient reached {name}"));
        let values: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        assert!(values.iter().all(|value| value.is_finite()), "{name}");
        let norm = values.iter().map(|value| value * value).sum::<f32>().sqrt();
        assert!(norm > 1e-5, "the gradient of {name} is {norm}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    let model = Differentiable::new();
    let gradients = model.loss().backward().unwrap();
    let mut failures = Vec::new();
    for (name, var) in &model.vars {
        let gradient: Vec<f32> = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let original: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        // The steepest element of each tensor: there f32 differences are most exact.
        let steepest = (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
        let step = 2e-3;
        let shifted = |by: f32| {
            let mut values = original.clone();
            values[steepest] += by;
            var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
            model.loss().to_scalar::<f32>().unwrap()
        };
        let difference = (shifted(step) - shifted(-step)) / (2.0 * step);
        var.set(&Tensor::from_vec(original.clone(), var.shape(), var.device()).unwrap()).unwrap();
        if (difference - gradient[steepest]).abs() > 2e-3 + 0.02 * gradient[steepest].abs() {
            failures.push(format!("{name}[{steepest}]: gradient {}, difference {difference}", gradient[steepest]));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Attention by the definition, one number at a time.
fn attention_by_definition(qkv: &[f32], n_heads: usize, d_head: usize, band: Band, lens: &[usize]) -> Vec<f32> {
    let width = n_heads * d_head;
    let mut out = vec![0.0; qkv.len() / 3];
    let mut start = 0;
    for &len in lens {
        for head in 0..n_heads {
            let at = |part: usize, token: usize, dim: usize| {
                f64::from(qkv[(start + token) * 3 * width + part * width + head * d_head + dim])
            };
            for query in 0..len {
                let scores: Vec<(usize, f64)> = (0..len)
                    .filter(|&key| band.contains(query, key))
                    .map(|key| {
                        let dot: f64 = (0..d_head).map(|dim| at(0, query, dim) * at(1, key, dim)).sum();
                        (key, (dot / (d_head as f64).sqrt()).exp())
                    })
                    .collect();
                let total: f64 = scores.iter().map(|(_, score)| score).sum();
                for dim in 0..d_head {
                    let sum: f64 = scores.iter().map(|&(key, score)| score / total * at(2, key, dim)).sum();
                    #[allow(clippy::cast_possible_truncation, reason = "compared as f32")]
                    let value = sum as f32;
                    out[(start + query) * width + head * d_head + dim] = value;
                }
            }
        }
        start += len;
    }
    out
}

#[test]
fn attention_is_its_definition_under_every_band_and_mix_of_lengths() {
    let (n_heads, d_head) = (3, 4);
    let lens = [5usize, 17, 1, 6, 16, 2, 40];
    let n_tokens: usize = lens.iter().sum();
    let values: Vec<f32> =
        (0..n_tokens * 3 * n_heads * d_head).map(|i| ((i * 7919 % 613) as f32 - 306.0) / 200.0).collect();
    let sequences: Vec<Vec<u32>> = lens.iter().map(|&len| vec![0; len]).collect();
    let batch = RaggedBatch::from_sequences(&sequences).unwrap();
    for band in [Band::FULL, Band::symmetric(2, 1), Band { left: 3, right: 0, ..Band::FULL }, Band::symmetric(0, 0)] {
        let layer = LayerConfig { n_heads, d_head, d_ffn: 1, band };
        let spec = niwaki::model::AttentionSpec::new(0, &layer);
        let qkv =
            Tensor::from_vec(values.clone(), (n_tokens, 3 * n_heads * d_head), &candle_core::Device::Cpu).unwrap();
        let mut player = CandleF32;
        let context = player.attend(qkv, &spec, &batch.view(0..lens.len())).unwrap();
        let mut got = Vec::new();
        player.read(&context, &mut got).unwrap();
        let expected = attention_by_definition(&values, n_heads, d_head, band, &lens);
        let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-6, "{band:?}: differs by {worst}");
    }
}

#[test]
fn pooling_reduces_each_sequence_alone() {
    let batch = RaggedBatch::from_sequences(&[vec![0; 2], vec![0; 3]]).unwrap();
    let view = batch.view(0..2);
    let x = Tensor::new(&[[1f32, -1.0], [3.0, 0.0], [2.0, 2.0], [4.0, 8.0], [0.0, -4.0]], &candle_core::Device::Cpu)
        .unwrap();
    for (pooling, expected) in [
        (Pooling::Cls, vec![1.0, -1.0, 2.0, 2.0]),
        (Pooling::LastToken, vec![3.0, 0.0, 0.0, -4.0]),
        (Pooling::Mean, vec![2.0, -0.5, 2.0, 2.0]),
        (Pooling::Max, vec![3.0, 0.0, 4.0, 8.0]),
        (Pooling::MeanSqrtLen, vec![4.0 / 2f32.sqrt(), -1.0 / 2f32.sqrt(), 6.0 / 3f32.sqrt(), 6.0 / 3f32.sqrt()]),
    ] {
        let mut player = CandleF32;
        let pooled = player.pool(&x, pooling, &view).unwrap();
        let mut got = Vec::new();
        player.read(&pooled, &mut got).unwrap();
        let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(got.len() == 4 && worst < 1e-6, "{pooling:?}: {got:?}");
    }
}
