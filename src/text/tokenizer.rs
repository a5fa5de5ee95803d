//! A Hugging Face tokenizer that never pads, and cuts only when told to.

use std::fmt;
use std::ops::Range;
use std::panic::catch_unwind;

use serde::de::IgnoredAny;
use tokenizers::models::ModelWrapper;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{
    Encoding, PostProcessor, Token, TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};

use super::TextError;

/// Which end of a long input is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// The beginning goes.
    Left,
    /// The end goes.
    #[default]
    Right,
}

/// A token as `/tokenize` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Token id.
    pub id: u32,
    /// The text it stands for; for a special token its name.
    pub text: String,
    /// Whether the tokenizer put it there.
    pub special: bool,
    /// The bytes it stands for; `None` for a special token.
    pub span: Option<Range<usize>>,
}

/// A text of a pair, tokenized without special tokens.
#[derive(Debug, Clone)]
pub struct Part(Encoding);

/// Two texts as one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Token ids, special tokens included.
    pub ids: Vec<u32>,
    /// One type per token: as the tokenizer's post-processor has it, 0 for the first text and 1 for the second in BERT.
    pub token_types: Vec<u8>,
    /// Whether anything was cut off.
    pub was_cut: bool,
}

/// A `tokenizer.json`, ready for use from any number of threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Special tokens put before a text.
    prefix: Vec<u32>,
    /// Special tokens put behind it.
    suffix: Vec<u32>,
    /// Special tokens put around and between two texts.
    n_special_pair: usize,
    vocab_size: usize,
    bytes: usize,
    /// `Some(margin)` if the tokens of a text's beginning do not depend on what follows the next blank, but for the last
    /// `margin` of them. See [`Tokenizer::encode_within`].
    cut_margin: Option<usize>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::File`] if it is none.
    pub fn from_bytes(json: &[u8]) -> Result<Self, TextError> {
        // The library panics on some files that are no JSON, and on some that are no tokenizer. The first are common.
        serde_json::from_slice::<IgnoredAny>(json).map_err(|error| TextError::File(error.into()))?;
        catch_unwind(|| Self::read(json)).unwrap_or_else(|_| Err(TextError::File("it is not understood".into())))
    }

    fn read(json: &[u8]) -> Result<Self, TextError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(TextError::File)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(TextError::File)?;
        let (prefix, suffix) = frame(&inner).map_err(TextError::File)?;
        let n_special_pair = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(true));
        let added = inner.get_added_tokens_decoder();
        let past_added = added.keys().map(|&id| id as usize + 1).max().unwrap_or(0);
        let vocab_size = inner.get_vocab_size(true).max(past_added);
        let longest_added = added.values().map(|token| token.content.len()).max().unwrap_or(0);
        let cut_margin = splits_at_blanks(&inner).then_some(longest_added);
        // Two hash tables, string to id and back: per entry and table a slot of 32 bytes at a load of about 0.7, and an
        // allocation of 16 for the string.
        let bytes = vocab_size * 2 * (32 * 10 / 7 + 16);
        Ok(Self { inner, prefix, suffix, n_special_pair, vocab_size, bytes, cut_margin })
    }

    /// Ids of `text`, however many.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the tokenizer's model fails on it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(TextError::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text` with special tokens, cut to `max_tokens`, and whether anything was cut off: what
    /// [`Tokenizer::truncate`] makes of [`Tokenizer::encode`].
    ///
    /// The end of a long text costs nothing where that is safe: a tokenizer that splits at blanks before anything else
    /// gives the beginning of a text the same tokens whatever follows. Only a token added to the vocabulary may reach
    /// over a blank; it covers no more bytes, so no more tokens, than its own length.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_within(
        &self,
        text: &str,
        max_tokens: usize,
        direction: Direction,
    ) -> Result<(Vec<u32>, bool), TextError> {
        let encoding = self.beginning(text, max_tokens, direction)?;
        Ok(self.truncate(encoding.get_ids().to_vec(), max_tokens, direction))
    }

    /// Tokens of `text`, or so much of its beginning that cutting it to `max_tokens` gives the same.
    fn beginning(&self, text: &str, max_tokens: usize, direction: Direction) -> Result<Encoding, TextError> {
        /// English takes four to five bytes per token; with twice that the first try nearly always suffices.
        const BYTES_PER_TOKEN: usize = 10;
        let encode = |text: &str| self.inner.encode_fast(text, true).map_err(TextError::Encode);
        if let (Direction::Right, Some(margin)) = (direction, self.cut_margin) {
            let enough = max_tokens + margin + self.prefix.len() + self.suffix.len();
            let mut n_bytes = enough * BYTES_PER_TOKEN;
            while n_bytes < text.len() {
                let encoding = encode(head(text, n_bytes))?;
                if encoding.len() > enough {
                    return Ok(encoding);
                }
                n_bytes = n_bytes.saturating_mul(4);
            }
        }
        encode(text)
    }

    /// A text that will be one of a pair: all of it, because which of the two is longer decides where a pair is cut.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn part(&self, text: &str) -> Result<Part, TextError> {
        self.inner.encode_fast(text, false).map_err(TextError::Encode).map(Part)
    }

    /// Two texts as one sequence, with the special tokens and types that the tokenizer's post-processor has for pairs.
    /// With a limit, the longer text is cut first, as Hugging Face's `longest_first` does.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the post-processor fails, or special tokens alone are more than the limit.
    pub fn pair(&self, first: Part, second: Part, limit: Option<(usize, Direction)>) -> Result<Pair, TextError> {
        let (Part(mut first), Part(mut second)) = (first, second);
        let mut was_cut = false;
        if let Some((max_tokens, direction)) = limit {
            let max_length = max_tokens.saturating_sub(self.n_special_pair);
            if first.len() + second.len() > max_length {
                was_cut = true;
                let direction = match direction {
                    Direction::Left => TruncationDirection::Left,
                    Direction::Right => TruncationDirection::Right,
                };
                let params =
                    TruncationParams { direction, max_length, strategy: TruncationStrategy::LongestFirst, stride: 0 };
                let (cut, cut_pair) = truncate_encodings(first, Some(second), &params).map_err(TextError::Encode)?;
                (first, second) = (cut, cut_pair.unwrap_or_default());
                // What was cut off is kept in pieces, of which the post-processor would join each of one text with each
                // of the other: of two texts of 40 kB, gigabytes.
                drop((first.take_overflowing(), second.take_overflowing()));
            }
        }
        let joined = self.inner.post_process(first, Some(second), true).map_err(TextError::Encode)?;
        let token_types = joined.get_type_ids().iter().map(|&kind| u8::try_from(kind).unwrap_or(u8::MAX)).collect();
        Ok(Pair { ids: joined.get_ids().to_vec(), token_types, was_cut })
    }

    /// Cuts `ids` to `max_tokens`, and says whether it did. Special tokens that frame the ids stay, as in Hugging Face's
    /// truncation, which cuts before it adds them.
    #[must_use]
    pub fn truncate(&self, mut ids: Vec<u32>, max_tokens: usize, direction: Direction) -> (Vec<u32>, bool) {
        if ids.len() <= max_tokens {
            return (ids, false);
        }
        let n_frame = self.prefix.len() + self.suffix.len();
        let framed = max_tokens >= n_frame && ids.starts_with(&self.prefix) && ids.ends_with(&self.suffix);
        let n_drop = ids.len() - max_tokens;
        let start = match (direction, framed) {
            (Direction::Right, true) => ids.len() - self.suffix.len() - n_drop,
            (Direction::Right, false) => max_tokens,
            (Direction::Left, true) => self.prefix.len(),
            (Direction::Left, false) => 0,
        };
        ids.drain(start..start + n_drop);
        (ids, true)
    }

    /// Tokens of `text` with the bytes they stand for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_detailed(&self, text: &str, add_special: bool) -> Result<Vec<Piece>, TextError> {
        let encoding = self.inner.encode(text, add_special).map_err(TextError::Encode)?;
        let ids = encoding.get_ids().iter().zip(encoding.get_tokens());
        let places = encoding.get_offsets().iter().zip(encoding.get_special_tokens_mask());
        Ok(ids
            .zip(places)
            .map(|((&id, token), (&(start, stop), &mask))| {
                if mask == 1 {
                    return Piece { id, text: token.clone(), special: true, span: None };
                }
                // A byte-level token may stand for a part of a character.
                let bytes = text.as_bytes().get(start..stop).unwrap_or_default();
                let text = String::from_utf8_lossy(bytes).into_owned();
                Piece { id, text, special: false, span: Some(start..stop) }
            })
            .collect())
    }

    /// Text of `ids`.
    ///
    /// # Errors
    /// [`TextError::Decode`] if the tokenizer's decoder fails on them.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.inner.decode(ids, skip_special).map_err(TextError::Decode)
    }

    /// Whether `id` stands for a token.
    #[must_use]
    pub fn knows(&self, id: u32) -> bool {
        // Vocabularies with holes are rare but allowed: only then the second, allocating question decides.
        (id as usize) < self.vocab_size || self.inner.id_to_token(id).is_some()
    }

    /// Number of entries, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Special tokens that [`Tokenizer::encode`] puts around a text.
    #[must_use]
    pub fn n_special(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// Estimate of the memory it holds.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The special tokens before and behind a text, read off a text of one made-up token.
fn frame(inner: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    let probe = Encoding::from_tokens(vec![Token::new(0, "a".to_owned(), (0, 1))], 0);
    let framed = inner.post_process(probe, None, true)?;
    let at = framed.get_special_tokens_mask().iter().position(|&mask| mask == 0).unwrap_or(framed.len());
    let (prefix, rest) = framed.get_ids().split_at(at);
    Ok((prefix.to_vec(), rest.get(1..).unwrap_or_default().to_vec()))
}

/// BERT's tokenizers map characters one by one, split at blanks and then look at single words.
fn splits_at_blanks(inner: &tokenizers::Tokenizer) -> bool {
    let normalizer = matches!(inner.get_normalizer(), None | Some(NormalizerWrapper::BertNormalizer(_)));
    let pre_tokenizer = matches!(inner.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)));
    normalizer && pre_tokenizer && matches!(inner.get_model(), ModelWrapper::WordPiece(_))
}

/// The longest beginning of `text` within `n_bytes` that ends before a blank; empty if there is no blank.
fn head(text: &str, n_bytes: usize) -> &str {
    // Of the ASCII blanks only these: BERT's normalizer removes the others as control characters, which joins words.
    let blank = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\t' | b'\r');
    let end = text.as_bytes()[..n_bytes].iter().rposition(blank).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
#[path = "tokenizer/tests.rs"]
mod tests;
