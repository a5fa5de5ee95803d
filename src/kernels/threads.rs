//! The right to compute: as many seats as computing threads, and helpers for whoever computes alone.
//!
//! ```text
//! permits = N                         one per computing thread
//! player:  enter() takes 1 permit (waits for it)      ... leave: gives it back
//! run(n):  takes up to min(n, N) − 1 spare permits, each with a helper thread that takes parts of this loop and of those
//!          that follow; all are given back when the player leaves, or as its next loop starts while somebody waits to enter
//! ```
//!
//! So a lone player uses every core, and with N players inside each computes on one core. Each thread has a run of parts that follow
//! each other, and takes of others' runs once its own is done; which thread takes a part is left to chance, so a part must never
//! depend on who computes it. Where a loop has one part for each thread, parts are as large as threads are fast (`Shares`).
//!
//! A helper spins for a while after a loop, because the loops of one forward follow each other within microseconds and waking a
//! parked thread costs some 40 µs, then parks. A loop never waits for a helper that has not started: the task is taken back. A
//! helper is kept off the processor of the thread that it helps (`Place`).
#![allow(unsafe_code, reason = "a loop's body is lent to other threads")]

use std::panic::resume_unwind;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

mod helper;
mod pace;
mod parts;

use self::helper::{Helper, Job, Task, run_of};
pub use self::pace::Shares;
pub use self::parts::{Cut, PanelRowParts, PanelRows, Parts, RowParts};

/// Helpers a single player can use.
const MAX_TEAM: usize = 63;
/// A shorter part says little about how fast its thread is.
const LEAST_WATCHED: Duration = Duration::from_micros(4);

/// The computing threads of the process.
pub struct Cores {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    n_cores: usize,
    permits: AtomicUsize,
    waiting: AtomicUsize,
    /// Players, and the helpers that they have claimed.
    computing: AtomicUsize,
    gate: Mutex<()>,
    opened: Condvar,
    helpers: Box<[Helper]>,
    stopping: AtomicBool,
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
        let shared = Arc::new(Shared {
            n_cores,
            permits: AtomicUsize::new(n_cores),
            waiting: AtomicUsize::new(0),
            computing: AtomicUsize::new(0),
            gate: Mutex::new(()),
            opened: Condvar::new(),
            helpers: (1..n_cores).map(|_| Helper::new()).collect(),
            stopping: AtomicBool::new(false),
        });
        let mut cores = Self { shared: Arc::clone(&shared), helpers: Vec::with_capacity(n_cores - 1) };
        for index in 0..n_cores - 1 {
            let shared = Arc::clone(&shared);
            let handle = thread::Builder::new().name(format!("core-{}", index + 1)).spawn(move || {
                let is_crowded = || shared.computing.load(SeqCst) >= shared.n_cores;
                shared.helpers[index].live(is_crowded, || shared.stopping.load(SeqCst));
            })?;
            cores.shared.helpers[index].belongs_to(handle.thread());
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
        Seat { cores: Arc::clone(self), team: [0; MAX_TEAM], n_team: 0 }
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.shared.stopping.store(true, SeqCst);
        for helper in &self.shared.helpers {
            helper.unpark();
        }
        for helper in self.helpers.drain(..) {
            // A helper catches the panics of what it runs, so it ends normally.
            drop(helper.join());
        }
    }
}

/// The right to compute on one core, and on more while they are free.
pub struct Seat {
    cores: Arc<Cores>,
    /// The helpers that this player has claimed, each with a permit; the first `n_team` count.
    team: [u16; MAX_TEAM],
    n_team: usize,
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").field("cores", &self.cores).field("n_team", &self.n_team).finish_non_exhaustive()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.dismiss();
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

    /// Runs `body(lane, part)` once for every `part < n_parts`, on this thread (lane 0) and on free helpers, each of which has
    /// a lane of its own from 1 on, whoever it helps: of all loops of all players, no two bodies run at once with the same
    /// lane but 0. Lanes are below [`Cores::n_cores`].
    ///
    /// # Panics
    /// If a body panics; the other parts may or may not have run.
    pub fn run(&mut self, n_parts: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        self.run_watching(n_parts, body, |_, _| {});
    }

    /// [`Self::run`]. If each thread had one part, `watch` is told how long this thread and every helper took, in order.
    fn run_watching(
        &mut self,
        n_parts: usize,
        body: &(dyn Fn(usize, usize) + Sync),
        watch: impl FnOnce(Duration, &mut dyn Iterator<Item = &Helper>),
    ) {
        let n_team = self.gather(n_parts.saturating_sub(1).min(MAX_TEAM));
        if n_team == 0 {
            (0..n_parts).for_each(|part| body(0, part));
            return;
        }
        let job = Job::new();
        let task = Task::of(body, &job, n_team + 1, n_parts);
        let team = Team { shared: &self.cores.shared, members: &self.team[..n_team] };
        for ((thread, helper), &index) in (1..).zip(team.helpers()).zip(team.members) {
            // SAFETY: `gather` has claimed it; `team` is dropped before body and job are, and has then waited or taken back.
            unsafe { helper.assign(task(usize::from(index) + 1, thread)) };
        }
        let started = Instant::now();
        // SAFETY: both are alive.
        unsafe { task(0, 0).work() };
        let took = started.elapsed();
        let mut have_all_begun = true;
        for (thread, helper) in (1..).zip(team.helpers()) {
            if helper.take_back() {
                have_all_begun = false;
                body(0, run_of(thread, n_team + 1, n_parts).start);
            }
        }
        drop(team);
        if let Some(panic) = job.into_panic() {
            resume_unwind(panic);
        }
        if have_all_begun && n_parts == n_team + 1 {
            let shared = &self.cores.shared;
            watch(took, &mut shared.members(&self.team[..n_team]));
        }
    }

    /// Hands every part of `parts` to `body(lane, index, part)` once.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "by reference, parts could be handed out again while the first ones live"
    )]
    pub fn for_each<'a, P: Parts<'a>>(&mut self, parts: P, body: impl Fn(usize, usize, P::Part) + Sync) {
        self.run(parts.n_parts(), &|lane, index| {
            // SAFETY: `run` hands out every index below `n_parts` once, and nobody else has `parts`, so no part is taken twice.
            let part = unsafe { parts.part(index) };
            body(lane, index, part);
        });
    }

    /// [`Self::for_each`] of parts whose work is in proportion to the rows of `cut`. Where each thread had one, it is learnt how fast
    /// they are.
    #[allow(clippy::needless_pass_by_value, reason = "as for `for_each`")]
    pub fn for_each_share<'a, P: Parts<'a>>(
        &mut self,
        cut: Cut<'_>,
        parts: P,
        body: impl Fn(usize, usize, P::Part) + Sync,
    ) {
        let run = |lane: usize, index: usize| {
            // SAFETY: as in `for_each`.
            let part = unsafe { parts.part(index) };
            body(lane, index, part);
        };
        self.run_watching(parts.n_parts(), &run, |took, helpers| {
            #[allow(clippy::cast_precision_loss, reason = "rows of a loop are far below 2^24")]
            let speed = |index: usize, took: Duration| cut.rows(index).len() as f32 / took.as_secs_f32();
            let own = speed(0, took);
            for (index, helper) in (1..).zip(helpers) {
                let took_both = took.min(helper.took());
                if took_both >= LEAST_WATCHED {
                    helper.pace.learn(speed(index, helper.took()) / own);
                }
            }
        });
    }

    /// Cuts `n_rows` rows for the loop that follows: where every thread can have one part of at most `block` rows, by how fast the
    /// threads are, none above `most`; else in even blocks. A part's rows are a multiple of `grain` if that can be.
    ///
    /// # Panics
    /// If `block` is 0 or above `most`.
    pub fn shares(&mut self, n_rows: usize, block: usize, most: usize, grain: usize) -> Shares {
        assert!((1..=most).contains(&block), "blocks of {block} rows, at most {most}");
        let n_threads = 1 + self.gather(n_rows.min(self.n_cores()).min(MAX_TEAM + 1).saturating_sub(1));
        if n_threads == 1 || n_rows < n_threads * grain || n_rows > n_threads * block {
            return Shares::even(n_rows, block, self.n_cores());
        }
        let mut paces = [1.0; MAX_TEAM + 1];
        for (pace, helper) in paces[1..].iter_mut().zip(self.cores.shared.members(&self.team[..n_threads - 1])) {
            *pace = helper.pace.get();
        }
        Shares::by_pace(n_rows, most, grain, &paces[..n_threads])
    }

    /// Claims helpers until there are `wanted`, if so many are free; none while somebody waits to enter. Returns how many of
    /// them there are.
    fn gather(&mut self, wanted: usize) -> usize {
        if self.cores.shared.waiting.load(SeqCst) > 0 {
            self.dismiss();
            return 0;
        }
        if self.n_team < wanted {
            let shared = &*self.cores.shared;
            let mut spare = shared.try_take(wanted - self.n_team);
            for (index, helper) in (0..).zip(&shared.helpers) {
                if spare == 0 {
                    break;
                }
                if helper.claim() {
                    self.team[self.n_team] = index;
                    self.n_team += 1;
                    spare -= 1;
                    shared.computing.fetch_add(1, SeqCst);
                }
            }
            if spare > 0 {
                shared.release(spare);
            }
        }
        wanted.min(self.n_team)
    }

    /// Gives all helpers and their permits back.
    fn dismiss(&mut self) {
        if self.n_team > 0 {
            let shared = &*self.cores.shared;
            for helper in shared.members(&self.team[..self.n_team]) {
                helper.dismiss();
            }
            shared.computing.fetch_sub(self.n_team, SeqCst);
            shared.release(self.n_team);
            self.n_team = 0;
        }
    }
}

/// The helpers of one loop. Dropping waits for those that started and takes the task back from the others.
struct Team<'a> {
    shared: &'a Shared,
    members: &'a [u16],
}

impl Team<'_> {
    fn helpers(&self) -> impl Iterator<Item = &Helper> {
        self.shared.members(self.members)
    }
}

impl Drop for Team<'_> {
    fn drop(&mut self) {
        for helper in self.helpers() {
            if !helper.take_back() {
                helper.wait();
            }
        }
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

    fn members(&self, team: &[u16]) -> impl Iterator<Item = &Helper> {
        team.iter().map(|&index| &self.helpers[usize::from(index)])
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
}

#[cfg(test)]
#[path = "threads/tests.rs"]
mod tests;
