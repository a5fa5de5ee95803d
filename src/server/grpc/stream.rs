//! Calls that are streams both ways, from messages in to messages out.

use std::time::Duration;

use axum::extract::Request;
use axum::response::Response;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::call::check_encoding;
use super::context::{Context, Head};
use super::incoming::Messages;
use super::outgoing::{Answer, Sending, respond};
use super::{Failure, Streamed, failed};
use crate::server::error::{OK, ServerError};
use crate::server::state::{AppState, WorkGuard};
use crate::telemetry::InFlight;

/// Messages of a stream that are computed at once.
const WINDOW: usize = 32;

/// Ends a message's work when its stream is left.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Counts a message as a request from its arrival until its answer has been sent: a drain waits for that.
struct Underway {
    start: Instant,
    _work: WorkGuard,
    _in_flight: InFlight,
}

impl Underway {
    fn new(app: &AppState) -> Self {
        Self { start: Instant::now(), _work: app.work.begin(), _in_flight: app.metrics.in_flight() }
    }
}

/// What a stream tells next.
enum Turn<Res> {
    /// The answer to a message, and when there was one.
    Message(AbortOnDrop<(Result<Answer<Res>, Failure>, Instant)>, Underway),
    /// Why a message is not answered, which ends the stream.
    Refused(Failure),
    /// Why no more messages are read.
    Stopped(Failure),
}

/// Messages in, as many messages out, in their order; up to [`WINDOW`] of them are computed at once.
pub(super) async fn streaming<Req, Res, F, Fut>(app: AppState, request: Request, answer: F) -> Response
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
    F: Fn(Context, Req) -> Fut + Send + 'static,
    Fut: Future<Output = Result<Answer<Res>, ServerError>> + Send + 'static,
{
    if let Err(status) = check_encoding(&request) {
        return status.into_http();
    }
    let head = match Head::of(&app, &request) {
        Ok(head) => head,
        Err(error) => return failed(&app, &error).into_response(),
    };
    let (started, turns) = mpsc::channel(WINDOW);
    let (out, answers) = mpsc::channel(1);
    // Both tasks end when the client leaves: its stream drops `answers`, and so on backwards.
    tokio::spawn(read(head.clone(), Messages::of(&app, request, 0), started, answer));
    tokio::spawn(deliver(head, turns, out));
    let mut response = respond(Sending::new(ReceiverStream::new(answers)));
    response.extensions_mut().insert(Streamed);
    response
}

/// Begins the work of every message that comes, until there are no more or the service stops.
async fn read<Req, Res, F, Fut>(head: Head, mut messages: Messages<Req>, started: mpsc::Sender<Turn<Res>>, answer: F)
where
    Req: Message + Default,
    Res: Message + 'static,
    F: Fn(Context, Req) -> Fut,
    Fut: Future<Output = Result<Answer<Res>, ServerError>> + Send + 'static,
{
    loop {
        let received = tokio::select! {
            biased;
            // Refuses nobody anything, so that it is not counted.
            () = head.app.readiness.draining() => {
                started.send(Turn::Stopped(Failure::of(&ServerError::DRAINING))).await.ok();
                return;
            }
            received = messages.next() => received,
            // A failure has ended the stream, or its client has left.
            () = started.closed() => return,
        };
        let begun = match received {
            // What breaks the body has taken the client along.
            Ok(None) | Err(ServerError::Body) => return,
            Ok(Some((message, memory))) => {
                // First counted, then asked, as every request: see `Work`.
                let underway = Underway::new(&head.app);
                match head.app.readiness.is_draining() {
                    true => Err(ServerError::DRAINING),
                    false => head.context_of_message(memory).map(|context| (answer(context, message), underway)),
                }
            }
            Err(error) => Err(error),
        };
        let turn = match begun {
            Ok((answering, underway)) => {
                let app = head.app.clone();
                let work = async move {
                    let answer = answering.await.map_err(|error| failed(&app, &error));
                    (answer, Instant::now())
                };
                Turn::Message(AbortOnDrop(tokio::spawn(work)), underway)
            }
            // Told in its place, and the end.
            Err(error) => Turn::Refused(failed(&head.app, &error)),
        };
        let ends = matches!(turn, Turn::Refused(_));
        if started.send(turn).await.is_err() || ends {
            return;
        }
    }
}

/// An answer, and what is held until it has been sent: its share of the memory, and its place among the requests.
type Told<Res> = (Result<Res, Status>, (Option<OwnedSemaphorePermit>, Option<Underway>));

/// Counts the answers and hands them over in the order of their messages, up to the first failure.
async fn deliver<Res>(head: Head, mut turns: mpsc::Receiver<Turn<Res>>, out: mpsc::Sender<Told<Res>>) {
    loop {
        let told = async {
            match turns.recv().await? {
                Turn::Message(mut work, underway) => {
                    let internal = |_| (Err(Failure::of(&ServerError::Internal)), Instant::now());
                    let (answer, end) = (&mut work.0).await.unwrap_or_else(internal);
                    // It may have waited for its turn behind a client that takes its time.
                    let took = end.duration_since(underway.start);
                    Some((answer, Some(took), Some(underway)))
                }
                Turn::Refused(failure) => Some((Err(failure), Some(Duration::ZERO), None)),
                Turn::Stopped(failure) => Some((Err(failure), None, None)),
            }
        };
        let told = tokio::select! {
            told = told => told,
            // What is computed for a client that has left is given up at once.
            () = out.closed() => return,
        };
        let Some((answer, took, underway)) = told else { return };
        if let Some(took) = took {
            head.count(answer.as_ref().err().map_or(OK, |failure| failure.code), took);
        }
        let told = match answer {
            Ok(Answer { message, memory }) => (Ok(message), (memory, underway)),
            Err(Failure { status, .. }) => (Err(status), (None, underway)),
        };
        let ends = told.0.is_err();
        if out.send(told).await.is_err() || ends {
            return;
        }
    }
}
