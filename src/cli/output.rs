//! Standard output and standard error: whoever reads there may leave at any time, and `println!` would panic then.

use std::fmt::Arguments;
use std::io::{self, BufWriter, Write};

/// Standard output does not take what is written; an error of its own, so that it is not mistaken for one of a file or a
/// connection.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub(super) struct OutputError(#[from] io::Error);

impl OutputError {
    /// Whether the reader has closed it.
    pub(super) fn is_closed(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Writes to standard output, all of it before this returns.
pub(super) fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), OutputError> {
    let mut out = BufWriter::new(io::stdout().lock());
    write(&mut out)?;
    Ok(out.flush()?)
}

/// Tells a line to whoever reads standard error, if anybody does.
pub(super) fn tell(line: Arguments<'_>) {
    drop(writeln!(io::stderr(), "{line}"));
}
