//! Ten thousand requests that mean nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod service;

use std::time::Duration;

use niwaki::telemetry::Route;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use service::{Answer, Client, ids, pooled, serving, unit};

const REQUESTS: usize = 10_000;
const CLIENTS: usize = 8;
const PAYLOAD_LIMIT: usize = 120_000;

const PATHS: [&str; 8] =
    ["/embed", "/embed_all", "/similarity", "/tokenize", "/decode", "/v1/embeddings", "/embeddings", "/"];

fn pick<'a, T>(random: &mut StdRng, from: &'a [T]) -> &'a T {
    &from[random.random_range(0..from.len())]
}

/// A value that no field of inputs takes, on any route.
fn wrong_value(random: &mut StdRng) -> Value {
    match random.random_range(0..12) {
        0 => json!(null),
        1 => json!(random.random_range(-1000..1000)),
        2 => json!(random.random_range(-1.0..1.0)),
        3 => json!(true),
        4 => json!({}),
        5 => json!({"a": [1]}),
        6 => json!([null]),
        7 => json!([[[1]]]),
        8 => json!([-1]),
        9 => json!([1.5, 2]),
        10 => json!([4_294_967_296u64]),
        _ => json!([{"a": 1}]),
    }
}

/// A body that is right for `path`, with `value` where the inputs belong.
#[allow(clippy::needless_pass_by_value, reason = "cases are made where they are used")]
fn with_inputs(path: &str, value: Value) -> Value {
    match path {
        "/v1/embeddings" | "/embeddings" => json!({"input": value}),
        "/similarity" => json!({"inputs": {"source_sentence": "a", "sentences": value}}),
        "/decode" => json!({"ids": value}),
        _ => json!({"inputs": value}),
    }
}

fn valid(path: &str) -> Value {
    match path {
        "/similarity" => with_inputs(path, json!(["the tree"])),
        "/decode" => with_inputs(path, json!([4, 5])),
        _ => with_inputs(path, json!("the tree")),
    }
}

fn json_type() -> Vec<(&'static str, &'static str)> {
    vec![("content-type", "application/json")]
}

type Malformed = (&'static str, Vec<(&'static str, &'static str)>, Vec<u8>);

/// Kind `kind` of request that must be refused, on `path`: the kind's name, headers, body.
fn malformed(kind: usize, path: &str, random: &mut StdRng) -> Malformed {
    let good = valid(path).to_string().into_bytes();
    match kind {
        0 => ("cut off", json_type(), good[..random.random_range(0..good.len())].to_vec()),
        1 => {
            let mut bytes = good;
            // A byte that JSON takes nowhere outside of strings, and no string here takes inside.
            let at = random.random_range(0..bytes.len());
            bytes[at] = *pick(random, &[0u8, 1, 0xff, 0xfe, 0x80, 0xc3, 0x1f]);
            ("broken byte", json_type(), bytes)
        }
        2 => {
            let n_bytes = random.random_range(1..300);
            let mut bytes: Vec<u8> = (0..n_bytes).map(|_| random.random_range(0..=255)).collect();
            bytes[0] = b'%';
            ("noise", json_type(), bytes)
        }
        3 => ("wrong type", json_type(), with_inputs(path, wrong_value(random)).to_string().into_bytes()),
        4 => {
            let value = wrong_value(random);
            (
                "no object",
                json_type(),
                (if value.is_object() { json!([value]) } else { value }).to_string().into_bytes(),
            )
        }
        5 => {
            let depth = random.random_range(130..20_000);
            let (open, close) = if random.random() { ("[", "]") } else { ("{\"inputs\":", "}") };
            let depth = depth.min(PAYLOAD_LIMIT / (open.len() + close.len()) - 1);
            ("deep", json_type(), format!("{}1{}", open.repeat(depth), close.repeat(depth)).into_bytes())
        }
        6 => {
            let n_bytes = PAYLOAD_LIMIT + random.random_range(1..200_000);
            ("too large", json_type(), vec![b' '; n_bytes])
        }
        7 => {
            let text = *pick::<&[u8]>(random, &[b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"]);
            let marked = with_inputs(path, json!(["MARK"])).to_string();
            let (before, after) = marked.split_once("MARK").unwrap();
            ("invalid UTF-8", json_type(), [before.as_bytes(), text, after.as_bytes()].concat())
        }
        8 => {
            let id = *pick(random, &[20u64, 21, 30_522, 1 << 31, (1 << 32) - 1, 1 << 32, u64::MAX]);
            let ids = json!([4, id, 5]);
            let ids = if random.random() { ids } else { json!([[4], ids]) };
            ("id out of range", json_type(), with_inputs(path, ids).to_string().into_bytes())
        }
        9 => {
            let empty = pick(random, &[json!([]), json!(""), json!([""]), json!([[]]), json!(["", "a"])]).clone();
            let empty = if path == "/similarity" { json!([]) } else { empty };
            ("empty", json_type(), with_inputs(path, empty).to_string().into_bytes())
        }
        10 => ("no body", json_type(), Vec::new()),
        11 => {
            let types = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json", "a/b/c"];
            ("media type", vec![("content-type", *pick(random, &types))], good)
        }
        12 => {
            let mut body = valid(path);
            let (field, value) = match path {
                "/tokenize" => ("add_special_tokens", json!("yes")),
                "/decode" => ("skip_special_tokens", json!(null)),
                "/similarity" => ("parameters", json!({"truncation_direction": "up"})),
                "/v1/embeddings" | "/embeddings" => pick(
                    random,
                    &[
                        ("encoding_format", json!("hex")),
                        ("dimensions", json!(0)),
                        ("dimensions", json!(-1)),
                        ("dimensions", json!(1e9)),
                        ("model", json!(7)),
                        ("dimensions", json!("8")),
                    ],
                )
                .clone(),
                _ => pick(
                    random,
                    &[
                        ("truncate", json!("yes")),
                        ("truncation_direction", json!("Up")),
                        ("prompt_name", json!("none")),
                        ("prompt_name", json!(["a"])),
                        ("truncate", json!(1)),
                        ("truncation_direction", json!(null)),
                    ],
                )
                .clone(),
            };
            body[field] = value;
            ("wrong option", json_type(), body.to_string().into_bytes())
        }
        13 => {
            let value = *pick(random, &["0", "-5", "soon", "1e3", "99999999999999999999"]);
            ("timeout header", [json_type(), vec![("x-request-timeout-ms", value)]].concat(), good)
        }
        14 => {
            let item = if path == "/decode" { "[4]" } else { "\"a\"" };
            let list = format!("[{}{item}]", format!("{item},").repeat(random.random_range(32..20_000)));
            let marked = with_inputs(path, json!(["MARK"])).to_string().replace("[\"MARK\"]", &list);
            ("too many", json_type(), marked.into_bytes())
        }
        15 => {
            let number =
                *pick(random, &["1e999", "-1e999", "1E400", "0123", "+1", "1.", ".5", "NaN", "Infinity", "0x10"]);
            let marked = with_inputs(path, json!(["MARK"])).to_string().replace("\"MARK\"", number);
            ("number", json_type(), marked.into_bytes())
        }
        16 => ("trailing", json_type(), [good, b" x".to_vec()].concat()),
        17 => {
            let name = if path.ends_with("embeddings") {
                "input"
            } else if path == "/decode" {
                "ids"
            } else {
                "inputs"
            };
            let text = valid(path).to_string();
            ("twice", json_type(), format!("{},\"{name}\":\"b\"}}", &text[..text.len() - 1]).into_bytes())
        }
        _ => unreachable!("there are {KINDS} kinds"),
    }
}

const KINDS: usize = 18;

#[track_caller]
fn check_refused(answer: &Answer, path: &str, kind: &str, body: &[u8]) {
    let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    assert!((400..500).contains(&answer.status), "{kind} on {path}: {} for {shown}", answer.status);
    assert_eq!(answer.header("content-type"), "application/json", "{kind} on {path}");
    let json = answer.json();
    let message = if path.ends_with("embeddings") { &json["error"]["message"] } else { &json["error"] };
    assert!(message.as_str().is_some_and(|message| !message.is_empty()), "{kind} on {path}: {json}");
    assert!(answer.body.len() < 2000, "{kind} on {path}: {} bytes", answer.body.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_malformed_requests_are_refused_and_change_nothing() {
    let serving = serving(Duration::from_secs(5), |setup| setup.config.payload_limit = PAYLOAD_LIMIT).await;
    let address = serving.address;
    let expected = vec![unit(&pooled(&ids("the tree")))];
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|index| {
            let expected = expected.clone();
            tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(index as u64);
                let mut client = Client::connect(address).await.unwrap();
                let mut by_status = std::collections::BTreeMap::<u16, u64>::new();
                let mut n_valid = 0;
                for turn in 0..REQUESTS / CLIENTS {
                    let path = PATHS[random.random_range(0..PATHS.len())];
                    let (kind, headers, body) = malformed((index + turn) % KINDS, path, &mut random);
                    client.send(&Client::request("POST", path, &headers, &body)).await.unwrap();
                    let answer = client.answer().await.unwrap_or_else(|error| panic!("{kind} on {path}: {error}"));
                    check_refused(&answer, path, kind, &body);
                    *by_status.entry(answer.status).or_default() += 1;
                    if turn % 50 == 0 {
                        let answer = client.post("/embed", &json!({"inputs": "the tree"})).await.unwrap();
                        assert_eq!(answer.read::<Vec<Vec<f32>>>(), expected);
                        n_valid += 1;
                    }
                }
                (by_status, n_valid)
            })
        })
        .collect();
    let mut seen = std::collections::BTreeMap::<u16, u64>::new();
    let mut n_valid = 0;
    for task in tasks {
        let (by_status, valid) = task.await.unwrap();
        by_status.into_iter().for_each(|(status, count)| *seen.entry(status).or_default() += count);
        n_valid += valid;
    }
    assert_eq!(seen.values().sum::<u64>(), REQUESTS as u64);
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [400, 413, 415, 422], "{seen:?}");
    let metrics = &serving.service.metrics;
    for (&status, &count) in &seen {
        let counted: u64 = Route::ALL.iter().map(|route| metrics.responses(*route, status)).sum();
        assert_eq!(counted, count, "{status}");
    }
    assert_eq!(metrics.responses(Route::Embed, 200), n_valid);
    assert_eq!(metrics.batches().1, n_valid, "nothing malformed reached the model");
    assert!(serving.service.engine.is_alive());
    let mut client = Client::connect(address).await.unwrap();
    assert_eq!(client.get("/health").await.unwrap().status, 200);
}

#[tokio::test]
async fn what_is_no_http_costs_its_own_connection_alone() {
    let serving = serving(Duration::from_secs(5), |_| {}).await;
    let long_head = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000));
    let cases: [&[u8]; 9] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\0\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /embed HTTP/9.9\r\n\r\n",
        b"POST /embed HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /embed HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnothing of the kind",
        long_head.as_bytes(),
        many_headers.as_bytes(),
    ];
    for bytes in cases {
        let mut client = Client::connect(serving.address).await.unwrap();
        // The server may hang up before all is sent.
        client.send(bytes).await.ok();
        let closed = async { while !client.is_closed().await {} };
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        tokio::time::timeout(Duration::from_secs(5), closed)
            .await
            .unwrap_or_else(|_| panic!("{shown} keeps its connection"));
        let mut good = Client::connect(serving.address).await.unwrap();
        let rows = good.post("/embed", &json!({"inputs": "the tree"})).await.unwrap().read::<Vec<Vec<f32>>>();
        assert_eq!(rows, [unit(&pooled(&ids("the tree")))]);
    }
}
