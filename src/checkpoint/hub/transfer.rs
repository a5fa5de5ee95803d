//! One request after another: redirects, tries, resumption and checks.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::header::{
    AUTHORIZATION, CONTENT_RANGE, HeaderName, HeaderValue, IF_RANGE, LOCATION, RANGE, RETRY_AFTER,
};

use super::address::{Origin, resolve, without_query};
use super::announced::{Announced, HubResponse, check, content_length, header};
use super::cache::{RepoCache, create_parent, remove_if_there};
use super::names::{Commit, ModelId, Revision, percent_encode};
use super::{HubConfig, HubError, HubProgress, Patience};
use crate::checkpoint::sha256_hex;

const MAX_REDIRECTS: usize = 8;
/// Bytes that make a try count as progress, so that a large file over a bad line is not given up.
const PROGRESS_BYTES: u64 = 1 << 20;
/// No wait between two tries is longer, whatever a server asks for.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// The hub, for one model at one revision.
pub(super) struct Client<'a> {
    agent: ureq::Agent,
    endpoint: String,
    origin: Origin,
    authorization: Option<HeaderValue>,
    patience: Patience,
    model: &'a ModelId,
    revision: &'a Revision,
    progress: &'a dyn HubProgress,
}

/// Where a file's bytes are.
struct Located {
    url: String,
    /// The endpoint's own answer with the bytes; `None` if they are elsewhere and were not asked for yet.
    answer: Option<HubResponse>,
    announced: Announced,
}

/// A range to go on from.
struct Resume<'e> {
    offset: u64,
    etag: Option<&'e str>,
}

/// A file on its way into the cache.
struct Target<'e> {
    file: &'e str,
    url: String,
    limit: u64,
}

impl Target<'_> {
    fn check_limit(&self, bytes: Option<u64>) -> Result<(), HubError> {
        match bytes.filter(|&bytes| bytes > self.limit) {
            Some(bytes) => Err(HubError::TooLarge { file: self.file.to_owned(), bytes, limit: self.limit }),
            None => Ok(()),
        }
    }
}

/// Which redirects are followed.
#[derive(Clone, Copy)]
enum Reach {
    /// Those that stay at the endpoint.
    Endpoint,
    Anywhere,
}

/// What one try has done, also when it failed.
#[derive(Default)]
struct Try {
    received: u64,
    resumed: bool,
}

impl<'a> Client<'a> {
    pub(super) fn new(
        config: &HubConfig,
        model: &'a ModelId,
        revision: &'a Revision,
        progress: &'a dyn HubProgress,
    ) -> Result<Self, HubError> {
        let endpoint = config.endpoint.trim_end_matches('/').to_owned();
        let origin = Origin::of(&endpoint)
            .filter(|_| !endpoint.contains(['@', '?', '#']))
            .ok_or_else(|| HubError::Endpoint { endpoint: config.endpoint.clone() })?;
        let authorization = config
            .token
            .as_ref()
            .filter(|token| !token.is_empty()) // an empty variable means none
            .map(|token| HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| HubError::Token))
            .transpose()?;
        let (agent, patience) = (config.agent()?, config.patience);
        Ok(Self { agent, endpoint, origin, authorization, patience, model, revision, progress })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Reads a JSON document of at most `limit` bytes.
    pub(super) fn get_json<T: DeserializeOwned>(&self, url: &str, limit: u64) -> Result<T, HubError> {
        let bytes = self.persist("the file list", || (self.get_bytes(url, limit), Try::default()))?;
        serde_json::from_slice(&bytes).map_err(|source| HubError::Json { origin: without_query(url), source })
    }

    fn get_bytes(&self, url: &str, limit: u64) -> Result<Vec<u8>, HubError> {
        let (url, response) = self.get(url, None)?;
        if response.status().as_u16() == 404 {
            let (model, revision) = (self.model.to_string(), self.revision.to_string());
            return Err(HubError::NotFound { model, revision, url: without_query(&url) });
        }
        let mut response = self.expect_success(&url, response)?;
        let mut bytes = Vec::new();
        let read = response.body_mut().as_reader().take(limit + 1).read_to_end(&mut bytes);
        let received = bytes.len() as u64;
        let file = without_query(&url);
        read.map_err(|source| HubError::Interrupted { file: file.clone(), received, source })?;
        if received > limit {
            return Err(HubError::TooLarge { file, bytes: received, limit });
        }
        Ok(bytes)
    }

    /// Makes `file` of a commit present in the cache's snapshot and returns its path there.
    pub(super) fn fetch(
        &self,
        cache: &RepoCache,
        commit: &Commit,
        file: &str,
        limit: u64,
    ) -> Result<PathBuf, HubError> {
        let pointer = cache.snapshot(commit).join(file);
        if pointer.is_file() {
            return Ok(pointer);
        }
        let url = format!("{}/{}/resolve/{}/{}", self.endpoint, self.model, commit.as_str(), percent_encode(file, "/"));
        let target = Target { file, url, limit };
        let blob = self.persist(file, || {
            let mut this_try = Try::default();
            (self.fetch_blob(cache, commit, &target, &mut this_try), this_try)
        })?;
        let path = cache.link(commit, file, &blob)?;
        self.progress.file_finished(file);
        Ok(path)
    }

    /// Tries again while that may help.
    fn persist<T>(&self, file: &str, mut attempt: impl FnMut() -> (Result<T, HubError>, Try)) -> Result<T, HubError> {
        let mut failures = 0;
        let mut distrusted = false;
        loop {
            let (result, this_try) = attempt();
            let error = match result {
                Ok(value) => return Ok(value),
                // What an earlier run left may have been wrong; it is gone now, so one clean try is fair.
                Err(HubError::Checksum { .. } | HubError::Size { .. }) if this_try.resumed && !distrusted => {
                    distrusted = true;
                    continue;
                }
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            failures = if this_try.received >= PROGRESS_BYTES { 1 } else { failures + 1 };
            if failures >= self.patience.attempts {
                return Err(error);
            }
            let backoff = self.patience.backoff.saturating_mul(1 << (failures - 1).min(16));
            let asked = match &error {
                HubError::Status { retry_after, .. } => *retry_after,
                _ => None,
            };
            let delay = asked.unwrap_or(backoff).min(MAX_WAIT);
            self.progress.waiting(file, &error.to_string(), delay);
            std::thread::sleep(delay);
        }
    }

    /// Fetches a file's bytes into its blob and returns the blob's name.
    fn fetch_blob(
        &self,
        cache: &RepoCache,
        commit: &Commit,
        target: &Target<'_>,
        this_try: &mut Try,
    ) -> Result<String, HubError> {
        let Located { url, answer, announced } = self.open(&target.url, None, Reach::Endpoint)?;
        if let Some(answer) = &answer {
            self.check_found(target, answer)?;
        }
        let answer = answer.map(|answer| self.expect_success(&url, answer)).transpose()?;
        target.check_limit(announced.size.or_else(|| content_length(answer.as_ref()?)))?;
        let name = announced.etag.clone().unwrap_or_else(|| {
            // Nothing identifies the content: its place in the commit does, but the blob cannot be checked.
            sha256_hex(format!("{}/{}/{}", self.model, commit.as_str(), target.file).as_bytes())
        });

        let _lock = cache.lock(&name, self.patience.lock, || {
            self.progress.waiting(target.file, "another process is downloading it", self.patience.lock);
        })?;
        let blob = cache.blob(&name);
        if let Ok(metadata) = fs::metadata(&blob) {
            if announced.size.is_none_or(|size| size == metadata.len()) {
                return Ok(name);
            }
            remove_if_there(&blob)?;
        }
        let incomplete = cache.incomplete(&name);
        create_parent(&incomplete)?;
        self.fill(&incomplete, target, (url, answer), &announced, this_try)?;
        if let Err(error) = check(&incomplete, target.file, &announced) {
            remove_if_there(&incomplete)?;
            return Err(error);
        }
        fs::rename(&incomplete, &blob).map_err(|source| HubError::io(&blob, source))?;
        Ok(name)
    }

    /// Writes what is missing of a file to `incomplete`. `found` is its address, and an answer of it with the whole
    /// file if there is one already.
    fn fill(
        &self,
        incomplete: &Path,
        target: &Target<'_>,
        found: (String, Option<HubResponse>),
        announced: &Announced,
        this_try: &mut Try,
    ) -> Result<(), HubError> {
        let failed = |source| HubError::io(incomplete, source);
        let (url, answer) = found;
        let mut out = File::options().create(true).append(true).open(incomplete).map_err(failed)?;
        let mut have = out.metadata().map_err(failed)?.len();
        let size = announced.size.or_else(|| content_length(answer.as_ref()?));
        if size.is_some_and(|size| have > size) {
            out.set_len(0).map_err(failed)?;
            have = 0;
        }
        this_try.resumed = have > 0;
        if size == Some(have) && have > 0 {
            return Ok(()); // an earlier run was stopped between the last byte and the check
        }

        let whole = || {
            let (url, answer) = self.get(&url, None)?;
            self.check_found(target, &answer)?;
            self.expect_success(&url, answer)
        };
        let mut response = match answer {
            Some(answer) if have == 0 => answer,
            None if have == 0 => whole()?,
            unread => {
                drop(unread); // or a server with one thread would wait for its body to be read
                match self.rest(&url, have, announced)? {
                    Some(response) => response,
                    None => whole()?,
                }
            }
        };
        if have > 0 && response.status().as_u16() != 206 {
            out.set_len(0).map_err(failed)?;
            have = 0;
        }
        this_try.resumed = have > 0;
        let total = size.or_else(|| content_length(&response).map(|rest| have + rest));
        target.check_limit(total)?;
        if let (Some(expected), Some(rest)) = (announced.size, content_length(&response))
            && expected != have + rest
        {
            return Err(HubError::Size { file: target.file.to_owned(), expected, got: have + rest });
        }
        self.progress.file_started(target.file, total, have);

        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; 128 << 10];
        loop {
            let n_bytes = body.read(&mut chunk).map_err(|source| HubError::Interrupted {
                file: target.file.to_owned(),
                received: have,
                source,
            })?;
            if n_bytes == 0 {
                break;
            }
            out.write_all(&chunk[..n_bytes]).map_err(failed)?;
            have += n_bytes as u64;
            this_try.received += n_bytes as u64;
            self.progress.received(n_bytes as u64);
            target.check_limit(Some(have))?;
        }
        if total.is_some_and(|total| have < total) {
            let source = std::io::ErrorKind::UnexpectedEof.into();
            return Err(HubError::Interrupted { file: target.file.to_owned(), received: have, source });
        }
        // The rename that follows must not reach the disk before the bytes do.
        out.sync_all().map_err(failed)
    }

    /// The bytes of `url` from `offset` on: a partial answer that begins there, or the whole file if the server does
    /// not resume; `None` if it must be asked for the whole again.
    fn rest(&self, url: &str, offset: u64, announced: &Announced) -> Result<Option<HubResponse>, HubError> {
        let resume = Resume { offset, etag: announced.etag.as_deref() };
        let (url, answer) = self.get(url, Some(&resume))?;
        match answer.status().as_u16() {
            200 => Ok(Some(answer)),
            206 => Ok(Some(answer).filter(|answer| range_start(answer) == Some(offset))),
            416 => Ok(None),
            // What is there already is kept for the next try.
            _ => Err(self.refusal(&url, answer)),
        }
    }

    /// GET along all redirects: the last address and its answer.
    fn get(&self, url: &str, resume: Option<&Resume<'_>>) -> Result<(String, HubResponse), HubError> {
        let located = self.open(url, resume, Reach::Anywhere)?;
        Ok((located.url, located.answer.expect("every redirect was followed")))
    }

    /// GET along redirects, as far as `reach` says, and what the endpoint's own answers announce.
    fn open(&self, url: &str, resume: Option<&Resume<'_>>, reach: Reach) -> Result<Located, HubError> {
        let mut url = url.to_owned();
        let mut announced = Announced::default();
        for _ in 0..=MAX_REDIRECTS {
            let is_ours = self.is_ours(&url);
            if !is_ours && matches!(reach, Reach::Endpoint) {
                return Ok(Located { url, answer: None, announced });
            }
            let mut request = self.agent.get(&url);
            if is_ours && let Some(authorization) = &self.authorization {
                request = request.header(AUTHORIZATION, authorization);
            }
            if let Some(resume) = resume {
                request = request.header(RANGE, format!("bytes={}-", resume.offset));
                if is_ours && let Some(etag) = resume.etag {
                    request = request.header(IF_RANGE, format!("\"{etag}\""));
                }
            }
            let response = request
                .call()
                .map_err(|source| HubError::Unreachable { url: without_query(&url), source: Box::new(source) })?;
            if is_ours {
                announced.hear(&response);
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Located { url, answer: Some(response), announced });
            }
            let wrong = |reason: &str| HubError::Answer { url: without_query(&url), reason: reason.to_owned() };
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|to| resolve(&url, to)).ok_or_else(|| wrong("a redirect to nowhere"))?;
            if url.starts_with("https:") && !next.starts_with("https:") {
                return Err(wrong("a redirect that leaves https"));
            }
            url = next;
        }
        Err(HubError::Answer { url: without_query(&url), reason: format!("more than {MAX_REDIRECTS} redirects") })
    }

    fn is_ours(&self, url: &str) -> bool {
        Origin::of(url).as_ref() == Some(&self.origin)
    }

    fn expect_success(&self, url: &str, response: HubResponse) -> Result<HubResponse, HubError> {
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(url, response)) }
    }

    fn check_found(&self, target: &Target<'_>, response: &HubResponse) -> Result<(), HubError> {
        if matches!(response.status().as_u16(), 404 | 410) {
            return Err(HubError::MissingFile {
                model: self.model.to_string(),
                revision: self.revision.to_string(),
                file: target.file.to_owned(),
            });
        }
        Ok(())
    }

    /// The error that a status other than success or 404 stands for.
    fn refusal(&self, url: &str, mut response: HubResponse) -> HubError {
        let status = response.status().as_u16();
        let retry_after = header(&response, &RETRY_AFTER).and_then(|text| text.parse().ok()).map(Duration::from_secs);
        let said = header(&response, &HeaderName::from_static("x-error-message")).map(str::to_owned).or_else(|| {
            let mut text = Vec::new();
            response.body_mut().as_reader().take(300).read_to_end(&mut text).ok()?;
            Some(String::from_utf8_lossy(&text).into_owned())
        });
        let said = said.map(|text| text.trim().escape_debug().to_string()).filter(|text| !text.is_empty());
        let detail = said.map(|text| format!(": {text}")).unwrap_or_default();
        if !matches!(status, 401 | 403) || !self.is_ours(url) {
            return HubError::Status { url: without_query(url), status, detail, retry_after };
        }
        let advice = match (&self.authorization, status) {
            (None, _) => "it does not exist or is private or gated; set HF_TOKEN to a token that may read it",
            (Some(_), 401) => "the token is not valid, or the model does not exist",
            (Some(_), _) => "the token may not read it; if the model is gated, accept its terms on the hub first",
        };
        HubError::Denied { model: self.model.to_string(), status, detail, advice }
    }
}

/// The first byte of a partial answer: `Content-Range: bytes <start>-<end>/<total>`.
fn range_start(response: &HubResponse) -> Option<u64> {
    header(response, &CONTENT_RANGE)?.trim().strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}
