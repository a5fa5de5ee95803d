#![doc = include_str!("ARCHITECTURE.md")]

// Ground floor: each of these imports nothing of ours.
pub mod kernels;
pub mod model;
pub mod telemetry;
pub mod text;

// Numeric wing.
pub mod checkpoint;
pub mod quant;

// Players of the score.
pub mod exec;

// Service wing.
pub mod engine;
pub mod server;

// Workshop wing.
pub mod compress;
pub mod eval;

// The only place where all meet.
pub mod cli;
