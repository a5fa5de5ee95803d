//! Number formats: how weights are stored and what a stored number means.
//!
//! | form | value of element `[r, c]` | parts |
//! |---|---|---|
//! | [`Weight::F32`] | itself | |
//! | [`Weight::Int8`] | `scale[r] · code` | codes, scale |
//! | [`Weight::Int8Affine`] | `scale[r] · code + offset[r]` | codes, scale, offset |
//! | [`Weight::Int8Grouped`] | `scale[r, g] · code + offset[r, g]` | codes, scale, maybe offset |
//! | [`Weight::Codebook4`] | `scale[r, g] · (table[index] − zero[r, g])` | indices (two per byte), table of 16 s8, scale, zero |
//! | [`Weight::LowRank`] | `Σ_k up[r, k] · down[k, c]` | two matrices of other forms |
//! | [`Weight::BlockSparse`] | `scale[r] · code`, or 0 | bit mask of blocks, codes of the blocks that are there, scale |
//! | [`Weight::Bitmap`] | `scale[r] · code`, or 0 | bit mask of elements, codes of those that are there, scale |
//!
//! What is computed from them is in `kernels::forms`; under which names they lie in a file is in
//! `checkpoint::hf_names`.

mod codebook;
mod grouped;
mod packed;
mod scheme;
mod sparse;
mod weight;

pub use codebook::{Codebook4, TABLE_LEN, pack_nibbles, round_scales_to_half};
pub use grouped::Int8Grouped;
pub use packed::{PackedLayer, pack_matrix};
pub use scheme::{quantize_rows_affine, quantize_rows_symmetric};
pub use sparse::{BLOCK_DEPTH, Bitmap, BlockSparse};
pub use weight::{FormError, LowRank, Weight};
