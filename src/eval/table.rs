//! Columns of a user's file: tab-separated, comma-separated (RFC 4180) or one JSON object a line.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use super::{EvalError, fidelity::read_text};

/// A column that a task reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    /// What it is to the task; the name that `--column ROLE=NAME` uses.
    pub(super) role: &'static str,
    /// Names by which a header or an object's keys are recognised, in lower case without `_`, `-` and spaces.
    pub(super) names: &'static [&'static str],
    /// Whether a file without it is refused.
    pub(super) required: bool,
}

impl Column {
    pub(super) const fn required(role: &'static str, names: &'static [&'static str]) -> Self {
        Self { role, names, required: true }
    }

    pub(super) const fn optional(role: &'static str, names: &'static [&'static str]) -> Self {
        Self { role, names, required: false }
    }
}

/// What a task reads of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// The columns; a [`Row`] has its fields in this order.
    pub(super) columns: &'static [Column],
    /// Places of the columns in a file without a header, by the number of fields of its first line.
    pub(super) headerless: fn(usize) -> Option<&'static [usize]>,
}

/// Every role, for `--column`.
pub const ROLES: [&str; 9] =
    ["score", "sentence1", "sentence2", "text", "label", "id", "title", "query-id", "document-id"];

/// Names that the user gives to columns: the text of a header or a key, or a number counted from 1 in a file without
/// a header.
#[derive(Debug, Clone, Default)]
pub struct ColumnNames(BTreeMap<String, String>);

/// One `ROLE=NAME` of [`ColumnNames`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnName {
    role: String,
    name: String,
}

impl FromStr for ColumnName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (role, name) = text.split_once('=').ok_or_else(|| format!("`{text}` is not of the form ROLE=NAME"))?;
        if !ROLES.contains(&role) {
            return Err(format!("`{role}` is no role; {} are", ROLES.join(", ")));
        }
        if name.is_empty() {
            return Err(format!("`{text}` names no column"));
        }
        Ok(Self { role: role.to_owned(), name: name.to_owned() })
    }
}

impl FromIterator<ColumnName> for ColumnNames {
    fn from_iter<I: IntoIterator<Item = ColumnName>>(names: I) -> Self {
        Self(names.into_iter().map(|ColumnName { role, name }| (role, name)).collect())
    }
}

/// A record with the line that it starts on, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) line: usize,
    fields: Vec<Option<String>>,
}

impl Row {
    /// A field by its place in the layout; empty if an optional column is absent.
    pub(super) fn field(&self, index: usize) -> &str {
        self.fields[index].as_deref().unwrap_or_default()
    }
}

/// Reads the columns of `layout`. A file whose name ends in `.jsonl`, `.ndjson` or `.json`, or that starts with `{`, holds
/// an object a line; else its first line decides between tabs (no quoting) and commas (RFC 4180). Empty lines are
/// skipped.
///
/// # Errors
/// Naming the file, the line and the column.
pub(super) fn read(path: &Path, layout: &Layout, names: &ColumnNames) -> Result<Vec<Row>, EvalError> {
    let text = read_text(path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_ascii_lowercase();
    if ["jsonl", "ndjson", "json"].contains(&extension.as_str()) || text.trim_start().starts_with('{') {
        read_objects(path, text, layout, names)
    } else {
        read_separated(path, text, layout, names)
    }
}

/// A name without what spellings differ in.
fn plain(name: &str) -> String {
    name.trim().chars().filter(|char| !['_', '-', ' '].contains(char)).flat_map(char::to_lowercase).collect()
}

/// The place among `present` of each column; required ones that are absent are the error.
fn places(layout: &Layout, names: &ColumnNames, present: &[&str]) -> Result<Vec<Option<usize>>, String> {
    layout
        .columns
        .iter()
        .map(|column| {
            let place = match names.0.get(column.role) {
                Some(name) => present.iter().position(|field| field.trim() == name),
                // The first alias that occurs, so that the more exact names go first.
                None => column.names.iter().find_map(|name| present.iter().position(|field| plain(field) == *name)),
            };
            match (place, names.0.get(column.role)) {
                (None, Some(name)) => Err(format!("no column `{name}` among {}", present.join(", "))),
                (None, None) if column.required => Err(format!(
                    "no column for the {role} among `{present}`; name it with --column {role}=NAME",
                    role = column.role,
                    present = present.join("`, `")
                )),
                (place, _) => Ok(place),
            }
        })
        .collect()
}

/// Whether a field is the name of a column. Single letters say nothing: they are as likely labels, or texts.
fn names_any(layout: &Layout, present: &[&str]) -> bool {
    let mut names = layout.columns.iter().flat_map(|column| column.names).filter(|name| name.len() > 1);
    names.any(|name| present.iter().any(|field| plain(field) == *name))
}

/// Places given as numbers, when every required column of the file has one.
fn numbered(layout: &Layout, names: &ColumnNames) -> Option<Vec<Option<usize>>> {
    let number = |column: &Column| names.0.get(column.role)?.parse::<usize>().ok()?.checked_sub(1);
    let places: Vec<_> = layout.columns.iter().map(number).collect();
    let complete = layout.columns.iter().zip(&places).all(|(column, place)| place.is_some() || !column.required);
    complete.then_some(places)
}

/// A field that must be a number.
pub(super) fn number(path: &Path, row: &Row, index: usize, what: &str) -> Result<f64, EvalError> {
    row.field(index).parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| {
        let header = if row.line == 1 { "; a header that names no column by a known name needs --column" } else { "" };
        let reason = format!("the {what} `{}` is not a number{header}", row.field(index));
        EvalError::Line { path: path.to_owned(), line: row.line, reason }
    })
}

fn read_separated(path: &Path, text: &str, layout: &Layout, names: &ColumnNames) -> Result<Vec<Row>, EvalError> {
    /// A record of its own after the text; it is swallowed by a quote that stays open.
    const END: &str = "\u{0}end";
    let tabs = text.lines().find(|line| !line.trim().is_empty()).is_some_and(|line| line.contains('\t'));
    let whole = format!("{text}\n{END}\n");
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(if tabs { b'\t' } else { b',' })
        .quoting(!tabs)
        .from_reader(whole.as_bytes());
    let (mut line, mut offset) = (1, 0);
    let mut columns: Option<Vec<Option<usize>>> = None;
    let mut rows = Vec::new();
    for record in reader.records() {
        let wrong = |line, reason| EvalError::Line { path: path.to_owned(), line, reason };
        let record = record.map_err(|error| wrong(line, error.to_string()))?;
        // The reader's position is before the empty lines that it skips.
        let start = record.position().map_or(offset, |position| usize::try_from(position.byte()).unwrap_or(offset));
        let start = start + whole.as_bytes()[start..].iter().take_while(|byte| b"\r\n".contains(byte)).count();
        line += whole.as_bytes()[offset..start].iter().filter(|byte| **byte == b'\n').count();
        offset = start;
        if record.len() == 1 && &record[0] == END {
            break;
        }
        if record.iter().any(|field| field.ends_with(&format!("\n{END}\n")) || field.ends_with(&format!("\n{END}"))) {
            return Err(wrong(line, "a quote is not closed".to_owned()));
        }
        if record.iter().all(|field| field.trim().is_empty()) {
            continue;
        }
        let columns = match &columns {
            Some(columns) => columns,
            None => {
                let present: Vec<&str> = record.iter().collect();
                if let Some(places) = numbered(layout, names) {
                    columns.insert(places)
                } else {
                    match places(layout, names, &present) {
                        Ok(places) => {
                            columns = Some(places);
                            continue;
                        }
                        Err(reason) => {
                            let named = layout.columns.iter().any(|column| names.0.contains_key(column.role));
                            // A line that has the name of one column is a header, and not a row of the table.
                            let header = names_any(layout, &present);
                            match (layout.headerless)(record.len()) {
                                Some(places) if !named && !header => columns.insert(
                                    (0..layout.columns.len()).map(|column| places.get(column).copied()).collect(),
                                ),
                                Some(_) if !named => {
                                    let hint = "; if that is no header, give every column its number";
                                    return Err(wrong(line, reason + hint));
                                }
                                _ => return Err(wrong(line, reason)),
                            }
                        }
                    }
                }
            }
        };
        let fields = columns
            .iter()
            .zip(layout.columns)
            .map(|(place, column)| match place.map(|place| (place, record.get(place))) {
                None => Ok(None),
                Some((_, Some(field))) => Ok(Some(field.trim().to_owned())),
                Some((place, None)) => Err(wrong(
                    line,
                    format!("{} columns, the {} would be number {}", record.len(), column.role, place + 1),
                )),
            })
            .collect::<Result<_, _>>()?;
        rows.push(Row { line, fields });
    }
    Ok(rows)
}

fn read_objects(path: &Path, text: &str, layout: &Layout, names: &ColumnNames) -> Result<Vec<Row>, EvalError> {
    use serde_json::{Map, Value};
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |reason| EvalError::Line { path: path.to_owned(), line: index + 1, reason };
        let object: Map<String, Value> =
            serde_json::from_str(line).map_err(|error| wrong(format!("not a JSON object: {error}")))?;
        let keys: Vec<&str> = object.keys().map(String::as_str).collect();
        let fields = places(layout, names, &keys)
            .map_err(wrong)?
            .into_iter()
            .map(|place| {
                place.map_or(Ok(None), |place| match &object[keys[place]] {
                    Value::Null => Ok(None),
                    Value::String(text) => Ok(Some(text.trim().to_owned())),
                    value @ (Value::Number(_) | Value::Bool(_)) => Ok(Some(value.to_string())),
                    _ => Err(wrong(format!("`{}` is neither text nor a number", keys[place]))),
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if let Some((column, _)) = layout.columns.iter().zip(&fields).find(|(c, field)| c.required && field.is_none()) {
            return Err(wrong(format!("the {} is null", column.role)));
        }
        rows.push(Row { line: index + 1, fields });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        columns: &[
            Column::required("text", &["text", "sentence"]),
            Column::required("label", &["label"]),
            Column::optional("title", &["title"]),
        ],
        headerless: |n_fields| (n_fields == 2).then_some(&[1, 0]),
    };

    fn read_as(file: &str, text: &str, names: &[&str]) -> Result<Vec<(usize, String, String)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        std::fs::write(&path, text).unwrap();
        let names = names.iter().map(|name| name.parse().unwrap()).collect();
        let rows = read(&path, &LAYOUT, &names).map_err(|error| error.to_string())?;
        Ok(rows.iter().map(|row| (row.line, row.field(0).to_owned(), row.field(1).to_owned())).collect())
    }

    fn row(line: usize, text: &str, label: &str) -> (usize, String, String) {
        (line, text.to_owned(), label.to_owned())
    }

    #[test]
    fn every_form_gives_the_same_rows() {
        let expected = Ok(vec![row(2, "a \"b\", c", "x"), row(3, "d", "y")]);
        assert_eq!(read_as("f.tsv", "label\tsentence\nx\ta \"b\", c\ny\td\n", &[]), expected);
        assert_eq!(read_as("f.csv", "\u{feff}Text,LABEL\r\n\"a \"\"b\"\", c\",x\r\nd,y\r\n", &[]), expected);
        let objects =
            "\n{\"text\": \"a \\\"b\\\", c\", \"label\": \"x\", \"more\": []}\n{\"label\": \"y\", \"text\": \"d\"}";
        assert_eq!(read_as("f.jsonl", objects, &[]), expected);
        assert_eq!(read_as("f", objects, &[]), expected);
        // Without a header, by the layout's places or by the user's.
        assert_eq!(read_as("f.tsv", "x\ta\n", &[]), Ok(vec![row(1, "a", "x")]));
        assert_eq!(read_as("f.csv", "q,x,a\n", &["text=3", "label=2"]), Ok(vec![row(1, "a", "x")]));
        let named = read_as("f.csv", "class,text,content\nx,no,yes\n", &["text=content", "label=class"]);
        assert_eq!(named, Ok(vec![row(2, "yes", "x")]));
    }

    #[test]
    fn lines_are_counted_through_quotes_and_empty_lines() {
        let rows = read_as("f.csv", "text,label\n\n\"two\nlines\",x\r\n\r\n\nb,y", &[]).unwrap();
        assert_eq!(rows, [row(3, "two\nlines", "x"), row(7, "b", "y")]);
    }

    #[test]
    fn errors_name_line_and_column() {
        let error = |file: &str, text: &str, names: &[&str]| read_as(file, text, names).unwrap_err();
        assert!(error("f.csv", "text,label\na,x\n\"b,y\nc,z\n", &[]).ends_with("f.csv:3: a quote is not closed"));
        assert!(error("f.tsv", "text\tlabel\na\n", &[]).ends_with(":2: 1 columns, the label would be number 2"));
        // Half of a header is one all the same.
        let half = error("f.csv", "Label,message\nx,a\ny,b\n", &[]);
        assert!(half.contains(":1: no column for the text among `Label`, `message`"), "{half}");
        assert!(half.ends_with("if that is no header, give every column its number"), "{half}");
        assert_eq!(read_as("f.csv", "label,a\n", &["label=1", "text=2"]), Ok(vec![row(1, "a", "label")]));
        assert!(error("f.tsv", "text\tclass\tx\n", &[]).contains(":1: no column for the label among `text`, `class`"));
        assert!(error("f.tsv", "text\tclass\n", &["label=kind"]).ends_with(":1: no column `kind` among text, class"));
        assert!(error("f.jsonl", "{\"text\": \"a\"}\n", &[]).contains(":1: no column for the label"));
        assert!(error("f.jsonl", "{\"text\": null, \"label\": 1}\n", &[]).ends_with(":1: the text is null"));
        assert!(error("f.jsonl", "{\"text\": [], \"label\": 1}\n", &[]).contains("neither text nor a number"));
        assert!(error("f.jsonl", "\n[1]\n", &[]).contains(":2: not a JSON object"));
        assert!("size=x".parse::<ColumnName>().unwrap_err().contains("`size` is no role"));
        assert!("text=".parse::<ColumnName>().is_err() && "text".parse::<ColumnName>().is_err());
    }
}
