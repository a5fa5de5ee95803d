//! Semantic textual similarity: does the cosine of two sentences' embeddings order pairs as people do?

use std::path::Path;

use super::embed::{Encode, embed};
use super::stats::{Interval, bootstrap, spearman};
use super::{EvalError, fidelity};
use crate::model::Forward;

/// Resamples of the confidence interval.
const N_RESAMPLES: usize = 1_000;

/// Two sentences and the similarity that people gave them.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Any scale; only the order matters.
    pub score: f64,
    /// First sentence.
    pub first: String,
    /// Second sentence.
    pub second: String,
}

/// Result of [`sts`].
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Sts {
    /// Pairs.
    pub n_pairs: usize,
    /// Spearman's rank correlation of cosine and score, in −1..=1.
    pub spearman: f64,
    /// Its 95 % interval by bootstrap over pairs.
    pub interval: Interval,
}

/// Where a line's columns are.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Columns {
    score: usize,
    first: usize,
    second: usize,
}

/// Reads pairs from a file of tab-separated columns, or of comma-separated ones (RFC 4180 quotes) if its first line
/// has no tab. The columns are found by a header naming `score`, `sentence1` and `sentence2`; without a header they are
/// STS-B's (genre, file, year, id, score, sentence1, sentence2, …) or `score, sentence1, sentence2`.
///
/// # Errors
/// Naming the line that does not have them.
pub fn read_pairs(path: &Path) -> Result<Vec<Pair>, EvalError> {
    let text = fidelity::read_text(path)?;
    let separator = if text.lines().next().is_some_and(|line| line.contains('\t')) { '\t' } else { ',' };
    let mut columns = None;
    let mut pairs = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |reason: String| EvalError::Line { path: path.to_owned(), line: index + 1, reason };
        let fields = split(line, separator).ok_or_else(|| wrong("a quote is not closed".to_owned()))?;
        let columns = match columns {
            Some(columns) => columns,
            None => {
                if let Some(header) = header(&fields) {
                    columns = Some(header);
                    continue;
                }
                *columns.insert(if fields.len() >= 7 {
                    Columns { score: 4, first: 5, second: 6 }
                } else {
                    Columns { score: 0, first: 1, second: 2 }
                })
            }
        };
        let field = |at: usize, name: &str| {
            fields
                .get(at)
                .map(|field| field.trim())
                .ok_or_else(|| wrong(format!("{} columns, the {name} would be number {}", fields.len(), at + 1)))
        };
        let score = field(columns.score, "score")?;
        let score = score
            .parse()
            .ok()
            .filter(|score: &f64| score.is_finite())
            .ok_or_else(|| wrong(format!("the score `{score}` is not a number")))?;
        let (first, second) = (field(columns.first, "first sentence")?, field(columns.second, "second sentence")?);
        pairs.push(Pair { score, first: first.to_owned(), second: second.to_owned() });
    }
    if pairs.len() < 2 {
        return Err(EvalError::TooFew { path: path.to_owned(), got: pairs.len(), needed: 2 });
    }
    Ok(pairs)
}

fn header(fields: &[String]) -> Option<Columns> {
    let find = |names: &[&str]| {
        fields.iter().position(|field| names.contains(&field.trim().to_ascii_lowercase().replace('_', "").as_str()))
    };
    Some(Columns {
        score: find(&["score", "similarityscore", "label"])?,
        first: find(&["sentence1", "text1", "s1", "a"])?,
        second: find(&["sentence2", "text2", "s2", "b"])?,
    })
}

/// Fields of a line; `None` if a quote stays open. Tab-separated files have no quoting.
fn split(line: &str, separator: char) -> Option<Vec<String>> {
    if separator == '\t' {
        return Some(line.split('\t').map(str::to_owned).collect());
    }
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        let field = fields.last_mut().expect("starts with one field and only grows");
        match char {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            char if char == separator && !quoted => fields.push(String::new()),
            char => field.push(char),
        }
    }
    (!quoted).then_some(fields)
}

/// The cosine of each pair's embeddings.
///
/// # Errors
/// If the tokenizer or the model fails.
pub fn sts_similarities(
    model: &mut dyn Forward,
    encode: &Encode<'_>,
    pairs: &[Pair],
    progress: impl FnMut(usize),
) -> Result<Vec<f64>, EvalError> {
    let texts: Vec<&str> = pairs.iter().flat_map(|pair| [pair.first.as_str(), pair.second.as_str()]).collect();
    let rows = embed(model, encode, &texts, progress)?;
    Ok((0..pairs.len()).map(|pair| rows.cosine(2 * pair, &rows, 2 * pair + 1)).collect())
}

/// Measures `model` on `pairs`.
///
/// # Errors
/// If the tokenizer or the model fails.
pub fn sts(
    model: &mut dyn Forward,
    encode: &Encode<'_>,
    pairs: &[Pair],
    seed: u64,
    progress: impl FnMut(usize),
) -> Result<Sts, EvalError> {
    let similarities = sts_similarities(model, encode, pairs, progress)?;
    let gold: Vec<f64> = pairs.iter().map(|pair| pair.score).collect();
    let interval = bootstrap(pairs.len(), N_RESAMPLES, seed, |sample| {
        let pick = |values: &[f64]| sample.iter().map(|&index| values[index]).collect::<Vec<_>>();
        spearman(&pick(&similarities), &pick(&gold))
    });
    Ok(Sts { n_pairs: pairs.len(), spearman: spearman(&similarities, &gold), interval })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Pair>, EvalError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs");
        std::fs::write(&path, text).unwrap();
        read_pairs(&path)
    }

    #[test]
    fn reads_every_layout() {
        let expected = [
            Pair { score: 5.0, first: "A \"man\" runs, fast.".into(), second: "A man.".into() },
            Pair { score: 0.25, first: "b".into(), second: "c".into() },
        ];
        for text in [
            "main\tx\t2012\t0\t5.000\tA \"man\" runs, fast.\tA man.\tlicence\nmain\tx\t2012\t1\t0.25\tb\tc\n",
            "5\tA \"man\" runs, fast.\tA man.\n\n0.25\tb\tc",
            "5,\"A \"\"man\"\" runs, fast.\",A man.\n0.25,b,c\n",
            "sentence1,sentence2,score\n\"A \"\"man\"\" runs, fast.\",A man.,5\nb,c,0.25\n",
        ] {
            assert_eq!(read(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn names_the_line_that_is_wrong() {
        let error = |text: &str| read(text).unwrap_err().to_string();
        assert!(error("1\ta\tb\nx\ta\tb\n").ends_with(":2: the score `x` is not a number"));
        assert!(error("1\ta\tb\n2\ta\n").ends_with(":2: 2 columns, the second sentence would be number 3"));
        assert!(error("1,\"a,b\n2,a,b\n").ends_with(":1: a quote is not closed"));
        assert!(error("").ends_with("0 usable lines, at least 2 are needed"));
        assert!(error("1\ta\tb\nNaN\ta\tb\n").contains("`NaN` is not a number"));
    }
}
