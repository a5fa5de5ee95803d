//! `niwaki eval`: how good a model is.

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::args::EvalArgs;
use super::progress::Bars;
use super::{model, players};
use crate::checkpoint::Checkpoint;
use crate::eval::{embed, encoder, fidelity, read_lines, read_pairs, sts};
use crate::exec::candle_model;
use crate::text::Tokenizer;

/// Seed of the bootstrap; the interval is the same from run to run.
const SEED: u64 = 0;

pub(super) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    if args.sts.is_none() && args.texts.is_none() {
        bail!("nothing to measure: give --sts FILE, or --texts FILE with --reference DIR");
    }
    let pairs = args.sts.as_deref().map(read_pairs).transpose()?;
    let texts = args.texts.as_deref().map(read_lines).transpose()?;
    let checkpoint = model::open(&args.model)?;
    let tokenizer = Tokenizer::from_bytes(checkpoint.tokenizer_json())?;
    let mut loaded = players::load(&checkpoint, &args.model, 1)?;
    let subject = &mut *loaded.workers[0];
    let encode = encoder(&tokenizer, checkpoint.architecture().max_input_tokens);
    let bars = Bars::new();
    let mut report = serde_json::Map::new();
    report.insert("model".to_owned(), json!(checkpoint.name()));
    if let Some(pairs) = &pairs {
        bars.start("similarity", Some(pairs.len() as u64 * 2), 0, false);
        let result = sts(subject, &encode, pairs, SEED, |n| bars.advance(n as u64))?;
        bars.finish();
        report.insert("sts".to_owned(), serde_json::to_value(result)?);
    }
    if let (Some(texts), Some(dir)) = (&texts, &args.reference) {
        let reference = Checkpoint::open(dir).with_context(|| format!("reference {}", dir.display()))?;
        let reference_tokenizer = Tokenizer::from_bytes(reference.tokenizer_json())?;
        let reference_encode = encoder(&reference_tokenizer, reference.architecture().max_input_tokens);
        let mut reference_model = candle_model(&reference)?;
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        bars.start("fidelity", Some(texts.len() as u64 * 2), 0, false);
        let result = fidelity((&mut reference_model, &reference_encode), (subject, &encode), &texts, |n| {
            bars.advance(n as u64);
        })?;
        bars.finish();
        report.insert("fidelity".to_owned(), serde_json::to_value(result)?);
    }
    if args.json {
        println!("{}", Value::Object(report));
    } else {
        print_lines(&Value::Object(report));
    }
    Ok(())
}

fn print_lines(report: &Value) {
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap_or_default();
    println!("{}", report["model"].as_str().unwrap_or_default());
    if report.get("sts").is_some() {
        println!(
            "similarity: Spearman {:.2} (95 % interval {:.2} to {:.2}) on {} pairs",
            number("/sts/spearman") * 100.0,
            number("/sts/interval/low") * 100.0,
            number("/sts/interval/high") * 100.0,
            number("/sts/n_pairs")
        );
    }
    if report.get("fidelity").is_some() {
        println!(
            "fidelity: cosine to the reference {:.5} in the mean, {:.5} at the 1st percentile, {:.5} at least, on {} texts",
            number("/fidelity/mean"),
            number("/fidelity/p1"),
            number("/fidelity/min"),
            number("/fidelity/n_texts")
        );
    }
}

/// Rows of the lines on standard input, for `niwaki embed`.
pub(super) fn embed_lines(args: &super::args::EmbedArgs) -> anyhow::Result<()> {
    use std::io::{BufRead, Write};
    /// Lines that are embedded together; the first answer comes after this many, or at the end of the input.
    const LINES: usize = 256;
    let checkpoint = model::open(&args.model)?;
    let tokenizer = Tokenizer::from_bytes(checkpoint.tokenizer_json())?;
    let mut loaded = players::load(&checkpoint, &args.model, 1)?;
    let encode = encoder(&tokenizer, checkpoint.architecture().max_input_tokens);
    let mut input = std::io::stdin().lock();
    let mut output = std::io::BufWriter::new(std::io::stdout().lock());
    let mut number = 0;
    loop {
        let mut lines = Vec::with_capacity(LINES);
        while lines.len() < LINES {
            let mut line = String::new();
            number += 1;
            if input.read_line(&mut line).with_context(|| format!("standard input, line {number}"))? == 0 {
                break;
            }
            lines.push(line.trim_end_matches(['\r', '\n']).to_owned());
        }
        if lines.is_empty() {
            break;
        }
        let texts: Vec<&str> = lines.iter().map(String::as_str).collect();
        let rows = embed(&mut *loaded.workers[0], &encode, &texts, |_| {})?;
        for index in 0..rows.len() {
            serde_json::to_writer(&mut output, rows.row(index))?;
            output.write_all(b"\n")?;
        }
    }
    output.flush()?;
    Ok(())
}
