//! Players of the score.

pub mod candle;
