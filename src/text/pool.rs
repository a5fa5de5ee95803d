//! Threads for the tokenizer: a long text takes milliseconds, and the async reactor must not wait for it.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use super::{PoolError, TextError, Tokenizer};

type Job = Box<dyn FnOnce(&Tokenizer) + Send>;

/// Named threads with one bounded queue, first in, first out. The threads end when the pool is dropped, after what
/// waits by then.
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    tokenizer: Arc<Tokenizer>,
    state: Mutex<State>,
    work: Condvar,
    /// Jobs that may wait: those of clients that have left count until a thread has looked at them, so that memory is
    /// bounded whatever clients do.
    max_waiting: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    stopped: bool,
}

/// Tells a job whether its result is still of use.
pub struct Wanted<'a>(&'a dyn Fn() -> bool);

impl Wanted<'_> {
    /// Whether somebody waits for the result.
    #[must_use]
    pub fn now(&self) -> bool {
        (self.0)()
    }

    /// For work done on the spot: always wanted.
    pub const ALWAYS: Wanted<'static> = Wanted(&|| true);
}

impl fmt::Debug for Wanted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Wanted").field(&self.now()).finish()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("tokenizer", &self.shared.tokenizer).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `n_threads` threads.
    ///
    /// # Errors
    /// [`TextError::Thread`] if the system gives none.
    pub fn start(tokenizer: Arc<Tokenizer>, n_threads: NonZeroUsize, max_waiting: usize) -> Result<Self, TextError> {
        let pool =
            Self { shared: Arc::new(Shared { tokenizer, state: Mutex::default(), work: Condvar::new(), max_waiting }) };
        for index in 0..n_threads.get() {
            let shared = Arc::clone(&pool.shared);
            thread::Builder::new()
                .name(format!("tokenizer-{index}"))
                .spawn(move || shared.serve())
                .map_err(TextError::Thread)?;
        }
        Ok(pool)
    }

    /// The tokenizer, for work short enough to be done on the spot.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.tokenizer
    }

    /// Runs `job` on one of the threads. If the future is dropped before a thread comes to it, the job is not run; a
    /// running job can ask whether it is still [`Wanted`].
    ///
    /// # Errors
    /// [`PoolError`] if too many jobs wait, or this one panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Tokenizer, &Wanted<'_>) -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |tokenizer| {
            if answer.is_closed() {
                return;
            }
            let result = catch_unwind(AssertUnwindSafe(|| job(tokenizer, &Wanted(&|| !answer.is_closed()))));
            // Fails if nobody waits any more, which is as well.
            if let Ok(result) = result {
                answer.send(result).ok();
            }
        });
        {
            let mut state = self.shared.state();
            if state.jobs.len() >= self.shared.max_waiting {
                return Err(PoolError::Full { limit: self.shared.max_waiting });
            }
            state.jobs.push_back(job);
        }
        self.shared.work.notify_one();
        answered.await.map_err(|_| PoolError::Panicked)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().stopped = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    /// Nothing under the lock can panic half-way.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        while let Some(job) = self.next() {
            job(&self.tokenizer);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.stopped {
                return None;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    fn pool(n_threads: usize, max_waiting: usize) -> Pool {
        let json = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":null,"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"tree":0,"?":1},"unk_token":"?"}}"#;
        let tokenizer = Arc::new(Tokenizer::from_bytes(json).unwrap());
        Pool::start(tokenizer, NonZeroUsize::new(n_threads).unwrap(), max_waiting).unwrap()
    }

    #[tokio::test]
    async fn runs_jobs_on_its_own_named_threads() {
        let pool = pool(2, 8);
        let (ids, thread) = pool
            .run(|tokenizer, _| (tokenizer.encode("tree", false).unwrap(), thread::current().name().map(str::to_owned)))
            .await
            .unwrap();
        assert_eq!(ids, [0]);
        assert!(thread.unwrap().starts_with("tokenizer-"));
    }

    #[tokio::test]
    async fn a_panic_fails_its_job_alone() {
        let pool = pool(1, 8);
        let panicked = pool.run(|_, _| -> u32 { panic!("as the test asks") }).await;
        assert_eq!(panicked, Err(PoolError::Panicked));
        assert_eq!(pool.run(|_, _| 7).await, Ok(7));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn is_bounded_and_skips_what_nobody_waits_for() {
        let pool = Arc::new(pool(1, 2));
        let (started, has_started) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let ran = Arc::new(AtomicUsize::new(0));
        let blocker = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move {
                pool.run(move |_, wanted| {
                    started.send(()).unwrap();
                    released.recv().unwrap();
                    wanted.now()
                })
                .await
            }
        });
        tokio::task::spawn_blocking(move || has_started.recv().unwrap()).await.unwrap();
        // One that will be left alone, one that stays.
        let mut waiting = Vec::new();
        for _ in 0..2 {
            let (pool, ran) = (Arc::clone(&pool), Arc::clone(&ran));
            waiting.push(tokio::spawn(async move { pool.run(move |_, _| ran.fetch_add(1, Ordering::SeqCst)).await }));
        }
        while pool.shared.state().jobs.len() < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.run(|_, _| ()).await, Err(PoolError::Full { limit: 2 }));
        waiting[0].abort();
        assert!((&mut waiting[0]).await.unwrap_err().is_cancelled());
        blocker.abort();
        assert!(blocker.await.unwrap_err().is_cancelled());
        release.send(()).unwrap();
        assert_eq!(waiting.pop().unwrap().await.unwrap(), Ok(0));
        assert_eq!(ran.load(Ordering::SeqCst), 1, "the job of the client that left was not run");
    }
}
