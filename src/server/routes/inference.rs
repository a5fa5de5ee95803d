//! The Open Inference Protocol, version 2, as KServe speaks it.

use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};

use crate::engine::Sequence;
use crate::model::Want;
use crate::server::api::{
    Bounded, InferRequest, InferResponse, InferTensor, InferredTensor, Item, ModelMetadata, ModelReady, Object,
    ServerLive, ServerMetadata, ServerReady, TensorData, TensorMetadata,
};
use crate::server::compute::{Computed, Work, compute};
use crate::server::config::Task;
use crate::server::error::ServerError;
use crate::server::extract::{Call, Received, Target};
use crate::server::inputs::{Options, Piece, checked_batch, checked_len};
use crate::server::memory::held;
use crate::server::models::{Model, json as to_json};
use crate::server::routes::embed::{checked_dimensions, vectors};
use crate::server::routes::ops::{is_ready, json};
use crate::server::routes::score::scores;
use crate::server::state::AppState;
use crate::telemetry::Route;

/// The wildcard route of what is below a model.
pub(crate) const MODEL_PATH: &str = "/v2/models/{*rest}";

/// What follows the name of a model, or its version.
const INFER: &str = "/infer";
const READY: &str = "/ready";

/// Names of the tensors.
const TEXT: &str = "text";
const TEXT_PAIR: &str = "text_pair";
const INPUT_IDS: &str = "input_ids";
const ATTENTION_MASK: &str = "attention_mask";
const TOKEN_TYPE_IDS: &str = "token_type_ids";
const EMBEDDING: &str = "embedding";
const SCORES: &str = "scores";
const LOGITS: &str = "logits";

/// The server.
#[utoipa::path(get, path = "/v2", tag = "Open Inference Protocol",
    responses((status = 200, description = "The server", body = ServerMetadata)))]
pub(crate) async fn server() -> Response {
    let metadata = ServerMetadata { name: "niwaki", version: env!("CARGO_PKG_VERSION"), extensions: Vec::new() };
    json(to_json(&metadata)).into_response()
}

/// Whether the process runs.
#[utoipa::path(get, path = "/v2/health/live", operation_id = "inference_live", tag = "Open Inference Protocol",
    responses((status = 200, description = "The process runs", body = ServerLive)))]
pub(crate) async fn live() -> Response {
    json(to_json(&ServerLive { live: true })).into_response()
}

/// Whether requests are taken.
#[utoipa::path(get, path = "/v2/health/ready", operation_id = "inference_ready", tag = "Open Inference Protocol",
    responses((status = 200, description = "Requests are taken", body = ServerReady)))]
pub(crate) async fn ready(State(app): State<AppState>) -> Result<Response, ServerError> {
    is_ready(&app)?;
    Ok(json(to_json(&ServerReady { ready: true })).into_response())
}

/// What is asked of a model. Its name may hold slashes, which not every client writes as `%2F`.
#[derive(Debug, PartialEq)]
pub(crate) struct Asked<'a> {
    route: Route,
    name: &'a str,
    version: Option<&'a str>,
}

impl<'a> Asked<'a> {
    /// Of the path as it is written, which tells the route, and what [`MODEL_PATH`]'s wildcard stands for.
    fn of(path: &str, rest: &'a str) -> Self {
        let route = route_of(path);
        let end = match route {
            Route::Infer => INFER,
            Route::InferenceModelReady => READY,
            _ => "",
        };
        let rest = rest.strip_suffix(end).unwrap_or(rest);
        match rest.rsplit_once("/versions/").filter(|(_, version)| !version.contains('/')) {
            Some((name, version)) => Self { route, name, version: Some(version) },
            None => Self { route, name: rest, version: None },
        }
    }

    fn check_version(&self, model: &Model) -> Result<(), ServerError> {
        match self.version {
            Some(version) if model.card.model_sha.as_deref() != Some(version) => Err(ServerError::NoSuchModel),
            _ => Ok(()),
        }
    }
}

/// The route of a path that [`MODEL_PATH`] matches; with a version it is the same.
pub(crate) fn route_of(path: &str) -> Route {
    let rest = path.strip_prefix("/v2/models/").unwrap_or_default();
    if rest.ends_with(INFER) {
        Route::Infer
    } else if rest.ends_with(READY) {
        Route::InferenceModelReady
    } else {
        Route::InferenceModel
    }
}

/// What is asked of a model, by any method: which are taken depends on the end of the path.
pub(crate) async fn of_model(
    State(app): State<AppState>,
    Path(rest): Path<String>,
    request: Request,
) -> Result<Response, ServerError> {
    let path = request.uri().path().to_owned();
    let asked = Asked::of(&path, &rest);
    match (asked.route, request.method()) {
        (Route::Infer, &Method::POST) => infer(&asked, Received::from_request(request, &app).await?).await,
        (Route::Infer, _) => Ok(not_allowed("POST")),
        (Route::InferenceModelReady, &Method::GET | &Method::HEAD) => model_ready(&app, &asked),
        (_, &Method::GET | &Method::HEAD) => model(&app, &asked),
        _ => Ok(not_allowed("GET,HEAD")),
    }
}

fn not_allowed(methods: &'static str) -> Response {
    ([(header::ALLOW, HeaderValue::from_static(methods))], ServerError::MethodNotAllowed).into_response()
}

/// A model's tensors.
#[utoipa::path(get, path = "/v2/models/{name}", operation_id = "inference_model", tag = "Open Inference Protocol",
    params(("name" = String, Path, description = "Name of the model; `/versions/` and its version may follow")),
    responses((status = 200, description = "The model's tensors", body = ModelMetadata)))]
pub(crate) fn model(app: &AppState, asked: &Asked<'_>) -> Result<Response, ServerError> {
    let model = app.models.named(asked.name)?;
    asked.check_version(&model)?;
    let tensor = |name, datatype, shape: &[i64]| TensorMetadata { name, datatype, shape: shape.to_vec() };
    let mut inputs = vec![tensor(TEXT, "BYTES", &[-1])];
    let outputs = match &model.card.task {
        Task::Embedding { .. } => vec![tensor(EMBEDDING, "FP32", &[-1, size(model.card.d_model)])],
        Task::Classification(head) => {
            inputs.push(tensor(TEXT_PAIR, "BYTES", &[-1]));
            [SCORES, LOGITS].map(|name| tensor(name, "FP32", &[-1, size(head.labels.len())])).to_vec()
        }
    };
    inputs.extend([INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS].map(|name| tensor(name, "INT64", &[-1, -1])));
    let metadata = ModelMetadata {
        name: model.card.served_name.clone(),
        versions: model.card.model_sha.iter().cloned().collect(),
        platform: "niwaki",
        inputs,
        outputs,
    };
    Ok(json(to_json(&metadata)).into_response())
}

fn size(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Whether a model takes requests.
#[utoipa::path(get, path = "/v2/models/{name}/ready", tag = "Open Inference Protocol",
    params(("name" = String, Path, description = "Name of the model; `/versions/` and its version may follow")),
    responses((status = 200, description = "The model takes requests", body = ModelReady)))]
pub(crate) fn model_ready(app: &AppState, asked: &Asked<'_>) -> Result<Response, ServerError> {
    let model = app.models.named(asked.name)?;
    asked.check_version(&model)?;
    is_ready(app)?;
    let name = model.card.served_name.clone();
    Ok(json(to_json(&ModelReady { name, ready: true })).into_response())
}

/// Embeddings or scores of texts (`text`, and `text_pair` for pairs) or of token ids (`input_ids`).
#[utoipa::path(post, path = "/v2/models/{name}/infer", tag = "Open Inference Protocol",
    request_body = InferRequest,
    params(("name" = String, Path, description = "Name of the model; `/versions/` and its version may follow")),
    responses((status = 200, description = "The output tensors", body = InferResponse)))]
pub(crate) async fn infer(asked: &Asked<'_>, received: Received) -> Result<Response, ServerError> {
    let received = received.for_model(asked.name.to_owned());
    let Call { target, body, clock, memory } = received.parse::<InferRequest>().await?;
    asked.check_version(&target.model)?;
    let Object(parameters) = body.parameters.unwrap_or_default();
    let dimensions = checked_dimensions(&target.model, parameters.dimensions)?;
    // Serializers that do not leave out empty lists write one where nothing in particular is asked for.
    let outputs = body.outputs.filter(|all| !all.is_empty());
    let wanted: Option<Vec<String>> = outputs.map(|all| all.into_iter().map(|Object(output)| output.name).collect());
    check_outputs(&target.model, wanted.as_deref())?;
    let pieces = pieces(&target, body.inputs)?;
    let options =
        Options { truncate: parameters.truncate, direction: parameters.truncation_direction, prompt_name: None };
    let work = Work { clock, body_memory: memory, pieces, field: "inputs", echoes: false };
    let Computed { reply, timing, memory } = compute(&target, work, options, Want::Pooled).await?;
    let n = reply.rows.len();
    let tensor = |name, rows: Vec<Vec<f32>>| {
        let width = rows.first().map_or(0, Vec::len);
        InferredTensor { name, shape: [n, width], datatype: "FP32", data: rows.concat() }
    };
    let mut outputs = match &target.model.card.task {
        Task::Embedding { .. } => {
            vec![tensor(EMBEDDING, vectors(reply, dimensions, parameters.normalize.unwrap_or(true)))]
        }
        Task::Classification(head) => {
            let logits: Vec<Vec<f32>> = reply.rows.into_iter().map(|rows| rows.pooled).collect();
            let scores = logits.iter().map(|values| scores(head, values.clone(), false)).collect();
            vec![tensor(SCORES, scores), tensor(LOGITS, logits)]
        }
    };
    if let Some(wanted) = wanted {
        outputs.retain(|output| wanted.iter().any(|name| name == output.name));
    }
    let response = InferResponse {
        model_name: target.model.card.served_name.clone(),
        model_version: target.model.card.model_sha.clone(),
        id: body.id,
        outputs,
    };
    Ok(timing.on(json(held(to_json(&response), memory)).into_response()))
}

fn invalid(field: &'static str, reason: impl Into<String>) -> ServerError {
    ServerError::Value { field, reason: reason.into() }
}

fn check_outputs(model: &Model, wanted: Option<&[String]>) -> Result<(), ServerError> {
    let known: &[&str] = match model.card.task {
        Task::Embedding { .. } => &[EMBEDDING],
        Task::Classification(_) => &[SCORES, LOGITS],
    };
    match wanted.unwrap_or_default().iter().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(_) => Err(invalid("outputs", format!("must be of {}", known.join(", ")))),
    }
}

/// The input tensors of a request, by name.
#[derive(Default)]
struct Tensors {
    text: Option<Bounded<String>>,
    text_pair: Option<Bounded<String>>,
    input_ids: Option<Matrix>,
    attention_mask: Option<Matrix>,
    token_type_ids: Option<Matrix>,
}

/// Integers in rows of one length.
struct Matrix {
    values: Vec<i64>,
    width: usize,
}

impl Matrix {
    fn n_rows(&self) -> usize {
        self.values.len() / self.width
    }

    fn row(&self, index: usize) -> &[i64] {
        &self.values[index * self.width..(index + 1) * self.width]
    }
}

/// One piece per row of the tensors, which are counted first: small rows cost more as pieces than as JSON.
fn pieces(target: &Target, inputs: Vec<Object<InferTensor>>) -> Result<Vec<Piece>, ServerError> {
    let mut tensors = Tensors::default();
    for Object(tensor) in inputs {
        let known = match tensor.name.as_str() {
            TEXT => tensors.text.replace(texts(tensor)?).is_some(),
            TEXT_PAIR => tensors.text_pair.replace(texts(tensor)?).is_some(),
            INPUT_IDS => tensors.input_ids.replace(matrix(tensor)?).is_some(),
            ATTENTION_MASK => tensors.attention_mask.replace(matrix(tensor)?).is_some(),
            TOKEN_TYPE_IDS => tensors.token_type_ids.replace(matrix(tensor)?).is_some(),
            _ => return Err(invalid("inputs", "must be text, text_pair, input_ids, attention_mask or token_type_ids")),
        };
        if known {
            return Err(invalid("inputs", "must name each tensor once"));
        }
    }
    match tensors {
        Tensors { text: Some(texts), text_pair, input_ids: None, attention_mask: None, token_type_ids: None } => {
            let texts = checked_batch(&target.app, texts, "inputs")?;
            let Some(second) = text_pair else {
                return Ok(texts.into_iter().map(|text| Piece::Item(Item::Text(text))).collect());
            };
            if second.n_sent != texts.len() {
                return Err(invalid("text_pair", format!("must have as many elements as text, {}", texts.len())));
            }
            Ok(texts.into_iter().zip(second.items).map(|(first, second)| Piece::Pair(first.into(), second)).collect())
        }
        Tensors { text: None, text_pair: None, input_ids: Some(ids), attention_mask, token_type_ids } => {
            checked_len(&target.app, ids.n_rows(), "inputs")?;
            let n_token_types = target.model.card.n_token_types;
            sequences(&ids, attention_mask.as_ref(), token_type_ids.as_ref(), n_token_types)
        }
        _ => Err(invalid("inputs", "must be text (and text_pair), or input_ids (with its mask and types)")),
    }
}

fn texts(tensor: InferTensor) -> Result<Bounded<String>, ServerError> {
    let InferTensor { shape, datatype, data, .. } = tensor;
    if datatype != "BYTES" {
        return Err(invalid("datatype", "of texts must be BYTES"));
    }
    let texts = match data {
        TensorData::Text(texts) => texts,
        TensorData::Empty => Bounded { items: Vec::new(), n_sent: 0 },
        TensorData::Integers(_) => return Err(invalid("data", "of BYTES must be strings")),
    };
    match shape[..] {
        [n] | [n, 1] if n == texts.n_sent => Ok(texts),
        _ => Err(invalid("shape", format!("must be [{0}] or [{0}, 1] for {0} texts", texts.n_sent))),
    }
}

fn matrix(tensor: InferTensor) -> Result<Matrix, ServerError> {
    let InferTensor { shape, datatype, data, .. } = tensor;
    if !matches!(datatype.as_str(), "INT64" | "INT32") {
        return Err(invalid("datatype", "of token ids, masks and types must be INT64"));
    }
    let values = match data {
        TensorData::Integers(values) => values,
        TensorData::Empty => Vec::new(),
        TensorData::Text(_) => return Err(invalid("data", "of INT64 must be integers")),
    };
    match shape[..] {
        [rows, width] if rows.checked_mul(width) == Some(values.len()) && width > 0 => Ok(Matrix { values, width }),
        _ => Err(invalid("shape", format!("must be [rows, length] of the {} values", values.len()))),
    }
}

/// The rows of `ids` without what the mask hides: batches have no padding here.
fn sequences(
    ids: &Matrix,
    mask: Option<&Matrix>,
    types: Option<&Matrix>,
    n_token_types: usize,
) -> Result<Vec<Piece>, ServerError> {
    for (field, other) in [(ATTENTION_MASK, mask), (TOKEN_TYPE_IDS, types)] {
        if other.is_some_and(|other| other.width != ids.width || other.values.len() != ids.values.len()) {
            return Err(invalid(field, "must have the shape of input_ids"));
        }
    }
    let mut pieces = Vec::with_capacity(ids.n_rows());
    for index in 0..ids.n_rows() {
        let (mask, types) = (mask.map(|mask| mask.row(index)), types.map(|types| types.row(index)));
        let is_seen = |at: usize| mask.is_none_or(|mask| mask[at] != 0);
        let mut sequence = Sequence::default();
        for (at, &id) in ids.row(index).iter().enumerate().filter(|(at, _)| is_seen(*at)) {
            sequence.ids.push(u32::try_from(id).map_err(|_| invalid(INPUT_IDS, "must not be negative or above 2^32"))?);
            if let Some(types) = types.filter(|_| n_token_types > 1) {
                let kind = u8::try_from(types[at]).ok().filter(|kind| usize::from(*kind) < n_token_types);
                let reason = || invalid(TOKEN_TYPE_IDS, format!("must be less than {n_token_types}"));
                sequence.token_types.push(kind.ok_or_else(reason)?);
            }
        }
        pieces.push(Piece::Sequence(sequence));
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_tell_name_version_and_what_is_asked() {
        use Route::{Infer, InferenceModel, InferenceModelReady};
        for (rest, route, name, version) in [
            ("a", InferenceModel, "a", None),
            ("a/ready", InferenceModelReady, "a", None),
            ("a/infer", Infer, "a", None),
            ("org/a/infer", Infer, "org/a", None),
            ("org/a", InferenceModel, "org/a", None),
            ("infer", InferenceModel, "infer", None),
            ("a/versions/1", InferenceModel, "a", Some("1")),
            ("org/a/versions/1/ready", InferenceModelReady, "org/a", Some("1")),
            ("a/versions/1/infer", Infer, "a", Some("1")),
            ("a/versions/1/2", InferenceModel, "a/versions/1/2", None),
        ] {
            let asked = Asked::of(&format!("/v2/models/{rest}"), rest);
            assert_eq!(asked, Asked { route, name, version }, "{rest}");
        }
        assert_eq!(Asked::of("/v2/models/a%2Finfer", "a/infer").name, "a/infer", "that belongs to the name");
    }
}
