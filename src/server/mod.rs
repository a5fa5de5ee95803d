//! The service's face: HTTP in, HTTP out.
//!
//! `api` holds the wire types and is the only serde of the service, `error` the only status codes, `layers` what every
//! request passes, `extract` and `inputs` the way in, `rows` the way out. [`router()`] is the whole service without a
//! socket, [`serve()`] puts it on one and drains it.

pub mod api;
mod compute;
mod config;
mod connection;
mod connections;
pub mod error;
mod extract;
pub mod grpc;
mod inputs;
mod keys;
mod layers;
mod listen;
mod memory;
mod models;
mod numbers;
pub mod openapi;
mod pieces;
mod router;
mod routes;
mod rows;
mod serve;
mod shutdown;
mod state;
#[cfg(test)]
mod testing;
mod tls;
mod tokens;

pub use config::{ConfigError, ServedModel, ServerConfig, Task};
pub use keys::KeyFileError;
pub use listen::bind;
pub use models::ModelParts;
pub use router::{admin_router, public_router, router};
pub use serve::{Listeners, serve};
pub use shutdown::termination;
pub use state::{AppState, Loader, Phase, Readiness};
pub use tls::{TlsError, TlsFiles};
