//! Tokens as JSON, written piece by piece as the connection takes it.
//!
//! A text of a megabyte may have a million tokens, each an object of some sixty bytes. Until they are written they are kept as
//! twelve bytes each, beside the texts that they are parts of.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::OwnedSemaphorePermit;

use super::api::SimpleToken;
use super::pieces;
use crate::text::Piece;

/// Tokens written in one go: at some 100 ns each, a fifth of a millisecond.
const MAX_TOKENS_AT_ONCE: usize = 2048;

/// Bytes of a token's object, about.
const BYTES_PER_TOKEN: usize = 64;

/// Where a special token begins, which stands for no part of a text.
const SPECIAL: u32 = u32::MAX;

/// A token, whose text is a part of the text that it is of.
#[derive(Debug, Clone, Copy)]
struct Token {
    id: u32,
    start: u32,
    stop: u32,
}

/// A text and its tokens.
#[derive(Debug, Default)]
struct Tokenized {
    text: String,
    tokens: Vec<Token>,
}

/// Writes the tokens of texts piece by piece.
#[derive(Debug, Default)]
pub(crate) struct TokensWriter {
    texts: Vec<Tokenized>,
    /// Names of the special tokens among them.
    specials: BTreeMap<u32, String>,
    /// The text being written, and how many of its tokens are out.
    text: usize,
    token: usize,
    started: bool,
}

impl TokensWriter {
    /// Adds a text and what the tokenizer made of it.
    pub(crate) fn push(&mut self, text: String, pieces: Vec<Piece>) {
        let place = |place: usize| u32::try_from(place).expect("texts are bounded by the model's length");
        let mut tokens = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let Some(span) = piece.span else {
                tokens.push(Token { id: piece.id, start: SPECIAL, stop: SPECIAL });
                self.specials.entry(piece.id).or_insert(piece.text);
                continue;
            };
            tokens.push(Token { id: piece.id, start: place(span.start), stop: place(span.end) });
        }
        self.texts.push(Tokenized { text, tokens });
    }

    fn n_tokens(&self) -> usize {
        self.texts.iter().map(|text| text.tokens.len()).sum()
    }

    /// Bytes that it holds.
    pub(crate) fn n_bytes(&self) -> usize {
        self.n_tokens() * size_of::<Token>() + self.texts.iter().map(|text| text.text.len()).sum::<usize>()
    }

    /// Appends up to `max_tokens` tokens to `out`; says whether that was the end.
    fn write(&mut self, out: &mut Vec<u8>, max_tokens: usize) -> bool {
        if !self.started {
            self.started = true;
            out.push(b'[');
        }
        let mut n_tokens = 0;
        while let Some(Tokenized { text, tokens }) = self.texts.get(self.text) {
            if n_tokens >= max_tokens {
                return false;
            }
            if self.token == 0 {
                out.extend_from_slice(if self.text == 0 { b"[" } else { b",[" });
            }
            let end = tokens.len().min(self.token.saturating_add(max_tokens - n_tokens));
            for (index, token) in tokens.iter().enumerate().take(end).skip(self.token) {
                if index > 0 {
                    out.push(b',');
                }
                let token = object(token, text, &self.specials);
                serde_json::to_writer(&mut *out, &token).expect("strings and numbers are always JSON");
            }
            if end < tokens.len() {
                self.token = end;
                return false;
            }
            out.push(b']');
            n_tokens += end - self.token;
            // What is written is of no more use, and may be large.
            self.texts[self.text] = Tokenized::default();
            self.text += 1;
            self.token = 0;
        }
        out.push(b']');
        true
    }

    /// The answer. `memory` is held until it is written.
    pub(crate) fn respond(mut self, memory: Option<OwnedSemaphorePermit>) -> Response {
        let n_tokens = self.n_tokens();
        let body = if n_tokens <= MAX_TOKENS_AT_ONCE {
            let mut out = Vec::with_capacity(n_tokens * BYTES_PER_TOKEN + 4 * (self.texts.len() + 1));
            self.write(&mut out, usize::MAX);
            Body::from(out)
        } else {
            pieces::body(memory, move || {
                let mut out = Vec::with_capacity((MAX_TOKENS_AT_ONCE + 1) * BYTES_PER_TOKEN);
                let ended = self.write(&mut out, MAX_TOKENS_AT_ONCE);
                (out, ended)
            })
        };
        ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
    }
}

fn object(token: &Token, text: &str, specials: &BTreeMap<u32, String>) -> SimpleToken {
    let Token { id, start, stop } = *token;
    if start == SPECIAL {
        let text = specials.get(&id).cloned().unwrap_or_default();
        return SimpleToken { id, text, special: true, start: None, stop: None };
    }
    let (start, stop) = (start as usize, stop as usize);
    // A byte-level token may stand for a part of a character.
    let bytes = text.as_bytes().get(start..stop).unwrap_or_default();
    let text = String::from_utf8_lossy(bytes).into_owned();
    SimpleToken { id, text, special: false, start: Some(start), stop: Some(stop) }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use serde_json::{Value, json};

    use super::*;

    fn special(id: u32, text: &str) -> Piece {
        Piece { id, text: text.to_owned(), special: true, span: None }
    }

    /// A token per character of `text`, between special tokens.
    fn writer(texts: &[&str]) -> TokensWriter {
        let mut writer = TokensWriter::default();
        for text in texts {
            let mut pieces = vec![special(2, "[CLS]")];
            for (start, letter) in text.char_indices() {
                let span = Some(start..start + letter.len_utf8());
                pieces.push(Piece { id: u32::from(letter), text: letter.to_string(), special: false, span });
            }
            pieces.push(special(3, "[SEP]"));
            writer.push((*text).to_owned(), pieces);
        }
        writer.push(String::new(), Vec::new());
        writer
    }

    #[test]
    fn pieces_of_any_size_make_the_same_json() {
        let written = |max_tokens: usize| {
            let (mut writer, mut out) = (writer(&["aé\"", "", "庭"]), Vec::new());
            while !writer.write(&mut out, max_tokens) {}
            String::from_utf8(out).unwrap()
        };
        let whole = written(usize::MAX);
        let lists: Vec<Vec<Value>> = serde_json::from_str(&whole).unwrap();
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [5, 2, 3, 0]);
        assert_eq!(lists[1][0], json!({"id": 2, "text": "[CLS]", "special": true, "start": null, "stop": null}));
        assert_eq!(lists[0][2], json!({"id": 0xe9, "text": "é", "special": false, "start": 1, "stop": 3}));
        for max_tokens in 1..12 {
            assert_eq!(written(max_tokens), whole, "{max_tokens}");
        }
    }

    #[tokio::test]
    async fn many_tokens_come_in_pieces_that_add_up_and_are_kept_small() {
        let small = writer(&["a"]).respond(None);
        assert!(hyper::body::Body::size_hint(small.body()).exact().is_some());
        let text = "!".repeat(10_000);
        let writer = writer(&[&text, &text]);
        assert_eq!(writer.n_bytes(), 2 * (12 * 10_002 + 10_000));
        let mut body = writer.respond(None).into_body();
        assert!(hyper::body::Body::size_hint(&body).exact().is_none());
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() < 200_000, "{}", piece.len());
            bytes.extend_from_slice(&piece);
        }
        let lists: Vec<Vec<Value>> = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [10_002, 10_002, 0]);
    }
}
