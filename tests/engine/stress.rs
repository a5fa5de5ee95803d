//! Many clients on real threads, with deadlines and departures at random: every permit returns, every count agrees.

use std::time::Duration;

use niwaki::engine::{EngineError, EngineLimits};
use niwaki::model::Want;
use niwaki::telemetry::{ExpiryStage, RejectReason, Stage};
use tokio::time::{sleep, timeout};

use super::straw::{Farm, Field, due, start, until, work};

/// Outcomes as the clients saw them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seen {
    answered: u64,
    overloaded: u64,
    out_of_memory: u64,
    expired: u64,
    left: u64,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.overloaded += other.overloaded;
        self.out_of_memory += other.out_of_memory;
        self.expired += other.expired;
        self.left += other.left;
    }

    fn n_total(&self) -> u64 {
        self.answered + self.overloaded + self.out_of_memory + self.expired + self.left
    }
}

/// Steele and Vigna's splitmix64: the same run from the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

async fn client(farm: &Farm, seed: u64, n_submissions: usize) -> Seen {
    let mut dice = Dice(seed);
    let mut seen = Seen::default();
    for _ in 0..n_submissions {
        let n_seqs = 1 + dice.roll(4);
        let sequences: Vec<Vec<u32>> = (0..n_seqs)
            .map(|_| {
                let len = if dice.roll(10) == 0 { 100 + dice.roll(400) } else { 1 + dice.roll(30) };
                (0..len).map(|_| dice.roll(900) as u32).collect()
            })
            .collect();
        let mut submission = work(&sequences);
        if dice.roll(4) == 0 {
            submission.want = Want::PooledAndTokens;
        }
        if dice.roll(3) == 0 {
            submission = due(submission, Duration::from_micros(dice.roll(20_000)));
        }
        let want = submission.want;
        let patience =
            if dice.roll(4) == 0 { Duration::from_micros(dice.roll(8_000)) } else { Duration::from_secs(60) };
        match timeout(patience, farm.engine.submit(submission)).await {
            Err(_) => {
                assert!(patience < Duration::from_secs(60), "a submission hangs");
                seen.left += 1;
            }
            Ok(Ok(reply)) => {
                seen.answered += 1;
                assert_eq!(reply.rows.len(), sequences.len());
                for (rows, ids) in reply.rows.iter().zip(&sequences) {
                    assert_eq!(rows.pooled[..2], [ids.iter().sum::<u32>() as f32, ids.len() as f32]);
                    let n_token_rows = if want == Want::PooledAndTokens { ids.len() } else { 0 };
                    assert_eq!(rows.tokens.len(), 3 * n_token_rows);
                    assert!(rows.tokens.chunks(3).zip(ids).all(|(row, &id)| row[0] == id as f32));
                }
            }
            Ok(Err(EngineError::DeadlineExceeded { .. })) => seen.expired += 1,
            Ok(Err(EngineError::Overloaded { reason, .. })) => {
                match reason {
                    RejectReason::Overload => seen.overloaded += 1,
                    RejectReason::Memory => seen.out_of_memory += 1,
                    other => panic!("{other}"),
                }
                sleep(Duration::from_millis(1 + dice.roll(3))).await;
            }
            Ok(Err(other)) => panic!("{other}"),
        }
    }
    seen
}

#[test]
fn everything_adds_up_under_ten_thousand_submissions() {
    const N_CLIENTS: u64 = 100;
    const N_EACH: usize = 100;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
    let limits = EngineLimits {
        max_batch_tokens: 600,
        max_batch_requests: Some(16),
        max_concurrent_requests: 150,
        max_queue_tokens: 6_000,
        max_queue_bytes: 60_000,
        target_batch_tokens: 256,
        min_share_tokens: 32,
        short_tokens: 32,
        ..EngineLimits::default()
    };
    let field = Field { record: true, nanos_per_token: 700, ..Field::default() };
    field.gate.open();
    let farm: &'static Farm = Box::leak(Box::new(start(3, limits, field)));
    let seen = runtime.block_on(async {
        let tasks: Vec<_> = (0..N_CLIENTS).map(|seed| tokio::spawn(client(farm, seed, N_EACH))).collect();
        let mut seen = Seen::default();
        for task in tasks {
            seen.add(task.await.unwrap());
        }
        timeout(Duration::from_secs(10), farm.engine.drained()).await.unwrap();
        until("all is quiet", || farm.empty()).await;
        seen
    });
    println!("{seen:?}");
    assert_eq!(seen.n_total(), N_CLIENTS * N_EACH as u64);
    // The mix is one in which everything happens.
    for count in [seen.answered, seen.overloaded, seen.out_of_memory, seen.expired, seen.left] {
        assert!(count > 20, "{seen:?}");
    }
    let metrics = &farm.metrics;
    let expirations: u64 = ExpiryStage::ALL.iter().map(|&stage| metrics.expirations(stage)).sum();
    let counted = Seen {
        answered: metrics.stages(Stage::Infer),
        overloaded: metrics.rejections(RejectReason::Overload),
        out_of_memory: metrics.rejections(RejectReason::Memory),
        expired: metrics.rejections(RejectReason::Deadline),
        left: metrics.cancellations(),
    };
    assert_eq!(counted, seen);
    assert_eq!(expirations, seen.expired);
    assert_eq!((metrics.stages(Stage::Queue), metrics.inference_errors()), (seen.answered, 0));

    let batches = farm.field.batches.lock().unwrap();
    let (n_batches, n_seqs, n_tokens) = metrics.batches();
    assert_eq!(n_batches, batches.len() as u64);
    assert_eq!(n_seqs, batches.iter().map(|lens| lens.len() as u64).sum::<u64>());
    assert_eq!(n_tokens, batches.iter().flatten().map(|&len| len as u64).sum::<u64>());
    for lens in batches.iter() {
        assert!(lens.len() <= 16 && (lens.len() == 1 || lens.iter().sum::<usize>() <= 256), "{lens:?}");
        assert!(lens.iter().all(|&len| len <= 32) || lens.iter().all(|&len| len > 32), "{lens:?}");
    }
    assert!(farm.engine.is_alive());
    assert!(farm.engine.tokens_per_second().is_some());
}
