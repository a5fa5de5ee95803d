//! The two lanes, with cancellation. The order of everything is decided in `policy.rs`.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use tokio::time::Instant;

use super::policy::{self, Decision, Header, Horizon, Lane, PolicyLimits, QueueView};

/// Cancelled entries stay in their lane until they outnumber the live ones by this many: removal is then amortised.
const COMPACT_AT: usize = 64;

#[derive(Debug)]
struct Entries<T> {
    headers: VecDeque<Header>,
    /// In step with `headers`; `None` where the header is not live.
    payloads: VecDeque<Option<T>>,
    n_live: usize,
}

impl<T> Entries<T> {
    fn new() -> Self {
        Self { headers: VecDeque::new(), payloads: VecDeque::new(), n_live: 0 }
    }

    /// Takes the live entries with a ticket in `tickets` out; returns the sum of their tokens.
    fn cancel(&mut self, tickets: &Range<u64>, out: &mut Vec<T>) -> usize {
        let mut n_tokens = 0;
        let start = self.headers.partition_point(|header| header.ticket < tickets.start);
        let inside = self.headers.iter_mut().zip(&mut self.payloads).skip(start);
        for (header, payload) in inside.take_while(|(header, _)| header.ticket < tickets.end) {
            if let Some(payload) = payload.take() {
                header.live = false;
                self.n_live -= 1;
                n_tokens += header.tokens;
                out.push(payload);
            }
        }
        if self.headers.len() > 2 * self.n_live + COMPACT_AT {
            self.headers.retain(|header| header.live);
            self.payloads.retain(Option::is_some);
        }
        n_tokens
    }
}

/// What [`Queue::take`] took to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Taken {
    pub(crate) n_seqs: usize,
    pub(crate) n_tokens: usize,
}

/// Sequences that wait. Bounded by admission, which every push has passed.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    limits: PolicyLimits,
    short: Entries<T>,
    long: Entries<T>,
    tokens: usize,
    overtaken: usize,
    next_ticket: u64,
}

impl<T> Queue<T> {
    pub(crate) fn new(limits: PolicyLimits) -> Self {
        Self { limits, short: Entries::new(), long: Entries::new(), tokens: 0, overtaken: 0, next_ticket: 0 }
    }

    /// Appends an entry to its lane; returns its ticket. Tickets rise by one.
    pub(crate) fn push(&mut self, tokens: usize, deadline: Option<Instant>, payload: T) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let entries = match self.limits.lane(tokens) {
            Lane::Short => &mut self.short,
            Lane::Long => &mut self.long,
        };
        entries.headers.push_back(Header { ticket, tokens, deadline, live: true });
        entries.payloads.push_back(Some(payload));
        entries.n_live += 1;
        self.tokens += tokens;
        ticket
    }

    /// The ticket that the next push will get.
    pub(crate) fn next_ticket(&self) -> u64 {
        self.next_ticket
    }

    /// Removes what still waits under `tickets`.
    pub(crate) fn cancel(&mut self, tickets: &Range<u64>) -> Vec<T> {
        let mut out = Vec::new();
        self.tokens -= self.short.cancel(tickets, &mut out) + self.long.cancel(tickets, &mut out);
        self.forget_overtaken();
        out
    }

    /// Up to when a deadline is as good as passed at `now`, given the `seconds_per_token` of a worker: the end of the batch that
    /// its lane would give.
    ///
    /// Under overload the head of the queue has always waited for nearly its deadline. A worker that took it because a
    /// moment was left would compute it for nobody, and so on with the next, for ever: all are late, though the worker
    /// never rests. So those go first that would be late at the end of their batch, if there are others that would not.
    /// (If there are none, the estimate decides nothing: work is done, and what is measured of it mends the estimate.)
    pub(crate) fn horizon(&self, now: Instant, idle_workers: usize, seconds_per_token: Option<f64>) -> Horizon {
        /// Of each lane's end. The last to come have the most time left, unless they asked for less than others.
        const LOOKED_AT: usize = 8;
        /// Batches that take longer than the mean are late too.
        const MARGIN: f64 = 1.5;
        let Some(each) = seconds_per_token else { return now.into() };
        let end = |lane, late| {
            let tokens = policy::batch_tokens(&self.view(), lane, now, late, &self.limits, idle_workers);
            let batch = Duration::try_from_secs_f64(MARGIN * each * tokens as f64).ok();
            batch.and_then(|batch| now.checked_add(batch)).unwrap_or(now)
        };
        let short = end(Lane::Short, now);
        let ends = Horizon { short, long: end(Lane::Long, short) };
        let in_time = |entries: &Entries<T>, end| entries.headers.iter().rev().take(LOOKED_AT).any(|h| h.runnable(end));
        if in_time(&self.short, ends.short) || in_time(&self.long, ends.long) { ends } else { now.into() }
    }

    fn view(&self) -> QueueView<'_> {
        QueueView {
            short: &self.short.headers,
            long: &self.long.headers,
            tokens: self.tokens,
            overtaken: self.overtaken,
        }
    }

    /// Moves what a free worker shall run into `run`, and what has expired by `horizon` into `shed`.
    pub(crate) fn take(
        &mut self,
        horizon: impl Into<Horizon>,
        idle_workers: usize,
        run: &mut Vec<T>,
        shed: &mut Vec<T>,
    ) -> Taken {
        let horizon = horizon.into();
        loop {
            let decision = policy::next(&self.view(), horizon, &self.limits, idle_workers);
            let Decision::Take { lane, scan, n_seqs, n_tokens } = decision else { return Taken::default() };
            let entries = match lane {
                Lane::Short => &mut self.short,
                Lane::Long => &mut self.long,
            };
            for (header, payload) in entries.headers.drain(..scan).zip(entries.payloads.drain(..scan)) {
                let Some(payload) = payload else { continue };
                entries.n_live -= 1;
                self.tokens -= header.tokens;
                let expired = header.deadline.is_some_and(|deadline| deadline <= horizon.of(lane));
                if expired { shed.push(payload) } else { run.push(payload) }
            }
            match lane {
                Lane::Short => self.overtaken += n_tokens,
                Lane::Long if n_seqs > 0 => self.overtaken = 0,
                Lane::Long => {}
            }
            self.forget_overtaken();
            if n_seqs > 0 {
                return Taken { n_seqs, n_tokens };
            }
        }
    }

    /// Who is not there is not overtaken.
    fn forget_overtaken(&mut self) {
        if self.long.n_live == 0 {
            self.overtaken = 0;
        }
    }

    /// Sequences that wait.
    pub(crate) fn len(&self) -> usize {
        self.short.n_live + self.long.n_live
    }

    /// Tokens that wait.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    #[cfg(test)]
    fn n_entries(&self) -> usize {
        self.short.headers.len() + self.long.headers.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const LIMITS: PolicyLimits = PolicyLimits {
        max_batch_tokens: 200,
        max_batch_requests: 6,
        target_batch_tokens: 100,
        min_share_tokens: 20,
        short_tokens: 16,
        overtake: 2,
    };

    #[derive(Debug, Clone)]
    enum Step {
        Push { tokens: usize, ttl: Option<u64> },
        Cancel { start: u64, len: u64 },
        Take { idle: usize },
        Wait { ms: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1usize..=200, prop::option::of(0u64..40)).prop_map(|(tokens, ttl)| Step::Push { tokens, ttl }),
            4 => (1usize..=16, prop::option::of(0u64..40)).prop_map(|(tokens, ttl)| Step::Push { tokens, ttl }),
            2 => (0u64..200, 0u64..30).prop_map(|(start, len)| Step::Cancel { start, len }),
            3 => (1usize..4).prop_map(|idle| Step::Take { idle }),
            1 => (0u64..20).prop_map(|ms| Step::Wait { ms }),
        ];
        prop::collection::vec(step, 1..300)
    }

    proptest! {
        /// Against a model that is a map of everything that waits.
        #[test]
        fn every_entry_leaves_exactly_once(steps in steps()) {
            let mut queue: Queue<u64> = Queue::new(LIMITS);
            let mut waiting: BTreeMap<u64, (usize, Option<Instant>)> = BTreeMap::new();
            let mut now = Instant::now();
            let (mut run, mut shed) = (Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Push { tokens, ttl } => {
                        let deadline = ttl.map(|ms| now + Duration::from_millis(ms));
                        let ticket = queue.next_ticket();
                        prop_assert_eq!(queue.push(tokens, deadline, ticket), ticket);
                        waiting.insert(ticket, (tokens, deadline));
                    }
                    Step::Cancel { start, len } => {
                        let mut got = queue.cancel(&(start..start + len));
                        got.sort_unstable();
                        let expected: Vec<u64> = waiting.range(start..start + len).map(|(&ticket, _)| ticket).collect();
                        prop_assert_eq!(&got, &expected);
                        waiting.retain(|ticket, _| !expected.contains(ticket));
                    }
                    Step::Take { idle } => {
                        run.clear();
                        shed.clear();
                        let could_run = waiting.values().any(|(_, deadline)| deadline.is_none_or(|d| d > now));
                        let taken = queue.take(now, idle, &mut run, &mut shed);
                        prop_assert_eq!(taken.n_seqs, run.len());
                        prop_assert_eq!(could_run, !run.is_empty(), "work-conserving");
                        let mut n_tokens = 0;
                        for ticket in &run {
                            let (tokens, deadline) = waiting.remove(ticket).expect("it waits");
                            prop_assert!(deadline.is_none_or(|d| d > now), "expired work is not run");
                            n_tokens += tokens;
                        }
                        for ticket in &shed {
                            let (_, deadline) = waiting.remove(ticket).expect("it waits");
                            prop_assert!(deadline.is_some_and(|d| d <= now), "only expired work is shed");
                        }
                        prop_assert_eq!(taken.n_tokens, n_tokens);
                    }
                    Step::Wait { ms } => now += Duration::from_millis(ms),
                }
                prop_assert_eq!(queue.len(), waiting.len());
                prop_assert_eq!(queue.tokens(), waiting.values().map(|(tokens, _)| tokens).sum::<usize>());
                prop_assert!(queue.n_entries() <= 2 * queue.len() + 2 * COMPACT_AT + 300, "cancelled entries pile up");
            }
            while queue.len() > 0 {
                run.clear();
                let before = queue.len();
                queue.take(now, 1, &mut run, &mut shed);
                prop_assert!(queue.len() < before);
            }
            prop_assert_eq!(queue.tokens(), 0);
        }
    }

    #[test]
    fn cancelled_entries_do_not_pile_up() {
        let mut queue: Queue<u64> = Queue::new(LIMITS);
        for _ in 0..10_000 {
            let first = queue.push(3, None, 0);
            queue.push(50, None, 0);
            assert_eq!(queue.cancel(&(first..first + 2)).len(), 2);
            assert!(queue.n_entries() <= 2 * (COMPACT_AT + 1), "{}", queue.n_entries());
        }
    }

    #[test]
    fn a_deadline_is_held_against_the_batch_of_its_own_lane() {
        let now = Instant::now();
        let taken = |limits, waiting: &[(usize, Option<u64>)]| {
            let mut queue = Queue::new(limits);
            for (index, &(tokens, ttl)) in waiting.iter().enumerate() {
                queue.push(tokens, ttl.map(|ms| now + Duration::from_millis(ms)), index);
            }
            let (mut run, mut shed) = (Vec::new(), Vec::new());
            // A millisecond a token, and half of that again.
            let horizon = queue.horizon(now, 1, Some(1e-3));
            queue.take(horizon, 1, &mut run, &mut shed);
            (run, shed)
        };
        assert_eq!(taken(LIMITS, &[(100, None), (10, Some(20))]), (vec![1], vec![]), "a long one waits");
        assert_eq!(taken(LIMITS, &[(100, Some(20)), (10, Some(20))]), (vec![1], vec![0]), "that one is late");
        let single = PolicyLimits { max_batch_requests: 1, ..LIMITS };
        let many = [(10, Some(20)), (10, None), (10, None), (10, None)];
        assert_eq!(taken(single, &many), (vec![0], vec![]), "the others are not in its batch");
        assert_eq!(taken(LIMITS, &many), (vec![1, 2, 3], vec![0]), "they are");
        let wide = PolicyLimits { target_batch_tokens: 200, ..LIMITS };
        let late = [(10, Some(12)), (30, Some(60)), (30, Some(60)), (30, Some(900)), (30, Some(900))];
        assert_eq!(taken(wide, &late), (vec![3, 4], vec![0, 1, 2]), "a late short one gives way to all long ones");
    }

    /// One worker of 6,000 tokens a second, for 60 s of sequences of 80 tokens whose clients wait for 0.9 s: the share of
    /// its time that it computes for clients who are still there at the end of their batch.
    fn useful_share(offered: f64, estimate: Option<f64>) -> f64 {
        const SECONDS_PER_TOKEN: f64 = 1.0 / 6000.0;
        let limits = PolicyLimits {
            max_batch_tokens: 16_384,
            max_batch_requests: usize::MAX,
            target_batch_tokens: 512,
            min_share_tokens: 256,
            short_tokens: 256,
            overtake: 4,
        };
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        let mut queue = Queue::new(limits);
        let (mut now, mut arrived, mut useful) = (0.0, 0u32, 0);
        let every = 80.0 * SECONDS_PER_TOKEN / offered;
        while now < 60.0 {
            while f64::from(arrived) * every <= now {
                let due = f64::from(arrived) * every;
                queue.push(80, Some(at(due + 0.9)), due + 0.9);
                arrived += 1;
            }
            let (mut run, mut shed) = (Vec::new(), Vec::new());
            let horizon = queue.horizon(at(now), 1, estimate);
            let taken = queue.take(horizon, 1, &mut run, &mut shed);
            now += if taken.n_seqs > 0 { taken.n_tokens as f64 * SECONDS_PER_TOKEN } else { every };
            useful += run.iter().filter(|&&deadline| deadline >= now).count();
        }
        useful as f64 * 80.0 * SECONDS_PER_TOKEN / now
    }

    #[test]
    fn overload_wastes_nothing_on_who_will_be_late() {
        let right = Some(1.0 / 6000.0);
        for offered in [1.2, 1.5, 3.0, 10.0] {
            let share = useful_share(offered, right);
            assert!(share > 0.97, "{share} of the time at {offered} times the capacity");
            // An estimate that is twice or half the truth does not undo it altogether, nor does one of an hour a token.
            for wrong in [2.0, 0.75] {
                let share = useful_share(offered, right.map(|seconds| seconds * wrong));
                assert!(share > 0.9, "{share} at {offered} times the capacity with {wrong} times the time");
            }
            let share = useful_share(offered, Some(3600.0));
            assert!(share > 0.0, "{share} with an estimate that rules everything out");
            assert!(useful_share(offered, None) < 0.9, "without an estimate it is no overload");
        }
        let share = useful_share(0.9, right);
        assert!((share - 0.9).abs() < 0.02, "{share} below the capacity");
    }
}
