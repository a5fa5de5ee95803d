//! The right to compute: as many seats as computing threads, and helpers for whoever computes alone.
//!
//! ```text
//! permits = N                         one per computing thread
//! player:  enter() takes 1 permit (waits for it)      ... leave: gives it back
//! run(n):  takes up to min(n, N) − 1 spare permits, if nobody waits to enter; each lets one helper thread take parts
//!          of this loop; all are given back when the loop ends
//! ```
//!
//! So a lone player uses every core, and with N players inside each computes on one core. Parts are handed out by a
//! counter; which thread takes a part is left to chance, so a part must never depend on who computes it.
//!
//! A helper spins for `SPIN` after a loop, because the loops of one forward follow each other within microseconds
//! and waking a parked thread costs some 40 µs, then parks. A loop never waits for a helper that has not started: the
//! assignment is taken back. A helper is kept off the processor of the thread that it helps (`Place`).
#![allow(unsafe_code, reason = "a loop's body is lent to other threads")]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::place::{self, Place};

mod parts;

pub use self::parts::{Cut, PanelRowParts, PanelRows, Parts, RowParts};

/// How long a helper without work spins before it parks.
const SPIN: Duration = Duration::from_micros(60);
/// Helpers a single loop can use.
const MAX_TEAM: usize = 63;

/// State of a helper: a tag in the low bits, a generation above, so that a state seen twice is the same assignment.
const IDLE: u64 = 0;
const PARKED: u64 = 1;
const CLAIMED: u64 = 2;
const ASSIGNED: u64 = 3;
const RUNNING: u64 = 4;
const TAG: u64 = 7;
const GENERATION: u64 = 8;

/// The computing threads of the process.
pub struct Cores {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    n_cores: usize,
    permits: AtomicUsize,
    waiting: AtomicUsize,
    /// Threads that compute now: players, and helpers inside a loop.
    computing: AtomicUsize,
    gate: Mutex<()>,
    opened: Condvar,
    helpers: Box<[Helper]>,
    stopping: AtomicBool,
}

struct Helper {
    state: AtomicU64,
    job: AtomicPtr<Job>,
    lane: AtomicUsize,
    thread: OnceLock<Thread>,
    place: Place,
}

/// One parallel loop; lives on the stack of the thread that runs it.
struct Job {
    body: *const (dyn Fn(usize, usize) + Sync),
    n_parts: usize,
    next: AtomicUsize,
    /// Helpers that may still touch this job.
    pending: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl std::fmt::Debug for Cores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cores").field("n_cores", &self.shared.n_cores).finish_non_exhaustive()
    }
}

impl Cores {
    /// `n_cores` computing threads: the callers that enter, and `n_cores − 1` helpers started here.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(n_cores: usize) -> std::io::Result<Self> {
        let n_cores = n_cores.max(1);
        let helpers = (1..n_cores).map(|_| Helper {
            state: AtomicU64::new(IDLE),
            job: AtomicPtr::new(std::ptr::null_mut()),
            lane: AtomicUsize::new(0),
            thread: OnceLock::new(),
            place: Place::default(),
        });
        let shared = Arc::new(Shared {
            n_cores,
            permits: AtomicUsize::new(n_cores),
            waiting: AtomicUsize::new(0),
            computing: AtomicUsize::new(0),
            gate: Mutex::new(()),
            opened: Condvar::new(),
            helpers: helpers.collect(),
            stopping: AtomicBool::new(false),
        });
        let mut cores = Self { shared: Arc::clone(&shared), helpers: Vec::with_capacity(n_cores - 1) };
        for index in 0..n_cores - 1 {
            let shared = Arc::clone(&shared);
            let handle =
                thread::Builder::new().name(format!("core-{}", index + 1)).spawn(move || shared.help(index))?;
            // A helper is only claimed once its handle is known.
            let known = cores.shared.helpers[index].thread.set(handle.thread().clone());
            debug_assert!(known.is_ok());
            cores.helpers.push(handle);
        }
        Ok(cores)
    }

    /// Number of computing threads; a loop's lanes are below it.
    #[must_use]
    pub fn n_cores(&self) -> usize {
        self.shared.n_cores
    }

    /// Takes a seat, waiting while all are taken.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Seat {
        self.shared.enter();
        self.shared.computing.fetch_add(1, SeqCst);
        Seat { cores: Arc::clone(self) }
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.shared.stopping.store(true, SeqCst);
        for helper in &self.helpers {
            helper.thread().unpark();
        }
        for helper in self.helpers.drain(..) {
            // A helper catches the panics of what it runs, so it ends normally.
            drop(helper.join());
        }
    }
}

/// The right to compute on one core, and on more while they are free.
#[derive(Debug)]
pub struct Seat {
    cores: Arc<Cores>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.cores.shared.computing.fetch_sub(1, SeqCst);
        self.cores.shared.release(1);
    }
}

impl Seat {
    /// Number of computing threads of the pool that this seat belongs to.
    #[must_use]
    pub fn n_cores(&self) -> usize {
        self.cores.shared.n_cores
    }

    /// Runs `body(lane, part)` once for every `part < n_parts`, on this thread (lane 0) and on free helpers. No two
    /// bodies run at once with the same lane; lanes are below [`Cores::n_cores`].
    ///
    /// # Panics
    /// If a body panics; the other parts may or may not have run.
    pub fn run(&self, n_parts: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        let shared = &*self.cores.shared;
        let wanted = n_parts.saturating_sub(1).min(shared.helpers.len()).min(MAX_TEAM);
        let spare = if wanted == 0 { 0 } else { shared.take_spare(wanted) };
        if spare == 0 {
            (0..n_parts).for_each(|part| body(0, part));
            return;
        }
        // SAFETY: only the lifetime is erased; the job does not outlive this call, because `Team` waits for every
        // helper that holds it before it is dropped.
        let body: *const (dyn Fn(usize, usize) + Sync) =
            unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), _>(body) };
        let job =
            Job { body, n_parts, next: AtomicUsize::new(0), pending: AtomicUsize::new(0), panic: Mutex::new(None) };
        let team = Team::gather(shared, &job, spare);
        // SAFETY: the job's body is alive: this is its own stack frame.
        unsafe { job.work(0) };
        drop(team);
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }

    /// Hands every part of `parts` to `body(lane, index, part)` once.
    pub fn for_each<'a, P: Parts<'a>>(&self, parts: &P, body: impl Fn(usize, usize, P::Part) + Sync) {
        self.run(parts.n_parts(), &|lane, index| {
            // SAFETY: `run` hands out every index below `n_parts` once, so no part is taken twice.
            let part = unsafe { parts.part(index) };
            body(lane, index, part);
        });
    }
}

impl Job {
    /// Takes parts until none is left.
    ///
    /// # Safety
    /// The closure that `body` points to must be alive.
    unsafe fn work(&self, lane: usize) {
        // SAFETY: alive by this function's contract.
        let body = unsafe { &*self.body };
        loop {
            let part = self.next.fetch_add(1, SeqCst);
            if part >= self.n_parts {
                return;
            }
            body(lane, part);
        }
    }
}

/// The helpers of one loop. Dropping waits for those that started and takes the assignment back from the others.
struct Team<'a> {
    shared: &'a Shared,
    job: &'a Job,
    permits: usize,
    assigned: [(usize, u64); MAX_TEAM],
    n_assigned: usize,
}

impl<'a> Team<'a> {
    fn gather(shared: &'a Shared, job: &'a Job, permits: usize) -> Self {
        let mut team = Self { shared, job, permits, assigned: [(0, 0); MAX_TEAM], n_assigned: 0 };
        let here = place::processor();
        for (index, helper) in shared.helpers.iter().enumerate() {
            if team.n_assigned == permits {
                break;
            }
            let seen = helper.state.load(SeqCst);
            let claimed = seen & !TAG | CLAIMED;
            if !matches!(seen & TAG, IDLE | PARKED)
                || helper.state.compare_exchange(seen, claimed, SeqCst, SeqCst).is_err()
            {
                continue;
            }
            helper.place.keep_off(here);
            job.pending.fetch_add(1, SeqCst);
            helper.job.store(std::ptr::from_ref(job).cast_mut(), SeqCst);
            helper.lane.store(team.n_assigned + 1, SeqCst);
            let assigned = (seen & !TAG).wrapping_add(GENERATION) | ASSIGNED;
            helper.state.store(assigned, SeqCst);
            team.assigned[team.n_assigned] = (index, assigned);
            team.n_assigned += 1;
            if seen & TAG == PARKED
                && let Some(thread) = helper.thread.get()
            {
                thread.unpark();
            }
        }
        team
    }
}

impl Drop for Team<'_> {
    fn drop(&mut self) {
        for &(index, assigned) in &self.assigned[..self.n_assigned] {
            let idle = assigned & !TAG | IDLE;
            if self.shared.helpers[index].state.compare_exchange(assigned, idle, SeqCst, SeqCst).is_ok() {
                self.job.pending.fetch_sub(1, SeqCst);
            }
        }
        let mut spins = 0u32;
        while self.job.pending.load(SeqCst) != 0 {
            // The helper is inside its last part; it may have lost its core to another process.
            if spins < 20_000 {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
            spins = spins.saturating_add(1);
        }
        self.shared.release(self.permits);
    }
}

impl Shared {
    fn try_take(&self, at_most: usize) -> usize {
        let mut free = self.permits.load(SeqCst);
        loop {
            let taken = free.min(at_most);
            if taken == 0 {
                return 0;
            }
            match self.permits.compare_exchange_weak(free, free - taken, SeqCst, SeqCst) {
                Ok(_) => return taken,
                Err(now) => free = now,
            }
        }
    }

    fn take_spare(&self, at_most: usize) -> usize {
        if self.waiting.load(SeqCst) > 0 { 0 } else { self.try_take(at_most) }
    }

    fn enter(&self) {
        // Whoever comes while others wait queues up behind them.
        if self.waiting.load(SeqCst) == 0 && self.try_take(1) == 1 {
            return;
        }
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_add(1, SeqCst);
        while self.try_take(1) == 0 {
            // `release` adds permits, then looks at `waiting`, then takes the gate to notify: either this thread saw the
            // permits above, or it waits here before the notification is sent.
            gate = self.opened.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.waiting.fetch_sub(1, SeqCst);
    }

    fn release(&self, permits: usize) {
        self.permits.fetch_add(permits, SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
            if permits == 1 {
                self.opened.notify_one();
            } else {
                self.opened.notify_all();
            }
        }
    }

    /// The life of helper `index`.
    fn help(&self, index: usize) {
        let helper = &self.helpers[index];
        helper.place.settle();
        let mut idle_since = Instant::now();
        let mut spins = 0u32;
        loop {
            let state = helper.state.load(SeqCst);
            match state & TAG {
                ASSIGNED => {
                    let running = state & !TAG | RUNNING;
                    if helper.state.compare_exchange(state, running, SeqCst, SeqCst).is_ok() {
                        self.computing.fetch_add(1, SeqCst);
                        let job = helper.job.load(SeqCst);
                        let lane = helper.lane.load(SeqCst);
                        // SAFETY: the job is alive, because its owner counted this helper in `pending` and could not
                        // take the assignment back; it waits until `pending` is 0, which is the last thing done here.
                        unsafe {
                            let result = catch_unwind(AssertUnwindSafe(|| (*job).work(lane)));
                            if let Err(panic) = result {
                                // Nobody takes further parts of a loop that failed.
                                (*job).next.store((*job).n_parts, SeqCst);
                                *(*job).panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                            }
                            self.computing.fetch_sub(1, SeqCst);
                            helper.state.store(state & !TAG | IDLE, SeqCst);
                            (*job).pending.fetch_sub(1, SeqCst);
                        }
                        idle_since = Instant::now();
                    }
                }
                PARKED => {
                    if self.stopping.load(SeqCst) {
                        return;
                    }
                    thread::park();
                    idle_since = Instant::now();
                }
                IDLE => {
                    if self.stopping.load(SeqCst) {
                        return;
                    }
                    std::hint::spin_loop();
                    spins = spins.wrapping_add(1);
                    // When every core computes, spinning would take one from them. (Spare permits do not tell: a loop keeps
                    // those of helpers that have finished until its last part has, and is then followed by another loop.)
                    let tired = spins.is_multiple_of(32)
                        && (self.computing.load(SeqCst) >= self.n_cores || idle_since.elapsed() > SPIN);
                    if tired {
                        let parked = state & !TAG | PARKED;
                        // A failure means work was assigned in the meantime.
                        let _raced = helper.state.compare_exchange(state, parked, SeqCst, SeqCst);
                    }
                }
                _ => std::hint::spin_loop(),
            }
        }
    }
}

#[cfg(test)]
#[path = "threads/tests.rs"]
mod tests;
