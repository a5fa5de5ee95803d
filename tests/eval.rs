//! `niwaki eval`, `compare` and `inspect` through the binary, on a small model and files as users have them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bert")
}

fn niwaki(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_niwaki")).args(args).env_remove("MODEL").stdin(Stdio::null()).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let output = niwaki(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Exit code 2 and one line of error.
fn refused(args: &[&str]) -> String {
    let output = niwaki(args);
    assert_eq!(output.status.code(), Some(2), "{args:?} was not refused");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

/// Files of every task, made of the golden texts.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let golden = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/texts.txt")).unwrap();
        let texts: Vec<&str> = golden.lines().map(str::trim).filter(|line| line.len() > 20).take(12).collect();
        assert_eq!(texts.len(), 12);
        let files = Self { dir: tempfile::tempdir().unwrap() };
        // The more of the first text the second keeps, the higher the score.
        let pairs: String = texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let kept: String = text.chars().take(text.chars().count() * (i % 4 + 1) / 4).collect();
                format!("{}\t{text}\t{kept}\n", i % 4)
            })
            .collect();
        files.write("pairs.tsv", &pairs);
        let labelled = |n: usize| -> String {
            (0..n)
                .map(|i| format!("\"{}, {i}\",{}\n", texts[i % 12].replace('"', "\"\""), ["x", "y", "z"][i % 3]))
                .collect()
        };
        files.write("train.csv", &format!("words,kind\n{}", labelled(48)));
        files.write("test.csv", &format!("words,kind\n{}", labelled(24)));
        let corpus: String = texts
            .iter()
            .enumerate()
            .map(|(i, text)| format!("{}\n", serde_json::json!({"_id": i, "text": text})))
            .collect();
        files.write("corpus.jsonl", &corpus);
        let queries: String = (0..4).map(|i| format!("q{i}\t{}\n", texts[i])).collect();
        files.write("queries.tsv", &queries);
        files.write("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\t0\t2\nq1\t1\t1\nq2\t2\t1\nq3\t3\t1\nq3\t4\t0\n");
        files.write("texts.txt", &texts.join("\n"));
        files
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

#[test]
fn every_task_measures_and_differences_have_intervals() {
    let files = Files::new();
    let (model, f32_model) = (model().display().to_string(), format!("{}@f32", model().display()));
    let [pairs, train, test, corpus, queries, judgements, texts] =
        ["pairs.tsv", "train.csv", "test.csv", "corpus.jsonl", "queries.tsv", "qrels.tsv", "texts.txt"]
            .map(|n| files.path(n));
    let args = [
        "eval",
        "--model",
        &model,
        "--sts",
        &pairs,
        "--train",
        &train,
        "--test",
        &test,
        "--corpus",
        &corpus,
        "--queries",
        &queries,
        "--judgements",
        &judgements,
        "--texts",
        &texts,
        "--reference",
        &model,
        "--against",
        &f32_model,
        "--speed",
        "--column",
        "text=words",
        "--column",
        "label=kind",
        "--json",
    ];
    // The columns' names hold for every file that has the role: the corpus has no `words`.
    assert!(refused(&args).contains("corpus.jsonl:1: no column `words`"));
    let args: Vec<&str> =
        args.iter().copied().filter(|arg| !arg.starts_with("--column") && !arg.contains("=words")).collect();
    files.write("train.csv", &fs::read_to_string(&train).unwrap().replace("words,kind", "text,kind"));
    files.write("test.csv", &fs::read_to_string(&test).unwrap().replace("words,kind", "text,kind"));
    let mut args: Vec<&str> = args.into_iter().filter(|arg| *arg != "label=kind").collect();
    args.extend(["--column", "label=kind", "--l2", "0.01"]);
    let report = json(&args);
    let number =
        |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path}: {report}"));
    assert_eq!(number("/sts/n_pairs"), 12.0);
    assert!(number("/sts/interval/low") <= number("/sts/spearman"), "{report}");
    assert!(number("/sts/spearman") <= number("/sts/interval/high"), "{report}");
    assert_eq!((number("/classification/n_train"), number("/classification/n_classes")), (48.0, 3.0));
    // Every text is of the same class wherever it occurs, and a number more or less does not hide which it is.
    assert!(number("/classification/accuracy") > 0.5, "{report}");
    // Each query is a document; two of the documents differ by capitals and marks alone, and one may stand for the other.
    assert!(number("/retrieval/ndcg_at_10/mean") > 0.9 && number("/retrieval/mrr_at_10/mean") > 0.8, "{report}");
    assert_eq!((number("/retrieval/n_queries"), number("/retrieval/n_documents")), (4.0, 12.0));
    assert!(number("/fidelity/min") > 0.99 && number("/fidelity/min") < 1.0);
    assert!((number("/against/fidelity/min") - 1.0).abs() < 1e-6, "f32 against itself");
    for measure in ["spearman", "accuracy", "macro_f1", "ndcg_at_10", "cosine"] {
        let at = |key: &str| number(&format!("/differences/{measure}/{key}"));
        assert!(at("interval/low") <= at("difference") && at("difference") <= at("interval/high"), "{measure}");
        assert!((0.0..=1.0).contains(&at("p_value")));
    }
    assert!(number("/differences/cosine/difference") < 0.0 && number("/differences/cosine/interval/high") < 0.0);
    assert!(number("/speed/p99_ms") >= number("/speed/p50_ms") && number("/speed/p50_ms") > 0.0);
    assert!(number("/speed/tokens_per_s") > 0.0 && number("/differences/throughput_ratio") > 0.0);
    assert!(number("/memory/weights_bytes") > 10_000.0 && number("/memory/on_disk_bytes") > 100_000.0);
    let without_speed: Vec<&str> = args.iter().copied().filter(|arg| *arg != "--speed").collect();
    assert_eq!(json(&without_speed), json(&without_speed), "what is not a time is the same every time");
}

#[test]
fn a_reference_reads_texts_cut_at_the_same_length() {
    let files = Files::new();
    let (dir, texts) = (model().display().to_string(), files.path("texts.txt"));
    let models = ["--model", &dir, "--precision", "f32", "--reference", &dir];
    let report = json(&[&["eval", "--json", "--max-input-length", "6", "--texts", &texts], &models[..]].concat());
    let cosine = report["fidelity"]["min"].as_f64().unwrap();
    assert!((cosine - 1.0).abs() < 1e-6, "f32 against itself: {cosine}");

    // A model that reads less than the other: what both read is compared, whichever is the reference.
    let short = files.path("short");
    let made = niwaki(&["compress", "--model", &dir, "--out", &short, "--max-input-length", "6"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for (model, reference) in [(&short, &dir), (&dir, &short)] {
        let report = json(&["eval", "--json", "--model", model, "--texts", &texts, "--reference", reference]);
        assert!(report["fidelity"]["min"].as_f64().unwrap() > 0.99, "{report}");
        assert_eq!(report["fidelity_max_tokens"], 6);
    }
    let report = json(&["compare", "--json", "--no-speed", "--texts", &texts, &dir, &short]);
    assert!(report["models"][1]["measured"]["fidelity"]["min"].as_f64().unwrap() > 0.99, "{report}");
}

#[test]
fn a_classifier_is_measured_by_its_embeddings() {
    let files = Files::new();
    // One label: scores of length 1 would be the same for every text and every model.
    let dir = model().with_file_name("roberta-reranker").display().to_string();
    let texts = files.path("texts.txt");
    let report = json(&["eval", "--json", "--model", &dir, "--texts", &texts, "--reference", &dir]);
    let cosine = report["fidelity"]["min"].as_f64().unwrap();
    assert!(cosine > 0.9 && cosine < 0.999_999, "INT8 against f32: {cosine}");
    assert!(refused(&["embed", "--model", &dir]).contains("is a classifier"));
}

#[test]
fn a_benchmark_needs_no_input_whatever_the_vocabulary() {
    let dir = model().display().to_string();
    let report = json(&["bench", "--json", "--model", &dir, "--length", "18", "--rounds", "2", "--warmup", "0"]);
    assert!(report["tokens_per_s"].as_f64().unwrap() > 0.0, "{report}");
    // The model inside the binary has no configuration that could be wrong.
    let said = refused(&["bench", "--max-input-length", "1000"]);
    assert!(said.contains("what is asked for does not fit the model") && said.contains("1000 is not in"), "{said}");
    assert!(!said.contains("config.json"), "{said}");
}

#[test]
fn what_cannot_be_measured_is_refused_with_its_line() {
    let files = Files::new();
    let model = model().display().to_string();
    let eval = |args: &[&str]| refused(&[&["eval", "--model", &model], args].concat());
    assert!(eval(&[]).contains("nothing to measure"));
    assert!(eval(&["--texts", &files.path("texts.txt")]).contains("--reference"));
    files.write("bad.tsv", "1\ta\tb\n2\ta\n");
    assert!(eval(&["--sts", &files.path("bad.tsv")]).contains("bad.tsv:2: 2 columns"));
    files.write("open.csv", "score,sentence1,sentence2\n1,\"a,b\n2,c,d\n");
    assert!(eval(&["--sts", &files.path("open.csv")]).contains("open.csv:2: a quote is not closed"));
    assert!(eval(&["--sts", &files.path("missing.csv")]).contains("missing.csv"));
    assert!(eval(&["--sts", &files.path("pairs.tsv"), "--column", "size=1"]).contains("`size` is no role"));
    assert!(eval(&["--train", &files.path("train.csv")]).contains("--test"));
    fs::write(files.path("binary"), b"1\ta\tb\n\xff\xfe").unwrap();
    assert!(eval(&["--sts", &files.path("binary")]).contains("binary:2: not UTF-8 text"));
    let against = eval(&["--sts", &files.path("pairs.tsv"), "--against", &files.path("nowhere")]);
    assert!(against.contains("--against") && against.contains("nowhere"), "{against}");
}

#[test]
fn models_are_compared_in_a_table_and_on_a_page() {
    let files = Files::new();
    let dir = model().display().to_string();
    let f32_model = format!("{dir}@f32");
    let (pairs, texts, page) = (files.path("pairs.tsv"), files.path("texts.txt"), files.path("page.html"));
    let args =
        ["compare", &f32_model, &dir, "@builtin", "--sts", &pairs, "--rounds", "1", "--out", &page, "--threads", "1"];
    let report = json(&[&args[..], &["--json"]].concat());
    let models = report["models"].as_array().unwrap();
    assert_eq!(models.len(), 3);
    assert!(models[0]["differences"].is_null() && models[0]["throughput_ratio"] == 1.0);
    assert!(models[1]["differences"]["spearman"]["p_value"].is_number());
    assert!(models[2]["recorded"]["cosine_mean"].as_f64().unwrap() > 0.5);
    let grown = |at: usize| models[at]["memory"]["resident_growth_bytes"].as_u64().unwrap();
    assert!(grown(0) < grown(2), "what is opened later is not counted: {} {}", grown(0), grown(2));
    let groups = models[2]["inventory"]["groups"].as_array().unwrap();
    let bytes: u64 = groups.iter().map(|group| group["bytes"].as_u64().unwrap()).sum();
    let file = models[2]["weight_file_bytes"].as_u64().unwrap();
    assert!(bytes <= file && file - bytes < 20_000, "the tensors are the file without its header");
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!doctype html>") && html.contains("<svg") && html.trim_end().ends_with("</html>"));
    for outside in ["http:", "https:", "<script", "src="] {
        assert!(!html.contains(outside), "{outside}");
    }

    let output = niwaki(&["compare", &f32_model, &dir, "--no-speed", "--texts", &texts]);
    let table = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("model") && lines[0].contains("MMAC/token") && !lines[0].contains("p50"), "{table}");
    assert!(lines[1].contains("bert (f32)") && lines[2].contains("bert (INT8 at load)"), "{table}");
    assert!(table.contains("cosine") && table.contains("p 0.000"), "{table}");
    assert!(refused(&["compare", &dir]).contains("2 values required"));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let files = Files::new();
    let (dir, pairs) = (model().display().to_string(), files.path("pairs.tsv"));
    for args in [&["inspect", "--json"][..], &["embed", "--model", &dir], &["eval", "--model", &dir, "--sts", &pairs]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_niwaki"));
        command.args(args).env_remove("MODEL").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        // Who asks for no input may be gone already.
        drop(child.stdin.take().unwrap().write_all(b"hi\nthere\n"));
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("niwaki:") && !said.contains("panicked"), "{args:?}: {said}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_niwaki"));
    let command = command.args(["eval", "--model", &dir, "--sts", &pairs]).env_remove("MODEL").stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("Spearman"));
}

#[test]
fn inspect_accounts_for_every_byte() {
    let report = json(&["inspect", "--json", "--model", &model().display().to_string()]);
    let groups = report["groups"].as_array().unwrap();
    let of =
        |name: &str| groups.iter().find(|group| group["group"] == name).map_or(0, |g| g["bytes"].as_u64().unwrap());
    let architecture = &report["architecture"];
    let size = |key: &str| architecture[key].as_u64().unwrap();
    assert_eq!(of("word-embedding"), size("vocab_size") * size("d_model") * 4);
    let layer = &architecture["layers"][0];
    let n_layers = architecture["layers"].as_array().unwrap().len() as u64;
    assert_eq!(of("ffn"), n_layers * 2 * layer["d_ffn"].as_u64().unwrap() * size("d_model") * 4);
    let matrices = report["matrices"].as_array().unwrap();
    assert_eq!(matrices.len() as u64, 3 + 4 * n_layers);
    let macs: u64 = matrices.iter().map(|matrix| matrix["macs"].as_u64().unwrap()).sum();
    assert_eq!(report["macs_per_token"].as_u64().unwrap(), macs);
    assert_eq!(macs * 4, of("attention") + of("ffn"), "a multiplication for each stored f32");
    assert_eq!(report["bits"].as_f64().unwrap(), 32.0);

    let output = niwaki(&["inspect", "--matrices"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("word embedding") && text.contains("ffn-down") && text.contains("made by niwaki"), "{text}");
}
