//! What the threads of a loop write to: a lane of the player's own, and one for each helper, which the workers of a model
//! share, as a helper works for one of them at a time. (Lanes for all threads in every worker would take memory with the
//! square of the threads.)

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::attend::scratch_bytes;
use super::factors::Middle;
use super::{BLOCK_ROWS, WorkspaceLimits};
use crate::exec::int8_tables::Gather;
use crate::exec::workspace::Aligned;
use crate::kernels::KernelSet;
use crate::kernels::threads::Cores;

/// What one thread of a loop writes to.
#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) block: Aligned,
    pub(super) scratch: Aligned,
    pub(super) middle: Middle,
    pub(super) gather: Gather,
}

/// Bytes of a lane's block and scratch as they are made; longer sequences make them grow.
#[derive(Debug, Clone, Copy)]
struct LaneBytes {
    block: usize,
    scratch: usize,
}

/// The lanes of one worker, by the number of the thread.
#[derive(Debug)]
pub(super) struct Lanes {
    own: Mutex<Lane>,
    helpers: Arc<[Mutex<Lane>]>,
    /// Whether it is this worker that counts the helpers' bytes.
    counts_helpers: bool,
    bytes: LaneBytes,
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    // What a thread that panicked has left there is overwritten before it is read.
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    fn new(kernels: &KernelSet, bytes: LaneBytes, limits: &WorkspaceLimits) -> Self {
        Self {
            block: Aligned::with_bytes(bytes.block),
            scratch: Aligned::with_bytes(bytes.scratch),
            middle: Middle::new(kernels, BLOCK_ROWS, limits.rank, limits.widest()),
            gather: if limits.rank == 0 {
                Gather::default()
            } else {
                Gather::new(BLOCK_ROWS, limits.rank, limits.d_model)
            },
        }
    }

    fn bytes(&self) -> usize {
        self.block.bytes() + self.scratch.bytes() + self.middle.bytes() + self.gather.bytes()
    }
}

impl Lanes {
    /// Lanes of a first worker, for the threads of `cores`.
    pub(super) fn new(kernels: &KernelSet, cores: &Cores, limits: &WorkspaceLimits) -> Self {
        let bytes = LaneBytes { block: BLOCK_ROWS * limits.widest() * 4, scratch: scratch_bytes(kernels, limits) };
        let lane = || Mutex::new(Lane::new(kernels, bytes, limits));
        Self { own: lane(), helpers: (1..cores.n_cores()).map(|_| lane()).collect(), counts_helpers: true, bytes }
    }

    /// Lanes of another worker on the same threads.
    pub(super) fn another(&self, kernels: &KernelSet, limits: &WorkspaceLimits) -> Self {
        let own = Mutex::new(Lane::new(kernels, self.bytes, limits));
        Self { own, helpers: Arc::clone(&self.helpers), counts_helpers: false, bytes: self.bytes }
    }

    /// The lane of thread `lane`, which is nobody else's during a loop.
    pub(super) fn of(&self, lane: usize) -> MutexGuard<'_, Lane> {
        lock(if lane == 0 { &self.own } else { &self.helpers[lane - 1] })
    }

    /// Bytes of all lanes, those that are shared in one of the workers alone.
    pub(super) fn bytes(&self) -> usize {
        let shared = self.helpers.iter().filter(|_| self.counts_helpers).map(|lane| lock(lane).bytes());
        lock(&self.own).bytes() + shared.sum::<usize>()
    }

    /// Gives back what long sequences have needed.
    pub(super) fn shrink(&self) {
        for mut lane in std::iter::once(&self.own).chain(&*self.helpers).map(lock) {
            lane.block.shrink_to(self.bytes.block);
            lane.scratch.shrink_to(self.bytes.scratch);
        }
    }
}
