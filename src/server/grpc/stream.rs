//! Calls that are streams both ways, from messages in to messages out.

use axum::extract::Request;
use axum::response::Response;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::call::check_encoding;
use super::context::{Context, Head};
use super::failed;
use super::incoming::Messages;
use super::outgoing::{Answer, Sending, respond};
use crate::server::error::ServerError;
use crate::server::state::AppState;

/// Messages of a stream that are computed at once.
const WINDOW: usize = 32;

/// Ends a message's work when its stream is left.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a stream tells next.
enum Turn<Res> {
    /// The answer to a message.
    Message(AbortOnDrop<Result<Answer<Res>, Status>>),
    /// Why there is no other.
    End(Status),
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
        Err(error) => return failed(&app, &error).into_http(),
    };
    let (started, turns) = mpsc::channel(WINDOW);
    let (out, answers) = mpsc::channel(1);
    // Both tasks end when the client leaves: its stream drops `answers`, and so on backwards.
    tokio::spawn(read(head, Messages::of(&app, request, 0), started, answer));
    tokio::spawn(deliver(turns, out));
    respond(Sending::new(ReceiverStream::new(answers)))
}

/// Begins the work of every message that comes.
async fn read<Req, Res, F, Fut>(head: Head, mut messages: Messages<Req>, started: mpsc::Sender<Turn<Res>>, answer: F)
where
    Req: Message + Default,
    Res: Message + 'static,
    F: Fn(Context, Req) -> Fut,
    Fut: Future<Output = Result<Answer<Res>, ServerError>> + Send + 'static,
{
    loop {
        let received = tokio::select! {
            received = messages.next() => received,
            // A failure has ended the stream, or its client has left.
            () = started.closed() => return,
        };
        let begun = match received {
            // What breaks the body has taken the client along.
            Ok(None) | Err(ServerError::Body) => return,
            Ok(Some((message, memory))) => head.context_of_message(memory).map(|context| answer(context, message)),
            Err(error) => Err(error),
        };
        let turn = match begun {
            Ok(answering) => {
                let app = head.app.clone();
                let work = async move { answering.await.map_err(|error| failed(&app, &error)) };
                Turn::Message(AbortOnDrop(tokio::spawn(work)))
            }
            // Told in its place, and the end.
            Err(error) => Turn::End(failed(&head.app, &error)),
        };
        let ends = matches!(turn, Turn::End(_));
        if started.send(turn).await.is_err() || ends {
            return;
        }
    }
}

/// An answer, and its share of the memory.
type Told<Res> = (Result<Res, Status>, Option<OwnedSemaphorePermit>);

/// Hands the answers over in the order of their messages, up to the first failure.
async fn deliver<Res>(mut turns: mpsc::Receiver<Turn<Res>>, out: mpsc::Sender<Told<Res>>) {
    loop {
        let told = async {
            match turns.recv().await? {
                Turn::Message(mut work) => {
                    Some((&mut work.0).await.unwrap_or_else(|_| Err(Status::internal("internal error"))))
                }
                Turn::End(status) => Some(Err(status)),
            }
        };
        let answer = tokio::select! {
            answer = told => answer,
            // What is computed for a client that has left is given up at once.
            () = out.closed() => return,
        };
        let told = match answer {
            Some(Ok(Answer { message, memory })) => (Ok(message), memory),
            Some(Err(status)) => (Err(status), None),
            None => return,
        };
        let ends = told.0.is_err();
        if out.send(told).await.is_err() || ends {
            return;
        }
    }
}
