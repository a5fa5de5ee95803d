//! Charts as inline SVG. Colours and fonts are classes of the page ([`super::page`]), so that one drawing reads on light
//! and on dark ground.

use std::fmt::Write;

use super::page::escape;

/// Width of every chart in its own units.
const WIDTH: f64 = 720.0;

/// How a number is written on an axis or beside a mark.
pub type Format<'a> = &'a dyn Fn(f64) -> String;

/// A mark of a [`scatter`].
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Written beside it.
    pub label: String,
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Ends of a vertical interval.
    pub interval: Option<(f64, f64)>,
}

/// An axis: what it is, how its numbers are written.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "a function has none")]
pub struct Axis<'a> {
    /// Its title.
    pub title: &'a str,
    /// How numbers are written.
    pub format: Format<'a>,
}

/// The class of a series' colour; there are [`super::page::N_SERIES`].
fn series(index: usize) -> String {
    format!("s{}", index % super::page::N_SERIES)
}

fn open(height: f64, title: &str) -> String {
    let title = escape(title);
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\">")
}

macro_rules! draw {
    ($svg:expr, $($part:tt)*) => { write!($svg, $($part)*).expect("writing to a String cannot fail") };
}

/// At most about `count` round numbers that cover `low..=high`, evenly spaced by 1, 2, 2.5 or 5 times a power of ten.
#[must_use]
pub fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let span = if high > low { high - low } else { high.abs().max(1e-9) };
    let raw = span / count.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|step| step * power >= raw * 0.999).unwrap_or(10.0) * power;
    let first = (low / step + 1e-9).floor();
    let last = (high / step - 1e-9).ceil().max(first + 1.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of ticks")]
    let n = (last - first) as usize;
    (0..=n).map(|i| (first + i as f64) * step).collect()
}

/// Horizontal bars of one length scale, each a stack of segments in the order of the series.
#[must_use]
pub fn stacked_bars(title: &str, series_names: &[&str], bars: &[(String, Vec<f64>)], format: Format<'_>) -> String {
    const ROW: f64 = 40.0;
    const BAR: f64 = 24.0;
    let longest = bars.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let left = (longest as f64 * 7.2 + 16.0).clamp(60.0, 260.0);
    let right = 84.0;
    let most = bars.iter().map(|(_, values)| values.iter().sum::<f64>()).fold(0.0, f64::max).max(1e-12);
    let scale = (WIDTH - left - right) / most;
    let mut svg = open(bars.len() as f64 * ROW + 4.0, title);
    for (row, (label, values)) in bars.iter().enumerate() {
        let y = row as f64 * ROW + (ROW - BAR) / 2.0;
        let middle = y + BAR / 2.0 + 4.5;
        draw!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
            left - 10.0,
            escape(label)
        );
        let mut x = left;
        for (index, value) in values.iter().enumerate() {
            let width = value * scale;
            if width > 0.05 {
                let name = escape(series_names.get(index).copied().unwrap_or_default());
                draw!(
                    svg,
                    "<rect class=\"{} segment\" x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{BAR}\"><title>{}: \
                     {name} {}</title></rect>",
                    series(index),
                    escape(label),
                    escape(&format(*value))
                );
            }
            x += width;
        }
        let total: f64 = values.iter().sum();
        draw!(svg, "<text class=\"value\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text>", x + 8.0, escape(&format(total)));
    }
    svg + "</svg>"
}

/// The vertical axis with its grid over `top..bottom`; returns the map from values to y.
fn vertical_axis(
    svg: &mut String,
    (low, high): (f64, f64),
    (top, bottom): (f64, f64),
    (left, right): (f64, f64),
    axis: &Axis<'_>,
) -> impl Fn(f64) -> f64 + use<> {
    let ticks = ticks(low, high, 5);
    let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
    let to_y = move |value: f64| bottom - (value - first) / (last - first) * (bottom - top);
    for tick in &ticks {
        let y = to_y(*tick);
        draw!(svg, "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
        let words = escape(&(axis.format)(*tick));
        draw!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{words}</text>",
            left - 8.0,
            y + 4.0
        );
    }
    draw!(svg, "<text class=\"axis\" x=\"{:.1}\" y=\"12\">{}</text>", 2.0, escape(axis.title));
    to_y
}

/// Groups of columns over categories, one column per series in each; all values at least 0. Absent values are left out.
#[must_use]
pub fn columns(
    title: &str,
    series_names: &[&str],
    categories: &[(String, Vec<Option<f64>>)],
    axis: &Axis<'_>,
) -> String {
    const HEIGHT: f64 = 250.0;
    let (left, right, top, bottom) = (64.0, WIDTH - 4.0, 26.0, HEIGHT - 30.0);
    let most = categories.iter().flat_map(|(_, values)| values).flatten().copied().fold(0.0, f64::max);
    let mut svg = open(HEIGHT, title);
    let to_y = vertical_axis(&mut svg, (0.0, most.max(1e-12)), (top, bottom), (left, right), axis);
    let slot = (right - left) / categories.len().max(1) as f64;
    let width = (slot * 0.74 / series_names.len().max(1) as f64).min(26.0);
    for (place, (label, values)) in categories.iter().enumerate() {
        let middle = left + (place as f64 + 0.5) * slot;
        let start = middle - width * values.len() as f64 / 2.0;
        for (index, value) in values.iter().enumerate() {
            let Some(value) = value else { continue };
            let y = to_y(*value);
            let name = escape(series_names.get(index).copied().unwrap_or_default());
            draw!(
                svg,
                "<rect class=\"{} segment\" x=\"{:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{:.2}\"><title>{} {name}: \
                 {}</title></rect>",
                series(index),
                start + index as f64 * width,
                (bottom - y).max(0.0),
                escape(label),
                escape(&(axis.format)(*value))
            );
        }
        draw!(
            svg,
            "<text class=\"tick\" x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 18.0,
            escape(label)
        );
    }
    draw!(svg, "<line class=\"base\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{bottom:.1}\" y2=\"{bottom:.1}\"/>");
    svg + "</svg>"
}

/// Labelled points; `path` joins them in their order. Labels move aside for each other.
#[must_use]
pub fn scatter(title: &str, points: &[Point], x_axis: &Axis<'_>, y_axis: &Axis<'_>, path: bool) -> String {
    const HEIGHT: f64 = 330.0;
    let (left, right, top, bottom) = (64.0, WIDTH - 20.0, 30.0, HEIGHT - 52.0);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let mut svg = open(HEIGHT, title);
    if points.is_empty() {
        return svg + "</svg>";
    }
    let (low, high) =
        range(&mut points.iter().flat_map(|p| [p.y, p.interval.map_or(p.y, |i| i.0), p.interval.map_or(p.y, |i| i.1)]));
    let room = ((high - low) * 0.08).max(high.abs() * 1e-4).max(1e-9);
    let to_y = vertical_axis(&mut svg, (low - room, high + room), (top, bottom), (left, right), y_axis);
    let (_, most) = range(&mut points.iter().map(|point| point.x));
    let marks = ticks(0.0, most.max(1e-9) * 1.02, 6);
    let to_x = |value: f64| left + value / marks[marks.len() - 1] * (right - left);
    for mark in &marks {
        let words = escape(&(x_axis.format)(*mark));
        draw!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{words}</text>",
            to_x(*mark),
            bottom + 18.0
        );
    }
    draw!(svg, "<line class=\"base\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{bottom:.1}\" y2=\"{bottom:.1}\"/>");
    draw!(
        svg,
        "<text class=\"axis\" x=\"{right:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        bottom + 40.0,
        escape(x_axis.title)
    );
    if path {
        let line: String = points.iter().map(|point| format!("{:.1},{:.1} ", to_x(point.x), to_y(point.y))).collect();
        draw!(svg, "<polyline class=\"path\" points=\"{}\"/>", line.trim_end());
    }
    // Boxes that a label must not cover: first the marks, then the labels that stand already.
    let mut taken: Vec<[f64; 4]> = points
        .iter()
        .map(|point| (to_x(point.x), to_y(point.y)))
        .map(|(x, y)| [x - 6.0, y - 6.0, x + 6.0, y + 6.0])
        .collect();
    for (index, point) in points.iter().enumerate() {
        let (x, y) = (to_x(point.x), to_y(point.y));
        if let Some((low, high)) = point.interval {
            let (low, high) = (to_y(low), to_y(high));
            draw!(svg, "<line class=\"whisker\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>");
        }
        let words = format!("{}: {}, {}", point.label, (x_axis.format)(point.x), (y_axis.format)(point.y));
        let class = series(index);
        draw!(
            svg,
            "<circle class=\"{class} mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5.5\"><title>{}</title></circle>",
            escape(&words)
        );
        let width = point.label.chars().count() as f64 * 6.7;
        let place = |dx: f64, dy: f64| [x + dx, y + dy - 10.0, x + dx + width, y + dy + 4.0];
        let candidates =
            [(10.0, 4.0), (-10.0 - width, 4.0), (8.0, -10.0), (8.0, 18.0), (-8.0 - width, -10.0), (-8.0 - width, 18.0)]
                .map(|(dx, dy)| place(dx, dy))
                .into_iter()
                .chain(
                    (2..9)
                        .flat_map(|n| [place(10.0, 4.0 - 14.0 * f64::from(n)), place(10.0, 4.0 + 14.0 * f64::from(n))]),
                );
        let free = |b: &[f64; 4]| {
            let inside = b[0] >= left && b[2] <= WIDTH && b[1] >= top - 12.0 && b[3] <= bottom;
            inside
                && taken
                    .iter()
                    .enumerate()
                    .all(|(other, t)| other == index || b[2] < t[0] || b[0] > t[2] || b[3] < t[1] || b[1] > t[3])
        };
        let label = candidates.into_iter().find(free).unwrap_or_else(|| place(10.0, 4.0));
        draw!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            label[0],
            label[3] - 4.0,
            escape(&point.label)
        );
        taken.push(label);
    }
    svg + "</svg>"
}

/// A small square of `cells × cells`, each filled by a share of 0 to 1: which keys (columns) a query (row) sees.
#[must_use]
pub fn pattern(title: &str, cells: usize, share: impl Fn(usize, usize) -> f64) -> String {
    let mut svg = format!(
        "<svg class=\"pattern\" viewBox=\"0 0 {cells} {cells}\" role=\"img\" aria-label=\"{0}\" \
         shape-rendering=\"crispEdges\"><title>{0}</title><rect class=\"unseen\" width=\"{cells}\" height=\"{cells}\"/>",
        escape(title)
    );
    for row in 0..cells {
        let mut start = 0;
        while start < cells {
            let value = share(row, start);
            let mut end = start + 1;
            while end < cells && (share(row, end) - value).abs() < 0.02 {
                end += 1;
            }
            if value > 0.0 {
                // What is seen in part must not vanish.
                let opacity = (0.25 + 0.75 * value).min(1.0);
                draw!(
                    svg,
                    "<rect class=\"seen\" x=\"{start}\" y=\"{row}\" width=\"{}\" height=\"1\" opacity=\"{opacity:.2}\"/>",
                    end - start
                );
            }
            start = end;
        }
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        let close = |got: &[f64], expected: &[f64]| {
            assert!(
                got.len() == expected.len() && got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9),
                "{got:?} is not {expected:?}"
            );
        };
        close(&ticks(0.0, 91.0, 5), &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        close(&ticks(0.861, 0.8667, 5), &[0.86, 0.862, 0.864, 0.866, 0.868]);
        close(&ticks(0.0, 1.0, 4), &[0.0, 0.25, 0.5, 0.75, 1.0]);
        for (low, high) in [(3.0, 3.0), (0.0, 0.0), (-2.0, 7.0), (1e-7, 3e-7), (1e9, 4e9)] {
            let ticks = ticks(low, high, 5);
            assert!(
                ticks[0] <= low && ticks[ticks.len() - 1] >= high && ticks.len() >= 2 && ticks.len() < 12,
                "{ticks:?}"
            );
        }
    }

    /// Every number of an attribute in the order of the drawing.
    fn numbers(svg: &str, element: &str, attribute: &str) -> Vec<f64> {
        svg.split(&format!("<{element} "))
            .skip(1)
            .filter_map(|part| part.split(&format!(" {attribute}=\"")).nth(1)?.split('"').next()?.parse().ok())
            .collect()
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let bars = [("before & after".to_owned(), vec![30.0, 10.0]), ("<b>".to_owned(), vec![10.0, 0.0])];
        let svg = stacked_bars("sizes", &["a", "b"], &bars, &|value| format!("{value} MB"));
        let widths = numbers(&svg, "rect", "width");
        assert_eq!(widths.len(), 3, "a segment of 0 is not drawn");
        assert!((widths[0] / widths[1] - 3.0).abs() < 0.01 && (widths[0] / widths[2] - 3.0).abs() < 0.01);
        assert!(svg.contains("before &amp; after") && svg.contains("&lt;b&gt;") && !svg.contains("<b>"));
        assert!(svg.contains(">40 MB</text>"));
    }

    #[test]
    fn columns_grow_from_the_base_line() {
        let categories = [("0".to_owned(), vec![Some(1.0), Some(2.0)]), ("1".to_owned(), vec![None, Some(4.0)])];
        let svg = columns("t", &["a", "b"], &categories, &Axis { title: "y", format: &|v| v.to_string() });
        let heights = numbers(&svg, "rect", "height");
        assert_eq!(heights.len(), 3);
        assert!((heights[1] / heights[0] - 2.0).abs() < 0.01 && (heights[2] / heights[0] - 4.0).abs() < 0.01);
    }

    #[test]
    fn labels_of_points_do_not_cover_each_other() {
        let point = |label: &str, x, y| Point { label: label.to_owned(), x, y, interval: Some((y - 0.01, y + 0.01)) };
        let points =
            [point("first model", 20.0, 0.866), point("second model", 20.5, 0.8662), point("third", 91.0, 0.867)];
        let number: Format<'_> = &|v| format!("{v:.3}");
        let svg =
            scatter("t", &points, &Axis { title: "MB", format: number }, &Axis { title: "q", format: number }, true);
        let names: Vec<(f64, f64)> = svg
            .split("<text class=\"name\" x=\"")
            .skip(1)
            .map(|part| {
                let mut values = part.split('"');
                (values.next().unwrap().parse().unwrap(), values.nth(1).unwrap().parse().unwrap())
            })
            .collect();
        assert_eq!(names.len(), 3);
        assert!((names[0].1 - names[1].1).abs() >= 13.0 || (names[0].0 - names[1].0).abs() > 70.0, "{names:?}");
        let xs = numbers(&svg, "circle", "cx");
        assert!(xs[2] > xs[1] && xs[1] > xs[0]);
        let ys = numbers(&svg, "circle", "cy");
        assert!(ys[2] < ys[0], "more is higher");
    }

    #[test]
    fn patterns_draw_what_is_seen() {
        let svg = pattern("p", 4, |query, key| if key <= query { 1.0 } else { 0.0 });
        assert_eq!(numbers(&svg, "rect", "y"), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(numbers(&svg, "rect", "width")[1..], [1.0, 2.0, 3.0, 4.0]);
    }
}
