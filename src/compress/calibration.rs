//! Text that importance and reconstruction are measured on.

use std::path::Path;

use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};

use super::CompressError;
use crate::checkpoint::sha256_hex;
use crate::eval::{Encode, EvalError, lines_of, read_text};
use crate::model::RaggedBatch;

/// Tokens of one batch: large enough for efficient products, small enough that a batch's activations and gradients
/// take some hundred megabytes at most.
const BATCH_TOKENS: usize = 2_048;

/// A sample of calibration text as batches of ids; there is no padding, so none can enter a statistic.
#[derive(Debug, Default)]
pub struct CalibrationText {
    /// Sequences in order of length.
    pub batches: Vec<RaggedBatch>,
    /// Texts that were not sampled, for measuring.
    pub held_out: Vec<String>,
    /// The texts sampled, for another tokenizer; empty for a sample of given sequences.
    texts: Vec<String>,
    /// sha256 of the file.
    pub sha256: String,
    /// Texts sampled.
    pub n_texts: usize,
    /// Tokens sampled.
    pub n_tokens: usize,
}

/// Reads one text a line (a JSON string or plain text), shuffles by `seed` and takes texts up to `budget` tokens;
/// the next `n_held_out` texts are kept apart.
///
/// # Errors
/// If the file is missing, empty or not UTF-8, or the tokenizer fails.
pub fn sample(
    path: &Path,
    encode: &Encode<'_>,
    budget: usize,
    n_held_out: usize,
    seed: u64,
) -> Result<CalibrationText, CompressError> {
    // Read once: the hash is of the very texts that are used, also of what can be read only once, such as a pipe.
    let text = read_text(path)?;
    let mut lines = lines_of(&text, path)?;
    let sha256 = sha256_hex(text.as_bytes());
    lines.shuffle(&mut StdRng::seed_from_u64(seed));
    let mut lines = lines.into_iter();
    let (mut ids, mut n_tokens): (Vec<Vec<u32>>, _) = (Vec::new(), 0);
    let mut texts = Vec::new();
    while n_tokens < budget {
        let Some(line) = lines.next() else { break };
        let mut sequence = encode(&line).map_err(EvalError::Encode)?;
        if n_tokens + sequence.len() > budget && !ids.is_empty() {
            sequence.truncate(budget - n_tokens);
        }
        n_tokens += sequence.len();
        if !sequence.is_empty() {
            ids.push(sequence);
            texts.push(line);
        }
    }
    ids.sort_by_key(Vec::len);
    let n_texts = ids.len();
    Ok(CalibrationText {
        batches: batches(&ids)?,
        held_out: lines.take(n_held_out).collect(),
        texts,
        sha256,
        n_texts,
        n_tokens,
    })
}

fn batches(ids: &[Vec<u32>]) -> Result<Vec<RaggedBatch>, CompressError> {
    let mut batches: Vec<RaggedBatch> = Vec::new();
    for sequence in ids {
        match batches.last_mut() {
            Some(batch) if batch.n_tokens() + sequence.len() <= BATCH_TOKENS => batch.push(sequence)?,
            _ => batches.push(RaggedBatch::from_sequences(&[sequence])?),
        }
    }
    Ok(batches)
}

impl CalibrationText {
    /// Every `n`-th sequence, so that about `n_tokens` tokens of all lengths come together.
    ///
    /// # Errors
    /// Never: the sequences are those of this text.
    pub fn excerpt(&self, n_tokens: usize) -> Result<Self, CompressError> {
        let every = self.n_tokens.div_ceil(n_tokens.max(1)).max(1);
        let sequences = self.batches.iter().flat_map(|batch| (0..batch.n_seqs()).map(|seq| batch.sequence(seq)));
        Self::from_sequences(sequences.step_by(every).map(<[u32]>::to_vec).collect())
    }

    /// The same texts through another tokenizer.
    ///
    /// # Errors
    /// If it fails.
    pub fn encoded(&self, encode: &Encode<'_>) -> Result<Self, CompressError> {
        let ids =
            self.texts.iter().map(|text| encode(text)).collect::<Result<Vec<_>, _>>().map_err(EvalError::Encode)?;
        let sample = Self::from_sequences(ids.into_iter().filter(|ids| !ids.is_empty()).collect())?;
        let (held_out, texts, sha256) = (self.held_out.clone(), self.texts.clone(), self.sha256.clone());
        Ok(Self { held_out, texts, sha256, ..sample })
    }

    /// A sample of given sequences.
    ///
    /// # Errors
    /// If a sequence is empty.
    pub fn from_sequences(mut ids: Vec<Vec<u32>>) -> Result<Self, CompressError> {
        ids.sort_by_key(Vec::len);
        let (n_texts, n_tokens) = (ids.len(), ids.iter().map(Vec::len).sum());
        Ok(Self { batches: batches(&ids)?, n_texts, n_tokens, ..Self::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_can_be_read_only_once_has_its_own_hash() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"one\ntwo\n").unwrap();
        drop(writer);
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let text = sample(Path::new(&path), &|text: &str| Ok(vec![text.len() as u32]), 2, 0, 0).unwrap();
        assert_eq!((text.n_texts, text.sha256), (2, sha256_hex(b"one\ntwo\n")));
    }
}
