//! Rerankers and classifiers.

use niwaki::telemetry::{RejectReason, Route};
use serde_json::{Value, json};

use crate::service::{MAX_TOKENS, ids, logits, pair, service};

fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

/// A number as it reads back from an answer, whose digits are those of single precision.
fn as_sent(x: f32) -> Value {
    serde_json::from_str(&serde_json::to_string(&x).unwrap()).unwrap()
}

/// The number of a pair with a reranker.
fn number(query: &str, text: &str) -> f32 {
    let (ids, types) = pair(query, text);
    logits(&ids, &types, 1)[0]
}

const TEXTS: [&str; 4] = ["garden", "the tree", "a b c", "d"];

/// The texts' positions, best first.
fn order(query: &str) -> Vec<usize> {
    let mut order: Vec<usize> = (0..TEXTS.len()).collect();
    order.sort_by(|&a, &b| number(query, TEXTS[b]).total_cmp(&number(query, TEXTS[a])));
    order
}

#[tokio::test]
async fn rerank_sorts_texts_by_their_score() {
    let service = service(|setup| setup.classify(&["LABEL_0"]));
    for (raw, return_text) in [(false, false), (true, false), (false, true)] {
        let body = json!({"query": "tree", "texts": TEXTS, "raw_scores": raw, "return_text": return_text});
        for path in ["/rerank", "/"] {
            let answer = service.post(path, body.clone()).await;
            assert_eq!(answer.header("x-compute-type"), "cpu", "{path}");
            let n_chars = TEXTS.iter().map(|text| text.len() + "tree".len()).sum::<usize>();
            assert_eq!(answer.header("x-compute-characters"), n_chars.to_string());
            let ranks: Vec<Value> = answer.read();
            let order = order("tree");
            assert_eq!(ranks.len(), TEXTS.len());
            for (rank, index) in ranks.iter().zip(order) {
                let number = number("tree", TEXTS[index]);
                let score = if raw { number } else { sigmoid(number) };
                let mut expected = json!({"index": index, "score": as_sent(score)});
                if return_text {
                    expected["text"] = json!(TEXTS[index]);
                }
                assert_eq!(rank, &expected);
            }
        }
    }
    // One batch or many, a pair's number is its own.
    let alone = service.post("/rerank", json!({"query": "tree", "texts": [TEXTS[2]], "raw_scores": true})).await.json();
    assert_eq!(alone, json!([{"index": 0, "score": as_sent(number("tree", TEXTS[2]))}]));
}

/// Either text is bounded by itself, so that the cut stays where it would be without a bound.
#[tokio::test]
async fn texts_of_pairs_far_too_long_are_cut_before_they_are_tokenized() {
    let service = service(|setup| setup.classify(&["LABEL_0"]));
    let far = format!("a{}b", " ".repeat(4000));
    let near = format!("a{}b", " ".repeat(3000));
    for (query, text, direction, seen) in [
        ("tree", far.as_str(), "Right", ("tree", "a")),
        ("tree", far.as_str(), "Left", ("tree", "b")),
        (far.as_str(), "tree", "Right", ("a", "tree")),
        (far.as_str(), far.as_str(), "Left", ("b", "b")),
        (near.as_str(), near.as_str(), "Right", ("a b", "a b")),
    ] {
        // Two documents, of which the second finds the query tokenized.
        let body =
            json!({"query": query, "texts": [text, text], "raw_scores": true, "truncation_direction": direction});
        let ranks: Vec<Value> = service.post("/rerank", body).await.read();
        for rank in &ranks {
            assert_eq!(rank["score"], as_sent(number(seen.0, seen.1)), "{seen:?} {direction}");
        }
        let body = json!({"query": query, "texts": [text], "truncate": false});
        assert_eq!(service.post("/rerank", body).await.status, 422);
    }
}

#[tokio::test]
async fn cohere_and_jina_get_their_words() {
    let service = service(|setup| setup.classify(&["LABEL_0"]));
    for path in ["/v1/rerank", "/v2/rerank"] {
        let documents = json!(["garden", {"text": "the tree", "title": "t"}, "a b c", {"text": "d"}]);
        let body = json!({"model": "whatever", "query": "tree", "documents": documents, "top_n": 2,
            "return_documents": true, "max_chunks_per_doc": 10});
        let mut request = crate::service::post(path, &body);
        request.headers_mut().insert("x-request-id", "id-7".parse().unwrap());
        let answer = service.ask(request).await.json();
        let expected: Vec<Value> = order("tree")
            .into_iter()
            .take(2)
            .map(|index| {
                let score = sigmoid(number("tree", TEXTS[index]));
                json!({"index": index, "relevance_score": as_sent(score), "document": {"text": TEXTS[index]}})
            })
            .collect();
        let n_tokens: usize = TEXTS.iter().map(|text| pair("tree", text).0.len()).sum();
        assert_eq!(
            answer,
            json!({"id": "id-7", "object": "list", "model": "arithmetic", "results": expected,
                "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}})
        );
        let answer = service.post(path, json!({"query": "tree", "documents": TEXTS})).await.json();
        assert_eq!(answer["results"].as_array().unwrap().len(), TEXTS.len());
        assert!(answer["results"][0].get("document").is_none());
        for (wrong, status) in [
            (json!({"query": "a", "documents": []}), 400),
            (json!({"query": "a", "documents": ["b"], "top_n": 0}), 422),
            (json!({"query": "a", "documents": [1]}), 422),
            (json!({"query": "a", "documents": [{"title": "b"}]}), 422),
            (json!({"query": "a", "documents": vec!["b"; 33]}), 422),
            (json!({"documents": ["b"]}), 422),
            (json!({"query": "", "documents": [""]}), 400),
        ] {
            let answer = service.post(path, wrong.clone()).await;
            assert_eq!(answer.status, status, "{wrong}");
            assert!(answer.json()["error"]["message"].is_string(), "{wrong}");
        }
    }
}

#[tokio::test]
async fn predict_takes_texts_pairs_and_lists_of_them() {
    const LABELS: [&str; 3] = ["calm", "stormy", "other"];
    let service = service(|setup| setup.classify(&LABELS));
    let expected = |numbers: Vec<f32>, raw: bool| {
        let largest = numbers.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let powers: Vec<f64> = numbers.iter().map(|&x| f64::from(x - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        let scores = if raw { numbers } else { powers.iter().map(|power| (power / sum) as f32).collect() };
        let mut all: Vec<(f32, &str)> = scores.into_iter().zip(LABELS).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        all
    };
    let near = |found: &Value, expected: &[(f32, &str)]| {
        assert_eq!(found.as_array().unwrap().len(), expected.len());
        for (found, (score, label)) in found.as_array().unwrap().iter().zip(expected) {
            assert_eq!(found["label"], json!(label));
            assert!((found["score"].as_f64().unwrap() - f64::from(*score)).abs() < 1e-6, "{found} {score}");
        }
    };
    let of_text = |text: &str| {
        let ids = ids(text);
        logits(&ids, &vec![0; ids.len()], 3)
    };
    let of_pair = |a: &str, b: &str| {
        let (ids, types) = pair(a, b);
        logits(&ids, &types, 3)
    };
    for raw in [false, true] {
        let ask = async |inputs: Value| {
            let body = json!({"inputs": inputs, "raw_scores": raw});
            let answer = service.post("/predict", body.clone()).await.json();
            assert_eq!(answer, service.post("/", body).await.json());
            answer
        };
        near(&ask(json!("the tree")).await, &expected(of_text("the tree"), raw));
        near(&ask(json!(["the tree"])).await, &expected(of_text("the tree"), raw));
        near(&ask(json!(["the tree", "garden"])).await, &expected(of_pair("the tree", "garden"), raw));
        let many = ask(json!([["a"], ["the tree", "garden"], ["b", "c"]])).await;
        near(&many[0], &expected(of_text("a"), raw));
        near(&many[1], &expected(of_pair("the tree", "garden"), raw));
        near(&many[2], &expected(of_pair("b", "c"), raw));
    }
    for (wrong, status) in [
        (json!(""), 400),
        (json!([]), 400),
        (json!([["a"], [""]]), 400),
        (json!(["", ""]), 400),
        (json!(["a", "b", "c"]), 422),
        (json!([["a", "b", "c"]]), 422),
        (json!([[]]), 422),
        (json!(7), 422),
        (json!([[1]]), 422),
        (json!(vec![["a"]; 33]), 422),
    ] {
        let answer = service.post("/predict", json!({"inputs": wrong})).await;
        assert_eq!(answer.status, status, "{wrong}");
        assert!(answer.json()["error_type"].is_string(), "{wrong}");
    }
    assert_eq!(service.post("/predict", json!({"inputs": ["a", ""]})).await.status, 200, "half a pair is a pair");
}

#[tokio::test]
async fn long_pairs_are_cut_at_the_longer_text_or_refused() {
    let service = service(|setup| setup.classify(&["LABEL_0"]));
    let (query, text) = ("a b c", "tree ".repeat(MAX_TOKENS));
    let body = |extra: Value| {
        let mut body = json!({"query": query, "texts": [text], "raw_scores": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let cut = service.post("/rerank", body(json!({}))).await;
    assert_eq!(cut.header("x-compute-tokens"), MAX_TOKENS.to_string());
    // 3 special tokens and the 3 of the query leave 10 for the text.
    let expected = number(query, "tree ".repeat(MAX_TOKENS - 6).trim());
    assert_eq!(cut.json()[0]["score"], as_sent(expected));
    let left =
        json!({"query": query, "texts": [format!("{text} d")], "raw_scores": true, "truncation_direction": "left"});
    let expected = number(query, &format!("{}d", "tree ".repeat(MAX_TOKENS - 7)));
    assert_eq!(service.post("/rerank", left).await.json()[0]["score"], as_sent(expected));
    let refused = service.post("/rerank", body(json!({"truncate": false}))).await;
    assert_eq!((refused.status, refused.json()["error_type"].clone()), (422, json!("Validation")));
    let huge = json!({"query": query, "texts": ["tree ".repeat(20_000)], "truncate": false});
    assert!(service.post("/rerank", huge).await.json()["error"].as_str().unwrap().contains("characters"));
}

#[tokio::test]
async fn a_route_that_does_not_fit_the_model_says_so() {
    let bodies = [
        ("/embed", json!({"inputs": "a"})),
        ("/embed_all", json!({"inputs": "a"})),
        ("/similarity", json!({"inputs": {"source_sentence": "a", "sentences": ["b"]}})),
        ("/v1/embeddings", json!({"input": "a"})),
        ("/predict", json!({"inputs": "a"})),
        ("/rerank", json!({"query": "a", "texts": ["b"]})),
        ("/v1/rerank", json!({"query": "a", "documents": ["b"]})),
    ];
    let embeddings = ["/embed", "/embed_all", "/similarity", "/v1/embeddings"];
    for (labels, fits, info) in [
        (&[][..], &embeddings[..], "embedding"),
        (&["LABEL_0"], &["/predict", "/rerank", "/v1/rerank"], "reranker"),
        (&["a", "b"], &["/predict"], "classifier"),
    ] {
        let service = service(|setup| {
            if !labels.is_empty() {
                setup.classify(labels);
            }
        });
        let model_type = service.get("/info").await.json()["model_type"].clone();
        assert!(model_type.get(info).is_some(), "{model_type}");
        for (path, body) in &bodies {
            let answer = service.post(path, body.clone()).await;
            if fits.contains(path) {
                assert_eq!(answer.status, 200, "{info} {path}");
                continue;
            }
            assert_eq!(answer.status, 424, "{info} {path}");
            let json = answer.json();
            let message = if path.starts_with("/v1") { &json["error"]["message"] } else { &json["error"] };
            assert!(message.as_str().unwrap().starts_with("model is not "), "{json}");
        }
        assert_eq!(service.metrics.rejections(RejectReason::Validation), (bodies.len() - fits.len()) as u64);
        assert_eq!(service.metrics.inference_errors(), 0);
    }
    let service = service(|setup| setup.classify(&["a", "b"]));
    let expected = json!({"classifier": {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}});
    assert_eq!(service.get("/info").await.json()["model_type"], expected);
    assert_eq!(service.metrics.responses(Route::Info, 200), 1);
}
