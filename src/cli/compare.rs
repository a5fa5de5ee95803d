//! `niwaki compare`: several models side by side.

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};

use super::args::{CompareArgs, Precision};
use super::output::print;
use super::progress::Bars;
use super::subject::Subject;
use super::tasks::{Differences, Measured, Tasks};
use super::{compare_page, players};
use crate::checkpoint::{Inventory, Quality};
use crate::eval::{Interval, Speed, SpeedSettings};

/// Everything about one model.
#[derive(Serialize)]
pub(super) struct Entry {
    pub(super) model: String,
    pub(super) precision: &'static str,
    pub(super) weight_file_bytes: u64,
    pub(super) bits: f64,
    pub(super) zeros: f64,
    pub(super) skipped: f64,
    pub(super) macs_per_token: u64,
    pub(super) inventory: Inventory,
    /// As the artefact's manifest records it.
    pub(super) recorded: Option<Quality>,
    pub(super) measured: Measured,
    /// To the first model.
    pub(super) differences: Option<Differences>,
    pub(super) speed: Option<Speed>,
    /// Throughput by the first model's, pass by pass.
    pub(super) throughput_ratio: Option<f64>,
    pub(super) memory: Value,
}

/// A value with its 95 % interval, where there is one.
type Value95 = (f64, Option<Interval>);

/// A measure as columns and charts show it.
pub(super) struct Measure {
    pub(super) name: &'static str,
    pub(super) digits: usize,
    pub(super) of: fn(&Entry) -> Option<Value95>,
}

fn times_100(interval: Interval) -> Interval {
    Interval { low: interval.low * 100.0, high: interval.high * 100.0 }
}

/// Measures of quality in the order of the table.
pub(super) const MEASURES: [Measure; 5] = [
    Measure {
        name: "Spearman",
        digits: 2,
        of: |entry| entry.measured.sts.as_ref().map(|sts| (sts.spearman * 100.0, Some(times_100(sts.interval)))),
    },
    Measure {
        name: "accuracy %",
        digits: 2,
        of: |entry| {
            let result = entry.measured.classification.as_ref()?;
            Some((result.accuracy * 100.0, Some(times_100(result.accuracy_interval))))
        },
    },
    Measure {
        name: "nDCG@10",
        digits: 4,
        of: |entry| {
            let mean = &entry.measured.retrieval.as_ref()?.ndcg_at_10;
            Some((mean.mean, Some(mean.interval)))
        },
    },
    Measure {
        name: "cosine",
        digits: 4,
        of: |entry| entry.measured.fidelity.as_ref().map(|fidelity| (fidelity.mean, None)),
    },
    Measure {
        name: "recorded cosine",
        digits: 4,
        of: |entry| entry.recorded.as_ref().map(|quality| (quality.cosine_mean, None)),
    },
];

pub(super) fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let tasks = Tasks::read(&args.tasks)?;
    let threads = args.threads;
    let mut subjects = Vec::new();
    for named in &args.models {
        let flags = named.args(Precision::Int8, threads, args.isa.as_deref());
        let n_workers = if args.no_speed { 1 } else { players::n_threads(&flags) };
        subjects.push(Subject::open(&flags, n_workers)?);
    }
    let bars = Bars::new();
    let (first, others) = subjects.split_first_mut().context("no model to compare")?;
    let reference = tasks.reference(first, &*others, &bars)?;
    let mut entries = Vec::new();
    for subject in &mut subjects {
        let measured = tasks.measure(subject, reference.as_ref(), &bars).with_context(|| subject.name())?;
        let inventory = subject.checkpoint.inventory()?;
        entries.push(Entry {
            model: subject.name(),
            precision: subject.precision.name(),
            weight_file_bytes: subject.checkpoint.weights_bytes() as u64,
            bits: inventory.bits(),
            zeros: inventory.zeros(),
            skipped: inventory.skipped(),
            macs_per_token: inventory.macs_per_token(),
            inventory,
            recorded: subject.checkpoint.manifest().and_then(|manifest| manifest.quality.clone()),
            measured,
            differences: None,
            speed: None,
            throughput_ratio: None,
            memory: Value::Null,
        });
    }
    if !args.no_speed {
        let settings = SpeedSettings { rounds: args.rounds.get(), ..SpeedSettings::default() };
        let mut all: Vec<&mut Subject> = subjects.iter_mut().collect();
        let speeds = tasks.speed(&mut all, &settings, &bars)?;
        for (entry, speed) in entries.iter_mut().zip(&speeds) {
            entry.throughput_ratio = Some(speed.throughput_ratio(&speeds[0]));
            entry.speed = Some(speed.clone());
        }
    }
    for (entry, subject) in entries.iter_mut().zip(&subjects) {
        entry.memory = subject.memory();
    }
    if let Some((first, others)) = entries.split_first_mut() {
        for entry in others {
            entry.differences = Some(tasks.differences(&entry.measured, &first.measured));
        }
    }
    number_equal_names(&mut entries);
    let machine = format!("{} threads, {}", subjects[0].loaded.n_threads, subjects[0].loaded.isa);
    if let Some(path) = &args.out {
        let page = compare_page::page(&entries, &machine);
        std::fs::write(path, page).with_context(|| format!("--out {}", path.display()))?;
    }
    let text = match args.json {
        true => format!("{}\n", json!({"machine": machine, "models": entries})),
        false => text_table(&columns(&entries)) + &difference_lines(&entries),
    };
    Ok(print(|out| out.write_all(text.as_bytes()))?)
}

/// Models of the same name are told apart by their place.
fn number_equal_names(entries: &mut [Entry]) {
    let names: Vec<String> = entries.iter().map(|entry| entry.model.clone()).collect();
    for (place, entry) in entries.iter_mut().enumerate() {
        if names.iter().filter(|name| **name == entry.model).count() > 1 {
            entry.model = format!("{} #{}", entry.model, place + 1);
        }
    }
}

/// The table by columns: a head and a cell for each model.
pub(super) fn columns(entries: &[Entry]) -> Vec<(String, Vec<Option<String>>)> {
    let mut columns: Vec<(String, Vec<Option<String>>)> = Vec::new();
    let mut add = |head: &str, cell: &dyn Fn(&Entry) -> Option<String>| {
        let cells: Vec<_> = entries.iter().map(cell).collect();
        if cells.iter().any(Option::is_some) {
            columns.push((head.to_owned(), cells));
        }
    };
    add("model", &|entry| Some(entry.model.clone()));
    add("MB", &|entry| Some(format!("{:.1}", entry.weight_file_bytes as f64 / 1e6)));
    add("bits", &|entry| Some(format!("{:.2}", entry.bits)));
    add("zeros %", &|entry| Some(format!("{:.1}", entry.zeros * 100.0)));
    add("skipped %", &|entry| Some(format!("{:.1}", entry.skipped * 100.0)));
    add("MMAC/token", &|entry| Some(format!("{:.2}", entry.macs_per_token as f64 / 1e6)));
    for measure in &MEASURES {
        add(measure.name, &|entry| (measure.of)(entry).map(|(value, _)| format!("{value:.0$}", measure.digits)));
    }
    add("p50 ms", &|entry| entry.speed.as_ref().map(|speed| format!("{:.2}", speed.p50_ms)));
    add("p99 ms", &|entry| entry.speed.as_ref().map(|speed| format!("{:.2}", speed.p99_ms)));
    add("tokens/s", &|entry| entry.speed.as_ref().map(|speed| format!("{:.0}", speed.tokens_per_s)));
    add("times first", &|entry| entry.throughput_ratio.map(|ratio| format!("{ratio:.2}")));
    add("memory MB", &|entry| {
        entry.memory["resident_growth_bytes"].as_f64().map(|bytes| format!("{:.1}", bytes / 1e6))
    });
    columns
}

fn text_table(columns: &[(String, Vec<Option<String>>)]) -> String {
    let n_rows = columns.first().map_or(0, |(_, cells)| cells.len());
    let cell = |cell: &Option<String>| cell.clone().unwrap_or_else(|| "-".to_owned());
    let widths: Vec<usize> = columns
        .iter()
        .map(|(head, cells)| {
            cells.iter().map(|c| cell(c).chars().count()).chain([head.chars().count()]).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in 0..=n_rows {
        let mut line = String::new();
        for (index, ((head, cells), width)) in columns.iter().zip(&widths).enumerate() {
            let words = if row == 0 { head.clone() } else { cell(&cells[row - 1]) };
            line += &if index == 0 { format!("{words:<width$}") } else { format!("  {words:>width$}") };
        }
        text += line.trim_end();
        text += "\n";
    }
    text
}

fn difference_lines(entries: &[Entry]) -> String {
    let mut text = String::new();
    for entry in entries {
        if let Some(differences) = entry.differences.as_ref().filter(|differences| !differences.named().is_empty()) {
            text += &format!("\n{} less {}\n{}", entry.model, entries[0].model, differences.lines());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_gaps_are_dashes() {
        let columns = [
            ("model".to_owned(), vec![Some("a".to_owned()), Some("longer name".to_owned())]),
            ("MB".to_owned(), vec![Some("20.7".to_owned()), None]),
        ];
        assert_eq!(text_table(&columns), "model          MB\na            20.7\nlonger name     -\n");
    }
}
