//! Where a helper runs: not on the processor of the thread that it helps.
//!
//! A scheduler likes to wake a thread where its waker runs, because their caches are shared; but a waker that computes
//! never gives way, and the helper would sit behind it until the loop is over (seen: 16 tokens took 4.0 ms instead of
//! 2.0 for the first second of every run on two cores). Binding threads to processors for good would be worse where several
//! processes share a machine, each with a part of its time. So a helper may run wherever the process may, with the
//! exception of one processor, and is told again only when that one changes.

use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

#[cfg(target_os = "linux")]
use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// No processor: what is not known is not avoided.
const NOWHERE: usize = usize::MAX;

/// The place of one helper.
#[derive(Debug)]
pub(super) struct Place {
    /// The helper's thread and where it was allowed to run when it started; nothing if the system does not say.
    #[cfg(target_os = "linux")]
    thread: OnceLock<Option<(Pid, CpuSet)>>,
    #[cfg(not(target_os = "linux"))]
    thread: OnceLock<()>,
    avoided: AtomicUsize,
}

impl Default for Place {
    fn default() -> Self {
        Self { thread: OnceLock::new(), avoided: AtomicUsize::new(NOWHERE) }
    }
}

/// The processor that this thread runs on.
#[cfg(target_os = "linux")]
pub(super) fn processor() -> usize {
    sched_getcpu()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn processor() -> usize {
    NOWHERE
}

impl Place {
    /// Called by the helper itself, once.
    pub(super) fn settle(&self) {
        #[cfg(target_os = "linux")]
        let thread = sched_getaffinity(None).ok().map(|allowed| (gettid(), allowed));
        #[cfg(not(target_os = "linux"))]
        let thread = ();
        // Set once: there is one thread.
        let _known = self.thread.set(thread);
    }

    /// Lets the helper run anywhere it may but on `processor`. Best effort: a refusal only costs speed.
    pub(super) fn keep_off(&self, processor: usize) {
        #[cfg(target_os = "linux")]
        if let Some(Some((thread, allowed))) = self.thread.get()
            && self.avoided.swap(processor, Relaxed) != processor
        {
            let mut elsewhere = *allowed;
            if processor < CpuSet::MAX_CPU {
                elsewhere.unset(processor);
            }
            if elsewhere.count() > 0 {
                let _refused = sched_setaffinity(Some(*thread), &elsewhere);
            }
        }
        #[cfg(not(target_os = "linux"))]
        self.avoided.store(processor, Relaxed);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_helper_is_kept_off_one_processor_at_a_time() {
        std::thread::spawn(|| {
            let place = Place::default();
            place.keep_off(0); // Before it is known: nothing happens.
            let all = sched_getaffinity(None).unwrap();
            place.settle();
            for processor in (0..CpuSet::MAX_CPU).filter(|&processor| all.is_set(processor)) {
                place.keep_off(processor);
                let now = sched_getaffinity(None).unwrap();
                if all.count() > 1 {
                    assert!(!now.is_set(processor) && now.count() == all.count() - 1);
                    assert_ne!(sched_getcpu(), processor);
                } else {
                    assert_eq!(now, all);
                }
            }
            place.keep_off(NOWHERE);
            assert_eq!(sched_getaffinity(None).unwrap(), all);
        })
        .join()
        .unwrap();
    }
}
