//! Number formats: how weights are stored and what a stored number means.

mod packed;
mod scheme;

pub use packed::pack_linear;
pub use scheme::{Weight, quantize_rows_symmetric};
