//! Models from the Hugging Face hub, into the cache that Hugging Face's own tools use.
//!
//! One download, in order: list the revision's files (which pins it to a commit), take those that a sentence encoder
//! is made of, small ones first and weights last, and note that the snapshot is whole. A file is fetched
//! into `blobs/<etag>.incomplete` under a lock that Python's `huggingface_hub` honours too, is checked against the
//! hash that the hub announces, renamed into place and linked from the snapshot. So two processes never clash, an
//! interrupted download goes on where it stopped, and a snapshot noted as whole is used without any network.
//!
//! What comes from the network is not trusted: names are checked before they become paths, sizes are bounded, and the
//! token goes to the endpoint's own origin only, never along a redirect.

mod address;
mod announced;
mod cache;
mod config;
mod error;
mod names;
mod transfer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::CONFIG_FILE;
use cache::RepoCache;
use names::{Commit, ModelId, Revision};
use transfer::Client;

pub use config::{HubConfig, Patience};
pub use error::HubError;

/// What a caller may show of a download; every method may do nothing.
pub trait HubProgress: Sync {
    /// A file's transfer begins, or goes on at byte `resumed_from`; `total` where the hub says it.
    fn file_started(&self, _file: &str, _total: Option<u64>, _resumed_from: u64) {}
    /// More bytes of the current file have been written.
    fn received(&self, _bytes: u64) {}
    /// The current file is checked and in place.
    fn file_finished(&self, _file: &str) {}
    /// Nothing happens for up to `delay`, because of `reason`.
    fn waiting(&self, _file: &str, _reason: &str, _delay: std::time::Duration) {}
}

impl HubProgress for () {}

/// Files at the top of a repository that are taken when they are there, besides the model's own.
const DESCRIPTIONS: [&str; 5] =
    ["sentence_bert_config.json", "config_sentence_transformers.json", "niwaki.json", "README.md", "LICENSE"];
const MODULES: &str = "modules.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// A repository's list of files is far smaller.
const MAX_LISTING_BYTES: u64 = 16 << 20;
/// The largest tokenizers known are about 35 MB.
const MAX_SMALL_FILE_BYTES: u64 = 256 << 20;
/// Far above every encoder's file; keeps a broken or hostile answer from filling the disk unnoticed.
const MAX_WEIGHTS_BYTES: u64 = 64 << 30;

/// The answer of `/api/models/{id}/revision/{revision}`.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The part of a sharded checkpoint's index that names its files.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// Makes the files of a sentence encoder available locally and returns their directory.
///
/// `model_id` is `org/name` (or a bare `name`), `revision` a branch, a tag or a commit; `main` where it is `None`. A
/// revision that is whole in the cache is used as it is, without network; a branch is therefore not refreshed. A
/// snapshot that another tool has made is completed when the hub can be reached, and used as it is otherwise.
///
/// # Errors
/// [`HubError`], which says what to do. After an error no incomplete snapshot counts as whole, and what was received
/// of a file is kept to go on from, unless its checksum was wrong.
pub fn download(
    config: &HubConfig,
    model_id: &str,
    revision: Option<&str>,
    progress: &dyn HubProgress,
) -> Result<PathBuf, HubError> {
    let model = ModelId::parse(model_id)?;
    let revision = Revision::parse(revision.unwrap_or("main"))?;
    let cache = RepoCache::new(config.cache_dir()?, &model);

    let cached = cache.commit_of(&revision);
    if let Some(commit) = &cached
        && cache.is_whole(commit)
    {
        return Ok(cache.snapshot(commit));
    }
    let usable = cached.map(|commit| cache.snapshot(&commit)).filter(|snapshot| has_required_files(snapshot));
    if config.offline {
        return usable.ok_or_else(|| HubError::Offline {
            model: model.to_string(),
            revision: revision.to_string(),
            cache: cache.root().to_path_buf(),
        });
    }
    match fetch_snapshot(config, &model, &revision, &cache, progress) {
        Err(HubError::Unreachable { .. }) if usable.is_some() => Ok(usable.expect("checked in the guard")),
        result => result,
    }
}

/// Lists the revision, fetches every wanted file and notes that the snapshot is whole.
fn fetch_snapshot(
    config: &HubConfig,
    model: &ModelId,
    revision: &Revision,
    cache: &RepoCache,
    progress: &dyn HubProgress,
) -> Result<PathBuf, HubError> {
    let client = Client::new(config, model, revision, progress)?;
    let url = format!("{}/api/models/{model}/revision/{}", client.endpoint(), revision.url_encoded());
    let listing: Listing = client.get_json(&url, MAX_LISTING_BYTES)?;
    let commit = Commit::parse(&listing.sha)?;
    let siblings = listing
        .siblings
        .into_iter()
        .map(|sibling| names::checked_file_name(&sibling.rfilename).map(|()| sibling.rfilename))
        .collect::<Result<BTreeSet<String>, HubError>>()?;

    let missing = |file: &str| HubError::MissingFile {
        model: model.to_string(),
        revision: revision.to_string(),
        file: file.to_owned(),
    };
    let fetch_small = |file: &str| client.fetch(cache, &commit, file, MAX_SMALL_FILE_BYTES);

    let folder = match siblings.contains(MODULES) {
        true => transformer_folder(&fetch_small(MODULES)?)?,
        false => String::new(),
    };
    let config = format!("{folder}{CONFIG_FILE}");
    let tokenizer = [TOKENIZER.to_owned(), format!("{folder}{TOKENIZER}")]
        .into_iter()
        .find(|file| siblings.contains(file))
        .ok_or_else(|| missing(TOKENIZER))?;
    let (single, index) = (format!("{folder}{WEIGHTS}"), format!("{folder}{WEIGHTS_INDEX}"));
    for needed in [&config, &tokenizer] {
        if !siblings.contains(needed) {
            return Err(missing(needed));
        }
        fetch_small(needed)?;
    }
    let weights = if siblings.contains(&single) {
        BTreeSet::from([single])
    } else if siblings.contains(&index) {
        shards_of(&fetch_small(&index)?, &folder)?
    } else {
        return Err(missing(&single));
    };
    if let Some(absent) = weights.iter().find(|file| !siblings.contains(*file)) {
        return Err(missing(absent));
    }

    let own_length_limit = format!("{folder}{}", DESCRIPTIONS[0]);
    let is_wanted = |name: &str| DESCRIPTIONS.contains(&name) || name == own_length_limit || is_module_config(name);
    for file in siblings.iter().filter(|name| is_wanted(name)) {
        match fetch_small(file) {
            Err(HubError::MissingFile { .. }) => {} // listed but not served: opening the model will tell if it matters
            result => drop(result?),
        }
    }
    for file in &weights {
        client.fetch(cache, &commit, file, MAX_WEIGHTS_BYTES)?;
    }
    cache.note_commit(revision, &commit)?;
    cache.note_whole(&commit)?;
    Ok(cache.snapshot(&commit))
}

/// `1_Pooling/config.json` and its like: one folder deep.
fn is_module_config(name: &str) -> bool {
    name.split_once('/').is_some_and(|(_, file)| file == CONFIG_FILE)
}

/// The folder of the transformer, as `folder/` or empty, that `modules.json` names.
fn transformer_folder(modules: &Path) -> Result<String, HubError> {
    let modules: Vec<Module> = read_json(modules, MODULES)?;
    let transformer = modules.into_iter().find(|module| module.kind.ends_with(".Transformer"));
    match transformer.map(|module| module.path.trim_end_matches('/').to_owned()) {
        Some(path) if !path.is_empty() && path != "." => names::checked_file_name(&path).map(|()| format!("{path}/")),
        _ => Ok(String::new()),
    }
}

/// The distinct files that an index names, below `folder`, each safe to be used as a path.
fn shards_of(index: &Path, folder: &str) -> Result<BTreeSet<String>, HubError> {
    let index: ShardIndex = read_json(index, WEIGHTS_INDEX)?;
    let shards = index.weight_map.into_values().map(|name| format!("{folder}{name}"));
    shards.map(|name| names::checked_file_name(&name).map(|()| name)).collect()
}

fn read_json<T: DeserializeOwned>(path: &Path, name: &str) -> Result<T, HubError> {
    let bytes = std::fs::read(path).map_err(|source| HubError::io(path, source))?;
    serde_json::from_slice(&bytes).map_err(|source| HubError::Json { origin: name.to_owned(), source })
}

/// Whether a directory holds what no encoder can do without.
fn has_required_files(snapshot: &Path) -> bool {
    let has = |file: &str| snapshot.join(file).is_file();
    let folder = match has(MODULES) {
        true => transformer_folder(&snapshot.join(MODULES)),
        false => Ok(String::new()),
    };
    let Ok(folder) = folder else { return false };
    let has_shards = || {
        let index = snapshot.join(format!("{folder}{WEIGHTS_INDEX}"));
        shards_of(&index, &folder).is_ok_and(|shards| shards.iter().all(|name| has(name)))
    };
    has(&format!("{folder}{CONFIG_FILE}"))
        && (has(TOKENIZER) || has(&format!("{folder}{TOKENIZER}")))
        && (has(&format!("{folder}{WEIGHTS}")) || has_shards())
}
