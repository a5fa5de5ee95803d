//! Limits of connections: how many, how large, how slow.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use niwaki::server::{Listeners, serve};
use niwaki::telemetry::{Dropped, Port, RejectReason, Route};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::http2;
use crate::service::{Client, SLOW_TIME, Serving, Setup, service, serving};

const GRACE: Duration = Duration::from_secs(5);

async fn client(serving: &Serving) -> Client {
    Client::connect(serving.address).await.unwrap()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn heads_are_limited_in_both_versions() {
    let serving = serving(GRACE, |setup| setup.config.max_head_bytes = 16_384).await;
    let metrics = &serving.service.metrics;
    let value = |len: usize| "x".repeat(len);
    let body = json!({"inputs": "a"});
    // As one large header, and as many.
    let many: Vec<(String, String)> = (0..90).map(|index| (format!("x-{index}"), value(300))).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let (fits, large) = (value(15_000), value(20_000));
    for (headers, expected) in [
        (vec![("x-large", fits.as_str())], 200),
        (vec![("x-large", large.as_str())], 431),
        (many[..40].to_vec(), 200),
        (many.clone(), 431),
    ] {
        let mut client = client(&serving).await;
        let headers1 = [vec![("content-type", "application/json")], headers.clone()].concat();
        client.send(&Client::request("POST", "/embed", &headers1, body.to_string().as_bytes())).await.unwrap();
        assert_eq!(client.answer().await.unwrap().status, expected);
        if expected == 431 {
            assert!(client.is_closed().await);
        }
        let mut client = http2::connect(TcpStream::connect(serving.address).await.unwrap(), None).await;
        assert_eq!(http2::post(&mut client, "/embed", &body, &headers).await.unwrap().status, expected);
        // A connection of HTTP/2 can go on.
        assert_eq!(http2::post(&mut client, "/embed", &body, &[]).await.unwrap().status, 200);
    }
    // A path counts as the head does.
    let mut client = client(&serving).await;
    client.send(format!("GET /{} HTTP/1.1\r\nhost: t\r\n\r\n", value(20_000)).as_bytes()).await.unwrap();
    assert_eq!(client.answer().await.unwrap().status, 431);
    until("all are counted", || metrics.dropped(Dropped::HeadSize) == 3).await;
}

#[tokio::test]
async fn connections_are_limited_and_probes_get_through() {
    let serving = serving(GRACE, |setup| setup.config.max_connections = 3).await;
    let metrics = &serving.service.metrics;
    let mut inside = Vec::new();
    for _ in 0..3 {
        let mut client = client(&serving).await;
        assert_eq!(client.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
        inside.push(client);
    }
    assert_eq!((metrics.connections(Port::Http), metrics.dropped(Dropped::Limit)), (3, 0));
    // One too many: told so, and let go.
    let mut crowded = client(&serving).await;
    let answer = crowded.post("/embed", &json!({"inputs": "a"})).await.unwrap();
    assert_eq!((answer.status, answer.header("retry-after"), answer.header("connection")), (429, "1", "close"));
    assert_eq!(answer.json(), json!({"error": "too many connections", "error_type": "Overloaded"}));
    assert!(crowded.is_closed().await);
    for (path, expected) in [("/health/ready", 200), ("/metrics", 200), ("/v1/embeddings", 405)] {
        let mut probe = client(&serving).await;
        assert_eq!(probe.get(path).await.unwrap().status, expected, "{path}");
        assert!(probe.is_closed().await);
    }
    let mut client2 = http2::connect(TcpStream::connect(serving.address).await.unwrap(), None).await;
    assert_eq!(http2::post(&mut client2, "/embed", &json!({"inputs": "a"}), &[]).await.unwrap().status, 429);
    drop(client2);
    assert_eq!(metrics.rejections(RejectReason::Connections), 2);
    assert_eq!(metrics.responses(Route::Embed, 429), 2);
    // Those inside notice nothing, and the place of one that leaves is free.
    assert_eq!(inside[0].post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
    until("the others have gone", || metrics.connections(Port::Http) == 3).await;
    inside.pop();
    until("one has left", || metrics.connections(Port::Http) == 2).await;
    assert_eq!(client(&serving).await.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
}

/// A busy client of HTTP/2 never leaves a connection idle, and would be refused on it for ever.
#[tokio::test]
async fn a_connection_of_http2_that_was_one_too_many_is_ended_and_its_client_comes_again() {
    let serving = serving(GRACE, |setup| setup.config.max_connections = 1).await;
    let metrics = &serving.service.metrics;
    let body = json!({"inputs": "a"});
    let mut inside = client(&serving).await;
    assert_eq!(inside.post("/embed", &body).await.unwrap().status, 200);
    let connect = async || http2::connect(TcpStream::connect(serving.address).await.unwrap(), None).await;
    let mut crowded = connect().await;
    let start = Instant::now();
    let mut n_refused = 0;
    // Until the client is told to connect anew.
    while let Ok(answer) = http2::post(&mut crowded, "/embed", &body, &[]).await {
        assert_eq!(answer.status, 429);
        n_refused += 1;
        assert!(start.elapsed() < Duration::from_secs(10), "it stays for ever");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(1500) && n_refused > 3, "{took:?}, {n_refused}");
    until("its place is free", || metrics.connections(Port::Http) == 1).await;
    drop(inside);
    until("there is room", || metrics.connections(Port::Http) == 0).await;
    assert_eq!(http2::post(&mut connect().await, "/embed", &body, &[]).await.unwrap().status, 200);
}

/// Probes are answered on such a connection, and the answer of one has no end.
#[tokio::test]
async fn a_watch_of_grpcs_health_does_not_keep_a_place_beyond_the_limit() {
    let service = service(|setup| setup.config.max_connections = 1);
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (http, grpc) = (bind().await, bind().await);
    let address = grpc.local_addr().unwrap();
    let listeners = Listeners { http, grpc: Some(grpc), admin: None };
    tokio::spawn(serve(listeners, service.state.clone(), std::future::pending(), GRACE));
    let connect = async || http2::connect(TcpStream::connect(address).await.unwrap(), None).await;
    let metrics = &service.metrics;
    let mut clients = Vec::new();
    let mut watches = Vec::new();
    for n_connections in 1..=2 {
        let mut client = connect().await;
        let headers = [("content-type", "application/grpc"), ("te", "trailers")];
        let whole = Full::from(vec![0; 5]).boxed();
        let watch = http2::send(&mut client, "/grpc.health.v1.Health/Watch", &headers, whole).await.unwrap();
        let mut answer = watch.into_body();
        assert!(answer.frame().await.unwrap().unwrap().is_data());
        assert_eq!(metrics.connections(Port::Grpc), n_connections);
        clients.push(client);
        watches.push(answer);
    }
    until("the second is gone", || metrics.connections(Port::Grpc) == 1).await;
    assert!(watches[1].frame().await.is_none_or(|frame| frame.is_err()));
}

#[tokio::test]
async fn far_too_many_connections_are_not_answered_and_do_not_stay() {
    let serving = serving(GRACE, |setup| {
        setup.config.max_connections = 2;
        // Long enough for all to come before the first is given up.
        setup.config.head_timeout = Duration::from_secs(3);
    })
    .await;
    let metrics = &serving.service.metrics;
    let mut all = Vec::new();
    for _ in 0..200 {
        all.push(client(&serving).await);
    }
    until("all were seen", || metrics.dropped(Dropped::Limit) == 198).await;
    assert!(metrics.connections(Port::Http) <= 2 + 64);
    assert!(all.last_mut().unwrap().is_closed().await);
    // Who says nothing does not keep his place.
    until("the silent ones are gone", || metrics.connections(Port::Http) == 0).await;
    assert!(metrics.dropped(Dropped::HeadTimeout) >= 66);
    assert_eq!(client(&serving).await.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
}

#[tokio::test]
async fn heads_and_bodies_byte_by_byte_are_given_up() {
    let serving = serving(GRACE, |setup| {
        setup.config.body_timeout = Duration::from_millis(300);
        setup.config.head_timeout = Duration::from_millis(400);
    })
    .await;
    let metrics = &serving.service.metrics;
    let dribble = async |client: &mut Client, bytes: &[u8]| {
        for byte in bytes {
            if client.send(&[*byte]).await.is_err() || client.has_more().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    };
    let mut slow = client(&serving).await;
    let start = Instant::now();
    dribble(&mut slow, &b"GET /health HTTP/1.1\r\nx: ".iter().chain(&[b'y'; 400]).copied().collect::<Vec<_>>()).await;
    let took = start.elapsed();
    assert!(took > Duration::from_millis(350) && took < Duration::from_secs(3), "{took:?}");
    assert_eq!(metrics.dropped(Dropped::HeadTimeout), 1);
    let mut slow = client(&serving).await;
    let head = b"POST /embed HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n";
    slow.send(head).await.unwrap();
    dribble(&mut slow, &[b' '; 500]).await;
    assert_eq!(slow.answer().await.unwrap().status, 408);
    assert_eq!(metrics.responses(Route::Embed, 408), 1);
}

/// Asks for an answer of some 8 MB.
const LARGE: usize = 6000;

fn large(setup: &mut Setup) {
    setup.config.max_client_batch_size = 16_000;
    setup.config.body_timeout = Duration::from_millis(400);
    setup.limits.max_concurrent_requests = 16_000;
    setup.config.max_body_bytes = 4_000_000;
}

#[tokio::test]
async fn a_reader_of_single_bytes_is_given_up() {
    let serving = serving(GRACE, large).await;
    let metrics = &serving.service.metrics;
    let body = json!({"inputs": vec!["a ".repeat(14); LARGE]}).to_string();
    let mut client = client(&serving).await;
    let headers = [("content-type", "application/json")];
    client.send(&Client::request("POST", "/embed_all", &headers, body.as_bytes())).await.unwrap();
    let start = Instant::now();
    while metrics.dropped(Dropped::SlowReader) == 0 {
        client.read_byte().await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    until("nothing is left of it", || metrics.connections(Port::Http) == 0 && metrics.requests_in_flight() == 0).await;
}

#[tokio::test]
async fn a_client_of_http2_that_gives_no_leave_to_send_is_given_up() {
    let serving = serving(GRACE, large).await;
    let metrics = &serving.service.metrics;
    let body = json!({"inputs": vec!["a ".repeat(14); LARGE]});
    let stream = TcpStream::connect(serving.address).await.unwrap();
    let mut client = http2::connect(stream, Some(1000)).await;
    let headers = [("content-type", "application/json")];
    let held = http2::send(&mut client, "/embed_all", &headers, Full::from(body.to_string()).boxed()).await.unwrap();
    assert_eq!(held.status().as_u16(), 200);
    // The connection itself is in use all the time, and free.
    let start = Instant::now();
    let mut n_others = 0;
    while http2::post(&mut client, "/embed", &json!({"inputs": "a"}), &[]).await.is_ok() {
        n_others += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(350) && n_others > 3, "{took:?}, {n_others}");
    until("it is counted", || metrics.dropped(Dropped::SlowReader) == 1).await;
    until("nothing is left of it", || metrics.connections(Port::Http) == 0).await;
    drop(held);
    // Its memory is free again: that of one such answer is more than half of all.
    let stream = TcpStream::connect(serving.address).await.unwrap();
    let mut client = http2::connect(stream, None).await;
    let answer = http2::post(&mut client, "/embed_all", &body, &[]).await.unwrap();
    assert_eq!((answer.status, answer.json().as_array().unwrap().len()), (200, LARGE));
}

#[tokio::test]
async fn an_idle_connection_of_http2_is_closed_and_a_busy_one_is_not() {
    let serving = serving(GRACE, |setup| setup.config.head_timeout = Duration::from_millis(100)).await;
    let connect = async || http2::connect(TcpStream::connect(serving.address).await.unwrap(), None).await;
    let mut busy = connect().await;
    // Longer than an idle connection would be left open.
    let start = Instant::now();
    assert_eq!(http2::post(&mut busy, "/embed", &json!({"inputs": "slow"}), &[]).await.unwrap().status, 200);
    assert!(start.elapsed() >= SLOW_TIME && SLOW_TIME > Duration::from_millis(200));
    let idle = connect().await;
    let metrics = &serving.service.metrics;
    until("both are closed", || metrics.connections(Port::Http) == 0).await;
    assert!(idle.is_closed() && busy.is_closed());
}

/// An answer that a connection is handed in one piece is not with its client by that.
#[tokio::test]
async fn an_answer_in_one_piece_keeps_its_connection_of_http2_until_it_is_taken() {
    let body = json!({"inputs": vec!["a"; 1000]}).to_string();
    let ask = async |serving: &Serving| {
        let mut client = http2::connect(TcpStream::connect(serving.address).await.unwrap(), Some(1000)).await;
        let headers = [("content-type", "application/json")];
        let answer = http2::send(&mut client, "/embed", &headers, Full::from(body.clone()).boxed()).await.unwrap();
        (client, answer)
    };
    // Taken late: longer than an idle connection would be left open.
    let patient = serving(GRACE, |setup| {
        large(setup);
        setup.config.body_timeout = Duration::from_secs(30);
        setup.config.head_timeout = Duration::from_millis(200);
    })
    .await;
    let (_client, answer) = ask(&patient).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let taken = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(serde_json::from_slice::<Vec<Vec<f32>>>(&taken).unwrap().len(), 1000);
    // Not taken: given up long before the connection would be idle.
    let serving = serving(GRACE, large).await;
    let (_other, answer) = ask(&serving).await;
    let metrics = &serving.service.metrics;
    until("it is given up", || metrics.dropped(Dropped::SlowReader) == 1).await;
    until("nothing is left of it", || metrics.connections(Port::Http) == 0).await;
    assert!(answer.into_body().collect().await.is_err());
}

#[tokio::test]
async fn half_a_message_of_grpc_is_given_up_and_a_quiet_stream_is_not() {
    let service = service(|setup| setup.config.body_timeout = Duration::from_millis(200));
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (http, grpc) = (bind().await, bind().await);
    let address = grpc.local_addr().unwrap();
    let listeners = Listeners { http, grpc: Some(grpc), admin: None };
    tokio::spawn(serve(listeners, service.state.clone(), std::future::pending(), GRACE));
    let mut client = http2::connect(TcpStream::connect(address).await.unwrap(), None).await;
    let headers = [("content-type", "application/grpc"), ("te", "trailers")];
    let pieces = || {
        let (pieces, body) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, std::convert::Infallible>>(1);
        (pieces, StreamBody::new(ReceiverStream::new(body)).boxed())
    };
    // A frame of five bytes of which two come.
    let (sender, body) = pieces();
    sender.send(Ok(Frame::data(Bytes::from_static(&[0, 0, 0, 0, 5, 10, 3])))).await.unwrap();
    let start = Instant::now();
    let answer = http2::send(&mut client, "/tei.v1.Embed/Embed", &headers, body).await.unwrap();
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(start.elapsed() >= Duration::from_millis(150), "{:?}", start.elapsed());
    assert_eq!(service.metrics.rejections(RejectReason::Payload), 1);
    drop(sender);
    // A stream waits for its client.
    let (sender, body) = pieces();
    let message = Bytes::from_static(&[0, 0, 0, 0, 3, 10, 1, b'a']);
    sender.send(Ok(Frame::data(message.clone()))).await.unwrap();
    let answer = http2::send(&mut client, "/tei.v1.Embed/EmbedStream", &headers, body).await.unwrap();
    let mut body = answer.into_body();
    assert!(body.frame().await.unwrap().unwrap().is_data());
    tokio::time::sleep(Duration::from_millis(700)).await;
    sender.send(Ok(Frame::data(message))).await.unwrap();
    assert!(body.frame().await.unwrap().unwrap().is_data());
    drop(sender);
    let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    // But not in the middle of a message.
    let (sender, body) = pieces();
    sender.send(Ok(Frame::data(Bytes::from_static(&[0, 0, 0, 0, 5, 10, 3])))).await.unwrap();
    let answer = http2::send(&mut client, "/tei.v1.Embed/EmbedStream", &headers, body).await.unwrap();
    let trailers = answer.into_body().frame().await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(Status::from_header_map(&trailers).unwrap().code(), Code::DeadlineExceeded);
    // The client was slow: twice, in a call and in a stream.
    assert_eq!(service.metrics.responses(Route::GrpcEmbed, 408), 2);
    assert_eq!(service.metrics.responses(Route::GrpcEmbed, 504), 0);
    drop(sender);
}
