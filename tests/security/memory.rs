//! The memory for requests and answers is one, whatever they come by.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use niwaki::server::grpc::messages::{EmbedAllRequest, EmbedRequest, EncodeRequest};
use niwaki::server::{Listeners, serve};
use niwaki::telemetry::RejectReason;
use prost::Message;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tower::ServiceExt;

use super::http2;
use crate::service::{Client, MAX_TOKENS, Service, Setup, post, service};

const HEADERS: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

/// A service on two ports: HTTP and gRPC.
async fn serving(change: impl FnOnce(&mut Setup)) -> (Service, SocketAddr, SocketAddr) {
    let service = service(change);
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (http, grpc) = (bind().await, bind().await);
    let addresses = (http.local_addr().unwrap(), grpc.local_addr().unwrap());
    let listeners = Listeners { http, grpc: Some(grpc), admin: None };
    tokio::spawn(serve(listeners, service.state.clone(), std::future::pending(), Duration::from_secs(5)));
    (service, addresses.0, addresses.1)
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A body that is sent piece by piece, until the sender is dropped.
fn pieces() -> (mpsc::Sender<Result<Frame<Bytes>, std::convert::Infallible>>, http2::Body) {
    let (pieces, body) = mpsc::channel(1);
    (pieces, StreamBody::new(ReceiverStream::new(body)).boxed())
}

/// `message` as it goes over the wire.
fn framed(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    [&[0], u32::try_from(bytes.len()).unwrap().to_be_bytes().as_slice(), &bytes].concat()
}

fn code(headers: &axum::http::HeaderMap) -> Code {
    Status::from_header_map(headers).unwrap().code()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_grpc_take_from_the_memory_of_bodies_before_they_come() {
    const LEN: usize = 900_000;
    // Two such messages fit.
    let (service, http, grpc) = serving(|setup| setup.config.max_body_bytes = 2_000_000).await;
    let client = http2::connect(TcpStream::connect(grpc).await.unwrap(), None).await;
    let text = "a ".repeat(LEN / 2 - 50);
    let whole = framed(&EmbedRequest { inputs: text.clone(), truncate: true, ..EmbedRequest::default() });
    let (mut senders, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (sender, body) = pieces();
        // Its length, and the first of it.
        sender.send(Ok(Frame::data(Bytes::copy_from_slice(&whole[..1000])))).await.unwrap();
        senders.push(sender);
        let mut client = client.clone();
        calls.push(tokio::spawn(async move {
            let answer = http2::send(&mut client, "/tei.v1.Embed/Embed", &HEADERS, body).await.unwrap();
            code(answer.headers())
        }));
    }
    let refused = || service.metrics.rejections(RejectReason::Memory);
    until("one is too many", || refused() > 0).await;
    // What they hold is not there for HTTP either.
    let mut other = Client::connect(http).await.unwrap();
    assert_eq!(other.post("/embed", &json!({"inputs": text})).await.unwrap().status, 429);
    assert_eq!(refused(), 2);
    drop(senders);
    let mut codes = Vec::new();
    for call in calls {
        codes.push(call.await.unwrap());
    }
    codes.sort_by_key(|&code| code as i32);
    assert_eq!(codes, [Code::InvalidArgument, Code::InvalidArgument, Code::ResourceExhausted], "two were cut off");
    // It is free again.
    let mut client = client;
    let body = Full::from(whole).boxed();
    let answer = http2::send(&mut client, "/tei.v1.Embed/Embed", &HEADERS, body).await.unwrap();
    let answer = answer.into_body().collect().await.unwrap();
    assert_eq!(code(answer.trailers().unwrap()), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_a_stream_hold_their_memory_until_they_are_taken() {
    // Seven KiB, and an answer takes one.
    let (service, _, grpc) = serving(|setup| {
        setup.config.payload_limit = 4000;
        setup.config.max_body_bytes = 8000;
    })
    .await;
    // Leave for a thousand bytes: one answer and a part of another.
    let mut client = http2::connect(TcpStream::connect(grpc).await.unwrap(), Some(1000)).await;
    let (sender, body) = pieces();
    let text = "a ".repeat(MAX_TOKENS - 2);
    let message = framed(&EmbedAllRequest { inputs: text.clone(), ..EmbedAllRequest::default() });
    let answer = http2::send(&mut client, "/tei.v1.Embed/EmbedAllStream", &HEADERS, body).await.unwrap();
    let refused = || service.metrics.rejections(RejectReason::Memory);
    let computed = || service.metrics.batches().1;
    for n_sent in 1..=20 {
        if refused() > 0 {
            break;
        }
        sender.send(Ok(Frame::data(message.clone().into()))).await.unwrap();
        until("it is computed or refused", || computed() == n_sent || refused() > 0).await;
    }
    assert_eq!(refused(), 1);
    let n_answers = computed();
    assert!((7..=14).contains(&n_answers), "{n_answers} answers were held");
    // What there was memory for is told, and then why no more.
    let answer = answer.into_body().collect().await.unwrap();
    assert_eq!(code(answer.trailers().unwrap()), Code::ResourceExhausted);
    assert!(answer.trailers().unwrap().contains_key("retry-after"));
    let mut bytes = answer.to_bytes();
    for _ in 0..n_answers {
        let head = bytes.split_to(5);
        drop(bytes.split_to(u32::from_be_bytes(head[1..].try_into().unwrap()) as usize));
    }
    assert!(bytes.is_empty());
    // It is free again: this text takes four KiB of it.
    let large = EmbedAllRequest { inputs: "a ".repeat(1900), truncate: true, ..EmbedAllRequest::default() };
    let body = Full::from(framed(&large)).boxed();
    let answer = http2::send(&mut client, "/tei.v1.Embed/EmbedAllStream", &HEADERS, body).await.unwrap();
    let answer = answer.into_body().collect().await.unwrap();
    assert_eq!(code(answer.trailers().unwrap()), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_grpc_hold_their_memory_until_they_are_taken() {
    // Four thousand tokens take some 260 KB.
    let (service, _, grpc) = serving(|setup| {
        setup.config.payload_limit = 100_000;
        setup.config.max_body_bytes = 400_000;
    })
    .await;
    let request = EncodeRequest { inputs: "!".repeat(4000), add_special_tokens: false, prompt_name: None };
    let message = framed(&request);
    let client = http2::connect(TcpStream::connect(grpc).await.unwrap(), Some(1000)).await;
    let tokenize = async || {
        let (mut client, body) = (client.clone(), Full::from(message.clone()).boxed());
        http2::send(&mut client, "/tei.v1.Tokenize/Tokenize", &HEADERS, body).await.unwrap()
    };
    let first = tokenize().await;
    assert!(Status::from_header_map(first.headers()).is_none(), "it has begun");
    assert_eq!(code(tokenize().await.headers()), Code::ResourceExhausted);
    assert_eq!(service.metrics.rejections(RejectReason::Memory), 1);
    let first = first.into_body().collect().await.unwrap();
    assert_eq!(code(first.trailers().unwrap()), Code::Ok);
    let second = tokenize().await.into_body().collect().await.unwrap();
    assert_eq!(code(second.trailers().unwrap()), Code::Ok);
}

#[tokio::test]
async fn answers_that_are_texts_hold_their_memory_until_they_are_taken() {
    let service = service(|setup| {
        setup.classify(&["LABEL_0"]);
        setup.config.payload_limit = 1_000_000;
        setup.config.max_body_bytes = 1_000_000;
    });
    let text = "a ".repeat(300_000);
    for (path, body) in [
        ("/rerank", json!({"query": "a", "texts": [text], "return_text": true})),
        ("/v1/rerank", json!({"query": "a", "documents": [text], "return_documents": true})),
        ("/decode", json!({"ids": vec![vec![6; 4000]; 32]})),
    ] {
        let answer = service.router.clone().oneshot(post(path, &body)).await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        assert_eq!(service.post(path, body.clone()).await.status, 429, "{path}");
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(bytes.len() > 500_000, "{path}");
        drop(bytes);
        assert_eq!(service.post(path, body).await.status, 200, "{path}");
    }
}
