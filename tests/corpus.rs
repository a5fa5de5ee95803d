//! The fuzz targets without a fuzzer: each body over its corpus (inputs that once were findings among them), and over some
//! thousand inputs that are made of it. `tests/fuzz/run.sh` runs them with one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "fuzz/bodies/mod.rs"]
mod bodies;

use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Changes a byte, cuts, repeats, or joins the beginning of one input to the end of another.
fn mutate(random: &mut StdRng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[random.random_range(0..corpus.len())].clone();
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=input.len());
        match random.random_range(0..5) {
            0 => input.insert(at, random.random()),
            1 => input.truncate(at),
            2 => input.extend_from_within(at..),
            3 => {
                let other = &corpus[random.random_range(0..corpus.len())];
                input.truncate(at);
                input.extend(&other[random.random_range(0..=other.len())..]);
            }
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.random();
                }
            }
        }
    }
    input
}

fn replay(target: &str, n_mutations: usize, body: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(corpus.len() > 10, "{target}: {} inputs", corpus.len());
    for (path, input) in files.iter().zip(&corpus) {
        println!("{}", path.display()); // the last one is the one that failed
        body(input);
    }
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..n_mutations {
        let input = mutate(&mut random, &corpus);
        println!("{:?}", String::from_utf8_lossy(&input));
        body(&input);
    }
}

#[test]
fn damaged_models_give_errors() {
    replay("artefacts", 1500, bodies::artefacts::run);
}

#[test]
fn requests_of_any_kind_are_answered() {
    replay("requests", 3000, bodies::requests::run);
}

#[test]
fn any_text_is_encoded_the_same_in_every_way() {
    replay("texts", 3000, bodies::texts::run);
}

#[test]
fn any_trace_header_is_answered_in_a_valid_trace() {
    replay("traces", 1000, bodies::traces::run);
}
