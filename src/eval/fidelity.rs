//! How close a model's embeddings are to another model's, text by text.

use std::path::Path;

use super::EvalError;
use super::embed::{Embeddings, Encode, embed};
use super::stats::{Difference, N_RESAMPLES, mean_of, paired_difference, quantile};
use crate::model::Forward;

/// Cosines between two models' embeddings of the same texts.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Fidelity {
    /// Texts.
    pub n_texts: usize,
    /// Mean.
    pub mean: f64,
    /// First percentile: what the mean hides.
    pub p1: f64,
    /// The worst text.
    pub min: f64,
    #[serde(skip)]
    cosines: Vec<f64>,
}

impl Fidelity {
    /// How much the mean cosine is above another model's to the same reference on the same texts.
    ///
    /// # Panics
    /// If one of the two was measured on other texts.
    #[must_use]
    pub fn difference(&self, other: &Self, seed: u64) -> Difference {
        assert_eq!(self.n_texts, other.n_texts, "a difference needs the same texts");
        paired_difference(
            self.n_texts,
            N_RESAMPLES,
            seed,
            |sample| mean_of(&self.cosines, sample),
            |sample| mean_of(&other.cosines, sample),
        )
    }
}

/// Reads a file of text.
///
/// # Errors
/// If it cannot be read or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String, EvalError> {
    let bytes = std::fs::read(path).map_err(|source| EvalError::Io { path: path.to_owned(), source })?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count();
        EvalError::NotText { path: path.to_owned(), line, offset }
    })
}

/// Reads one text a line; empty lines are skipped. A line that is a JSON string stands for that string, so that texts
/// may hold line breaks.
///
/// # Errors
/// If the file cannot be read, is not UTF-8, or holds no text.
pub fn read_lines(path: &Path) -> Result<Vec<String>, EvalError> {
    lines_of(&read_text(path)?, path)
}

/// The same of a text that was read from `path` already.
///
/// # Errors
/// If it holds no text.
pub fn lines_of(text: &str, path: &Path) -> Result<Vec<String>, EvalError> {
    let lines: Vec<String> = text
        .lines()
        .map(str::trim)
        .map(|line| serde_json::from_str::<String>(line).unwrap_or_else(|_| line.to_owned()))
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        return Err(EvalError::TooFew { path: path.to_owned(), got: 0, needed: 1 });
    }
    Ok(lines)
}

/// Measures embeddings that exist already.
///
/// # Errors
/// If the widths differ.
///
/// # Panics
/// If the numbers of rows differ or are 0.
pub fn compare(reference: &Embeddings, model: &Embeddings) -> Result<Fidelity, EvalError> {
    assert!(reference.len() == model.len() && !model.is_empty(), "the same texts on both sides");
    if reference.width() != model.width() {
        return Err(EvalError::Widths(reference.width(), model.width()));
    }
    let cosines: Vec<f64> = (0..model.len()).map(|index| reference.cosine(index, model, index)).collect();
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let mut sorted = cosines.clone();
    sorted.sort_by(f64::total_cmp);
    Ok(Fidelity { n_texts: cosines.len(), mean, p1: quantile(&sorted, 0.01), min: sorted[0], cosines })
}

/// Embeds `texts` with both models and compares.
///
/// # Errors
/// If a tokenizer or model fails, or the widths differ.
#[allow(clippy::needless_pass_by_value, reason = "a model and its tokenizer are borrowed as a pair")]
pub fn fidelity(
    reference: (&mut dyn Forward, &Encode<'_>),
    model: (&mut dyn Forward, &Encode<'_>),
    texts: &[&str],
    mut progress: impl FnMut(usize),
) -> Result<Fidelity, EvalError> {
    let expected = embed(reference.0, reference.1, texts, &mut progress)?;
    let got = embed(model.0, model.1, texts, &mut progress)?;
    compare(&expected, &got)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_be_plain_or_json_strings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("texts");
        std::fs::write(&path, "plain text\n\n\"two\\nlines\"\n\"not closed\n").unwrap();
        assert_eq!(read_lines(&path).unwrap(), ["plain text", "two\nlines", "\"not closed"]);
        std::fs::write(&path, b"ok\n\xff\n").unwrap();
        assert!(matches!(read_lines(&path), Err(EvalError::NotText { offset: 3, line: 2, .. })));
        std::fs::write(&path, " \n\n").unwrap();
        assert!(matches!(read_lines(&path), Err(EvalError::TooFew { got: 0, .. })));
        assert!(matches!(read_lines(&dir.path().join("missing")), Err(EvalError::Io { .. })));
    }
}
