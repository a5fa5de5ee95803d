//! `vocabulary`: rows of the word embedding go, and the tokenizer with them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{CompressionPass, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::calibration::CalibrationText;
use crate::compress::progress::Progress;
use crate::compress::vocabulary::{Vocabulary as Entries, VocabularyError};
use crate::model::Architecture;

/// Keeps the entries that the calibration text uses most; words whose entry goes split into shorter entries that stay.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vocabulary {
    /// So many entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// This share of the entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
}

impl Vocabulary {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
    fn n_kept(&self, n: usize) -> usize {
        self.keep.unwrap_or((n as f64 * self.share.unwrap_or(1.0)).round() as usize)
    }
}

impl CompressionPass for Vocabulary {
    fn stage(&self) -> Stage {
        Stage::Shape
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        match (self.keep, self.share) {
            (Some(keep), _) => format!("{keep} entries stay"),
            (None, share) => format!("{} of the entries stay", share.unwrap_or(1.0)),
        }
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        let rows = architecture.vocab_size;
        match (self.keep, self.share) {
            (Some(_), Some(_)) => Err(Refusal::new("share", "give either `keep` or `share`")),
            (None, None) => Err(Refusal::new("", "give `keep` or `share`")),
            (Some(keep), None) if keep >= rows => {
                Err(Refusal::new("keep", format!("{keep} is not below the {rows} entries that there are")))
            }
            (None, Some(share)) if !(share > 0.0 && share < 1.0) => {
                Err(Refusal::new("share", format!("{share} is not between 0 and 1")))
            }
            _ => Ok(()),
        }
    }

    fn leaves(&self, architecture: &Architecture) -> Architecture {
        let mut spec = architecture.spec();
        // As if every row had an entry.
        spec.vocab_size = self.n_kept(spec.vocab_size);
        Architecture::new(spec).unwrap_or_else(|_| architecture.clone())
    }

    fn check_tokenizer(&self, tokenizer_json: &[u8], rows: usize) -> Result<(), Refusal> {
        let refuse = |error: VocabularyError| {
            let field = match (&error, self.keep) {
                (VocabularyError::TooFew { .. }, Some(_)) => "keep",
                (VocabularyError::TooFew { .. }, None) => "share",
                _ => "",
            };
            Refusal::new(field, error.to_string())
        };
        let entries = Entries::read(tokenizer_json, rows).map_err(refuse)?;
        let asked = self.n_kept(entries.len());
        if asked >= entries.len() {
            let reason = format!("{asked} is not below the {} entries that there are", entries.len());
            return Err(Refusal::new("keep", reason));
        }
        entries.prune(&[], asked).map(drop).map_err(refuse)
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        let rows = work.model.architecture().vocab_size;
        let refuse = |error: VocabularyError| CompressError::Setting {
            setting: "vocabulary".to_owned(),
            reason: error.to_string(),
        };
        progress.phase_started("vocabulary", text.n_tokens as u64);
        let entries = Entries::read(&work.tokenizer_json, rows).map_err(refuse)?;
        let mut counts = vec![0u64; rows];
        let ids = |text: &CalibrationText| -> Vec<u32> {
            let sequences = text.batches.iter().flat_map(|b| (0..b.n_seqs()).map(move |seq| b.sequence(seq)));
            sequences.flatten().copied().collect()
        };
        ids(&text).into_iter().for_each(|id| counts[id as usize] += 1);
        let pruned = entries.prune(&counts, self.n_kept(entries.len())).map_err(refuse)?;
        // Teacher, model and text change together: from here on all passes know the new entries only.
        for weights in [&mut work.dense, &mut work.model, &mut work.reference] {
            weights.keep_words(&pruned.kept)?;
        }
        let before = (text.n_tokens, text.n_texts);
        work.tokenizer_json = pruned.tokenizer_json;
        work.vocab_txt = Some(pruned.vocab_txt);
        work.refresh_encoder()?;
        let text = text.encoded(&*work.encode)?;
        progress.advanced(before.0 as u64);
        progress.phase_finished();
        let notes = vec![
            format!("{} of {} entries stay", pruned.kept.len(), entries.len()),
            format!(
                "the calibration text takes {:.2} % more tokens",
                (text.n_tokens as f64 / before.0.max(1) as f64 - 1.0) * 100.0
            ),
        ];
        work.text = Some(Arc::new(text));
        Ok(PassReport { notes, ..PassReport::default() })
    }
}
