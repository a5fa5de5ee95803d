//! Model directories in and out: Hugging Face checkpoints and niwaki artefacts.
//!
//! Every size that a file declares is checked before it is trusted; nothing here panics on bad input. Tensors are lent
//! straight from the memory mapping wherever their stored form allows it.

mod error;
mod hf_config;
pub mod hf_names;
pub mod hub;
mod inventory;
mod manifest;
mod matrix;
mod open;
mod reader;
mod weights;
mod writer;

pub use error::CheckpointError;
pub use hf_config::CONFIG_FILE;
pub use inventory::{GroupSize, Inventory, MatrixInfo, TensorGroup};
pub use manifest::{
    Calibration, FORMAT_VERSION, Golden, MANIFEST_FILE, Manifest, Pruning, Quality, Recipe, SizeReport, Source,
};
pub use matrix::{linear_tensors, matrix_tensors};
pub use open::{Checkpoint, EmbeddedArtefact, OpenOptions};
pub use reader::{Dtype, TensorFile, TensorView};
pub use weights::{LinearWeights, NormWeights, TableWeights};
pub use writer::{ArtefactDir, TensorOut, sha256_hex, write_safetensors};
