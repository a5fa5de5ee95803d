//! Retrieval: are the documents that people judged relevant the nearest to a query?

use std::collections::HashMap;
use std::path::Path;

use super::EvalError;
use super::embed::{Embeddings, Encode, embed};
use super::stats::{Difference, Interval, N_RESAMPLES, bootstrap, mean_of, paired_difference};
use super::table::{self, Column, ColumnNames, Layout};
use crate::model::Forward;

/// Depth of nDCG and of the reciprocal rank.
const TOP: usize = 10;
/// Depths of recall.
const RECALL_AT: [usize; 2] = [10, 100];

/// Documents, queries, and which belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrievalTask {
    documents: Vec<String>,
    queries: Vec<Query>,
    n_judgements: usize,
    n_missing: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Query {
    text: String,
    /// Documents with a positive judgement.
    relevant: HashMap<usize, f64>,
    /// Positive judgements, largest first, those of absent documents too.
    gains: Vec<f64>,
}

/// Files of a retrieval task, and what is put before the texts.
#[derive(Debug, Clone, Copy)]
pub struct RetrievalFiles<'a> {
    /// Documents: id, text, and a title that is put before the text.
    pub corpus: &'a Path,
    /// Queries: id and text.
    pub queries: &'a Path,
    /// Judgements: ids of a query and a document, and how relevant the document is (0: not).
    pub judgements: &'a Path,
    /// Put before every query, as some models were trained with.
    pub query_prefix: &'a str,
    /// Put before every document.
    pub document_prefix: &'a str,
}

/// A mean over queries.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QueryMean {
    /// The mean, 0 to 1.
    pub mean: f64,
    /// Its 95 % interval by bootstrap over queries.
    pub interval: Interval,
    #[serde(skip)]
    per_query: Vec<f64>,
}

/// Result of [`retrieve`].
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Retrieval {
    /// Queries with a relevant document; the others say nothing and are left out.
    pub n_queries: usize,
    /// Documents.
    pub n_documents: usize,
    /// All judgements, those of queries that are left out too.
    pub n_judgements: usize,
    /// Those of them whose document the corpus lacks; relevant ones count as not found.
    pub n_missing: usize,
    /// Normalised discounted cumulative gain of the first 10, linear gains.
    pub ndcg_at_10: QueryMean,
    /// Share of the relevant documents among the first 10.
    pub recall_at_10: QueryMean,
    /// Share of the relevant documents among the first 100.
    pub recall_at_100: QueryMean,
    /// Mean reciprocal rank of the first relevant document; 0 when it is not among the first 10.
    pub mrr_at_10: QueryMean,
}

const ID: Column = Column::required("id", &["id", "docid", "documentid", "queryid", "qid", "pid"]);
const TEXT: Column = Column::required("text", &["text", "contents", "content", "body", "passage", "query", "document"]);

const TEXTS: Layout = Layout {
    columns: &[ID, TEXT, Column::optional("title", &["title"])],
    headerless: |n_fields| match n_fields {
        2 => Some(&[0, 1]),
        _ => None,
    },
};

const JUDGEMENTS: Layout = Layout {
    columns: &[
        Column::required("query-id", &["queryid", "qid", "query"]),
        Column::required("document-id", &["corpusid", "documentid", "docid", "pid", "document"]),
        Column::required("score", &["score", "relevance", "rel", "label", "judgement"]),
    ],
    headerless: |n_fields| match n_fields {
        3 => Some(&[0, 1, 2]),
        // TREC's second column is unused.
        4 => Some(&[0, 2, 3]),
        _ => None,
    },
};

/// Texts with their places by id.
fn read_texts(
    path: &Path,
    names: &ColumnNames,
    prefix: &str,
) -> Result<(Vec<String>, HashMap<String, usize>), EvalError> {
    let (mut texts, mut places) = (Vec::new(), HashMap::new());
    for row in table::read(path, &TEXTS, names)? {
        if places.insert(row.field(0).to_owned(), texts.len()).is_some() {
            let reason = format!("the id `{}` occurs twice", row.field(0));
            return Err(EvalError::Line { path: path.to_owned(), line: row.line, reason });
        }
        texts.push(format!("{prefix}{}", format!("{} {}", row.field(2), row.field(1)).trim()));
    }
    if texts.is_empty() {
        return Err(EvalError::TooFew { path: path.to_owned(), got: 0, needed: 1 });
    }
    Ok((texts, places))
}

impl RetrievalTask {
    /// Reads the three files. Without a header, corpus and queries have an id and a text; judgements have a query, a
    /// document and a relevance (or TREC's four columns).
    ///
    /// # Errors
    /// Naming the line that is wrong.
    pub fn read(files: &RetrievalFiles<'_>, names: &ColumnNames) -> Result<Self, EvalError> {
        let (documents, document_places) = read_texts(files.corpus, names, files.document_prefix)?;
        let (queries, query_places) = read_texts(files.queries, names, files.query_prefix)?;
        let mut queries: Vec<Query> =
            queries.into_iter().map(|text| Query { text, relevant: HashMap::new(), gains: Vec::new() }).collect();
        let (mut n_judgements, mut n_missing) = (0, 0);
        for row in table::read(files.judgements, &JUDGEMENTS, names)? {
            let gain = table::number(files.judgements, &row, 2, "relevance")?;
            let Some(&query) = query_places.get(row.field(0)) else {
                let reason = format!("the query `{}` is not in {}", row.field(0), files.queries.display());
                return Err(EvalError::Line { path: files.judgements.to_owned(), line: row.line, reason });
            };
            n_judgements += 1;
            let document = document_places.get(row.field(1));
            n_missing += usize::from(document.is_none());
            if gain > 0.0 {
                queries[query].gains.push(gain);
                if let Some(&document) = document
                    && queries[query].relevant.insert(document, gain).is_some()
                {
                    let reason = format!("`{}` is judged twice for `{}`", row.field(1), row.field(0));
                    return Err(EvalError::Line { path: files.judgements.to_owned(), line: row.line, reason });
                }
            }
        }
        queries.retain(|query| !query.gains.is_empty());
        if queries.iter().all(|query| query.relevant.is_empty()) {
            let path = files.judgements.to_owned();
            let reason = format!("none of {n_judgements} judgements calls a document of the corpus relevant");
            return Err(EvalError::Line { path, line: 1, reason });
        }
        queries.iter_mut().for_each(|query| query.gains.sort_by(|a, b| b.total_cmp(a)));
        Ok(Self { documents, queries, n_judgements, n_missing })
    }

    /// All texts, the documents first.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.documents.iter().map(String::as_str).chain(self.queries.iter().map(|query| query.text.as_str()))
    }
}

/// Ranks all documents for every query by cosine, exactly, and measures the order. Equal cosines keep the order of the
/// corpus.
///
/// ```text
/// DCG@k = Σ_{r ≤ k} gain_r / log2(r + 1)        nDCG@k = DCG@k / (DCG@k of the judgements in falling order)
/// ```
///
/// Gains are the judgements themselves, as in trec_eval; a document is relevant when its judgement is above 0.
///
/// *Source*: Järvelin & Kekäläinen 2002 (nDCG).
///
/// # Errors
/// If the tokenizer or the model fails.
pub fn retrieve(
    model: &mut dyn Forward,
    encode: &Encode<'_>,
    task: &RetrievalTask,
    seed: u64,
    progress: impl FnMut(usize),
) -> Result<Retrieval, EvalError> {
    let texts: Vec<&str> = task.texts().collect();
    let rows = embed(model, encode, &texts, progress)?;
    Ok(measure(&rows, task, seed))
}

fn measure(rows: &Embeddings, task: &RetrievalTask, seed: u64) -> Retrieval {
    let n_documents = task.documents.len();
    let (mut ndcg, mut mrr) = (Vec::new(), Vec::new());
    let mut recall = RECALL_AT.map(|_| Vec::new());
    for (index, query) in task.queries.iter().enumerate() {
        let ranking = nearest(rows, rows.row(n_documents + index), n_documents, RECALL_AT[1].max(TOP));
        let gains: Vec<f64> = ranking.iter().map(|place| query.relevant.get(place).copied().unwrap_or(0.0)).collect();
        ndcg.push(dcg(&gains) / dcg(&query.gains));
        mrr.push(gains.iter().take(TOP).position(|gain| *gain > 0.0).map_or(0.0, |place| 1.0 / (place + 1) as f64));
        for (recall, depth) in recall.iter_mut().zip(RECALL_AT) {
            let found = gains.iter().take(depth).filter(|gain| **gain > 0.0).count();
            recall.push(found as f64 / query.gains.len() as f64);
        }
    }
    let mean = |per_query: Vec<f64>| QueryMean {
        mean: per_query.iter().sum::<f64>() / per_query.len() as f64,
        interval: bootstrap(per_query.len(), N_RESAMPLES, seed, |sample| mean_of(&per_query, sample)),
        per_query,
    };
    let [recall_at_10, recall_at_100] = recall;
    Retrieval {
        n_queries: task.queries.len(),
        n_documents,
        n_judgements: task.n_judgements,
        n_missing: task.n_missing,
        ndcg_at_10: mean(ndcg),
        recall_at_10: mean(recall_at_10),
        recall_at_100: mean(recall_at_100),
        mrr_at_10: mean(mrr),
    }
}

fn dcg(gains: &[f64]) -> f64 {
    gains.iter().take(TOP).enumerate().map(|(place, gain)| gain / ((place + 2) as f64).log2()).sum()
}

/// The first `count` of the rows before `n_documents` by falling product with `query`.
fn nearest(rows: &Embeddings, query: &[f32], n_documents: usize, count: usize) -> Vec<usize> {
    let scores: Vec<f32> =
        rows.rows(0..n_documents).chunks_exact(rows.width()).map(|document| dot(document, query)).collect();
    let mut order: Vec<usize> = (0..n_documents).collect();
    let falling = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if count < n_documents {
        order.select_nth_unstable_by(count, falling);
        order.truncate(count);
    }
    order.sort_unstable_by(falling);
    order
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums side by side become one vector register.
    let mut sums = [0.0f32; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f32>() + rest
}

impl Retrieval {
    /// How much nDCG@10 is above another model's on the same queries.
    ///
    /// # Panics
    /// If one of the two was measured on other queries.
    #[must_use]
    pub fn difference(&self, other: &Self, seed: u64) -> Difference {
        let (ours, theirs) = (&self.ndcg_at_10.per_query, &other.ndcg_at_10.per_query);
        assert_eq!(ours.len(), theirs.len(), "a difference needs the same queries");
        let n = ours.len();
        paired_difference(n, N_RESAMPLES, seed, |sample| mean_of(ours, sample), |sample| mean_of(theirs, sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(corpus: &str, queries: &str, judgements: &str) -> Result<RetrievalTask, String> {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let files = RetrievalFiles {
            corpus: &write("corpus.jsonl", corpus),
            queries: &write("queries.tsv", queries),
            judgements: &write("qrels.tsv", judgements),
            query_prefix: "query: ",
            document_prefix: "",
        };
        RetrievalTask::read(&files, &ColumnNames::default()).map_err(|error| error.to_string())
    }

    const CORPUS: &str = "{\"_id\": \"a\", \"title\": \"T\", \"text\": \"one\"}\n{\"_id\": \"b\", \"text\": \"two\"}\n";

    #[test]
    fn reads_the_usual_files_and_names_what_is_wrong() {
        let queries = "q1\tfirst\nq2\tsecond\n";
        let task = read(CORPUS, queries, "query-id\tcorpus-id\tscore\nq1\tb\t2\nq1\tgone\t1\nq2\ta\t0\n").unwrap();
        assert_eq!(task.documents, ["T one", "two"]);
        assert_eq!((task.queries.len(), task.n_judgements, task.n_missing), (1, 3, 1));
        assert_eq!(task.queries[0].text, "query: first");
        assert_eq!(task.queries[0].gains, [2.0, 1.0]);
        assert_eq!(read(CORPUS, queries, "q1\t0\ta\t1\n").unwrap().queries[0].relevant[&0], 1.0);
        let error = |queries: &str, judgements: &str| read(CORPUS, queries, judgements).unwrap_err();
        assert!(error(queries, "q1\ta\t1\nq3\ta\t1\n").contains("qrels.tsv:2: the query `q3` is not in"));
        assert!(
            error(queries, "q1\ta\t1\nq1\ta\thigh\n").ends_with("qrels.tsv:2: the relevance `high` is not a number")
        );
        assert!(error(queries, "q1\ta\t1\nq1\ta\t2\n").ends_with(":2: `a` is judged twice for `q1`"));
        assert!(error("q1\tx\nq1\ty\n", "q1\ta\t1\n").ends_with("queries.tsv:2: the id `q1` occurs twice"));
        assert!(error(queries, "q1\tgone\t1\n").contains("none of 1 judgements"));
    }

    // import pytrec_eval
    // qrel = {"q": {f"d{i}": g for i, g in [(3, 3), (7, 1), (11, 2), (12, 1), (40, 2), (55, 0)]}}
    // run = {"q": {f"d{i}": 1 - i / 100 for i in range(60)}}
    // pytrec_eval.RelevanceEvaluator(qrel, {"ndcg_cut_10", "recall_10", "recall_100", "recip_rank"}).evaluate(run)
    #[test]
    fn measures_as_in_trec_eval() {
        let judged = [(3, 3.0), (7, 1.0), (11, 2.0), (12, 1.0), (40, 2.0)];
        let mut gains: Vec<f64> = judged.iter().map(|(_, gain)| *gain).collect();
        gains.sort_by(|a, b| b.total_cmp(a));
        let query = Query { text: String::new(), relevant: judged.into(), gains };
        let task = RetrievalTask {
            documents: vec![String::new(); 60],
            queries: vec![query.clone(), query],
            n_judgements: 12,
            n_missing: 0,
        };
        // Documents of falling cosine with the first query; the second sees them in the opposite order.
        let mut values: Vec<f32> = (0..60).flat_map(|i| [1.0 - i as f32 / 100.0, 0.0, 0.0]).collect();
        values.extend([1.0, 0.0, 0.0, -1.0, 0.0, 0.0]);
        let result = measure(&Embeddings::new(3, values), &task, 0);
        let of = |mean: &QueryMean, query: usize| mean.per_query[query];
        assert!((of(&result.ndcg_at_10, 0) - 0.264_417_128_881_222_76).abs() < 1e-12);
        assert!((of(&result.recall_at_10, 0) - 0.4).abs() < 1e-12);
        assert!((of(&result.recall_at_100, 0) - 1.0).abs() < 1e-12);
        assert!((of(&result.mrr_at_10, 0) - 0.25).abs() < 1e-12);
        // The second query's first relevant document is number 20 of 60: not among the first 10.
        assert_eq!([of(&result.ndcg_at_10, 1), of(&result.mrr_at_10, 1), of(&result.recall_at_10, 1)], [0.0; 3]);
        assert!((result.mrr_at_10.mean - 0.125).abs() < 1e-12);
    }

    #[test]
    fn equal_cosines_keep_the_order_of_the_corpus() {
        let rows = Embeddings::new(1, vec![0.5, 1.0, 0.5, 1.0, 0.0, 1.0]);
        assert_eq!(nearest(&rows, &[1.0], 6, 4), [1, 3, 5, 0]);
        assert_eq!(nearest(&rows, &[1.0], 6, 10), [1, 3, 5, 0, 2, 4]);
    }
}
