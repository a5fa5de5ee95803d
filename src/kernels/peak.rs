//! The limit that the arithmetic of this machine sets.

use std::time::{Duration, Instant};

use super::{Isa, arch};

/// Rounds between two looks at the clock.
const ROUNDS: u64 = 20_000;

/// INT8 multiply-accumulates per second that `n_threads` threads reach together in registers, without memory, over
/// `duration`; `None` if the instruction set has no INT8 multiply.
#[must_use]
pub fn measure(isa: Isa, duration: Duration, n_threads: usize) -> Option<f64> {
    let burn = || -> Option<f64> {
        arch::peak::burn(isa, ROUNDS)?;
        let started = Instant::now();
        let mut n_macs = 0;
        while started.elapsed() < duration {
            n_macs += arch::peak::burn(isa, ROUNDS)?;
        }
        Some(n_macs as f64 / started.elapsed().as_secs_f64())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(burn)).collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).sum()
    })
}
