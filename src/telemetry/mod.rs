//! What the service tells about itself: every metric name, every log event, the process's memory and processors.
//!
//! [`Metrics`] is made once and passed; nothing here is a global except the allocator's counters, which the language
//! makes one. All series exist before the first request. An event is one function of [`events`] that logs *and*
//! counts, so that the two cannot disagree. No function takes the text of a user.

pub mod allocator;
pub mod events;
mod export;
mod labels;
mod metrics;
mod models;
pub mod process;
pub mod subscriber;
mod trace;

pub use export::ExportError;
pub use labels::{Credential, Dropped, ExpiryStage, MemoryKind, Port, RejectReason, Route, SpanResult, Stage};
pub use metrics::{InFlight, Metrics, ModelInfo};
pub use models::{ModelCounters, QueueReading};
pub use trace::{RequestSpan, Trace, TraceConfig, TraceHeaders, Tracer};
