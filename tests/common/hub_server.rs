//! A stand-in of the Hugging Face hub on 127.0.0.1: an origin, and storage on another port.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as it came in.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What is sent back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub(crate) cut_at: Option<usize>,
    /// Keep the connection open for this long after the head, without a body.
    pub(crate) stall: Option<Duration>,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub(crate) fn header(mut self, name: &str, value: &(impl std::fmt::Display + ?Sized)) -> Self {
        self.headers.push((name.to_owned(), format!("{value}")));
        self
    }
}

/// An HTTP/1.1 server: one thread a connection, one request a connection.
pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
}

impl Server {
    pub(crate) fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (log, stop, handler) = (requests.clone(), stopped.clone(), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                let (log, handler) = (log.clone(), handler.clone());
                std::thread::spawn(move || answer(&stream.unwrap(), &log, &*handler));
            }
        });
        Self { url: format!("http://{address}"), requests, stopped }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn requests_of(&self, ending: &str) -> Vec<Request> {
        self.requests().into_iter().filter(|request| request.path.ends_with(ending)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        let _woken = TcpStream::connect(self.url.trim_start_matches("http://")); // accept returns once more
    }
}

fn answer(stream: &TcpStream, log: &Mutex<Vec<Request>>, handler: &dyn Fn(&Request) -> Reply) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(':').map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned())))
        .collect();
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let reply = handler(&request);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let body = &reply.body[..reply.cut_at.unwrap_or(reply.body.len()).min(reply.body.len())];
    let mut stream = stream;
    let sent = stream.write_all(format!("{head}\r\n").as_bytes());
    if let Some(stall) = reply.stall {
        std::thread::sleep(stall);
    } else if sent.is_ok() {
        let _client_may_have_left = stream.write_all(body);
    }
}

/// What the stand-in serves and how it misbehaves.
#[derive(Clone)]
pub(crate) struct Repo {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// The listing's names, where they are not those of `files`.
    pub(crate) listed: Option<Vec<String>>,
    pub(crate) sha: String,
    /// Announced in place of a file's true hash.
    pub(crate) false_etag: BTreeMap<String, String>,
    /// Announced in place of a large file's true size.
    pub(crate) false_size: Option<u64>,
    /// The storage's first so many answers are cut half way through what they were to send.
    pub(crate) cuts: usize,
    pub(crate) ignores_range: bool,
    /// The storage's first answer to a range is 503.
    pub(crate) refuses_first_range: bool,
    /// Storage answers at the origin itself instead of on another port.
    pub(crate) one_host: bool,
    /// Only this token may read.
    pub(crate) token: Option<String>,
    /// The origin's first answers.
    pub(crate) first_replies: Vec<Reply>,
}

impl Repo {
    pub(crate) fn new(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        Self {
            files: files.into_iter().collect(),
            listed: None,
            sha: COMMIT.to_owned(),
            false_etag: BTreeMap::new(),
            false_size: None,
            cuts: 0,
            ignores_range: false,
            refuses_first_range: false,
            one_host: false,
            token: None,
            first_replies: Vec::new(),
        }
    }

    pub(crate) fn serve(self) -> StandIn {
        let repo = Arc::new(self);
        let n_stored = Arc::new(AtomicUsize::new(0));
        let (repo2, n_stored2) = (repo.clone(), n_stored.clone());
        let storage = Server::start(move |request| repo2.stored(request, &n_stored2));
        let storage_url = if repo.one_host { String::new() } else { storage.url.clone() };
        let n_answered = AtomicUsize::new(0);
        let origin = Server::start(move |request| {
            let index = n_answered.fetch_add(1, Ordering::Relaxed);
            match repo.first_replies.get(index) {
                Some(reply) => reply.clone(),
                None => repo.origin(request, &storage_url, &n_stored),
            }
        });
        StandIn { origin, storage }
    }

    /// The hash that the hub would announce: SHA-256 of a large file, git's blob id of a small one.
    pub(crate) fn etag(&self, file: &str) -> String {
        let content = &self.files[file];
        self.false_etag.get(file).cloned().unwrap_or_else(|| match is_large(file) {
            true => hex(&Sha256::digest(content)),
            false => hex(&Sha1::new_with_prefix(format!("blob {}\0", content.len())).chain_update(content).finalize()),
        })
    }

    fn origin(&self, request: &Request, storage_url: &str, n_stored: &AtomicUsize) -> Reply {
        if request.path.starts_with("/storage/") {
            return self.stored(request, n_stored);
        }
        let expected = self.token.as_ref().map(|token| format!("Bearer {token}"));
        if expected.is_some() && request.header("authorization") != expected.as_deref() {
            let status = if request.header("authorization").is_some() { 403 } else { 401 };
            return Reply::new(status, "").header("X-Error-Message", "Access to model org/tiny is restricted.");
        }
        if request.path == "/api/models/org/tiny/revision/main" || request.path.ends_with("/refs%2Fpr%2F1") {
            let all = || self.files.keys().cloned().collect();
            let names: Vec<String> = self.listed.clone().unwrap_or_else(all);
            let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
            let listing = serde_json::json!({ "id": "org/tiny", "sha": self.sha, "siblings": siblings });
            return Reply::new(200, listing.to_string()).header("Content-Type", "application/json");
        }
        let file = request.path.strip_prefix(&format!("/org/tiny/resolve/{}/", self.sha));
        let Some((file, content)) = file.and_then(|file| Some((file, self.files.get(file)?))) else {
            return Reply::new(404, "Entry not found").header("X-Error-Code", "EntryNotFound");
        };
        let etag = self.etag(file);
        if !is_large(file) {
            return Reply::new(200, content.clone()).header("ETag", &format!("\"{etag}\""));
        }
        Reply::new(302, "Found")
            .header("Location", &format!("{storage_url}/storage/{file}?signature=secret"))
            .header("X-Linked-Etag", &format!("\"{etag}\""))
            .header("X-Linked-Size", &self.false_size.unwrap_or(content.len() as u64))
    }

    fn stored(&self, request: &Request, n_stored: &AtomicUsize) -> Reply {
        let file = request.path.trim_start_matches("/storage/").trim_end_matches("?signature=secret");
        let content = &self.files[file];
        let asked = request.header("range").filter(|_| !self.ignores_range);
        if asked.is_some() && self.refuses_first_range && n_stored.fetch_add(1, Ordering::Relaxed) == self.cuts {
            return Reply::new(503, "busy");
        }
        let start: usize = asked.map_or(0, |r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
        let mut reply = match asked {
            Some(_) if start >= content.len() => return Reply::new(416, ""),
            Some(_) => Reply::new(206, &content[start..])
                .header("Content-Range", &format!("bytes {start}-{}/{}", content.len() - 1, content.len())),
            None => Reply::new(200, content.clone()),
        };
        if n_stored.fetch_add(1, Ordering::Relaxed) < self.cuts {
            reply.cut_at = Some(reply.body.len() / 2);
        }
        reply.header("ETag", "\"the-storage-has-its-own\"")
    }
}

/// The running stand-in.
pub(crate) struct StandIn {
    pub(crate) origin: Server,
    pub(crate) storage: Server,
}

fn is_large(file: &str) -> bool {
    file.ends_with(".safetensors")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
