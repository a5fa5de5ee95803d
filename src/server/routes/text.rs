//! Routes that ask the tokenizer alone.

use axum::extract::State;
use axum::response::{IntoResponse, Response};

use crate::server::api::{DecodeRequest, SimpleToken, Texts, TokenizeRequest};
use crate::server::error::ServerError;
use crate::server::extract::Call;
use crate::server::inputs::{checked_batch, prompt, prompted, tokenizing};
use crate::server::routes::ops::json;
use crate::server::state::AppState;

/// The tokens of each text.
#[utoipa::path(post, path = "/tokenize", tag = "Tokenizer", request_body = TokenizeRequest,
    responses((status = 200, description = "A list of tokens per text", body = Vec<Vec<SimpleToken>>)))]
pub(crate) async fn tokenize(
    State(app): State<AppState>,
    call: Call<TokenizeRequest>,
) -> Result<Response, ServerError> {
    let TokenizeRequest { inputs, add_special_tokens, prompt_name } = call.body;
    let texts = match inputs {
        Texts::One(text) => vec![text],
        Texts::Many(texts) => checked_batch(&app, texts, "inputs")?,
    };
    if texts.iter().any(String::is_empty) {
        return Err(ServerError::Empty { field: "inputs" });
    }
    // Tokens are written as objects, some fifty bytes for each few of text.
    let n_bytes = texts.iter().map(|text| 4 * text.len()).sum();
    let (bytes, _) = tokenizing(&app, call.clock, n_bytes, move |app, tokenizer, _| {
        let prompt = prompt(app, prompt_name.as_deref())?;
        let mut answer = Vec::with_capacity(texts.len());
        for text in &texts {
            let pieces = tokenizer.encode_detailed(&prompted(prompt, text), add_special_tokens)?;
            let tokens = pieces.into_iter().map(|piece| SimpleToken {
                id: piece.id,
                text: piece.text,
                special: piece.special,
                start: piece.span.as_ref().map(|span| span.start),
                stop: piece.span.map(|span| span.end),
            });
            answer.push(tokens.collect::<Vec<_>>());
        }
        Ok(serde_json::to_vec(&answer).expect("lists of strings and numbers are always JSON"))
    })
    .await?;
    Ok(json(bytes).into_response())
}

/// The text of each list of ids.
#[utoipa::path(post, path = "/decode", tag = "Tokenizer", request_body = DecodeRequest,
    responses((status = 200, description = "One text per list of ids", body = Vec<String>)))]
pub(crate) async fn decode(State(app): State<AppState>, call: Call<DecodeRequest>) -> Result<Response, ServerError> {
    let DecodeRequest { ids, skip_special_tokens } = call.body;
    let lists = checked_batch(&app, ids.0, "ids")?;
    if lists.iter().any(Vec::is_empty) {
        return Err(ServerError::Empty { field: "ids" });
    }
    let n_bytes = lists.iter().map(|ids| 4 * ids.len()).sum();
    let (bytes, _) = tokenizing(&app, call.clock, n_bytes, move |_, tokenizer, _| {
        let mut texts = Vec::with_capacity(lists.len());
        for ids in &lists {
            if let Some(&id) = ids.iter().find(|&&id| !tokenizer.knows(id)) {
                return Err(ServerError::TokenId { id, vocab_size: tokenizer.vocab_size() });
            }
            texts.push(tokenizer.decode(ids, skip_special_tokens)?);
        }
        Ok(serde_json::to_vec(&texts).expect("a list of strings is always JSON"))
    })
    .await?;
    Ok(json(bytes).into_response())
}
