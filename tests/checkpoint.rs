//! Model directories: what opens, and the one clear error that everything else gets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::tiny::{TinyModel, tiny_dir};
use niwaki::checkpoint::{
    ArtefactDir, Checkpoint, CheckpointError, Dtype, Manifest, OpenOptions, TensorOut, write_safetensors,
};
use niwaki::model::{Band, LinearSlot, Pooling};

fn error_of(dir: &Path) -> CheckpointError {
    match Checkpoint::open(dir) {
        Ok(_) => panic!("{} opened", dir.display()),
        Err(error) => error,
    }
}

#[test]
fn a_hugging_face_directory_opens_with_its_sentence_modules() {
    let dir = tiny_dir(&TinyModel::default());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let spec = checkpoint.architecture();
    assert_eq!((spec.d_model, spec.layers.len(), spec.layers[0].n_heads, spec.layers[0].d_ffn), (32, 2, 2, 64));
    assert_eq!((spec.pooling, spec.normalize, spec.max_input_tokens), (Pooling::Mean, true, 12));
    let qkv = checkpoint.linear(LinearSlot::Qkv(1)).unwrap();
    assert_eq!((qkv.n_out, qkv.n_in, qkv.weight.n_rows(32), qkv.bias.len()), (96, 32, 96, 96));
}

#[test]
fn token_types_that_the_configuration_leaves_out_are_two() {
    let dir = tiny_dir(&TinyModel::default());
    let path = dir.path().join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"type_vocab_size\":2,"), "{text}");
    fs::write(path, text.replace("\"type_vocab_size\":2,", "")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.architecture().n_token_types, 2);
    assert!(checkpoint.tables().unwrap().token_type.is_some());
}

#[test]
fn a_band_tiles_positions_and_without_one_the_length_is_refused() {
    let dir = tiny_dir(&TinyModel::default());
    let mut options = OpenOptions { max_input_tokens: Some(100), ..OpenOptions::default() };
    let error = Checkpoint::open_with(dir.path(), &options).unwrap_err();
    assert!(error.to_string().contains("max_input_tokens"), "{error}");
    options.band = Some(Band::symmetric(4, 1));
    let checkpoint = Checkpoint::open_with(dir.path(), &options).unwrap();
    let positions = checkpoint.architecture().positions;
    assert!(positions.tiled);
    assert_eq!((positions.row(15), positions.row(16), positions.row(99)), (15, 0, 3));
    // Full attention never sees a position twice, however it is asked for.
    options.band = Some(Band::FULL);
    let error = Checkpoint::open_with(dir.path(), &options).unwrap_err();
    assert!(error.to_string().contains("max_input_tokens"), "{error}");
    options.max_input_tokens = None;
    let full = Checkpoint::open_with(dir.path(), &options).unwrap();
    assert!(!full.architecture().positions.tiled && full.architecture().max_input_tokens == 12);
}

#[test]
fn every_kind_of_damage_is_one_error_that_names_its_place() {
    struct Case {
        name: &'static str,
        damage: fn(&Path),
        expect: &'static str,
    }
    fn edit(dir: &Path, from: &str, to: &str) {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }
    let cases = [
        Case {
            name: "no config",
            damage: |dir| fs::remove_file(dir.join("config.json")).unwrap(),
            expect: "config.json: missing",
        },
        Case {
            name: "config is not json",
            damage: |dir| fs::write(dir.join("config.json"), "{").unwrap(),
            expect: "config.json: EOF",
        },
        Case {
            name: "unknown architecture",
            damage: |dir| edit(dir, "\"bert\"", "\"mamba\""),
            expect: "model_type `mamba` is not supported",
        },
        Case {
            name: "missing field",
            damage: |dir| edit(dir, "hidden_size", "hidden_sighs"),
            expect: "config.json: hidden_size: is missing",
        },
        Case {
            name: "absurd size",
            damage: |dir| edit(dir, "\"vocab_size\":40", "\"vocab_size\":4000000000000"),
            expect: "vocab_size: 4000000000000 is not in 1..=",
        },
        Case {
            name: "negative size",
            damage: |dir| edit(dir, "\"vocab_size\":40", "\"vocab_size\":-1"),
            expect: "vocab_size: `-1` is not a non-negative integer",
        },
        Case {
            name: "heads do not divide the width",
            damage: |dir| edit(dir, "\"num_attention_heads\":2", "\"num_attention_heads\":3"),
            expect: "num_attention_heads: 3 heads do not divide a width of 32",
        },
        Case {
            name: "another vocabulary",
            damage: |dir| edit(dir, "\"vocab_size\":40", "\"vocab_size\":41"),
            expect: "tensor `embeddings.word_embeddings.weight` has shape [40, 32], expected [41, 32]",
        },
        Case {
            name: "a layer too many",
            damage: |dir| edit(dir, "\"num_hidden_layers\":2", "\"num_hidden_layers\":3"),
            expect: "tensor `encoder.layer.2.attention.self.query.weight` is missing",
        },
        Case {
            name: "no weights",
            damage: |dir| fs::remove_file(dir.join("model.safetensors")).unwrap(),
            expect: "model.safetensors: missing",
        },
        Case {
            name: "truncated weights",
            damage: |dir| {
                let path = dir.join("model.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
            },
            expect: "model.safetensors: not a valid safetensors file",
        },
        Case {
            name: "empty weights",
            damage: |dir| fs::write(dir.join("model.safetensors"), "").unwrap(),
            expect: "model.safetensors: not a valid safetensors file",
        },
        Case {
            name: "header longer than the file",
            damage: |dir| fs::write(dir.join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap(),
            expect: "model.safetensors: not a valid safetensors file",
        },
        Case {
            name: "no tokenizer",
            damage: |dir| fs::remove_file(dir.join("tokenizer.json")).unwrap(),
            expect: "tokenizer.json: missing",
        },
        Case {
            name: "a module that is not supported",
            damage: |dir| {
                let text = fs::read_to_string(dir.join("modules.json")).unwrap();
                fs::write(dir.join("modules.json"), text.replace("models.Normalize", "models.Dense")).unwrap();
            },
            expect: "module `Dense` is not supported",
        },
        Case {
            name: "a module outside the model",
            damage: |dir| {
                let text = fs::read_to_string(dir.join("modules.json")).unwrap();
                fs::write(dir.join("modules.json"), text.replace("1_Pooling", "../1_Pooling")).unwrap();
            },
            expect: "`../1_Pooling` leaves the model",
        },
        Case {
            name: "a manifest of a newer version",
            damage: |dir| fs::write(dir.join("niwaki.json"), r#"{"format_version": 99, "new": 1}"#).unwrap(),
            expect: "format_version 99 is newer than",
        },
        Case {
            name: "a manifest without a version",
            damage: |dir| fs::write(dir.join("niwaki.json"), "{}").unwrap(),
            expect: "niwaki.json: missing field `format_version`",
        },
    ];
    let mut failures = Vec::new();
    for case in cases {
        let dir = tiny_dir(&TinyModel::default());
        (case.damage)(dir.path());
        let error = error_of(dir.path()).to_string();
        if !error.contains(case.expect) {
            failures.push(format!("{}: `{error}` does not contain `{}`", case.name, case.expect));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn wrong_dtypes_and_values_that_no_weight_may_be_are_named() {
    for (make, expect) in [
        (
            (|tensor: &mut TensorOut<'static>| {
                tensor.dtype = Dtype::U8;
                tensor.data = vec![0u8; 40 * 32].into();
            }) as fn(&mut TensorOut<'static>),
            "tensor `embeddings.word_embeddings.weight` has dtype U8, expected F32, F16 or BF16",
        ),
        (
            |tensor| {
                let mut values = vec![0.5f32; 40 * 32];
                values[77] = f32::NAN;
                tensor.data = bytemuck::cast_slice(&values).to_vec().into();
            },
            "tensor `embeddings.word_embeddings.weight` holds a value that is not finite (element 77)",
        ),
        (
            |tensor| {
                tensor.dtype = Dtype::I8;
                tensor.data = vec![1u8; 40 * 32].into();
            },
            "tensor `embeddings.word_embeddings.weight_scale` is missing",
        ),
    ] {
        let dir =
            tiny_dir(&TinyModel { edit: Some(("embeddings.word_embeddings.weight", make)), ..TinyModel::default() });
        let error = Checkpoint::open(dir.path()).and_then(|checkpoint| checkpoint.tables().map(|_| ())).unwrap_err();
        assert_eq!(error.to_string(), expect);
    }
}

#[test]
fn int8_weights_and_scales_are_lent_and_aligned() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let codes: Vec<u8> = (0..128).collect();
    let tensors = vec![
        TensorOut {
            name: "b_scale".into(),
            dtype: Dtype::F32,
            shape: vec![2, 1],
            data: bytemuck::cast_slice(&[0.5f32, 2.0]).to_vec().into(),
        },
        TensorOut { name: "a".into(), dtype: Dtype::I8, shape: vec![2, 64], data: codes.into() },
    ];
    write_safetensors(&path, tensors.clone(), &BTreeMap::new()).unwrap();
    let first = fs::read(&path).unwrap();
    write_safetensors(&path, tensors.into_iter().rev().collect(), &BTreeMap::new()).unwrap();
    assert_eq!(first, fs::read(&path).unwrap(), "the order of the tensors must not matter");
    let file = niwaki::checkpoint::TensorFile::open(&path).unwrap();
    let a = file.tensor("a").unwrap();
    assert_eq!(a.data.as_ptr() as usize % 64, 0);
    assert_eq!(a.to_i8().unwrap()[5], 5);
    let parsed = safetensors::SafeTensors::deserialize(&first).unwrap();
    assert_eq!(parsed.tensor("b_scale").unwrap().shape(), [2, 1]);
}

#[test]
fn an_artefact_appears_whole_or_not_at_all() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("out");
    let building = ArtefactDir::create(&target, false).unwrap();
    building.write("sub/a.txt", b"a").unwrap();
    assert!(!target.exists());
    drop(building);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0, "an abandoned build leaves nothing");

    let building = ArtefactDir::create(&target, false).unwrap();
    building.write("sub/a.txt", b"a").unwrap();
    building.commit().unwrap();
    assert_eq!(fs::read(target.join("sub/a.txt")).unwrap(), b"a");

    let error = ArtefactDir::create(&target, false).unwrap_err();
    assert!(matches!(error, CheckpointError::TargetExists(_)));
    let building = ArtefactDir::create(&target, true).unwrap();
    building.write("b.txt", b"b").unwrap();
    building.commit().unwrap();
    assert!(!target.join("sub").exists() && target.join("b.txt").exists());
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
}

#[test]
fn a_place_that_cannot_be_had_is_known_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("models/source");
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("config.json"), "{}").unwrap();
    let check = |target: &Path| ArtefactDir::check_place(target, &source, true).map_err(|error| error.to_string());
    assert_eq!(check(&dir.path().join("new/out")), Ok(()));
    assert_eq!(check(&dir.path().join("models/other")), Ok(()));
    for holder in [&source, &dir.path().join("models"), &source.join("../../models")] {
        assert!(check(holder).unwrap_err().contains("holds the model"), "{holder:?}");
    }
    assert!(check(Path::new("..")).unwrap_err().contains("no name"));
    assert!(check(Path::new("/proc")).unwrap_err().contains("mounted"));
    assert!(check(Path::new("/proc/new/out")).unwrap_err().starts_with("/proc: "));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "asking leaves nothing");
}

#[test]
fn old_names_prefixes_and_half_precision_are_read() {
    let plain = tiny_dir(&TinyModel::default());
    let plain = Checkpoint::open(plain.path()).unwrap();
    let expected = plain.linear(LinearSlot::FfnUp(0)).unwrap();
    let renamed = tiny_dir(&TinyModel { prefix: "bert.", old_norm_names: true, half: true, ..TinyModel::default() });
    let renamed = Checkpoint::open(renamed.path()).unwrap();
    let got = renamed.linear(LinearSlot::FfnUp(0)).unwrap();
    let (expected, got) = (expected.weight.to_f32(32), got.weight.to_f32(32));
    let worst = expected.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-3, "half precision moved a weight by {worst}");
}

#[test]
fn a_damaged_manifest_is_named() {
    let error = Manifest::parse(b"not json").unwrap_err();
    assert!(error.to_string().starts_with("niwaki.json: "), "{error}");
}
