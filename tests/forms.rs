//! Stored forms: what is written is read back, and every kind of damage is one error that names its tensor.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::forms::{KINDS, Kind, store, stored_dir};
use common::tiny::{TinyModel, tiny_dir};
use niwaki::checkpoint::{Checkpoint, CheckpointError, Dtype, TensorFile, TensorOut, write_safetensors};
use niwaki::exec::candle_model;
use niwaki::exec::cost::{Operation, stored_costs};
use niwaki::exec::int8_build::Int8Model;
use niwaki::kernels::threads::Cores;
use niwaki::kernels::{Isa, IsaName, KernelSet};
use niwaki::model::{Forward, LinearSlot, Outputs, RaggedBatch, Want};

/// Widths that are multiples of nothing where the architecture allows it.
fn odd() -> TinyModel {
    TinyModel { d_ffn: 77, ..TinyModel::default() }
}

#[test]
fn every_form_is_read_as_it_was_written() {
    let plain = tiny_dir(&odd());
    let plain = Checkpoint::open(plain.path()).unwrap();
    for kind in KINDS {
        let dir = stored_dir(&odd(), |_| kind, |_| kind);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for slot in [LinearSlot::Qkv(0), LinearSlot::AttentionOut(1), LinearSlot::FfnUp(0), LinearSlot::FfnDown(1)] {
            let source = plain.linear(slot).unwrap();
            let expected = store(kind, &source.weight.to_f32(source.n_in), source.n_in);
            let got = checkpoint.linear(slot).unwrap();
            assert_eq!(got.weight, expected, "{kind:?} {slot}");
            assert_eq!(got.bias, source.bias, "{kind:?} {slot}");
        }
        let (got, source) = (checkpoint.tables().unwrap(), plain.tables().unwrap());
        assert_eq!(got.word, store(kind, &source.word.to_f32(32), 32), "{kind:?}");
        assert_eq!(got.position, store(kind, &source.position.to_f32(32), 32), "{kind:?}");
        assert_eq!(got.token_type.unwrap(), store(kind, &source.token_type.unwrap().to_f32(32), 32), "{kind:?}");
    }
}

/// The tensors of a weights file, changed by `edit`, written back.
fn rewrite(dir: &Path, edit: impl FnOnce(&mut Vec<TensorOut<'static>>)) {
    let path = dir.join("model.safetensors");
    let mut tensors: Vec<TensorOut<'static>> = {
        let file = TensorFile::open(&path).unwrap();
        let own = |name: &str| {
            let view = file.tensor(name).unwrap();
            TensorOut {
                name: name.to_owned(),
                dtype: view.dtype,
                shape: view.shape.to_vec(),
                data: view.data.to_vec().into(),
            }
        };
        file.names().map(own).collect()
    };
    edit(&mut tensors);
    write_safetensors(&path, tensors, &BTreeMap::new()).unwrap();
}

fn named<'a>(tensors: &'a mut [TensorOut<'static>], name: &str) -> &'a mut TensorOut<'static> {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("{name} is not there"))
}

/// Cuts a tensor's first dimension by one.
fn shorten(tensor: &mut TensorOut<'static>) {
    let row = tensor.data.len() / tensor.shape[0];
    tensor.shape[0] -= 1;
    tensor.data.to_mut().truncate(row * tensor.shape[0]);
}

#[test]
fn damaged_parts_are_named() {
    const FFN: &str = "encoder.layer.0.intermediate.dense.weight";
    type Damage = fn(&mut Vec<TensorOut<'static>>);
    let cases: [(&str, Kind, Damage, &[&str]); 20] = [
        ("short indices", Kind::Codebook, |t| shorten(named(t, &format!("{FFN}_indices"))), &["_indices", "[76, 16]"]),
        ("short table", Kind::Codebook, |t| shorten(named(t, &format!("{FFN}_table"))), &["_table", "[16]"]),
        ("no table", Kind::Codebook, |t| t.retain(|t| t.name != format!("{FFN}_table")), &["_table", "missing"]),
        ("no scale", Kind::Codebook, |t| t.retain(|t| t.name != format!("{FFN}_scale")), &["_scale", "missing"]),
        (
            "signed indices",
            Kind::Codebook,
            |t| named(t, &format!("{FFN}_indices")).dtype = Dtype::I8,
            &["_indices", "U8"],
        ),
        ("flat scale", Kind::Codebook, |t| named(t, &format!("{FFN}_scale")).shape = vec![77], &["_scale", "[77]"]),
        ("short zeros", Kind::CodebookGroups, |t| shorten(named(t, &format!("{FFN}_zero"))), &["_zero", "[77, 4]"]),
        (
            "zeros that leave 8 bits",
            Kind::CodebookGroups,
            |t| named(t, &format!("{FFN}_zero")).data.to_mut().fill(0x80),
            &[FFN, "zero", "-128"],
        ),
        (
            "groups that do not divide",
            Kind::CodebookGroups,
            |t| {
                for part in ["_scale", "_zero"] {
                    let tensor = named(t, &format!("{FFN}{part}"));
                    let row = tensor.data.len() / 77;
                    tensor.data =
                        tensor.data.chunks(row).flat_map(|row| [row, row, row].concat()).collect::<Vec<_>>().into();
                    tensor.shape = vec![77, 12];
                }
            },
            &[FFN, "12 groups in rows of 32"],
        ),
        (
            "negative scale",
            Kind::Blocks64,
            |t| named(t, &format!("{FFN}_scale")).data.to_mut()[7] = 0xbf,
            &["_scale", "not positive", "row 1"],
        ),
        (
            "missing block",
            Kind::Blocks64,
            |t| shorten(named(t, &format!("{FFN}_blocks"))),
            &[FFN, "mask", "bits are set"],
        ),
        ("short mask", Kind::Blocks64, |t| shorten(named(t, &format!("{FFN}_mask"))), &["_mask", "[2, 1]"]),
        (
            "impossible width",
            Kind::Blocks64,
            |t| {
                let blocks = named(t, &format!("{FFN}_blocks"));
                blocks.shape = vec![blocks.shape[0] * 64 * 4, 1, 1];
            },
            &["_blocks", "shape"],
        ),
        (
            "a width without kernel",
            Kind::Blocks64,
            |t| {
                let blocks = named(t, &format!("{FFN}_blocks"));
                blocks.shape = vec![blocks.shape[0] * 4, 16, 4];
            },
            &["_mask", "shape"],
        ),
        ("bits beyond the columns", Kind::Bitmap, |t| shorten(named(t, &format!("{FFN}_values"))), &[FFN, "mask"]),
        (
            "rank above the matrix",
            Kind::LowRank,
            |t| {
                let down = named(t, &format!("{FFN}_down"));
                down.data = vec![1; 40 * 32].into();
                down.shape = vec![40, 32];
                let scale = named(t, &format!("{FFN}_down_scale"));
                scale.data = bytemuck::cast_slice(&[1.0f32; 40]).to_vec().into();
                scale.shape = vec![40, 1];
                let up = named(t, &format!("{FFN}_up"));
                up.data = vec![1; 77 * 40].into();
                up.shape = vec![77, 40];
            },
            &[FFN, "rank: 40"],
        ),
        (
            "factors that do not meet",
            Kind::LowRank,
            |t| shorten(named(t, &format!("{FFN}_down"))),
            &["_down_scale", "[16, 1]"],
        ),
        ("no second factor", Kind::LowRank, |t| t.retain(|t| t.name != format!("{FFN}_up")), &["_up", "missing"]),
        (
            "an infinite offset",
            Kind::Affine,
            |t| named(t, &format!("{FFN}_offset")).data.to_mut()[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()),
            &["_offset", "not finite"],
        ),
        (
            "a stacked module in a form of its own",
            Kind::Int8,
            |t| {
                let name = "encoder.layer.0.attention.self.key.weight";
                let offset = bytemuck::cast_slice(&[0.0f32; 32]).to_vec().into();
                t.push(TensorOut {
                    name: format!("{name}_offset"),
                    dtype: Dtype::F32,
                    shape: vec![32, 1],
                    data: offset,
                });
            },
            &["attention.self.key.weight", "int8-affine", "attention.self.qkv.weight"],
        ),
    ];
    for (name, kind, damage, expected) in cases {
        let dir = stored_dir(&odd(), |_| kind, |_| Kind::Int8);
        rewrite(dir.path(), damage);
        let read = |checkpoint: Checkpoint| {
            (0..2)
                .flat_map(|l| {
                    [LinearSlot::Qkv(l), LinearSlot::AttentionOut(l), LinearSlot::FfnUp(l), LinearSlot::FfnDown(l)]
                })
                .try_for_each(|slot| checkpoint.linear(slot).map(|_| ()))
        };
        let error: CheckpointError =
            Checkpoint::open(dir.path()).and_then(read).expect_err(&format!("{name}: opened and was read"));
        let message = error.to_string();
        assert!(expected.iter().all(|part| message.contains(part)), "{name}: {message}");
        assert!(!message.contains('\n'), "{name}: {message}");
    }
}

#[test]
fn any_truncation_or_flipped_byte_is_an_error_or_reads_without_panic() {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(11);
    for kind in KINDS {
        let dir = stored_dir(&odd(), |_| kind, |_| kind);
        let path = dir.path().join("model.safetensors");
        let whole = fs::read(&path).unwrap();
        let header = 8 + usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
        for round in 0..60 {
            let mut bytes = whole.clone();
            match round % 3 {
                0 => bytes.truncate(rng.random_range(0..bytes.len())),
                1 => bytes[rng.random_range(8..header)] ^= 1 << rng.random_range(0..8),
                _ => {
                    let at = rng.random_range(header..bytes.len());
                    bytes[at] ^= 1 << rng.random_range(0..8);
                }
            }
            fs::write(&path, bytes).unwrap();
            let Ok(checkpoint) = Checkpoint::open(dir.path()) else { continue };
            // What opens is read whole and expanded; an error is as good as a result.
            for layer in 0..2 {
                let slots = [
                    LinearSlot::Qkv(layer),
                    LinearSlot::AttentionOut(layer),
                    LinearSlot::FfnUp(layer),
                    LinearSlot::FfnDown(layer),
                ];
                for slot in slots {
                    if let Ok(linear) = checkpoint.linear(slot) {
                        assert_eq!(linear.weight.to_f32(linear.n_in).len(), linear.n_in * linear.n_out);
                    }
                }
            }
            if let Ok(tables) = checkpoint.tables() {
                assert_eq!(tables.word.to_f32(32).len(), 40 * 32);
            }
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn batch(lens: &[usize]) -> RaggedBatch {
    let sequences: Vec<Vec<u32>> =
        lens.iter().map(|&len| (0..len).map(|i| u32::try_from(i * 7 + len).unwrap() % 40).collect()).collect();
    RaggedBatch::from_sequences(&sequences).unwrap()
}

fn play(model: &mut dyn Forward, lens: &[usize]) -> Outputs {
    let mut out = Outputs::default();
    model.forward(&batch(lens), Want::PooledAndTokens, &mut out).unwrap();
    out
}

/// A model wide enough that rounding errors of activations cancel as they do in real ones, every matrix in another form.
fn wide() -> TinyModel {
    TinyModel {
        d_model: 96,
        n_heads: 3,
        d_ffn: 180,
        n_layers: 3,
        n_positions: 64,
        max_seq_length: 64,
        ..TinyModel::default()
    }
}

/// Models in one form each, and one in which every slot has another.
fn models() -> Vec<(String, tempfile::TempDir)> {
    let mut models: Vec<_> =
        KINDS.iter().map(|&kind| (format!("{kind:?}"), stored_dir(&wide(), |_| kind, |_| kind))).collect();
    let mixed = |slot: LinearSlot| {
        let place = match slot {
            LinearSlot::Qkv(layer) => layer,
            LinearSlot::AttentionOut(layer) => layer + 3,
            LinearSlot::FfnUp(layer) => layer + 5,
            LinearSlot::FfnDown(layer) => layer + 8,
        };
        KINDS[place % KINDS.len()]
    };
    let tables = |name: &str| if name.contains("word") { Kind::LowRank } else { Kind::CodebookGroups };
    models.push(("mixed".to_owned(), stored_dir(&wide(), mixed, tables)));
    models
}

const LENS: [usize; 7] = [1, 30, 16, 7, 64, 33, 2];

#[test]
fn the_int8_player_is_close_to_the_f32_player_of_the_same_stored_weights() {
    let mut offences = Vec::new();
    for (name, dir) in models() {
        let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
        let expected = play(&mut candle_model(&checkpoint).unwrap(), &LENS);
        for isa in Isa::all_supported() {
            let shared = Int8Model::load(&checkpoint, KernelSet::new(isa)).unwrap();
            for n_cores in [1, 2] {
                let mut worker = shared.worker(Arc::new(Cores::new(n_cores).unwrap()), 128);
                let got = play(&mut worker, &LENS);
                let rows = |outputs: &Outputs| outputs.tokens.chunks_exact(96).map(<[f32]>::to_vec).collect::<Vec<_>>();
                let pairs: Vec<f64> =
                    rows(&expected).iter().zip(&rows(&got)).map(|(expected, got)| cosine(expected, got)).collect();
                let lowest = pairs.iter().copied().fold(1.0, f64::min);
                let mean = pairs.iter().sum::<f64>() / pairs.len() as f64;
                println!("{name} {isa} {n_cores}: mean {mean:.5}, lowest {lowest:.5}");
                // Between factors there is one rounding more, over few columns, and the random factors' products cancel.
                let (least_mean, least) = match name.as_str() {
                    "LowRank" | "LowRankCodebook" => (0.999, 0.99),
                    // Two of its twelve matrices are factors.
                    "mixed" => (0.9997, 0.997),
                    _ => (0.9997, 0.9985),
                };
                if !(mean > least_mean && lowest > least) {
                    offences.push(format!("{name} {isa} {n_cores}: mean {mean:.5}, lowest {lowest:.5}"));
                }
            }
        }
    }
    assert!(offences.is_empty(), "{}", offences.join("\n"));
}

#[test]
fn results_are_bit_identical_alone_and_in_any_batch_group_and_number_of_threads() {
    for (name, dir) in models() {
        let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
        for isa in Isa::all_supported() {
            let shared = Int8Model::load(&checkpoint, KernelSet::new(isa)).unwrap();
            let alone: Vec<Outputs> = {
                let mut worker = shared.worker(Arc::new(Cores::new(1).unwrap()), 512);
                LENS.iter().map(|&len| play(&mut worker, &[len])).collect()
            };
            for (n_cores, group_tokens) in [(1, 64), (2, 1), (2, 2048), (3, 100)] {
                let mut worker = shared.worker(Arc::new(Cores::new(n_cores).unwrap()), group_tokens);
                let together = play(&mut worker, &LENS);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                let joined: Vec<f32> = alone.iter().flat_map(|outputs| outputs.tokens.clone()).collect();
                assert_eq!(bits(&together.tokens), bits(&joined), "{name} {isa} {n_cores} {group_tokens}");
            }
        }
    }
}

#[test]
fn costs_count_what_is_multiplied_and_stored() {
    let costs = |kind: Kind| {
        let dir = stored_dir(&wide(), |_| kind, |_| kind);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let all = stored_costs(&checkpoint, &[5, 3]).unwrap();
        let of = |operation| *all.iter().find(|cost| cost.operation == operation).unwrap();
        (of(Operation::Linear(LinearSlot::FfnUp(1))), of(Operation::Embed))
    };
    let (dense, embed) = costs(Kind::Int8);
    assert_eq!((dense.macs, dense.weight_bytes), (8 * 180 * 96, 180 * 96 + 180 * 4));
    assert_eq!(embed.weight_bytes, 8 * (96 + 4));
    let (codebook, embed) = costs(Kind::Codebook);
    assert_eq!((codebook.macs, embed.weight_bytes), (dense.macs, 8 * ((40 * 48 + 16 + 40 * 4) / 40)));
    let (low_rank, _) = costs(Kind::LowRank);
    assert_eq!(low_rank.macs, 8 * 48 * (180 + 96));
    let (blocks, _) = costs(Kind::Blocks64);
    assert_eq!(blocks.macs, 8 * 48 * 64 * 4, "48 of 72 blocks are there");
    let (bitmap, _) = costs(Kind::Bitmap);
    assert_eq!(bitmap.macs, dense.macs, "single absent elements are multiplied with all the same");
    assert!(bitmap.weight_bytes < dense.weight_bytes);
}

#[test]
fn a_player_holds_no_more_than_the_form_takes() {
    let bytes = |kind: Kind| {
        let model = TinyModel { d_model: 192, n_heads: 6, d_ffn: 768, n_layers: 2, ..TinyModel::default() };
        let dir = stored_dir(&model, |_| kind, |_| Kind::Int8);
        let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
        // Kernels that take weights as they are.
        let kernels = KernelSet::new(Isa::force(IsaName::Portable).unwrap());
        Int8Model::load(&checkpoint, kernels).unwrap().bytes()
    };
    let weights = 2 * (4 * 192 * 192 + 2 * 192 * 768);
    let dense = bytes(Kind::Int8);
    let rest = dense - weights;
    assert_eq!(bytes(Kind::Codebook), rest + weights / 2, "four bits stay four bits");
    assert_eq!(bytes(Kind::Bitmap), dense, "absent elements save nothing at run time");
    // Two of three blocks are there, each with the two bytes of its place.
    let sparse = bytes(Kind::Blocks64);
    assert!(sparse < rest + weights * 2 / 3 * 258 / 256 + 2_000, "{sparse} of {dense}");
}
