//! Tasks and their measures: similarity scores, and fidelity to another model.
//!
//! Models come in as [`Forward`](crate::model::Forward), so that every player is measured by the same code.

mod embed;
mod error;
mod fidelity;
mod stats;
mod sts;

pub use embed::{Embeddings, Encode, EncodeError, embed, encoder};
pub use error::EvalError;
pub use fidelity::{Fidelity, compare, fidelity, read_lines};
pub use stats::{Interval, bootstrap, paired_bootstrap, spearman};
pub use sts::{Pair, Sts, read_pairs, sts, sts_similarities};
