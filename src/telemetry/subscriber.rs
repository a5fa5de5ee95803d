//! Where log events go: text or JSON lines on standard error.
//!
//! Standard output belongs to commands that print results.

use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object a line, fields at the top level.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SubscriberError {
    /// `LOG_LEVEL` is neither a level nor a list of directives.
    #[error("LOG_LEVEL `{level}` is neither a level nor a list of `target=level`")]
    Level {
        /// As given.
        level: String,
        /// Where reading it ended.
        source: ParseError,
    },
    /// A subscriber is there already.
    #[error("logging is set up already")]
    Init(#[from] TryInitError),
}

/// Sets up logging for the process. `level` is what `LOG_LEVEL` holds: `off`, `error` to `trace`, or directives such as
/// `info,niwaki=debug`; without it `info`.
///
/// # Errors
/// [`SubscriberError::Level`] if `level` cannot be read; [`SubscriberError::Init`] on a second call.
pub fn init(format: LogFormat, level: Option<&str>) -> Result<(), SubscriberError> {
    let ansi = io::stderr().is_terminal();
    Ok(subscriber(format, level, ansi, io::stderr)?.try_init()?)
}

fn subscriber<W>(
    format: LogFormat,
    level: Option<&str>,
    ansi: bool,
    writer: W,
) -> Result<Box<dyn tracing::Subscriber + Send + Sync>, SubscriberError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let level = level.map(str::trim).filter(|level| !level.is_empty()).unwrap_or("info");
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .parse(level.to_ascii_lowercase())
        .map_err(|source| SubscriberError::Level { level: level.to_owned(), source })?;
    // A log that cannot be written (a full disk) is nothing to end for, and the complaint would go the same way.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).log_internal_errors(false);
    Ok(match format {
        LogFormat::Text => Box::new(builder.with_ansi(ansi).finish()),
        LogFormat::Json => {
            Box::new(builder.json().flatten_event(true).with_current_span(true).with_span_list(false).finish())
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Capture(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Capture {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(format: LogFormat, level: Option<&str>) -> String {
        let capture = Capture::default();
        let writer = capture.clone();
        let subscriber = subscriber(format, level, false, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!(n_tokens = 3, "small");
            tracing::info!(n_tokens = 7, "hello");
        });
        let bytes = capture.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_carry_the_fields_at_the_top() {
        let text = written(LogFormat::Json, None);
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&line["level"], &line["message"], &line["n_tokens"]), (&"INFO".into(), &"hello".into(), &7.into()));
    }

    #[test]
    fn the_level_decides() {
        assert_eq!(written(LogFormat::Text, Some("DEBUG")).lines().count(), 2);
        assert_eq!(written(LogFormat::Text, Some("off")), "");
        assert_eq!(written(LogFormat::Text, Some("warn,niwaki=info")).lines().count(), 1);
        let text = written(LogFormat::Text, Some(" "));
        assert!(text.contains("INFO") && text.contains("n_tokens=7") && !text.contains("small"), "{text}");
        assert!(matches!(
            subscriber(LogFormat::Text, Some("niwaki=loud"), false, io::sink),
            Err(SubscriberError::Level { level, .. }) if level == "niwaki=loud"
        ));
    }
}
