//! The hub's cache on disk, in the layout of Python's `huggingface_hub`.
//!
//! ```text
//! models--org--name/refs/<revision>            the commit that a branch or tag stood for
//! models--org--name/blobs/<etag>               a file's bytes; `<etag>.incomplete` while they arrive
//! models--org--name/snapshots/<commit>/<file>  links to blobs
//! models--org--name/.niwaki/<commit>           ours: this snapshot holds every file that we want of it
//! .locks/models--org--name/<etag>.lock         held while a blob is written
//! ```

use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::HubError;
use super::names::{Commit, ModelId, Revision};

/// How often a lock that is taken is tried again.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// One model's part of the cache.
#[derive(Debug)]
pub(super) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, model: &ModelId) -> Self {
        let folder = model.folder();
        Self { root: cache_dir.join(&folder), locks: cache_dir.join(".locks").join(&folder) }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The commit that `revision` is known to stand for.
    pub(super) fn commit_of(&self, revision: &Revision) -> Option<Commit> {
        let commit = Commit::parse(revision.as_str()).ok();
        if let Some(commit) = commit
            && commit.is_full()
        {
            return Some(commit);
        }
        let noted = fs::read_to_string(self.root.join("refs").join(revision.as_str())).ok()?;
        Commit::parse(noted.trim()).ok()
    }

    /// Notes what `revision` stands for now.
    pub(super) fn note_commit(&self, revision: &Revision, commit: &Commit) -> Result<(), HubError> {
        if revision.as_str() == commit.as_str() {
            return Ok(());
        }
        write_whole(&self.root.join("refs").join(revision.as_str()), commit.as_str())
    }

    pub(super) fn snapshot(&self, commit: &Commit) -> PathBuf {
        self.root.join("snapshots").join(commit.as_str())
    }

    /// Whether a snapshot was noted as whole and still has every file it had then.
    pub(super) fn is_whole(&self, commit: &Commit) -> bool {
        let snapshot = self.snapshot(commit);
        fs::read_to_string(self.note(commit))
            .is_ok_and(|files| !files.is_empty() && files.lines().all(|file| snapshot.join(file).is_file()))
    }

    /// Notes that a snapshot is whole, with the files it has.
    pub(super) fn note_whole(&self, commit: &Commit) -> Result<(), HubError> {
        let mut files = Vec::new();
        list_files(&self.snapshot(commit), "", &mut files)?;
        files.sort();
        write_whole(&self.note(commit), &files.join("\n"))
    }

    fn note(&self, commit: &Commit) -> PathBuf {
        self.root.join(".niwaki").join(commit.as_str())
    }

    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    pub(super) fn incomplete(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{name}.incomplete"))
    }

    /// Holds a blob for writing until the returned file is dropped. `on_wait` is called once if another process has it.
    pub(super) fn lock(&self, name: &str, patience: Duration, on_wait: impl FnOnce()) -> Result<File, HubError> {
        let path = self.locks.join(format!("{name}.lock"));
        create_parent(&path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| HubError::io(&path, source))?;
        let started = Instant::now();
        let mut on_wait = Some(on_wait);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => return Err(HubError::io(&path, source)),
                Err(TryLockError::WouldBlock) if started.elapsed() >= patience => {
                    return Err(HubError::Locked { path, waited: started.elapsed() });
                }
                Err(TryLockError::WouldBlock) => {
                    if let Some(on_wait) = on_wait.take() {
                        on_wait();
                    }
                    std::thread::sleep(LOCK_POLL.min(patience));
                }
            }
        }
    }

    /// Lets `file` of a snapshot be the blob `name`.
    pub(super) fn link(&self, commit: &Commit, file: &str, name: &str) -> Result<PathBuf, HubError> {
        let pointer = self.snapshot(commit).join(file);
        create_parent(&pointer)?;
        let up = "../".repeat(file.matches('/').count() + 2);
        let target = PathBuf::from(format!("{up}blobs/{name}"));
        // Made aside and renamed, so that a reader never finds the name missing while it is replaced.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let aside = pointer.with_file_name(format!(".{name}.{}-{unique}.link", std::process::id()));
        remove_if_there(&aside)?;
        symlink(&target, &aside)
            .or_else(|_| fs::copy(self.blob(name), &aside).map(drop)) // file systems without links
            .and_then(|()| fs::rename(&aside, &pointer))
            .map_err(|source| HubError::io(&pointer, source))?;
        Ok(pointer)
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _link: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

pub(super) fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().expect("every path of the cache has a parent");
    fs::create_dir_all(parent).map_err(|source| HubError::io(parent, source))
}

pub(super) fn remove_if_there(path: &Path) -> Result<(), HubError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(HubError::io(path, source)),
        _ => Ok(()),
    }
}

/// Writes a small file so that readers see all of it or none.
fn write_whole(path: &Path, text: &str) -> Result<(), HubError> {
    create_parent(path)?;
    let parent = path.parent().expect("every path of the cache has a parent");
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(parent)?;
        file.write_all(text.as_bytes())?;
        file.persist(path).map_err(|error| error.error)
    };
    write().map(drop).map_err(|source| HubError::io(path, source))
}

/// Appends the names of all files below `dir`, relative to it.
fn list_files(dir: &Path, prefix: &str, files: &mut Vec<String>) -> Result<(), HubError> {
    let failed = |source| HubError::io(dir, source);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if path.is_dir() {
            list_files(&path, &format!("{prefix}{name}/"), files)?;
        } else if path.is_file() && !name.starts_with('.') {
            files.push(format!("{prefix}{name}"));
        }
    }
    Ok(())
}
