//! How fast the threads of a loop are beside each other, and parts that are as large as they are fast.
//!
//! A virtual processor shares its core with others, which take up to half of its speed for milliseconds or for minutes. A loop that
//! has one part for each thread ends when the slowest does, so such parts are cut by what the threads did before.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::{Cut, MAX_TEAM};

/// A thread is never taken to be slower or faster than another one by more than this.
const MOST: f32 = 2.0;
/// Share of a loop in what is known: one that was disturbed shall not count for much.
const NEW: f32 = 0.25;

/// A helper's rows per time, those of the player that it helps being 1.
pub(super) struct Pace(AtomicU32);

impl Default for Pace {
    fn default() -> Self {
        Self(AtomicU32::new(1f32.to_bits()))
    }
}

impl Pace {
    pub(super) fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Relaxed))
    }

    /// Takes a loop into account, in which it was `seen`. (Only the player that has claimed the helper calls this.)
    pub(super) fn learn(&self, seen: f32) {
        let pace = self.get();
        self.0.store((pace + NEW * (seen.clamp(1.0 / MOST, MOST) - pace)).to_bits(), Relaxed);
    }
}

/// Rows cut for the threads of a loop.
#[derive(Debug, Clone)]
pub struct Shares {
    n_rows: usize,
    /// Rows of a block, where blocks have the same size, whoever takes them; else each thread has a part.
    block: Option<usize>,
    n_threads: usize,
    /// Of the part of thread `i`: `bounds[i]..bounds[i + 1]`.
    bounds: [usize; MAX_TEAM + 2],
}

impl Shares {
    /// Blocks of at most `block` rows, evenly many for each of `n_threads`.
    pub(super) fn even(n_rows: usize, block: usize, n_threads: usize) -> Self {
        let rounds = n_rows.div_ceil(block * n_threads).max(1);
        let block = n_rows.div_ceil(rounds * n_threads).max(1);
        Self { n_rows, block: Some(block), n_threads, bounds: [0; MAX_TEAM + 2] }
    }

    /// A part for each thread in proportion to its pace, of 1 to `most` rows, rounded to multiples of `grain` where that allows it.
    /// There must be at least a row for each thread, and at most `most` of them.
    pub(super) fn by_pace(n_rows: usize, most: usize, grain: usize, paces: &[f32]) -> Self {
        let n_threads = paces.len();
        debug_assert!(n_threads <= n_rows && n_rows <= n_threads * most);
        let all: f32 = paces.iter().sum();
        let mut bounds = [0; MAX_TEAM + 2];
        let mut so_far = 0.0;
        for (index, pace) in paces.iter().enumerate() {
            so_far += pace;
            let before = bounds[index];
            let behind = n_threads - index - 1;
            #[allow(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "rows of a loop are far below 2^24, and shares of them are not negative"
            )]
            let bound = (so_far / all * n_rows as f32 / grain as f32).round() as usize * grain;
            let least = (before + 1).max(n_rows.saturating_sub(behind * most));
            bounds[index + 1] = bound.clamp(least, (before + most).min(n_rows - behind).max(least));
        }
        Self { n_rows, block: None, n_threads, bounds }
    }

    /// Where the rows are cut, if each thread has a part.
    #[must_use]
    pub fn each(&self) -> Option<Cut<'_>> {
        self.block.is_none().then(|| self.cut())
    }

    /// Where the rows are cut.
    #[must_use]
    pub fn cut(&self) -> Cut<'_> {
        match self.block {
            Some(block) => Cut::Even { n_rows: self.n_rows, block },
            None => Cut::At(&self.bounds[..=self.n_threads]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn widths(shares: &Shares) -> Vec<usize> {
        let cut = shares.cut();
        (0..cut.n_parts()).map(|part| cut.rows(part).len()).collect()
    }

    #[test]
    fn parts_are_as_large_as_threads_are_fast() {
        assert_eq!(widths(&Shares::by_pace(128, 80, 1, &[1.0, 1.0])), [64, 64]);
        assert_eq!(widths(&Shares::by_pace(128, 80, 1, &[1.0, 0.75])), [73, 55]);
        assert_eq!(widths(&Shares::by_pace(128, 80, 16, &[1.0, 0.75])), [80, 48]);
        assert_eq!(widths(&Shares::by_pace(128, 80, 1, &[1.0, 0.5])), [80, 48], "no more than fits a block");
        assert_eq!(widths(&Shares::by_pace(128, 80, 1, &[0.5, 1.0])), [48, 80]);
        assert_eq!(widths(&Shares::by_pace(3, 80, 16, &[1.0, 1.0, 1.0])), [1, 1, 1]);
        assert_eq!(widths(&Shares::by_pace(18, 18, 1, &[1.0, 0.8])), [10, 8]);
    }

    #[test]
    fn every_row_is_in_one_part_that_is_neither_empty_nor_too_large() {
        let paces = [0.5f32, 2.0, 1.0, 0.7, 1.3];
        for n_threads in 1..=paces.len() {
            for most in [1, 7, 80] {
                for n_rows in n_threads..=n_threads * most {
                    for grain in [1, 8, 16] {
                        let widths = widths(&Shares::by_pace(n_rows, most, grain, &paces[..n_threads]));
                        assert_eq!(widths.iter().sum::<usize>(), n_rows, "{n_rows} rows, {n_threads} threads");
                        assert!(widths.iter().all(|&width| (1..=most).contains(&width)), "{widths:?} of {most}");
                        assert_eq!(widths.len(), n_threads);
                    }
                }
            }
        }
    }

    #[test]
    fn even_blocks_are_balanced() {
        for n_threads in 1..5 {
            for n_rows in 1..300 {
                let widths = widths(&Shares::even(n_rows, 48, n_threads));
                let largest = *widths.iter().max().unwrap();
                assert!(largest <= 48 && widths.iter().sum::<usize>() == n_rows);
                let load = widths.len().div_ceil(n_threads) * largest;
                assert!(load <= n_rows.div_ceil(n_threads) + widths.len(), "{n_rows} rows on {n_threads}: {load}");
            }
        }
    }

    #[test]
    fn a_pace_follows_what_is_seen_and_stays_between_its_ends() {
        let pace = Pace::default();
        pace.learn(0.7);
        assert!(pace.get() > 0.9, "one loop does not count for much: {}", pace.get());
        (0..40).for_each(|_| pace.learn(0.7));
        assert!((pace.get() - 0.7).abs() < 0.01);
        (0..40).for_each(|_| pace.learn(1e6));
        assert!((pace.get() - MOST).abs() < 0.01);
        (0..40).for_each(|_| pace.learn(0.0));
        assert!((pace.get() - 1.0 / MOST).abs() < 0.01);
    }
}
