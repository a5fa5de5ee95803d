//! Text to token ids and back.
//!
//! A [`Tokenizer`] is a Hugging Face `tokenizer.json` with its padding and truncation switched off: batches are ragged,
//! and where an input is cut is the service's decision, made on ids. A [`Pool`] keeps the work off the async reactor.

mod error;
mod pool;
mod tokenizer;

pub use error::{PoolError, TextError};
pub use pool::{Pool, Wanted};
pub use tokenizer::{Direction, Pair, Part, Piece, Tokenizer};
