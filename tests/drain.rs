//! The end of a service: what was accepted is finished, what comes after is told to go elsewhere.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "security/http2.rs"]
#[allow(dead_code, reason = "a part of it is needed here")]
mod http2;
mod service;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use niwaki::telemetry::{RejectReason, Route};
use serde_json::json;
use service::{Client, SLOW_TIME, Serving, ids, pooled, serving, unit};
use tokio::net::TcpStream;

fn embed_request(text: &str) -> Vec<u8> {
    let body = json!({"inputs": text}).to_string();
    Client::request("POST", "/embed", &[("content-type", "application/json")], body.as_bytes())
}

async fn running(serving: &Serving) {
    while serving.service.engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_everything_accepted_is_answered() {
    const CLIENTS: usize = 32;
    let mut serving = serving(Duration::from_secs(20), |setup| {
        setup.batch_time = Duration::from_millis(5);
        setup.limits.max_batch_requests = Some(2);
    })
    .await;
    let draining = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let refused = Arc::new(AtomicU64::new(0));
    let address = serving.address;
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|index| {
            let (draining, answered, refused) = (Arc::clone(&draining), Arc::clone(&answered), Arc::clone(&refused));
            tokio::spawn(async move {
                let text = ["the tree", "a b c d", "gardens"][index % 3];
                let expected = vec![unit(&pooled(&ids(text)))];
                let mut turn = 0;
                'connections: loop {
                    let connected = Client::connect(address).await;
                    let Ok(mut client) = connected else {
                        assert!(draining.load(Ordering::SeqCst), "refused before the end");
                        return;
                    };
                    loop {
                        turn += 1;
                        let was_draining = draining.load(Ordering::SeqCst);
                        let sent = client.send(&embed_request(text)).await;
                        let answer = match sent {
                            Ok(()) => client.answer().await,
                            Err(error) => Err(error),
                        };
                        match answer {
                            Ok(answer) if answer.status == 200 => {
                                assert_eq!(answer.read::<Vec<Vec<f32>>>(), expected, "client {index} turn {turn}");
                                answered.fetch_add(1, Ordering::SeqCst);
                                if answer.header("connection") == "close" {
                                    continue 'connections;
                                }
                            }
                            Ok(answer) => {
                                assert_eq!(answer.status, 503, "client {index} turn {turn}");
                                assert!(draining.load(Ordering::SeqCst));
                                assert_eq!(answer.header("connection"), "close");
                                assert_eq!(answer.header("retry-after"), "1");
                                assert_eq!(
                                    answer.json(),
                                    json!({"error": "the service is stopping", "error_type": "Unhealthy"})
                                );
                                refused.fetch_add(1, Ordering::SeqCst);
                                continue 'connections;
                            }
                            Err(error) => {
                                // Only a request that was sent into the end itself, and never a part of an answer.
                                assert!(draining.load(Ordering::SeqCst), "{error} before the end");
                                assert!(!client.has_part(), "an answer was cut");
                                assert!(was_draining, "client {index} turn {turn}: accepted and not answered: {error}");
                                continue 'connections;
                            }
                        }
                    }
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let busy = serving.service.engine.load();
    assert!(busy.admitted_sequences > 8, "{busy:?}");
    // Requests that were sent before this line may be refused, but must be answered.
    draining.store(true, Ordering::SeqCst);
    serving.stop();
    let start = Instant::now();
    serving.ended.await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    for task in tasks {
        task.await.unwrap();
    }
    let metrics = &serving.service.metrics;
    let (answered, refused) = (answered.load(Ordering::SeqCst), refused.load(Ordering::SeqCst));
    assert!(answered > 100, "{answered}");
    // Whatever the service counts as answered has reached its client.
    assert_eq!(metrics.responses(Route::Embed, 200), answered);
    assert_eq!(metrics.responses(Route::Embed, 503), refused);
    assert_eq!(metrics.rejections(RejectReason::Draining), refused);
    assert_eq!(metrics.batches().1, answered, "nothing was computed for nobody");
    assert_eq!((metrics.cancellations(), metrics.requests_in_flight()), (0, 0));
    assert_eq!(serving.service.engine.load(), niwaki::engine::Load::default());
}

/// A client that connects for every request cannot know that the end is near: once connected it is answered, if only with
/// a refusal. (Between the last connection that is accepted and the port's end lie microseconds, in which one may come.)
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_were_made_before_the_end_are_answered() {
    const CLIENTS: usize = 12;
    let mut serving = serving(Duration::from_secs(20), |setup| setup.batch_time = Duration::from_millis(2)).await;
    let address = serving.address;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            tokio::spawn(async move {
                let (mut answered, mut lost) = (0, 0);
                // Until nobody listens any more.
                while let Ok(mut client) = Client::connect(address).await {
                    let answer = match client.send(&embed_request("the tree")).await {
                        Ok(()) => client.answer().await,
                        Err(error) => Err(error),
                    };
                    match answer {
                        Ok(answer) => {
                            assert!([200, 503].contains(&answer.status), "{}", answer.status);
                            answered += 1;
                        }
                        Err(_) => lost += 1,
                    }
                }
                (answered, lost)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    serving.stop();
    serving.ended.await.unwrap().unwrap();
    let (mut answered, mut lost) = (0, 0);
    for client in clients {
        let (a, l) = client.await.unwrap();
        (answered, lost) = (answered + a, lost + l);
    }
    assert!(answered > 100 && lost <= 1, "{answered} answered, {lost} lost");
}

#[tokio::test]
async fn probes_and_refusals_are_answered_while_work_finishes() {
    let mut serving = serving(Duration::from_secs(5), |_| {}).await;
    let address = serving.address;
    let mut slow = Client::connect(address).await.unwrap();
    slow.send(&embed_request("slow")).await.unwrap();
    running(&serving).await;
    let mut idle = Client::connect(address).await.unwrap();
    assert_eq!(idle.get("/health/ready").await.unwrap().status, 200);
    serving.stop();
    while Client::connect(address).await.unwrap().get("/health/ready").await.unwrap().status == 200 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut fresh = Client::connect(address).await.unwrap();
    assert_eq!(fresh.get("/health/live").await.unwrap().status, 200);
    let mut fresh = Client::connect(address).await.unwrap();
    assert_eq!(fresh.get("/health").await.unwrap().status, 200);
    let refused = idle.post("/embed", &json!({"inputs": "a"})).await.unwrap();
    assert_eq!((refused.status, refused.header("connection")), (503, "close"));
    assert!(idle.is_closed().await);
    let answer = slow.answer().await.unwrap();
    assert_eq!(answer.read::<Vec<Vec<f32>>>(), [unit(&pooled(&ids("slow")))]);
    serving.ended.await.unwrap().unwrap();
    assert!(Client::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn idle_and_silent_connections_hold_nothing_up() {
    let mut serving = serving(Duration::from_secs(30), |_| {}).await;
    let mut idle = Client::connect(serving.address).await.unwrap();
    assert_eq!(idle.get("/health").await.unwrap().status, 200);
    let mut silent = Client::connect(serving.address).await.unwrap();
    let mut half = Client::connect(serving.address).await.unwrap();
    half.send(b"GET /health HT").await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let start = Instant::now();
    serving.stop();
    serving.ended.await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(idle.is_closed().await && silent.is_closed().await && half.is_closed().await);
}

#[tokio::test]
async fn the_grace_is_a_bound() {
    let grace = SLOW_TIME / 4;
    let mut serving = serving(grace, |_| {}).await;
    let mut slow = Client::connect(serving.address).await.unwrap();
    slow.send(&embed_request("slow")).await.unwrap();
    running(&serving).await;
    let mut upload = Client::connect(serving.address).await.unwrap();
    upload
        .send(b"POST /embed HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
        .await
        .unwrap();
    let start = Instant::now();
    serving.stop();
    serving.ended.await.unwrap().unwrap();
    let took = start.elapsed();
    assert!(took >= grace && took < SLOW_TIME * 3 / 4, "{took:?}");
    assert!(slow.is_closed().await && upload.is_closed().await);
    assert_eq!(serving.service.metrics.cancellations(), 1);
    assert_eq!(serving.service.metrics.responses(Route::Embed, 200), 0);
}

#[tokio::test]
async fn an_answer_under_way_is_written_to_its_end() {
    let mut serving = serving(Duration::from_secs(5), |setup| {
        setup.config.max_client_batch_size = 16_000;
        setup.limits.max_concurrent_requests = 16_000;
    })
    .await;
    let inputs = vec!["a ".repeat(14); 4000];
    let body = json!({"inputs": inputs}).to_string();
    let mut client = Client::connect(serving.address).await.unwrap();
    let headers = [("content-type", "application/json")];
    client.send(&Client::request("POST", "/embed_all", &headers, body.as_bytes())).await.unwrap();
    while serving.service.metrics.responses(Route::EmbedAll, 200) == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    serving.stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let rows = client.answer().await.unwrap().read::<Vec<Vec<Vec<f32>>>>();
    assert_eq!((rows.len(), rows[3999].len()), (4000, 16));
    serving.ended.await.unwrap().unwrap();
}

/// Rows of an answer of some 90 kB, which a connection is handed in one piece.
const ROWS: usize = 1000;

/// A service with `grace`, and an answer of it whose client of HTTP/2 gives leave to send its first thousand bytes.
async fn held_answer(grace: Duration) -> (Serving, http2::Sender, hyper::Response<Incoming>) {
    let serving = serving(grace, |setup| {
        setup.config.max_client_batch_size = ROWS;
        setup.limits.max_concurrent_requests = 16_000;
    })
    .await;
    let mut client = http2::connect(TcpStream::connect(serving.address).await.unwrap(), Some(1000)).await;
    let body = json!({"inputs": vec!["the tree"; ROWS]}).to_string();
    let headers = [("content-type", "application/json")];
    let answer = http2::send(&mut client, "/embed", &headers, Full::from(body).boxed()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    (serving, client, answer)
}

/// What HTTP/2 keeps until its client gives leave to send it belongs to the answer.
#[tokio::test]
async fn an_answer_that_http2_holds_is_written_to_its_end() {
    let (mut serving, _client, answer) = held_answer(Duration::from_secs(20)).await;
    let start = Instant::now();
    serving.stop();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!serving.ended.is_finished());
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let rows: Vec<Vec<f32>> = serde_json::from_slice(&body).unwrap();
    assert_eq!(rows, vec![unit(&pooled(&ids("the tree"))); ROWS]);
    serving.ended.await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_client_of_http2_that_takes_nothing_is_cut_when_the_grace_ends() {
    let grace = Duration::from_secs(1);
    let (mut serving, _client, answer) = held_answer(grace).await;
    let start = Instant::now();
    serving.stop();
    serving.ended.await.unwrap().unwrap();
    let took = start.elapsed();
    assert!(took >= grace && took < grace * 4, "{took:?}");
    assert!(answer.into_body().collect().await.is_err());
}

#[tokio::test]
async fn clients_of_http2_without_requests_hold_nothing_up_for_long() {
    let mut serving = serving(Duration::from_secs(30), |_| {}).await;
    let idle = http2::connect(TcpStream::connect(serving.address).await.unwrap(), None).await;
    // One that begins (with empty settings) and then answers nothing, so that nobody knows whether it is still there.
    let mut mute = Client::connect(serving.address).await.unwrap();
    mute.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    serving.stop();
    serving.ended.await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    drop((idle, mute));
}

/// The first process of a container has no handlers but its own, and a model may be downloaded for minutes.
#[test]
fn a_server_that_loads_its_model_stops_at_once_when_it_is_told_to() {
    // A hub that accepts and says nothing.
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let mut child = service::process::serve("info", &["--model-id", "org/name"])
        .env("HF_ENDPOINT", format!("http://{}", hub.local_addr().unwrap()))
        .env("HUGGINGFACE_HUB_CACHE", cache.path())
        .env("NO_PROXY", "127.0.0.1")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("TRANSFORMERS_OFFLINE")
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _connection = hub.accept().unwrap();
    let signal = |name: &str| {
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args([name, &pid]).status().unwrap().success());
    };
    signal("-HUP");
    std::thread::sleep(Duration::from_millis(200));
    signal("-TERM");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(10) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(0), "{status}");
}
