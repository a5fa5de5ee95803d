//! Players of the score.

pub mod candle;
pub mod cost;
mod load;

pub use load::candle_model;
