//! What tests of kernels compute with.

use niwaki::kernels::{Isa, KernelSet};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The kernels of every instruction set of this machine.
pub(crate) fn sets() -> Vec<KernelSet> {
    Isa::all_supported().into_iter().map(KernelSet::new).collect()
}

pub(crate) fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// `n` numbers within ±`width`.
pub(crate) fn floats(rng: &mut StdRng, n: usize, width: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-width..width)).collect()
}
