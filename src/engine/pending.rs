//! A submission between admission and answer: its sequences come back one by one, from any worker.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::error::EngineError;
use super::request::{Reply, Sequence, SequenceRows};
use crate::model::Want;
use crate::telemetry::ExpiryStage;

/// What a submission's future gets.
pub(crate) type Answer = Result<Reply, EngineError>;

/// The rows that have come, and where to send them. Only workers and the queue hold it: when the last of them lets go
/// without an answer, the submission's future learns it from the closed channel.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) want: Want,
    pub(crate) admitted: Instant,
    /// Whether a worker has taken any of its sequences to run.
    started: AtomicBool,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    rows: Vec<SequenceRows>,
    n_missing: usize,
    queue: Duration,
    infer: Duration,
    /// `None` once answered.
    answer: Option<oneshot::Sender<Answer>>,
}

/// One sequence of a submission, as it waits and runs.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) pending: Arc<Pending>,
    /// Which of the submission's sequences.
    pub(crate) index: usize,
    pub(crate) sequence: Sequence,
}

impl Pending {
    pub(crate) fn new(n_seqs: usize, want: Want, admitted: Instant) -> (Arc<Self>, oneshot::Receiver<Answer>) {
        let (sender, receiver) = oneshot::channel();
        let progress = Progress {
            rows: vec![SequenceRows::default(); n_seqs],
            n_missing: n_seqs,
            queue: Duration::ZERO,
            infer: Duration::ZERO,
            answer: Some(sender),
        };
        let pending = Self { want, admitted, started: AtomicBool::new(false), progress: Mutex::new(progress) };
        (Arc::new(pending), receiver)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker takes a sequence to run.
    pub(crate) fn start(&self) {
        self.started.store(true, Relaxed);
    }

    /// A sequence came back. The last one sends the answer.
    pub(crate) fn complete(&self, index: usize, rows: SequenceRows, queue: Duration, infer: Duration) {
        let mut progress = self.progress();
        progress.rows[index] = rows;
        progress.n_missing -= 1;
        progress.queue += queue;
        progress.infer += infer;
        if progress.n_missing > 0 {
            return;
        }
        let rows = std::mem::take(&mut progress.rows);
        let n_seqs = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let reply = Reply { queue: progress.queue / n_seqs, infer: progress.infer / n_seqs, rows };
        Self::send(&mut progress, Ok(reply));
    }

    /// A sequence failed, and with it the submission; the first failure is the answer.
    pub(crate) fn fail(&self, error: EngineError) {
        Self::send(&mut self.progress(), Err(error));
    }

    /// A sequence's deadline had passed when a worker came to it.
    pub(crate) fn expire(&self, now: Instant) {
        let stage = if self.started.load(Relaxed) { ExpiryStage::Infer } else { ExpiryStage::Queue };
        self.fail(EngineError::DeadlineExceeded { stage, waited: now.saturating_duration_since(self.admitted) });
    }

    fn send(progress: &mut Progress, answer: Answer) {
        if let Some(sender) = progress.answer.take() {
            // An answer that comes back means that the client has left; its future has counted that.
            drop(sender.send(answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(value: f32) -> SequenceRows {
        SequenceRows { pooled: vec![value], tokens: Vec::new() }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_last_sequence_sends_all_rows_in_order() {
        let (pending, mut receiver) = Pending::new(3, Want::Pooled, Instant::now());
        pending.complete(2, rows(2.0), 3 * MS, MS);
        pending.complete(0, rows(0.0), 6 * MS, MS);
        assert!(receiver.try_recv().is_err());
        pending.complete(1, rows(1.0), Duration::ZERO, 4 * MS);
        let reply = receiver.try_recv().unwrap().unwrap();
        assert_eq!(reply.rows, [rows(0.0), rows(1.0), rows(2.0)]);
        assert_eq!((reply.queue, reply.infer), (3 * MS, 2 * MS));
    }

    #[test]
    fn the_first_failure_is_the_answer() {
        let (pending, mut receiver) = Pending::new(2, Want::Pooled, Instant::now());
        pending.start();
        pending.expire(Instant::now());
        pending.fail(EngineError::WorkerDied);
        pending.complete(0, rows(0.0), MS, MS);
        pending.complete(1, rows(0.0), MS, MS);
        let answer = receiver.try_recv().unwrap();
        assert!(matches!(answer, Err(EngineError::DeadlineExceeded { stage: ExpiryStage::Infer, .. })));
    }

    #[test]
    fn a_submission_let_go_closes_the_channel() {
        let (pending, mut receiver) = Pending::new(1, Want::Pooled, Instant::now());
        drop(pending);
        assert_eq!(receiver.try_recv().unwrap_err(), oneshot::error::TryRecvError::Closed);
    }
}
