//! The page of a report, `report.html`: it stands alone, without scripts and without anything from a network.

use super::passes::PassReport;
use super::report::{Report, Stop};
use crate::checkpoint::TensorGroup;
use crate::eval::page::{Cell, Page, escape, legend, table};
use crate::eval::plot::{Axis, Point, columns, pattern, scatter, stacked_bars};

/// Cells of a drawn pattern, and tokens that each stands for.
const CELLS: usize = 48;

fn megabytes(bytes: f64) -> String {
    format!("{:.2} MB", bytes / 1e6)
}

fn millions(count: f64) -> String {
    format!("{:.2} M", count / 1e6)
}

fn cosine(value: f64) -> String {
    format!("{value:.4}")
}

/// The page.
pub(super) fn page(report: &Report) -> String {
    let mut page = Page::new(&report.model, &format!("{} compressed by {}", report.source, report.generator));
    figures(&mut page, report);
    sizes(&mut page, report);
    qualities(&mut page, report);
    layers(&mut page, report);
    attention(&mut page, report);
    for pass in &report.passes {
        one_pass(&mut page, pass);
    }
    page.section("Made by", "", &format!("<pre>{}</pre>", escape(&report.command)));
    page.finish(&report.generator)
}

fn figures(page: &mut Page, report: &Report) {
    let (first, last) = (report.way.first(), report.way.last());
    let mut figures = Vec::new();
    if let (Some(first), Some(last)) = (first, last) {
        figures.push((
            megabytes(last.bytes as f64),
            format!(
                "tensors, {} before ({:.1} times smaller)",
                megabytes(first.bytes as f64),
                first.bytes as f64 / last.bytes.max(1) as f64
            ),
        ));
        figures.push((
            millions(last.macs_per_token as f64),
            format!("multiply-accumulates per token, {} before", millions(first.macs_per_token as f64)),
        ));
    }
    if let Some(quality) = &report.quality {
        let what = format!("cosine to the source in the mean, {:.4} at the first percentile", quality.cosine_p1);
        figures.push((cosine(quality.cosine_mean), what));
    }
    if let Some(speed) = &report.speed {
        let ratio = speed.artefact.throughput_ratio(&speed.source);
        let what = format!("tokens per second, {ratio:.1} times those of the source in f32, on {}", speed.machine);
        figures.push((format!("{:.0}", speed.artefact.tokens_per_s), what));
    }
    page.figures(&figures);
}

fn sizes(page: &mut Page, report: &Report) {
    let groups: Vec<TensorGroup> =
        TensorGroup::ALL.into_iter().filter(|group| report.bytes_of(*group) != (0, 0)).collect();
    let titles: Vec<&str> = groups.iter().map(|group| group.title()).collect();
    let bar = |of: fn((u64, u64)) -> u64| groups.iter().map(|group| of(report.bytes_of(*group)) as f64).collect();
    let bars = [("before".to_owned(), bar(|pair| pair.0)), ("after".to_owned(), bar(|pair| pair.1))];
    let chart = stacked_bars("size by group of tensors", &titles, &bars, &megabytes);
    let forms = |group: TensorGroup| {
        report.after.iter().find(|size| size.group == group).map_or(String::new(), |size| size.forms.join(", "))
    };
    let mut rows: Vec<Vec<Cell>> = groups
        .iter()
        .map(|group| {
            let (before, after) = report.bytes_of(*group);
            vec![
                Cell::text(group.title()),
                Cell::number(Some(megabytes(before as f64))),
                Cell::number(Some(megabytes(after as f64))),
                Cell::number((before > 0).then(|| format!("{:.1} %", after as f64 / before as f64 * 100.0))),
                Cell::text(forms(*group)),
            ]
        })
        .collect();
    let sum = |of: fn((u64, u64)) -> u64| groups.iter().map(|group| of(report.bytes_of(*group))).sum::<u64>() as f64;
    let (before, after) = (sum(|pair| pair.0), sum(|pair| pair.1));
    rows.push(vec![
        Cell::text("all"),
        Cell::number(Some(megabytes(before))),
        Cell::number(Some(megabytes(after))),
        Cell::number(Some(format!("{:.1} %", after / before.max(1.0) * 100.0))),
        Cell::text(""),
    ]);
    let head = ["tensors", "before", "after", "left", "stored as"];
    let content = legend(&titles) + &chart + &table(&head, &rows, true);
    page.section("Size by group of tensors", "", &content);
}

fn qualities(page: &mut Page, report: &Report) {
    let points = |x: fn(&Stop) -> f64| -> Vec<Point> {
        let point = |stop: &Stop| Point { label: stop.after.clone(), x: x(stop), y: stop.cosine, interval: None };
        report.way.iter().map(point).collect()
    };
    let y = Axis { title: "cosine to the source", format: &cosine };
    let size = Axis { title: "bytes of all tensors", format: &megabytes };
    let work = Axis { title: "multiply-accumulates per token of the linear layers", format: &millions };
    let mut content = scatter("quality against size", &points(|stop| stop.bytes as f64), &size, &y, true);
    content += &scatter("quality against work", &points(|stop| stop.macs_per_token as f64), &work, &y, true);
    if let Some(speed) = &report.speed {
        let last = report.way.last().map_or(1.0, |stop| stop.cosine);
        let point = |label: &str, x: f64, y: f64| Point { label: label.to_owned(), x, y, interval: None };
        let points = [
            point("source, f32", speed.source.tokens_per_s, 1.0),
            point("as written", speed.artefact.tokens_per_s, last),
        ];
        let x = Axis { title: "tokens per second", format: &|value| format!("{value:.0}") };
        content += &scatter("quality against measured speed", &points, &x, &y, true);
    }
    let about = "Pass by pass, from the source to what was written. Points between the first and the last are measured in f32 \
                 on a few texts; the last is the written files, played by the INT8 player on all held-out texts.";
    page.section("Quality against size and speed", about, &content);
}

fn layers(page: &mut Page, report: &Report) {
    let categories: Vec<(String, Vec<Option<f64>>)> = report
        .parts
        .iter()
        .map(|part| (part.part.replace("layer ", "").replace(", gone", " (gone)"), vec![Some(part.loss)]))
        .collect();
    let axis = Axis { title: "1 − cosine", format: &|value| format!("{value:.5}") };
    let mut content = columns("loss of each layer alone", &["loss"], &categories, &axis);
    let rows: Vec<Vec<Cell>> = report
        .parts
        .iter()
        .map(|part| {
            let bytes = megabytes(part.bytes as f64);
            vec![
                Cell::text(part.part.clone()),
                Cell::number(Some(format!("{:.5}", part.loss))),
                Cell::number(Some(bytes)),
            ]
        })
        .collect();
    content += &table(&["part", "loss alone", "bytes now"], &rows, false);
    page.section(
        "Sensitivity by layer",
        "What the sentence embedding loses when this part alone is as in the artefact and all others as in the source.",
        &content,
    );
}

fn attention(page: &mut Page, report: &Report) {
    let figures: String = report
        .attention
        .iter()
        .map(|layer| {
            let title = format!("layer {}: {}", layer.layer, layer.pattern);
            let drawn = pattern(&title, CELLS, |query, key| f64::from(u8::from(layer.band.contains(query, key))));
            let pairs = format!("{:.1} % of the pairs", layer.pairs * 100.0);
            format!("<figure>{drawn}<figcaption>{}<br>{}</figcaption></figure>", escape(&title), escape(&pairs))
        })
        .collect();
    let about = format!(
        "Which keys (columns) a query (row) sees among {CELLS} tokens; shares of pairs are those of {} tokens or the longest input.",
        super::report::PATTERN_TOKENS
    );
    page.section("Attention patterns", &about, &format!("<div class=\"patterns\">{figures}</div>"));
}

fn one_pass(page: &mut Page, pass: &PassReport) {
    let number = |value: Option<f64>, digits: usize| Cell::number(value.map(|value| format!("{value:.digits$}")));
    let rows: Vec<Vec<Cell>> = pass
        .matrices
        .iter()
        .map(|matrix| {
            vec![
                Cell::text(matrix.matrix.clone()),
                Cell::text(matrix.form.clone()),
                number(matrix.bits, 2),
                number(matrix.weight_error, 5),
                number(matrix.error_before, 5),
                number(matrix.error_after, 5),
                number(matrix.sensitivity, 5),
            ]
        })
        .collect();
    let mut content = String::new();
    for note in &pass.notes {
        content += &format!("<p>{}</p>", escape(note));
    }
    if !rows.is_empty() {
        let head = ["matrix", "stored as", "bits", "weights", "output, before", "output, after", "sensitivity"];
        content += &table(&head, &rows, false);
    }
    let layers: Vec<Vec<Cell>> = pass
        .layers
        .iter()
        .map(|layer| {
            let pair = |(before, after): (usize, usize)| Cell::number(Some(format!("{before} → {after}")));
            vec![Cell::text(format!("layer {}", layer.layer)), pair(layer.heads), pair(layer.ffn)]
        })
        .collect();
    if !layers.is_empty() {
        content += &table(&["layer", "heads", "FFN neurons"], &layers, false);
    }
    let about = format!(
        "{}. Weights {} → {}, work {} → {} multiply-accumulates per token.",
        pass.summary,
        megabytes(pass.bytes.0 as f64),
        megabytes(pass.bytes.1 as f64),
        millions(pass.macs_per_token.0 as f64),
        millions(pass.macs_per_token.1 as f64)
    );
    page.section(&format!("Pass: {}", pass.kind), &about, &content);
}
