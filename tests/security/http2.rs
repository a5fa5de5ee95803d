//! A client of HTTP/2 whose windows and headers are under the test's control.

use axum::body::Bytes;
use axum::http::{HeaderMap, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::service::Answer;

pub(crate) type Body = BoxBody<Bytes, std::convert::Infallible>;
pub(crate) type Sender = SendRequest<Body>;

/// A connection that may be sent `window` bytes of each answer before it is read.
pub(crate) async fn connect(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    window: Option<u32>,
) -> Sender {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).max_header_list_size(1 << 20);
    if let Some(window) = window {
        builder.initial_stream_window_size(window);
    }
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Sends a request; its answer's body is not read.
pub(crate) async fn send(
    sender: &mut Sender,
    path: &str,
    headers: &[(&str, &str)],
    body: Body,
) -> hyper::Result<Response<Incoming>> {
    let mut request = Request::post(format!("http://test{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    sender.ready().await?;
    sender.send_request(request.body(body).unwrap()).await
}

/// Posts JSON and reads the answer.
pub(crate) async fn post(
    sender: &mut Sender,
    path: &str,
    body: &Value,
    headers: &[(&str, &str)],
) -> hyper::Result<Answer> {
    let headers = [&[("content-type", "application/json")], headers].concat();
    let body = Full::from(body.to_string()).boxed();
    let (head, body) = send(sender, path, &headers, body).await?.into_parts();
    let headers: HeaderMap = head.headers;
    Ok(Answer { status: head.status.as_u16(), headers, body: body.collect().await?.to_bytes().to_vec() })
}
