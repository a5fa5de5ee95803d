//! The model that is part of the binary, so that the binary alone serves.

use crate::checkpoint::EmbeddedArtefact;

/// all-MiniLM-L6-v2, compressed; how it was made stands in its model card.
pub(super) static ARTEFACT: EmbeddedArtefact = EmbeddedArtefact {
    manifest: include_bytes!("../../models/all-MiniLM-L6-v2-niwaki/niwaki.json"),
    tokenizer: include_bytes!("../../models/all-MiniLM-L6-v2-niwaki/tokenizer.json"),
    weights: include_bytes!("../../models/all-MiniLM-L6-v2-niwaki/model.safetensors"),
};
