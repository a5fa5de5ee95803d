//! Downloads from a stand-in of the Hugging Face hub: what arrives, and what is done about everything that can go wrong.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/hub_server.rs"]
mod hub_server;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hub_server::{COMMIT, Reply, Repo, Server, StandIn};
use niwaki::checkpoint::hub::{HubConfig, HubError, Patience, download};

const MODEL: &str = "org/tiny";
const WEIGHTS: &str = "model.safetensors";
/// Large enough that half of it does not fit into socket buffers unnoticed, and that a cut counts as progress.
const WEIGHTS_BYTES: usize = 3 << 20;

fn weights() -> Vec<u8> {
    (0..WEIGHTS_BYTES).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn repo() -> Repo {
    let text = |name: &str, body: &str| (name.to_owned(), body.as_bytes().to_vec());
    Repo::new([
        text("config.json", "{\"model_type\": \"bert\"}"),
        text("tokenizer.json", "{\"model\": {}}"),
        text("modules.json", "[{\"path\": \"\", \"type\": \"sentence_transformers.models.Transformer\"}]"),
        text("1_Pooling/config.json", "{\"pooling_mode_mean_tokens\": true}"),
        text("README.md", "# tiny"),
        text("pytorch_model.bin", "not wanted"),
        text("onnx/model.onnx", "not wanted"),
        (WEIGHTS.to_owned(), weights()),
    ])
}

/// A cache directory and a configuration that points to a stand-in, with short waits.
struct Client {
    dir: tempfile::TempDir,
    config: HubConfig,
}

impl Client {
    fn of(stand_in: &StandIn) -> Self {
        Self::at(&stand_in.origin.url)
    }

    fn at(endpoint: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = HubConfig::from_env(&|_| None);
        config.endpoint = endpoint.to_owned();
        config.cache = Some(dir.path().join("cache"));
        config.use_proxy = false;
        config.patience = Patience {
            connect: Duration::from_secs(2),
            read: Duration::from_secs(5),
            attempts: 3,
            backoff: Duration::from_millis(5),
            lock: Duration::from_secs(20),
        };
        Self { dir, config }
    }

    fn download(&self) -> Result<PathBuf, HubError> {
        download(&self.config, MODEL, None, &())
    }

    fn model_dir(&self) -> PathBuf {
        self.dir.path().join("cache/models--org--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.model_dir().join("snapshots").join(COMMIT)
    }

    /// Every regular file and link below the temporary directory, relative to it.
    fn all_files(&self) -> Vec<String> {
        fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, files) } else { files.push(path) }
            }
        }
        let mut files = Vec::new();
        walk(self.dir.path(), &mut files);
        files.iter().map(|path| path.strip_prefix(self.dir.path()).unwrap().display().to_string()).collect()
    }
}

#[test]
fn a_model_arrives_in_the_layout_of_the_hubs_own_cache() {
    let repo = repo();
    let stand_in = repo.clone().serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    assert_eq!(dir, client.snapshot());
    for (file, content) in &repo.files {
        let path = dir.join(file);
        if file.starts_with("onnx") || file.starts_with("pytorch") {
            assert!(!path.exists(), "{file} is of no use and was fetched");
            continue;
        }
        assert!(fs::read(&path).unwrap() == *content, "{file} differs");
        assert!(path.is_symlink());
        let target = fs::canonicalize(&path).unwrap();
        let blob = fs::canonicalize(client.model_dir()).unwrap().join("blobs").join(repo.etag(file));
        assert_eq!(target, blob);
    }
    assert_eq!(fs::read_to_string(client.model_dir().join("refs/main")).unwrap(), COMMIT);
    assert!(!client.all_files().iter().any(|file| file.ends_with(".incomplete")));

    drop(stand_in);
    assert_eq!(client.download().unwrap(), dir, "what is cached needs no network");
    assert_eq!(download(&client.config, MODEL, Some(COMMIT), &()).unwrap(), dir, "nor does the commit by name");
}

#[test]
fn a_revision_may_be_a_path() {
    let stand_in = repo().serve();
    let client = Client::of(&stand_in);
    download(&client.config, MODEL, Some("refs/pr/1"), &()).unwrap();
    assert_eq!(fs::read_to_string(client.model_dir().join("refs/refs/pr/1")).unwrap(), COMMIT);
}

#[test]
fn the_token_goes_to_the_endpoint_only() {
    let mut repo = repo();
    repo.token = Some("hf_secret".to_owned());
    let stand_in = repo.clone().serve();
    let mut client = Client::of(&stand_in);
    client.config.token = Some("hf_secret".to_owned());
    client.download().unwrap();
    assert!(stand_in.origin.requests().iter().all(|r| r.header("authorization") == Some("Bearer hf_secret")));
    let stored = stand_in.storage.requests();
    assert!(!stored.is_empty() && stored.iter().all(|request| request.header("authorization").is_none()));

    repo.one_host = true; // a relative redirect stays at the endpoint
    let stand_in = repo.serve();
    let mut client = Client::of(&stand_in);
    client.config.token = Some("hf_secret".to_owned());
    client.download().unwrap();
    let stored = stand_in.origin.requests_of("?signature=secret");
    assert!(!stored.is_empty() && stored.iter().all(|r| r.header("authorization") == Some("Bearer hf_secret")));
}

#[test]
fn a_cut_transfer_goes_on_where_it_stopped() {
    let mut repo = repo();
    repo.cuts = 2;
    let stand_in = repo.serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    assert!(fs::read(dir.join(WEIGHTS)).unwrap() == weights());
    let ranges: Vec<_> =
        stand_in.storage.requests().iter().filter_map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges, [format!("bytes={}-", WEIGHTS_BYTES / 2), format!("bytes={}-", WEIGHTS_BYTES * 3 / 4)]);
}

#[test]
fn a_busy_server_does_not_cost_what_is_there() {
    let mut repo = repo();
    (repo.cuts, repo.refuses_first_range) = (1, true);
    let stand_in = repo.serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    assert!(fs::read(dir.join(WEIGHTS)).unwrap() == weights());
    let asked: Vec<_> = stand_in.storage.requests().iter().map(|r| r.header("range").is_some()).collect();
    assert_eq!(asked, [false, true, true]);
}

#[test]
fn the_next_run_goes_on_where_the_last_one_failed() {
    let mut repo = repo();
    repo.cuts = 1;
    let stand_in = repo.clone().serve();
    let mut client = Client::of(&stand_in);
    client.config.patience.attempts = 1;
    let error = client.download().unwrap_err();
    assert!(
        matches!(&error, HubError::Interrupted { file, received, .. }
        if file == WEIGHTS && *received == (WEIGHTS_BYTES / 2) as u64),
        "{error}"
    );
    assert!(!client.snapshot().join(WEIGHTS).exists());
    let incomplete = client.model_dir().join("blobs").join(format!("{}.incomplete", repo.etag(WEIGHTS)));
    assert_eq!(fs::metadata(&incomplete).unwrap().len(), (WEIGHTS_BYTES / 2) as u64);

    let dir = client.download().unwrap();
    assert!(fs::read(dir.join(WEIGHTS)).unwrap() == weights());
    assert!(!incomplete.exists());
    let last = stand_in.storage.requests().pop().unwrap();
    assert_eq!(last.header("range").unwrap(), format!("bytes={}-", WEIGHTS_BYTES / 2));
}

#[test]
fn a_server_without_ranges_begins_again() {
    let mut repo = repo();
    (repo.cuts, repo.ignores_range) = (1, true);
    let stand_in = repo.serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    assert!(fs::read(dir.join(WEIGHTS)).unwrap() == weights());
    assert_eq!(stand_in.storage.requests().iter().filter(|r| r.header("range").is_some()).count(), 1);
}

#[test]
fn what_an_earlier_run_left_is_not_trusted() {
    let repo = repo();
    let garbage = [vec![0; 1_000], vec![0; WEIGHTS_BYTES], vec![0; WEIGHTS_BYTES + 5]];
    for left in garbage {
        let stand_in = repo.clone().serve();
        let client = Client::of(&stand_in);
        let blobs = client.model_dir().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", repo.etag(WEIGHTS))), &left).unwrap();
        let dir = client.download().unwrap();
        assert!(fs::read(dir.join(WEIGHTS)).unwrap() == weights(), "{} bytes were left", left.len());
    }
}

#[test]
fn wrong_bytes_are_removed_and_named() {
    for (file, digits, algorithm) in [(WEIGHTS, 64, "SHA-256"), ("config.json", 40, "git SHA-1")] {
        let mut repo = repo();
        repo.false_etag.insert(file.to_owned(), "a".repeat(digits));
        let stand_in = repo.serve();
        let client = Client::of(&stand_in);
        let error = client.download().unwrap_err();
        assert!(matches!(&error, HubError::Checksum { file: f, algorithm: a, .. } if f == file && *a == algorithm));
        assert!(error.to_string().contains("was removed"), "{error}");
        let a_run = "a".repeat(40);
        assert!(!client.all_files().iter().any(|name| name.contains(&format!("blobs/{a_run}"))));
        assert!(!client.snapshot().join(file).exists());
    }
}

#[test]
fn sizes_are_bounded_and_must_be_those_announced() {
    for (size, expected) in [(1u64 << 60, "at most"), (WEIGHTS_BYTES as u64 + 1, "should have")] {
        let mut repo = repo();
        repo.false_size = Some(size);
        let stand_in = repo.serve();
        let error = Client::of(&stand_in).download().unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let server = Server::start(|_| Reply::new(200, vec![b' '; (16 << 20) + 2]));
    let error = Client::at(&server.url).download().unwrap_err();
    assert!(matches!(error, HubError::TooLarge { limit, .. } if limit == 16 << 20), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let server = Server::start(|_| Reply::new(404, "Repository not found"));
    let error = Client::at(&server.url).download().unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("org/tiny (revision main) does not exist"), "{error}");

    let mut repo = repo();
    repo.token = Some("right".to_owned());
    let stand_in = repo.serve();
    let mut client = Client::of(&stand_in);
    let error = client.download().unwrap_err().to_string();
    assert!(
        error.contains("HTTP 401: Access to model org/tiny is restricted.") && error.contains("HF_TOKEN"),
        "{error}"
    );
    client.config.token = Some("wrong".to_owned());
    let error = client.download().unwrap_err().to_string();
    assert!(error.contains("HTTP 403") && error.contains("accept its terms"), "{error}");
    client.config.token = Some("two\nlines".to_owned());
    assert!(matches!(client.download(), Err(HubError::Token)));
    assert_eq!(stand_in.origin.requests().len(), 2, "a refusal is not tried again");
}

#[test]
fn passing_trouble_is_waited_for_and_lasting_trouble_is_not() {
    let mut repo = repo();
    repo.first_replies =
        vec![Reply::new(503, ""), Reply::new(429, "slow down").header("Retry-After", &0), Reply::new(500, "")];
    let stand_in = repo.clone().serve();
    let mut client = Client::of(&stand_in);
    client.config.patience.attempts = 4;
    client.download().unwrap();

    client = Client::of(&repo.serve());
    client.config.patience.attempts = 1;
    assert!(client.download().is_err());

    let server = Server::start(|_| Reply::new(500, "out of order"));
    let error = Client::at(&server.url).download().unwrap_err();
    assert!(matches!(&error, HubError::Status { status: 500, .. }), "{error}");
    assert_eq!(server.requests().len(), 3);
    assert!(error.to_string().contains("out of order"), "{error}");
}

#[test]
fn files_that_a_model_needs_are_missed_and_others_are_not() {
    for file in ["config.json", "tokenizer.json", WEIGHTS] {
        let mut repo = repo();
        repo.files.remove(file);
        let all: Vec<String> = repo.files.keys().cloned().collect();
        let stand_in = repo.clone().serve();
        let error = Client::of(&stand_in).download().unwrap_err();
        assert!(matches!(&error, HubError::MissingFile { file: f, .. } if f == file), "not listed: {error}");

        repo.listed = Some([all, vec![file.to_owned()]].concat());
        let stand_in = repo.serve();
        let error = Client::of(&stand_in).download().unwrap_err();
        assert!(matches!(&error, HubError::MissingFile { file: f, .. } if f == file), "listed, not served: {error}");
    }
    let mut repo = repo();
    repo.listed = Some(repo.files.keys().cloned().collect());
    repo.files.remove("README.md");
    let stand_in = repo.serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    assert!(dir.join(WEIGHTS).exists() && !dir.join("README.md").exists());
}

#[test]
fn shards_and_folders_of_transformers_are_followed() {
    let mut repo = repo();
    repo.files.remove(WEIGHTS);
    let move_to = |repo: &mut Repo, from: &str, to: &str| {
        let content = repo.files.remove(from).unwrap();
        repo.files.insert(to.to_owned(), content);
    };
    move_to(&mut repo, "config.json", "0_Transformer/config.json");
    move_to(&mut repo, "tokenizer.json", "0_Transformer/tokenizer.json");
    let modules = r#"[{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]"#;
    repo.files.insert("modules.json".to_owned(), modules.into());
    let index =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    repo.files.insert("0_Transformer/model.safetensors.index.json".to_owned(), index.into());
    repo.files.insert("0_Transformer/model-1.safetensors".to_owned(), b"one".to_vec());
    repo.files.insert("0_Transformer/model-2.safetensors".to_owned(), b"two".to_vec());
    let stand_in = repo.clone().serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    assert_eq!(fs::read(dir.join("0_Transformer/model-2.safetensors")).unwrap(), b"two");
    drop(stand_in);
    fs::remove_dir_all(client.model_dir().join(".niwaki")).unwrap();
    assert_eq!(client.download().unwrap(), dir, "the snapshot has all that is needed");

    repo.files.remove("0_Transformer/model-2.safetensors");
    let stand_in = repo.serve();
    let error = Client::of(&stand_in).download().unwrap_err();
    assert!(error.to_string().contains("0_Transformer/model-2.safetensors"), "{error}");
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    let names = ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "1_Pooling/../../../../evil/config.json", ""];
    for name in names {
        let mut repo = repo();
        repo.listed = Some([repo.files.keys().cloned().collect(), vec![name.to_owned()]].concat());
        let stand_in = repo.serve();
        let client = Client::of(&stand_in);
        let error = client.download().unwrap_err();
        assert!(matches!(error, HubError::UnsafeName { .. }), "{name:?}: {error}");
        assert_eq!(client.all_files(), [""; 0], "{name:?}");
    }
    let mut bad_commit = repo();
    bad_commit.sha = "../../../evil".to_owned();
    let stand_in = bad_commit.serve();
    assert!(matches!(Client::of(&stand_in).download(), Err(HubError::UnsafeName { .. })));

    let mut bad_shard = repo();
    bad_shard.files.remove(WEIGHTS);
    let index = br#"{"weight_map": {"a": "../../../evil.safetensors"}}"#;
    bad_shard.files.insert("model.safetensors.index.json".to_owned(), index.to_vec());
    let stand_in = bad_shard.serve();
    assert!(matches!(Client::of(&stand_in).download(), Err(HubError::UnsafeName { .. })));

    let mut bad_etag = repo();
    bad_etag.false_etag.insert("config.json".to_owned(), "../../../../evil".to_owned());
    let stand_in = bad_etag.serve();
    let client = Client::of(&stand_in);
    client.download().unwrap(); // such a tag is not used as a name; the file is that of the commit all the same
    assert!(client.all_files().iter().all(|file| file.starts_with("cache/") && !file.contains("evil")));
}

#[test]
fn without_network_the_cache_serves_or_the_error_is_clear() {
    let repo = repo();
    let stand_in = repo.serve();
    let mut client = Client::of(&stand_in);
    client.config.offline = true;
    let error = client.download().unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }) && error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    assert!(stand_in.origin.requests().is_empty(), "offline means no request at all");
    client.config.offline = false;
    let dir = client.download().unwrap();
    client.config.offline = true;
    assert_eq!(client.download().unwrap(), dir);

    // As another tool would have left it: complete for us, but not noted by us.
    fs::remove_dir_all(client.model_dir().join(".niwaki")).unwrap();
    assert_eq!(client.download().unwrap(), dir);
    client.config.offline = false;
    drop(stand_in);
    assert_eq!(client.download().unwrap(), dir, "the hub cannot be reached");
    fs::remove_file(dir.join(WEIGHTS)).unwrap();
    let started = Instant::now();
    let error = client.download().unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("cannot reach http://127.0.0.1") && text.contains("--model"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_snapshot_of_another_tool_is_completed() {
    let repo = repo();
    let stand_in = repo.serve();
    let client = Client::of(&stand_in);
    let dir = client.download().unwrap();
    fs::remove_dir_all(client.model_dir().join(".niwaki")).unwrap();
    fs::remove_file(dir.join("modules.json")).unwrap();
    let n_transfers = stand_in.storage.requests().len();
    assert_eq!(client.download().unwrap(), dir);
    assert!(dir.join("modules.json").is_file());
    assert_eq!(stand_in.storage.requests().len(), n_transfers, "what was there is not fetched again");
}

#[test]
fn a_silent_server_is_not_waited_for_forever() {
    let stall = || Reply { stall: Some(Duration::from_secs(30)), ..Reply::new(200, "").header("Content-Length", &100) };
    let server = Server::start(move |_| stall());
    let mut client = Client::at(&server.url);
    client.config.patience.read = Duration::from_millis(200);
    let started = Instant::now();
    let error = client.download().unwrap_err();
    assert!(matches!(error, HubError::Interrupted { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn senseless_answers_are_errors() {
    let redirect = |to: &'static str| Server::start(move |_| Reply::new(302, "").header("Location", &to));
    for (to, expected) in [("/again", "redirects"), ("file:///etc/passwd", "redirect to nowhere"), ("", "nowhere")] {
        let server = redirect(to);
        let error = Client::at(&server.url).download().unwrap_err();
        assert!(matches!(error, HubError::Answer { .. }) && error.to_string().contains(expected), "{to:?}: {error}");
    }
    for body in ["<html>", "{}", "[]", "{\"sha\": 1, \"siblings\": []}", ""] {
        let server = Server::start(move |_| Reply::new(200, body));
        let error = Client::at(&server.url).download().unwrap_err();
        assert!(matches!(error, HubError::Json { .. }), "{body:?}: {error}");
    }
    for endpoint in ["huggingface.co", "ftp://x", "", "http://user:secret@127.0.0.1"] {
        let result = Client::at(endpoint).download();
        assert!(matches!(result, Err(HubError::Endpoint { .. })), "{endpoint:?}");
    }
}

#[test]
fn downloads_at_the_same_time_share_one_transfer() {
    let stand_in = repo().serve();
    let client = Client::of(&stand_in);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| client.download())).collect();
        for one in all {
            let dir = one.join().unwrap().unwrap();
            assert!(fs::read(dir.join(WEIGHTS)).unwrap() == weights());
        }
    });
    assert_eq!(stand_in.storage.requests().len(), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_called_by_its_name() {
    let repo = repo();
    let stand_in = repo.clone().serve();
    let client = Client::of(&stand_in);
    let blobs = client.model_dir().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    std::os::unix::fs::symlink("/dev/full", blobs.join(format!("{}.incomplete", repo.etag(WEIGHTS)))).unwrap();
    let error = client.download().unwrap_err();
    assert!(matches!(error, HubError::DiskFull { .. }), "{error}");
}

#[test]
fn the_binary_reads_the_cache_s_variables_as_hugging_face_tools_do() {
    let (cache, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let home_dir = home.path().to_str().unwrap();
    let run = |variables: &[(&str, &str)]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_niwaki"))
            .args(["embed", "--model-id", MODEL])
            .env_remove("MODEL")
            .env_remove("HF_HUB_CACHE")
            .envs([("HF_HUB_OFFLINE", "1"), ("HF_HOME", home_dir)])
            .envs(variables.iter().copied())
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let cache_dir = cache.path().to_str().unwrap();
    let error = run(&[("HF_HUB_CACHE", cache_dir), ("HUGGINGFACE_HUB_CACHE", "/nowhere")]);
    assert!(error.contains(cache_dir), "{error}");
    // What is empty says nothing.
    let error = run(&[("HF_TOKEN", ""), ("HUGGINGFACE_HUB_CACHE", "")]);
    assert!(error.contains(home_dir), "{error}");
}
