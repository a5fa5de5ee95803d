//! From the inputs of a request to sequences of token ids.

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;

use super::api::{Bounded, Input, Item, TruncationDirection};
use super::error::{ServerError, shortened};
use super::extract::Clock;
use super::state::AppState;
use crate::engine::Sequence;
use crate::telemetry::{Stage, events};
use crate::text::{Direction, Tokenizer, Wanted};

/// Texts up to this many bytes together are tokenized on the spot. BERT's tokenizer takes some 0.4 µs per byte, so that
/// this stays well under the 500 µs that a task may keep the reactor; handing them to another thread costs two switches,
/// and under load a wait for the processor.
const INLINE_BYTES: usize = 512;

/// Text Embeddings Inference refuses inputs with more characters per token allowed than this without tokenizing them.
const MAX_CHARS_PER_TOKEN: usize = 250;

/// How inputs become sequences.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) truncate: Option<bool>,
    pub(crate) direction: TruncationDirection,
    pub(crate) prompt_name: Option<String>,
}

/// Sequences for the engine, and what the headers tell of them.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) n_chars: usize,
    pub(crate) n_tokens: usize,
    pub(crate) took: Duration,
}

/// The list of inputs, checked for their number.
pub(crate) fn items_of(app: &AppState, input: Input, field: &'static str) -> Result<Vec<Item>, ServerError> {
    match input {
        Input::One(item) => Ok(vec![item]),
        Input::Many(many) => checked_batch(app, many, field),
    }
}

/// A list that is neither empty nor too long.
pub(crate) fn checked_batch<T>(app: &AppState, list: Bounded<T>, field: &'static str) -> Result<Vec<T>, ServerError> {
    let limit = app.config.max_client_batch_size;
    match list.n_sent {
        0 => Err(ServerError::Empty { field }),
        got if got > limit => Err(ServerError::ClientBatch { got, limit }),
        _ => Ok(list.items),
    }
}

/// The prompt that `name` stands for; the default one without a name.
pub(crate) fn prompt<'a>(app: &'a AppState, name: Option<&str>) -> Result<Option<&'a str>, ServerError> {
    let Some(name) = name else { return Ok(app.config.default_prompt.as_deref()) };
    let unknown = || ServerError::Prompt { name: shortened(name, 64) };
    app.config.prompts.get(name).map(|prompt| Some(prompt.as_str())).ok_or_else(unknown)
}

/// `text` with `prompt` before it.
pub(crate) fn prompted<'a>(prompt: Option<&str>, text: &'a str) -> Cow<'a, str> {
    match prompt {
        None => Cow::Borrowed(text),
        Some(prompt) => Cow::Owned([prompt, text].concat()),
    }
}

/// Runs `work` on the spot if it is about few bytes, else on the tokenizer's threads; counts its time.
pub(crate) async fn tokenizing<T: Send + 'static>(
    app: &AppState,
    clock: Clock,
    n_bytes: usize,
    work: impl FnOnce(&AppState, &Tokenizer, &Wanted<'_>) -> Result<T, ServerError> + Send + 'static,
) -> Result<(T, Duration), ServerError> {
    let start = Instant::now();
    let done = if n_bytes <= INLINE_BYTES {
        work(app, app.pool.tokenizer(), &Wanted::ALWAYS)
    } else {
        let state = app.clone();
        let job = app.pool.run(move |tokenizer, wanted| work(&state, tokenizer, wanted));
        clock.within(app, job).await?.map_err(ServerError::Pool)?
    }?;
    let took = start.elapsed();
    events::stage_passed(&app.metrics, Stage::Tokenize, took);
    Ok((done, took))
}

/// Turns the inputs of a request into sequences.
pub(crate) async fn encode(
    app: &AppState,
    clock: Clock,
    items: Vec<Item>,
    options: Options,
    field: &'static str,
) -> Result<Encoded, ServerError> {
    let prompt_len = prompt(app, options.prompt_name.as_deref())?.map_or(0, str::len);
    let n_bytes = items.iter().map(|item| match item {
        Item::Text(text) => text.len() + prompt_len,
        Item::Ids(ids) => ids.len() + prompt_len,
    });
    let (mut encoded, took) = tokenizing(app, clock, n_bytes.sum(), move |app, tokenizer, wanted| {
        let encoder =
            Encoder { app, tokenizer, prompt: prompt(app, options.prompt_name.as_deref())?, options: &options };
        let mut encoded =
            Encoded { sequences: Vec::with_capacity(items.len()), n_chars: 0, n_tokens: 0, took: Duration::ZERO };
        for item in items {
            if !wanted.now() {
                // Nobody will see this.
                return Err(ServerError::Internal);
            }
            let (ids, n_chars) = encoder.encode(item, field)?;
            encoded.n_chars += n_chars;
            encoded.n_tokens += ids.len();
            encoded.sequences.push(Sequence::new(ids));
        }
        Ok(encoded)
    })
    .await?;
    encoded.took = took;
    Ok(encoded)
}

struct Encoder<'a> {
    app: &'a AppState,
    tokenizer: &'a Tokenizer,
    prompt: Option<&'a str>,
    options: &'a Options,
}

impl Encoder<'_> {
    /// Ids of an input, and its characters (for ids, their number).
    fn encode(&self, item: Item, field: &'static str) -> Result<(Vec<u32>, usize), ServerError> {
        match item {
            Item::Text(text) if text.is_empty() => Err(ServerError::Empty { field }),
            Item::Text(text) => {
                let n_chars = text.chars().count();
                Ok((self.encode_text(&prompted(self.prompt, &text))?, n_chars))
            }
            Item::Ids(ids) if ids.is_empty() => Err(ServerError::Empty { field }),
            Item::Ids(ids) => {
                let n_ids = ids.len();
                let vocab_size = self.app.vocab_size;
                if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
                    return Err(ServerError::TokenId { id, vocab_size });
                }
                let ids = match self.prompt {
                    None => self.fit(ids)?,
                    // A prompt is a text, so the ids have to become one too.
                    Some(_) => {
                        let text = self.tokenizer.decode(&ids, true)?;
                        self.encode_text(&prompted(self.prompt, &text))?
                    }
                };
                Ok((ids, n_ids))
            }
        }
    }

    fn truncates(&self) -> bool {
        self.options.truncate.unwrap_or(self.app.config.auto_truncate)
    }

    fn direction(&self) -> Direction {
        match self.options.direction {
            TruncationDirection::Left => Direction::Left,
            TruncationDirection::Right => Direction::Right,
        }
    }

    fn encode_text(&self, text: &str) -> Result<Vec<u32>, ServerError> {
        let limit = self.app.max_input_tokens;
        if self.truncates() {
            let (ids, was_cut) = self.tokenizer.encode_within(text, limit, self.direction())?;
            if was_cut {
                events::truncated(&self.app.metrics);
            }
            return Ok(ids);
        }
        let max_chars = limit.saturating_mul(MAX_CHARS_PER_TOKEN);
        if text.len() > max_chars {
            let got = text.chars().count();
            if got > max_chars {
                return Err(ServerError::TooManyChars { got, limit: max_chars });
            }
        }
        self.fit(self.tokenizer.encode(text, true)?)
    }

    /// Cuts ids that are too many, or refuses them.
    fn fit(&self, ids: Vec<u32>) -> Result<Vec<u32>, ServerError> {
        let (got, limit) = (ids.len(), self.app.max_input_tokens);
        if got <= limit {
            return Ok(ids);
        }
        if !self.truncates() {
            return Err(ServerError::TooLong { got, limit });
        }
        events::truncated(&self.app.metrics);
        Ok(self.tokenizer.truncate(ids, limit, self.direction()).0)
    }
}
