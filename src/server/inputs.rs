//! From the inputs of a request to sequences of token ids.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::api::{Bounded, Input, Item, TruncationDirection};
use super::error::{ServerError, shortened};
use super::extract::{Clock, Target};
use super::models::Model;
use super::state::AppState;
use crate::engine::Sequence;
use crate::telemetry::{Stage, events};
use crate::text::{Direction, Part, Tokenizer, Wanted};

/// Texts up to this many bytes together are tokenized on the spot. BERT's tokenizer takes some 0.4 µs per byte, so that
/// this stays well under the 500 µs that a task may keep the reactor; handing them to another thread costs two switches,
/// and under load a wait for the processor.
const INLINE_BYTES: usize = 512;

/// Inputs with more characters per token allowed than this are refused without tokenizing them, as Text Embeddings
/// Inference does, or cut before they are tokenized. A tokenizer takes more than a hundred bytes of memory per byte of text,
/// so that this is what bounds the cost of a request.
const MAX_CHARS_PER_TOKEN: usize = 250;

/// What becomes one sequence.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    /// A text or token ids.
    Item(Item),
    /// Two texts. The first is often shared by many pairs, and then tokenized once.
    Pair(Arc<str>, String),
    /// Token ids with types of their own.
    Sequence(Sequence),
}

impl Piece {
    /// Bytes to tokenize, or to look at.
    fn len(&self) -> usize {
        match self {
            Self::Item(Item::Text(text)) => text.len(),
            Self::Item(Item::Ids(ids)) => ids.len(),
            Self::Pair(first, second) => first.len() + second.len(),
            Self::Sequence(sequence) => sequence.ids.len(),
        }
    }
}

/// How inputs become sequences.
#[derive(Debug, Clone, Default)]
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
    /// The share of the memory for bodies that the inputs had.
    pub(crate) memory: Option<OwnedSemaphorePermit>,
}

/// The list of inputs, checked for their number.
pub(crate) fn pieces_of(app: &AppState, input: Input, field: &'static str) -> Result<Vec<Piece>, ServerError> {
    let items = match input {
        Input::One(item) => vec![item],
        Input::Many(many) => checked_batch(app, many, field)?,
    };
    Ok(items.into_iter().map(Piece::Item).collect())
}

/// A list that is neither empty nor too long.
pub(crate) fn checked_batch<T>(app: &AppState, list: Bounded<T>, field: &'static str) -> Result<Vec<T>, ServerError> {
    checked_len(app, list.n_sent, field)?;
    Ok(list.items)
}

/// Refuses a number of inputs that is none, or too many for one request.
pub(crate) fn checked_len(app: &AppState, n_inputs: usize, field: &'static str) -> Result<(), ServerError> {
    let limit = app.config.max_client_batch_size;
    match n_inputs {
        0 => Err(ServerError::Empty { field }),
        got if got > limit => Err(ServerError::ClientBatch { got, limit }),
        _ => Ok(()),
    }
}

/// The prompt that `name` stands for; the default one without a name.
pub(crate) fn prompt<'a>(model: &'a Model, name: Option<&str>) -> Result<Option<&'a str>, ServerError> {
    let Some(name) = name else { return Ok(model.card.default_prompt.as_deref()) };
    let unknown = || ServerError::Prompt { name: shortened(name, 64) };
    model.card.prompts.get(name).map(|prompt| Some(prompt.as_str())).ok_or_else(unknown)
}

/// `text` with `prompt` before it.
pub(crate) fn prompted<'a>(prompt: Option<&str>, text: &'a str) -> Cow<'a, str> {
    match prompt {
        None => Cow::Borrowed(text),
        Some(prompt) => Cow::Owned([prompt, text].concat()),
    }
}

/// Characters that the tokenizer is given at once, and ids that it makes a text of.
pub(crate) fn max_chars(model: &Model) -> usize {
    model.max_input_tokens.saturating_mul(MAX_CHARS_PER_TOKEN)
}

/// Refuses what has so many characters that it need not be tokenized to be refused.
pub(crate) fn check_chars(model: &Model, texts: &[&str]) -> Result<(), ServerError> {
    let limit = max_chars(model);
    if texts.iter().map(|text| text.len()).sum::<usize>() > limit {
        let got = texts.iter().map(|text| text.chars().count()).sum();
        if got > limit {
            return Err(ServerError::TooManyChars { got, limit });
        }
    }
    Ok(())
}

/// The first `n_chars` characters of `text`, or the last ones if it is cut from the left.
fn within(text: &str, n_chars: usize, direction: Direction) -> &str {
    if text.len() <= n_chars {
        return text;
    }
    match direction {
        Direction::Right => text.char_indices().nth(n_chars).map_or(text, |(end, _)| &text[..end]),
        // From behind the last character that is cut off.
        Direction::Left => {
            text.char_indices().nth_back(n_chars).map_or(text, |(start, cut)| &text[start + cut.len_utf8()..])
        }
    }
}

/// Runs `work` on the spot if it is about few bytes, else on the tokenizer's threads; counts its time.
pub(crate) async fn tokenizing<T: Send + 'static>(
    target: &Target,
    clock: &Clock,
    n_bytes: usize,
    work: impl FnOnce(&Target, &Tokenizer, &Wanted<'_>) -> Result<T, ServerError> + Send + 'static,
) -> Result<(T, Duration), ServerError> {
    let start = Instant::now();
    let pool = &target.model.pool;
    let done = if n_bytes <= INLINE_BYTES {
        work(target, pool.tokenizer(), &Wanted::ALWAYS)
    } else {
        let of_job = target.clone();
        let job = pool.run(move |tokenizer, wanted| work(&of_job, tokenizer, wanted));
        clock.within(&target.app, job).await?.map_err(ServerError::Pool)?
    }?;
    let took = start.elapsed();
    events::stage_passed(&target.app.metrics, Stage::Tokenize, took);
    clock.trace.stage(Stage::Tokenize, Duration::ZERO, took, &[("niwaki.bytes", n_bytes)]);
    Ok((done, took))
}

/// Turns the inputs of a request into sequences. `memory` is their share of the memory for bodies; it stays with them, as
/// they may wait for a thread longer than their client waits for an answer.
pub(crate) async fn encode(
    target: &Target,
    clock: &Clock,
    pieces: Vec<Piece>,
    options: Options,
    field: &'static str,
    memory: Option<OwnedSemaphorePermit>,
) -> Result<Encoded, ServerError> {
    let prompt_len = prompt(&target.model, options.prompt_name.as_deref())?.map_or(0, str::len);
    let n_bytes = pieces.iter().map(|piece| piece.len() + prompt_len).sum();
    let (mut encoded, took) = tokenizing(target, clock, n_bytes, move |target, tokenizer, wanted| {
        let Target { app, model } = target;
        let prompt = prompt(model, options.prompt_name.as_deref())?;
        let mut encoder = Encoder { app, model, tokenizer, prompt, options: &options, field, first: None };
        let mut encoded = Encoded {
            sequences: Vec::with_capacity(pieces.len()),
            n_chars: 0,
            n_tokens: 0,
            took: Duration::ZERO,
            memory,
        };
        for piece in pieces {
            if !wanted.now() {
                // Nobody will see this.
                return Err(ServerError::Internal);
            }
            let (sequence, n_chars) = encoder.encode(piece)?;
            encoded.n_chars += n_chars;
            encoded.n_tokens += sequence.ids.len();
            encoded.sequences.push(sequence);
        }
        Ok(encoded)
    })
    .await?;
    encoded.took = took;
    Ok(encoded)
}

struct Encoder<'a> {
    app: &'a AppState,
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    prompt: Option<&'a str>,
    options: &'a Options,
    field: &'static str,
    /// The first text of the last pair.
    first: Option<(Arc<str>, Part)>,
}

impl Encoder<'_> {
    /// The sequence of an input, and its characters (for ids, their number).
    fn encode(&mut self, piece: Piece) -> Result<(Sequence, usize), ServerError> {
        let empty = ServerError::Empty { field: self.field };
        match piece {
            Piece::Item(Item::Text(text)) if text.is_empty() => Err(empty),
            Piece::Item(Item::Text(text)) => {
                let n_chars = text.chars().count();
                Ok((Sequence::new(self.encode_text(&prompted(self.prompt, &text))?), n_chars))
            }
            Piece::Item(Item::Ids(ids)) if ids.is_empty() => Err(empty),
            Piece::Item(Item::Ids(ids)) => {
                let n_ids = ids.len();
                self.check_ids(&ids)?;
                let ids = match self.prompt {
                    None => self.fit(ids)?,
                    // A prompt is a text, so the ids have to become one too.
                    Some(_) => {
                        let text = self.tokenizer.decode(&ids, true)?;
                        self.encode_text(&prompted(self.prompt, &text))?
                    }
                };
                Ok((Sequence::new(ids), n_ids))
            }
            Piece::Pair(first, second) if first.is_empty() && second.is_empty() => Err(empty),
            Piece::Pair(first, second) => {
                let n_chars = first.chars().count() + second.chars().count();
                Ok((self.encode_pair(&first, &second)?, n_chars))
            }
            Piece::Sequence(sequence) if sequence.ids.is_empty() => Err(empty),
            Piece::Sequence(sequence) => {
                let n_ids = sequence.ids.len();
                self.check_ids(&sequence.ids)?;
                if sequence.token_types.is_empty() {
                    return Ok((Sequence::new(self.fit(sequence.ids)?), n_ids));
                }
                // Where to cut such a sequence only its maker knows.
                let limit = self.model.max_input_tokens;
                if n_ids > limit { Err(ServerError::TooLong { got: n_ids, limit }) } else { Ok((sequence, n_ids)) }
            }
        }
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), ServerError> {
        let vocab_size = self.model.card.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ServerError::TokenId { id, vocab_size }),
            None => Ok(()),
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
        let limit = self.model.max_input_tokens;
        if self.truncates() {
            let near = within(text, max_chars(self.model), self.direction());
            let (ids, was_cut) = self.tokenizer.encode_within(near, limit, self.direction())?;
            if was_cut || near.len() < text.len() {
                events::truncated(&self.app.metrics);
            }
            return Ok(ids);
        }
        check_chars(self.model, &[text])?;
        self.fit(self.tokenizer.encode(text, true)?)
    }

    fn encode_pair(&mut self, first: &Arc<str>, second: &str) -> Result<Sequence, ServerError> {
        let max_tokens = self.model.max_input_tokens;
        let limit = self.truncates().then(|| (max_tokens, self.direction()));
        if limit.is_none() {
            check_chars(self.model, &[first, second])?;
        }
        // Each for itself, so that the one that has more tokens is cut first, as it would be without this bound.
        let near = |text| limit.map_or(text, |(_, direction)| within(text, max_chars(self.model), direction));
        let (near_first, near_second) = (near(first), near(second));
        let known = self.first.take().filter(|(text, _)| Arc::ptr_eq(text, first)).map(|(_, part)| part);
        let part = match known {
            Some(part) => part,
            None => self.tokenizer.part(near_first)?,
        };
        let pair = self.tokenizer.pair(part.clone(), self.tokenizer.part(near_second)?, limit)?;
        self.first = Some((Arc::clone(first), part));
        if pair.was_cut || near_first.len() + near_second.len() < first.len() + second.len() {
            events::truncated(&self.app.metrics);
        }
        let got = pair.ids.len();
        if got > max_tokens {
            return Err(ServerError::TooLong { got, limit: max_tokens });
        }
        // A tokenizer may know of types that the model has no embedding for.
        let token_types = if self.model.card.n_token_types > 1 { pair.token_types } else { Vec::new() };
        Ok(Sequence { ids: pair.ids, token_types })
    }

    /// Cuts ids that are too many, or refuses them.
    fn fit(&self, ids: Vec<u32>) -> Result<Vec<u32>, ServerError> {
        let (got, limit) = (ids.len(), self.model.max_input_tokens);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters_from_either_side() {
        let text = "aé庭🌲b";
        for (n_chars, right, left) in [
            (0, "", ""),
            (1, "a", "b"),
            (2, "aé", "🌲b"),
            (3, "aé庭", "庭🌲b"),
            (4, "aé庭🌲", "é庭🌲b"),
            (5, text, text),
        ] {
            assert_eq!(within(text, n_chars, Direction::Right), right, "{n_chars}");
            assert_eq!(within(text, n_chars, Direction::Left), left, "{n_chars}");
        }
        // More bytes than characters allowed, and no more characters.
        assert_eq!(within(text, 10, Direction::Right), text);
        assert_eq!(within(text, 10, Direction::Left), text);
        assert_eq!(within("", 0, Direction::Left), "");
    }
}
