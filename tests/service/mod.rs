//! A whole service around a model that is arithmetic, for the tests of the HTTP surface.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod process;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use http_body_util::BodyExt;
use niwaki::engine::{Engine, EngineLimits};
use niwaki::model::{
    Activation, Architecture, ArchitectureSpec, Band, Family, Forward, ForwardMemory, HeadConfig, LayerConfig,
    ModelError, Outputs, Pooling, Positions, RaggedBatch, ScoreFunction, Want,
};
use niwaki::server::{AppState, ModelParts, ServedModel, ServerConfig, Task, router, serve};
use niwaki::telemetry::Metrics;
use niwaki::text::Tokenizer;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tower::ServiceExt;

/// Numbers of an embedding.
pub(crate) const D_MODEL: usize = 8;
/// Longest input.
pub(crate) const MAX_TOKENS: usize = 16;

/// Words of the vocabulary, in the order of their ids.
const WORDS: &[&str] = &[
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "tree", "garden", "##s", "a", "b", "c", "d", "slow", "poison", "nan",
    "die", "query", ":", "é", "long",
];
/// Token ids of the words that make the model misbehave.
const SLOW: u32 = 12;
const POISON: u32 = 13;
const NAN: u32 = 14;
const DIE: u32 = 15;

/// How long a batch with a `slow` in it takes.
pub(crate) const SLOW_TIME: Duration = Duration::from_millis(400);

/// Entries of the vocabulary.
pub(crate) fn vocab_size() -> usize {
    WORDS.len()
}

/// The id of a word.
pub(crate) fn id(word: &str) -> u32 {
    u32::try_from(WORDS.iter().position(|known| *known == word).unwrap()).unwrap()
}

/// A WordPiece tokenizer of [`WORDS`].
pub(crate) fn tokenizer() -> Tokenizer {
    let vocab: HashMap<&str, usize> = WORDS.iter().enumerate().map(|(id, word)| (*word, id)).collect();
    let added: Vec<Value> = WORDS[..4]
        .iter()
        .enumerate()
        .map(|(id, word)| {
            serde_json::json!({"id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let special = |word: &str| serde_json::json!({"SpecialToken": {"id": word, "type_id": 0}});
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": false, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, special("[SEP]")],
            "pair": [special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, special("[SEP]"),
                {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

/// Number `column` of the row of the token `id` at `position`: never zero, different for every token.
fn token_value(id: u32, position: usize, column: usize) -> f32 {
    let mix = (id as usize + 1) * 31 + position * 17 + column * 7;
    (mix % 101) as f32 / 100.0 - 0.3 + (id as f32) * 0.01
}

/// Rows of the tokens of a sequence.
pub(crate) fn token_rows(ids: &[u32]) -> Vec<Vec<f32>> {
    let row = |(position, &id): (usize, &u32)| (0..D_MODEL).map(|column| token_value(id, position, column)).collect();
    ids.iter().enumerate().map(row).collect()
}

/// The pooled row of a sequence: the mean.
pub(crate) fn pooled(ids: &[u32]) -> Vec<f32> {
    let rows = token_rows(ids);
    (0..D_MODEL).map(|column| rows.iter().map(|row| row[column]).sum::<f32>() / rows.len() as f32).collect()
}

/// What a classification head of `n_labels` says of a sequence: sums of its rows, and of the types of its tokens.
pub(crate) fn logits(ids: &[u32], types: &[u8], n_labels: usize) -> Vec<f32> {
    let rows = token_rows(ids);
    let typed: f32 = types.iter().map(|&kind| f32::from(kind)).sum();
    (0..n_labels).map(|label| rows.iter().map(|row| row[label]).sum::<f32>() - 0.25 * typed).collect()
}

/// Ids and types of a pair as the service computes it.
pub(crate) fn pair(first: &str, second: &str) -> (Vec<u32>, Vec<u8>) {
    let tokenizer = tokenizer();
    let part = |text| tokenizer.part(text).unwrap();
    let pair = tokenizer.pair(part(first), part(second), None).unwrap();
    (pair.ids, pair.token_types)
}

/// `vector` at unit length.
pub(crate) fn unit(vector: &[f32]) -> Vec<f32> {
    let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    vector.iter().map(|x| (f64::from(*x) / norm) as f32).collect()
}

/// Ids of `text` as the service computes it.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text, true).unwrap()
}

/// The model.
pub(crate) struct Arithmetic {
    architecture: Architecture,
    /// Time of every batch.
    pub(crate) batch_time: Duration,
}

impl Arithmetic {
    /// With labels it is a classifier.
    pub(crate) fn new(batch_time: Duration, head: Option<HeadConfig>) -> Self {
        let band = Band::FULL;
        let spec = ArchitectureSpec {
            ranges: Vec::new(),
            family: Family::Bert,
            vocab_size: WORDS.len(),
            n_token_types: 2,
            positions: Positions { table_len: MAX_TOKENS, offset: 0, tiled: false },
            d_model: D_MODEL,
            norm_eps: 1e-12,
            activation: Activation::Gelu,
            layers: vec![LayerConfig { n_heads: 1, d_head: D_MODEL, d_ffn: D_MODEL, band }],
            pooling: if head.is_some() { Pooling::Cls } else { Pooling::Mean },
            normalize: true,
            max_input_tokens: MAX_TOKENS,
            head,
        };
        Self { architecture: Architecture::new(spec).unwrap(), batch_time }
    }
}

impl Forward for Arithmetic {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn width(&self) -> usize {
        self.architecture.head.as_ref().map_or(D_MODEL, |head| head.labels.len())
    }

    fn forward(&mut self, batch: &RaggedBatch, want: Want, out: &mut Outputs) -> Result<(), ModelError> {
        out.pooled.clear();
        out.tokens.clear();
        let all = batch.view(0..batch.n_seqs());
        std::thread::sleep(self.batch_time);
        if all.ids().contains(&SLOW) {
            std::thread::sleep(SLOW_TIME);
        }
        if all.ids().contains(&POISON) {
            return Err(ModelError::player(std::io::Error::other("poisoned")));
        }
        assert!(!all.ids().contains(&DIE), "the test asks the worker to die");
        for index in 0..batch.n_seqs() {
            let ids = batch.sequence(index);
            let types = &all.token_types()[all.rows(index)];
            let mut row = match &self.architecture.head {
                None => pooled(ids),
                Some(head) => logits(ids, types, head.labels.len()),
            };
            if ids.contains(&NAN) {
                row[0] = f32::NAN;
            }
            out.pooled.extend(row);
            if want == Want::PooledAndTokens {
                out.tokens.extend(token_rows(ids).concat());
            }
        }
        Ok(())
    }

    fn memory(&self) -> ForwardMemory {
        ForwardMemory { weights: 1000, workspace: 200, workspace_peak: 100 }
    }
}

/// What a test may change.
pub(crate) struct Setup {
    pub(crate) model: ServedModel,
    /// Models beside the first: their names, and their labels if they are classifiers.
    pub(crate) others: Vec<(&'static str, &'static [&'static str])>,
    pub(crate) config: ServerConfig,
    pub(crate) limits: EngineLimits,
    pub(crate) n_workers: usize,
    pub(crate) batch_time: Duration,
    pub(crate) ready: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let model = ServedModel {
            model_id: "test/arithmetic".to_owned(),
            model_sha: Some("0123abc".to_owned()),
            served_name: "arithmetic".to_owned(),
            family: "bert".to_owned(),
            compression: "none".to_owned(),
            dtype: "float32".to_owned(),
            attention: "full".to_owned(),
            isa: "portable".to_owned(),
            task: Task::Embedding { pooling: Pooling::Mean },
            d_model: D_MODEL,
            vocab_size: WORDS.len(),
            n_token_types: 2,
            max_input_tokens: MAX_TOKENS,
            file_bytes: 3000,
            prompts: std::collections::BTreeMap::new(),
            default_prompt: None,
        };
        Self {
            model,
            others: Vec::new(),
            config: ServerConfig::default(),
            limits: EngineLimits::default(),
            n_workers: 2,
            batch_time: Duration::ZERO,
            ready: true,
        }
    }
}

impl Setup {
    /// Makes the first model a classifier of these labels (a reranker if there is one).
    pub(crate) fn classify(&mut self, labels: &[&str]) {
        self.model.task = task(labels);
    }
}

fn task(labels: &[&str]) -> Task {
    let function = if labels.len() == 1 { ScoreFunction::Sigmoid } else { ScoreFunction::Softmax };
    match labels {
        [] => Task::Embedding { pooling: Pooling::Mean },
        labels => Task::Classification(HeadConfig {
            dense: Activation::Tanh,
            labels: labels.iter().map(|&label| label.to_owned()).collect(),
            function,
        }),
    }
}

/// What serves `model`.
pub(crate) fn parts(
    model: ServedModel,
    n_workers: usize,
    batch_time: Duration,
    limits: &EngineLimits,
    metrics: &Arc<Metrics>,
) -> ModelParts {
    let worker = || {
        let head = match &model.task {
            Task::Classification(head) => Some(head.clone()),
            Task::Embedding { .. } => None,
        };
        Box::new(Arithmetic::new(batch_time, head)) as Box<dyn Forward>
    };
    let workers = (0..n_workers).map(|_| worker()).collect();
    let engine = Engine::start_named(&model.served_name, workers, limits.clone(), Arc::clone(metrics)).unwrap();
    ModelParts { model, tokenizer: Arc::new(tokenizer()), engine }
}

/// A service without a socket.
pub(crate) struct Service {
    pub(crate) state: AppState,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) engine: Engine,
    pub(crate) router: Router,
}

/// A service as `change` has it.
pub(crate) fn service(change: impl FnOnce(&mut Setup)) -> Service {
    let mut setup = Setup::default();
    change(&mut setup);
    let metrics = Metrics::new();
    let others = setup.others.iter().map(|&(name, labels)| ServedModel {
        served_name: name.to_owned(),
        model_id: format!("test/{name}"),
        task: task(labels),
        ..setup.model.clone()
    });
    let models: Vec<ServedModel> = std::iter::once(setup.model.clone()).chain(others).collect();
    let parts: Vec<ModelParts> = models
        .into_iter()
        .map(|model| parts(model, setup.n_workers, setup.batch_time, &setup.limits, &metrics))
        .collect();
    let engine = parts[0].engine.clone();
    let state = AppState::new(setup.config, parts, Arc::clone(&metrics)).unwrap();
    if setup.ready {
        state.readiness().set_ready();
    }
    Service { router: router(state.clone()), state, metrics, engine }
}

/// An answer, whole.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body as `T`.
    #[track_caller]
    pub(crate) fn read<T: serde::de::DeserializeOwned>(&self) -> T {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        serde_json::from_slice(&self.body).unwrap()
    }

    /// A header's text; empty if it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// A request of JSON.
pub(crate) fn post(path: &str, body: &Value) -> Request<Body> {
    let request = Request::post(path).header("content-type", "application/json");
    request.body(Body::from(body.to_string())).unwrap()
}

impl Service {
    /// Answers `request` through the router.
    pub(crate) async fn ask(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    /// Posts JSON.
    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.ask(post(path, &body)).await
    }

    /// Gets a page.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask(Request::get(path).body(Body::empty()).unwrap()).await
    }
}

/// A service on a socket.
pub(crate) struct Serving {
    pub(crate) service: Service,
    pub(crate) address: SocketAddr,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) ended: tokio::task::JoinHandle<std::io::Result<()>>,
}

/// A service on a free port, that is given `grace` to drain.
pub(crate) async fn serving(grace: Duration, change: impl FnOnce(&mut Setup)) -> Serving {
    let service = service(change);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move {
        // Also ends when the test drops its end.
        stopped.await.ok();
    };
    let ended = tokio::spawn(serve(listener, service.state.clone(), shutdown, grace));
    Serving { service, address, stop: Some(stop), ended }
}

impl Serving {
    /// Begins the drain.
    pub(crate) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }
}

/// A connection's two directions.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// One connection, spoken to by hand: every byte is under the test's control.
pub(crate) struct Client {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> std::io::Result<Self> {
        Ok(Self::over(TcpStream::connect(address).await?))
    }

    pub(crate) fn over(stream: impl Stream + 'static) -> Self {
        Self { stream: Box::new(stream), buffer: Vec::new() }
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// A request of HTTP/1.1 with the given body.
    pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        let mut request = request.into_bytes();
        request.extend_from_slice(body);
        request
    }

    pub(crate) async fn post(&mut self, path: &str, body: &Value) -> std::io::Result<Answer> {
        let headers = [("content-type", "application/json")];
        self.send(&Self::request("POST", path, &headers, body.to_string().as_bytes())).await?;
        self.answer().await
    }

    pub(crate) async fn get(&mut self, path: &str) -> std::io::Result<Answer> {
        self.send(&Self::request("GET", path, &[], &[])).await?;
        self.answer().await
    }

    /// Bytes have come that no answer has taken.
    pub(crate) fn has_part(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Whether `text` has come and no answer has taken it.
    pub(crate) fn has(&self, text: &str) -> bool {
        self.buffer.windows(text.len()).any(|part| part == text.as_bytes())
    }

    /// Whether the server has sent something, or has closed the connection, within a millisecond.
    pub(crate) async fn has_more(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(1), self.more()).await.is_ok()
    }

    /// Takes one byte from the connection, if one comes.
    pub(crate) async fn read_byte(&mut self) {
        self.stream.read_exact(&mut [0]).await.ok();
    }

    async fn more(&mut self) -> std::io::Result<()> {
        let mut chunk = [0; 16384];
        let n_bytes = self.stream.read(&mut chunk).await?;
        if n_bytes == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&chunk[..n_bytes]);
        Ok(())
    }

    async fn line(&mut self) -> std::io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.buffer.drain(..end + 2).take(end).collect();
                return Ok(String::from_utf8(line).unwrap());
            }
            self.more().await?;
        }
    }

    async fn exactly(&mut self, n_bytes: usize) -> std::io::Result<Vec<u8>> {
        while self.buffer.len() < n_bytes {
            self.more().await?;
        }
        Ok(self.buffer.drain(..n_bytes).collect())
    }

    /// Whether the server closes the connection without another byte.
    pub(crate) async fn is_closed(&mut self) -> bool {
        self.more().await.is_err()
    }

    /// The next answer, whole.
    pub(crate) async fn answer(&mut self) -> std::io::Result<Answer> {
        let status_line = self.line().await?;
        let status = status_line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = HeaderMap::new();
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.append(axum::http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.trim().parse().unwrap());
        }
        let mut body = Vec::new();
        if headers.get("transfer-encoding").is_some_and(|value| value == "chunked") {
            loop {
                let len = usize::from_str_radix(&self.line().await?, 16).unwrap();
                body.extend(self.exactly(len).await?);
                assert_eq!(self.line().await?, "");
                if len == 0 {
                    break;
                }
            }
        } else if let Some(len) = headers.get("content-length") {
            body = self.exactly(len.to_str().unwrap().parse().unwrap()).await?;
        }
        Ok(Answer { status, headers, body })
    }
}
