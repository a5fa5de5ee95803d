//! Who may ask what, where, and how much of it: keys, ports, TLS, limits of connections and memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod service;

#[path = "security/http2.rs"]
mod http2;
#[path = "security/keys.rs"]
mod keys;
#[path = "security/limits.rs"]
mod limits;
#[path = "security/memory.rs"]
mod memory;
#[path = "security/ports.rs"]
mod ports;
#[path = "security/tls.rs"]
mod tls;
