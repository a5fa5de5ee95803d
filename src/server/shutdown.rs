//! When to stop.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Resolves at the first `SIGTERM` or `SIGINT` after this call.
///
/// # Errors
/// If the system refuses the handler.
pub fn termination() -> io::Result<impl Future<Output = ()>> {
    // Both are registered here, not at the first poll: a signal in between would end the process at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
