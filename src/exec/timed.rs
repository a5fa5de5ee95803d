//! A decorator that measures where a forward's time goes, verb by verb.

use std::time::{Duration, Instant};

use crate::model::{Activation, AttentionSpec, Build, LinearSlot, ModelError, NormSlot, Ops, Pooling, Ragged};

/// What a forward spends its time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Embedding lookup, LayerNorm, quantization.
    Embed,
    /// Queries, keys and values.
    Qkv,
    /// Attention.
    Attend,
    /// Attention output, residual, LayerNorm, quantization.
    AttentionOut,
    /// FFN up, activation, quantization.
    FfnUp,
    /// FFN down, residual, LayerNorm, quantization.
    FfnDown,
    /// Sentence pooling.
    Pool,
    /// Results into the caller's memory.
    Read,
}

impl Operation {
    /// All of them, in the order of a forward.
    pub const ALL: [Self; 8] =
        [Self::Embed, Self::Qkv, Self::Attend, Self::AttentionOut, Self::FfnUp, Self::FfnDown, Self::Pool, Self::Read];

    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Qkv => "qkv",
            Self::Attend => "attend",
            Self::AttentionOut => "attention_out",
            Self::FfnUp => "ffn_up",
            Self::FfnDown => "ffn_down",
            Self::Pool => "pool",
            Self::Read => "read",
        }
    }

    fn of(slot: LinearSlot) -> Self {
        match slot {
            LinearSlot::Qkv(_) => Self::Qkv,
            LinearSlot::AttentionOut(_) => Self::AttentionOut,
            LinearSlot::FfnUp(_) => Self::FfnUp,
            LinearSlot::FfnDown(_) => Self::FfnDown,
        }
    }
}

/// A player whose verbs are timed. The clock is read twice per verb, some 50 ns against tens of microseconds.
#[derive(Debug)]
pub struct Timed<O> {
    inner: O,
    times: [Duration; Operation::ALL.len()],
}

impl<O> Timed<O> {
    /// Times `inner`.
    #[must_use]
    pub fn new(inner: O) -> Self {
        Self { inner, times: Default::default() }
    }

    /// The player.
    #[must_use]
    pub fn inner(&self) -> &O {
        &self.inner
    }

    /// What every operation took since the last call.
    pub fn take_times(&mut self) -> [(Operation, Duration); Operation::ALL.len()] {
        let times = std::mem::take(&mut self.times);
        std::array::from_fn(|index| (Operation::ALL[index], times[index]))
    }

    fn time<T>(&mut self, operation: Operation, verb: impl FnOnce(&mut O) -> T) -> T {
        let started = Instant::now();
        let result = verb(&mut self.inner);
        self.times[operation as usize] += started.elapsed();
        result
    }
}

/// A linear layer that knows its place.
#[derive(Debug)]
pub struct Placed<L> {
    slot: LinearSlot,
    linear: L,
}

impl<O: Ops> Ops for Timed<O> {
    type Act = O::Act;
    type Tables = O::Tables;
    type Linear = Placed<O::Linear>;
    type Norm = O::Norm;

    fn embed(&mut self, tables: &O::Tables, norm: &O::Norm, batch: &Ragged<'_>) -> Result<O::Act, ModelError> {
        self.time(Operation::Embed, |ops| ops.embed(tables, norm, batch))
    }

    fn linear(&mut self, placed: &Self::Linear, x: &O::Act, then: Activation) -> Result<O::Act, ModelError> {
        self.time(Operation::of(placed.slot), |ops| ops.linear(&placed.linear, x, then))
    }

    fn attend(&mut self, qkv: O::Act, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<O::Act, ModelError> {
        self.time(Operation::Attend, |ops| ops.attend(qkv, spec, batch))
    }

    fn linear_add_norm(
        &mut self,
        placed: &Self::Linear,
        x: O::Act,
        residual: O::Act,
        norm: &O::Norm,
    ) -> Result<O::Act, ModelError> {
        self.time(Operation::of(placed.slot), |ops| ops.linear_add_norm(&placed.linear, x, residual, norm))
    }

    fn pool(&mut self, x: &O::Act, pooling: Pooling, batch: &Ragged<'_>) -> Result<O::Act, ModelError> {
        self.time(Operation::Pool, |ops| ops.pool(x, pooling, batch))
    }

    fn read(&mut self, x: &O::Act, out: &mut Vec<f32>) -> Result<(), ModelError> {
        self.time(Operation::Read, |ops| ops.read(x, out))
    }
}

/// Handles of the inner player with their places.
#[derive(Debug)]
pub struct TimedBuild<B>(pub B);

impl<O: Ops, B: Build<O>> Build<Timed<O>> for TimedBuild<B> {
    fn tables(&mut self) -> Result<O::Tables, ModelError> {
        self.0.tables()
    }

    fn norm(&mut self, slot: NormSlot) -> Result<O::Norm, ModelError> {
        self.0.norm(slot)
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<Placed<O::Linear>, ModelError> {
        Ok(Placed { slot, linear: self.0.linear(slot)? })
    }
}
