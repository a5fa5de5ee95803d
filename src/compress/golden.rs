//! Texts with the answers an artefact must give, so that a server can check itself before it takes requests.

use crate::checkpoint::Golden;
use crate::eval::{Embeddings, Encode, EvalError};
use crate::model::{Forward, ModelError, Outputs, RaggedBatch, Want};

/// From a single word to a paragraph, with figures, symbols and other scripts.
pub(super) const TEXTS: [&str; 8] = [
    "garden",
    "How do I prune a pine tree?",
    "The cat sat on the windowsill, watching snow fall.",
    "Invoice #4821: 3 × €19.90 plus VAT is due on 2024-02-29.",
    "fn main() { println!(\"{}\", 6 * 7); }",
    "Die Gärtnerin schneidet die Kiefer; 盆栽 is an art of patience.",
    "A niwaki is a tree shaped by repeated cutting. Branches that carry little are removed, those that remain are bent \
     and thinned until the form is clear, and the tree goes on living.",
    "Photosynthesis converts light energy into chemical energy that is later released to fuel the organism's \
     activities. In most cases oxygen is released as a waste product. Most plants, algae and cyanobacteria perform \
     photosynthesis; such organisms are called photoautotrophs. The process is largely responsible for producing and \
     maintaining the oxygen content of the Earth's atmosphere, and it supplies most of the energy necessary for life \
     on Earth. Although different species perform it differently, it always begins when energy from light is absorbed \
     by proteins called reaction centres, which contain green pigments.",
];

/// A cosine as it is written down, in 4 decimals: what further digits say on held-out text depends on the machine.
pub(super) fn round_cosine(cosine: f64) -> f64 {
    (cosine * 1e4).round() / 1e4
}

/// The entries of the manifest, from embeddings of [`TEXTS`] by the uncompressed model and by the artefact.
pub(super) fn entries(
    reference: &Embeddings,
    artefact: &Embeddings,
    encode: &Encode<'_>,
) -> Result<Vec<Golden>, EvalError> {
    TEXTS
        .iter()
        .enumerate()
        .map(|(index, text)| {
            Ok(Golden {
                text: (*text).to_owned(),
                ids: encode(text).map_err(EvalError::Encode)?,
                reference: reference.row(index).to_vec(),
                cosine: round_cosine(reference.cosine(index, artefact, index)),
                ..Golden::default()
            })
        })
        .collect()
}

/// Adds what the classification heads say to the entries.
pub(super) fn add_scores(
    entries: &mut [Golden],
    reference: &mut dyn Forward,
    artefact: &mut dyn Forward,
) -> Result<(), ModelError> {
    let (mut wanted, mut got) = (Outputs::default(), Outputs::default());
    for entry in entries {
        let batch = RaggedBatch::from_sequences(&[&entry.ids])?;
        reference.forward(&batch, Want::Pooled, &mut wanted)?;
        artefact.forward(&batch, Want::Pooled, &mut got)?;
        let differences = wanted.pooled.iter().zip(&got.pooled).map(|(a, b)| f64::from((a - b).abs()));
        entry.score_error = Some(round_cosine(differences.fold(0.0, f64::max)));
        entry.scores.clone_from(&wanted.pooled);
    }
    Ok(())
}
