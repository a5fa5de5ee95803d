//! Which sequences a free worker takes: a pure function of the queue, the time and the limits.
//!
//! # Lanes
//! Sequences wait in two lanes by length, first in, first out in each: *short* ones of at most
//! [`PolicyLimits::short_tokens`] tokens, and *long* ones. A batch is taken from one lane, so a short sequence never
//! sits in the batch of a long one. If only one lane holds something, it is served. If both do, short sequences are
//! served, and the long lane's head comes when the short ones that overtook it amount to
//! [`PolicyLimits::overtake`] times its own tokens; then it runs alone. Under contention the long lane so gets one part
//! in `overtake + 1` of the work, and either lane gets everything that the other leaves.
//!
//! # Bounds
//! Let `f` be `overtake`, `L` the longest sequence admitted, `B` the target of a batch in tokens.
//!
//! - *A short sequence* that finds `T` tokens of short ones ahead of it waits for at most `L + T/f` tokens of long
//!   work started after its arrival, besides what the workers were running when it came: at most `max(B, L)` tokens per
//!   worker. (The first long turn may be due at once; each further one needs `f` times its tokens of short work between,
//!   all of it ahead of the sequence.)
//! - *A long sequence* is overtaken, while it is its lane's head, by less than `f` times its own tokens plus one batch
//!   of short work, then it is started by the next free worker: it cannot starve.
//!
//! Both are properties of the tests below.
//!
//! # Size of a batch
//! What waits is spread over the workers that are free now, in like shares of tokens, so that a burst does not sit on
//! one core while another sleeps; a share is no smaller than [`PolicyLimits::min_share_tokens`] (below it a batch costs
//! more in weight traffic than it saves in waiting; and a lone worker is helped by the free cores anyway) and no larger
//! than [`PolicyLimits::target_batch_tokens`] (above it throughput no longer grows, and everyone in the batch waits for
//! its end). There is no lingering: a free worker takes what is there.

use std::collections::VecDeque;

use tokio::time::Instant;

/// What the policy needs to know of an entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    /// Rising along a lane.
    pub(crate) ticket: u64,
    /// Tokens; at least 1, at most [`PolicyLimits::max_batch_tokens`].
    pub(crate) tokens: usize,
    /// When the result is no longer of use.
    pub(crate) deadline: Option<Instant>,
    /// False once cancelled: the entry is skipped.
    pub(crate) live: bool,
}

impl Header {
    fn expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Whether it waits, and will still be of use after `now`.
    pub(crate) fn runnable(&self, now: Instant) -> bool {
        self.live && !self.expired(now)
    }
}

/// A lane of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Short,
    Long,
}

/// Up to when a deadline is as good as passed, for the entries of each lane.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Horizon {
    pub(crate) short: Instant,
    pub(crate) long: Instant,
}

impl Horizon {
    pub(crate) fn of(self, lane: Lane) -> Instant {
        match lane {
            Lane::Short => self.short,
            Lane::Long => self.long,
        }
    }
}

impl From<Instant> for Horizon {
    fn from(now: Instant) -> Self {
        Self { short: now, long: now }
    }
}

/// The queue as the policy sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueView<'a> {
    pub(crate) short: &'a VecDeque<Header>,
    pub(crate) long: &'a VecDeque<Header>,
    /// Tokens of the live entries of both lanes.
    pub(crate) tokens: usize,
    /// Tokens of short sequences started since the last long one, while a long one waited.
    pub(crate) overtaken: usize,
}

/// Limits of the policy; see the module's text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PolicyLimits {
    pub(crate) max_batch_tokens: usize,
    pub(crate) max_batch_requests: usize,
    pub(crate) target_batch_tokens: usize,
    pub(crate) min_share_tokens: usize,
    pub(crate) short_tokens: usize,
    pub(crate) overtake: usize,
}

impl PolicyLimits {
    /// The lane of a sequence.
    pub(crate) fn lane(&self, tokens: usize) -> Lane {
        if tokens <= self.short_tokens { Lane::Short } else { Lane::Long }
    }
}

/// What a free worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Nothing waits.
    Idle,
    /// Take the first `scan` entries off `lane`: drop the cancelled ones, shed the expired ones, run the others, which
    /// are `n_seqs` of `n_tokens` tokens together. (`n_seqs` may be 0: then ask again.)
    Take { lane: Lane, scan: usize, n_seqs: usize, n_tokens: usize },
}

/// Decides for one free worker, of `idle_workers` (itself included) that are free.
pub(crate) fn next(
    queue: &QueueView<'_>,
    horizon: impl Into<Horizon>,
    limits: &PolicyLimits,
    idle_workers: usize,
) -> Decision {
    let horizon = horizon.into();
    // Dead and expired heads go first, so that below a head is a sequence that can run.
    for (lane, entries) in [(Lane::Short, queue.short), (Lane::Long, queue.long)] {
        let scan = entries.iter().take_while(|header| !header.runnable(horizon.of(lane))).count();
        if scan > 0 {
            return Decision::Take { lane, scan, n_seqs: 0, n_tokens: 0 };
        }
    }
    let budget = budget(queue.tokens, limits, idle_workers);
    match (queue.short.front(), queue.long.front()) {
        (None, None) => Decision::Idle,
        (Some(_), None) => fill(Lane::Short, queue.short, horizon.short, budget, limits.max_batch_requests),
        (None, Some(_)) => fill(Lane::Long, queue.long, horizon.long, budget, limits.max_batch_requests),
        (Some(_), Some(head)) => {
            if queue.overtaken >= limits.overtake.saturating_mul(head.tokens) {
                fill(Lane::Long, queue.long, horizon.long, budget, 1)
            } else {
                fill(Lane::Short, queue.short, horizon.short, budget, limits.max_batch_requests)
            }
        }
    }
}

/// Tokens of the batch that `lane` would give now, if short entries that are late at `late` give way to long ones.
pub(crate) fn batch_tokens(
    queue: &QueueView<'_>,
    lane: Lane,
    now: Instant,
    late: Instant,
    limits: &PolicyLimits,
    idle_workers: usize,
) -> usize {
    let (entries, max_seqs) = match lane {
        Lane::Short => (queue.short, limits.max_batch_requests),
        Lane::Long if queue.short.iter().any(|header| header.runnable(late)) => (queue.long, 1),
        Lane::Long => (queue.long, limits.max_batch_requests),
    };
    match fill(lane, entries, now, budget(queue.tokens, limits, idle_workers), max_seqs) {
        Decision::Take { n_tokens, .. } => n_tokens,
        Decision::Idle => 0,
    }
}

/// Tokens that a batch of several sequences may hold; see the module's text.
fn budget(queued_tokens: usize, limits: &PolicyLimits, idle_workers: usize) -> usize {
    let share = queued_tokens.div_ceil(idle_workers.max(1));
    let most = limits.target_batch_tokens.min(limits.max_batch_tokens);
    share.max(limits.min_share_tokens).min(most)
}

/// Takes entries in order while they fit. The first one always does: a sequence beyond the budget, which admission
/// keeps within `max_batch_tokens`, is a batch of its own.
fn fill(lane: Lane, entries: &VecDeque<Header>, now: Instant, budget: usize, max_seqs: usize) -> Decision {
    let (mut scan, mut n_seqs, mut n_tokens) = (0, 0, 0usize);
    for header in entries {
        if header.runnable(now) {
            if n_seqs == max_seqs.max(1) || (n_seqs > 0 && n_tokens + header.tokens > budget) {
                break;
            }
            n_seqs += 1;
            n_tokens += header.tokens;
        }
        scan += 1;
    }
    Decision::Take { lane, scan, n_seqs, n_tokens }
}

#[cfg(test)]
mod tests;
