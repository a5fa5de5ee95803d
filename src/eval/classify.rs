//! Classification: how much of a labelling can be read off the embeddings by a linear probe?

use std::collections::BTreeSet;
use std::path::Path;

use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};

use super::EvalError;
use super::embed::{Embeddings, Encode, embed};
use super::logistic::{Examples, fit};
use super::stats::{Difference, Interval, N_RESAMPLES, bootstrap, paired_difference};
use super::table::{self, Column, ColumnNames, Layout, Row};
use crate::model::Forward;

/// Texts with their classes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Labelled {
    texts: Vec<String>,
    classes: Vec<usize>,
}

/// A training set and a test set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassificationTask {
    /// Names of the classes, in the order of their numbers.
    classes: Vec<String>,
    train: Labelled,
    test: Labelled,
}

/// Result of [`classify`].
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Classification {
    /// Texts that the probe was fitted on.
    pub n_train: usize,
    /// Texts that it was tested on.
    pub n_test: usize,
    /// Classes.
    pub n_classes: usize,
    /// Weight of the regularisation.
    pub l2: f64,
    /// Iterations that the solver took.
    pub iterations: usize,
    /// Share of the test texts whose class is right.
    pub accuracy: f64,
    /// Its 95 % interval by bootstrap over test texts.
    pub accuracy_interval: Interval,
    /// Unweighted mean of the classes' F1.
    pub macro_f1: f64,
    /// Its 95 % interval by bootstrap over test texts.
    pub macro_f1_interval: Interval,
    #[serde(skip)]
    predictions: Vec<usize>,
}

const LAYOUT: Layout = Layout {
    columns: &[
        Column::required("label", &["label", "labels", "class", "category", "target", "y"]),
        Column::required("text", &["text", "sentence", "content", "review", "question", "tweet", "utterance"]),
    ],
    headerless: |n_fields| (n_fields == 2).then_some(&[0, 1]),
};

impl ClassificationTask {
    /// Reads both files: a label and a text a line, in that order where there is no header. At most `max_train` texts
    /// of the training set are used, drawn by `seed`, one of every class among them.
    ///
    /// # Errors
    /// Naming the line that is wrong, and a label of the test set that the training set lacks.
    pub fn read(
        train_path: &Path,
        test_path: &Path,
        names: &ColumnNames,
        max_train: Option<usize>,
        seed: u64,
    ) -> Result<Self, EvalError> {
        let mut rows = table::read(train_path, &LAYOUT, names)?;
        rows.retain(|row| !row.field(1).is_empty());
        let mut classes: Vec<String> = rows.iter().map(|row| row.field(0).to_owned()).collect();
        classes.sort_unstable();
        classes.dedup();
        if classes.len() < 2 {
            let reason = format!("{} classes in the column of labels, at least 2 are needed", classes.len());
            let line = rows.first().map_or(1, |row| row.line);
            return Err(EvalError::Line { path: train_path.to_owned(), line, reason });
        }
        if let Some(max) = max_train.filter(|max| *max < rows.len()) {
            if max < classes.len() {
                return Err(EvalError::Draw { path: train_path.to_owned(), max, n_classes: classes.len() });
            }
            rows = draw(rows, max, seed);
        }
        let number = |label: &str| classes.binary_search_by(|class| class.as_str().cmp(label));
        let mut train = Labelled::default();
        for row in &rows {
            train.texts.push(row.field(1).to_owned());
            train.classes.push(number(row.field(0)).expect("the classes are these rows' labels"));
        }
        let mut test = Labelled::default();
        for row in table::read(test_path, &LAYOUT, names)?.iter().filter(|row| !row.field(1).is_empty()) {
            let class = number(row.field(0)).map_err(|_| EvalError::Line {
                path: test_path.to_owned(),
                line: row.line,
                reason: format!("the label `{}` does not occur in {}", row.field(0), train_path.display()),
            })?;
            test.texts.push(row.field(1).to_owned());
            test.classes.push(class);
        }
        if test.texts.len() < 2 {
            return Err(EvalError::TooFew { path: test_path.to_owned(), got: test.texts.len(), needed: 2 });
        }
        Ok(Self { classes, train, test })
    }

    /// All texts, those of the training set first.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.train.texts.iter().chain(&self.test.texts).map(String::as_str)
    }
}

/// `max` of the rows at random, among them one of every class; in the order of the file.
fn draw(mut rows: Vec<Row>, max: usize, seed: u64) -> Vec<Row> {
    rows.shuffle(&mut StdRng::seed_from_u64(seed));
    let mut seen = BTreeSet::new();
    let firsts: Vec<bool> = rows.iter().map(|row| seen.insert(row.field(0).to_owned())).collect();
    let mut others_left = max.saturating_sub(seen.len());
    let mut firsts = firsts.into_iter();
    rows.retain(|_| {
        let first = firsts.next().unwrap_or_default();
        let other = !first && others_left > 0;
        others_left -= usize::from(other);
        first || other
    });
    rows.sort_by_key(|row| row.line);
    rows
}

/// Fits multinomial logistic regression on the embeddings of the training texts and applies it to those of the test
/// texts. The loss is summed over texts, `l2 / 2` times the squared weights is added (scikit-learn's `C = 1 / l2`).
///
/// # Errors
/// If the tokenizer, the model or the solver fails.
pub fn classify(
    model: &mut dyn Forward,
    encode: &Encode<'_>,
    task: &ClassificationTask,
    l2: f64,
    seed: u64,
    progress: impl FnMut(usize),
) -> Result<Classification, EvalError> {
    let texts: Vec<&str> = task.texts().collect();
    let rows = embed(model, encode, &texts, progress)?;
    probe(&rows, task, l2, seed)
}

fn probe(rows: &Embeddings, task: &ClassificationTask, l2: f64, seed: u64) -> Result<Classification, EvalError> {
    let (n_train, n_test) = (task.train.classes.len(), task.test.classes.len());
    let (width, n_classes) = (rows.width(), task.classes.len());
    let features = rows.rows(0..n_train);
    let probe = fit(&Examples { width, features, classes: &task.train.classes, n_classes }, l2)?;
    let predictions: Vec<usize> = (n_train..n_train + n_test).map(|index| probe.predict(rows.row(index))).collect();
    let gold = &task.test.classes;
    let all: Vec<usize> = (0..n_test).collect();
    let of = |measure: Measure, sample: &[usize]| measure(gold, &predictions, n_classes, sample);
    Ok(Classification {
        n_train,
        n_test,
        n_classes,
        l2,
        iterations: probe.iterations,
        accuracy: of(accuracy, &all),
        accuracy_interval: bootstrap(n_test, N_RESAMPLES, seed, |sample| of(accuracy, sample)),
        macro_f1: of(macro_f1, &all),
        macro_f1_interval: bootstrap(n_test, N_RESAMPLES, seed, |sample| of(macro_f1, sample)),
        predictions,
    })
}

impl Classification {
    /// How much accuracy and macro-F1 are above another model's on the same texts.
    ///
    /// # Panics
    /// If one of the two was measured on other texts.
    #[must_use]
    pub fn difference(&self, other: &Self, task: &ClassificationTask, seed: u64) -> (Difference, Difference) {
        let gold = &task.test.classes;
        assert!(self.n_test == gold.len() && other.n_test == gold.len(), "a difference needs the same texts");
        let difference = |measure: Measure| {
            paired_difference(
                gold.len(),
                N_RESAMPLES,
                seed,
                |sample| measure(gold, &self.predictions, self.n_classes, sample),
                |sample| measure(gold, &other.predictions, self.n_classes, sample),
            )
        };
        (difference(accuracy), difference(macro_f1))
    }
}

/// A measure of `predicted` against `gold` over a sample of indices.
type Measure = fn(&[usize], &[usize], usize, &[usize]) -> f64;

fn accuracy(gold: &[usize], predicted: &[usize], _n_classes: usize, sample: &[usize]) -> f64 {
    sample.iter().filter(|&&index| gold[index] == predicted[index]).count() as f64 / sample.len() as f64
}

/// The mean over the classes that occur on either side of `2 tp / (2 tp + fp + fn)`.
fn macro_f1(gold: &[usize], predicted: &[usize], n_classes: usize, sample: &[usize]) -> f64 {
    let mut counts = vec![(0usize, 0usize); n_classes];
    for &index in sample {
        let (gold, predicted) = (gold[index], predicted[index]);
        counts[gold].1 += 1;
        counts[predicted].1 += 1;
        if gold == predicted {
            counts[gold].0 += 1;
        }
    }
    // Both sides together count every hit twice: 2 tp + fp + fn.
    let scores: Vec<f64> =
        counts.iter().filter(|(_, both)| *both > 0).map(|(hits, both)| 2.0 * *hits as f64 / *both as f64).collect();
    scores.iter().sum::<f64>() / scores.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    // from sklearn.metrics import f1_score, accuracy_score
    // y = [0, 1, 2, 2, 1, 0, 3, 1]; p = [0, 2, 2, 2, 1, 1, 0, 1]
    // accuracy_score(y, p), f1_score(y, p, average="macro"), f1_score(y[:6], p[:6], average="macro")
    #[test]
    fn measures_as_in_scikit_learn() {
        let (gold, predicted) = ([0, 1, 2, 2, 1, 0, 3, 1], [0, 2, 2, 2, 1, 1, 0, 1]);
        let all: Vec<usize> = (0..8).collect();
        assert!((accuracy(&gold, &predicted, 5, &all) - 0.625).abs() < 1e-12);
        assert!((macro_f1(&gold, &predicted, 5, &all) - 0.491_666_666_666_666_64).abs() < 1e-12);
        assert!((macro_f1(&gold, &predicted, 5, &all[..6]) - 0.655_555_555_555_555_6).abs() < 1e-12);
    }

    fn read(train: &str, test: &str, max: Option<usize>) -> Result<ClassificationTask, String> {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("train.tsv"), dir.path().join("test.csv"));
        std::fs::write(&a, train).unwrap();
        std::fs::write(&b, test).unwrap();
        ClassificationTask::read(&a, &b, &ColumnNames::default(), max, 0).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_and_refuses() {
        let task = read("label\tsentence\nno\ta\nyes\tb\n", "content,label\n\"c, d\",yes\ne,no\n", None).unwrap();
        assert_eq!(task.classes, ["no", "yes"]);
        assert_eq!(task.train, Labelled { texts: vec!["a".into(), "b".into()], classes: vec![0, 1] });
        assert_eq!(task.test, Labelled { texts: vec!["c, d".into(), "e".into()], classes: vec![1, 0] });
        assert_eq!(task.texts().count(), 4);
        let many: String = (0..50).map(|i| format!("{}\ttext {i}\n", i % 2)).collect();
        assert_eq!(read(&many, "0,a\n1,b\n", Some(20)).unwrap().train.texts.len(), 20);
        // Rare classes are drawn all the same, as the test set asks for them.
        let rare: String = (0..50).map(|i| format!("{}\ttext {i}\n", if i < 5 { i } else { 5 })).collect();
        let task = read(&rare, "0,a\n4,b\n5,c\n", Some(6)).unwrap();
        assert_eq!((task.classes.len(), task.train.texts.len()), (6, 6));
        assert!(read(&rare, "0,a\n1,b\n", Some(5)).unwrap_err().contains("train.tsv: 5 texts of 6 classes"));
        let error = read("no\ta\nyes\tb\n", "yes,c\nmaybe,d\n", None).unwrap_err();
        assert!(error.contains("test.csv:2: the label `maybe` does not occur in"), "{error}");
        assert!(read("no\ta\nno\tb\n", "no,c\n", None).unwrap_err().contains("1 classes"));
    }

    #[test]
    fn a_probe_learns_what_is_linear_and_differences_are_paired() {
        // Class is the sign of the first of 3 features; the second model's features do not tell the class.
        let texts = |n: usize| Labelled { texts: vec![String::new(); n], classes: (0..n).map(|i| i % 2).collect() };
        let task = ClassificationTask { classes: vec!["0".into(), "1".into()], train: texts(60), test: texts(40) };
        let rows = |informative: bool| {
            let mut rng = StdRng::seed_from_u64(4);
            let mut noise = || rand::RngExt::random_range(&mut rng, -0.5f32..0.5);
            let values = (0..100)
                .flat_map(|i| {
                    let side = if i % 2 == 0 { -0.8 } else { 0.8 };
                    [noise() + if informative { side } else { 0.0 }, noise(), noise()]
                })
                .collect();
            Embeddings::new(3, values)
        };
        let good = probe(&rows(true), &task, 1.0, 0).unwrap();
        let bad = probe(&rows(false), &task, 1.0, 0).unwrap();
        assert_eq!((good.accuracy, good.macro_f1), (1.0, 1.0));
        assert!(bad.accuracy < 0.75 && bad.accuracy_interval.low < bad.accuracy);
        let (accuracy, f1) = good.difference(&bad, &task, 0);
        assert!(accuracy.interval.low > 0.0 && f1.interval.low > 0.0 && accuracy.p_value < 0.01);
    }
}
