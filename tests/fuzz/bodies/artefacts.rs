//! Damaged models: whatever is in the files, opening them gives a model that plays, or an error.
//!
//! The bytes say which of several small models to take, and what to change in which of its files: bytes at an offset, a
//! value of its JSON (also in the header of the weights), its length, or all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use niwaki::checkpoint::{Checkpoint, OpenOptions};
use niwaki::compress::{CompressRequest, Recipe, Silent, compress};
use niwaki::exec::{Runtime, candle_model};
use niwaki::kernels::Isa;
use niwaki::model::{Forward, Outputs, RaggedBatch, Want};
use niwaki::text::Tokenizer;
use serde_json::{Value, json};

use super::forms::{KINDS, stored_dir};
use super::tiny::TinyModel;
use super::{Source, golden};

/// The files of a model, with their paths inside it.
type Files = Vec<(PathBuf, Vec<u8>)>;

struct Models {
    models: Vec<Files>,
    runtime: Runtime,
    /// Where the damaged one is written.
    dir: tempfile::TempDir,
}

static MODELS: LazyLock<Models> = LazyLock::new(|| {
    // libFuzzer ends the program at any panic, but those of the tokenizers' library are caught.
    let at_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|at| at.file().contains("/tokenizers-")) {
            at_panic(panic);
        }
    }));
    let runtime = Runtime::new(Isa::detect(), 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let made = |name: &str| {
        let out = dir.path().join(name);
        compress(&CompressRequest::new(golden(name), &out, Recipe::new(0)), &runtime, &Silent).unwrap();
        let files = read(&out);
        fs::remove_dir_all(&out).unwrap();
        files
    };
    let mut models = vec![made("bert"), made("bert-classifier"), made("roberta"), read(&golden("distilbert"))];
    for kind in KINDS {
        let stored = stored_dir(&TinyModel { n_layers: 1, ..TinyModel::default() }, |_| kind, |_| kind);
        models.push(read(stored.path()));
    }
    Models { models, runtime, dir }
});

/// All files that are read when a model is opened, in the order of their names.
fn read(root: &Path) -> Files {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_owned();
            let is_report = name.starts_with("golden.json") || name.starts_with("report.html");
            match path.is_dir() {
                true => folders.push(path),
                false if !is_report => found.push((name, fs::read(path).unwrap())),
                false => {}
            }
        }
    }
    found.sort();
    found
}

/// Node `index` of a document, counted depth first.
fn node<'v>(value: &'v mut Value, index: &mut usize) -> Option<&'v mut Value> {
    if *index == 0 {
        return Some(value);
    }
    *index -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| node(item, index)),
        Value::Object(fields) => fields.iter_mut().find_map(|(_, field)| node(field, index)),
        _ => None,
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// What stands in place of `old`.
fn other(source: &mut Source<'_>, old: &Value) -> Value {
    let near = |by: i64| old.as_i64().map_or(Value::Null, |value| json!(value.wrapping_add(by)));
    match source.byte() % 16 {
        0 => Value::Null,
        1 => json!(0),
        2 => json!(-1),
        3 => json!(1u64 << 32),
        4 => json!(u64::MAX),
        5 => json!(1e308),
        6 => json!("x"),
        7 => json!([]),
        8 => json!({}),
        9 => json!(source.wide()),
        10 => near(1),
        11 => near(-1),
        12 => near(i64::MAX / 2),
        13 => json!([old, old]),
        14 => json!(f64::from_bits(u64::from_le_bytes(source.bytes(8).try_into().unwrap_or_default()))),
        _ => serde_json::from_slice(source.bytes(24)).unwrap_or(Value::Bool(true)),
    }
}

/// `text` with some values changed, or fields gone; as it is if it is no JSON.
fn changed_json(text: &[u8], source: &mut Source<'_>) -> Vec<u8> {
    let Ok(mut document) = serde_json::from_slice::<Value>(text) else { return text.to_owned() };
    for _ in 0..source.byte() % 4 + 1 {
        let mut index = source.wide() % count(&document);
        let removed = source.byte();
        let Some(place) = node(&mut document, &mut index) else { continue };
        match place {
            Value::Object(fields) if removed % 4 == 1 && !fields.is_empty() => {
                let key = fields.keys().nth(removed / 4 % fields.len()).unwrap().clone();
                fields.remove(&key);
            }
            Value::Array(items) if removed % 4 == 1 && !items.is_empty() => {
                items.remove(removed / 4 % items.len());
            }
            place => *place = other(source, place),
        }
    }
    document.to_string().into_bytes()
}

/// One change to one of the files.
fn change(files: &mut Files, source: &mut Source<'_>) {
    let at = source.byte() % files.len();
    let (name, bytes) = &mut files[at];
    match source.byte() % 8 {
        0..=2 if name.extension().is_some_and(|kind| kind == "json") => *bytes = changed_json(bytes, source),
        0..=2 if name.extension().is_some_and(|kind| kind == "safetensors") && bytes.len() > 8 => {
            let n = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap_or(usize::MAX);
            let end = n.saturating_add(8).min(bytes.len());
            let header = changed_json(&bytes[8..end], source);
            let length = (header.len() as u64).to_le_bytes();
            *bytes = [&length, header.as_slice(), &bytes[end..]].concat();
        }
        0..=4 => {
            // A few bytes, in the first or the last part of the file or anywhere.
            let from = source.wide() * if source.byte().is_multiple_of(2) { 1 } else { 256 };
            let n = source.byte() % 9;
            let new = source.bytes(n);
            let from = from % bytes.len().max(1);
            for (old, new) in bytes[from..].iter_mut().zip(new) {
                *old = *new;
            }
        }
        5 => bytes.truncate(source.wide() % (bytes.len() + 1)),
        6 => {
            let n = source.wide() % 512;
            bytes.extend(std::iter::repeat_n(0, n));
        }
        _ => {
            let n = source.wide();
            *bytes = source.bytes(n).to_owned();
        }
    }
}

/// Opens the files, and plays what opens.
fn open(models: &Models, dir: &Path, trust_files: bool) {
    let options = OpenOptions { trust_files, ..OpenOptions::default() };
    let Ok(checkpoint) = Checkpoint::open_with(dir, &options) else { return };
    let checkpoint = Arc::new(checkpoint);
    drop(checkpoint.inventory());
    drop(Tokenizer::from_bytes(checkpoint.tokenizer_json()));
    let vocab = checkpoint.architecture().vocab_size;
    let ids: Vec<u32> =
        [0, 1, vocab / 2, vocab.saturating_sub(1)].iter().map(|&id| u32::try_from(id).unwrap_or(0)).collect();
    let batch = RaggedBatch::from_sequences(&[ids.as_slice(), &ids[..1]]).unwrap();
    let play = |model: &mut dyn Forward| {
        let mut out = Outputs::default();
        if model.forward(&batch, Want::PooledAndTokens, &mut out).is_ok() {
            assert_eq!(out.pooled.len(), 2 * model.width());
            assert_eq!(out.tokens.len(), 5 * model.architecture().d_model);
        }
    };
    if let Ok(mut model) = models.runtime.player(&checkpoint) {
        play(&mut model);
    }
    if let Ok(mut model) = candle_model(&checkpoint) {
        play(&mut model);
    }
}

/// A model with the changes that `data` says.
pub(crate) fn run(data: &[u8]) {
    let models = &*MODELS;
    let mut source = Source::new(data);
    let mut files = models.models[source.byte() % models.models.len()].clone();
    let trust_files = !source.byte().is_multiple_of(4);
    for _ in 0..8 {
        if source.is_empty() {
            break;
        }
        change(&mut files, &mut source);
    }
    let dir = models.dir.path().join("damaged");
    for (name, bytes) in &files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    open(models, &dir, trust_files);
    fs::remove_dir_all(&dir).unwrap();
}
