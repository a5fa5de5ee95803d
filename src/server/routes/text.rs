//! Routes that ask the tokenizer alone.

use axum::response::{IntoResponse, Response};

use crate::server::api::{DecodeRequest, SimpleToken, Texts, TokenizeRequest};
use crate::server::error::ServerError;
use crate::server::extract::{Call, SMALL_BODY};
use crate::server::inputs::{check_chars, checked_batch, max_chars, prompt, prompted, tokenizing};
use crate::server::memory::{held, take_above};
use crate::server::models::Model;
use crate::server::routes::ops::json;
use crate::server::tokens::TokensWriter;
use crate::text::{Piece, TextError, Tokenizer};

/// The tokens of each text.
#[utoipa::path(post, path = "/tokenize", tag = "Tokenizer", request_body = TokenizeRequest,
    responses((status = 200, description = "A list of tokens per text", body = Vec<Vec<SimpleToken>>)))]
pub(crate) async fn tokenize(call: Call<TokenizeRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    let TokenizeRequest { inputs, add_special_tokens, prompt_name } = body;
    let texts = match inputs {
        Texts::One(text) => vec![text],
        Texts::Many(texts) => checked_batch(&target.app, texts, "inputs")?,
    };
    if texts.iter().any(String::is_empty) {
        return Err(ServerError::Empty { field: "inputs" });
    }
    // Tokens are written as objects, some fifty bytes for each few of text.
    let n_bytes = texts.iter().map(|text| 4 * text.len()).sum();
    let ((writer, memory), _) = tokenizing(&target, &clock, n_bytes, move |target, tokenizer, wanted| {
        let prompt = prompt(&target.model, prompt_name.as_deref())?;
        for text in &texts {
            check_chars(&target.model, &[prompt.unwrap_or_default(), text])?;
        }
        let mut writer = TokensWriter::default();
        for text in texts {
            if !wanted.now() {
                // Nobody will see this.
                return Err(ServerError::Internal);
            }
            let text = prompted(prompt, &text).into_owned();
            let pieces = tokenizer.encode_detailed(&text, add_special_tokens)?;
            writer.push(text, pieces);
        }
        // The share of the memory stays with the texts, also when their client has left.
        Ok((writer, memory))
    })
    .await?;
    drop(memory);
    // The client may take its time to read the answer.
    let memory = take_above(SMALL_BODY, &target.app, writer.n_bytes())?;
    Ok(writer.respond(memory))
}

/// The tokens of a text.
pub(crate) fn tokens(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<SimpleToken>, TextError> {
    let pieces = tokenizer.encode_detailed(text, add_special)?;
    let token = |piece: Piece| SimpleToken {
        id: piece.id,
        text: piece.text,
        special: piece.special,
        start: piece.span.as_ref().map(|span| span.start),
        stop: piece.span.map(|span| span.end),
    };
    Ok(pieces.into_iter().map(token).collect())
}

/// The text of ids, all of which must be known, and no more than a text that is tokenized may have characters.
pub(crate) fn text_of(
    model: &Model,
    tokenizer: &Tokenizer,
    ids: &[u32],
    skip_special: bool,
) -> Result<String, ServerError> {
    let limit = max_chars(model);
    if ids.len() > limit {
        let reason = format!("must have at most {limit} ids. Given: {}", ids.len());
        return Err(ServerError::Value { field: "ids", reason });
    }
    match ids.iter().find(|&&id| !tokenizer.knows(id)) {
        Some(&id) => Err(ServerError::TokenId { id, vocab_size: tokenizer.vocab_size() }),
        None => Ok(tokenizer.decode(ids, skip_special)?),
    }
}

/// The text of each list of ids.
#[utoipa::path(post, path = "/decode", tag = "Tokenizer", request_body = DecodeRequest,
    responses((status = 200, description = "One text per list of ids", body = Vec<String>)))]
pub(crate) async fn decode(call: Call<DecodeRequest>) -> Result<Response, ServerError> {
    let Call { target, body, clock, memory } = call;
    let DecodeRequest { ids, skip_special_tokens } = body;
    let lists = checked_batch(&target.app, ids.0, "ids")?;
    if lists.iter().any(Vec::is_empty) {
        return Err(ServerError::Empty { field: "ids" });
    }
    let n_bytes = lists.iter().map(|ids| 4 * ids.len()).sum();
    let ((bytes, memory), _) = tokenizing(&target, &clock, n_bytes, move |target, tokenizer, _| {
        let mut texts = Vec::with_capacity(lists.len());
        for ids in &lists {
            texts.push(text_of(&target.model, tokenizer, ids, skip_special_tokens)?);
        }
        Ok((serde_json::to_vec(&texts).expect("a list of strings is always JSON"), memory))
    })
    .await?;
    drop(memory);
    let memory = take_above(SMALL_BODY, &target.app, bytes.len())?;
    Ok(json(held(bytes, memory)).into_response())
}
