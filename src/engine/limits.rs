//! What the engine may use.

use std::time::Duration;

use super::admission::AdmissionLimits;
use super::error::StartError;
use super::policy::PolicyLimits;

/// Limits of an engine; checked by [`super::Engine::start`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineLimits {
    /// No batch holds more tokens; a longer sequence is refused.
    pub max_batch_tokens: usize,
    /// No batch holds more sequences; `None` leaves it to the tokens.
    pub max_batch_requests: Option<usize>,
    /// Sequences admitted and not answered.
    pub max_concurrent_requests: usize,
    /// Tokens that wait for a worker.
    pub max_queue_tokens: usize,
    /// Bytes of ids and replies of submissions admitted and not answered.
    pub max_queue_bytes: usize,
    /// Deadline of submissions that name none, from their arrival.
    pub default_timeout: Option<Duration>,
    /// A batch of more than one sequence holds at most this many tokens, if `max_batch_tokens` is not less.
    pub target_batch_tokens: usize,
    /// What waits is spread over free workers in shares no smaller than this.
    pub min_share_tokens: usize,
    /// Sequences of up to this many tokens are short: they overtake longer ones.
    pub short_tokens: usize,
    /// Tokens of short work that may overtake a long sequence, per token of it.
    pub overtake: usize,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            // The first three are Text Embeddings Inference's, so that its users find what they know.
            max_batch_tokens: 16_384,
            max_batch_requests: None,
            max_concurrent_requests: 512,
            // As many sequences of 512 tokens as may be admitted: some seconds of work for a small machine.
            max_queue_tokens: 512 * 512,
            // Room for 80 replies with a row of 384 numbers for each of 512 tokens, or all replies of one row each.
            max_queue_bytes: 64 << 20,
            default_timeout: None,
            // A tenth of a second on one core: beyond, batches only add latency.
            target_batch_tokens: 4096,
            // Rows enough to hide the stream of weights behind the arithmetic.
            min_share_tokens: 256,
            // A paragraph; the usual limit of sentence encoders, for which all sequences then are in one lane.
            short_tokens: 256,
            // Four fifths of a contended machine serve the short ones.
            overtake: 4,
        }
    }
}

impl EngineLimits {
    pub(crate) fn check(&self) -> Result<(), StartError> {
        for (name, got, least) in [
            ("max_batch_tokens", self.max_batch_tokens, 1),
            ("max_batch_requests", self.max_batch_requests.unwrap_or(1), 1),
            ("max_concurrent_requests", self.max_concurrent_requests, 1),
            ("max_queue_tokens", self.max_queue_tokens, 1),
            ("max_queue_bytes", self.max_queue_bytes, 1),
            ("target_batch_tokens", self.target_batch_tokens, 1),
        ] {
            if got < least {
                return Err(StartError::Limit { name, got, least });
            }
        }
        Ok(())
    }

    pub(crate) fn policy(&self) -> PolicyLimits {
        PolicyLimits {
            max_batch_tokens: self.max_batch_tokens,
            max_batch_requests: self.max_batch_requests.unwrap_or(usize::MAX),
            target_batch_tokens: self.target_batch_tokens,
            min_share_tokens: self.min_share_tokens,
            short_tokens: self.short_tokens,
            overtake: self.overtake,
        }
    }

    pub(crate) fn admission(&self) -> AdmissionLimits {
        AdmissionLimits {
            sequences: self.max_concurrent_requests,
            queue_tokens: self.max_queue_tokens,
            bytes: self.max_queue_bytes,
        }
    }
}
