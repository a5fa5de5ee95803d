//! Who may ask: API keys.
//!
//! A key is kept as its SHA-256. What a client sends is hashed too, and compared with every key there is, each time the
//! same 32 bytes: the time taken tells neither which key was nearly right nor how long the keys are.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// Keys of one file: comparing with so many takes some 50 µs.
const MAX_KEYS: usize = 4096;

/// A file of keys is not larger.
const MAX_FILE_BYTES: u64 = 1 << 20;

type Digest = [u8; 32];

/// A file of keys that cannot be used. No message holds a part of a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("the API keys of {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is too large.
    #[error("the API keys of {path}: the file is larger than {MAX_FILE_BYTES} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line that is no key.
    #[error("the API keys of {path}: line {line} is no key: one is made of visible ASCII characters, without spaces")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
    },
    /// No key, which would leave either everybody or nobody let in.
    #[error("the API keys of {path}: there are none")]
    None {
        /// The file.
        path: PathBuf,
    },
    /// Too many keys.
    #[error("the API keys of {path}: there are more than {MAX_KEYS}")]
    TooMany {
        /// The file.
        path: PathBuf,
    },
}

/// Whether `key` can be sent in a header as it is.
pub(crate) fn is_key(key: &[u8]) -> bool {
    !key.is_empty() && key.iter().all(u8::is_ascii_graphic)
}

fn digest(key: &[u8]) -> Digest {
    Sha256::digest(key).into()
}

/// The keys of a file: one a line; blank lines, and lines that begin with `#`, say nothing.
fn read(path: &Path) -> Result<Vec<Digest>, KeyFileError> {
    let of = || path.to_owned();
    let failed = |source| KeyFileError::Read { path: of(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_FILE_BYTES {
        return Err(KeyFileError::TooLarge { path: of() });
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let mut digests = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let key = line.trim_ascii();
        if key.is_empty() || key.starts_with(b"#") {
            continue;
        }
        if !is_key(key) {
            return Err(KeyFileError::Line { path: of(), line: index + 1 });
        }
        digests.push(digest(key));
    }
    match digests.len() {
        0 => Err(KeyFileError::None { path: of() }),
        1..=MAX_KEYS => Ok(digests),
        _ => Err(KeyFileError::TooMany { path: of() }),
    }
}

/// The keys that are accepted: those of the flags, and those of a file, which may change.
#[derive(Debug)]
pub(crate) struct ApiKeys {
    fixed: Vec<Digest>,
    file: Option<PathBuf>,
    of_file: RwLock<Arc<[Digest]>>,
}

impl ApiKeys {
    pub(crate) fn open(fixed: &[String], file: Option<&Path>) -> Result<Self, KeyFileError> {
        let of_file = file.map(read).transpose()?.unwrap_or_default();
        Ok(Self {
            fixed: fixed.iter().map(|key| digest(key.as_bytes())).collect(),
            file: file.map(Path::to_owned),
            of_file: RwLock::new(of_file.into()),
        })
    }

    /// Reads the file again; on an error the old keys stay. Returns how many keys it has, `None` if there is no file.
    pub(crate) fn reload(&self) -> Result<Option<usize>, KeyFileError> {
        let Some(file) = &self.file else { return Ok(None) };
        let digests: Arc<[Digest]> = read(file)?.into();
        let n_keys = digests.len();
        *self.of_file.write().unwrap_or_else(PoisonError::into_inner) = digests;
        Ok(Some(n_keys))
    }

    /// Whether a key is needed at all. A file is never without keys.
    pub(crate) fn are_set(&self) -> bool {
        !self.fixed.is_empty() || self.file.is_some()
    }

    pub(crate) fn accept(&self, key: &[u8]) -> bool {
        let sent = digest(key);
        let of_file = Arc::clone(&self.of_file.read().unwrap_or_else(PoisonError::into_inner));
        let equal = self.fixed.iter().chain(of_file.iter()).map(|known| known.ct_eq(&sent));
        equal.fold(Choice::from(0), |any, one| any | one).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    fn open(content: &str) -> Result<ApiKeys, KeyFileError> {
        ApiKeys::open(&[], Some(file(content).path()))
    }

    #[test]
    fn a_file_has_a_key_a_line() {
        let keys = open("# of the team\r\n  first-key \r\n\n#second\nthird#3\n last").unwrap();
        for (key, accepted) in [
            ("first-key", true),
            ("third#3", true),
            ("last", true),
            ("second", false),
            ("#second", false),
            ("", false),
            ("first-ke", false),
            ("first-key ", false),
        ] {
            assert_eq!(keys.accept(key.as_bytes()), accepted, "{key}");
        }
        assert!(keys.are_set());
    }

    #[test]
    fn keys_of_flags_and_file_are_accepted() {
        let file = file("of-file\n");
        let keys = ApiKeys::open(&["of-flag".to_owned()], Some(file.path())).unwrap();
        assert!(keys.accept(b"of-flag") && keys.accept(b"of-file") && !keys.accept(b"other"));
        let none = ApiKeys::open(&[], None).unwrap();
        assert!(!none.are_set() && !none.accept(b"") && none.reload().unwrap().is_none());
    }

    #[test]
    fn a_bad_file_is_named_and_its_keys_are_not() {
        for (content, expected) in [
            ("", "there are none"),
            ("# secret\n\n", "there are none"),
            ("good\nsecret word\n", "line 2 is no key"),
            ("\nsecret\u{e9}\n", "line 2 is no key"),
            ("secret\0\n", "line 1 is no key"),
            ("\u{feff}secret\n", "line 1 is no key"),
        ] {
            let message = open(content).unwrap_err().to_string();
            assert!(message.contains(expected) && !message.contains("secret"), "{content:?}: {message}");
        }
        let many: String = (0..=MAX_KEYS).map(|key| format!("key-{key}\n")).collect();
        assert!(matches!(open(&many), Err(KeyFileError::TooMany { .. })));
        let large = "#".repeat(usize::try_from(MAX_FILE_BYTES).unwrap() + 1);
        assert!(matches!(open(&large), Err(KeyFileError::TooLarge { .. })));
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_owned(), dir.path().join("none")] {
            assert!(matches!(ApiKeys::open(&[], Some(&path)), Err(KeyFileError::Read { .. })), "{path:?}");
        }
    }

    #[test]
    fn keys_are_swapped_whole_or_not_at_all() {
        let file = file("old\n");
        let keys = ApiKeys::open(&[], Some(file.path())).unwrap();
        std::fs::write(file.path(), "new\nanother\n").unwrap();
        assert!(keys.accept(b"old"));
        assert_eq!(keys.reload().unwrap(), Some(2));
        assert!(!keys.accept(b"old") && keys.accept(b"new") && keys.accept(b"another"));
        std::fs::write(file.path(), "newest\nno key\n").unwrap();
        keys.reload().unwrap_err();
        assert!(keys.accept(b"new") && !keys.accept(b"newest"));
        std::fs::write(file.path(), "\n").unwrap();
        keys.reload().unwrap_err();
        assert!(keys.accept(b"new") && !keys.accept(b""));
    }
}
