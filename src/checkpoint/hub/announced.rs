//! What the hub says about a file before its bytes come, and whether the bytes keep it.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::http::header::{CONTENT_LENGTH, ETAG, HeaderName};

use super::HubError;

pub(super) type HubResponse = Response<ureq::Body>;

/// What the endpoint itself says about a file.
#[derive(Debug, Default)]
pub(super) struct Announced {
    pub(super) etag: Option<String>,
    pub(super) size: Option<u64>,
}

impl Announced {
    /// Takes what an answer of the endpoint says about the file. The first word counts: a redirect to storage carries
    /// the hash of the content in `X-Linked-Etag`, while the storage's own `ETag` is something else.
    pub(super) fn hear(&mut self, response: &HubResponse) {
        let linked_etag = header(response, &HeaderName::from_static("x-linked-etag"));
        let linked_size = header(response, &HeaderName::from_static("x-linked-size"));
        if let Some(size) = linked_size.and_then(|text| text.parse().ok()) {
            self.size.get_or_insert(size);
        }
        let etag = linked_etag.or_else(|| header(response, &ETAG).filter(|_| response.status().is_success()));
        if let Some(etag) = etag.and_then(normal_etag) {
            self.etag.get_or_insert(etag);
        }
    }
}

/// An ETag without weakness mark and quotes, if it can be a file's name.
fn normal_etag(text: &str) -> Option<String> {
    let text = text.trim().trim_start_matches("W/").trim_matches('"');
    let is_name = (1..=128).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    is_name.then(|| text.to_owned())
}

/// Compares a received file with the hash that its ETag is, if it is one: 64 hexadecimal digits are the SHA-256 of the
/// content (large files), 40 the id of its git blob.
pub(super) fn check(path: &Path, file: &str, announced: &Announced) -> Result<(), HubError> {
    let failed = |source| HubError::io(path, source);
    let got_size = fs::metadata(path).map_err(failed)?.len();
    if let Some(expected) = announced.size
        && expected != got_size
    {
        return Err(HubError::Size { file: file.to_owned(), expected, got: got_size });
    }
    let Some(etag) = announced.etag.as_deref().filter(|etag| etag.bytes().all(|byte| byte.is_ascii_hexdigit())) else {
        return Ok(());
    };
    let (algorithm, got) = match etag.len() {
        64 => ("SHA-256", hash_file::<Sha256>(path, Sha256::new())?),
        40 => ("git SHA-1", hash_file::<Sha1>(path, Sha1::new_with_prefix(format!("blob {got_size}\0")))?),
        _ => return Ok(()),
    };
    if got.eq_ignore_ascii_case(etag) {
        return Ok(());
    }
    Err(HubError::Checksum { file: file.to_owned(), algorithm, expected: etag.to_owned(), got })
}

fn hash_file<D: Digest>(path: &Path, mut hasher: D) -> Result<String, HubError> {
    let failed = |source| HubError::io(path, source);
    let mut file = File::open(path).map_err(failed)?;
    let mut chunk = vec![0; 128 << 10];
    loop {
        let n_bytes = file.read(&mut chunk).map_err(failed)?;
        if n_bytes == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&chunk[..n_bytes]);
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        write!(out, "{byte:02x}").expect("writing to a String cannot fail");
        out
    })
}

pub(super) fn header<'r>(response: &'r HubResponse, name: &HeaderName) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

pub(super) fn content_length(response: &HubResponse) -> Option<u64> {
    header(response, &CONTENT_LENGTH)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_become_names_only_when_they_are_safe() {
        assert_eq!(normal_etag("W/\"abc-1\"").as_deref(), Some("abc-1"));
        assert_eq!(normal_etag("\"../../x\""), None);
        assert_eq!(normal_etag("\"\""), None);
        assert_eq!(normal_etag(&"f".repeat(129)), None);
    }
}
