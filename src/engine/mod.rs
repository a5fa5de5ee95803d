//! From token ids to rows: admission, queue, batches, workers.
//!
//! ```text
//! submit ─ checked ─ admitted (sequences, tokens, bytes) ─ two lanes ─ policy ─ RaggedBatch ─ worker-n: Forward ─ rows ─ reply
//!             │            │                                  │                                  │
//!            422          429, 503                   cancelled, expired                    failed, died
//! ```
//!
//! A [`Submission`] is admitted whole or not at all, its sequences are scheduled one by one, and it is answered when the
//! last of them is back. Nothing is copied on the way but the rows of the reply. What a submission holds is given back
//! when its future ends, by an answer or by being dropped; what of it still waits then leaves the queue at once.
//!
//! `policy.rs` says which sequences a free worker takes, and states the bounds: how long a short text waits for long
//! ones, and that no long one starves. It and `admission.rs` are pure; time comes in as an argument.
//!
//! One lock guards queue and admission. It is held for a push, a cancellation or a decision, never across an `await`
//! or a forward pass.

mod admission;
mod error;
mod handle;
mod limits;
mod pending;
mod policy;
mod queue;
mod request;
mod worker;

pub use error::{EngineError, StartError};
pub use handle::{Engine, Load};
pub use limits::EngineLimits;
pub use request::{Reply, Sequence, SequenceRows, Submission};
