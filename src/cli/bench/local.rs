//! In process. A sample is one forward call. Rounds are interleaved over nothing else here; to compare programs, run them in turn.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};

use super::super::args::{BenchArgs, Precision};
use super::super::output::print;
use super::super::{model, players};
use super::{input, percentile, profile};
use crate::checkpoint::Checkpoint;
use crate::eval::{self, Pass};
use crate::exec::cost::{forward_costs, stored_costs};
use crate::kernels::peak;
use crate::model::{Forward, ModelError, RaggedBatch};
use crate::telemetry::process;
use crate::text::Tokenizer;

/// What one run measured.
struct Measured {
    /// Seconds of each forward call, sorted.
    samples: Vec<f64>,
    n_seqs: usize,
    n_tokens: usize,
    wall: f64,
}

pub(super) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let checkpoint = model::open(&args.model)?;
    let n_workers = args.workers.get();
    let mut loaded = players::load(&checkpoint, &args.model, n_workers)?;
    let architecture = checkpoint.architecture();
    let tokenizer = Tokenizer::from_bytes(checkpoint.tokenizer_json())?;
    let sequences =
        input::into_ids(input::inputs(args, architecture.vocab_size)?, &tokenizer, architecture.max_input_tokens)?;
    let batches = eval::batches(&sequences, args.max_batch_tokens, args.batch)?;
    let peak = peak::measure(loaded.kernels.isa(), Duration::from_millis(200), loaded.n_threads);
    for _ in 0..args.warmup {
        play(&mut loaded.workers, &batches)?;
    }
    let mut rounds: Vec<Measured> =
        (0..args.rounds.get()).map(|_| play(&mut loaded.workers, &batches)).collect::<anyhow::Result<_>>()?;
    rounds.sort_by(|a, b| a.wall.total_cmp(&b.wall));
    let median = &rounds[rounds.len() / 2];
    let mut samples: Vec<f64> = rounds.iter().flat_map(|round| round.samples.iter().copied()).collect();
    samples.sort_by(f64::total_cmp);
    let ms = |share| percentile(&samples, share) * 1e3;
    let memory = loaded.workers.iter().map(|worker| worker.memory());
    let workspace: usize = memory.clone().map(|memory| memory.workspace_peak).sum();
    let weights = memory.map(|memory| memory.weights).max().unwrap_or_default();
    let macs = macs(&checkpoint, args.model.precision, &batches)?;
    let gmacs = macs as f64 / median.wall / 1e9;
    let operations = match (args.profile, args.model.precision) {
        (false, _) => Vec::new(),
        (true, Precision::Int8) => {
            profile::profile(&checkpoint, &args.model, loaded.kernels, &batches, args.rounds.get())?
        }
        (true, Precision::F32) => bail!("--profile shows the INT8 player's operations, not those of --precision f32"),
    };
    let report = json!({
        "model": checkpoint.name(),
        "isa": loaded.kernels.name(),
        "threads": loaded.n_threads,
        "workers": n_workers,
        "rounds": rounds.len(),
        "sequences": median.n_seqs,
        "tokens": median.n_tokens,
        "batches": batches.len(),
        "latency_ms": {"p50": ms(0.5), "p90": ms(0.9), "p99": ms(0.99), "min": samples[0] * 1e3},
        "round_s": {"median": median.wall, "min": rounds[0].wall, "max": rounds[rounds.len() - 1].wall},
        "sequences_per_s": median.n_seqs as f64 / median.wall,
        "tokens_per_s": median.n_tokens as f64 / median.wall,
        "macs": macs,
        "gmac_per_s": gmacs,
        "peak_gmac_per_s": peak.map(|peak| peak / 1e9),
        "share_of_peak": peak.map(|peak| gmacs * 1e9 / peak),
        "operations": operations,
        "memory": {"weights": weights, "workspace_peak": workspace, "rss": process::resident_bytes()},
    });
    Ok(print(|out| if args.json { writeln!(out, "{report}") } else { write_table(&report, out) })?)
}

fn write_table(report: &Value, out: &mut dyn Write) -> io::Result<()> {
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap_or_default();
    let count = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    writeln!(
        out,
        "{} on {} with {} threads, {} batches at once",
        report["model"].as_str().unwrap_or_default(),
        report["isa"].as_str().unwrap_or_default(),
        count("/threads"),
        count("/workers")
    )?;
    writeln!(
        out,
        "{} sequences, {} tokens in {} batches, {} rounds",
        count("/sequences"),
        count("/tokens"),
        count("/batches"),
        count("/rounds")
    )?;
    writeln!(
        out,
        "a batch        p50 {:.3} ms   p90 {:.3}   p99 {:.3}   min {:.3}",
        number("/latency_ms/p50"),
        number("/latency_ms/p90"),
        number("/latency_ms/p99"),
        number("/latency_ms/min")
    )?;
    writeln!(
        out,
        "throughput     {:.0} sequences/s, {:.0} tokens/s",
        number("/sequences_per_s"),
        number("/tokens_per_s")
    )?;
    writeln!(
        out,
        "arithmetic     {:.0} GMAC/s, {:.0} % of the {:.0} GMAC/s that the processor reaches",
        number("/gmac_per_s"),
        number("/share_of_peak") * 100.0,
        number("/peak_gmac_per_s")
    )?;
    for row in report["operations"].as_array().into_iter().flatten() {
        writeln!(
            out,
            "  {:<14}{:>10.1} us {:>6.1} %",
            row["operation"].as_str().unwrap_or_default(),
            row["us"].as_f64().unwrap_or_default(),
            row["share"].as_f64().unwrap_or_default() * 100.0
        )?;
    }
    writeln!(
        out,
        "memory         weights {:.1} MB, workspace {:.1} MB at peak, resident {:.1} MB",
        number("/memory/weights") / 1e6,
        number("/memory/workspace_peak") / 1e6,
        number("/memory/rss") / 1e6
    )?;
    Ok(())
}

/// Multiply-accumulates of a pass over all batches. The INT8 player multiplies what is stored, the f32 player whole matrices.
fn macs(checkpoint: &Checkpoint, precision: Precision, batches: &[RaggedBatch]) -> Result<u64, ModelError> {
    let lens: Vec<usize> = lengths(batches).collect();
    let costs = match precision {
        Precision::Int8 => stored_costs(checkpoint, &lens)?,
        Precision::F32 => forward_costs(checkpoint.architecture(), &lens)?,
    };
    Ok(costs.iter().map(|cost| cost.macs).sum())
}

/// Tokens of each sequence.
fn lengths(batches: &[RaggedBatch]) -> impl Iterator<Item = usize> {
    batches.iter().flat_map(|batch| (0..batch.n_seqs()).map(|index| batch.sequence(index).len()))
}

/// What a pass over all batches took, and what it worked on.
fn play(workers: &mut [Box<dyn Forward>], batches: &[RaggedBatch]) -> anyhow::Result<Measured> {
    let Pass { samples, wall } = eval::play(workers, batches)?;
    Ok(Measured { samples, n_seqs: lengths(batches).count(), n_tokens: lengths(batches).sum(), wall })
}
