//! The allocator, with a count of what the program holds from it.
//!
//! mimalloc gives memory back under many short requests, where glibc's arenas grow. Counting costs two unshared
//! additions: each thread adds to one of `SHARDS` cache lines, and a reader sums them. A block freed by another
//! thread than its maker leaves one shard too high and one too low by the same amount, so only the sum means something.
#![allow(unsafe_code, reason = "a global allocator is an unsafe trait; mimalloc's statistics are a C function")]

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::ffi::{c_int, c_long};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use mimalloc::MiMalloc;

/// Enough that the threads of a small machine seldom share one.
const SHARDS: usize = 16;

/// Two cache lines wide, because processors fetch lines in pairs.
#[repr(align(128))]
struct Shard {
    /// Modulo 2^64: see the module's text.
    bytes: AtomicU64,
    allocations: AtomicU64,
}

static COUNTS: [Shard; SHARDS] = [const { Shard { bytes: AtomicU64::new(0), allocations: AtomicU64::new(0) } }; SHARDS];
static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

const UNASSIGNED: usize = usize::MAX;

thread_local! {
    // Constant initialisers and no destructor: reading them neither allocates nor fails at a thread's end.
    static SHARD: Cell<usize> = const { Cell::new(UNASSIGNED) };
    static THREAD_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn shard() -> &'static Shard {
    let index = SHARD.with(|shard| {
        if shard.get() == UNASSIGNED {
            shard.set(NEXT_SHARD.fetch_add(1, Relaxed) % SHARDS);
        }
        shard.get()
    });
    &COUNTS[index]
}

fn count_new(bytes: usize) {
    let shard = shard();
    shard.bytes.fetch_add(bytes as u64, Relaxed);
    shard.allocations.fetch_add(1, Relaxed);
    THREAD_ALLOCATIONS.with(|count| count.set(count.get() + 1));
}

/// mimalloc that counts. To be made the `#[global_allocator]` by a binary or a test.
#[derive(Debug, Clone, Copy, Default)]
pub struct CountingAllocator;

// SAFETY: every method hands its arguments to `MiMalloc` unchanged and returns what that returns, because the counters
// beside it touch no memory of the caller and allocate nothing (constant thread locals, static atomics).
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: `layout` is valid, because `alloc`'s caller promises the same of ours.
        let block = unsafe { MiMalloc.alloc(layout) };
        if !block.is_null() {
            count_new(layout.size());
        }
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: `layout` is valid, because `alloc_zeroed`'s caller promises the same of ours.
        let block = unsafe { MiMalloc.alloc_zeroed(layout) };
        if !block.is_null() {
            count_new(layout.size());
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        shard().bytes.fetch_sub(layout.size() as u64, Relaxed);
        // SAFETY: `block` came from `MiMalloc` with this layout, because all our methods allocate there.
        unsafe { MiMalloc.dealloc(block, layout) };
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: `block` came from `MiMalloc` with this layout, because all our methods allocate there; `new_size` is
        // valid, because `realloc`'s caller promises the same of ours.
        let moved = unsafe { MiMalloc.realloc(block, layout, new_size) };
        if !moved.is_null() {
            shard().bytes.fetch_sub(layout.size() as u64, Relaxed);
            count_new(new_size);
        }
        moved
    }
}

/// Has this process use pages of the usual size only. mimalloc asks for huge ones, of which a service that holds little
/// would touch parts: 64 MB resident instead of 105 after the same requests. To be called first in `main`.
pub fn use_small_pages() {
    #[cfg(target_os = "linux")]
    // SAFETY: the call sets a flag of this process and touches no memory of it. Where the kernel refuses, pages stay as
    // they are.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0)
    };
}

/// Bytes that the program holds now; 0 unless [`CountingAllocator`] is the global allocator.
#[must_use]
pub fn allocated_bytes() -> u64 {
    let sum = COUNTS.iter().fold(0u64, |sum, shard| sum.wrapping_add(shard.bytes.load(Relaxed)));
    // A block freed between two loads can make the sum pass below zero for a moment.
    if sum > u64::MAX / 2 { 0 } else { sum }
}

/// Allocations and reallocations of all threads so far.
#[must_use]
pub fn allocations() -> u64 {
    COUNTS.iter().map(|shard| shard.allocations.load(Relaxed)).sum()
}

/// Allocations and reallocations of this thread so far.
#[must_use]
pub fn thread_allocations() -> u64 {
    THREAD_ALLOCATIONS.with(Cell::get)
}

/// While it lives, mimalloc gives what is freed back to the system at once, not a second later with the next allocation that
/// happens to look. For loading a model: what was parsed and freed by then would stay resident. Of two at once, the first that ends
/// ends both.
#[derive(Debug)]
pub struct GivingBack(());

/// What the delay is without it, whoever asks first and whoever ends last.
static USUAL_DELAY: OnceLock<c_long> = OnceLock::new();

/// `mi_option_purge_delay` of `mimalloc.h`: milliseconds.
const PURGE_DELAY: c_int = 15;

unsafe extern "C" {
    /// `mimalloc.h`; in the same library as `mi_malloc`, which `MiMalloc` calls.
    safe fn mi_option_get(option: c_int) -> c_long;
    safe fn mi_option_set(option: c_int, value: c_long);
}

impl GivingBack {
    /// From now on, until it is dropped.
    #[must_use]
    pub fn at_once() -> Self {
        USUAL_DELAY.get_or_init(|| mi_option_get(PURGE_DELAY));
        mi_option_set(PURGE_DELAY, 0);
        Self(())
    }
}

impl Drop for GivingBack {
    fn drop(&mut self) {
        if let Some(&delay) = USUAL_DELAY.get() {
            mi_option_set(PURGE_DELAY, delay);
        }
    }
}

/// Bytes that mimalloc has made accessible and not returned to the system. Only a part of them has been touched, so
/// this is an upper bound of what the allocator adds to the resident set.
#[must_use]
pub fn committed_bytes() -> u64 {
    unsafe extern "C" {
        /// `mimalloc.h`; in the same object file as `mi_malloc`, which `MiMalloc` calls.
        fn mi_process_info(
            elapsed_msecs: *mut usize,
            user_msecs: *mut usize,
            system_msecs: *mut usize,
            current_rss: *mut usize,
            peak_rss: *mut usize,
            current_commit: *mut usize,
            peak_commit: *mut usize,
            page_faults: *mut usize,
        );
    }
    let mut current_commit = 0usize;
    let none = std::ptr::null_mut;
    // SAFETY: the signature is that of the bundled header, every out-pointer may be null, and `current_commit` outlives
    // the call, because it is a local of this frame (mimalloc/include/mimalloc.h, stats.c).
    unsafe { mi_process_info(none(), none(), none(), none(), none(), &raw mut current_commit, none(), none()) };
    current_commit as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because the counters are the process's: it drives the allocator by hand, which nothing else does here.
    #[test]
    fn a_block_is_counted_while_it_lives_whoever_frees_it() {
        let before = allocated_bytes();
        let allocations_before = thread_allocations();
        let layout = Layout::from_size_align(1 << 20, 64).unwrap();
        let grown = Layout::from_size_align(3 << 20, 64).unwrap();
        // SAFETY: the layout is not empty, and the block is resized with the layout it was made with.
        let block = unsafe {
            let block = CountingAllocator.alloc(layout);
            assert!(block.addr().is_multiple_of(64));
            assert_eq!(allocated_bytes() - before, 1 << 20);
            CountingAllocator.realloc(block, layout, grown.size())
        };
        assert_eq!(allocated_bytes() - before, 3 << 20);
        assert!(committed_bytes() >= 3 << 20);
        let address = block.expose_provenance();
        std::thread::spawn(move || {
            // SAFETY: made above with this layout, and freed once, here.
            unsafe { CountingAllocator.dealloc(std::ptr::with_exposed_provenance_mut(address), grown) };
        })
        .join()
        .unwrap();
        assert_eq!(allocated_bytes(), before);
        assert_eq!(thread_allocations() - allocations_before, 2);
    }

    #[test]
    fn the_delay_of_purges_is_the_option_that_it_is_taken_for() {
        // The default of this version of mimalloc, and no other option's.
        assert_eq!(mi_option_get(PURGE_DELAY), 1000);
        let giving_back = GivingBack::at_once();
        assert_eq!(mi_option_get(PURGE_DELAY), 0);
        let another = GivingBack::at_once();
        drop(giving_back);
        drop(another);
        assert_eq!(mi_option_get(PURGE_DELAY), 1000);
    }
}
