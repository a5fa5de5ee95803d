//! Players against PyTorch: layer by layer on small models of every family, and on a real encoder.
//!
//! The golden values are made by `tests/golden/make_golden.py`, in f64 from the stored weights.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use niwaki::checkpoint::{Checkpoint, OpenOptions};
use niwaki::exec::candle_model;
use niwaki::exec::int8::Int8;
use niwaki::exec::int8_build::{GROUP_TOKENS, Int8Model};
use niwaki::kernels::threads::Cores;
use niwaki::kernels::{AttentionForm, Isa, IsaName, KernelSet};
use niwaki::model::{Activation, Band, Model, Ops, Pooling, RaggedBatch};
use serde::Deserialize;

/// The small models: directory, pooling, whether normalised, activation, longest input.
const MODELS: [(&str, Pooling, bool, Activation, usize); 5] = [
    ("bert", Pooling::Mean, true, Activation::Gelu, 20),
    ("roberta", Pooling::Cls, false, Activation::Gelu, 24),
    ("xlm-roberta", Pooling::Mean, true, Activation::Gelu, 24),
    ("camembert", Pooling::Max, false, Activation::GeluTanh, 24),
    ("distilbert", Pooling::LastToken, true, Activation::Relu, 24),
];

/// Largest difference of a value of the f32 player: values are of order 1 to 4, sums have at most 96 terms of
/// order 1, and three post-norm layers pass an error on without growth. The golden values carry 7 digits.
const F32_TOLERANCE: f32 = 2e-5;

/// INT8 on the small models, whose 32 to 64 columns leave few terms for rounding errors to cancel over. Smallest cosine
/// of a token row after any layer and of a pooled row; a simulation of the number formats in PyTorch gives 0.9988 and
/// 0.9996. A mask or position that is wrong in one place gives less than 0.98.
const INT8_ROW_COSINE: f64 = 0.997;
/// The same where a query sees a handful of keys, over which rounding errors average out less.
const INT8_FEW_KEYS_COSINE: f64 = 0.99;
const INT8_POOLED_COSINE: f64 = 0.999;
/// Share of token rows whose largest element stays the largest: random rows have near ties.
const INT8_SAME_PEAK: f64 = 0.95;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: Option<String>,
    ids: Vec<u32>,
    #[serde(default)]
    token_types: Vec<u8>,
    band: Option<Band>,
    max_input_tokens: Option<usize>,
    /// `[n_layers + 1, n_tokens, d_model]`: after the embedding and after each layer.
    #[serde(default)]
    hidden: Vec<Vec<Vec<f32>>>,
    /// By the name of the pooling.
    pooled: BTreeMap<String, Vec<f32>>,
}

impl Case {
    fn batch(&self) -> RaggedBatch {
        let mut batch = RaggedBatch::new();
        batch.push_typed(&self.ids, &self.token_types).unwrap();
        batch
    }

    fn checkpoint(&self, dir: &Path) -> Checkpoint {
        let (band, max_input_tokens) = (self.band, self.max_input_tokens);
        Checkpoint::open_with(dir, &OpenOptions { band, max_input_tokens, ..OpenOptions::default() }).unwrap()
    }

    fn last(&self) -> Vec<f32> {
        self.hidden.last().unwrap().concat()
    }
}

fn golden_dir(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model)
}

fn golden(dir: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(dir.join("golden.json")).unwrap();
    serde_json::from_str::<Golden>(&text).unwrap().cases
}

/// The rows after the embedding and after each layer, and the last ones pooled.
fn play<O: Ops>(model: &mut Model<O>, batch: &RaggedBatch, pooling: Pooling) -> (Vec<Vec<f32>>, Vec<f32>) {
    let view = batch.view(0..batch.n_seqs());
    let (encoder, ops) = model.parts();
    let mut rows = Vec::new();
    let x = encoder
        .forward_visiting(ops, &view, |ops, index, x| {
            assert_eq!(index, rows.len());
            rows.push(Vec::new());
            ops.read(x, &mut rows[index])
        })
        .unwrap();
    let mut pooled = Vec::new();
    let x = ops.pool(&x, pooling, &view).unwrap();
    ops.read(&x, &mut pooled).unwrap();
    (rows, pooled)
}

/// The INT8 player on `n_cores`, on every instruction set that this machine has, with every form of attention.
fn int8(checkpoint: Checkpoint, n_cores: usize) -> Vec<(String, Model<Int8>)> {
    let checkpoint = Arc::new(checkpoint);
    let worker = |kernels: KernelSet| {
        let cores = Arc::new(Cores::new(n_cores).unwrap());
        Int8Model::load(&checkpoint, kernels).unwrap().worker(cores, GROUP_TOKENS)
    };
    // Attention in bytes has an error of its own, which `tests/kernels.rs` holds; beside it these tolerances mean nothing.
    let forms = [AttentionForm::F32, AttentionForm::Int16];
    let sets = |isa: Isa| forms.map(|form| (isa, form, KernelSet::new(isa).with_attention(form)));
    Isa::all_supported()
        .into_iter()
        .flat_map(sets)
        .filter_map(|(isa, form, kernels)| Some((format!("{isa} {form:?}"), worker(kernels?))))
        .collect()
}

fn pooling_named(name: &str) -> Pooling {
    serde_json::from_value(name.into()).unwrap()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |max, d| if d.is_nan() { f32::NAN } else { max.max(d) })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Fails with all offences at once; a NaN is an offence.
fn expect_within(what: &[(String, f32)], tolerance: f32) {
    let worst = what.iter().map(|(_, difference)| *difference).fold(0.0, f32::max);
    println!("largest difference of {} comparisons: {worst:e} (tolerance {tolerance:e})", what.len());
    let offences: Vec<_> =
        what.iter().filter(|(_, d)| d.is_nan() || *d > tolerance).map(|(name, d)| format!("{name}: {d:e}")).collect();
    assert!(offences.is_empty(), "{} of {} beyond {tolerance:e}:\n{}", offences.len(), what.len(), offences.join("\n"));
}

#[test]
fn small_models_open_as_what_they_are() {
    for (model, pooling, normalize, activation, max_input_tokens) in MODELS {
        let checkpoint = Checkpoint::open(&golden_dir(model)).unwrap();
        let spec = checkpoint.architecture();
        assert_eq!(
            (spec.pooling, spec.normalize, spec.activation, spec.max_input_tokens),
            (pooling, normalize, activation, max_input_tokens),
            "{model}"
        );
    }
}

#[test]
fn their_tokenizers_give_the_ids() {
    for (model, ..) in MODELS {
        let dir = golden_dir(model);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(checkpoint.tokenizer_json()).unwrap();
        let cases = golden(&dir);
        let texts: Vec<_> = cases.iter().filter_map(|case| Some((case.text.as_ref()?, &case.ids))).collect();
        assert!(texts.len() >= 3, "{model}");
        for (text, ids) in texts {
            let encoding = tokenizer.encode(text.as_str(), true).unwrap();
            assert_eq!(encoding.get_ids(), ids, "{model}: {text:?}");
        }
    }
}

#[test]
fn f32_is_pytorch_after_every_layer_and_pooling() {
    let mut differences = Vec::new();
    for (name, ..) in MODELS {
        let dir = golden_dir(name);
        for (index, case) in golden(&dir).iter().enumerate() {
            let mut model = candle_model(&case.checkpoint(&dir)).unwrap();
            assert_eq!(case.pooled.len(), 5);
            for (pooling, expected) in &case.pooled {
                let (rows, pooled) = play(&mut model, &case.batch(), pooling_named(pooling));
                differences.push((format!("{name} case {index} {pooling}"), max_difference(&pooled, expected)));
                assert_eq!(rows.len(), case.hidden.len());
                for (layer, (rows, expected)) in rows.iter().zip(&case.hidden).enumerate() {
                    let difference = max_difference(rows, &expected.concat());
                    differences.push((format!("{name} case {index} rows {layer}"), difference));
                }
            }
        }
    }
    expect_within(&differences, F32_TOLERANCE);
}

#[test]
fn f32_is_the_same_in_a_ragged_batch() {
    let mut differences = Vec::new();
    for (name, ..) in MODELS {
        let dir = golden_dir(name);
        let cases: Vec<_> = golden(&dir).into_iter().filter(|case| case.band.is_none()).collect();
        let mut batch = RaggedBatch::new();
        for case in &cases {
            batch.push_typed(&case.ids, &case.token_types).unwrap();
        }
        let mut model = candle_model(&Checkpoint::open(&dir).unwrap()).unwrap();
        let (rows, _) = play(&mut model, &batch, Pooling::Mean);
        let expected: Vec<f32> = cases.iter().flat_map(Case::last).collect();
        differences.push((name.to_owned(), max_difference(rows.last().unwrap(), &expected)));
    }
    expect_within(&differences, F32_TOLERANCE);
}

/// A tolerance means something only if what it is to catch lies far above it.
#[test]
fn small_models_tell_masks_types_and_positions_apart() {
    let dir = golden_dir("bert");
    let mut n_told_apart = 0;
    for case in golden(&dir) {
        let without_band = OpenOptions { max_input_tokens: Some(24), ..OpenOptions::default() };
        let spoilt = match (&case.band, case.token_types.is_empty()) {
            (Some(_), _) if case.ids.len() <= 24 => (Checkpoint::open_with(&dir, &without_band).unwrap(), case.batch()),
            (Some(band), _) => {
                let other = OpenOptions {
                    band: Some(Band { left: band.left + 1, ..*band }),
                    max_input_tokens: Some(64),
                    ..OpenOptions::default()
                };
                (Checkpoint::open_with(&dir, &other).unwrap(), case.batch())
            }
            (None, false) => {
                (case.checkpoint(&dir), RaggedBatch::from_sequences(std::slice::from_ref(&case.ids)).unwrap())
            }
            (None, true) if case.ids.len() > 2 => {
                let mut reversed = case.ids.clone();
                reversed[1..].reverse();
                (case.checkpoint(&dir), RaggedBatch::from_sequences(&[reversed]).unwrap())
            }
            _ => continue,
        };
        let (rows, _) = play(&mut candle_model(&spoilt.0).unwrap(), &spoilt.1, Pooling::Mean);
        let difference = max_difference(rows.last().unwrap(), &case.last());
        assert!(difference > 1_000.0 * F32_TOLERANCE, "{difference:e} for ids {:?}", case.ids);
        n_told_apart += 1;
    }
    assert!(n_told_apart >= 7, "only {n_told_apart} cases were spoilt");
}

/// Someone else's forward pass, on the same weights: agrees with PyTorch and so with ours.
#[test]
fn candle_transformers_agrees() {
    let dir = golden_dir("bert");
    let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let weights = std::fs::read(dir.join("model.safetensors")).unwrap();
    let vars = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu).unwrap();
    let oracle = bert::BertModel::load(vars, &config).unwrap();
    let mut differences = Vec::new();
    for case in golden(&dir).iter().filter(|case| case.band.is_none()) {
        let n_tokens = case.ids.len();
        let types: Vec<u32> = (0..n_tokens).map(|t| case.token_types.get(t).map_or(0, |&t| u32::from(t))).collect();
        let ids = Tensor::new(&case.ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let types = Tensor::new(&types[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let rows: Vec<f32> = oracle.forward(&ids, &types, None).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let (ours, _) = play(&mut candle_model(&case.checkpoint(&dir)).unwrap(), &case.batch(), Pooling::Mean);
        differences.push((format!("PyTorch, {n_tokens} tokens"), max_difference(&rows, &case.last())));
        differences.push((format!("ours, {n_tokens} tokens"), max_difference(&rows, ours.last().unwrap())));
    }
    expect_within(&differences, F32_TOLERANCE);
}

#[test]
fn int8_is_close_after_every_layer_and_pooling() {
    let peak = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].abs().total_cmp(&row[b].abs()));
    let (mut offences, mut n_rows, mut n_same_peaks) = (Vec::new(), 0u32, 0u32);
    let (mut worst_row, mut worst_pooled) = (1.0f64, 1.0f64);
    for (name, ..) in MODELS {
        let dir = golden_dir(name);
        for (index, case) in golden(&dir).iter().enumerate() {
            for (isa, mut model) in int8(case.checkpoint(&dir), 1) {
                let what = format!("{name} case {index} {isa}");
                for (pooling, expected) in &case.pooled {
                    let pooled = play(&mut model, &case.batch(), pooling_named(pooling)).1;
                    let found = cosine(&pooled, expected);
                    worst_pooled = worst_pooled.min(found);
                    if found.is_nan() || found < INT8_POOLED_COSINE {
                        offences.push(format!("{what} {pooling}: {found}"));
                    }
                }
                let rows = play(&mut model, &case.batch(), Pooling::Mean).0;
                for (layer, (rows, expected)) in rows.iter().zip(&case.hidden).enumerate() {
                    for (token, (row, expected)) in rows.chunks(expected[0].len()).zip(expected).enumerate() {
                        let found = cosine(row, expected);
                        worst_row = worst_row.min(found);
                        if found.is_nan() || found < INT8_ROW_COSINE {
                            offences.push(format!("{what} layer {layer} token {token}: {found}"));
                        }
                        n_rows += 1;
                        n_same_peaks += u32::from(peak(row) == peak(expected));
                    }
                }
            }
        }
    }
    let same_peak = f64::from(n_same_peaks) / f64::from(n_rows);
    println!("smallest cosine: row {worst_row:.5}, pooled {worst_pooled:.5}; same peak in {same_peak:.4} of {n_rows}");
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
    assert!(same_peak >= INT8_SAME_PEAK);
}

/// Kernels skip what the reference masks; both follow from the band.
#[test]
fn int8_is_close_to_f32_after_every_layer_under_every_pattern() {
    let patterns = [
        "window=5",
        "window=3:9,globals=cls",
        "window=2,sinks=3",
        "dilated=2:3",
        "dilated=3:4,globals=2,sinks=5",
        "strided=7",
        "strided=9,window=2,globals=cls",
        "fixed=8:2",
        "fixed=11:3,globals=3",
        "pooled=6",
        "pooled=9:2,globals=cls",
    ];
    let mut offences = Vec::new();
    for (name, ..) in MODELS {
        let dir = golden_dir(name);
        let ids: Vec<u32> = golden(&dir).iter().flat_map(|case| case.ids.clone()).cycle().take(90).collect();
        let batch = RaggedBatch::from_sequences(&[&ids[..70], &ids[20..81]]).unwrap();
        let mut seen_apart = 0;
        for pattern in patterns {
            let band: Band = pattern.parse().unwrap();
            let open = |band| {
                let options = OpenOptions { band: Some(band), max_input_tokens: Some(100), ..OpenOptions::default() };
                Checkpoint::open_with(&dir, &options).unwrap()
            };
            let expected = play(&mut candle_model(&open(band)).unwrap(), &batch, Pooling::Mean).0;
            let wide = play(&mut candle_model(&open(Band::symmetric(90, 0))).unwrap(), &batch, Pooling::Mean).0;
            let d_model = expected[0].len() / batch.n_tokens();
            for (isa, mut model) in int8(open(band), 2) {
                let rows = play(&mut model, &batch, Pooling::Mean).0;
                for (layer, (rows, expected)) in rows.iter().zip(&expected).enumerate() {
                    for (token, (row, expected)) in rows.chunks(d_model).zip(expected.chunks(d_model)).enumerate() {
                        let found = cosine(row, expected);
                        if found.is_nan() || found < INT8_FEW_KEYS_COSINE {
                            offences.push(format!("{name} {pattern} {isa} layer {layer} token {token}: {found}"));
                        }
                    }
                }
            }
            // The tolerance tells this pattern from full attention; summaries of nearly flat rows may come close to it.
            let rows = || expected.last().unwrap().chunks(d_model).zip(wide.last().unwrap().chunks(d_model));
            seen_apart += usize::from(rows().any(|(row, wide)| cosine(row, wide) < INT8_ROW_COSINE - 0.01));
        }
        assert!(seen_apart >= patterns.len() / 2, "{name}: {seen_apart} patterns differ from full attention");
    }
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
}

#[test]
fn int8_is_bit_identical_in_any_batch_on_any_number_of_threads() {
    let bits = |rows: &[f32]| rows.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for (name, ..) in MODELS {
        let dir = golden_dir(name);
        let cases: Vec<_> = golden(&dir).into_iter().filter(|case| case.band.is_none()).collect();
        let mut batch = RaggedBatch::new();
        for case in &cases {
            batch.push_typed(&case.ids, &case.token_types).unwrap();
        }
        let alone = int8(Checkpoint::open(&dir).unwrap(), 1);
        let together = int8(Checkpoint::open(&dir).unwrap(), 3);
        for ((isa, mut alone), (_, mut together)) in alone.into_iter().zip(together) {
            let expected: Vec<f32> =
                cases.iter().flat_map(|case| play(&mut alone, &case.batch(), Pooling::Mean).1).collect();
            let found = play(&mut together, &batch, Pooling::Mean).1;
            assert_eq!(bits(&found), bits(&expected), "{name} {isa}");
        }
    }
}

/// The directory of all-MiniLM-L6-v2 and the golden values made from it.
fn real_encoder() -> (PathBuf, Vec<Case>) {
    let from = |name: &str| {
        let hint = "see `make_golden.py real`; .ci/run sets it";
        PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: {hint}")))
    };
    let cases = golden(&from("NIWAKI_TEST_GOLDEN"));
    assert_eq!(cases.len(), 200);
    (from("NIWAKI_TEST_MODEL"), cases)
}

/// `(mean, 1st percentile, minimum)`; prints them.
fn summary(what: &str, mut cosines: Vec<f64>) -> (f64, f64, f64) {
    cosines.sort_by(f64::total_cmp);
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let (p1, min) = (cosines[cosines.len() / 100], cosines[0]);
    println!("{what}: cosine mean {mean:.8}, 1st percentile {p1:.8}, minimum {min:.8} of {}", cosines.len());
    (mean, p1, min)
}

#[test]
#[ignore = "needs a real encoder and its golden values: make_golden.py real, NIWAKI_TEST_MODEL, NIWAKI_TEST_GOLDEN"]
fn real_encoder_in_f32_is_pytorch() {
    let (dir, cases) = real_encoder();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(checkpoint.tokenizer_json()).unwrap();
    tokenizer.with_padding(None);
    let max_length = checkpoint.architecture().max_input_tokens;
    let truncation = tokenizers::TruncationParams { max_length, ..Default::default() };
    tokenizer.with_truncation(Some(truncation)).unwrap();
    let mut model = candle_model(&checkpoint).unwrap();
    let cosines = cases.iter().map(|case| {
        let text = case.text.as_deref().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), case.ids, "{text:?}");
        cosine(&play(&mut model, &case.batch(), Pooling::Mean).1, &case.pooled["mean"])
    });
    let (_, _, min) = summary("f32 against PyTorch", cosines.collect());
    assert!(min >= 0.99999);
}

#[test]
#[ignore = "needs a real encoder and its golden values: make_golden.py real, NIWAKI_TEST_MODEL, NIWAKI_TEST_GOLDEN"]
fn real_encoder_in_int8_is_close_to_f32() {
    let (dir, cases) = real_encoder();
    for (isa, mut model) in int8(Checkpoint::open(&dir).unwrap(), 2) {
        if isa.starts_with(IsaName::Portable.as_str()) {
            continue; // takes minutes and is equal to the others on the small models
        }
        let cosines =
            cases.iter().map(|case| cosine(&play(&mut model, &case.batch(), Pooling::Mean).1, &case.pooled["mean"]));
        let (mean, p1, _) = summary(&format!("INT8 on {isa} against f32"), cosines.collect());
        assert!(mean >= 0.997 && p1 >= 0.99);
    }
}
