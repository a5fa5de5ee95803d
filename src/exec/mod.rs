//! Players of the score.

pub mod candle;
pub mod cost;
pub mod int8;
pub mod int8_build;
pub mod int8_tables;
mod load;
mod probe;
pub mod timed;
pub mod workspace;

pub use load::{Runtime, candle_model};
pub use probe::time_layers;
