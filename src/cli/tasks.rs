//! The tasks that `eval` and `compare` measure models on.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use super::progress::Bars;
use super::subject::Subject;
use crate::eval::{
    Classification, ClassificationTask, ColumnName, Difference, Embeddings, Fidelity, Interval, Pair, QueryMean,
    Retrieval, RetrievalFiles, RetrievalTask, Speed, SpeedSettings, Sts, classify, compare, embed, made_up_sequences,
    measure_speed, read_lines, read_pairs, retrieve, sts,
};
use crate::eval::{ColumnNames, Contender};

/// Inputs that latency and throughput are measured on.
const SPEED_INPUTS: usize = 512;

/// Files with what to measure on: separated by tabs or commas (RFC 4180 quotes), or one JSON object a line.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tasks")]
pub(super) struct TaskArgs {
    /// Similarity: sentence pairs with scores, columns score, sentence1, sentence2 (without a header in this order, or
    /// STS-B's).
    #[arg(long, value_name = "FILE")]
    pub(super) sts: Option<PathBuf>,
    /// Classification by a linear probe: labelled texts to fit it on, columns label and text.
    #[arg(long, value_name = "FILE", requires = "test")]
    pub(super) train: Option<PathBuf>,
    /// Classification: labelled texts to test on.
    #[arg(long, value_name = "FILE", requires = "train")]
    pub(super) test: Option<PathBuf>,
    /// Use at most so many texts of --train.
    #[arg(long, value_name = "N", requires = "train")]
    pub(super) max_train: Option<std::num::NonZeroUsize>,
    /// Weight of the squared coefficients of the linear probe, against losses summed over the texts.
    #[arg(long, value_name = "WEIGHT", default_value_t = 1.0, value_parser = super::parse::positive)]
    pub(super) l2: f64,
    /// Retrieval: documents, columns id and text, and title if there is one.
    #[arg(long, value_name = "FILE", requires_all = ["queries", "judgements"])]
    pub(super) corpus: Option<PathBuf>,
    /// Retrieval: queries, columns id and text.
    #[arg(long, value_name = "FILE", requires = "corpus")]
    pub(super) queries: Option<PathBuf>,
    /// Retrieval: columns query-id, document-id, score (0: not relevant).
    #[arg(long, value_name = "FILE", requires = "corpus", alias = "qrels")]
    pub(super) judgements: Option<PathBuf>,
    /// Put before every query.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) query_prefix: String,
    /// Put before every document.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) document_prefix: String,
    /// Fidelity: texts, one a line, on which the cosine to the reference is measured.
    #[arg(long, value_name = "FILE")]
    pub(super) texts: Option<PathBuf>,
    /// Name of a column: score, sentence1, sentence2, text, label, id, title, query-id or document-id, and its name in the
    /// header or the objects, or its number from 1 in a file without a header. May be repeated.
    #[arg(long = "column", value_name = "ROLE=NAME")]
    pub(super) columns: Vec<ColumnName>,
    /// Seed of every random choice: resampling, and --max-train.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
}

/// The tasks, read.
pub(super) struct Tasks {
    sts: Option<Vec<Pair>>,
    classification: Option<ClassificationTask>,
    retrieval: Option<RetrievalTask>,
    pub(super) texts: Option<Vec<String>>,
    l2: f64,
    seed: u64,
}

/// What a model was measured to be.
#[derive(Debug, Default, Serialize)]
pub(super) struct Measured {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sts: Option<Sts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) classification: Option<Classification>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) retrieval: Option<Retrieval>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fidelity: Option<Fidelity>,
    /// Tokens at which texts were cut for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fidelity_max_tokens: Option<usize>,
}

/// What fidelity is to: the embeddings of another model. An embedding of more text is another embedding, so both read as
/// many tokens.
pub(super) struct Reference {
    rows: Embeddings,
    max_tokens: usize,
}

/// How a model differs from another on the same tasks.
#[derive(Debug, Default, Serialize)]
pub(super) struct Differences {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) spearman: Option<Difference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) accuracy: Option<Difference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) macro_f1: Option<Difference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ndcg_at_10: Option<Difference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cosine: Option<Difference>,
}

impl Tasks {
    /// Reads every file, so that a wrong one is named before the first model is loaded.
    pub(super) fn read(args: &TaskArgs) -> anyhow::Result<Self> {
        let names: ColumnNames = args.columns.iter().cloned().collect();
        let classification = args
            .train
            .as_deref()
            .zip(args.test.as_deref())
            .map(|(train, test)| {
                let max = args.max_train.map(std::num::NonZeroUsize::get);
                ClassificationTask::read(train, test, &names, max, args.seed)
            })
            .transpose()?;
        let retrieval = match (&args.corpus, &args.queries, &args.judgements) {
            (Some(corpus), Some(queries), Some(judgements)) => {
                let (query_prefix, document_prefix) = (&args.query_prefix, &args.document_prefix);
                let files = RetrievalFiles { corpus, queries, judgements, query_prefix, document_prefix };
                Some(RetrievalTask::read(&files, &names)?)
            }
            _ => None,
        };
        Ok(Self {
            sts: args.sts.as_deref().map(|path| read_pairs(path, &names)).transpose()?,
            classification,
            retrieval,
            texts: args.texts.as_deref().map(read_lines).transpose()?,
            l2: args.l2,
            seed: args.seed,
        })
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.sts.is_none() && self.classification.is_none() && self.retrieval.is_none() && self.texts.is_none()
    }

    /// Texts of the tasks, evenly picked, to measure speed on.
    fn speed_texts(&self) -> Vec<&str> {
        let mut texts: Vec<&str> = Vec::new();
        texts.extend(self.texts.iter().flatten().map(String::as_str));
        texts.extend(self.sts.iter().flatten().flat_map(|pair| [pair.first.as_str(), pair.second.as_str()]));
        texts.extend(self.retrieval.iter().flat_map(RetrievalTask::texts));
        if texts.is_empty() {
            texts.extend(self.classification.iter().flat_map(ClassificationTask::texts));
        }
        texts.retain(|text| !text.is_empty());
        let n = texts.len();
        let count = SPEED_INPUTS.min(n);
        (0..count).map(|i| texts[i * n / count]).collect()
    }

    /// Embeddings of the fidelity texts, cut at what `subject` and all of `others` can read.
    pub(super) fn reference<'a>(
        &self,
        subject: &mut Subject,
        others: impl IntoIterator<Item = &'a Subject>,
        bars: &Bars,
    ) -> anyhow::Result<Option<Reference>> {
        let Some(texts) = &self.texts else { return Ok(None) };
        let max_tokens = others.into_iter().map(Subject::max_tokens).fold(subject.max_tokens(), usize::min);
        bars.start("reference", Some(texts.len() as u64), 0, false);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let advance = |n| bars.advance(n as u64);
        let rows = run(subject, max_tokens, |model, encode| embed(model, encode, &texts, advance))?;
        bars.finish();
        Ok(Some(Reference { rows, max_tokens }))
    }

    /// Measures a model on all tasks; fidelity is to `reference`.
    pub(super) fn measure(
        &self,
        subject: &mut Subject,
        reference: Option<&Reference>,
        bars: &Bars,
    ) -> anyhow::Result<Measured> {
        let mut measured = Measured::default();
        let all = subject.max_tokens();
        let advance = |n| bars.advance(n as u64);
        if let Some(pairs) = &self.sts {
            bars.start("similarity", Some(pairs.len() as u64 * 2), 0, false);
            measured.sts = Some(run(subject, all, |model, encode| sts(model, encode, pairs, self.seed, advance))?);
            bars.finish();
        }
        if let Some(task) = &self.classification {
            bars.start("classification", Some(task.texts().count() as u64), 0, false);
            let result = run(subject, all, |model, encode| classify(model, encode, task, self.l2, self.seed, advance))?;
            measured.classification = Some(result);
            bars.finish();
        }
        if let Some(task) = &self.retrieval {
            bars.start("retrieval", Some(task.texts().count() as u64), 0, false);
            measured.retrieval =
                Some(run(subject, all, |model, encode| retrieve(model, encode, task, self.seed, advance))?);
            bars.finish();
        }
        if let (Some(texts), Some(reference)) = (&self.texts, reference) {
            bars.start("fidelity", Some(texts.len() as u64), 0, false);
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let rows = run(subject, reference.max_tokens, |model, encode| embed(model, encode, &texts, advance))?;
            measured.fidelity = Some(compare(&reference.rows, &rows)?);
            measured.fidelity_max_tokens = Some(reference.max_tokens);
            bars.finish();
        }
        Ok(measured)
    }

    /// How much `ours` is above `theirs`, both measured on these tasks.
    pub(super) fn differences(&self, ours: &Measured, theirs: &Measured) -> Differences {
        let both = ours.classification.as_ref().zip(theirs.classification.as_ref()).zip(self.classification.as_ref());
        let (accuracy, macro_f1) = both.map(|((a, b), task)| a.difference(b, task, self.seed)).unzip();
        Differences {
            spearman: ours
                .sts
                .as_ref()
                .zip(theirs.sts.as_ref())
                .zip(self.sts.as_ref())
                .map(|((a, b), pairs)| a.difference(b, pairs, self.seed)),
            accuracy,
            macro_f1,
            ndcg_at_10: ours.retrieval.as_ref().zip(theirs.retrieval.as_ref()).map(|(a, b)| a.difference(b, self.seed)),
            cosine: ours.fidelity.as_ref().zip(theirs.fidelity.as_ref()).map(|(a, b)| a.difference(b, self.seed)),
        }
    }

    /// Latency and throughput of all models in turn, on texts of the tasks, or on made-up ids without any.
    pub(super) fn speed(
        &self,
        subjects: &mut [&mut Subject],
        settings: &SpeedSettings,
        bars: &Bars,
    ) -> anyhow::Result<Vec<Speed>> {
        let texts = self.speed_texts();
        let sequences = subjects
            .iter()
            .map(|subject| match &texts[..] {
                [] => Ok(made_up_sequences(subject.checkpoint.architecture(), SPEED_INPUTS, self.seed)),
                texts => subject.sequences(texts),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut contenders: Vec<Contender<'_>> = subjects
            .iter_mut()
            .zip(&sequences)
            .map(|(subject, sequences)| Contender { workers: &mut subject.loaded.workers, sequences })
            .collect();
        bars.start("speed", Some((contenders.len() * (settings.rounds + 1)) as u64), 0, false);
        let speeds = measure_speed(&mut contenders, settings, |n| bars.advance(n as u64))?;
        bars.finish();
        Ok(speeds)
    }
}

/// Lends out a subject's model and its encoder, which cuts texts at `max_tokens`.
fn run<T, E: Into<anyhow::Error>>(
    subject: &mut Subject,
    max_tokens: usize,
    with: impl FnOnce(&mut dyn crate::model::Forward, &crate::eval::Encode<'_>) -> Result<T, E>,
) -> anyhow::Result<T> {
    let encode = crate::eval::encoder(&subject.tokenizer, max_tokens);
    let Some(worker) = subject.loaded.workers.first_mut() else { bail!("no worker was loaded") };
    with(&mut **worker, &encode).map_err(Into::into)
}

fn interval(interval: &Interval, factor: f64, digits: usize) -> String {
    format!("({:.digits$} to {:.digits$})", interval.low * factor, interval.high * factor)
}

impl Measured {
    /// A line for each task.
    pub(super) fn lines(&self) -> String {
        let mut text = String::new();
        let mut line = |words: String| writeln!(text, "{words}").expect("writing to a String cannot fail");
        if let Some(sts) = &self.sts {
            let range = interval(&sts.interval, 100.0, 2);
            line(format!("similarity      Spearman {:.2} {range} on {} pairs", sts.spearman * 100.0, sts.n_pairs));
        }
        if let Some(c) = &self.classification {
            line(format!(
                "classification  accuracy {:.2} % {}, macro-F1 {:.2} % {}; {} classes, {} texts to fit, {} to test",
                c.accuracy * 100.0,
                interval(&c.accuracy_interval, 100.0, 2),
                c.macro_f1 * 100.0,
                interval(&c.macro_f1_interval, 100.0, 2),
                c.n_classes,
                c.n_train,
                c.n_test
            ));
        }
        if let Some(r) = &self.retrieval {
            let mean = |mean: &QueryMean| format!("{:.4} {}", mean.mean, interval(&mean.interval, 1.0, 4));
            line(format!(
                "retrieval       nDCG@10 {}, recall@10 {:.4}, recall@100 {:.4}, MRR@10 {:.4}; {} queries, {} documents",
                mean(&r.ndcg_at_10),
                r.recall_at_10.mean,
                r.recall_at_100.mean,
                r.mrr_at_10.mean,
                r.n_queries,
                r.n_documents
            ));
            if r.n_missing > 0 {
                line(format!("                {} judged documents are not in the corpus", r.n_missing));
            }
        }
        if let Some(f) = &self.fidelity {
            line(format!(
                "fidelity        cosine {:.5} in the mean, {:.5} at the 1st percentile, {:.5} at least, on {} texts of up to {} \
                 tokens",
                f.mean,
                f.p1,
                f.min,
                f.n_texts,
                self.fidelity_max_tokens.unwrap_or_default()
            ));
        }
        text
    }
}

impl Differences {
    /// Name, value and the factor and digits to show it with.
    pub(super) fn named(&self) -> Vec<(&'static str, Difference, f64, usize)> {
        [
            ("Spearman", self.spearman, 100.0, 2),
            ("accuracy, %", self.accuracy, 100.0, 2),
            ("macro-F1, %", self.macro_f1, 100.0, 2),
            ("nDCG@10", self.ndcg_at_10, 1.0, 4),
            ("cosine", self.cosine, 1.0, 5),
        ]
        .into_iter()
        .filter_map(|(name, difference, factor, digits)| Some((name, difference?, factor, digits)))
        .collect()
    }

    /// A line for each measure.
    pub(super) fn lines(&self) -> String {
        let mut text = String::new();
        for (name, difference, factor, digits) in self.named() {
            let range = interval(&difference.interval, factor, digits);
            let value = difference.difference * factor;
            writeln!(text, "  {name:<13} {value:+.digits$} {range}, p {:.3}", difference.p_value)
                .expect("writing to a String cannot fail");
        }
        text
    }
}
