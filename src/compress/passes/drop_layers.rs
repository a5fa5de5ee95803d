//! `drop-layers`: whole layers go.

use serde::{Deserialize, Serialize};

use super::{CompressionPass, LayerReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::measure::Probe;
use crate::compress::progress::Progress;
use crate::eval::compare;
use crate::model::Architecture;

/// Removes named layers, or those that the sentence embedding misses least.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DropLayers {
    /// These layers, counted from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// So many layers, one after the other: each time the one whose removal changes the embedding least on text that was
    /// kept apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
}

impl CompressionPass for DropLayers {
    fn stage(&self) -> Stage {
        Stage::Shape
    }

    fn needs_text(&self) -> bool {
        self.layers.is_none()
    }

    fn summary(&self) -> String {
        match (&self.layers, self.count) {
            (Some(layers), _) => {
                let names: Vec<String> = layers.iter().map(usize::to_string).collect();
                format!("without layers {}", names.join(", "))
            }
            (None, count) => format!("without the {} layers that are missed least", count.unwrap_or_default()),
        }
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        let n_layers = architecture.layers.len();
        match (&self.layers, self.count) {
            (Some(_), Some(_)) => Err(Refusal::new("count", "give either `layers` or `count`")),
            (None, None) => Err(Refusal::new("", "give `layers` or `count`")),
            (None, Some(count)) if (1..n_layers).contains(&count) => Ok(()),
            (None, Some(count)) => {
                Err(Refusal::new("count", format!("{count} is not in 1..{n_layers}: the model has {n_layers} layers")))
            }
            (Some(layers), None) => {
                if let Some(layer) = layers.iter().find(|&&layer| layer >= n_layers) {
                    let reason = format!("there is no layer {layer}, the last is {}", n_layers - 1);
                    return Err(Refusal::new("layers", reason));
                }
                let mut different = layers.clone();
                different.sort_unstable();
                different.dedup();
                if different.len() != layers.len() || layers.is_empty() {
                    return Err(Refusal::new("layers", "name each layer once, and one at least"));
                }
                if different.len() == n_layers {
                    return Err(Refusal::new("layers", format!("all {n_layers} layers: one must stay")));
                }
                Ok(())
            }
        }
    }

    fn leaves(&self, architecture: &Architecture) -> Architecture {
        let mut spec = architecture.spec();
        let n_layers = spec.layers.len();
        // Which layers are missed least is not known yet, only how many stay.
        let gone = self.layers.clone().unwrap_or_else(|| (0..self.count.unwrap_or_default()).collect());
        spec.layers = (0..n_layers).filter(|layer| !gone.contains(layer)).map(|layer| spec.layers[layer]).collect();
        Architecture::new(spec).unwrap_or_else(|_| architecture.clone())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let before = work.model.architecture().layers.clone();
        let mut stay: Vec<usize> = (0..before.len()).collect();
        let mut notes = Vec::new();
        match (&self.layers, self.count) {
            (Some(layers), _) => stay.retain(|layer| !layers.contains(layer)),
            (None, count) => {
                let count = count.unwrap_or_default();
                let probe = Probe::of(work.text.as_deref());
                let expected = probe.embeddings(&work.model, &*work.encode)?;
                let trials: usize = (0..count).map(|gone| before.len() - gone).sum();
                progress.phase_started("try without each layer", trials as u64);
                for _ in 0..count {
                    let mut best: Option<(f64, usize)> = None;
                    for place in 0..stay.len() {
                        let mut kept = stay.clone();
                        kept.remove(place);
                        let mut model = work.model.clone();
                        model.keep_layers(&kept)?;
                        let loss = 1.0 - compare(&expected, &probe.embeddings(&model, &*work.encode)?)?.mean;
                        if best.is_none_or(|(least, _)| loss < least) {
                            best = Some((loss, place));
                        }
                        progress.advanced(1);
                    }
                    if let Some((loss, place)) = best {
                        notes.push(format!(
                            "without layer {}: cosine {:.4} in the mean",
                            stay.remove(place),
                            1.0 - loss
                        ));
                    }
                }
                progress.phase_finished();
            }
        }
        work.model.keep_layers(&stay)?;
        let layers = before
            .iter()
            .enumerate()
            .filter(|(layer, _)| !stay.contains(layer))
            .map(|(layer, config)| LayerReport { layer, heads: (config.n_heads, 0), ffn: (config.d_ffn, 0) })
            .collect();
        Ok(PassReport { layers, notes, ..PassReport::default() })
    }
}
