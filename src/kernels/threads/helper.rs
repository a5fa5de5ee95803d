//! One helper thread, and the states that it and the player that has claimed it move it through.
//!
//! ```text
//!         claim           assign             (helper) start      (helper) finish
//! IDLE   ──────▶ READY  ─────────▶ ASSIGNED ──────────────▶ RUNNING ─────▶ READY
//! PARKED ──────▶ ASLEEP ─────────▶ ASSIGNED    take back ─▶ READY
//!
//! dismiss: READY ─▶ IDLE, ASLEEP ─▶ PARKED     (helper) tired: IDLE ─▶ PARKED, READY ─▶ ASLEEP
//! ```
//!
//! A loop's way to a helper and back costs a transfer of a cache line between two cores for every line that both write to in
//! turn. So a player keeps the helpers that it has claimed from loop to loop, state and task share one line, and a loop
//! that has a part for each thread touches no other.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::super::place::{self, Place};
use super::MAX_TEAM;
use super::pace::Pace;

/// How long a helper that is nobody's spins before it parks.
const SPIN: Duration = Duration::from_micros(60);
/// The same for one that a player has claimed: its next loop comes when the slowest thread is done with this one. Beyond
/// `SPIN` it gives way between looks, in case that thread is waiting for this one's processor.
const CLAIMED_SPIN: Duration = Duration::from_micros(400);
/// Looks at a helper that is inside its last part before giving way, in case that it waits for this processor.
const PATIENT_LOOKS: u32 = 2_000;

/// Nobody's, and spinning.
const IDLE: u8 = 0;
/// Nobody's, and parked or about to.
const PARKED: u8 = 1;
/// A player's, and spinning.
const READY: u8 = 2;
/// A player's, and parked or about to.
const ASLEEP: u8 = 3;
/// It has a task that it has not seen.
const ASSIGNED: u8 = 4;
const RUNNING: u8 = 5;

type Body = dyn Fn(usize, usize) + Sync;

/// What the threads of a loop share; lives on the stack of the one that runs it.
pub(super) struct Job {
    /// By thread, how many parts of its run were taken beside the first.
    taken: [AtomicUsize; MAX_TEAM + 1],
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job {
    pub(super) fn new() -> Self {
        Self { taken: [const { AtomicUsize::new(0) }; MAX_TEAM + 1], panic: Mutex::new(None) }
    }

    /// The last panic of a helper.
    pub(super) fn into_panic(self) -> Option<Box<dyn Any + Send>> {
        self.panic.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's share of a loop: its run of parts, the first of which nobody else takes, and of other runs what is left.
#[derive(Clone, Copy)]
pub(super) struct Task {
    body: *const Body,
    job: *const Job,
    lane: usize,
    /// The thread's number in the loop.
    thread: usize,
    n_threads: usize,
    n_parts: usize,
}

/// The run of parts of a thread: parts that follow each other stay with a thread from loop to loop, and so does what they read and
/// write in its caches.
pub(super) fn run_of(thread: usize, n_threads: usize, n_parts: usize) -> Range<usize> {
    thread * n_parts / n_threads..(thread + 1) * n_parts / n_threads
}

impl Task {
    /// The tasks of a loop by lane and the thread's number in it. They hold addresses, not borrows: see [`Task::work`].
    pub(super) fn of(
        body: &(dyn Fn(usize, usize) + Sync),
        job: &Job,
        n_threads: usize,
        n_parts: usize,
    ) -> impl Fn(usize, usize) -> Self + use<> {
        // SAFETY: only the lifetime is erased; who works on a task vouches for it.
        let body: *const Body = unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), _>(body) };
        let job = std::ptr::from_ref(job);
        move |lane, thread| Self { body, job, lane, thread, n_threads, n_parts }
    }

    /// Runs the first of its own parts, then takes parts until none is left, others' last.
    ///
    /// # Safety
    /// The closure and the job that it was made of must be alive.
    pub(super) unsafe fn work(self) {
        let Self { lane, thread, n_threads, n_parts, .. } = self;
        // SAFETY: alive by this function's contract.
        let (body, job) = unsafe { (&*self.body, &*self.job) };
        body(lane, run_of(thread, n_threads, n_parts).start);
        if n_parts == n_threads {
            return;
        }
        for of in (thread..n_threads).chain(0..thread) {
            let run = run_of(of, n_threads, n_parts);
            loop {
                let part = run.start + 1 + job.taken[of].fetch_add(1, Relaxed);
                if part >= run.end {
                    break;
                }
                body(lane, part);
            }
        }
    }
}

/// A thread that takes part in other threads' loops.
pub(super) struct Helper {
    line: Line,
    thread: OnceLock<Thread>,
    place: Place,
    pub(super) pace: Pace,
}

/// What the helper and its player write to. (Processors fetch lines in pairs.)
#[repr(align(128))]
struct Line {
    state: AtomicU8,
    /// Nanoseconds that its last task took.
    took: AtomicU32,
    task: UnsafeCell<Option<Task>>,
}

// SAFETY: the task is written only by the player that has claimed the helper, in states in which the helper does not read it, and
// read by the helper only while it is `RUNNING`; the changes of state order the two. What a task points to may be used by any
// thread (`Body` is `Sync`, `Job` is made of atomics and a lock of something that is `Send`).
unsafe impl Sync for Helper {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Helper {}

impl Helper {
    pub(super) fn new() -> Self {
        let line = Line { state: AtomicU8::new(IDLE), took: AtomicU32::new(0), task: UnsafeCell::new(None) };
        Self { line, thread: OnceLock::new(), place: Place::default(), pace: Pace::default() }
    }

    /// Tells it the handle of its own thread, once, before anybody claims it.
    pub(super) fn belongs_to(&self, thread: &Thread) {
        let known = self.thread.set(thread.clone());
        debug_assert!(known.is_ok());
    }

    pub(super) fn unpark(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Moves from one of two states to the one beside it; false if it is in neither.
    fn exchange(&self, moves: [(u8, u8); 2]) -> bool {
        let mut seen = self.line.state.load(Relaxed);
        while let Some(&(_, to)) = moves.iter().find(|&&(from, _)| from == seen) {
            match self.line.state.compare_exchange(seen, to, SeqCst, Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Makes it the caller's if it is nobody's.
    pub(super) fn claim(&self) -> bool {
        let claimed = self.exchange([(IDLE, READY), (PARKED, ASLEEP)]);
        if claimed {
            self.place.keep_off(place::processor());
        }
        claimed
    }

    /// Makes it nobody's again. Only for the player that has claimed it, between loops.
    pub(super) fn dismiss(&self) {
        let dismissed = self.exchange([(READY, IDLE), (ASLEEP, PARKED)]);
        debug_assert!(dismissed, "a helper was dismissed inside a loop");
    }

    /// Gives it a task.
    ///
    /// # Safety
    /// Only for the player that has claimed it, between loops. What `task` is made of must be alive until [`Self::take_back`] has
    /// returned true or [`Self::wait`] has returned.
    pub(super) unsafe fn assign(&self, task: Task) {
        // SAFETY: the helper does not read it in the states of a claimed helper between loops.
        unsafe { *self.line.task.get() = Some(task) };
        if self.line.state.swap(ASSIGNED, SeqCst) == ASLEEP {
            self.place.keep_off(place::processor());
            self.unpark();
        }
    }

    /// Takes a task back that it has not begun.
    pub(super) fn take_back(&self) -> bool {
        self.line.state.load(Relaxed) == ASSIGNED
            && self.line.state.compare_exchange(ASSIGNED, READY, SeqCst, Relaxed).is_ok()
    }

    /// Waits for the end of a task that it has begun.
    pub(super) fn wait(&self) {
        let mut spins = 0u32;
        while self.line.state.load(Acquire) == RUNNING {
            // It is inside its last part; it may have lost its core to another process.
            if spins < PATIENT_LOOKS {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
            spins = spins.saturating_add(1);
        }
    }

    /// How long its last task took. To be asked for after [`Self::wait`].
    pub(super) fn took(&self) -> Duration {
        Duration::from_nanos(self.line.took.load(Relaxed).into())
    }

    /// Its thread's life. Without work it parks, at once where `is_crowded` says that spinning takes a core from those that
    /// compute.
    pub(super) fn live(&self, is_crowded: impl Fn() -> bool, is_stopping: impl Fn() -> bool) {
        self.place.settle();
        let state = &self.line.state;
        let mut idle_since = None;
        let mut spins = 0u32;
        loop {
            match state.load(Acquire) {
                ASSIGNED => {
                    if state.compare_exchange(ASSIGNED, RUNNING, SeqCst, Relaxed).is_ok() {
                        // SAFETY: in this state nobody writes it.
                        if let Some(task) = unsafe { *self.line.task.get() } {
                            let started = Instant::now();
                            // SAFETY: who has assigned it waits until the state is another one.
                            unsafe { run(task) };
                            let took = u32::try_from(started.elapsed().as_nanos()).unwrap_or(u32::MAX);
                            self.line.took.store(took, Relaxed);
                        }
                        state.store(READY, Release);
                        (idle_since, spins) = (None, 0);
                    }
                }
                seen @ (PARKED | ASLEEP) => {
                    if seen == PARKED && is_stopping() {
                        return;
                    }
                    thread::park();
                    (idle_since, spins) = (None, 0);
                }
                seen @ (IDLE | READY) => {
                    if seen == IDLE && is_stopping() {
                        return;
                    }
                    std::hint::spin_loop();
                    spins = spins.wrapping_add(1);
                    if spins.is_multiple_of(32) {
                        let since = *idle_since.get_or_insert_with(Instant::now);
                        let (patience, to) = if seen == IDLE { (SPIN, PARKED) } else { (CLAIMED_SPIN, ASLEEP) };
                        let waited = since.elapsed();
                        if waited > patience || seen == IDLE && is_crowded() {
                            // A failure means that it was claimed, dismissed or given work in the meantime.
                            let _raced = state.compare_exchange(seen, to, SeqCst, Relaxed);
                        } else if waited > SPIN {
                            thread::yield_now();
                        }
                    }
                }
                _ => std::hint::spin_loop(),
            }
        }
    }
}

/// Works on `task`; a panic is left in the job, and nobody takes further parts of a loop that failed.
///
/// # Safety
/// As for [`Task::work`].
unsafe fn run(task: Task) {
    // SAFETY: passed on unchanged.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| unsafe { task.work() })) {
        // SAFETY: alive, as above.
        let job = unsafe { &*task.job };
        job.taken.iter().for_each(|taken| taken.store(task.n_parts, Relaxed));
        *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}
