//! The handlers.

pub(crate) mod embed;
pub(crate) mod inference;
pub(crate) mod ops;
pub(crate) mod score;
pub(crate) mod text;
