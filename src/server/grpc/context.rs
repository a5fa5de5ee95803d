//! What a call is about, besides its messages.

use std::time::Duration;

use axum::extract::Request;
use axum::http::HeaderMap;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::server::error::ServerError;
use crate::server::extract::{Clock, SMALL_BODY, Target, asked_model};
use crate::server::layers::{self, Arrival, RequestId};
use crate::server::state::AppState;
use crate::telemetry::Route;
use crate::telemetry::events::ResponseStats;

/// What the head of a call says.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) app: AppState,
    /// The name of the model, not the model: a stream may be open for hours, and must not keep one that was replaced.
    model: String,
    clock: Clock,
    has_deadline: bool,
    route: Route,
    request_id: String,
}

/// What a message is answered with.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) target: Target,
    pub(super) clock: Clock,
    /// The message's share of the memory for bodies.
    pub(super) memory: Option<OwnedSemaphorePermit>,
    /// Bytes that an answer may have without a share of the memory.
    pub(super) small: usize,
}

impl Head {
    pub(super) fn of(app: &AppState, request: &Request) -> Result<Self, ServerError> {
        let headers = request.headers();
        let model = app.models.find(asked_model(request.uri(), headers)?.as_deref(), None)?.card.served_name.clone();
        let mut clock = Clock::of(app, request.extensions().get(), headers)?;
        let timeout = grpc_timeout(headers)?;
        if let Some(timeout) = timeout {
            clock.deadline = clock.start.checked_add(timeout);
        }
        let extensions = request.extensions();
        Ok(Self {
            app: app.clone(),
            model,
            clock,
            has_deadline: timeout.is_some(),
            route: extensions.get().map_or(Route::Other, |arrival: &Arrival| arrival.route),
            request_id: extensions.get().map(|RequestId(id)| id.clone()).unwrap_or_default(),
        })
    }

    /// Counts the answer to a message as that to a request; it took `duration` until there was one.
    pub(super) fn count(&self, code: u16, duration: Duration) {
        let Self { app, clock, route, request_id, .. } = self;
        let trace_id = clock.trace.id();
        let stats = ResponseStats { route: *route, code, duration, request_id, trace_id: trace_id.as_deref() };
        layers::count(app, &stats, true, None);
    }

    /// For the one answer of a call.
    pub(super) fn context(&self, memory: Option<OwnedSemaphorePermit>) -> Result<Context, ServerError> {
        self.with(self.clock.clone(), memory, SMALL_BODY)
    }

    /// For a message that comes now: a stream may be open for hours, its messages have a deadline each unless the client has
    /// set one for the whole. As one stream may have many in work, every answer has its share of the memory.
    pub(super) fn context_of_message(&self, memory: Option<OwnedSemaphorePermit>) -> Result<Context, ServerError> {
        let start = Instant::now();
        let default = self.app.config.default_timeout;
        let deadline =
            if self.has_deadline { self.clock.deadline } else { default.and_then(|limit| start.checked_add(limit)) };
        self.with(Clock { start, deadline, trace: self.clock.trace.clone() }, memory, 0)
    }

    fn with(&self, clock: Clock, memory: Option<OwnedSemaphorePermit>, small: usize) -> Result<Context, ServerError> {
        // Looked for anew each time: it may have been replaced.
        let model = self.app.models.named(&self.model)?;
        Ok(Context { target: Target { app: self.app.clone(), model }, clock, memory, small })
    }
}

/// `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, ServerError> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parse = || {
        let text = value.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8 && !digits.starts_with('+'))?;
        Some(match unit {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    };
    let invalid = || ServerError::Value { field: "grpc-timeout", reason: "must be digits and a unit".to_owned() };
    parse().map(Some).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit() {
        let timeout = |text: &str| {
            let headers = HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]);
            grpc_timeout(&headers)
        };
        for (text, millis) in
            [("2H", 7_200_000), ("3M", 180_000), ("4S", 4000), ("5m", 5), ("6000u", 6), ("7000000n", 7)]
        {
            assert_eq!(timeout(text).unwrap(), Some(Duration::from_millis(millis)), "{text}");
        }
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1.5S"] {
            assert!(timeout(wrong).is_err(), "{wrong}");
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()).unwrap(), None);
    }
}
