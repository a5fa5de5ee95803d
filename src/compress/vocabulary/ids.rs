//! Ids in the files beside a tokenizer, when its vocabulary has become smaller.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// New ids by old ones, of the tokens that stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::compress) struct NewIds(BTreeMap<u64, u64>);

/// Every token of a `tokenizer.json` with its id.
fn ids(tokenizer_json: &[u8]) -> BTreeMap<String, u64> {
    let json: Value = serde_json::from_slice(tokenizer_json).unwrap_or_default();
    let entries = json["model"]["vocab"].as_object().into_iter().flatten();
    let entries = entries.filter_map(|(token, id)| Some((token.clone(), id.as_u64()?)));
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter_map(|added| Some((added["content"].as_str()?.to_owned(), added["id"].as_u64()?)));
    entries.chain(added).collect()
}

impl NewIds {
    /// By the ids that tokens have in one `tokenizer.json` and in another.
    #[must_use]
    pub(in crate::compress) fn between(before: &[u8], after: &[u8]) -> Self {
        let after = ids(after);
        Self(ids(before).into_iter().filter_map(|(token, old)| Some((old, *after.get(&token)?))).collect())
    }

    /// Every `…_token_id` of a `config.json`; one of a token that went goes too.
    pub(in crate::compress) fn renumber_config(&self, config: &mut Map<String, Value>) {
        config.retain(|name, value| match value.as_u64().filter(|_| name.ends_with("_token_id")) {
            Some(old) => match self.0.get(&old) {
                Some(&new) => {
                    *value = new.into();
                    true
                }
                None => false,
            },
            None => true,
        });
    }

    /// The `added_tokens_decoder` of a `tokenizer_config.json`, which lists tokens by id.
    pub(in crate::compress) fn renumber_tokenizer_config(&self, config: &mut Map<String, Value>) {
        if let Some(tokens) = config.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
            let renumbered = std::mem::take(tokens).into_iter().filter_map(|(id, token)| {
                let new = self.0.get(&id.parse::<u64>().ok()?)?;
                Some((new.to_string(), token))
            });
            *tokens = renumbered.collect();
        }
    }
}
