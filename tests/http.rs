//! The HTTP surface, through the router and over a socket.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod service;

#[path = "http/errors.rs"]
mod errors;
#[path = "http/inference.rs"]
mod inference;
#[path = "http/models.rs"]
mod models;
#[path = "http/operations.rs"]
mod operations;
#[path = "http/scores.rs"]
mod scores;
#[path = "http/socket.rs"]
mod socket;

use base64::Engine as _;
use niwaki::telemetry::Stage;
use serde_json::{Value, json};
use service::{D_MODEL, MAX_TOKENS, id, ids, pooled, post, service, token_rows, unit};

#[tokio::test]
async fn embed_takes_texts_ids_and_lists() {
    let service = service(|_| {});
    let expected = |text: &str| unit(&pooled(&ids(text)));
    for path in ["/embed", "/"] {
        let embed = async |inputs: Value| service.post(path, json!({"inputs": inputs})).await.read::<Vec<Vec<f32>>>();
        assert_eq!(embed(json!("the garden")).await, [expected("the garden")]);
        assert_eq!(embed(json!(["the", "a b c"])).await, [expected("the"), expected("a b c")]);
        // Ids are used as they are: nothing is put around them.
        assert_eq!(embed(json!([4, 5])).await, [unit(&pooled(&[4, 5]))]);
        assert_eq!(
            embed(json!([[2, 4, 3], "tree", [5]])).await,
            [expected("the"), expected("tree"), unit(&pooled(&[5])),]
        );
    }
}

#[tokio::test]
async fn embed_normalizes_and_shortens_as_asked() {
    let service = service(|_| {});
    let row = pooled(&ids("the tree"));
    let embed = async |extra: Value| {
        let mut body = json!({"inputs": "the tree"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        service.post("/embed", body).await.read::<Vec<Vec<f32>>>().remove(0)
    };
    assert_eq!(embed(json!({})).await, unit(&row));
    assert_eq!(embed(json!({"normalize": false})).await, row);
    assert_eq!(embed(json!({"dimensions": 3})).await, unit(&row[..3]));
    assert_eq!(embed(json!({"dimensions": 3, "normalize": false})).await, row[..3]);
    assert_eq!(
        embed(json!({"dimensions": D_MODEL, "truncate": null, "prompt_name": null, "dimension": 0})).await,
        unit(&row)
    );
}

#[tokio::test]
async fn long_inputs_are_cut_or_refused() {
    let long = "a ".repeat(MAX_TOKENS - 4) + "b c d the tree";
    let all = ids(&long);
    let right = [&all[..MAX_TOKENS - 1], &[3]].concat();
    let left = [&[2], &all[all.len() - MAX_TOKENS + 1..]].concat();
    for auto_truncate in [true, false] {
        let service = service(|setup| setup.config.auto_truncate = auto_truncate);
        let embed = async |extra: Value| {
            let mut body = json!({"inputs": long, "normalize": false});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            service.post("/embed", body).await
        };
        let cut = json!({"truncate": true, "truncation_direction": "Left"});
        assert_eq!(embed(cut).await.read::<Vec<Vec<f32>>>(), [pooled(&left)]);
        let cut = json!({"truncate": true, "truncation_direction": "right"});
        assert_eq!(embed(cut).await.read::<Vec<Vec<f32>>>(), [pooled(&right)]);
        let refused = embed(json!({"truncate": false})).await;
        assert_eq!(refused.status, 422);
        let message = format!("Input validation error: `inputs` must have less than 16 tokens. Given: {}", all.len());
        assert_eq!(refused.json(), json!({"error": message, "error_type": "Validation"}));
        assert_eq!(embed(json!({})).await.status, if auto_truncate { 200 } else { 422 });
        // OpenAI's clients cannot ask; the server's setting counts.
        let openai = service.post("/v1/embeddings", json!({"input": long})).await;
        assert_eq!(openai.status, if auto_truncate { 200 } else { 422 });
        // Ids too, with the frame kept that they have.
        let cut = service.post("/embed", json!({"inputs": all, "truncate": true, "normalize": false})).await;
        assert_eq!(cut.read::<Vec<Vec<f32>>>(), [pooled(&right)]);
        assert_eq!(service.post("/embed", json!({"inputs": all, "truncate": false})).await.status, 422);
    }
}

#[tokio::test]
async fn a_text_far_too_long_is_refused_by_its_characters_or_cut() {
    let service = service(|_| {});
    let huge = "tree ".repeat(20_000);
    let refused = service.post("/embed", json!({"inputs": huge, "truncate": false})).await;
    assert_eq!(refused.status, 422);
    assert_eq!(
        refused.json()["error"],
        "Input validation error: `inputs` must have less than 4000 characters. Given: 100000"
    );
    let cut = service.post("/embed", json!({"inputs": huge, "normalize": false})).await;
    assert_eq!(cut.header("x-compute-tokens"), "16");
    assert_eq!(cut.read::<Vec<Vec<f32>>>(), [pooled(&[&[2], [5; 14].as_slice(), &[3]].concat())]);
}

/// What the tokenizer is given is bounded by the model's length: 250 characters a token, blanks included.
#[tokio::test]
async fn the_tokenizer_is_given_no_more_than_so_many_characters() {
    let service = service(|setup| setup.model.prompts = [("the".to_owned(), "the ".to_owned())].into());
    // Characters, not bytes.
    let most = "é ".repeat(2000);
    let tokens = service.post("/tokenize", json!({"inputs": [most, "a"]})).await.read::<Vec<Vec<Value>>>();
    assert_eq!((tokens[0].len(), tokens[1].len()), (2002, 3));
    let more = most.clone() + "a";
    for (body, got) in [
        (json!({"inputs": more}), 4001),
        (json!({"inputs": ["a", more]}), 4001),
        (json!({"inputs": most, "prompt_name": "the"}), 4004),
    ] {
        let refused = service.post("/tokenize", body).await;
        let message = format!("Input validation error: `inputs` must have less than 4000 characters. Given: {got}");
        assert_eq!((refused.status, refused.json()["error"].clone()), (422, json!(message)));
    }
    // What is cut is cut before that: what lies beyond is not seen.
    let text = |gap: usize| format!("a{}b", " ".repeat(gap));
    for (gap, direction, seen) in
        [(3998, "Right", "a b"), (3999, "Right", "a"), (3998, "Left", "a b"), (3999, "Left", "b"), (9000, "Left", "b")]
    {
        let body = json!({"inputs": text(gap), "truncation_direction": direction, "normalize": false});
        let answer = service.post("/embed", body).await;
        assert_eq!(answer.header("x-compute-characters"), (gap + 2).to_string());
        assert_eq!(answer.read::<Vec<Vec<f32>>>(), [pooled(&ids(seen))], "{gap} {direction}");
    }
}

/// What a client has not taken of its answer counts as the memory that it is.
#[tokio::test]
async fn tokens_that_are_not_taken_hold_memory() {
    let service = service(|setup| {
        setup.config.payload_limit = 300_000;
        setup.config.max_body_bytes = 1_000_000;
    });
    let body = json!({"inputs": vec!["a ".repeat(2000); 32]});
    let untaken = tower::ServiceExt::oneshot(service.router.clone(), post("/tokenize", &body)).await.unwrap();
    assert_eq!(untaken.status().as_u16(), 200);
    assert_eq!(service.post("/tokenize", body.clone()).await.status, 429);
    drop(untaken);
    assert_eq!(service.post("/tokenize", body).await.read::<Vec<Vec<Value>>>().len(), 32);
}

#[tokio::test]
async fn prompts_go_before_the_input() {
    let service = service(|setup| {
        setup.model.prompts = [("query", "query: "), ("none", "")].map(|(a, b)| (a.to_owned(), b.to_owned())).into();
        setup.model.default_prompt = Some("the ".to_owned());
    });
    let embed = async |body: Value| service.post("/embed", body).await.read::<Vec<Vec<f32>>>().remove(0);
    let expected = |text: &str| unit(&pooled(&ids(text)));
    assert_eq!(embed(json!({"inputs": "tree", "prompt_name": "query"})).await, expected("query: tree"));
    assert_eq!(embed(json!({"inputs": "tree", "prompt_name": "none"})).await, expected("tree"));
    assert_eq!(embed(json!({"inputs": "tree"})).await, expected("the tree"));
    // A prompt is a text: ids become one.
    assert_eq!(embed(json!({"inputs": [2, 5, 3], "prompt_name": "query"})).await, expected("query: tree"));
    let unknown = service.post("/embed", json!({"inputs": "tree", "prompt_name": "nobody"})).await;
    assert_eq!((unknown.status, unknown.json()["error_type"].clone()), (422, json!("Validation")));
    let tokens = service.post("/tokenize", json!({"inputs": "tree", "prompt_name": "query"})).await.json();
    assert_eq!(tokens[0].as_array().unwrap().len(), 5);
}

#[tokio::test]
async fn embed_all_gives_a_row_per_token() {
    let service = service(|_| {});
    let answer = service.post("/embed_all", json!({"inputs": ["the tree", [4, 5]]})).await;
    assert_eq!(answer.header("x-compute-tokens"), "6");
    assert_eq!(answer.read::<Vec<Vec<Vec<f32>>>>(), [token_rows(&ids("the tree")), token_rows(&[4, 5])]);
}

#[tokio::test]
async fn similarity_is_the_cosine() {
    let service = service(|_| {});
    let sentences = ["the tree", "garden", "the gardens"];
    let body = json!({"inputs": {"source_sentence": "the tree", "sentences": sentences}});
    let cosines = service.post("/similarity", body).await.read::<Vec<f32>>();
    let source = unit(&pooled(&ids("the tree")));
    for (sentence, cosine) in sentences.iter().zip(cosines) {
        let expected: f32 = unit(&pooled(&ids(sentence))).iter().zip(&source).map(|(a, b)| a * b).sum();
        assert!((cosine - expected).abs() < 1e-6, "{sentence}: {cosine} {expected}");
    }
    let parameters = json!({"truncate": false, "truncation_direction": "Left", "prompt_name": null});
    let body = json!({"inputs": {"source_sentence": "a", "sentences": ["a"]}, "parameters": parameters});
    assert_eq!(service.post("/similarity", body).await.read::<Vec<f32>>(), [1.0]);
    let empty = json!({"inputs": {"source_sentence": "a", "sentences": []}});
    assert_eq!(service.post("/similarity", empty).await.json()["error_type"], "Empty");
    let many = json!({"inputs": {"source_sentence": "a", "sentences": vec!["a"; 32]}});
    assert_eq!(
        service.post("/similarity", many).await.json()["error"],
        "batch size 33 > maximum allowed batch size 32"
    );
}

#[tokio::test]
async fn tokenize_shows_tokens_and_decode_reads_them() {
    let service = service(|_| {});
    let tokens = service.post("/tokenize", json!({"inputs": "The gardens é"})).await.json();
    let expected = json!([[
        {"id": 2, "text": "[CLS]", "special": true, "start": null, "stop": null},
        {"id": 4, "text": "The", "special": false, "start": 0, "stop": 3},
        {"id": 6, "text": "garden", "special": false, "start": 4, "stop": 10},
        {"id": 7, "text": "s", "special": false, "start": 10, "stop": 11},
        {"id": id("é"), "text": "é", "special": false, "start": 12, "stop": 14},
        {"id": 3, "text": "[SEP]", "special": true, "start": null, "stop": null},
    ]]);
    assert_eq!(tokens, expected);
    let bare = service.post("/tokenize", json!({"inputs": ["a", "b"], "add_special_tokens": false})).await.json();
    assert_eq!((bare[0][0]["id"].clone(), bare[1][0]["id"].clone()), (json!(id("a")), json!(id("b"))));
    let decode = async |body: Value| service.post("/decode", body).await.read::<Vec<String>>();
    assert_eq!(decode(json!({"ids": [2, 4, 6, 7, 3]})).await, ["the gardens"]);
    assert_eq!(decode(json!({"ids": [[4], [5]], "skip_special_tokens": false})).await, ["the", "tree"]);
    assert_eq!(decode(json!({"ids": [2, 4, 3], "skip_special_tokens": false})).await, ["[CLS] the [SEP]"]);
    assert_eq!(service.post("/decode", json!({"ids": [4, 1000]})).await.status, 422);
    // As many ids as a text may have characters.
    assert_eq!(decode(json!({"ids": vec![5; 4000]})).await[0].len(), 4000 * 5 - 1);
    let more = service.post("/decode", json!({"ids": [[4], vec![5; 4001]]})).await;
    let message = "Input validation error: `ids` must have at most 4000 ids. Given: 4001";
    assert_eq!((more.status, more.json()["error"].clone()), (422, json!(message)));
    // Long ones go to the tokenizer's threads.
    let tree = "tree ".repeat(800);
    let long = service.post("/tokenize", json!({"inputs": [tree, tree, "a", tree]})).await.read::<Vec<Vec<Value>>>();
    assert_eq!(long.iter().map(Vec::len).collect::<Vec<_>>(), [802, 802, 3, 802]);
    assert_eq!(long[3][800], json!({"id": 5, "text": "tree", "special": false, "start": 3995, "stop": 3999}));
    assert_eq!(decode(json!({"ids": vec![5; 3000]})).await, [["tree"; 3000].join(" ")]);
}

#[tokio::test]
async fn openai_embeddings_are_lists_or_base64() {
    let service = service(|_| {});
    let expected = [unit(&pooled(&ids("the tree"))), unit(&pooled(&[4]))];
    for path in ["/v1/embeddings", "/embeddings"] {
        let body = json!({"input": ["the tree", [4]], "model": "anything", "user": "u"});
        let answer = service.post(path, body).await.json();
        assert_eq!(answer["object"], "list");
        assert_eq!(answer["model"], "arithmetic");
        assert_eq!(answer["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
        for (index, expected) in expected.iter().enumerate() {
            let entry = &answer["data"][index];
            assert_eq!((entry["object"].clone(), entry["index"].clone()), (json!("embedding"), json!(index)));
            assert_eq!(&serde_json::from_value::<Vec<f32>>(entry["embedding"].clone()).unwrap(), expected);
        }
        let body = json!({"input": "the tree", "encoding_format": "base64", "dimensions": 2, "model": "m"});
        let answer = service.post(path, body).await.json();
        let base64 = answer["data"][0]["embedding"].as_str().unwrap();
        let bytes = base64::engine::general_purpose::STANDARD.decode(base64).unwrap();
        let vector: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(vector, unit(&pooled(&ids("the tree"))[..2]));
    }
}

#[tokio::test]
async fn answers_carry_teis_headers() {
    let service = service(|setup| setup.batch_time = std::time::Duration::from_millis(20));
    for (path, body) in [
        ("/embed", json!({"inputs": ["the treé", [4, 5, 6]]})),
        ("/embed_all", json!({"inputs": ["the treé", [4, 5, 6]]})),
        ("/v1/embeddings", json!({"input": ["the treé", [4, 5, 6]]})),
    ] {
        let answer = service.post(path, body).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), "application/json");
        assert_eq!(answer.header("x-compute-type"), "cpu");
        assert_eq!(answer.header("x-compute-characters"), "11", "8 of the text, 3 ids");
        let n_tokens = ids("the treé").len() + 3;
        assert_eq!(answer.header("x-compute-tokens"), n_tokens.to_string());
        let millis = |name: &str| answer.header(name).parse::<u64>().unwrap();
        assert!(millis("x-inference-time") >= 20, "{path}");
        assert!(millis("x-total-time") >= millis("x-inference-time") + millis("x-queue-time"));
        assert!(millis("x-compute-time") <= millis("x-total-time") && millis("x-tokenization-time") < 20);
        let server_timing = answer.header("server-timing");
        for (stage, least) in [("tokenize", 0.0), ("queue", 0.0), ("infer", 20.0), ("total", 20.0)] {
            let part = server_timing.split(", ").find_map(|part| part.strip_prefix(stage)?.strip_prefix(";dur="));
            let millis: f64 = part.unwrap_or_else(|| panic!("{stage} in {server_timing}")).parse().unwrap();
            assert!(millis >= least, "{server_timing}");
        }
    }
    for stage in Stage::ALL {
        assert_eq!(service.metrics.stages(*stage), 3, "{stage}");
    }
}

#[tokio::test]
async fn request_ids_go_in_and_out() {
    let service = service(|_| {});
    let ask = async |id: &[u8]| {
        let mut request = post("/embed", &json!({"inputs": "a"}));
        request.headers_mut().insert("x-request-id", axum::http::HeaderValue::from_bytes(id).unwrap());
        service.ask(request).await
    };
    assert_eq!(ask(b"a-1:b/c").await.header("x-request-id"), "a-1:b/c");
    for bad in [b"two words".as_slice(), b"", b"caf\xc3\xa9", b"a\"b", &[b'x'; 129]] {
        let answer = ask(bad).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("x-request-id").len(), 36, "{bad:?}");
    }
    let ids: Vec<String> = [service.get("/health").await, service.get("/nowhere").await, service.get("/docs/").await]
        .iter()
        .map(|answer| answer.header("x-request-id").to_owned())
        .collect();
    assert!(ids.iter().all(|id| id.len() == 36) && ids[0] != ids[1] && ids[1] != ids[2]);
}

#[tokio::test]
async fn embeddings_are_written_in_the_numbers_asked_for() {
    let service = service(|_| {});
    let vector = unit(&pooled(&ids("the tree")));
    let largest = vector.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let integers = |scale: f32| vector.iter().map(|value| (value / scale).round_ties_even() as i64).collect::<Vec<_>>();
    let bits = vector.iter().enumerate().fold(0i64, |byte, (bit, value)| byte | i64::from(*value > 0.0) << (7 - bit));
    let halves: Vec<f32> = vector.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect();
    for dtype in ["float", "float32", "f32"] {
        let body = json!({"inputs": "the tree", "output_dtype": dtype});
        assert_eq!(service.post("/embed", body).await.read::<Vec<Vec<f32>>>()[0], vector);
    }
    let body = json!({"inputs": "the tree", "output_dtype": "float16"});
    assert_eq!(service.post("/embed", body).await.read::<Vec<Vec<f32>>>()[0], halves);
    for (dtype, expected) in
        [("int8", integers(largest / 127.0)), ("ubinary", vec![bits]), ("binary", vec![bits - 128])]
    {
        let body = json!({"inputs": ["the tree"], "output_dtype": dtype});
        assert_eq!(service.post("/embed", body).await.read::<Vec<Vec<i64>>>()[0], expected, "{dtype}");
        let body = json!({"input": "the tree", "output_dtype": dtype});
        let answer = service.post("/v1/embeddings", body).await.json();
        assert_eq!(answer["data"][0]["embedding"], json!(expected), "{dtype}");
        assert_eq!(answer["data"][0]["scale"].is_number(), dtype == "int8", "{dtype}");
        let body = json!({"input": "the tree", "output_dtype": dtype, "encoding_format": "base64"});
        let answer = service.post("/v1/embeddings", body).await.json();
        let bytes = base64::engine::general_purpose::STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap());
        let bytes: Vec<i64> = match dtype {
            "ubinary" => bytes.unwrap().into_iter().map(i64::from).collect(),
            _ => bytes.unwrap().into_iter().map(|byte| i64::from(byte.cast_signed())).collect(),
        };
        assert_eq!(bytes, expected, "{dtype}");
    }
    let body = json!({"input": "the tree", "output_dtype": "float16", "encoding_format": "base64"});
    let answer = service.post("/v1/embeddings", body).await.json();
    let bytes =
        base64::engine::general_purpose::STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let values: Vec<f32> =
        bytes.chunks_exact(2).map(|pair| half::f16::from_le_bytes(pair.try_into().unwrap()).to_f32()).collect();
    assert_eq!(values, halves);
    for path in ["/embed", "/v1/embeddings"] {
        let body = json!({"inputs": "a", "input": "a", "output_dtype": "int4"});
        assert_eq!(service.post(path, body).await.status, 422, "{path}");
    }
}
