//! The score: what a Transformer encoder computes, written once over a small set of verbs.
//!
//! `encoder.rs` is the only forward text of the project. An executor ("player", in `exec/`) implements [`Ops`]
//! and decides how a verb is carried out: in INT8 without allocation, in f32 with gradients, or as a count of
//! multiply-accumulates. This folder never pads, never reads a clock and never logs.

mod band;
mod batch;
mod config;
mod encoder;
mod error;
mod forward;
mod head;
mod ops;

pub use band::{Band, BandError, Seen, Shape};
pub use batch::{Ragged, RaggedBatch};
pub use config::{
    Activation, Architecture, ArchitectureSpec, Family, LayerConfig, LayerRanges, Pooling, Positions, ValueRange,
};
pub use encoder::{Encoder, EncoderLayer};
pub use error::ModelError;
pub use forward::{Forward, ForwardMemory, GROUP_GRAIN, Model, Outputs, Want};
pub use head::{Head, HeadConfig, HeadSlot, ScoreFunction};
pub use ops::{AttentionSpec, Build, LinearSlot, NormSlot, Ops};
