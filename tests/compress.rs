//! `niwaki compress` as a whole, through the binary: what comes out is served, the same inputs give the same bytes, and
//! what is refused or killed leaves nothing that looks finished.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use common::tiny::{TinyModel, tiny_dir};
use common::workshop::{self, entries, files, niwaki, serves, source, succeeded, write_recipe};
use niwaki::checkpoint::{Checkpoint, Manifest};

const PRUNING: &str = r#"
seed = 3
[calibration]
texts = "texts.txt"
tokens = 2000
[[pass]]
kind = "prune-structured"
heads = 0.3
[[pass]]
kind = "reconstruct"
"#;

/// `niwaki compress --model SOURCE --out OUT ARGS…`
fn compress(out: &Path, args: &[&str]) -> Output {
    workshop::compress(&source(), out, args)
}

#[test]
fn plain_int8_is_served_evaluated_and_reproducible() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("elsewhere/b"));
    let said = succeeded(&compress(&a, &[]));
    assert!(said.contains("cosine to the uncompressed model"), "{said}");
    succeeded(&compress(&b, &["--seed", "0"]));
    assert_eq!(files(&a), files(&b), "the same settings give the same bytes, wherever they are written");
    serves(&a);

    let manifest = Checkpoint::open(&a).unwrap().manifest().unwrap().clone();
    assert_eq!(manifest.golden.len(), 8);
    assert!(manifest.golden.iter().all(|golden| golden.cosine > 0.99), "{:?}", manifest.quality);
    for (name, bytes) in files(&a).iter().filter(|(name, _)| *name != "niwaki.json") {
        assert_eq!(manifest.files.get(name), Some(&niwaki::checkpoint::sha256_hex(bytes)), "{name}");
    }

    let texts = dir.path().join("texts.txt");
    fs::write(&texts, "a tree\nin the garden\n").unwrap();
    let mut eval = niwaki();
    eval.args(["eval", "--json", "--texts"]).arg(texts).arg("--reference").arg(source()).arg("--model").arg(&a);
    let report: serde_json::Value = serde_json::from_str(&succeeded(&eval.output().unwrap())).unwrap();
    assert!(report["fidelity"]["min"].as_f64().unwrap() > 0.99, "{report}");

    let again = compress(&a, &[]);
    assert_eq!(again.status.code(), Some(2), "an artefact is not overwritten without being asked to");
    succeeded(&compress(&a, &["--force"]));
}

#[test]
fn a_recipe_with_text_is_served_and_reproducible_from_what_the_artefact_carries() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let recipe = write_recipe(&dir.path().join("here"), PRUNING, 300);
    succeeded(&compress(&a, &["--recipe", &recipe]));
    serves(&a);
    let artefact = Checkpoint::open(&a).unwrap();
    let pruning = artefact.manifest().unwrap().pruning.clone().unwrap();
    assert_eq!(pruning.heads.iter().map(|(_, after)| after).sum::<usize>(), 4, "{pruning:?}");
    assert_eq!(artefact.architecture().layers.iter().map(|layer| layer.n_heads).sum::<usize>(), 4);

    // From the artefact's own recipe, with the text under another name in another folder.
    let text = dir.path().join("other.txt");
    fs::rename(dir.path().join("here/texts.txt"), &text).unwrap();
    let carried = a.join("recipe.toml");
    succeeded(&compress(&b, &["--recipe", carried.to_str().unwrap(), "--calibration", text.to_str().unwrap()]));
    assert_eq!(files(&a), files(&b));
    // Another seed takes other texts.
    let c = dir.path().join("c");
    let other = ["--recipe", carried.to_str().unwrap(), "--calibration", text.to_str().unwrap(), "--seed", "4"];
    succeeded(&compress(&c, &other));
    assert_ne!(files(&a)["model.safetensors"], files(&c)["model.safetensors"]);
}

/// A recipe's run on `model`, served, and what its manifest says.
fn made(dir: &Path, name: &str, model: &Path, pruning: &str, refit: &str) -> Manifest {
    let recipe = format!(
        "[calibration]\ntexts = \"texts.txt\"\ntokens = 3000\n[[pass]]\nkind = \"prune-structured\"\n{pruning}\n{refit}"
    );
    let (out, path) = (dir.join(name), write_recipe(&dir.join("recipes"), &recipe, 600));
    succeeded(&workshop::compress(model, &out, &["--recipe", &path]));
    serves(&out);
    Checkpoint::open(&out).unwrap().manifest().unwrap().clone()
}

#[test]
fn one_budget_covers_heads_and_neurons_and_every_refit_matrix_helps() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, pruning: &str, refit: &str| made(dir.path(), name, &source(), pruning, refit);
    let outputs = "[[pass]]\nkind = \"reconstruct\"\n";
    let all = "[[pass]]\nkind = \"reconstruct\"\nmatrices = \"all\"\n";
    // A head of 16 is a twelfth of the multiply-accumulates of three layers of 64 neurons.
    let by_macs = make("macs", "share = 0.2", all);
    let (before, after) = by_macs.pruning.clone().unwrap().macs_per_token;
    assert!(after as f64 <= 0.8 * before as f64 && after as f64 > 0.7 * before as f64, "{after} of {before}");
    let by_bytes = make("bytes", "share = 0.2\nof = \"bytes\"", "");
    let (before, after) = by_bytes.pruning.clone().unwrap().macs_per_token;
    assert!(after < before);

    let cosine = |manifest: Manifest| manifest.quality.unwrap().cosine_mean;
    let plain = cosine(make("plain", "share = 0.2", ""));
    let outputs = cosine(make("outputs", "share = 0.2", outputs));
    let all = cosine(by_macs);
    assert!(plain < outputs && outputs < all, "{plain} {outputs} {all}");
}

#[test]
fn a_budget_of_measured_time_narrows_what_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    // Sixteen panels of neurons, most of a layer's time on any machine: noise does not decide whether there is a plan.
    let wide = tiny_dir(&TinyModel { d_model: 64, n_heads: 4, d_ffn: 1024, vocab_size: 40, ..TinyModel::default() });
    let pruning = made(dir.path(), "time", wide.path(), "share = 0.2\nof = \"latency\"", "").pruning.unwrap();
    let (before, after) = pruning.macs_per_token;
    assert!(after < before, "{pruning:?}");
    assert!(pruning.heads.iter().all(|&(_, heads)| heads >= 1), "{pruning:?}");
    assert!(pruning.ffn.iter().all(|&(_, neurons)| neurons >= 64), "{pruning:?}");
    assert!(pruning.ffn.iter().any(|&(was, neurons)| neurons < was), "{pruning:?}");

    // What no shape can meet is said, after measuring, and leaves nothing.
    let share =
        "[calibration]\ntexts = \"texts.txt\"\n[[pass]]\nkind = \"prune-structured\"\nshare = 0.9\nof = \"latency\"\n";
    let recipe = write_recipe(&dir.path().join("recipes"), share, 60);
    let out = dir.path().join("impossible");
    let refused = compress(&out, &["--recipe", &recipe]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("0.9 of the measured time cannot be met"), "{said}");
    assert!(!out.exists());
}

const FOUR_BITS: &str = r#"
[calibration]
texts = "texts.txt"
tokens = 3000
[[pass]]
kind = "smooth"
[[pass]]
kind = "sensitivity"
[[pass]]
kind = "quantize"
group = "embedding"
format = "kmeans"
bits = 4
compensate = "gptq"
[[pass]]
kind = "quantize"
group = "attention"
format = "nf4"
bits = 4
per = "group"
group_size = 16
weighting = "inputs"
[[pass]]
kind = "quantize"
group = "ffn"
bits = 4
symmetric = false
compensate = "gptq"
refit = true
[[pass]]
kind = "correct-bias"
"#;

#[test]
fn four_bits_of_every_kind_are_stored_served_and_reproducible() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let recipe = write_recipe(&dir.path().join("here"), FOUR_BITS, 600);
    succeeded(&compress(&a, &["--recipe", &recipe]));
    succeeded(&compress(&b, &["--recipe", &recipe]));
    assert_eq!(files(&a), files(&b));
    serves(&a);
    let manifest = Checkpoint::open(&a).unwrap().manifest().unwrap().clone();
    let quality = manifest.quality.unwrap();
    assert!(quality.n_texts > 50 && quality.cosine_mean > 0.97, "{quality:?}");
    assert_eq!(manifest.schemes["embeddings"], "codebook4-per-row");
    assert_eq!(manifest.schemes["attention.weight"], "codebook4-per-group");
    // Rounded to the nearest without weights, compensation or corrected biases it is worse.
    let plain = FOUR_BITS.replace("compensate = \"gptq\"\nrefit = true\n", "").replace("compensate = \"gptq\"\n", "");
    let plain = plain.replace("weighting = \"inputs\"\n", "").replace("[[pass]]\nkind = \"correct-bias\"\n", "");
    fs::write(&recipe, plain).unwrap();
    let c = dir.path().join("c");
    succeeded(&compress(&c, &["--recipe", &recipe]));
    let nearest = Checkpoint::open(&c).unwrap().manifest().unwrap().quality.clone().unwrap();
    assert!(nearest.cosine_mean < quality.cosine_mean, "{nearest:?} {quality:?}");
}

#[test]
fn mixed_precision_meets_its_budget() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = |budget: &str| {
        format!(
            "[calibration]\ntexts = \"texts.txt\"\ntokens = 2000\n[[pass]]\nkind = \"mixed-precision\"\n{budget}\n\
             store = {{ bits = 4, format = \"kmeans\" }}\n"
        )
    };
    let make = |name: &str, budget: &str| {
        let out = dir.path().join(name);
        let path = write_recipe(&dir.path().join("recipes"), &recipe(budget), 600);
        succeeded(&compress(&out, &["--recipe", &path]));
        serves(&out);
        Checkpoint::open(&out).unwrap().manifest().unwrap().clone()
    };
    let int8 = dir.path().join("int8");
    succeeded(&compress(&int8, &[]));
    let whole = Checkpoint::open(&int8).unwrap().manifest().unwrap().size.artefact_bytes;
    let budget = whole as f64 / 1e6 * 0.85;
    let small = make("small", &format!("megabytes = {budget}"));
    assert!(small.size.artefact_bytes as f64 <= budget * 1e6, "{:?} in {budget}", small.size);
    assert!(small.schemes.values().any(|form| form.contains(", ")), "both forms: {:?}", small.schemes);
    let close = make("close", "loss = 0.0005");
    assert!(close.quality.unwrap().cosine_mean > 0.99);
    let path = write_recipe(&dir.path().join("recipes"), &recipe(&format!("megabytes = {}", budget * 0.5)), 600);
    let refused = compress(&dir.path().join("none"), &["--recipe", &path]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("cannot be met"));
}

#[test]
fn a_pattern_of_flags_is_a_pass_and_measured_against_the_model_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    succeeded(&compress(&a, &["--attention", "window=1", "--max-input-length", "60"]));
    serves(&a);
    let pass = "[[pass]]\nkind = \"attention\"\npattern = \"window=1\"\nmax_input_length = 60\n[[pass]]\nkind = \"quantize\"\n";
    let recipe = write_recipe(&dir.path().join("recipes"), pass, 1);
    succeeded(&compress(&b, &["--recipe", &recipe]));
    assert_eq!(files(&a), files(&b));
    let quality = Checkpoint::open(&a).unwrap().manifest().unwrap().quality.clone().unwrap();
    assert!(quality.cosine_min < 0.99, "what the window costs is told: {quality:?}");
    // Before the passes of a file as well; what is impossible is named by its flag.
    let after = write_recipe(&dir.path().join("recipes"), "[[pass]]\nkind = \"quantize\"\n", 1);
    let both = dir.path().join("both");
    succeeded(&compress(&both, &["--recipe", &after, "--attention", "window=1", "--max-input-length", "60"]));
    assert_eq!(files(&a)["model.safetensors"], files(&both)["model.safetensors"]);
    let refused =
        compress(&dir.path().join("c"), &["--recipe", &after, "--attention", "full", "--max-input-length", "60"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.status.code() == Some(2) && said.contains("--max-input-length") && said.contains("24 positions"),
        "{said}"
    );
}

#[test]
fn the_configuration_is_that_of_the_transformer_that_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("a"));
    fs::create_dir_all(model.join("0_Transformer")).unwrap();
    fs::create_dir_all(model.join("1_Pooling")).unwrap();
    for (from, to) in [
        ("config.json", "0_Transformer/config.json"),
        ("model.safetensors", "0_Transformer/model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
        ("1_Pooling/config.json", "1_Pooling/config.json"),
    ] {
        fs::copy(source().join(from), model.join(to)).unwrap();
    }
    // The pooling module first, and a configuration at the root that is of something else.
    let module = |idx: u8, path: &str, kind: &str| {
        serde_json::json!({"idx": idx, "name": idx.to_string(), "path": path,
                           "type": format!("sentence_transformers.models.{kind}")})
    };
    let modules = serde_json::json!([module(1, "1_Pooling", "Pooling"), module(0, "0_Transformer", "Transformer")]);
    fs::write(model.join("modules.json"), modules.to_string()).unwrap();
    fs::write(model.join("config.json"), r#"{"model_type": "other"}"#).unwrap();
    succeeded(&workshop::compress(&model, &out, &[]));
    let config: serde_json::Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert!(config["model_type"] == "bert" && config["hidden_size"] == 32, "{config}");
}

#[test]
fn what_is_refused_names_its_place_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("place");
    fs::create_dir(&place).unwrap();
    let out = place.join("out");
    let recipes = dir.path().join("recipes");
    let write = |text: &str| write_recipe(&recipes, text, 20);
    let check = |args: &[&str], words: &[&str]| {
        let output = compress(&out, args);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "refused before any work, in one line: {errors}");
        assert!(words.iter().all(|word| errors.contains(word)), "{args:?}: {errors}");
        assert_eq!(entries(&place), [""; 0], "{args:?}");
    };
    let recipe = write("[[pass]]\nkind = \"prune\"\n");
    check(&["--recipe", &recipe], &["recipe.toml:2: ", "`prune`", "prune-structured"]);
    write("[[pass]]\nkind = \"quantize\"\nbits = 5\n");
    check(&["--recipe", &recipe], &["recipe.toml:3: ", "5"]);
    write("[[pass]]\nkind = \"prune-structured\"\nheads = 0.9\n[calibration]\ntexts = \"texts.txt\"\n");
    check(&["--recipe", &recipe], &["recipe.toml:3: ", "0.9", "layers"]);
    write(&PRUNING.replace("texts.txt", "none.txt"));
    check(&["--recipe", &recipe], &["none.txt", "No such file"]);
    write(&PRUNING.replace("2000", "0"));
    check(&["--recipe", &recipe], &["0 tokens"]);
    write(PRUNING);
    fs::write(recipes.join("texts.txt"), "\n  \n").unwrap();
    check(&["--recipe", &recipe], &["texts.txt"]);
    fs::write(recipes.join("texts.txt"), b"\x80binary\n").unwrap();
    check(&["--recipe", &recipe], &["texts.txt", "UTF-8"]);
    check(&["--recipe", "/nowhere/recipe.toml"], &["/nowhere/recipe.toml"]);
    check(&["--prune-heads", "0.3"], &["--calibration"]);
    check(&["--prune-heads", "0.9"], &["--prune-heads: 0.9"]);
    check(&["--importance", "taylor"], &["--importance", "--prune-heads"]);
    check(&["--calibration", recipes.join("texts.txt").to_str().unwrap()], &["--calibration: no pass"]);
}

/// Kills a run when `when` says so; afterwards either nothing stands at the target or a whole artefact.
fn killed(place: &Path, args: &[&str], when: impl Fn(&Path, Instant) -> bool) -> bool {
    let out = place.join("out");
    let mut run = niwaki()
        .arg("compress")
        .arg("--model")
        .arg(source())
        .arg("--out")
        .arg(&out)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !when(place, started) && run.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    drop(run.kill());
    let finished = run.wait().unwrap().success();
    if out.exists() {
        let manifest = Checkpoint::open(&out).unwrap().manifest().unwrap().clone();
        let found = files(&out);
        assert!(manifest.golden.len() == 8 && manifest.files.len() == found.len() - 1, "half an artefact");
        for (name, sha256) in &manifest.files {
            assert_eq!(sha256, &niwaki::checkpoint::sha256_hex(&found[name]), "{name}");
        }
        fs::remove_dir_all(&out).unwrap();
    }
    // What remains is hidden, and named as what it is.
    assert!(entries(place).iter().all(|name| name.starts_with(".niwaki-building-")), "{:?}", entries(place));
    finished
}

#[test]
fn a_killed_run_leaves_nothing_that_looks_finished() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(&dir.path().join("recipes"), &PRUNING.replace("2000", "400000"), 20_000);
    let place = dir.path().join("passes");
    fs::create_dir(&place).unwrap();
    let finished = killed(&place, &["--recipe", &recipe], |_, started| started.elapsed() > Duration::from_millis(500));
    assert!(!finished, "the run was over before it could be killed");
    assert_eq!(entries(&place), [""; 0], "during the passes nothing stands beside the target");
    // While the artefact is being written and measured, at several moments.
    for delay in [0, 2, 5, 10, 20, 40] {
        let place = dir.path().join(format!("writing-{delay}"));
        fs::create_dir(&place).unwrap();
        let begun = std::cell::Cell::new(None);
        killed(&place, &[], |place, _| {
            if begun.get().is_none() && !entries(place).is_empty() {
                begun.set(Some(Instant::now()));
            }
            begun.get().is_some_and(|at| at.elapsed() >= Duration::from_millis(delay))
        });
    }
}
