//! What is sent through a model or a server: lines of a file, or made-up sequences.

use std::path::Path;

use anyhow::{Context, bail};
use serde_json::Value;

use super::super::args::BenchArgs;
use super::super::output::tell;
use crate::text::Tokenizer;

/// One input.
#[derive(Debug, Clone)]
pub(super) enum Input {
    Text(String),
    Ids(Vec<u32>),
}

impl Input {
    /// As a request carries it.
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => text.as_str().into(),
            Self::Ids(ids) => ids.as_slice().into(),
        }
    }

    fn into_ids(self, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::Text(text) => Ok(tokenizer.encode(&text, true)?),
            Self::Ids(ids) => Ok(ids),
        }
    }
}

/// Token ids, cut to what the model takes; that some were is said, because it makes a figure one of shorter inputs.
pub(super) fn into_ids(inputs: Vec<Input>, tokenizer: &Tokenizer, max_tokens: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let ids = inputs.into_iter().map(|input| input.into_ids(tokenizer));
    let mut sequences = ids.collect::<anyhow::Result<Vec<_>>>()?;
    let n_cut = sequences.iter().filter(|ids| ids.len() > max_tokens).count();
    if n_cut > 0 {
        let of = sequences.len();
        tell(format_args!(
            "{n_cut} of {of} inputs are cut to the model's {max_tokens} tokens; --max-input-length allows others"
        ));
    }
    sequences.iter_mut().for_each(|ids| ids.truncate(max_tokens));
    Ok(sequences)
}

/// Ids that every vocabulary of a real model has, for a server that does not say how large its own is.
pub(super) const COMMON_IDS: usize = 4_096;

/// The inputs that the flags name. Made-up ids are spread over the `n_ids` that there are, so that embedding rows are not all
/// in cache.
pub(super) fn inputs(args: &BenchArgs, n_ids: usize) -> anyhow::Result<Vec<Input>> {
    match &args.input {
        Some(path) => read(path),
        None => {
            let ids = (0..args.length.get()).map(|i| made_up_id(i, n_ids)).collect();
            Ok(vec![Input::Ids(ids); args.sequences.get()])
        }
    }
}

fn made_up_id(index: usize, n_ids: usize) -> u32 {
    ((1_000 + index * 7_919 % 20_000) % n_ids) as u32
}

fn read(path: &Path) -> anyhow::Result<Vec<Input>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut inputs = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}:{}", path.display(), index + 1);
        let mut value = serde_json::from_str::<Value>(line).with_context(place)?;
        if let Some(field) = value.as_object_mut().and_then(|object| {
            let name = ["text", "ids"].into_iter().find(|name| object.contains_key(*name))?;
            object.remove(name)
        }) {
            value = field;
        }
        let input = match value {
            Value::String(text) if !text.is_empty() => Input::Text(text),
            list @ Value::Array(_) => Input::Ids(serde_json::from_value(list).with_context(place)?),
            _ => bail!("{}: neither a text nor a list of token ids", place()),
        };
        if matches!(&input, Input::Ids(ids) if ids.is_empty()) {
            bail!("{}: no tokens", place());
        }
        inputs.push(input);
    }
    if inputs.is_empty() {
        bail!("{}: no input", path.display());
    }
    Ok(inputs)
}
