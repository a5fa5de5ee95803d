//! Number formats: how weights are stored and what a stored number means.

mod scheme;

pub use scheme::{Weight, quantize_rows_symmetric};
