//! Embeddings as bytes: the hot end of every answer.
//!
//! Small answers are written at once and carry their length. A large one is written piece by piece as the connection
//! takes it: the text of an `/embed_all` answer is three times its numbers, and would keep the reactor for
//! milliseconds.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::api::{EncodingFormat, OutputDtype};
use super::numbers::Numbers;
use super::pieces;
use crate::telemetry::{Metrics, Stage, Trace, events};

/// Numbers written in one go: at some 40 ns each, a third of a millisecond.
const MAX_FLOATS_AT_ONCE: usize = 8192;

/// Bytes of a number in shortest notation, with its comma: a sign, `0.`, a zero and eight digits.
const BYTES_PER_FLOAT: usize = 13;

/// The shape around the numbers.
#[derive(Debug, Clone)]
pub(crate) enum Layout {
    /// `[…]`: one vector.
    Vector,
    /// `[[…], …]`: a vector per input.
    Vectors,
    /// `[[[…], …], …]`: a vector of `width` numbers per token of an input.
    TokenVectors {
        /// Numbers of a vector.
        width: usize,
    },
    /// OpenAI's list of objects.
    OpenAi {
        /// How a vector is written.
        format: EncodingFormat,
        /// The model's name as JSON.
        model: String,
        /// Tokens of all inputs.
        n_tokens: usize,
    },
}

/// Writes embeddings piece by piece.
#[derive(Debug)]
pub(crate) struct RowsWriter {
    rows: Vec<Vec<f32>>,
    layout: Layout,
    dtype: OutputDtype,
    /// The row being written, and how many of its numbers are out.
    row: usize,
    offset: usize,
    started: bool,
}

impl RowsWriter {
    pub(crate) fn new(rows: Vec<Vec<f32>>, layout: Layout) -> Self {
        Self { rows, layout, dtype: OutputDtype::Float, row: 0, offset: 0, started: false }
    }

    /// The same in other numbers.
    pub(crate) fn of(mut self, dtype: OutputDtype) -> Self {
        self.dtype = dtype;
        self
    }

    fn n_floats(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// Appends whole vectors of about `max_floats` numbers to `out`; says whether that was the end.
    fn write(&mut self, out: &mut Vec<u8>, max_floats: usize) -> bool {
        if !self.started {
            self.started = true;
            match self.layout {
                Layout::Vector => {}
                Layout::Vectors | Layout::TokenVectors { .. } => out.push(b'['),
                Layout::OpenAi { .. } => out.extend_from_slice(br#"{"object":"list","data":["#),
            }
        }
        let mut n_floats = 0;
        while self.row < self.rows.len() {
            if n_floats >= max_floats {
                return false;
            }
            n_floats += self.write_vector(out);
        }
        match &self.layout {
            Layout::Vector => {}
            Layout::Vectors | Layout::TokenVectors { .. } => out.push(b']'),
            Layout::OpenAi { model, n_tokens, .. } => {
                let tail =
                    format!(r#"],"model":{model},"usage":{{"prompt_tokens":{n_tokens},"total_tokens":{n_tokens}}}}}"#);
                out.extend_from_slice(tail.as_bytes());
            }
        }
        true
    }

    /// Writes the next vector; returns its numbers.
    fn write_vector(&mut self, out: &mut Vec<u8>) -> usize {
        let row = &self.rows[self.row];
        if self.row > 0 && self.offset == 0 {
            out.push(b',');
        }
        match &self.layout {
            Layout::Vector | Layout::Vectors => Numbers::of(row, self.dtype).push_json(out),
            Layout::TokenVectors { width } => {
                out.push(if self.offset == 0 { b'[' } else { b',' });
                let end = (self.offset + width).min(row.len());
                Numbers::of(&row[self.offset..end], self.dtype).push_json(out);
                if end < row.len() {
                    self.offset = end;
                    return *width;
                }
                out.push(b']');
            }
            Layout::OpenAi { format, .. } => {
                out.extend_from_slice(br#"{"object":"embedding","embedding":"#);
                let numbers = Numbers::of(row, self.dtype);
                match format {
                    EncodingFormat::Float => numbers.push_json(out),
                    EncodingFormat::Base64 => {
                        out.push(b'"');
                        out.extend_from_slice(BASE64.encode(numbers.to_bytes()).as_bytes());
                        out.push(b'"');
                    }
                }
                let scale = numbers.scale().map_or(String::new(), |scale| format!(r#","scale":{scale}"#));
                out.extend_from_slice(format!(r#","index":{}{scale}}}"#, self.row).as_bytes());
            }
        }
        let n_floats = row.len();
        // What is written is of no more use, and may be large.
        self.rows[self.row] = Vec::new();
        self.row += 1;
        self.offset = 0;
        n_floats.min(match self.layout {
            Layout::TokenVectors { width } => width,
            _ => usize::MAX,
        })
    }

    /// The answer. `memory` is held until it is written.
    pub(crate) fn respond(
        mut self,
        metrics: &Arc<Metrics>,
        trace: &Trace,
        memory: Option<OwnedSemaphorePermit>,
    ) -> Response {
        let n_floats = self.n_floats();
        let body = if n_floats <= MAX_FLOATS_AT_ONCE {
            let start = Instant::now();
            let mut out = Vec::with_capacity(n_floats * BYTES_PER_FLOAT + 64 * (self.rows.len() + 2));
            self.write(&mut out, usize::MAX);
            let spent = start.elapsed();
            events::stage_passed(metrics, Stage::Serialize, spent);
            trace.stage(Stage::Serialize, Duration::ZERO, spent, &[("niwaki.bytes", out.len())]);
            Body::from(out)
        } else {
            let (metrics, trace) = (Arc::clone(metrics), trace.clone());
            let mut spent = Duration::ZERO;
            pieces::body(memory, move || {
                let start = Instant::now();
                let mut out = Vec::with_capacity((MAX_FLOATS_AT_ONCE + 1024) * BYTES_PER_FLOAT);
                let ended = self.write(&mut out, MAX_FLOATS_AT_ONCE);
                spent += start.elapsed();
                if ended {
                    events::stage_passed(&metrics, Stage::Serialize, spent);
                    trace.stage(Stage::Serialize, Duration::ZERO, spent, &[]);
                }
                (out, ended)
            })
        };
        ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n_rows: usize, len: usize) -> Vec<Vec<f32>> {
        let value = |i: usize| ((i * 7919 % 1000) as f32 - 500.0) / 3000.0;
        (0..n_rows).map(|row| (0..len).map(|i| value(row * len + i)).collect()).collect()
    }

    /// All of it, in pieces of about `max_floats`.
    fn written(rows: Vec<Vec<f32>>, layout: Layout, max_floats: usize) -> Vec<u8> {
        let mut writer = RowsWriter::new(rows, layout);
        let mut out = Vec::new();
        while !writer.write(&mut out, max_floats) {}
        out
    }

    #[test]
    fn pieces_of_any_size_make_the_same_json() {
        let openai = |format| Layout::OpenAi { format, model: "\"m\"".to_owned(), n_tokens: 9 };
        for layout in [
            Layout::Vectors,
            Layout::TokenVectors { width: 4 },
            openai(EncodingFormat::Float),
            openai(EncodingFormat::Base64),
        ] {
            let whole = written(rows(3, 12), layout.clone(), usize::MAX);
            for max_floats in 1..40 {
                assert_eq!(written(rows(3, 12), layout.clone(), max_floats), whole, "{layout:?} {max_floats}");
            }
        }
    }

    #[test]
    fn numbers_read_back_exactly() {
        let mut extremes = vec![0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE, f32::MAX, f32::MIN, 1e-45, 16_777_216.0, 0.1];
        extremes.extend(rows(1, 5000).remove(0));
        let json = written(vec![extremes.clone()], Layout::Vectors, 1);
        let back: Vec<Vec<f32>> = serde_json::from_slice(&json).unwrap();
        assert_eq!(
            back[0].iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            extremes.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        );
    }

    #[test]
    fn token_vectors_nest_three_deep() {
        let json = written(vec![vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0]], Layout::TokenVectors { width: 2 }, 1);
        assert_eq!(json, b"[[[1.0,2.0],[3.0,4.0]],[[5.0,6.0]]]");
    }

    #[test]
    fn base64_is_little_endian_single_precision() {
        let layout = Layout::OpenAi { format: EncodingFormat::Base64, model: "\"m\"".to_owned(), n_tokens: 3 };
        let json = written(vec![vec![1.0, -2.0]], layout, 1);
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(value["data"][0]["embedding"], "AACAPwAAAMA=");
        assert_eq!(value["data"][0]["index"], 0);
        assert_eq!(value["usage"]["total_tokens"], 3);
    }

    #[tokio::test]
    async fn large_answers_come_in_pieces_that_add_up() {
        use http_body_util::BodyExt;
        let metrics = Metrics::new();
        let small = RowsWriter::new(rows(2, 384), Layout::Vectors).respond(&metrics, &Trace::default(), None);
        assert!(hyper::body::Body::size_hint(small.body()).exact().is_some());
        let large = RowsWriter::new(rows(3, 20_000), Layout::TokenVectors { width: 100 }).respond(
            &metrics,
            &Trace::default(),
            None,
        );
        assert!(hyper::body::Body::size_hint(large.body()).exact().is_none());
        let bytes = large.into_body().collect().await.unwrap().to_bytes();
        let back: Vec<Vec<Vec<f32>>> = serde_json::from_slice(&bytes).unwrap();
        let expected: Vec<Vec<Vec<f32>>> =
            rows(3, 20_000).iter().map(|row| row.chunks(100).map(<[f32]>::to_vec).collect()).collect();
        assert_eq!(back, expected);
        assert_eq!(metrics.stages(Stage::Serialize), 2);
    }
}
