//! What only shows on a connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use niwaki::telemetry::{RejectReason, Route, Stage};
use serde_json::json;

use crate::service::{Client, SLOW_TIME, Serving, ids, pooled, serving, unit};

const GRACE: Duration = Duration::from_secs(5);

async fn client(serving: &Serving) -> Client {
    Client::connect(serving.address).await.unwrap()
}

#[tokio::test]
async fn a_connection_serves_many_requests() {
    let serving = serving(GRACE, |_| {}).await;
    let mut client = client(&serving).await;
    for text in ["the", "the tree", "a b c d"] {
        let rows = client.post("/embed", &json!({"inputs": text})).await.unwrap().read::<Vec<Vec<f32>>>();
        assert_eq!(rows, [unit(&pooled(&ids(text)))]);
    }
    assert_eq!(client.get("/health").await.unwrap().status, 200);
    assert_eq!(client.post("/embed", &json!({"inputs": ""})).await.unwrap().status, 400);
    assert_eq!(client.get("/health/ready").await.unwrap().status, 200);
    // A probe, and a body in pieces.
    let head =
        b"POST /embed HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    client.send(head).await.unwrap();
    for piece in ["a\r\n{\"inputs\":\r\n", "8\r\n \"the\"  \r\n", "1\r\n}\r\n", "0\r\n\r\n"] {
        client.send(piece.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(client.answer().await.unwrap().read::<Vec<Vec<f32>>>(), [unit(&pooled(&ids("the")))]);
}

#[tokio::test]
async fn too_large_a_body_gets_its_answer_while_it_is_sent() {
    let serving = serving(GRACE, |setup| setup.config.payload_limit = 100_000).await;
    for chunked in [false, true] {
        let mut client = client(&serving).await;
        let framing = if chunked { "transfer-encoding: chunked" } else { "content-length: 6291456" };
        let head = format!("POST /embed HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n{framing}\r\n\r\n");
        client.send(head.as_bytes()).await.unwrap();
        // The client sends it all before it looks for an answer.
        for _ in 0..96 {
            let piece = [b' '; 65_536];
            if chunked {
                client.send(b"10000\r\n").await.unwrap();
            }
            client.send(&piece).await.unwrap();
            if chunked {
                client.send(b"\r\n").await.unwrap();
            }
        }
        if chunked {
            client.send(b"0\r\n\r\n").await.unwrap();
        }
        let answer = client.answer().await.unwrap();
        assert_eq!(answer.status, 413, "chunked: {chunked}");
        let message = "the body is larger than the limit of 100000 bytes";
        assert_eq!(answer.json(), json!({"error": message, "error_type": "PayloadTooLarge"}));
        // And can go on.
        assert_eq!(client.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
    }
    assert_eq!(serving.service.metrics.responses(Route::Embed, 413), 2);
    assert_eq!(serving.service.metrics.rejections(RejectReason::Payload), 2);
}

#[tokio::test]
async fn a_client_that_asks_for_leave_is_refused_before_it_sends() {
    let serving = serving(GRACE, |_| {}).await;
    let mut client = client(&serving).await;
    let head = "POST /embed HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n";
    client.send(format!("{head}content-length: 3000000\r\n\r\n").as_bytes()).await.unwrap();
    assert_eq!(client.answer().await.unwrap().status, 413);
    let mut client = self::client(&serving).await;
    let body = json!({"inputs": "a"}).to_string();
    client.send(format!("{head}content-length: {}\r\n\r\n", body.len()).as_bytes()).await.unwrap();
    assert_eq!(client.answer().await.unwrap().status, 100);
    client.send(body.as_bytes()).await.unwrap();
    assert_eq!(client.answer().await.unwrap().status, 200);
}

#[tokio::test]
async fn slow_clients_are_given_up() {
    let serving = serving(GRACE, |setup| {
        setup.config.body_timeout = Duration::from_millis(100);
        setup.config.head_timeout = Duration::from_millis(150);
    })
    .await;
    // The body does not come.
    let mut slow_body = client(&serving).await;
    slow_body
        .send(b"POST /embed HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
        .await
        .unwrap();
    let answer = slow_body.answer().await.unwrap();
    assert_eq!((answer.status, answer.json()["error_type"].clone()), (408, json!("Timeout")));
    // Nothing comes, or the head stays unfinished.
    for begin in [b"".as_slice(), b"P", b"PR", b"PRI", b"PRI * HT", b"POST /embed HTTP/1.1\r\nhost:"] {
        let mut silent = client(&serving).await;
        silent.send(begin).await.unwrap();
        let start = Instant::now();
        while !silent.is_closed().await {}
        let waited = start.elapsed();
        assert!(waited > Duration::from_millis(100) && waited < Duration::from_secs(2), "{begin:?}: {waited:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_work() {
    let serving = serving(GRACE, |setup| setup.n_workers = 1).await;
    let engine = &serving.service.engine;
    let send = async |text: &str| {
        let mut client = client(&serving).await;
        let body = json!({"inputs": text}).to_string();
        let headers = [("content-type", "application/json")];
        client.send(&Client::request("POST", "/embed", &headers, body.as_bytes())).await.unwrap();
        client
    };
    let running = send("slow").await;
    while engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
    let waiting = send("a b c").await;
    while engine.load().queued_sequences == 0 {
        tokio::task::yield_now().await;
    }
    drop(waiting);
    let start = Instant::now();
    while engine.load().queued_sequences > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(start.elapsed() < SLOW_TIME / 2, "it left the queue at once");
    drop(running);
    while serving.service.metrics.cancellations() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    while serving.service.metrics.requests_in_flight() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    engine.drained().await;
    assert_eq!(serving.service.metrics.responses(Route::Embed, 200), 0, "nobody was there to be answered");
    assert_eq!(serving.service.metrics.batches().1, 1, "what waited was not computed");
}

#[tokio::test]
async fn a_client_that_does_not_read_does_not_hold_its_answer_for_ever() {
    let serving = serving(GRACE, |setup| {
        setup.config.max_client_batch_size = 16_000;
        setup.config.body_timeout = Duration::from_millis(300);
        setup.limits.max_concurrent_requests = 16_000;
        setup.config.max_body_bytes = 2_000_000;
    })
    .await;
    // 16 rows of 8 numbers for each of 6,000 inputs: some 8 MB of JSON, more than the system's buffers hold.
    let body = json!({"inputs": vec!["a ".repeat(14); 6000]}).to_string();
    let headers = [("content-type", "application/json")];
    let mut client = client(&serving).await;
    client.send(&Client::request("POST", "/embed_all", &headers, body.as_bytes())).await.unwrap();
    while serving.service.metrics.responses(Route::EmbedAll, 200) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // While it is held, its share of the memory is not to be had; after the timeout it is.
    let probe = async || {
        let mut other = self::client(&serving).await;
        let body = json!({"inputs": vec!["a ".repeat(14); 5000]}).to_string();
        other.send(&Client::request("POST", "/embed_all", &headers, body.as_bytes())).await.unwrap();
        other.answer().await.unwrap().status
    };
    assert_eq!(probe().await, 429);
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(probe().await, 200);
    assert_eq!(serving.service.metrics.stages(Stage::Serialize), 1, "the first was never written to its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_reconcile_with_responses_under_concurrent_load() {
    const CLIENTS: usize = 24;
    const REQUESTS: usize = 60;
    let serving = serving(GRACE, |setup| {
        setup.batch_time = Duration::from_micros(500);
        setup.limits.max_concurrent_requests = 8;
        setup.config.payload_limit = 70_000;
    })
    .await;
    let seen: Arc<[[AtomicU64; 600]; 4]> =
        Arc::new(std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))));
    let routes = [Route::Embed, Route::OpenAiEmbeddings, Route::Other, Route::Tokenize];
    let address = serving.address;
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|index| {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut client = Client::connect(address).await.unwrap();
                for turn in 0..REQUESTS {
                    let (route, body) = match (index + turn) % 9 {
                        0..=3 => (0, json!({"inputs": "the tree"})),
                        4 => (0, json!({"inputs": ["a", ""]})),
                        5 => (1, json!({"input": ["a", "b"]})),
                        6 => (1, json!({"input": 7})),
                        7 => (2, json!({})),
                        _ => (3, json!({"inputs": "x".repeat(80_000)})),
                    };
                    let path = ["/embed", "/v1/embeddings", "/no/such/route", "/tokenize"][route];
                    let answer = client.post(path, &body).await.unwrap();
                    seen[route][usize::from(answer.status)].fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let metrics = &serving.service.metrics;
    let mut total = 0;
    for (route, seen) in routes.iter().zip(seen.iter()) {
        for (code, seen) in seen.iter().enumerate() {
            let seen = seen.load(Ordering::Relaxed);
            assert_eq!(metrics.responses(*route, u16::try_from(code).unwrap()), seen, "{route} {code}");
            total += seen;
        }
    }
    assert_eq!(total, (CLIENTS * REQUESTS) as u64);
    let of = |route: usize, code: usize| seen[route][code].load(Ordering::Relaxed);
    assert!(of(0, 200) > 0 && of(0, 400) > 0 && of(1, 422) > 0 && of(2, 404) > 0 && of(3, 413) > 0);
    let answered = of(0, 200) + of(1, 200);
    assert_eq!(metrics.stages(Stage::Infer), answered);
    assert_eq!(metrics.stages(Stage::Queue), answered);
    assert_eq!(metrics.stages(Stage::Serialize), answered);
    assert_eq!(metrics.batches().1, of(0, 200) + 2 * of(1, 200));
    assert_eq!(metrics.rejections(RejectReason::Overload), of(0, 429) + of(1, 429));
    assert_eq!(metrics.rejections(RejectReason::Payload), of(3, 413));
    assert_eq!(metrics.rejections(RejectReason::Validation), of(0, 400) + of(1, 422));
    assert_eq!((metrics.requests_in_flight(), metrics.cancellations()), (0, 0));
    assert_eq!(serving.service.engine.load(), niwaki::engine::Load::default());
}
