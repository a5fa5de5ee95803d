//! Names that become parts of paths and addresses, checked once.

use std::fmt;

use super::HubError;

/// Longest file name taken from a listing.
const MAX_NAME_BYTES: usize = 1_024;

/// `org/name` or `name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelId(String);

impl ModelId {
    /// The hub's own rule: letters, digits, `-`, `_` and `.`; no `--` or `..`; at most 96 bytes a part.
    pub(super) fn parse(text: &str) -> Result<Self, HubError> {
        let invalid = |reason| HubError::ModelId { id: text.to_owned(), reason };
        if text.split('/').count() > 2 {
            return Err(invalid("it has more than one `/`; a local directory is given with --model"));
        }
        for part in text.split('/') {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if part.is_empty() || part.len() > 96 {
                return Err(invalid("each part must have 1 to 96 characters"));
            }
            if !part.bytes().all(allowed) {
                return Err(invalid("only letters, digits, `-`, `_` and `.` are allowed"));
            }
            if part.starts_with(['.', '-']) || part.ends_with(['.', '-']) || part.contains("--") || part.contains("..")
            {
                return Err(invalid("`-` and `.` may not stand at an end or twice in a row"));
            }
        }
        Ok(Self(text.to_owned()))
    }

    /// The cache's folder of this model.
    pub(super) fn folder(&self) -> String {
        format!("models--{}", self.0.replace('/', "--"))
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A branch, tag, commit or `refs/pr/1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Revision(String);

impl Revision {
    pub(super) fn parse(text: &str) -> Result<Self, HubError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./+@".contains(&byte);
        if text.len() > 256 || !text.bytes().all(allowed) || is_unsafe_path(text) {
            return Err(HubError::Revision { revision: text.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }

    /// As one segment of an address.
    pub(super) fn url_encoded(&self) -> String {
        percent_encode(&self.0, "")
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a revision stands for: a name that can be a folder's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Commit(String);

impl Commit {
    pub(super) fn parse(text: &str) -> Result<Self, HubError> {
        if text.is_empty() || text.len() > 64 || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(HubError::UnsafeName { name: text.escape_debug().to_string() });
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether this is a full git commit, which stands for itself as a revision.
    pub(super) fn is_full(&self) -> bool {
        self.0.len() == 40 && self.0.bytes().all(|byte| byte.is_ascii_hexdigit())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Refuses a file name that could leave its directory.
pub(super) fn checked_file_name(name: &str) -> Result<(), HubError> {
    if name.len() > MAX_NAME_BYTES || is_unsafe_path(name) {
        let shown: String = name.chars().take(120).collect();
        return Err(HubError::UnsafeName { name: shown.escape_debug().to_string() });
    }
    Ok(())
}

fn is_unsafe_path(path: &str) -> bool {
    path.chars().any(|c| c.is_control() || c == '\\' || c == ':')
        || path.split('/').any(|segment| matches!(segment, "" | "." | ".."))
}

/// Percent-encodes all but unreserved characters and those in `keep`.
pub(super) fn percent_encode(text: &str, keep: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String cannot fail");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_ids_follow_the_hubs_rule() {
        for good in ["gpt2", "sentence-transformers/all-MiniLM-L6-v2", "a/b.c_d", "intfloat/e5-small"] {
            assert_eq!(ModelId::parse(good).unwrap().to_string(), good);
        }
        for bad in ["", "a/b/c", "/a", "a/", "../x", "a/..", "a b", "a--b", "a/.b", "a/b-", "a\\b", "ä/b"] {
            assert!(matches!(ModelId::parse(bad), Err(HubError::ModelId { .. })), "{bad:?}");
        }
        assert_eq!(ModelId::parse("org/name").unwrap().folder(), "models--org--name");
    }

    #[test]
    fn revisions_and_file_names_stay_inside_their_directory() {
        assert_eq!(Revision::parse("refs/pr/1").unwrap().url_encoded(), "refs%2Fpr%2F1");
        for bad in ["", "a/../b", "/abs", "a//b", "a b", "..", "a\n", "a?b", "a%2e"] {
            assert!(Revision::parse(bad).is_err(), "{bad:?}");
        }
        checked_file_name("1_Pooling/config.json").unwrap();
        for bad in ["", "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a\\..\\b", "C:/x", "a\0b", "a/"] {
            assert!(matches!(checked_file_name(bad), Err(HubError::UnsafeName { .. })), "{bad:?}");
        }
        for bad in ["", "..", "a/b", "a.b", &"f".repeat(65)] {
            assert!(Commit::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn addresses_are_encoded_by_byte() {
        assert_eq!(percent_encode("a b/ü#?.json", "/"), "a%20b/%C3%BC%23%3F.json");
    }
}
