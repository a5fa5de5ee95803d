//! The handlers.

pub(crate) mod embed;
pub(crate) mod ops;
pub(crate) mod text;
