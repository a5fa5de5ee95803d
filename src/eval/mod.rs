//! Tasks and their measures: similarity scores, classification, retrieval, fidelity to another model, and speed.
//!
//! Models come in as [`Forward`](crate::model::Forward), so that every player is measured by the same code.

mod classify;
mod embed;
mod error;
mod fidelity;
mod logistic;
pub mod page;
pub mod plot;
mod retrieval;
mod speed;
mod stats;
mod sts;
mod table;

pub use classify::{Classification, ClassificationTask, classify};
pub use embed::{Embeddings, Encode, EncodeError, embed, encoder};
pub use error::EvalError;
pub use fidelity::{Fidelity, compare, fidelity, lines_of, read_lines, read_text};
pub use retrieval::{QueryMean, Retrieval, RetrievalFiles, RetrievalTask, retrieve};
pub use speed::{Contender, Pass, Speed, SpeedSettings, batches, made_up_sequences, measure_speed, play};
pub use stats::{Difference, Interval, bootstrap, paired_difference, spearman};
pub use sts::{Pair, Sts, read_pairs, sts, sts_similarities};
pub use table::{ColumnName, ColumnNames, ROLES};
