//! What each fuzz target does with its bytes. A finding is a panic. `tests/corpus.rs` runs the same bodies over the corpus.
#![allow(dead_code, reason = "each target uses its own body")]

pub(crate) mod artefacts;
pub(crate) mod requests;
pub(crate) mod texts;
pub(crate) mod traces;

// The models that the other tests use.
#[path = "../../common/forms.rs"]
mod forms;
#[path = "../../common/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};

/// A checkpoint among the golden files.
pub(crate) fn golden(name: &str) -> PathBuf {
    // Two packages compile this: the project, and the one of the fuzz targets in its folder.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if root.ends_with("tests/fuzz") { root.join("../..") } else { root.to_owned() };
    root.join("tests/golden").join(name)
}

/// Numbers out of bytes; zeros once they are used up.
pub(crate) struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> usize {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first.into()
    }

    pub(crate) fn wide(&mut self) -> usize {
        self.byte() | self.byte() << 8
    }

    /// The next `n` bytes, or as many as there are.
    pub(crate) fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
