//! TLS on every port.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use niwaki::server::grpc::messages::{EmbedRequest, EmbedResponse};
use niwaki::server::{Listeners, TlsFiles, serve};
use niwaki::telemetry::{Credential, Dropped, Port};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};
use tonic::codegen::http::Uri;
use tonic::transport::Endpoint;

use super::http2;
use crate::service::process::{Process, refused};
use crate::service::{Client, Service, Setup, ids, pooled, service, unit};

/// Certificates in a directory: PEM, signed by themselves.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
        let certificates = Self(tempfile::tempdir().unwrap());
        certificates.renew();
        certificates
    }

    /// A new certificate in the place of the old one.
    fn renew(&self) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(self.cert(), made.cert.pem()).unwrap();
        std::fs::write(self.key(), made.signing_key.serialize_pem()).unwrap();
    }

    fn cert(&self) -> PathBuf {
        self.0.path().join("tls.crt")
    }

    fn key(&self) -> PathBuf {
        self.0.path().join("tls.key")
    }

    fn files(&self) -> TlsFiles {
        TlsFiles { cert: self.cert(), key: self.key() }
    }
}

/// A client that trusts the certificate at `trusted` and nothing else.
async fn connect(address: SocketAddr, trusted: &Path, protocols: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(trusted).unwrap()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
}

struct Secure {
    service: Service,
    certificates: Certificates,
    http: SocketAddr,
    grpc: SocketAddr,
    admin: SocketAddr,
}

async fn secure(change: impl FnOnce(&mut Setup)) -> Secure {
    let certificates = Certificates::new();
    let service = service(|setup| {
        setup.config.tls = Some(certificates.files());
        change(setup);
    });
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (http, grpc, admin) = (bind().await, bind().await, bind().await);
    let at = |listener: &TcpListener| listener.local_addr().unwrap();
    let (http_at, grpc_at, admin_at) = (at(&http), at(&grpc), at(&admin));
    let listeners = Listeners { http, grpc: Some(grpc), admin: Some(admin) };
    tokio::spawn(serve(listeners, service.state.clone(), std::future::pending(), Duration::from_secs(1)));
    Secure { service, certificates, http: http_at, grpc: grpc_at, admin: admin_at }
}

impl Secure {
    async fn client(&self) -> std::io::Result<Client> {
        let stream = connect(self.http, &self.certificates.cert(), &["http/1.1"]).await?;
        Ok(Client::over(stream))
    }
}

#[tokio::test]
async fn every_port_and_protocol_speaks_tls() {
    let secure = secure(|_| {}).await;
    let trusted = secure.certificates.cert();
    let expected = unit(&pooled(&ids("the tree")));
    // HTTP/1.1, chosen and by default.
    for protocols in [&["http/1.1"][..], &[]] {
        let mut client = Client::over(connect(secure.http, &trusted, protocols).await.unwrap());
        for _ in 0..2 {
            let rows = client.post("/embed", &json!({"inputs": "the tree"})).await.unwrap().read::<Vec<Vec<f32>>>();
            assert_eq!(rows, std::slice::from_ref(&expected));
        }
    }
    // HTTP/2, which is preferred.
    let stream = connect(secure.http, &trusted, &["http/1.1", "h2"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let mut client = http2::connect(stream, None).await;
    let answer = http2::post(&mut client, "/embed", &json!({"inputs": "the tree"}), &[]).await.unwrap();
    assert_eq!(answer.read::<Vec<Vec<f32>>>(), std::slice::from_ref(&expected));
    // gRPC.
    let stream = connect(secure.grpc, &trusted, &["h2"]).await.unwrap();
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| std::future::ready(stream.take().ok_or(std::io::ErrorKind::Other)));
    let connector = tower::util::MapErr::new(connector, std::io::Error::from);
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let request = tonic::Request::new(EmbedRequest { inputs: "the tree".to_owned(), ..EmbedRequest::default() });
    let path = PathAndQuery::from_static("/tei.v1.Embed/Embed");
    let codec = tonic_prost::ProstCodec::<EmbedRequest, EmbedResponse>::default();
    let answer = client.unary(request, path, codec).await.unwrap().into_inner();
    assert_eq!(answer.embeddings, expected);
    // Administration.
    let mut client = Client::over(connect(secure.admin, &trusted, &[]).await.unwrap());
    assert_eq!(client.get("/metrics").await.unwrap().status, 200);
    let metrics = &secure.service.metrics;
    assert_eq!([Port::Http, Port::Grpc, Port::Admin].map(|port| metrics.connections(port)), [1, 1, 1]);
    assert_eq!(metrics.dropped(Dropped::Handshake), 0);
}

#[tokio::test]
async fn who_speaks_no_tls_or_takes_his_time_costs_the_others_nothing() {
    let secure = secure(|setup| setup.config.handshake_timeout = Duration::from_secs(2)).await;
    let metrics = &secure.service.metrics;
    let start = Instant::now();
    // Nothing, half a greeting, and a greeting byte by byte.
    let mut silent = Client::connect(secure.http).await.unwrap();
    let mut half = Client::connect(secure.http).await.unwrap();
    half.send(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.unwrap();
    let dribble = tokio::spawn({
        let address = secure.http;
        async move {
            let mut client = Client::connect(address).await.unwrap();
            for byte in [0x16, 0x03, 0x01, 0x02, 0x00, 0x01].into_iter().chain(std::iter::repeat(0)) {
                if client.send(&[byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let stalled: Vec<_> = futures_of(200, async || Client::connect(secure.http).await.unwrap()).await;
    // Meanwhile another is served.
    let mut client = secure.client().await.unwrap();
    assert_eq!(client.post("/embed", &json!({"inputs": "a"})).await.unwrap().status, 200);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(metrics.dropped(Dropped::Handshake), 0);
    assert!(silent.is_closed().await);
    while !half.is_closed().await {}
    let waited = start.elapsed();
    assert!(waited > Duration::from_millis(1900) && waited < Duration::from_secs(6), "{waited:?}");
    dribble.await.unwrap();
    drop(stalled);
    // One that speaks plain HTTP is told by TLS's means, and at once.
    let mut plain = Client::connect(secure.http).await.unwrap();
    plain.send(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n").await.unwrap();
    while !plain.is_closed().await {}
    assert!(!plain.has("HTTP"), "no answer in the clear");
    while metrics.dropped(Dropped::Handshake) < 204 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(client.get("/health").await.unwrap().status, 200);
    assert_eq!(metrics.connections(Port::Http), 1);
}

async fn futures_of<T>(n: usize, make: impl AsyncFn() -> T) -> Vec<T> {
    let mut all = Vec::new();
    for _ in 0..n {
        all.push(make().await);
    }
    all
}

#[tokio::test]
async fn a_certificate_is_replaced_while_connections_go_on() {
    let secure = secure(|_| {}).await;
    let old = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(secure.certificates.cert(), old.path()).unwrap();
    let mut before = secure.client().await.unwrap();
    assert_eq!(before.get("/health").await.unwrap().status, 200);
    secure.certificates.renew();
    assert!(secure.client().await.is_err(), "the new one is not in use yet");
    secure.service.state.reload_credentials().await;
    let mut after = secure.client().await.unwrap();
    assert_eq!(after.get("/health").await.unwrap().status, 200);
    assert_eq!(before.get("/health").await.unwrap().status, 200, "connections keep what they began with");
    assert!(connect(secure.http, old.path(), &[]).await.is_err());
    // A key that does not fit is refused, and the pair in use stays.
    let other = Certificates::new();
    std::fs::copy(other.key(), secure.certificates.key()).unwrap();
    secure.service.state.reload_credentials().await;
    assert_eq!(secure.client().await.unwrap().get("/health").await.unwrap().status, 200);
    assert_eq!(secure.service.metrics.credential_reloads(Credential::Certificate), (1, 1));
}

#[tokio::test]
async fn the_drain_ends_connections_in_the_middle_of_a_handshake() {
    let certificates = Certificates::new();
    let mut serving = crate::service::serving(Duration::from_secs(20), |setup| {
        setup.config.tls = Some(certificates.files());
    })
    .await;
    let mut silent = Client::connect(serving.address).await.unwrap();
    let stream = connect(serving.address, &certificates.cert(), &[]).await.unwrap();
    let mut client = Client::over(stream);
    assert_eq!(client.get("/health").await.unwrap().status, 200);
    let start = Instant::now();
    serving.stop();
    serving.ended.await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(silent.is_closed().await && client.is_closed().await);
}

#[test]
fn the_binary_takes_certificates_and_names_bad_ones() {
    let certificates = Certificates::new();
    let (cert, key) = (certificates.cert().display().to_string(), certificates.key().display().to_string());
    for (arguments, expected) in [
        (vec!["--tls-cert", &cert], "--tls-key"),
        (vec!["--tls-key", &key], "--tls-cert"),
        (vec!["--tls-cert", &cert, "--tls-key", "/nowhere/tls.key"], "/nowhere/tls.key"),
        (vec!["--tls-cert", &key, "--tls-key", &key], "no certificate in PEM"),
        (vec!["--tls-cert", &cert, "--tls-key", &cert], "no private key in PEM"),
    ] {
        let output = refused(&arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message}");
    }
    let server = Process::start(&["--tls-cert", &cert, "--tls-key", &key]);
    let port = server.address.port().to_string();
    let health = |tls: bool, environment: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_niwaki"));
        command.args(["health", "--port", &port]).args(tls.then_some("--tls")).env_remove("TLS_CERT");
        command.envs(environment.map(|path| ("TLS_CERT", path)));
        command.output().unwrap().status.code()
    };
    assert_eq!((health(true, None), health(false, Some(&cert)), health(false, None)), (Some(0), Some(0), Some(2)));
    // A new pair on a signal.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    certificates.renew();
    assert!(runtime.block_on(connect(server.address, &certificates.cert(), &[])).is_err());
    server.signal("HUP");
    let start = Instant::now();
    while runtime.block_on(connect(server.address, &certificates.cert(), &[])).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", server.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    server.signal("TERM");
    let mut server = server;
    assert!(server.child.wait().unwrap().success());
}
