//! API keys from a file.

use axum::body::Body;
use axum::http::Request;
use niwaki::server::ConfigError;
use niwaki::telemetry::Credential;
use serde_json::{Value, json};

use crate::service::process::{Process, refused};
use crate::service::{Service, service};

async fn info(service: &Service, key: &str) -> u16 {
    let request = Request::get("/info").header("authorization", format!("Bearer {key}"));
    service.ask(request.body(Body::empty()).unwrap()).await.status
}

#[tokio::test]
async fn keys_of_a_file_are_read_again() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "# one a line\nold\nstays\n").unwrap();
    let service = service(|setup| {
        setup.config.api_keys = vec!["flag".to_owned()];
        setup.config.api_key_file = Some(file.path().to_owned());
    });
    let accepted = async || {
        let mut accepted = Vec::new();
        for key in ["flag", "old", "stays", "new", "# one a line", "old\tstays", ""] {
            match info(&service, key).await {
                200 => accepted.push(key),
                status => assert_eq!(status, 401),
            }
        }
        accepted
    };
    assert_eq!(accepted().await, ["flag", "old", "stays"]);
    std::fs::write(file.path(), "stays\nnew\n").unwrap();
    assert_eq!(accepted().await, ["flag", "old", "stays"], "a file is read when that is asked for");
    service.state.reload_credentials().await;
    assert_eq!(accepted().await, ["flag", "stays", "new"]);
    for bad in ["", "# none\n", "two words\n", "caf\u{e9}\n"] {
        std::fs::write(file.path(), bad).unwrap();
        service.state.reload_credentials().await;
        assert_eq!(accepted().await, ["flag", "stays", "new"], "{bad:?}");
    }
    std::fs::remove_file(file.path()).unwrap();
    service.state.reload_credentials().await;
    assert_eq!(accepted().await, ["flag", "stays", "new"]);
    assert_eq!(service.metrics.credential_reloads(Credential::ApiKeys), (1, 5));
    // What is shown of the service shows no key.
    let shown = format!("{:?}", service.state);
    assert!(!shown.contains("flag") && !shown.contains("stays"), "{shown}");
}

#[tokio::test]
async fn a_file_alone_locks_the_service() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "key\n").unwrap();
    let service = service(|setup| setup.config.api_key_file = Some(file.path().to_owned()));
    assert_eq!(service.post("/embed", json!({"inputs": "a"})).await.status, 401);
    assert_eq!(info(&service, "key").await, 200);
    let without = self::service(|_| {});
    without.state.reload_credentials().await;
    assert_eq!(without.metrics.credential_reloads(Credential::ApiKeys), (0, 0));
    let error = niwaki::server::AppState::new(
        niwaki::server::ServerConfig {
            api_key_file: Some("/nowhere/keys".into()),
            ..niwaki::server::ServerConfig::default()
        },
        Vec::new(),
        niwaki::telemetry::Metrics::new(),
    );
    assert!(matches!(error, Err(ConfigError::KeyFile(_))), "{error:?}");
}

#[test]
fn the_binary_reads_its_keys_again_on_a_signal_and_refuses_bad_ones() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().display().to_string();
    std::fs::write(file.path(), "first\nsecret word\n").unwrap();
    let output = refused(&["--api-key-file", &path]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    let last = message.lines().last().unwrap();
    assert!(last.starts_with("niwaki: ") && last.contains(&path) && last.contains("line 2"), "{message}");
    assert!(!message.contains("secret"), "{message}");

    std::fs::write(file.path(), "first\n").unwrap();
    let server = Process::start(&["--api-key-file", &path]);
    let embed = |key: &str| server.ask_with(key, "POST", "/embed", &json!({"inputs": "a"})).0;
    assert_eq!((embed("first"), embed("second"), embed("")), (200, 401, 401));
    std::fs::write(file.path(), "second\n").unwrap();
    server.signal("HUP");
    server.until_metric("niwaki_credential_reloads_total{credential=\"api_keys\",result=\"swapped\"}", 1.0);
    assert_eq!((embed("first"), embed("second")), (401, 200));
    std::fs::write(file.path(), "third\nsecret word\n").unwrap();
    server.signal("HUP");
    server.until_metric("niwaki_credential_reloads_total{credential=\"api_keys\",result=\"refused\"}", 1.0);
    assert_eq!((embed("second"), embed("third")), (200, 401));
    let refusal = server.log().into_iter().find(|event| event["message"] == "reload refused").unwrap();
    assert!(refusal["reason"].as_str().unwrap().contains("line 2"), "{refusal}");
    assert!(!Value::Array(server.log()).to_string().contains("secret"));
}
