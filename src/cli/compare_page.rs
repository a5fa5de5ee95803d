//! The page that `niwaki compare --out` writes.

use super::compare::{Entry, MEASURES, columns};
use crate::checkpoint::TensorGroup;
use crate::eval::page::{Cell, Page, legend, table};
use crate::eval::plot::{Axis, Point, scatter, stacked_bars};

fn megabytes(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}

pub(super) fn page(entries: &[Entry], machine: &str) -> String {
    let names: Vec<&str> = entries.iter().map(|entry| entry.model.as_str()).collect();
    let mut page = Page::new("Comparison", &names.join(" · "));
    let columns = columns(entries);
    let head: Vec<&str> = columns.iter().map(|(head, _)| head.as_str()).collect();
    let rows: Vec<Vec<Cell>> = (0..entries.len())
        .map(|row| {
            let cell = |(index, (_, cells)): (usize, &(String, Vec<Option<String>>))| match (index, &cells[row]) {
                (0, Some(name)) => Cell::text(name.clone()),
                (_, number) => Cell::number(number.clone()),
            };
            columns.iter().enumerate().map(cell).collect()
        })
        .collect();
    page.section(
        "All numbers",
        "Bits: stored bits of a weight in the mean, scales included. Zeros: weights that are zero. Skipped: weights that are \
         neither stored nor multiplied. MMAC/token: millions of multiply-accumulates of the matrix products.",
        &table(&head, &rows, false),
    );
    differences(&mut page, entries);
    for measure in &MEASURES {
        let points = |x: &dyn Fn(&Entry) -> Option<f64>| -> Vec<Point> {
            entries
                .iter()
                .filter_map(|entry| {
                    let (y, interval) = (measure.of)(entry)?;
                    let interval = interval.map(|interval| (interval.low, interval.high));
                    Some(Point { label: entry.model.clone(), x: x(entry)?, y, interval })
                })
                .collect()
        };
        let quality = Axis { title: measure.name, format: &|value| format!("{value:.*}", measure.digits.min(3)) };
        let by_size = points(&|entry| Some(entry.weight_file_bytes as f64));
        if by_size.len() < 2 {
            continue;
        }
        let title = format!("{} against size and speed", measure.name);
        let mut charts =
            scatter(&title, &by_size, &Axis { title: "size of the weights", format: &megabytes }, &quality, false);
        let by_speed = points(&|entry| entry.speed.as_ref().map(|speed| speed.tokens_per_s));
        if by_speed.len() > 1 {
            let speed = Axis { title: "tokens per second", format: &|value| format!("{value:.0}") };
            charts += &scatter(&title, &by_speed, &speed, &quality, false);
        }
        page.section(&title, "Lines are 95 % intervals by bootstrap where there are any.", &charts);
    }
    let groups: Vec<TensorGroup> = TensorGroup::ALL
        .into_iter()
        .filter(|group| entries.iter().any(|entry| entry.inventory.bytes_of(*group) > 0))
        .collect();
    let titles: Vec<&str> = groups.iter().map(|group| group.title()).collect();
    let bars: Vec<(String, Vec<f64>)> = entries
        .iter()
        .map(|entry| {
            (entry.model.clone(), groups.iter().map(|group| entry.inventory.bytes_of(*group) as f64).collect())
        })
        .collect();
    let chart = format!("{}{}", legend(&titles), stacked_bars("size by group of tensors", &titles, &bars, &megabytes));
    page.section("Size by group of tensors", "", &chart);
    page.finish(&format!("niwaki {} · speed measured in turn on {machine}", env!("CARGO_PKG_VERSION")))
}

fn differences(page: &mut Page, entries: &[Entry]) {
    let mut rows = Vec::new();
    for entry in entries {
        let Some(differences) = &entry.differences else { continue };
        for (name, difference, factor, digits) in differences.named() {
            let number = |value: f64| Some(format!("{:+.digits$}", value * factor));
            rows.push(vec![
                Cell::text(entry.model.clone()),
                Cell::text(name),
                Cell::number(number(difference.difference)),
                Cell::number(number(difference.interval.low)),
                Cell::number(number(difference.interval.high)),
                Cell::number(Some(format!("{:.3}", difference.p_value))),
            ]);
        }
    }
    if !rows.is_empty() {
        page.section(
            &format!("Differences to {}", entries[0].model),
            "95 % intervals by paired bootstrap over the same items; p is two-sided.",
            &table(&["model", "measure", "difference", "from", "to", "p"], &rows, false),
        );
    }
}
