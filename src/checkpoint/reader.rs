//! One safetensors file, mapped and validated.
#![allow(unsafe_code, reason = "memory mapping a file is unsafe by nature; this is the only such place")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use super::CheckpointError;

/// Number types that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed bytes.
    I8,
    /// Unsigned bytes.
    U8,
}

impl Dtype {
    /// The name in a safetensors header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I8 => "I8",
            Self::U8 => "U8",
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

struct Entry {
    /// `None`: a type that no weight may have (the tensor may still be ignored).
    dtype: Result<Dtype, String>,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A mapped safetensors file.
pub struct TensorFile {
    bytes: Bytes,
    entries: BTreeMap<String, Entry>,
}

impl fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorFile").field("n_tensors", &self.entries.len()).finish_non_exhaustive()
    }
}

/// A tensor lent from a [`TensorFile`].
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Number type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// Little-endian data.
    pub data: &'a [u8],
}

impl TensorFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is truncated, or its header is damaged.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::io(path))?;
        // SAFETY: the mapping is read-only and private; the file is not expected to be changed while it is served,
        // because artefacts are written whole and replaced by rename (see writer.rs). A concurrent truncation by
        // somebody else would raise SIGBUS, as with every memory-mapped model server.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(CheckpointError::io(path))?;
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Self::parse(Bytes::Mapped(map), &name)
    }

    /// Reads tensors that are part of the program.
    ///
    /// # Errors
    /// If the header is damaged.
    pub fn from_static(bytes: &'static [u8], name: &str) -> Result<Self, CheckpointError> {
        Self::parse(Bytes::Static(bytes), name)
    }

    fn parse(bytes: Bytes, file: &str) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Safetensors { file: file.to_owned(), reason };
        // The crate checks the header's length, its JSON, that offsets are in order and without holes, and that every
        // tensor's bytes are exactly shape × dtype; what remains is that the file is as long as the header says.
        let (header_len, metadata) =
            safetensors::SafeTensors::read_metadata(bytes.as_slice()).map_err(|error| damaged(format!("{error}")))?;
        let data_start = header_len + 8;
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let range = data_start
                .checked_add(start)
                .zip(data_start.checked_add(end))
                .map(|(start, end)| start..end)
                .filter(|range| range.start <= range.end && range.end <= bytes.as_slice().len())
                .ok_or_else(|| damaged(format!("tensor `{name}` ends beyond the file")))?;
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Ok(Dtype::F32),
                safetensors::Dtype::F16 => Ok(Dtype::F16),
                safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
                safetensors::Dtype::I8 => Ok(Dtype::I8),
                safetensors::Dtype::U8 => Ok(Dtype::U8),
                other => Err(format!("{other:?}")),
            };
            if let Ok(dtype) = dtype {
                let n_bytes = info.shape.iter().try_fold(dtype.size(), |product, &dim| product.checked_mul(dim));
                if n_bytes != Some(range.len()) {
                    return Err(damaged(format!(
                        "tensor `{name}` has {} bytes for shape {:?}",
                        range.len(),
                        info.shape
                    )));
                }
            }
            entries.insert(name.clone(), Entry { dtype, shape: info.shape.clone(), range });
        }
        Ok(Self { bytes, entries })
    }

    /// Whether a tensor of this name exists.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Names and bytes in order.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry.range.len()))
    }

    /// Lends a tensor.
    ///
    /// # Errors
    /// If it is missing or has a number type that no weight may have.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let (name, entry) =
            self.entries.get_key_value(name).ok_or_else(|| CheckpointError::MissingTensor(name.to_owned()))?;
        let dtype = entry.dtype.clone().map_err(|got| CheckpointError::DtypeMismatch {
            name: name.clone(),
            expected: "F32, F16, BF16 or I8",
            got,
        })?;
        Ok(TensorView { name, dtype, shape: &entry.shape, data: &self.bytes.as_slice()[entry.range.clone()] })
    }

    /// The file's bytes, for hashing.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Tells the kernel that the pages need not stay in memory; they come back from the file when touched.
    pub fn release_pages(&self) {
        match &self.bytes {
            Bytes::Mapped(map) => {
                // SAFETY: the mapping is file-backed and read-only, so a dropped page is read again from the file.
                let advised = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
                if let Err(error) = advised {
                    tracing::debug!(%error, "the kernel kept the mapped weights in memory");
                }
            }
            Bytes::Static(bytes) => release_static(bytes),
        }
    }
}

/// Drops the resident pages that lie wholly inside `bytes`, a part of the executable's read-only data.
#[cfg(target_os = "linux")]
fn release_static(bytes: &'static [u8]) {
    // SAFETY: sysconf has no preconditions.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let start = (bytes.as_ptr() as usize).next_multiple_of(page);
    let end = (bytes.as_ptr() as usize + bytes.len()) / page * page;
    if start < end {
        // SAFETY: the range is inside the read-only, file-backed data of this executable, because `bytes` is 'static
        // and page-aligned inwards; a dropped page is read again from the file.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

#[cfg(not(target_os = "linux"))]
fn release_static(_bytes: &'static [u8]) {}

impl<'a> TensorView<'a> {
    /// The values as f32, borrowed when stored so and aligned.
    ///
    /// # Errors
    /// If the tensor is of an integer type or holds a value that is not finite.
    pub fn to_f32(&self) -> Result<Cow<'a, [f32]>, CheckpointError> {
        let values: Cow<'a, [f32]> = match self.dtype {
            Dtype::F32 => match bytemuck::try_cast_slice(self.data) {
                Ok(values) => Cow::Borrowed(values),
                Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(self.data)),
            },
            Dtype::F16 => self.data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::Bf16 => {
                self.data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Dtype::I8 | Dtype::U8 => return Err(self.wrong_dtype("F32, F16 or BF16")),
        };
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(CheckpointError::NotFinite { name: self.name.to_owned(), index });
        }
        Ok(values)
    }

    /// The codes of an I8 tensor.
    ///
    /// # Errors
    /// If the tensor is of another type.
    pub fn to_i8(&self) -> Result<&'a [i8], CheckpointError> {
        if self.dtype != Dtype::I8 {
            return Err(self.wrong_dtype("I8"));
        }
        Ok(bytemuck::cast_slice(self.data))
    }

    /// The bytes of a U8 tensor.
    ///
    /// # Errors
    /// If the tensor is of another type.
    pub fn to_u8(&self) -> Result<&'a [u8], CheckpointError> {
        if self.dtype != Dtype::U8 {
            return Err(self.wrong_dtype("U8"));
        }
        Ok(self.data)
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// If it differs from `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), CheckpointError> {
        if self.shape == expected { Ok(()) } else { Err(self.wrong_shape(expected)) }
    }

    pub(super) fn wrong_shape(&self, expected: &[usize]) -> CheckpointError {
        CheckpointError::Shape { name: self.name.to_owned(), expected: expected.to_vec(), got: self.shape.to_vec() }
    }

    fn wrong_dtype(&self, expected: &'static str) -> CheckpointError {
        CheckpointError::DtypeMismatch { name: self.name.to_owned(), expected, got: self.dtype.name().to_owned() }
    }
}
