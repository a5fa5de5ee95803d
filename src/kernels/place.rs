//! Where a helper runs: not on the processor of the thread that it helps.
//!
//! A scheduler likes to wake a thread where its waker runs, because their caches are shared; but a waker that computes
//! never gives way, and the helper would sit behind it until the loop is over (seen: 16 tokens took 4.0 ms instead of
//! 2.0 for the first second of every run on two cores). Binding threads to processors for good would be worse where several
//! processes share a machine, each with a part of its time. So a helper may run wherever the process may, with the
//! exception of one processor, and is told again only when that one changes. Where the process may run is asked at that time:
//! an orchestrator can change it at any time.

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
    /// The helper's thread.
    #[cfg(target_os = "linux")]
    thread: OnceLock<Pid>,
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
        let thread = gettid();
        #[cfg(not(target_os = "linux"))]
        let thread = ();
        // Set once: there is one thread.
        let _known = self.thread.set(thread);
    }

    /// Lets the helper run wherever the calling thread may but on `processor`. Best effort: a refusal only costs speed.
    pub(super) fn keep_off(&self, processor: usize) {
        #[cfg(target_os = "linux")]
        if let Some(thread) = self.thread.get()
            && self.avoided.swap(processor, Relaxed) != processor
            && let Ok(mut elsewhere) = sched_getaffinity(None)
        {
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
    fn a_helper_is_kept_off_one_processor_at_a_time_of_those_that_the_process_has_now() {
        let place = Place::default();
        place.keep_off(0); // Before it is known: nothing happens.
        let all = sched_getaffinity(None).unwrap();
        let (settled, ready) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let place = &place;
            scope.spawn(move || {
                place.settle();
                settled.send(gettid()).unwrap();
                let _over = ended.recv();
            });
            let helper = ready.recv().unwrap();
            let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&processor| all.is_set(processor)).collect();
            for &processor in &processors {
                place.keep_off(processor);
                let now = sched_getaffinity(Some(helper)).unwrap();
                if all.count() > 1 {
                    assert!(!now.is_set(processor) && now.count() == all.count() - 1);
                } else {
                    assert_eq!(now, all);
                }
            }
            place.keep_off(NOWHERE);
            assert_eq!(sched_getaffinity(Some(helper)).unwrap(), all);
            // The process (here: the thread that is helped) has fewer now.
            let mut fewer = all;
            if all.count() > 1 {
                fewer.unset(processors[0]);
            }
            sched_setaffinity(None, &fewer).unwrap();
            place.keep_off(CpuSet::MAX_CPU);
            assert_eq!(sched_getaffinity(Some(helper)).unwrap(), fewer);
            sched_setaffinity(None, &all).unwrap();
            drop(end);
        });
    }
}
