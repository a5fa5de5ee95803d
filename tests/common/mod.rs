//! Pieces that several test files share.
#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod forms;
pub(crate) mod numbers;
pub(crate) mod tiny;
pub(crate) mod workshop;
