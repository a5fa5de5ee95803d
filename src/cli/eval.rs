//! `niwaki eval`: how good a model is.

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::args::{EvalArgs, ModelArgs, Precision};
use super::output::print;
use super::progress::Bars;
use super::subject::{Named, Subject, speed_line};
use super::tasks::Tasks;
use super::{model, players};
use crate::eval::{SpeedSettings, embed, encoder};
use crate::text::Tokenizer;

pub(super) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let tasks = Tasks::read(&args.tasks)?;
    if tasks.is_empty() && !args.speed {
        bail!(
            "nothing to measure: give --sts FILE, --train FILE with --test FILE, --corpus FILE with --queries FILE and \
             --judgements FILE, --texts FILE with --reference DIR, or --speed"
        );
    }
    if args.tasks.texts.is_some() && args.reference.is_none() {
        bail!("--texts is compared with another model: give --reference DIR");
    }
    let n_workers = if args.speed { players::n_threads(&args.model) } else { 1 };
    // All are asked the same texts; with --attention, what is longer than the others can read is for the model alone (fidelity is
    // measured on what all can read).
    let max_input_length = args.model.max_input_length.filter(|_| args.model.attention.is_none());
    let named = |named: &Named, precision| ModelArgs {
        max_input_length,
        ..named.args(precision, args.model.threads, args.model.isa.as_deref())
    };
    let mut subject = Subject::open(&args.model, n_workers)?;
    let mut other = match &args.against {
        Some(dir) => Some(Subject::open(&named(dir, Precision::Int8), n_workers).context("--against")?),
        None => None,
    };
    let bars = Bars::new();
    let reference = match &args.reference {
        Some(dir) => {
            let mut reference = Subject::open(&named(dir, Precision::F32), 1).context("--reference")?;
            tasks.reference(&mut reference, std::iter::once(&subject).chain(&other), &bars)?
        }
        None => None,
    };

    let measured = tasks.measure(&mut subject, reference.as_ref(), &bars)?;
    let mut lines = format!("{}\n{}", subject.name(), measured.lines());
    let mut report = describe(&subject, serde_json::to_value(&measured)?);
    let theirs = match &mut other {
        Some(other) => Some(tasks.measure(other, reference.as_ref(), &bars)?),
        None => None,
    };
    let mut subjects: Vec<&mut Subject> = std::iter::once(&mut subject).chain(&mut other).collect();
    let speeds = if args.speed { tasks.speed(&mut subjects, &SpeedSettings::default(), &bars)? } else { Vec::new() };
    if let Some(speed) = speeds.first() {
        let memory = subject.memory();
        lines += &format!("speed           {}\n", speed_line(speed, subject.loaded.n_threads));
        lines += &memory_line(&memory);
        report["speed"] = serde_json::to_value(speed)?;
        report["memory"] = memory;
    }
    if let (Some(other), Some(theirs)) = (&other, &theirs) {
        let differences = tasks.differences(&measured, theirs);
        lines += &format!("\n{}\n{}", other.name(), theirs.lines());
        let mut against = describe(other, serde_json::to_value(theirs)?);
        let mut difference = serde_json::to_value(&differences)?;
        if let [ours, theirs] = &speeds[..] {
            lines += &format!("speed           {}\n", speed_line(theirs, other.loaded.n_threads));
            lines += &memory_line(&other.memory());
            against["speed"] = serde_json::to_value(theirs)?;
            against["memory"] = other.memory();
            difference["throughput_ratio"] = json!(ours.throughput_ratio(theirs));
        }
        lines += &format!("\n{} less {}\n{}", subject.name(), other.name(), differences.lines());
        if let Some(ratio) = difference["throughput_ratio"].as_f64() {
            lines += &format!("  throughput    {ratio:.3} times\n");
        }
        report["against"] = against;
        report["differences"] = difference;
    }
    Ok(print(|out| if args.json { writeln!(out, "{report}") } else { out.write_all(lines.as_bytes()) })?)
}

/// What was measured, with what it was measured on.
fn describe(subject: &Subject, mut measured: Value) -> Value {
    measured["model"] = json!(subject.checkpoint.name());
    measured["precision"] = json!(subject.precision.name());
    measured["isa"] = json!(subject.loaded.isa);
    measured["threads"] = json!(subject.loaded.n_threads);
    measured
}

fn memory_line(memory: &Value) -> String {
    let megabytes = |key: &str| memory[key].as_f64().unwrap_or_default() / 1e6;
    format!(
        "memory          {:.1} MB on disk; the process grew by {:.1} MB (weights {:.1}, workspace {:.1})\n",
        megabytes("on_disk_bytes"),
        megabytes("resident_growth_bytes"),
        megabytes("weights_bytes"),
        megabytes("workspace_peak_bytes")
    )
}

/// Rows of the lines on standard input, for `niwaki embed`.
pub(super) fn embed_lines(args: &super::args::EmbedArgs) -> anyhow::Result<()> {
    use std::io::BufRead;
    /// Lines that are embedded together; the first answer comes after this many, or at the end of the input.
    const LINES: usize = 256;
    let checkpoint = model::open(&args.model)?;
    if checkpoint.architecture().head.is_some() {
        bail!("{} is a classifier, which has scores and no embeddings: ask `niwaki serve` for them", checkpoint.name());
    }
    let tokenizer = Tokenizer::from_bytes(checkpoint.tokenizer_json())?;
    let mut loaded = players::load(&checkpoint, &args.model, 1)?;
    let encode = encoder(&tokenizer, checkpoint.architecture().max_input_tokens);
    let mut input = std::io::stdin().lock();
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
        print(|out| {
            (0..rows.len()).try_for_each(|index| {
                serde_json::to_writer(&mut *out, rows.row(index))?;
                out.write_all(b"\n")
            })
        })?;
    }
    Ok(())
}
