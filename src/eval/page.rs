//! A page that stands alone: tables and charts in one HTML file, without scripts and without anything from a network.

use std::fmt::Write;

/// Colours for series; more series start again.
pub(super) const N_SERIES: usize = 8;

/// Text as HTML and SVG need it.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            char => escaped.push(char),
        }
    }
    escaped
}

const STYLE: &str = "
:root { color-scheme: light dark; --ground: #f6f7f8; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #e2e6ea;
  --s0: #2f6fde; --s1: #e07b1a; --s2: #12917f; --s3: #c2487f; --s4: #7a5cd6; --s5: #8a929c; --s6: #9a7d12; --s7: #3f9fcf; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #111417; --card: #191d21; --ink: #e6eaee; --soft: #98a3ae; --line: #2c333a;
    --s0: #5b93f5; --s1: #f09440; --s2: #2fb8a3; --s3: #e0729f; --s4: #9d86ee; --s5: #7f8994; --s6: #c9a93a; --s7: #62b8e3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace; font-size: 13px; }
pre { margin: 10px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.figure b { display: block; font-size: 23px; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; white-space: nowrap; }
.figure span { color: var(--soft); font-size: 13px; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; margin-top: 8px; }
th, td { text-align: right; padding: 6px 0 6px 16px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text, th.text { text-align: left; }
.total td { font-weight: 650; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin: 6px 0 4px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg text { fill: var(--ink); } svg .tick, svg .axis { fill: var(--soft); font-size: 12px; }
svg .value { font-weight: 650; } svg .grid { stroke: var(--line); } svg .base { stroke: var(--soft); stroke-width: 1; }
svg .segment { stroke: var(--card); stroke-width: 1.5; } svg .mark { stroke: var(--card); stroke-width: 2; }
svg .whisker { stroke: var(--soft); stroke-width: 1.5; opacity: 0.6; }
svg .path { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 3 4; }
.patterns { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 14px; margin-top: 10px; }
.patterns figure { margin: 0; } .patterns figcaption { font-size: 12px; color: var(--soft); line-height: 1.35; margin-top: 5px; }
svg.pattern { border: 1px solid var(--line); border-radius: 4px; margin: 0; } svg .unseen { fill: var(--ground); } svg .seen { fill: var(--s0); }
footer { color: var(--soft); font-size: 13px; margin-top: 20px; }
@media print { body { background: none; } section, .figure { break-inside: avoid; } }
";

/// A page under construction.
#[derive(Debug, Clone)]
pub struct Page {
    body: String,
    title: String,
}

/// A cell of a table: text to the left or a number to the right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A number as it is written.
    Number(String),
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A number, or a dash where there is none.
    pub fn number(number: Option<String>) -> Self {
        Self::Number(number.unwrap_or_else(|| "–".to_owned()))
    }
}

impl Page {
    /// Starts with a title and a line about it.
    #[must_use]
    pub fn new(title: &str, about: &str) -> Self {
        let body = format!("<h1>{}</h1>\n<p>{}</p>\n", escape(title), escape(about));
        Self { body, title: title.to_owned() }
    }

    /// The most important numbers side by side, with what they are.
    pub fn figures(&mut self, figures: &[(String, String)]) {
        self.body.push_str("<div class=\"figures\">");
        for (number, what) in figures {
            let (number, what) = (escape(number), escape(what));
            write!(self.body, "<div class=\"figure\"><b>{number}</b><span>{what}</span></div>")
                .expect("writing to a String cannot fail");
        }
        self.body.push_str("</div>\n");
    }

    /// A section with a heading, a sentence about it, and content that is HTML already.
    pub fn section(&mut self, heading: &str, about: &str, content: &str) {
        let about = if about.is_empty() { String::new() } else { format!("<p>{}</p>", escape(about)) };
        writeln!(self.body, "<section><h2>{}</h2>{about}{content}</section>", escape(heading))
            .expect("writing to a String cannot fail");
    }

    /// The whole file.
    #[must_use]
    pub fn finish(self, footer: &str) -> String {
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\"><title>{}</title>\n<style>{STYLE}{}</style></head>\n\
             <body><main>\n{}<footer>{}</footer>\n</main></body></html>\n",
            escape(&self.title),
            (0..N_SERIES)
                .map(|i| format!(".s{i} {{ fill: var(--s{i}); background: var(--s{i}); }}\n"))
                .collect::<String>(),
            self.body,
            escape(footer)
        )
    }
}

/// The colours of series by name.
#[must_use]
pub fn legend(names: &[&str]) -> String {
    let entries: String = names
        .iter()
        .enumerate()
        .map(|(index, name)| format!("<span><i class=\"s{}\"></i>{}</span>", index % N_SERIES, escape(name)))
        .collect();
    format!("<div class=\"legend\">{entries}</div>")
}

/// A table; `total` marks the last row as a sum.
#[must_use]
pub fn table(head: &[&str], rows: &[Vec<Cell>], total: bool) -> String {
    let text_column = |column: usize| rows.first().is_some_and(|row| matches!(row.get(column), Some(Cell::Text(_))));
    let mut html = String::from("<div class=\"scroll\"><table><thead><tr>");
    for (column, name) in head.iter().enumerate() {
        let class = if text_column(column) { " class=\"text\"" } else { "" };
        write!(html, "<th{class}>{}</th>", escape(name)).expect("writing to a String cannot fail");
    }
    html.push_str("</tr></thead><tbody>");
    for (index, row) in rows.iter().enumerate() {
        html.push_str(if total && index + 1 == rows.len() { "<tr class=\"total\">" } else { "<tr>" });
        for cell in row {
            let (class, text) = match cell {
                Cell::Text(text) => (" class=\"text\"", text),
                Cell::Number(text) => ("", text),
            };
            write!(html, "<td{class}>{}</td>", escape(text)).expect("writing to a String cannot fail");
        }
        html.push_str("</tr>");
    }
    html + "</tbody></table></div>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_stands_alone_and_escapes_what_it_shows() {
        let mut page = Page::new("a <model>", "x & y");
        page.figures(&[("20 MB".into(), "\"size\"".into())]);
        page.section("h", "", &table(&["m", "n"], &[vec![Cell::text("<i>"), Cell::number(None)]], true));
        let html = page.finish("made by");
        assert!(html.contains("<title>a &lt;model&gt;</title>") && html.contains("&lt;i&gt;") && !html.contains("<i>"));
        assert!(html.contains("x &amp; y") && html.contains("&quot;size&quot;") && html.contains("<td>–</td>"));
        for outside in ["http:", "https:", "src=", "href=", "<script", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert_eq!(html.matches("<section").count(), html.matches("</section>").count());
    }
}
