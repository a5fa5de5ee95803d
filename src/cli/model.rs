//! Where the model comes from: a directory, the hub's cache, or the binary itself.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};

use super::args::{ModelArgs, Place, PoolingArg};
use super::default_model;
use super::progress::Bars;
use crate::checkpoint::hub;
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::model::{Band, Pooling};

/// With a band, inputs may be longer than the model's position table; this is the limit unless a flag sets one.
pub(super) const DEFAULT_BANDED_INPUT: usize = 8_192;

/// Longest input for a model that runs under `band`; `full` reads as many tokens as the model says.
pub(super) fn max_input_tokens(band: Option<Band>, flag: Option<usize>) -> Option<usize> {
    flag.or(band.filter(|band| *band != Band::FULL).map(|_| DEFAULT_BANDED_INPUT))
}

/// Opens the one model that the flags name.
pub(super) fn open(args: &ModelArgs) -> anyhow::Result<Arc<Checkpoint>> {
    match &args.model[..] {
        [] => open_place(None, args),
        [place] => open_place(Some(place), args),
        _ => bail!("--model is given several times, which only `serve` can do anything with"),
    }
}

/// Opens the model at `place`, or else the hub's, or else the one inside the binary.
pub(super) fn open_place(place: Option<&Place>, args: &ModelArgs) -> anyhow::Result<Arc<Checkpoint>> {
    let options = OpenOptions {
        pooling: args.pooling.map(pooling),
        band: args.attention,
        max_input_tokens: max_input_tokens(args.attention, args.max_input_length),
        trust_files: false,
    };
    let checkpoint = match (place, &args.model_id) {
        (Some(Place { dir, .. }), _) => {
            Checkpoint::open_with(dir, &options).with_context(|| format!("model {}", dir.display()))?
        }
        (None, Some(id)) => {
            let dir = download(args, id).with_context(|| format!("model {id}"))?;
            Checkpoint::open_with(&dir, &options).with_context(|| format!("model {id} in {}", dir.display()))?
        }
        (None, None) => Checkpoint::embedded(&default_model::ARTEFACT, &options).context("the default model")?,
    };
    Ok(Arc::new(checkpoint))
}

fn download(args: &ModelArgs, id: &str) -> anyhow::Result<PathBuf> {
    let mut config = hub::HubConfig::from_env(&|name| std::env::var(name).ok());
    // `from_env` has read the variables, by the rules of Hugging Face's own tools.
    if let Some(token) = args.hf_token.as_ref().filter(|token| !token.is_empty()) {
        config.token = Some(token.clone());
    }
    if let Some(cache) = &args.huggingface_hub_cache {
        config.cache = Some(cache.clone());
    }
    Ok(hub::download(&config, id, Some(&args.revision), &Bars::new())?)
}

fn pooling(arg: PoolingArg) -> Pooling {
    match arg {
        PoolingArg::Cls => Pooling::Cls,
        PoolingArg::Mean => Pooling::Mean,
        PoolingArg::Max => Pooling::Max,
        PoolingArg::LastToken => Pooling::LastToken,
    }
}
