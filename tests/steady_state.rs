//! The serving path allocates nothing per batch in the steady state. One test, so that nothing else allocates meanwhile.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unsafe_code, reason = "a global allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::forms::{Kind, stored_dir};
use common::tiny::{TinyModel, tiny_dir};
use niwaki::checkpoint::Checkpoint;
use niwaki::exec::int8_build::Int8Model;
use niwaki::kernels::threads::Cores;
use niwaki::kernels::{AttentionForm, Isa, KernelSet};
use niwaki::model::{Forward, LinearSlot, Outputs, RaggedBatch, Want};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn varied_batches_allocate_nothing_once_threads_are_warm() {
    let model = TinyModel { n_positions: 200, max_seq_length: 200, ..TinyModel::default() };
    allocates_nothing(tiny_dir(&model));
    // Every slot in another form, so that all of them are played.
    let linear = |slot: LinearSlot| match slot {
        LinearSlot::Qkv(layer) => [Kind::LowRank, Kind::CodebookGroups][layer],
        LinearSlot::AttentionOut(layer) => [Kind::Codebook, Kind::Affine][layer],
        LinearSlot::FfnUp(layer) => [Kind::Blocks32, Kind::LowRankCodebook][layer],
        LinearSlot::FfnDown(layer) => [Kind::LowRank, Kind::CodebookWide][layer],
    };
    let table = |name: &str| if name.contains("word") { Kind::LowRank } else { Kind::CodebookGroups };
    allocates_nothing(stored_dir(&model, linear, table));
    // The counter counts.
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    drop(std::hint::black_box(vec![1u8; 100]));
    assert!(ALLOCATIONS.load(Ordering::SeqCst) > before);
}

#[allow(clippy::needless_pass_by_value, reason = "the directory lives as long as its model")]
fn allocates_nothing(dir: tempfile::TempDir) {
    let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
    let batches: Vec<RaggedBatch> =
        [&[1][..], &[12, 3, 7], &[200], &[33, 150], &[64; 9], &[1; 100], &[16], &[199, 1, 80]]
            .iter()
            .map(|lens| {
                let sequences: Vec<Vec<u32>> = lens.iter().map(|&len| (0..len).map(|id| id % 40).collect()).collect();
                RaggedBatch::from_sequences(&sequences).unwrap()
            })
            .collect();
    for isa in Isa::all_supported() {
        for form in AttentionForm::ALL {
            let Some(kernels) = KernelSet::new(isa).with_attention(form) else { continue };
            let model = Int8Model::load(&checkpoint, kernels).unwrap();
            for n_cores in [1, 2] {
                let mut worker = model.worker(Arc::new(Cores::new(n_cores).unwrap()), 256);
                let mut out = Outputs::default();
                // The results are the caller's; their room is made once.
                out.pooled.reserve(100 * 32);
                out.tokens.reserve(1000 * 32);
                let workspace = worker.memory().workspace;
                // A helper thread makes its handle when it first waits, which may be in any of the first batches.
                for _ in 0..20 {
                    for batch in &batches {
                        worker.forward(batch, Want::PooledAndTokens, &mut out).unwrap();
                    }
                }
                let before = ALLOCATIONS.load(Ordering::SeqCst);
                for _ in 0..5 {
                    for batch in &batches {
                        worker.forward(batch, Want::PooledAndTokens, &mut out).unwrap();
                    }
                }
                let allocations = ALLOCATIONS.load(Ordering::SeqCst) - before;
                assert_eq!(allocations, 0, "{kernels:?}, {n_cores} cores");
                assert_eq!(worker.memory().workspace, workspace);
            }
        }
    }
}
