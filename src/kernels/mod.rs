//! Numbers over slices: no model, no log, no allocation.
//!
//! [`KernelSet`] is the safe face of one instruction set's kernels; [`mod@reference`] says in a few lines each what they mean;
//! [`threads::Cores`] is the right to compute.

mod arch;
pub mod attention;
mod dense;
pub mod forms;
mod half;
mod isa;
pub mod layout;
mod outliers;
pub mod peak;
mod place;
pub mod reference;
pub mod threads;

pub use arch::{Block, CodeRowsMut, KernelSet, Norm, Stream};
pub use attention::AttentionForm;
pub use dense::dense;
pub use half::{f32_to_half, half_to_f32};
pub use isa::{Isa, IsaError, IsaName};

/// Element-wise functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Nonlinearity {
    /// `x · Φ(x)`; absolute error 1.7e-5, or 3e-8 · |x| where that is more.
    Gelu,
    /// The tanh approximation; absolute error 2e-6 · max(1, |x|).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// The hyperbolic tangent; absolute error 1e-6.
    Tanh,
}

/// Many rows to one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reduction {
    /// `factor · Σ`.
    Sum {
        /// Multiplies the sum.
        factor: f32,
    },
    /// The largest.
    Max,
}
