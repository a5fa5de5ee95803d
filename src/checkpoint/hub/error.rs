//! What can go wrong between the hub and the cache, each with what to do about it.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// An error of a download.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Not a model id.
    #[error("{id:?} is not a model id of the form org/name: {reason}")]
    ModelId {
        /// As given.
        id: String,
        /// The broken rule.
        reason: &'static str,
    },
    /// Not a revision.
    #[error("{revision:?} is not a branch, tag or commit")]
    Revision {
        /// As given.
        revision: String,
    },
    /// Not an endpoint.
    #[error("the hub endpoint {endpoint:?} is not an http:// or https:// address")]
    Endpoint {
        /// As given.
        endpoint: String,
    },
    /// A token that cannot be sent.
    #[error("the hub token holds characters that cannot stand in a header")]
    Token,
    /// Certificates that cannot be read.
    #[error("cannot use the certificates in {path}: {reason}")]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Nowhere to put files.
    #[error("no cache directory: set HF_HOME or HF_HUB_CACHE, or give --huggingface-hub-cache")]
    NoCacheDir,
    /// The hub does not answer.
    #[error(
        "cannot reach {url}: {source}; check the network, point HF_ENDPOINT at a mirror, or give a local directory with --model"
    )]
    Unreachable {
        /// The address, without its query.
        url: String,
        /// What happened.
        source: Box<ureq::Error>,
    },
    /// The connection broke within a file.
    #[error("the transfer of {file} broke off after {received} bytes: {source}; run again to go on from there")]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes of the file that are in the cache.
        received: u64,
        /// What happened.
        source: std::io::Error,
    },
    /// Downloads are switched off and the cache does not hold the model.
    #[error("{model} (revision {revision}) is not in {cache} and HF_HUB_OFFLINE forbids to download it")]
    Offline {
        /// The model.
        model: String,
        /// Its revision.
        revision: String,
        /// The model's folder in the cache.
        cache: PathBuf,
    },
    /// 401 or 403.
    #[error("the hub refuses access to {model} (HTTP {status}{detail}): {advice}")]
    Denied {
        /// The model.
        model: String,
        /// 401 or 403.
        status: u16,
        /// The hub's own words, in the form `: words`, or empty.
        detail: String,
        /// What to do.
        advice: &'static str,
    },
    /// 404 of the listing.
    #[error("{model} (revision {revision}) does not exist at {url}")]
    NotFound {
        /// The model.
        model: String,
        /// Its revision.
        revision: String,
        /// The address asked.
        url: String,
    },
    /// A file that is needed is not in the repository.
    #[error("{model} (revision {revision}) has no {file}, without which it cannot be served")]
    MissingFile {
        /// The model.
        model: String,
        /// Its revision.
        revision: String,
        /// The file.
        file: String,
    },
    /// Any other status.
    #[error("{url} answered HTTP {status}{detail}")]
    Status {
        /// The address, without its query.
        url: String,
        /// The status.
        status: u16,
        /// The server's own words, in the form `: words`, or empty.
        detail: String,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// An answer that makes no sense.
    #[error("{url} gave a wrong answer: {reason}")]
    Answer {
        /// The address, without its query.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// JSON that is not what it should be.
    #[error("{origin} is not the JSON that was expected: {source}")]
    Json {
        /// Where it is from.
        origin: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A name that could leave the cache directory.
    #[error("the hub names a file \"{name}\", which is not a safe path: nothing is downloaded from it")]
    UnsafeName {
        /// The name, escaped.
        name: String,
    },
    /// More bytes than any model of this kind has.
    #[error("{file} has {bytes} bytes or more; at most {limit} are accepted")]
    TooLarge {
        /// The file.
        file: String,
        /// Announced or received so far.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// Another length than announced.
    #[error("{file} should have {expected} bytes, the server sends {got}")]
    Size {
        /// The file.
        file: String,
        /// Announced by the hub.
        expected: u64,
        /// Announced or sent by the server that has the bytes.
        got: u64,
    },
    /// Other bytes than announced.
    #[error("{file} is corrupt: its {algorithm} is {got}, the hub says {expected}; the file was removed")]
    Checksum {
        /// The file.
        file: String,
        /// The hash.
        algorithm: &'static str,
        /// Announced by the hub, hexadecimal.
        expected: String,
        /// Of the bytes received, hexadecimal.
        got: String,
    },
    /// No space left.
    #[error("the disk is full while writing {path}; free space and run again to go on from there")]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
    },
    /// Another process holds a file's lock for too long.
    #[error("another process has been downloading for {waited:?} and holds {path}")]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The file system refuses.
    #[error("{path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

impl HubError {
    /// An error of the file system at `path`.
    pub(super) fn io(path: &Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::StorageFull {
            return Self::DiskFull { path: path.to_path_buf() };
        }
        Self::Io { path: path.to_path_buf(), source }
    }

    /// Whether the same request may succeed a little later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Interrupted { .. } => true,
            Self::Status { status, .. } => *status >= 500 || matches!(status, 408 | 429),
            Self::Unreachable { source, .. } => matches!(
                **source,
                ureq::Error::Io(_)
                    | ureq::Error::Timeout(_)
                    | ureq::Error::HostNotFound
                    | ureq::Error::ConnectionFailed
                    | ureq::Error::Protocol(_)
            ),
            _ => false,
        }
    }
}
