//! How much may be in the engine at once, and when a refused client should come again.

use std::time::Duration;

use tokio::time::Instant;

use super::error::EngineError;
use crate::telemetry::RejectReason;

/// What a submission needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) sequences: usize,
    pub(crate) tokens: usize,
    /// Ids, types and rows of the reply.
    pub(crate) bytes: usize,
}

/// What may be used at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdmissionLimits {
    /// Sequences admitted and not answered.
    pub(crate) sequences: usize,
    /// Tokens that wait for a worker.
    pub(crate) queue_tokens: usize,
    /// Bytes of submissions admitted and not answered.
    pub(crate) bytes: usize,
}

/// What is used. Sequences and bytes are held from admission until the submission's future ends, however it ends;
/// tokens are the queue's own sum, given back as a worker takes them.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: AdmissionLimits,
    sequences: usize,
    bytes: usize,
}

impl Admission {
    pub(crate) fn new(limits: AdmissionLimits) -> Self {
        Self { limits, sequences: 0, bytes: 0 }
    }

    /// Whether `ask` could be admitted if nothing else were there.
    pub(crate) fn check(limits: &AdmissionLimits, ask: Ask) -> Result<(), EngineError> {
        let Ask { sequences, tokens, bytes } = ask;
        if sequences > limits.sequences {
            return Err(EngineError::TooManySequences { sequences, limit: limits.sequences });
        }
        if tokens > limits.queue_tokens {
            return Err(EngineError::TooLarge { tokens, limit: limits.queue_tokens });
        }
        if bytes > limits.bytes {
            return Err(EngineError::TooManyBytes { bytes, limit: limits.bytes });
        }
        Ok(())
    }

    /// Takes all of `ask`, or nothing and says what is used up. `queued_tokens` is what waits now.
    pub(crate) fn admit(&mut self, ask: Ask, queued_tokens: usize) -> Result<(), RejectReason> {
        if ask.sequences > self.limits.sequences - self.sequences
            || ask.tokens > self.limits.queue_tokens.saturating_sub(queued_tokens)
        {
            return Err(RejectReason::Overload);
        }
        if ask.bytes > self.limits.bytes - self.bytes {
            return Err(RejectReason::Memory);
        }
        self.sequences += ask.sequences;
        self.bytes += ask.bytes;
        Ok(())
    }

    /// Gives back what [`Admission::admit`] took.
    pub(crate) fn release(&mut self, ask: Ask) {
        self.sequences -= ask.sequences;
        self.bytes -= ask.bytes;
    }

    /// Sequences and bytes in use.
    pub(crate) fn used(&self) -> (usize, usize) {
        (self.sequences, self.bytes)
    }
}

/// Seconds of work over which the rate forgets: long enough to smooth batches, short enough to follow the load.
const MEMORY_SECONDS: f64 = 10.0;

/// Tokens per second that the workers finish together, over the time in which any of them works.
///
/// Both sums decay with working time, `rate = Σ tokens·e^(-age/τ) / Σ seconds·e^(-age/τ)`, so that two batches which
/// end at nearly the same moment do not look like an infinite rate, and idle time does not look like slowness.
#[derive(Debug)]
pub(crate) struct DrainRate {
    tokens: f64,
    seconds: f64,
    running: usize,
    /// Start of the stretch of working time not yet in the sums.
    since: Instant,
}

/// A client waits at least this long, also before anything was measured ...
const MIN_RETRY: Duration = Duration::from_secs(1);
/// ... and no longer than this, because load may have gone long before.
const MAX_RETRY: Duration = Duration::from_secs(30);

impl DrainRate {
    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: 0.0, seconds: 0.0, running: 0, since: now }
    }

    fn advance(&mut self, now: Instant) {
        if self.running > 0 {
            let worked = now.saturating_duration_since(self.since).as_secs_f64();
            let kept = (-worked / MEMORY_SECONDS).exp();
            self.tokens *= kept;
            self.seconds = self.seconds * kept + worked;
        }
        self.since = now;
    }

    /// A worker starts a batch.
    pub(crate) fn started(&mut self, now: Instant) {
        self.advance(now);
        self.running += 1;
    }

    /// A worker has finished a batch of `tokens` (0 if it was lost).
    pub(crate) fn finished(&mut self, tokens: usize, now: Instant) {
        self.advance(now);
        self.running -= 1;
        self.tokens += tokens as f64;
    }

    /// Tokens per second; `None` before anything was measured.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        (self.tokens > 0.0 && self.seconds > 0.0).then(|| self.tokens / self.seconds)
    }

    /// Time to work off `tokens`, in whole seconds, rounded up, within 1 to 30 s.
    pub(crate) fn retry_after(&self, tokens: usize) -> Duration {
        let seconds = self.tokens_per_second().map_or(0.0, |rate| (tokens as f64 / rate).ceil());
        Duration::try_from_secs_f64(seconds).unwrap_or(MAX_RETRY).clamp(MIN_RETRY, MAX_RETRY)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: AdmissionLimits = AdmissionLimits { sequences: 8, queue_tokens: 100, bytes: 1000 };

    fn ask(sequences: usize, tokens: usize, bytes: usize) -> Ask {
        Ask { sequences, tokens, bytes }
    }

    #[test]
    fn what_never_fits_is_told_apart_from_what_does_not_fit_now() {
        let check = |ask| Admission::check(&LIMITS, ask);
        assert!(check(ask(8, 100, 1000)).is_ok());
        assert!(matches!(check(ask(9, 1, 1)), Err(EngineError::TooManySequences { sequences: 9, limit: 8 })));
        assert!(matches!(check(ask(1, 101, 1)), Err(EngineError::TooLarge { tokens: 101, limit: 100 })));
        assert!(matches!(check(ask(1, 1, 1001)), Err(EngineError::TooManyBytes { bytes: 1001, limit: 1000 })));
        let mut admission = Admission::new(LIMITS);
        assert_eq!(admission.admit(ask(5, 40, 600), 0), Ok(()));
        assert_eq!(admission.admit(ask(4, 1, 1), 40), Err(RejectReason::Overload));
        assert_eq!(admission.admit(ask(1, 61, 1), 40), Err(RejectReason::Overload));
        assert_eq!(admission.admit(ask(1, 1, 401), 40), Err(RejectReason::Memory));
        assert_eq!(admission.admit(ask(3, 60, 400), 40), Ok(()));
        admission.release(ask(5, 40, 600));
        assert_eq!(admission.used(), (3, 400));
    }

    proptest! {
        #[test]
        fn never_over_a_limit_and_nothing_is_lost(
            steps in prop::collection::vec((1usize..12, 1usize..130, 1usize..1300, any::<bool>()), 1..80),
        ) {
            let mut admission = Admission::new(LIMITS);
            let mut held: Vec<Ask> = Vec::new();
            for (sequences, tokens, bytes, release) in steps {
                if release && !held.is_empty() {
                    admission.release(held.swap_remove(sequences % held.len()));
                }
                let queued: usize = held.iter().map(|ask| ask.tokens).sum();
                let (used_sequences, used_bytes) = admission.used();
                let ask = ask(sequences, tokens, bytes);
                let fits = used_sequences + sequences <= 8 && queued + tokens <= 100 && used_bytes + bytes <= 1000;
                prop_assert_eq!(admission.admit(ask, queued).is_ok(), fits);
                if fits {
                    held.push(ask);
                }
                let sum = held.iter().fold((0, 0), |sum, ask| (sum.0 + ask.sequences, sum.1 + ask.bytes));
                prop_assert_eq!(admission.used(), sum);
            }
        }
    }

    #[test]
    fn the_rate_is_that_of_working_time() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut rate = DrainRate::new(start);
        assert_eq!(rate.tokens_per_second(), None);
        assert_eq!(rate.retry_after(1_000_000), MIN_RETRY);
        // Two workers, 500 tokens per 100 ms each, ending at nearly the same time; then a minute without work.
        for round in 0..20 {
            rate.started(at(round * 100));
            rate.started(at(round * 100));
            rate.finished(500, at(round * 100 + 99));
            rate.finished(500, at(round * 100 + 100));
        }
        let before = rate.tokens_per_second().unwrap();
        assert!((before - 10_000.0).abs() < 800.0, "{before}");
        rate.started(at(60_000));
        rate.finished(1000, at(60_100));
        let after = rate.tokens_per_second().unwrap();
        assert!((after / before - 1.0).abs() < 0.05, "{before} {after}");
        assert_eq!(rate.retry_after(1), MIN_RETRY);
        let long = rate.retry_after(100_000).as_secs();
        assert!((9..=12).contains(&long), "{long}");
        assert_eq!(rate.retry_after(usize::MAX), MAX_RETRY);
    }

    #[test]
    fn the_rate_follows_a_slower_load_within_seconds() {
        let start = Instant::now();
        let mut rate = DrainRate::new(start);
        let mut now = start;
        let mut run = |tokens, ms, times| {
            for _ in 0..times {
                rate.started(now);
                now += Duration::from_millis(ms);
                rate.finished(tokens, now);
            }
            rate.tokens_per_second().unwrap()
        };
        let fast = run(1000, 10, 1000);
        let slow = run(100, 10, 3000);
        assert!((fast / 100_000.0 - 1.0).abs() < 0.01, "{fast}");
        assert!((slow / 10_000.0 - 1.0).abs() < 0.6, "{slow}");
    }
}
