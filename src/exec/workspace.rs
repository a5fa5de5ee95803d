//! Buffers that come back: a forward takes what it needs from a pool and dropping returns it, so that in the steady
//! state nothing is allocated.
//!
//! A request takes the smallest free buffer that is large enough; where there is none, the largest free one grows. So a pool that holds
//! one buffer per live tensor at its largest size soon serves every smaller batch.
//!
//! An input that is longer than the pool was made for makes it grow. It goes back to what it was made for after
//! `QUIET` groups in a row that would have done with that ([`Workspace::is_due`]), so that rare long inputs are not paid
//! for with memory, and frequent ones not with allocations.
#![allow(unsafe_code, reason = "cache lines are lent as slices of plain numbers, and a mapping outlives its borrow")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::kernels::attention::CacheLine;
use crate::kernels::layout::RowScale;

const LINE: usize = size_of::<CacheLine>();

mod sealed {
    /// Types without padding for which every bit pattern is a value.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for u8 {}
    impl Plain for u16 {}
    impl Plain for f32 {}
    impl Plain for crate::kernels::layout::RowScale {}
    impl Plain for crate::kernels::attention::CacheLine {}
}
use sealed::Plain;

// `RowScale` is two f32 in C layout, `CacheLine` sixteen: both without padding.
const _: () = assert!(size_of::<RowScale>() == 8 && LINE == 64 && align_of::<CacheLine>() == 64);

/// Groups in a row without need of more than the pool was made for, after which it shrinks.
const QUIET: usize = 16;

/// Numbers that start on a cache line; grows on demand.
#[derive(Debug, Default)]
pub struct Aligned {
    lines: Vec<CacheLine>,
}

impl Aligned {
    /// Room for `bytes`, zeroed.
    #[must_use]
    pub fn with_bytes(bytes: usize) -> Self {
        Self { lines: vec![CacheLine::ZERO; bytes.div_ceil(LINE)] }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lines.len() * LINE
    }

    /// Gives back what is held beyond `bytes`, and what was written with it.
    pub fn shrink_to(&mut self, bytes: usize) {
        if self.bytes() > bytes.next_multiple_of(LINE) {
            // The old lines go before the new ones come.
            self.lines = Vec::new();
            *self = Self::with_bytes(bytes);
        }
    }

    /// The first `n` numbers, whatever was written last.
    pub fn first<T: Plain>(&mut self, n: usize) -> &mut [T] {
        let needed = (n * size_of::<T>()).div_ceil(LINE);
        if needed > self.lines.len() {
            self.lines.resize(needed, CacheLine::ZERO);
        }
        // SAFETY: the lines are initialised, aligned beyond T's need and hold at least `n` of T (ensured above); T is
        // plain, so every bit pattern is a value.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), n) }
    }

    fn shared<T: Plain>(&self, n: usize) -> &[T] {
        assert!(n * size_of::<T>() <= self.bytes());
        // SAFETY: as in `first`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), n) }
    }
}

#[derive(Debug, Default)]
struct Pool {
    free: Vec<Aligned>,
    /// Bytes of the buffers that it was made with.
    sizes: Vec<usize>,
    /// Groups since one needed more than that.
    quiet: usize,
    held: usize,
    in_use: usize,
    peak: usize,
}

/// A pool of buffers.
#[derive(Debug, Default)]
pub struct Workspace {
    pool: Arc<Mutex<Pool>>,
}

fn lock(pool: &Mutex<Pool>) -> MutexGuard<'_, Pool> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workspace {
    /// A pool with one buffer per entry of `sizes`, in bytes.
    #[must_use]
    pub fn new(sizes: &[usize]) -> Self {
        // Twice the room, so that returning buffers does not allocate even after some were added.
        let mut free = Vec::with_capacity(2 * sizes.len() + 8);
        free.extend(sizes.iter().map(|&bytes| Aligned::with_bytes(bytes)));
        let held = free.iter().map(Aligned::bytes).sum();
        let pool = Pool { free, sizes: sizes.to_vec(), quiet: 0, held, in_use: 0, peak: 0 };
        Self { pool: Arc::new(Mutex::new(pool)) }
    }

    /// Whether, as a group starts, it is time to [shrink](Self::shrink). `fits` tells that the group needs no more than
    /// the pool was made for.
    #[must_use]
    pub fn is_due(&self, fits: bool) -> bool {
        let mut pool = lock(&self.pool);
        pool.quiet = if fits { pool.quiet + 1 } else { 0 };
        pool.quiet == QUIET
    }

    /// Goes back to the sizes that it was made with, unless buffers are out.
    pub fn shrink(&self) {
        let mut pool = lock(&self.pool);
        let made_with = pool.sizes.iter().map(|bytes| bytes.next_multiple_of(LINE)).sum();
        if pool.in_use > 0 || pool.held <= made_with {
            return;
        }
        pool.free.clear();
        for index in 0..pool.sizes.len() {
            let bytes = pool.sizes[index];
            pool.free.push(Aligned::with_bytes(bytes));
        }
        pool.held = made_with;
    }

    /// `n` numbers, whatever was in them.
    #[must_use]
    pub fn take<T: Plain>(&self, n: usize) -> Buffer<T> {
        let needed = n * size_of::<T>();
        let mut pool = lock(&self.pool);
        let fitting = (0..pool.free.len())
            .filter(|&index| pool.free[index].bytes() >= needed)
            .min_by_key(|&index| pool.free[index].bytes())
            // None is large enough: the largest one grows.
            .or_else(|| (0..pool.free.len()).max_by_key(|&index| pool.free[index].bytes()));
        let mut memory = fitting.map(|index| pool.free.swap_remove(index)).unwrap_or_default();
        pool.held -= memory.bytes();
        memory.first::<T>(n);
        pool.held += memory.bytes();
        pool.in_use += needed;
        pool.peak = pool.peak.max(pool.in_use);
        Buffer { memory, len: n, pool: Arc::clone(&self.pool), numbers: PhantomData }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        lock(&self.pool).held
    }

    /// Most bytes in use at once so far.
    #[must_use]
    pub fn peak_bytes(&self) -> usize {
        lock(&self.pool).peak
    }
}

/// Numbers from a pool; dropping returns them.
#[derive(Debug)]
pub struct Buffer<T: Plain> {
    memory: Aligned,
    len: usize,
    pool: Arc<Mutex<Pool>>,
    numbers: PhantomData<T>,
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.memory.shared(self.len)
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.memory.first(self.len)
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let mut pool = lock(&self.pool);
        pool.in_use -= self.len * size_of::<T>();
        pool.free.push(memory);
    }
}

/// Numbers that stay in a checkpoint's mapping, so that only the pages of rows that are read become resident.
#[derive(Debug)]
pub struct Mapped<T: 'static> {
    /// Keeps the mapping alive.
    _owner: Arc<Checkpoint>,
    numbers: &'static [T],
}

impl<T> Mapped<T> {
    /// Keeps what `find` borrows from `owner` together with it.
    ///
    /// # Errors
    /// Those of `find`.
    pub fn new<E>(owner: &Arc<Checkpoint>, find: impl FnOnce(&Checkpoint) -> Result<&[T], E>) -> Result<Self, E> {
        let numbers = find(owner)?;
        // SAFETY: the slice is borrowed from the checkpoint behind the `Arc`, which is kept beside it and never changed:
        // it has no method that takes `&mut self`, and its address does not move with this value.
        let numbers = unsafe { std::slice::from_raw_parts(numbers.as_ptr(), numbers.len()) };
        Ok(Self { _owner: Arc::clone(owner), numbers })
    }
}

impl<T> Deref for Mapped<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_the_smallest_fit_is_taken() {
        let workspace = Workspace::new(&[6400, 640, 64]);
        assert_eq!(workspace.bytes(), 7104);
        let large: Buffer<f32> = workspace.take(1600);
        let small: Buffer<u8> = workspace.take(10);
        let middle: Buffer<RowScale> = workspace.take(80);
        assert_eq!((large.len(), small.len(), middle.len()), (1600, 10, 80));
        assert_eq!(workspace.bytes(), 7104);
        assert_eq!(workspace.peak_bytes(), 6400 + 10 + 640);
        drop((large, small, middle));
        let mut again: Buffer<u16> = workspace.take(32);
        again.fill(7);
        assert_eq!(again.as_ptr().align_offset(64), 0);
        drop(again);
        assert_eq!(workspace.bytes(), 7104);
        // Only what does not fit grows the pool.
        drop(workspace.take::<f32>(1601));
        assert_eq!(workspace.bytes(), 7104 + 64);
    }

    #[test]
    fn it_shrinks_after_a_while_without_need() {
        let workspace = Workspace::new(&[6400, 640]);
        let mut due = 0;
        for group in 0..3 * QUIET {
            // The last one that is too long is group 5.
            due += usize::from(workspace.is_due(group % 5 != 0 || group > 5));
            assert_eq!(due > 0, group >= 5 + QUIET, "group {group}");
        }
        assert_eq!(due, 1);
        let held = workspace.take::<u8>(100_000);
        workspace.shrink();
        assert!(workspace.bytes() >= 100_000, "buffers that are out stay");
        drop(held);
        workspace.shrink();
        assert_eq!(workspace.bytes(), 7040);
        let mut lane = Aligned::with_bytes(64);
        lane.first::<f32>(1000);
        lane.shrink_to(4096);
        assert_eq!(lane.bytes(), 4032);
        lane.shrink_to(100);
        assert_eq!(lane.bytes(), 128);
    }
}
