//! The gRPC service, over a socket, with tonic's client.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod service;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::uri::PathAndQuery;
use niwaki::engine::EngineLimits;
use niwaki::server::grpc::messages::{
    DecodeRequest, DecodeResponse, EmbedAllRequest, EmbedAllResponse, EmbedRequest, EmbedResponse, EmbedSparseRequest,
    EmbedSparseResponse, EncodeRequest, EncodeResponse, HealthCheckRequest, HealthCheckResponse, InfoRequest,
    InfoResponse, ModelType, PredictPairRequest, PredictRequest, PredictResponse, RerankRequest, RerankResponse,
    RerankStreamRequest, ServingStatus, TruncationDirection,
};
use niwaki::server::{Listeners, ModelParts, ServedModel, serve};
use niwaki::telemetry::{RejectReason, Route};
use prost::Message;
use service::{MAX_TOKENS, Service, Setup, ids, logits, pair, parts, pooled, service, token_rows, unit};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

/// A request whose text is no UTF-8.
#[derive(Clone, PartialEq, Message)]
struct NoText {
    #[prost(bytes = "vec", tag = "1")]
    inputs: Vec<u8>,
}

struct Serving {
    service: Service,
    channel: Channel,
    stop: Option<oneshot::Sender<()>>,
    ended: tokio::task::JoinHandle<std::io::Result<()>>,
}

async fn serving(change: impl FnOnce(&mut Setup)) -> Serving {
    let service = service(change);
    let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", grpc.local_addr().unwrap())).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move {
        // Also ends when the test drops its end.
        stopped.await.ok();
    };
    let listeners = Listeners { http, grpc: Some(grpc), admin: None };
    let ended = tokio::spawn(serve(listeners, service.state.clone(), shutdown, Duration::from_secs(5)));
    Serving { service, channel: endpoint.connect().await.unwrap(), stop: Some(stop), ended }
}

impl Serving {
    async fn client(&self) -> Grpc<Channel> {
        let mut client = Grpc::new(self.channel.clone());
        client.ready().await.unwrap();
        client
    }

    async fn send<Req, Res>(&self, path: &'static str, request: Request<Req>) -> Result<Response<Res>, Status>
    where
        Req: Message + Default + 'static,
        Res: Message + Default + 'static,
    {
        self.client().await.unary(request, PathAndQuery::from_static(path), ProstCodec::default()).await
    }

    async fn call<Req, Res>(&self, path: &'static str, request: Req) -> Result<Res, Status>
    where
        Req: Message + Default + 'static,
        Res: Message + Default + 'static,
    {
        self.send(path, Request::new(request)).await.map(Response::into_inner)
    }

    async fn stream<Req, Res>(&self, path: &'static str, requests: Vec<Req>) -> Streaming<Res>
    where
        Req: Message + Default + 'static,
        Res: Message + Default + 'static,
    {
        let requests = Request::new(tokio_stream::iter(requests));
        let path = PathAndQuery::from_static(path);
        self.client().await.streaming(requests, path, ProstCodec::default()).await.unwrap().into_inner()
    }

    /// A stream whose messages are sent one by one, until the sender is dropped.
    async fn open(&self) -> (mpsc::Sender<EmbedRequest>, Streaming<EmbedResponse>) {
        let (sender, messages) = mpsc::channel(8);
        let requests = Request::new(ReceiverStream::new(messages));
        let path = PathAndQuery::from_static("/tei.v1.Embed/EmbedStream");
        let answers = self.client().await.streaming(requests, path, ProstCodec::default()).await.unwrap();
        (sender, answers.into_inner())
    }
}

async fn all<Res>(mut stream: Streaming<Res>) -> Result<Vec<Res>, Status> {
    let mut found = Vec::new();
    while let Some(message) = stream.next().await {
        found.push(message?);
    }
    Ok(found)
}

fn text(inputs: &str) -> EmbedRequest {
    EmbedRequest { inputs: inputs.to_owned(), ..EmbedRequest::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_come_as_messages() {
    let serving = serving(|_| {}).await;
    let info: InfoResponse = serving.call("/tei.v1.Info/Info", InfoRequest {}).await.unwrap();
    assert_eq!((info.model_id.as_str(), info.model_type()), ("test/arithmetic", ModelType::Embedding));
    assert_eq!((info.max_input_length as usize, info.max_client_batch_size), (MAX_TOKENS, 32));
    let answer: EmbedResponse = serving.call("/tei.v1.Embed/Embed", text("the tree")).await.unwrap();
    assert_eq!(answer.embeddings, unit(&pooled(&ids("the tree"))));
    let metadata = answer.metadata.unwrap();
    assert_eq!((metadata.compute_chars, metadata.compute_tokens as usize), (8, ids("the tree").len()));
    assert!(metadata.total_time_ns >= metadata.inference_time_ns + metadata.queue_time_ns);
    let raw = EmbedRequest { normalize: Some(false), dimensions: Some(3), ..text("the tree") };
    let answer: EmbedResponse = serving.call("/tei.v1.Embed/Embed", raw).await.unwrap();
    assert_eq!(answer.embeddings, pooled(&ids("the tree"))[..3]);
    let long = "a ".repeat(MAX_TOKENS) + "b";
    let cut = EmbedRequest { truncate: true, normalize: Some(false), ..text(&long) };
    let left = EmbedRequest { truncation_direction: TruncationDirection::Left.into(), ..cut.clone() };
    let answer: EmbedResponse = serving.call("/tei.v1.Embed/Embed", cut).await.unwrap();
    assert_eq!(answer.embeddings, pooled(&[&ids(&long)[..MAX_TOKENS - 1], &[3]].concat()));
    let answer: EmbedResponse = serving.call("/tei.v1.Embed/Embed", left).await.unwrap();
    assert_eq!(answer.embeddings, pooled(&[&[2], &ids(&long)[ids(&long).len() - MAX_TOKENS + 1..]].concat()));
    let request = EmbedAllRequest { inputs: "the tree".to_owned(), ..EmbedAllRequest::default() };
    let answer: EmbedAllResponse = serving.call("/tei.v1.Embed/EmbedAll", request).await.unwrap();
    let rows: Vec<_> = answer.token_embeddings.into_iter().map(|row| row.embeddings).collect();
    assert_eq!(rows, token_rows(&ids("the tree")));
    // Many at once, in the order they were sent.
    let texts: Vec<String> = (0..200).map(|i| ["the tree", "a b c", "gardens", "d"][i % 4].to_owned()).collect();
    let requests = texts.iter().map(|inputs| text(inputs)).collect();
    let answers: Vec<EmbedResponse> = all(serving.stream("/tei.v1.Embed/EmbedStream", requests).await).await.unwrap();
    assert_eq!(answers.len(), texts.len());
    for (answer, text) in answers.iter().zip(&texts) {
        assert_eq!(answer.embeddings, unit(&pooled(&ids(text))));
    }
    assert_eq!(serving.service.metrics.responses(Route::GrpcEmbed, 200), 205, "every message of the stream is one");
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_become_tokens_and_back() {
    let serving = serving(|_| {}).await;
    let request = EncodeRequest { inputs: "The gardens".to_owned(), add_special_tokens: true, prompt_name: None };
    let answer: EncodeResponse = serving.call("/tei.v1.Tokenize/Tokenize", request.clone()).await.unwrap();
    let found: Vec<_> = answer.tokens.iter().map(|token| (token.id, token.text.as_str(), token.start)).collect();
    let expected =
        [(2, "[CLS]", None), (4, "The", Some(0)), (6, "garden", Some(4)), (7, "s", Some(10)), (3, "[SEP]", None)];
    assert_eq!(found, expected);
    let answers: Vec<EncodeResponse> =
        all(serving.stream("/tei.v1.Tokenize/TokenizeStream", vec![request; 3]).await).await.unwrap();
    assert_eq!(answers, vec![answer; 3]);
    let long = EncodeRequest { inputs: "a ".repeat(2000) + "b", add_special_tokens: true, prompt_name: None };
    let refused = serving.call::<_, EncodeResponse>("/tei.v1.Tokenize/Tokenize", long).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "more characters than the tokenizer is given");
    let request = DecodeRequest { ids: vec![2, 4, 6, 7, 3], skip_special_tokens: true };
    let answer: DecodeResponse = serving.call("/tei.v1.Tokenize/Decode", request.clone()).await.unwrap();
    assert_eq!(answer.text, "the gardens");
    let answers: Vec<DecodeResponse> =
        all(serving.stream("/tei.v1.Tokenize/DecodeStream", vec![request]).await).await.unwrap();
    assert_eq!(answers[0].text, "the gardens");
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_are_scored() {
    let serving = serving(|setup| {
        setup.classify(&["LABEL_0"]);
        setup.others = vec![("labels", &["a", "b"])];
    })
    .await;
    let number = |query: &str, text: &str| {
        let (ids, types) = pair(query, text);
        logits(&ids, &types, 1)[0]
    };
    let texts = ["garden", "the tree", "d"];
    let mut order: Vec<usize> = (0..3).collect();
    order.sort_by(|&a, &b| number("tree", texts[b]).total_cmp(&number("tree", texts[a])));
    let request = RerankRequest {
        query: "tree".to_owned(),
        texts: texts.map(str::to_owned).to_vec(),
        raw_scores: true,
        return_text: true,
        ..RerankRequest::default()
    };
    let answer: RerankResponse = serving.call("/tei.v1.Rerank/Rerank", request).await.unwrap();
    let parts = texts.map(|text| RerankStreamRequest {
        query: "tree".to_owned(),
        text: text.to_owned(),
        raw_scores: true,
        return_text: true,
        ..RerankStreamRequest::default()
    });
    let path = PathAndQuery::from_static("/tei.v1.Rerank/RerankStream");
    let requests = Request::new(tokio_stream::iter(parts));
    let streamed: Response<RerankResponse> =
        serving.client().await.client_streaming(requests, path, ProstCodec::default()).await.unwrap();
    for answer in [answer, streamed.into_inner()] {
        let found: Vec<_> = answer.ranks.into_iter().map(|rank| (rank.index as usize, rank.text, rank.score)).collect();
        let expected: Vec<_> =
            order.iter().map(|&i| (i, Some(texts[i].to_owned()), number("tree", texts[i]))).collect();
        assert_eq!(found, expected);
    }
    let request = PredictPairRequest {
        inputs: vec!["tree".to_owned(), "d".to_owned()],
        raw_scores: true,
        ..PredictPairRequest::default()
    };
    let answer: PredictResponse = serving.call("/tei.v1.Predict/PredictPair", request.clone()).await.unwrap();
    assert_eq!((answer.predictions[0].score, answer.predictions[0].label.as_str()), (number("tree", "d"), "LABEL_0"));
    let answers: Vec<PredictResponse> =
        all(serving.stream("/tei.v1.Predict/PredictPairStream", vec![request; 2]).await).await.unwrap();
    assert_eq!(answers[1].predictions, answer.predictions);
    // Another model, by its name.
    let mut request = Request::new(PredictRequest { inputs: "tree".to_owned(), ..PredictRequest::default() });
    request.metadata_mut().insert("x-model", "labels".parse().unwrap());
    let answer: Response<PredictResponse> = serving.send("/tei.v1.Predict/Predict", request).await.unwrap();
    let scores: Vec<f32> = answer.into_inner().predictions.iter().map(|prediction| prediction.score).collect();
    assert!(scores.len() == 2 && (scores[0] + scores[1] - 1.0).abs() < 1e-6 && scores[0] >= scores[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_statuses_and_are_counted() {
    let serving = serving(|setup| {
        setup.n_workers = 1;
        setup.config.payload_limit = 100_000;
    })
    .await;
    let embed = |request: EmbedRequest| serving.call::<_, EmbedResponse>("/tei.v1.Embed/Embed", request);
    let code = |result: Result<EmbedResponse, Status>| result.unwrap_err().code();
    assert_eq!(code(embed(text("")).await), Code::InvalidArgument);
    assert_eq!(code(embed(text(&"a ".repeat(MAX_TOKENS))).await), Code::InvalidArgument, "too long, and not to be cut");
    assert_eq!(code(embed(EmbedRequest { dimensions: Some(0), ..text("a") }).await), Code::InvalidArgument);
    assert_eq!(code(embed(text(&"a".repeat(120_000))).await), Code::OutOfRange);
    assert_eq!(code(embed(text("poison")).await), Code::FailedPrecondition);
    let mut named = Request::new(text("a"));
    named.metadata_mut().insert("x-model", "none".parse().unwrap());
    let unknown = serving.send::<_, EmbedResponse>("/tei.v1.Embed/Embed", named).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let sparse =
        serving.call::<_, EmbedSparseResponse>("/tei.v1.Embed/EmbedSparse", EmbedSparseRequest::default()).await;
    assert_eq!(sparse.unwrap_err().code(), Code::Unimplemented);
    let nothing = serving.call::<_, EmbedResponse>("/tei.v1.Embed/Nothing", text("a")).await;
    assert_eq!(nothing.unwrap_err().code(), Code::Unimplemented);
    let wrong = serving.call::<_, RerankResponse>("/tei.v1.Rerank/Rerank", RerankRequest::default()).await;
    assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument, "no texts");
    let texts = vec!["a".to_owned()];
    let request = RerankRequest { query: "a".to_owned(), texts, ..RerankRequest::default() };
    let wrong = serving.call::<_, RerankResponse>("/tei.v1.Rerank/Rerank", request).await.unwrap_err();
    assert_eq!((wrong.code(), wrong.message()), (Code::FailedPrecondition, "model is not a re-ranker model"));
    // What cannot be read is the client's mistake, not the server's.
    let unreadable = NoText { inputs: vec![0xff, 0xfe] };
    let refused = || serving.service.metrics.rejections(RejectReason::Payload);
    let before = refused();
    let wrong = serving.call::<_, EmbedResponse>("/tei.v1.Embed/Embed", unreadable.clone()).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument, "{wrong}");
    let mut stream: Streaming<EmbedResponse> = serving.stream("/tei.v1.Embed/EmbedStream", vec![unreadable]).await;
    assert_eq!(stream.next().await.unwrap().unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(refused(), before + 2);
    // A stream ends with its first failure, after what came before.
    let requests = vec![text("a"), text("b"), text(""), text("c")];
    let mut stream: Streaming<EmbedResponse> = serving.stream("/tei.v1.Embed/EmbedStream", requests).await;
    for _ in 0..2 {
        assert!(stream.next().await.unwrap().is_ok());
    }
    assert_eq!(stream.next().await.unwrap().unwrap_err().code(), Code::InvalidArgument);
    // A deadline that passes before any compute. (Not by `grpc-timeout`: tonic's client would give up by itself.)
    let slow = tokio::spawn({
        let service = serving.client().await;
        async move {
            let mut service = service;
            let path = PathAndQuery::from_static("/tei.v1.Embed/Embed");
            let codec = ProstCodec::<EmbedRequest, EmbedResponse>::default();
            service.unary(Request::new(text("slow")), path, codec).await
        }
    });
    while serving.service.engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
    let mut late = Request::new(text("a"));
    late.metadata_mut().insert("x-request-timeout-ms", "30".parse().unwrap());
    let late = serving.send::<_, EmbedResponse>("/tei.v1.Embed/Embed", late).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);
    slow.await.unwrap().unwrap();
    let metrics = &serving.service.metrics;
    // Of the streams each message that was answered: two, and two of what ends a stream.
    assert_eq!(metrics.responses(Route::GrpcEmbed, 200), 3);
    assert_eq!(metrics.responses(Route::GrpcEmbed, 400), 4, "empty, or not to be read, in a call and in a stream");
    assert_eq!(metrics.responses(Route::GrpcEmbed, 422), 2);
    assert_eq!(metrics.responses(Route::GrpcEmbed, 405), 1);
    assert_eq!((metrics.responses(Route::Other, 405), metrics.responses(Route::Other, 200)), (1, 0), "no such method");
    assert_eq!(metrics.responses(Route::GrpcEmbed, 424), 1);
    assert_eq!(metrics.responses(Route::GrpcEmbed, 404), 1);
    assert_eq!(metrics.responses(Route::GrpcEmbed, 413), 1);
    assert_eq!(metrics.responses(Route::GrpcEmbed, 504), 1);
    assert_eq!(metrics.rejections(RejectReason::Deadline), 1);
    assert_eq!(metrics.responses(Route::GrpcRerank, 424), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_a_stream_cancels_its_work() {
    let serving = serving(|setup| setup.n_workers = 1).await;
    let requests = vec![text("slow"); 8];
    let stream: Streaming<EmbedResponse> = serving.stream("/tei.v1.Embed/EmbedStream", requests).await;
    while serving.service.engine.load().admitted_sequences < 8 {
        tokio::task::yield_now().await;
    }
    drop(stream);
    let start = std::time::Instant::now();
    while serving.service.engine.load().queued_sequences > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    serving.service.engine.drained().await;
    assert!(serving.service.metrics.cancellations() >= 6, "{}", serving.service.metrics.cancellations());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_with_the_model_that_took_the_old_ones_place() {
    let serving = serving(|_| {}).await;
    let tokenizers = Arc::new(Mutex::new(Vec::new()));
    let (noted, metrics) = (Arc::clone(&tokenizers), Arc::clone(&serving.service.metrics));
    serving.service.state.set_loader(Box::new(move |_: &str| -> Result<ModelParts, String> {
        let mut noted = noted.lock().unwrap();
        let prompt = ["the ", "a "][noted.len()];
        let model = ServedModel { default_prompt: Some(prompt.to_owned()), ..Setup::default().model };
        let parts = parts(model, 1, Duration::ZERO, &EngineLimits::default(), &metrics);
        noted.push(Arc::downgrade(&parts.tokenizer));
        Ok(parts)
    }));
    let (sender, mut answers) = serving.open().await;
    let mut ask = async || {
        sender.send(text("tree")).await.unwrap();
        answers.next().await.unwrap().unwrap().embeddings
    };
    assert_eq!(ask().await, unit(&pooled(&ids("tree"))));
    serving.service.state.reload(None).await.unwrap();
    assert_eq!(ask().await, unit(&pooled(&ids("the tree"))));
    // Between two messages it keeps none.
    serving.service.state.reload(None).await.unwrap();
    let replaced = tokenizers.lock().unwrap()[0].clone();
    let start = std::time::Instant::now();
    while replaced.strong_count() > 0 {
        assert!(start.elapsed() < Duration::from_secs(5), "the stream keeps the old model");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(ask().await, unit(&pooled(&ids("a tree"))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_messages_and_ends_streams_with_a_status() {
    let mut serving = serving(|setup| {
        setup.classify(&["LABEL_0"]);
        setup.others = vec![("encoder", &[])];
    })
    .await;
    let open = async || {
        let (sender, messages) = mpsc::channel(8);
        let mut requests = Request::new(ReceiverStream::new(messages));
        requests.metadata_mut().insert("x-model", "encoder".parse().unwrap());
        let path = PathAndQuery::from_static("/tei.v1.Embed/EmbedStream");
        let codec = ProstCodec::<EmbedRequest, EmbedResponse>::default();
        (sender, serving.client().await.streaming(requests, path, codec).await.unwrap().into_inner())
    };
    let (busy, mut answers) = open().await;
    let (idle, mut nothing) = open().await;
    // A call of many messages that waits for the next of them.
    let (part, parts) = mpsc::channel(1);
    let mut client = serving.client().await;
    let ranking = tokio::spawn(async move {
        let path = PathAndQuery::from_static("/tei.v1.Rerank/RerankStream");
        let codec = ProstCodec::<RerankStreamRequest, RerankResponse>::default();
        client.client_streaming(Request::new(ReceiverStream::new(parts)), path, codec).await
    });
    part.send(RerankStreamRequest { query: "a".to_owned(), text: "b".to_owned(), ..Default::default() }).await.unwrap();
    // Two for each worker, so that some wait.
    for _ in 0..4 {
        busy.send(text("slow")).await.unwrap();
    }
    // The four, and the call itself; the streams are at nothing by themselves.
    while serving.service.metrics.requests_in_flight() < 5 {
        tokio::task::yield_now().await;
    }
    let start = std::time::Instant::now();
    serving.stop.take().unwrap().send(()).unwrap();
    let ended = nothing.next().await.unwrap().unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "the service is stopping"));
    assert!(ended.metadata().contains_key("retry-after"));
    for _ in 0..4 {
        let answer = answers.next().await.unwrap().unwrap();
        assert_eq!(answer.embeddings, unit(&pooled(&ids("slow"))), "what was read is answered");
    }
    assert_eq!(answers.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(ranking.await.unwrap().unwrap_err().code(), Code::Unavailable);
    serving.ended.await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?} of 5 s", start.elapsed());
    let metrics = &serving.service.metrics;
    assert_eq!((metrics.requests_in_flight(), metrics.cancellations()), (0, 0));
    assert_eq!(metrics.rejections(RejectReason::Draining), 1, "the call; nothing was refused to the streams");
    drop((busy, idle, part));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_the_drain_hold_for_grpc_too() {
    let mut serving = serving(|setup| setup.config.api_keys = vec!["key".to_owned()]).await;
    let refused = serving.call::<_, EmbedResponse>("/tei.v1.Embed/Embed", text("a")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(serving.service.metrics.responses(Route::GrpcEmbed, 401), 1);
    let with_key = || {
        let mut request = Request::new(text("a"));
        request.metadata_mut().insert("authorization", "Bearer key".parse().unwrap());
        request
    };
    assert!(serving.send::<_, EmbedResponse>("/tei.v1.Embed/Embed", with_key()).await.is_ok());
    let health = |service: &str| HealthCheckRequest { service: service.to_owned() };
    let check = "/grpc.health.v1.Health/Check";
    for service in ["", "tei.v1.Embed"] {
        let answer: HealthCheckResponse = serving.call(check, health(service)).await.unwrap();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    let unknown = serving.call::<_, HealthCheckResponse>(check, health("tei.v1.None")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Watch");
    let request = Request::new(health(""));
    let watch: Response<Streaming<HealthCheckResponse>> =
        serving.client().await.server_streaming(request, path, ProstCodec::default()).await.unwrap();
    let mut watch = watch.into_inner();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let slow = tokio::spawn({
        let mut client = serving.client().await;
        let mut request = with_key();
        request.get_mut().inputs = "slow".to_owned();
        async move {
            let codec = ProstCodec::<EmbedRequest, EmbedResponse>::default();
            client.unary(request, PathAndQuery::from_static("/tei.v1.Embed/Embed"), codec).await
        }
    });
    while serving.service.engine.load().running_sequences == 0 {
        tokio::task::yield_now().await;
    }
    serving.stop.take().unwrap().send(()).unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let answer = slow.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.embeddings, unit(&pooled(&ids("slow"))), "what was accepted is answered");
    serving.ended.await.unwrap().unwrap();
}
