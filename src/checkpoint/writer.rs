//! Artefacts out: built beside their target, flushed, and renamed into place, so that they are whole or not there.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::CheckpointError;
use super::reader::Dtype;

/// Tensor data starts at multiples of this, so that a mapping can be used by any vector load.
const ALIGNMENT: usize = 64;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct TensorOut<'a> {
    /// Its name.
    pub name: String,
    /// Number type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Little-endian data.
    pub data: Cow<'a, [u8]>,
}

/// Writes a safetensors file with the data section and every tensor of a multiple of 64 bytes 64-byte aligned.
///
/// The format allows no holes, so tensors whose size is a multiple of 64 come first, then the others by falling
/// element size; within these classes by name. The same tensors give the same bytes.
///
/// # Errors
/// If the file cannot be written.
///
/// # Panics
/// If a tensor's data is not as long as its shape says.
pub fn write_safetensors(
    path: &Path,
    mut tensors: Vec<TensorOut<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), CheckpointError> {
    tensors.sort_by(|a, b| {
        let class = |t: &TensorOut<'_>| (!t.data.len().is_multiple_of(ALIGNMENT), usize::MAX - t.dtype.size());
        class(a).cmp(&class(b)).then_with(|| a.name.cmp(&b.name))
    });
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), json!(metadata));
    let mut offset = 0;
    for tensor in &tensors {
        let n_bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
        assert_eq!(n_bytes, tensor.data.len(), "tensor `{}` of shape {:?}", tensor.name, tensor.shape);
        let end = offset + n_bytes;
        let entry = json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // The header is followed by the data; spaces are the padding that the format provides for.
    header.resize((8 + header.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
    let io = || CheckpointError::io(path);
    let mut file = std::io::BufWriter::new(File::create(path).map_err(io())?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io())?;
    file.write_all(&header).map_err(io())?;
    for tensor in &tensors {
        file.write_all(&tensor.data).map_err(io())?;
    }
    let file = file.into_inner().map_err(|error| CheckpointError::io(path)(error.into_error()))?;
    file.sync_all().map_err(io())
}

/// The hash as lower-case hexadecimal digits.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("writing to a String cannot fail");
        hex
    })
}

/// A directory under construction beside its target; dropped without [`ArtefactDir::commit`], nothing remains.
#[derive(Debug)]
pub struct ArtefactDir {
    building: tempfile::TempDir,
    target: PathBuf,
    force: bool,
}

impl ArtefactDir {
    /// Starts an artefact that will stand at `target`.
    ///
    /// # Errors
    /// If `target` exists (and is not an empty directory) without `force`, or its parent cannot be written.
    pub fn create(target: &Path, force: bool) -> Result<Self, CheckpointError> {
        Self::check_target(target, force)?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(CheckpointError::io(parent))?;
        Ok(Self { building: folder_in(parent)?, target: target.to_owned(), force })
    }

    /// Whether an artefact made of `source` can be put at `target`, as far as that can be known before the work.
    ///
    /// # Errors
    /// As [`ArtefactDir::check_target`]; if `target` could not be replaced by a rename, or replacing it would remove `source`.
    pub fn check_place(target: &Path, source: &Path, force: bool) -> Result<(), CheckpointError> {
        Self::check_target(target, force)?;
        let refuse = |reason| Err(CheckpointError::Target { path: target.to_owned(), reason });
        if target.file_name().is_none() {
            return refuse("is no name for a new directory");
        }
        let absolute = std::path::absolute(target).map_err(CheckpointError::io(target))?;
        if let (Ok(target), Ok(source)) = (target.canonicalize(), source.canonicalize()) {
            if source.starts_with(&target) {
                return refuse("holds the model that is to be compressed");
            }
            if is_mount(&target) {
                return refuse("is where a file system is mounted; give a directory inside it");
            }
        }
        // The folder may have to be made first: then the nearest that exists has to let it be.
        let existing = absolute.ancestors().skip(1).find(|dir| dir.exists());
        existing.map_or(Ok(()), |dir| folder_in(dir).map(drop))
    }

    /// Whether an artefact may be put at `target`.
    ///
    /// # Errors
    /// If it exists (and is not an empty directory) and `force` is not given.
    pub fn check_target(target: &Path, force: bool) -> Result<(), CheckpointError> {
        let taken = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        };
        if taken && !force { Err(CheckpointError::TargetExists(target.to_owned())) } else { Ok(()) }
    }

    /// Where to put the files.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.building.path()
    }

    /// Writes a file, creating its folder.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, relative: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let path = self.path().join(relative);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
        }
        let mut file = File::create(&path).map_err(CheckpointError::io(&path))?;
        file.write_all(bytes).map_err(CheckpointError::io(&path))?;
        file.sync_all().map_err(CheckpointError::io(&path))
    }

    /// Moves the finished directory to its target.
    ///
    /// # Errors
    /// If the rename fails; the old target, if any, is then still there.
    pub fn commit(self) -> Result<PathBuf, CheckpointError> {
        Self::check_target(&self.target, self.force)?;
        let building = self.building.keep();
        let fail = |building: &Path, path: &Path, error: std::io::Error| {
            // What was built must not remain under a name that looks finished; failing to remove it changes nothing.
            drop(fs::remove_dir_all(building));
            CheckpointError::io(path)(error)
        };
        set_readable(&building).map_err(|error| fail(&building, &building, error))?;
        let mut old = None;
        if self.target.exists() {
            let aside = building.with_extension("old");
            fs::rename(&self.target, &aside).map_err(|error| fail(&building, &self.target, error))?;
            old = Some(aside);
        }
        if let Err(error) = fs::rename(&building, &self.target) {
            if let Some(aside) = &old {
                fs::rename(aside, &self.target).map_err(CheckpointError::io(&self.target))?;
            }
            return Err(fail(&building, &self.target, error));
        }
        if let Some(aside) = old {
            let removed = if aside.is_dir() { fs::remove_dir_all(&aside) } else { fs::remove_file(&aside) };
            removed.map_err(CheckpointError::io(&aside))?;
        }
        Ok(self.target)
    }
}

/// A folder that is not there any more when it is dropped.
fn folder_in(parent: &Path) -> Result<tempfile::TempDir, CheckpointError> {
    let mut name = tempfile::Builder::new();
    name.prefix(".niwaki-building-").tempdir_in(parent).map_err(CheckpointError::io(parent))
}

/// Whether a directory is on another file system than the one that it stands in; it can then not be renamed.
#[cfg(unix)]
fn is_mount(dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |dir: &Path| fs::metadata(dir).ok().map(|about| about.dev());
    dir.parent().is_some_and(|parent| device(parent) != device(dir))
}

#[cfg(not(unix))]
fn is_mount(_dir: &Path) -> bool {
    false
}

/// Temporary directories are private to their owner; an artefact is as readable as any directory.
#[cfg(unix)]
fn set_readable(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn set_readable(_dir: &Path) -> std::io::Result<()> {
    Ok(())
}
