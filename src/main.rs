//! Compresses a Hugging Face Transformer and serves it over HTTP.

fn main() {}
