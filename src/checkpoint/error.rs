//! What can be wrong with a model directory.

use std::path::PathBuf;

use crate::model::ModelError;

/// An error of reading or writing a model directory; each names the file, tensor or field.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The directory is not there.
    #[error("{}: not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A required file is missing.
    #[error("{}: missing; {hint}", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// What it is needed for or what to do.
        hint: &'static str,
    },
    /// A JSON file that does not parse.
    #[error("{file}: {source}")]
    Json {
        /// The file.
        file: String,
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// A configuration field that is missing or not supported.
    #[error("{file}: {field}: {reason}")]
    Field {
        /// The file.
        file: String,
        /// The field.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// An architecture that has no forward text here.
    #[error(
        "config.json: model_type `{0}` is not supported (supported: bert, roberta, xlm-roberta, camembert, distilbert)"
    )]
    UnknownArchitecture(String),
    /// A damaged safetensors file.
    #[error("{file}: not a valid safetensors file: {reason}")]
    Safetensors {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that is not in the file.
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    /// A tensor of another shape.
    #[error("tensor `{name}` has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Declared by the configuration.
        expected: Vec<usize>,
        /// Found.
        got: Vec<usize>,
    },
    /// A tensor of another number type.
    #[error("tensor `{name}` has dtype {got}, expected {expected}")]
    DtypeMismatch {
        /// The tensor.
        name: String,
        /// Accepted.
        expected: &'static str,
        /// Found.
        got: String,
    },
    /// A number that no weight may be.
    #[error("tensor `{name}` holds a value that is not finite (element {index})")]
    NotFinite {
        /// The tensor.
        name: String,
        /// Index of the first such element.
        index: usize,
    },
    /// A quantization scale that is not a positive number.
    #[error("tensor `{name}` holds a scale that is not positive and finite (row {row})")]
    Scale {
        /// The tensor.
        name: String,
        /// Its row.
        row: usize,
    },
    /// A stored matrix whose parts do not fit each other.
    #[error("tensor `{name}`: {reason}")]
    Form {
        /// The matrix.
        name: String,
        /// Which part, and what is wrong with it.
        reason: String,
    },
    /// An artefact of a newer format.
    #[error("niwaki.json: format_version {got} is newer than {supported}, the newest that this build reads")]
    NewerManifest {
        /// Found.
        got: u32,
        /// Newest known.
        supported: u32,
    },
    /// The weights are not those that the manifest was written for.
    #[error("{file}: sha256 is {got}, the manifest says {expected}")]
    Checksum {
        /// The file.
        file: String,
        /// In the manifest.
        expected: String,
        /// Of the file.
        got: String,
    },
    /// The target of a write exists.
    #[error("{}: exists already", .0.display())]
    TargetExists(PathBuf),
    /// The target of a write is a place that cannot be replaced as a whole.
    #[error("{}: {reason}", path.display())]
    Target {
        /// The target.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// The declared architecture is impossible.
    #[error("{file}: {source}")]
    Model {
        /// The file that declares it.
        file: &'static str,
        /// What is wrong.
        source: ModelError,
    },
    /// What a caller wants of the model is impossible.
    #[error("what is asked for does not fit the model: {0}")]
    Override(#[source] ModelError),
}

impl CheckpointError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn field(file: &str, field: &str, reason: impl Into<String>) -> Self {
        Self::Field { file: file.to_owned(), field: field.to_owned(), reason: reason.into() }
    }
}
