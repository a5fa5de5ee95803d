//! Models with a classification head: loaded, played in f32 and INT8, compressed, against PyTorch.
//!
//! The golden values are made by `tests/golden/make_golden.py`, in f64 from the stored weights.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use niwaki::checkpoint::{Checkpoint, OpenOptions, TensorGroup};
use niwaki::compress::{CompressRequest, Recipe, Silent, Weights, compress};
use niwaki::exec::int8_build::{GROUP_TOKENS, Int8Model};
use niwaki::exec::{Runtime, candle_model};
use niwaki::kernels::threads::Cores;
use niwaki::kernels::{Isa, KernelSet};
use niwaki::model::{Activation, Family, Forward, Outputs, Pooling, RaggedBatch, ScoreFunction, Want};
use niwaki::text::Tokenizer;
use serde::Deserialize;

/// Directory, family, labels, function, activation of the dense layer.
const MODELS: [(&str, Family, &[&str], ScoreFunction, Activation); 3] = [
    ("bert-classifier", Family::Bert, &["calm", "stormy", "other"], ScoreFunction::Softmax, Activation::Tanh),
    ("roberta-reranker", Family::Roberta, &["LABEL_0"], ScoreFunction::Sigmoid, Activation::Tanh),
    ("distilbert-classifier", Family::Distilbert, &["tree", "stone"], ScoreFunction::Sigmoid, Activation::Relu),
];

/// As in `tests/parity.rs`: the golden values carry 7 digits of numbers of order 1.
const F32_TOLERANCE: f32 = 2e-5;

/// INT8 on models of 32 columns: a token row is within a cosine of 0.997 there (`tests/parity.rs`), which is a relative
/// error of up to 0.08; the head's numbers have a spread of order 1 to 3.
const INT8_TOLERANCE: f32 = 0.25;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    /// One text, or two.
    text: Vec<String>,
    ids: Vec<u32>,
    token_types: Vec<u8>,
    logits: Vec<f32>,
    scores: Vec<f32>,
}

fn dir(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model)
}

fn cases(model: &str) -> Vec<Case> {
    let text = std::fs::read_to_string(dir(model).join("golden.json")).unwrap();
    serde_json::from_str::<Golden>(&text).unwrap().cases
}

/// The numbers of `case`.
fn play(model: &mut dyn Forward, case: &Case) -> Vec<f32> {
    let mut batch = RaggedBatch::new();
    let types = if model.architecture().n_token_types > 1 { &case.token_types[..] } else { &[] };
    batch.push_typed(&case.ids, types).unwrap();
    let mut out = Outputs::default();
    model.forward(&batch, Want::Pooled, &mut out).unwrap();
    out.pooled
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d.is_nan() { f32::NAN } else { max.max(d) })
}

#[test]
fn they_open_as_what_they_are() {
    for (name, family, labels, function, dense) in MODELS {
        let checkpoint = Checkpoint::open(&dir(name)).unwrap();
        let spec = checkpoint.architecture();
        let head = spec.head.as_ref().unwrap();
        assert_eq!((spec.family, spec.pooling, spec.normalize), (family, Pooling::Cls, false), "{name}");
        assert_eq!((head.function, head.dense), (function, dense), "{name}");
        assert!(head.labels.iter().eq(labels), "{name}: {:?}", head.labels);
        // What is asked of sentence encoders means nothing here.
        let options = OpenOptions { pooling: Some(Pooling::Mean), ..OpenOptions::default() };
        assert_eq!(Checkpoint::open_with(&dir(name), &options).unwrap().architecture().pooling, Pooling::Cls);
    }
}

#[test]
fn pairs_become_the_ids_and_types_of_pytorch() {
    for (name, ..) in MODELS {
        let checkpoint = Checkpoint::open(&dir(name)).unwrap();
        let tokenizer = Tokenizer::from_bytes(checkpoint.tokenizer_json()).unwrap();
        for case in cases(name) {
            let [first, second] = &case.text[..] else {
                assert_eq!(tokenizer.encode(&case.text[0], true).unwrap(), case.ids, "{name}");
                continue;
            };
            let part = |text: &str| tokenizer.part(text).unwrap();
            let pair = tokenizer.pair(part(first), part(second), None).unwrap();
            assert_eq!((pair.ids, pair.token_types), (case.ids, case.token_types), "{name}: {:?}", case.text);
        }
    }
}

#[test]
fn f32_is_pytorch() {
    for (name, _, labels, function, _) in MODELS {
        let mut model = candle_model(&Checkpoint::open(&dir(name)).unwrap()).unwrap();
        assert_eq!(model.width(), labels.len());
        for case in cases(name) {
            let mut logits = play(&mut model, &case);
            let found = difference(&logits, &case.logits);
            assert!(found < F32_TOLERANCE, "{name} {:?}: {found:e}", case.text);
            function.apply(&mut logits);
            let found = difference(&logits, &case.scores);
            assert!(found < F32_TOLERANCE, "{name} {:?}: scores {found:e}", case.text);
        }
    }
}

#[test]
fn int8_is_close_and_bit_identical_in_any_batch() {
    for (name, ..) in MODELS {
        let checkpoint = Arc::new(Checkpoint::open(&dir(name)).unwrap());
        let cases = cases(name);
        for isa in Isa::all_supported() {
            let model = Int8Model::load(&checkpoint, KernelSet::new(isa)).unwrap();
            let worker = |n: usize| model.worker(Arc::new(Cores::new(n).unwrap()), GROUP_TOKENS);
            let mut alone = worker(1);
            let expected: Vec<f32> = cases.iter().flat_map(|case| play(&mut alone, case)).collect();
            for (case, found) in cases.iter().zip(expected.chunks_exact(alone.width())) {
                let found = difference(found, &case.logits);
                assert!(found < INT8_TOLERANCE, "{name} {isa} {:?}: {found}", case.text);
            }
            let mut batch = RaggedBatch::new();
            for case in &cases {
                let types = if alone.architecture().n_token_types > 1 { &case.token_types[..] } else { &[] };
                batch.push_typed(&case.ids, types).unwrap();
            }
            let mut out = Outputs::default();
            worker(3).forward(&batch, Want::PooledAndTokens, &mut out).unwrap();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&out.pooled), bits(&expected), "{name} {isa}");
            assert_eq!(out.tokens.len(), batch.n_tokens() * alone.architecture().d_model);
        }
    }
}

#[test]
fn compressed_they_keep_their_head() {
    for (name, _, labels, ..) in MODELS {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join(name);
        let runtime = Runtime::new(Isa::detect(), 1).unwrap();
        let report = compress(&CompressRequest::new(dir(name), &out, Recipe::new(0)), &runtime, &Silent).unwrap();
        assert_eq!(report.manifest.schemes["head"], "f32");
        assert!(!out.join("modules.json").exists(), "{name} is no sentence encoder");
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        let task = if labels.len() == 1 { "text-ranking" } else { "text-classification" };
        assert!(card.contains(&format!("pipeline_tag: {task}\n")), "{name}: {card}");
        let source = Checkpoint::open(&dir(name)).unwrap();
        let artefact = Checkpoint::open(&out).unwrap();
        assert_eq!(artefact.architecture().head, source.architecture().head, "{name}");
        // The head is counted as what it is, while a model is under work and when it is written.
        let inventory = artefact.inventory().unwrap();
        let width = source.architecture().d_model as u64;
        let head = 4 * (width + labels.len() as u64) * (width + 1);
        assert_eq!(inventory.bytes_of(TensorGroup::Head), head, "{name}");
        assert!(source.inventory().unwrap().bytes_of(TensorGroup::Head) > 0, "{name}");
        assert_eq!(inventory.bytes_of(TensorGroup::Unused), 0, "{name}");
        assert_eq!(Weights::load(&artefact).unwrap().bytes(), report.manifest.size.artefact_bytes, "{name}");
        // The self-check's numbers are PyTorch's, and what the artefact gives is as far from them as it says.
        let mut reference = candle_model(&source).unwrap();
        let mut compressed = candle_model(&artefact).unwrap();
        for golden in &report.manifest.golden {
            let (ids, text) = (golden.ids.clone(), vec![golden.text.clone()]);
            let case = Case { text, token_types: vec![0; ids.len()], ids, logits: vec![], scores: vec![] };
            assert_eq!(golden.scores.len(), labels.len());
            assert!(difference(&play(&mut reference, &case), &golden.scores) < F32_TOLERANCE, "{name}");
            let found = f64::from(difference(&play(&mut compressed, &case), &golden.scores));
            let said = golden.score_error.unwrap();
            // The file was measured with rounded activations, which these are not.
            assert!(
                found < said + f64::from(INT8_TOLERANCE) && said < f64::from(INT8_TOLERANCE),
                "{name}: {found} {said}"
            );
        }
    }
}

#[test]
fn a_damaged_head_is_named() {
    for (label, expect) in [
        ("2", "classifier.weight` has shape [3, 32], expected [2, 32]"),
        ("1", "id2label: does not number labels from 0"),
    ] {
        let copy = tempfile::tempdir().unwrap();
        for file in ["model.safetensors", "tokenizer.json"] {
            std::fs::copy(dir("bert-classifier").join(file), copy.path().join(file)).unwrap();
        }
        let config = std::fs::read(dir("bert-classifier").join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config["id2label"].as_object_mut().unwrap().remove(label).unwrap();
        std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
        let error = Checkpoint::open(copy.path()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}
