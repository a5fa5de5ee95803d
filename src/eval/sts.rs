//! Semantic textual similarity: does the cosine of two sentences' embeddings order pairs as people do?

use std::path::Path;

use super::EvalError;
use super::embed::{Encode, embed};
use super::stats::{Difference, Interval, N_RESAMPLES, bootstrap, paired_difference, spearman, spearman_of};
use super::table::{self, Column, ColumnNames, Layout};
use crate::model::Forward;

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
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Sts {
    /// Pairs.
    pub n_pairs: usize,
    /// Spearman's rank correlation of cosine and score, in −1..=1.
    pub spearman: f64,
    /// Its 95 % interval by bootstrap over pairs.
    pub interval: Interval,
    #[serde(skip)]
    similarities: Vec<f64>,
}

/// STS-B has genre, file, year, id, score and the sentences.
const LAYOUT: Layout = Layout {
    columns: &[
        Column::required("score", &["score", "similarityscore", "relatednessscore", "similarity", "label"]),
        Column::required("sentence1", &["sentence1", "sentencea", "text1", "s1", "a"]),
        Column::required("sentence2", &["sentence2", "sentenceb", "text2", "s2", "b"]),
    ],
    headerless: |n_fields| match n_fields {
        7.. => Some(&[4, 5, 6]),
        3..=6 => Some(&[0, 1, 2]),
        _ => None,
    },
};

/// Reads pairs from a file of tab-separated or comma-separated columns or of JSON objects. The columns are found by a
/// header naming `score`, `sentence1` and `sentence2` (or as `names` says); without a header they are STS-B's (genre,
/// file, year, id, score, sentence1, sentence2, …) or `score, sentence1, sentence2`.
///
/// # Errors
/// Naming the line that does not have them.
pub fn read_pairs(path: &Path, names: &ColumnNames) -> Result<Vec<Pair>, EvalError> {
    let rows = table::read(path, &LAYOUT, names)?;
    let pairs = rows
        .iter()
        .map(|row| {
            let score = table::number(path, row, 0, "score")?;
            Ok(Pair { score, first: row.field(1).to_owned(), second: row.field(2).to_owned() })
        })
        .collect::<Result<Vec<_>, EvalError>>()?;
    if pairs.len() < 2 {
        return Err(EvalError::TooFew { path: path.to_owned(), got: pairs.len(), needed: 2 });
    }
    Ok(pairs)
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
    let gold = gold(pairs);
    let interval = bootstrap(pairs.len(), N_RESAMPLES, seed, |sample| spearman_of(&similarities, &gold, sample));
    Ok(Sts { n_pairs: pairs.len(), spearman: spearman(&similarities, &gold), interval, similarities })
}

fn gold(pairs: &[Pair]) -> Vec<f64> {
    pairs.iter().map(|pair| pair.score).collect()
}

impl Sts {
    /// How much this correlation is above another model's on the same pairs.
    ///
    /// # Panics
    /// If one of the two was measured on other pairs.
    #[must_use]
    pub fn difference(&self, other: &Self, pairs: &[Pair], seed: u64) -> Difference {
        assert!(self.n_pairs == pairs.len() && other.n_pairs == pairs.len(), "a difference needs the same pairs");
        let gold = gold(pairs);
        paired_difference(
            pairs.len(),
            N_RESAMPLES,
            seed,
            |sample| spearman_of(&self.similarities, &gold, sample),
            |sample| spearman_of(&other.similarities, &gold, sample),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Pair>, EvalError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs");
        std::fs::write(&path, text).unwrap();
        read_pairs(&path, &ColumnNames::default())
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
            "{\"score\": 5, \"sentence1\": \"A \\\"man\\\" runs, fast.\", \"sentence2\": \"A man.\"}\n\
             {\"sentence2\": \"c\", \"score\": \"0.25\", \"sentence1\": \"b\"}\n",
            "sentence1,sentence2,score\n\"A \"\"man\"\" runs, fast.\",A man.,5\nb,c,0.25\n",
        ] {
            assert_eq!(read(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn names_the_line_that_is_wrong() {
        let error = |text: &str| read(text).unwrap_err().to_string();
        assert!(error("1\ta\tb\nx\ta\tb\n").ends_with(":2: the score `x` is not a number"));
        assert!(error("1\ta\tb\n2\ta\n").ends_with(":2: 2 columns, the sentence2 would be number 3"));
        assert!(error("1,\"a,b\n2,a,b\n").ends_with(":1: a quote is not closed"));
        assert!(error("").ends_with("0 usable lines, at least 2 are needed"));
        assert!(error("1\ta\tb\nNaN\ta\tb\n").contains("`NaN` is not a number"));
    }
}
