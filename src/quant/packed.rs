//! Linear layers in the form that the integer kernels read.

use super::{Weight, quantize_rows_symmetric};
use crate::kernels::layout::PackedLinear;

/// Packs a linear layer `[bias.len(), n_in]`; f32 weights are quantized on the way, one scale per output channel.
///
/// # Panics
/// If the lengths do not fit.
#[must_use]
pub fn pack_linear(weight: &Weight<'_>, bias: &[f32], n_in: usize) -> PackedLinear {
    match weight {
        Weight::Int8 { codes, scale } => PackedLinear::new(codes, scale, bias, n_in),
        Weight::F32(values) => {
            let (codes, scale) = quantize_rows_symmetric(values, n_in);
            PackedLinear::new(&codes, &scale, bias, n_in)
        }
    }
}
