use std::time::Duration;

use proptest::prelude::*;

use super::super::queue::Queue;
use super::*;

const LIMITS: PolicyLimits = PolicyLimits {
    max_batch_tokens: 300,
    max_batch_requests: usize::MAX,
    target_batch_tokens: 100,
    min_share_tokens: 20,
    short_tokens: 16,
    overtake: 4,
};

fn headers(tokens: &[usize]) -> VecDeque<Header> {
    let header =
        |(ticket, &tokens): (usize, &usize)| Header { ticket: ticket as u64, tokens, deadline: None, live: true };
    tokens.iter().enumerate().map(header).collect()
}

fn decide(short: &[usize], long: &[usize], overtaken: usize, idle_workers: usize) -> Decision {
    let (short, long) = (headers(short), headers(long));
    let tokens = short.iter().chain(&long).map(|header| header.tokens).sum();
    next(&QueueView { short: &short, long: &long, tokens, overtaken }, Instant::now(), &LIMITS, idle_workers)
}

fn take(lane: Lane, n_seqs: usize, n_tokens: usize) -> Decision {
    Decision::Take { lane, scan: n_seqs, n_seqs, n_tokens }
}

#[test]
fn the_cases() {
    use Lane::{Long, Short};
    type Case<'a> = (&'a str, &'a [usize], &'a [usize], usize, usize, Decision);
    let cases: [Case<'_>; 11] = [
        // Why, short lane, long lane, overtaken, idle workers, decision.
        ("nothing waits", &[], &[], 0, 1, Decision::Idle),
        ("a lone sequence goes at once", &[3], &[], 0, 4, take(Short, 1, 3)),
        ("the target ends a batch", &[16; 10], &[], 0, 1, take(Short, 6, 96)),
        ("free workers share", &[16; 6], &[], 0, 2, take(Short, 3, 48)),
        ("what waits in both lanes is shared", &[16; 6], &[96], 0, 2, take(Short, 6, 96)),
        ("a share is not tiny", &[5; 6], &[], 0, 6, take(Short, 4, 20)),
        ("a sequence beyond the target is a batch", &[], &[250, 20], 0, 1, take(Long, 1, 250)),
        ("long ones fill a batch too", &[], &[30, 40, 50], 0, 1, take(Long, 2, 70)),
        ("short ones first", &[4], &[30], 0, 1, take(Short, 1, 4)),
        ("not overtaken enough", &[4], &[30], 119, 1, take(Short, 1, 4)),
        ("overtaken enough: one long one alone", &[4], &[30, 30], 120, 1, take(Long, 1, 30)),
    ];
    for (why, short, long, overtaken, idle, expected) in cases {
        assert_eq!(decide(short, long, overtaken, idle), expected, "{why}");
    }
}

#[test]
fn the_request_limit_ends_a_batch() {
    let short = headers(&[1; 9]);
    let view = QueueView { short: &short, long: &VecDeque::new(), tokens: 9, overtaken: 0 };
    let limits = PolicyLimits { max_batch_requests: 4, ..LIMITS };
    assert_eq!(next(&view, Instant::now(), &limits, 1), take(Lane::Short, 4, 4));
}

#[test]
fn a_deadline_that_is_now_has_passed() {
    let now = Instant::now();
    let mut short = headers(&[5, 5, 5, 5]);
    short[0].deadline = Some(now);
    short[1].live = false;
    short[3].deadline = Some(now);
    let ask = |short: &VecDeque<Header>, long: &VecDeque<Header>, now| {
        next(&QueueView { short, long, tokens: 70, overtaken: 0 }, now, &LIMITS, 1)
    };
    let none = VecDeque::new();
    // Heads that cannot run go first, then the batch steps over the expired one inside it.
    assert_eq!(ask(&short, &none, now), Decision::Take { lane: Lane::Short, scan: 2, n_seqs: 0, n_tokens: 0 });
    short.drain(..2);
    assert_eq!(ask(&short, &none, now), Decision::Take { lane: Lane::Short, scan: 2, n_seqs: 1, n_tokens: 5 });
    assert_eq!(ask(&short, &none, now - Duration::from_nanos(1)), take(Lane::Short, 2, 10));
    // An expired long head does not bring the next one forward.
    let mut long = headers(&[50, 60]);
    long[0].deadline = Some(now);
    assert_eq!(ask(&short, &long, now), Decision::Take { lane: Lane::Long, scan: 1, n_seqs: 0, n_tokens: 0 });
    long.pop_front();
    assert_eq!(ask(&short, &long, now), Decision::Take { lane: Lane::Short, scan: 2, n_seqs: 1, n_tokens: 5 });
}

#[derive(Debug, Clone)]
struct Arrival {
    at: usize,
    tokens: usize,
}

#[derive(Debug, Clone, Copy)]
struct Start {
    at: usize,
    /// Index of its arrival.
    ticket: usize,
    lane: Lane,
    tokens: usize,
    batch: usize,
}

/// A run of the queue with workers that take one tick per token; what was started, in order. At one tick, arrivals come
/// before starts.
fn simulate(arrivals: &[Arrival], n_workers: usize) -> Vec<Start> {
    let mut queue = Queue::new(LIMITS);
    let mut busy_until = vec![0usize; n_workers];
    let (mut at, mut arrived, mut batch) = (0, 0, 0);
    let (mut run, mut shed, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    let now = Instant::now();
    loop {
        while arrived < arrivals.len() && arrivals[arrived].at <= at {
            queue.push(arrivals[arrived].tokens, None, arrived);
            arrived += 1;
        }
        for worker in 0..n_workers {
            if busy_until[worker] > at {
                continue;
            }
            let idle = busy_until.iter().filter(|&&until| until <= at).count();
            busy_until[worker] = at + queue.take(now, idle, &mut run, &mut shed).n_tokens;
            starts.extend(run.drain(..).map(|ticket| {
                let tokens = arrivals[ticket].tokens;
                Start { at, ticket, lane: LIMITS.lane(tokens), tokens, batch }
            }));
            batch += 1;
        }
        let next_end = busy_until.iter().copied().filter(|&until| until > at).min();
        let next_arrival = arrivals.get(arrived).map(|arrival| arrival.at);
        match next_end.into_iter().chain(next_arrival).min() {
            Some(next) => at = next,
            None => return starts,
        }
    }
}

/// From light load to heavy: a tick per token and worker, gaps of up to 40 ticks.
fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let tokens = prop_oneof![6 => 1usize..=16, 2 => 17usize..=60, 1 => 200usize..=300];
    (1usize..40, prop::collection::vec((any::<prop::sample::Index>(), tokens), 1..250)).prop_map(|(most, gaps)| {
        let mut at = 0;
        let arrival = |(gap, tokens): (prop::sample::Index, usize)| {
            at += gap.index(most);
            Arrival { at, tokens }
        };
        gaps.into_iter().map(arrival).collect()
    })
}

fn tokens_of<'a>(starts: impl IntoIterator<Item = &'a Start>, lane: Lane) -> usize {
    starts.into_iter().filter(|start| start.lane == lane).map(|start| start.tokens).sum()
}

proptest! {
    #[test]
    fn batches_keep_to_the_budget_and_lanes_to_their_order(arrivals in arrivals(), n_workers in 1usize..4) {
        let starts = simulate(&arrivals, n_workers);
        prop_assert_eq!(starts.len(), arrivals.len(), "nobody starves, nobody runs twice");
        for lane in [Lane::Short, Lane::Long] {
            let of_lane = starts.iter().filter(|start| start.lane == lane);
            prop_assert!(of_lane.map(|start| start.ticket).is_sorted_by(|a, b| a < b), "first in, first out");
        }
        for batch in starts.chunk_by(|a, b| a.batch == b.batch) {
            let n_tokens: usize = batch.iter().map(|start| start.tokens).sum();
            prop_assert!(n_tokens <= LIMITS.max_batch_tokens);
            prop_assert!(batch.len() == 1 || n_tokens <= LIMITS.target_batch_tokens);
            prop_assert!(batch.iter().all(|start| start.lane == batch[0].lane), "no short one sits with a long one");
        }
    }

    /// The first bound of the module's text: at most `L + T/f` tokens of long work are started while a short one waits.
    #[test]
    fn a_short_one_waits_for_little_long_work(arrivals in arrivals(), n_workers in 1usize..4) {
        let starts = simulate(&arrivals, n_workers);
        let longest = arrivals.iter().map(|arrival| arrival.tokens).max().unwrap_or(0);
        for (position, start) in starts.iter().enumerate().filter(|(_, start)| start.lane == Lane::Short) {
            let arrived = arrivals[start.ticket].at;
            let while_it_waited = || starts[..position].iter().filter(|other| other.at >= arrived);
            let ahead = tokens_of(while_it_waited(), Lane::Short);
            let long = tokens_of(while_it_waited(), Lane::Long);
            prop_assert!(long <= longest + ahead / LIMITS.overtake, "{long} long, {ahead} short before {start:?}");
        }
    }

    /// What was running when a short one came: at most `max(B, L)` tokens per worker.
    #[test]
    fn a_batch_is_no_longer_than_the_target_or_one_sequence(arrivals in arrivals(), n_workers in 1usize..4) {
        let starts = simulate(&arrivals, n_workers);
        let longest = arrivals.iter().map(|arrival| arrival.tokens).max().unwrap_or(0);
        for batch in starts.chunk_by(|a, b| a.batch == b.batch) {
            let n_tokens: usize = batch.iter().map(|start| start.tokens).sum();
            prop_assert!(n_tokens <= longest.max(LIMITS.target_batch_tokens));
        }
    }

    /// The second bound: a long head is overtaken by less than `f` times its tokens plus one batch.
    #[test]
    fn a_long_one_is_overtaken_boundedly(arrivals in arrivals(), n_workers in 1usize..4) {
        let starts = simulate(&arrivals, n_workers);
        let mut head_since = 0;
        for (position, start) in starts.iter().enumerate().filter(|(_, start)| start.lane == Lane::Long) {
            let arrived = arrivals[start.ticket].at;
            let while_head = starts[head_since..position].iter().filter(|other| other.at >= arrived);
            let overtaken = tokens_of(while_head, Lane::Short);
            let bound = LIMITS.overtake * start.tokens + LIMITS.target_batch_tokens;
            prop_assert!(overtaken < bound, "{overtaken} tokens overtook {start:?}, the bound is {bound}");
            head_since = position;
        }
    }
}

/// Without contention neither lane is held back, and under it the long lane gets its part of the work.
#[test]
fn a_contended_machine_is_shared_as_said() {
    let mut arrivals: Vec<Arrival> = Vec::new();
    for at in 0..20_000 {
        // Twice what one worker can do, half of it short and half long.
        arrivals.push(Arrival { at, tokens: 1 });
        if at % 50 == 0 {
            arrivals.push(Arrival { at, tokens: 50 });
        }
    }
    let starts = simulate(&arrivals, 1);
    let loaded: Vec<Start> = starts.into_iter().filter(|start| (2_000..20_000).contains(&start.at)).collect();
    let (short, long) = (tokens_of(&loaded, Lane::Short) as f64, tokens_of(&loaded, Lane::Long) as f64);
    // Short work is half of the capacity's double, so all of the capacity; `overtake` leaves a fifth to the long lane.
    let part = long / (short + long);
    assert!((part - 0.2).abs() < 0.05, "{part}");
}
