//! The engine with models of straw: admission, order, cancellation, deadlines, death, and that everything adds up.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

mod straw;
mod stress;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use niwaki::engine::{Engine, EngineError, EngineLimits, StartError};
use niwaki::model::{ModelError, Want};
use niwaki::telemetry::allocator::CountingAllocator;
use niwaki::telemetry::{ExpiryStage, Metrics, RejectReason, Stage};
use straw::{FAIL, MS, NAN, PANIC, VOCAB, due, ones, open, shut, start, until, wide, work};
use tokio::time::{Instant, sleep, timeout};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[tokio::test]
async fn rows_come_back_to_their_sequences() {
    let farm = start(2, wide(), open());
    let mut first = work(&[vec![5, 6], vec![7], vec![1, 2, 3]]);
    first.sequences[2].token_types = vec![0, 1, 1];
    let mut second = work(&[vec![9, 8]]);
    second.want = Want::PooledAndTokens;
    let (first, second) = tokio::join!(farm.engine.submit(first), farm.engine.submit(second));
    let first = first.unwrap();
    let pooled: Vec<&[f32]> = first.rows.iter().map(|rows| &*rows.pooled).collect();
    assert_eq!(pooled, [[11.0, 2.0, 0.0], [7.0, 1.0, 0.0], [6.0, 3.0, 2.0]]);
    assert!(first.rows.iter().all(|rows| rows.tokens.is_empty()));
    let second = second.unwrap();
    assert_eq!(second.rows[0].tokens, [9.0, 0.0, 0.0, 8.0, 1.0, 0.0]);
    assert_eq!((farm.metrics.stages(Stage::Queue), farm.metrics.stages(Stage::Infer)), (2, 2));
    let (_, n_seqs, n_tokens) = farm.metrics.batches();
    assert_eq!((n_seqs, n_tokens), (4, 8));
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn what_the_model_would_refuse_never_reaches_a_batch() {
    let farm = start(1, EngineLimits { max_batch_tokens: 300, ..wide() }, open());
    let refused = |work| async { farm.engine.submit(work).await.unwrap_err() };
    assert!(matches!(refused(work(&[])).await, EngineError::Empty));
    assert!(matches!(refused(work(&[vec![1], vec![]])).await, EngineError::Model(ModelError::EmptySequence)));
    let error = refused(work(&[vec![1], vec![VOCAB as u32]])).await;
    assert!(matches!(error, EngineError::Model(ModelError::TokenOutOfRange { id: 1000, vocab_size: 1000 })));
    let error = refused(ones(1, 513)).await;
    assert!(matches!(error, EngineError::Model(ModelError::SequenceTooLong { got: 513, limit: 512 })));
    assert!(matches!(refused(ones(1, 301)).await, EngineError::TooLarge { tokens: 301, limit: 300 }));
    for (types, expected) in [(vec![0], "expected 3 token types, got 1"), (vec![0, 2, 0], "token type 2 is out")] {
        let mut work = ones(1, 3);
        work.sequences[0].token_types = types;
        assert!(refused(work).await.to_string().starts_with(expected));
    }
    assert_eq!(farm.metrics.rejections(RejectReason::Validation), 7);
    assert_eq!(farm.metrics.batches(), (0, 0, 0));
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn a_submission_is_admitted_whole_or_not_at_all() {
    // Every sequence of 10 ids takes 40 bytes and 12 for its row.
    let limits = EngineLimits {
        max_concurrent_requests: 8,
        max_queue_tokens: 50,
        max_queue_bytes: 390,
        ..EngineLimits::default()
    };
    let farm = start(1, limits, shut());
    let running = farm.occupy(1).await;
    let refused = |work| async { farm.engine.submit(work).await.unwrap_err() };
    let reason = |error| match error {
        EngineError::Overloaded { reason, retry_after } => {
            assert!((Duration::from_secs(1)..=Duration::from_secs(30)).contains(&retry_after));
            reason
        }
        other => panic!("{other}"),
    };
    assert!(matches!(refused(ones(9, 1)).await, EngineError::TooManySequences { sequences: 9, limit: 8 }));
    assert!(matches!(refused(ones(6, 10)).await, EngineError::TooLarge { tokens: 60, limit: 50 }));
    let mut rows = ones(1, 50);
    rows.want = Want::PooledAndTokens;
    assert!(matches!(refused(rows).await, EngineError::TooManyBytes { bytes: 812, limit: 390 }));

    let waiting = farm.spawn(ones(4, 10));
    until("four wait", || farm.engine.load().queued_sequences == 4).await;
    assert_eq!(reason(refused(ones(2, 10)).await), RejectReason::Overload, "40 + 20 tokens are more than 50");
    assert_eq!(reason(refused(ones(4, 1)).await), RejectReason::Overload, "5 + 4 sequences are more than 8");
    let mut rows = ones(1, 10);
    rows.want = Want::PooledAndTokens;
    assert_eq!(reason(refused(rows).await), RejectReason::Memory, "16 + 4·52 + 172 bytes are more than 390");

    // Nothing of what was refused is held: exactly what is left fits.
    let fits = farm.spawn(ones(3, 3));
    until("seven wait", || farm.engine.load().queued_sequences == 7).await;
    assert_eq!(farm.engine.load().admitted_sequences, 8);
    farm.field.gate.open();
    for task in running.into_iter().chain([waiting, fits]) {
        task.await.unwrap().unwrap();
    }
    assert_eq!(farm.metrics.rejections(RejectReason::Overload), 2);
    assert_eq!(farm.metrics.rejections(RejectReason::Memory), 1);
    assert_eq!(farm.metrics.rejections(RejectReason::Validation), 3);
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn a_dropped_submission_gives_everything_back_at_once() {
    let farm = start(1, wide(), shut());
    let running = farm.occupy(1).await;
    let held = farm.engine.load();
    // Waiting: gone from the queue before the drop returns.
    let waiting = farm.engine.submit(ones(5, 20));
    assert!(timeout(20 * MS, waiting).await.is_err());
    assert_eq!(farm.engine.load(), held);
    assert_eq!(farm.metrics.queue(), (0, 0));
    assert_eq!(farm.metrics.cancellations(), 1);
    // Running: what it held is given back, the worker computes on for nobody.
    for task in running {
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }
    let load = farm.engine.load();
    assert_eq!((load.admitted_sequences, load.admitted_bytes, load.running_sequences), (0, 0, 1));
    assert_eq!(farm.metrics.cancellations(), 2);
    farm.field.gate.open();
    farm.engine.submit(ones(1, 2)).await.unwrap();
    until("all is quiet", || farm.empty()).await;
    assert_eq!(*farm.field.batches.lock().unwrap(), [[1], [2]], "the cancelled sequences were not computed");
}

fn expired(error: EngineError) -> (ExpiryStage, Duration) {
    match error {
        EngineError::DeadlineExceeded { stage, waited } => (stage, waited),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn deadlines_are_kept_wherever_a_submission_is() {
    let farm = start(1, wide(), shut());
    let mut late = ones(1, 1);
    late.deadline = Some(Instant::now());
    let late = farm.engine.submit(late).await.unwrap_err();
    assert_eq!(expired(late), (ExpiryStage::Admission, Duration::ZERO));

    let running = farm.spawn(due(ones(1, 7), 500 * MS));
    until("it runs", || farm.field.gate.n_waiting.load(SeqCst) == 1).await;
    let (stage, waited) = expired(farm.engine.submit(due(ones(2, 9), 30 * MS)).await.unwrap_err());
    assert!(stage == ExpiryStage::Queue && waited >= 29 * MS, "{stage} {waited:?}");
    let (stage, _) = expired(running.await.unwrap().unwrap_err());
    assert_eq!(stage, ExpiryStage::Infer, "told while the worker is still at it");

    farm.field.gate.open();
    farm.engine.submit(ones(1, 2)).await.unwrap();
    assert_eq!(*farm.field.batches.lock().unwrap(), [[7], [2]], "what expired in the queue was not computed");
    for stage in [ExpiryStage::Admission, ExpiryStage::Queue, ExpiryStage::Infer] {
        assert_eq!(farm.metrics.expirations(stage), 1, "{stage}");
    }
    assert_eq!(farm.metrics.rejections(RejectReason::Deadline), 3);
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn the_default_deadline_holds_for_those_who_name_none() {
    let farm = start(1, EngineLimits { default_timeout: Some(200 * MS), ..wide() }, shut());
    let (stage, waited) = expired(farm.engine.submit(ones(1, 1)).await.unwrap_err());
    assert!(stage == ExpiryStage::Infer && waited >= 199 * MS, "{stage} {waited:?}");
    let named = farm.spawn(due(ones(1, 1), Duration::from_secs(60)));
    until("it waits", || farm.engine.load().queued_sequences == 1).await;
    sleep(250 * MS).await;
    farm.field.gate.open();
    named.await.unwrap().unwrap();
}

/// A future that nobody polls has no timer: the worker's own look at the clock must shed its work.
#[tokio::test]
async fn a_worker_sheds_what_has_expired() {
    let farm = start(1, wide(), shut());
    let running = farm.occupy(1).await;
    let mut unpolled = Box::pin(farm.engine.submit(due(ones(1, 9), 200 * MS)));
    assert!(timeout(MS, &mut unpolled).await.is_err());
    std::thread::sleep(250 * MS);
    farm.field.gate.open();
    for task in running {
        task.await.unwrap().unwrap();
    }
    until("it is shed", || farm.engine.load().queued_sequences == 0).await;
    let (stage, _) = expired(unpolled.await.unwrap_err());
    assert_eq!(stage, ExpiryStage::Queue);
    assert_eq!(*farm.field.batches.lock().unwrap(), [[1]]);
    assert_eq!(farm.metrics.expirations(ExpiryStage::Queue), 1);
}

#[tokio::test]
async fn a_burst_is_spread_over_free_workers_and_kept_together_when_small() {
    let limits = EngineLimits { min_share_tokens: 64, ..wide() };
    let farm = start(3, limits, shut());
    // Give the workers time to fall asleep: each must be woken by the one before it.
    sleep(50 * MS).await;
    // 12 sequences of 20 tokens over three workers: four each.
    let task = farm.spawn(ones(12, 20));
    until("all workers are in a batch", || farm.field.gate.n_waiting.load(SeqCst) == 3).await;
    assert_eq!(*farm.field.batches.lock().unwrap(), [[20; 4], [20; 4], [20; 4]]);
    farm.field.gate.open();
    task.await.unwrap().unwrap();
    farm.field.batches.lock().unwrap().clear();
    farm.engine.submit(ones(3, 20)).await.unwrap();
    assert_eq!(*farm.field.batches.lock().unwrap(), [[20; 3]], "a share below 64 tokens is not worth a worker");
}

#[tokio::test]
async fn short_texts_pass_long_ones_in_the_queue() {
    let farm = start(1, EngineLimits { short_tokens: 16, overtake: 1, target_batch_tokens: 64, ..wide() }, shut());
    let mut tasks = farm.occupy(1).await;
    for len in [100, 100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10] {
        let waiting = farm.engine.load().queued_sequences;
        tasks.push(farm.spawn(ones(1, len)));
        until("it waits", || farm.engine.load().queued_sequences == waiting + 1).await;
    }
    farm.field.gate.open();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let batches = farm.field.batches.lock().unwrap().clone();
    assert_eq!(batches, [vec![1], vec![10; 6], vec![10; 6], vec![100], vec![100]]);
}

#[tokio::test]
async fn only_what_cannot_run_fails() {
    let farm = start(1, wide(), shut());
    let mut good = farm.occupy(1).await;
    let mut bad = Vec::new();
    for ids in [vec![2, 3], vec![FAIL], vec![4], vec![NAN, 1], vec![5]] {
        let waiting = farm.engine.load().queued_sequences;
        let is_bad = ids.contains(&FAIL) || ids.contains(&NAN);
        if is_bad { &mut bad } else { &mut good }.push(farm.spawn(work(&[ids])));
        until("it waits", || farm.engine.load().queued_sequences == waiting + 1).await;
    }
    farm.field.gate.open();
    let sums = [1.0, 5.0, 4.0, 5.0];
    for (task, sum) in good.into_iter().zip(sums) {
        assert_eq!(task.await.unwrap().unwrap().rows[0].pooled[0], sum);
    }
    let errors: Vec<EngineError> = {
        let mut errors = Vec::new();
        for task in bad {
            errors.push(task.await.unwrap().unwrap_err());
        }
        errors
    };
    assert!(matches!(&errors[..], [EngineError::Model(ModelError::Player(_)), EngineError::NotFinite]), "{errors:?}");
    assert_eq!(farm.metrics.inference_errors(), 2);
    assert!(farm.engine.is_alive());
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn a_panic_fails_its_batch_and_is_told() {
    let farm = start(2, wide(), shut());
    let farm = &farm;
    let burning = farm.spawn(work(&[vec![PANIC]]));
    until("one is about to burn", || farm.field.gate.n_waiting.load(SeqCst) == 1).await;
    let healthy = farm.spawn(ones(1, 3));
    until("the other is busy", || farm.field.gate.n_waiting.load(SeqCst) == 2).await;
    let split = farm.spawn(work(&[vec![1], vec![PANIC], vec![2]]));
    until("three wait", || farm.engine.load().queued_sequences == 3).await;
    assert!(farm.engine.is_alive());
    assert!(timeout(10 * MS, farm.engine.died()).await.is_err());

    farm.field.gate.open();
    assert!(matches!(burning.await.unwrap(), Err(EngineError::WorkerDied)));
    healthy.await.unwrap().unwrap();
    assert!(matches!(split.await.unwrap(), Err(EngineError::WorkerDied)));
    timeout(Duration::from_secs(5), farm.engine.died()).await.unwrap();
    assert!(!farm.engine.is_alive());
    // Both are gone: nothing hangs.
    until("both have died", || farm.field.n_dropped.load(SeqCst) == 2).await;
    assert!(matches!(farm.engine.submit(ones(1, 1)).await, Err(EngineError::WorkerDied)));
    assert_eq!(farm.metrics.inference_errors(), 3);
    timeout(Duration::from_secs(5), farm.engine.drained()).await.unwrap();
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn the_last_worker_takes_the_queue_with_it() {
    let farm = start(1, wide(), shut());
    let burning = farm.spawn(work(&[vec![PANIC]]));
    until("it is about to burn", || farm.field.gate.n_waiting.load(SeqCst) == 1).await;
    let waiting: Vec<_> = (0..5).map(|_| farm.spawn(ones(2, 3))).collect();
    until("ten wait", || farm.engine.load().queued_sequences == 10).await;
    farm.field.gate.open();
    for task in waiting.into_iter().chain([burning]) {
        assert!(matches!(task.await.unwrap(), Err(EngineError::WorkerDied)));
    }
    until("all is quiet", || farm.empty()).await;
}

#[tokio::test]
async fn draining_finishes_what_was_admitted() {
    let farm = start(1, wide(), shut());
    let mut tasks = farm.occupy(1).await;
    tasks.push(farm.spawn(ones(4, 4)));
    until("four wait", || farm.engine.load().queued_sequences == 4).await;
    farm.engine.close();
    let error = farm.engine.submit(ones(1, 1)).await.unwrap_err();
    assert!(matches!(error, EngineError::Draining { retry_after } if retry_after >= Duration::from_secs(1)), "{error}");
    assert!(timeout(10 * MS, farm.engine.drained()).await.is_err());
    farm.field.gate.open();
    timeout(Duration::from_secs(5), farm.engine.drained()).await.unwrap();
    assert!(farm.empty());
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(farm.metrics.rejections(RejectReason::Draining), 1);
}

#[tokio::test]
async fn workers_end_with_the_last_handle() {
    let farm = start(3, wide(), open());
    let other = farm.engine.clone();
    farm.engine.submit(ones(1, 1)).await.unwrap();
    drop(farm.engine);
    other.submit(ones(1, 1)).await.unwrap();
    assert_eq!(farm.field.n_dropped.load(SeqCst), 0);
    drop(other);
    until("the models are dropped", || farm.field.n_dropped.load(SeqCst) == 3).await;
}

#[tokio::test]
async fn limits_are_checked_at_the_start() {
    let none = Engine::start(Vec::new(), wide(), Metrics::new());
    assert!(matches!(none, Err(StartError::NoWorkers)));
    let limits = EngineLimits { max_batch_tokens: 0, ..wide() };
    let straw = start(1, wide(), open()).field;
    let zero = Engine::start(vec![straw::worker(&straw)], limits, Metrics::new());
    assert_eq!(zero.unwrap_err().to_string(), "limit `max_batch_tokens` is 0, it must be at least 1");
}

#[tokio::test]
async fn memory_of_the_models_is_told() {
    let farm = start(3, wide(), open());
    let text = farm.metrics.render();
    for (kind, bytes) in [("weights", 1000), ("workspace", 600), ("workspace_peak", 450)] {
        assert!(text.contains(&format!("memory_bytes{{kind=\"{kind}\"}} {bytes}\n")), "{kind}\n{text}");
    }
    assert!(text.contains(&format!("queue_capacity {}\n", wide().max_queue_tokens)));
}

/// The loop of a worker allocates the rows it hands out and nothing else.
#[tokio::test]
async fn a_batch_allocates_only_its_rows() {
    let farm = start(1, wide(), open());
    for round in 0..200 {
        farm.engine.submit(ones(1 + round % 7, 1 + round % 50)).await.unwrap();
    }
    let allocations = farm.field.allocations.lock().unwrap().split_off(100);
    assert!(allocations.len() > 90);
    for (n_allocations, n_rows) in allocations {
        assert_eq!(n_allocations, n_rows as u64);
    }
}
