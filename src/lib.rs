#![doc = include_str!("ARCHITECTURE.md")]

// Ground floor: each of these imports nothing of ours.
pub mod model;
pub mod telemetry;

// Numeric wing.

pub mod checkpoint;
pub mod exec;
pub mod quant;

// Service wing.
pub mod engine;
