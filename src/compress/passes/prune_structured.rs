//! `prune-structured`: whole heads and whole FFN neurons.

use serde::{Deserialize, Serialize};

use super::{CompressionPass, LayerReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::importance::{Importance, measure};
use crate::compress::progress::Progress;
use crate::compress::prune::{FFN_PANEL, apply, check_share, plan};
use crate::model::Architecture;

/// Removes the heads and neurons that matter least, by one ranking over all layers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneStructured {
    /// Share of all attention heads to remove, 0 to 0.9.
    pub heads: f64,
    /// Share of all FFN neurons to remove, 0 to 0.9.
    pub ffn: f64,
    /// How importance is measured.
    pub importance: Importance,
}

impl CompressionPass for PruneStructured {
    fn stage(&self) -> Stage {
        Stage::Shape
    }

    fn needs_text(&self) -> bool {
        true
    }

    fn summary(&self) -> String {
        format!("{} of the heads, {} of the FFN neurons, by {}", self.heads, self.ffn, self.importance)
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        check_share("heads", architecture.layers.iter().map(|layer| layer.n_heads), 1, self.heads)?;
        check_share("ffn", architecture.layers.iter().map(|layer| layer.d_ffn), FFN_PANEL, self.ffn)
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        let before = work.model.architecture().layers.clone();
        let rankings =
            measure(&work.model, &text, work.seed, progress)?.rank(&work.model, self.importance, progress)?;
        let plan = plan(&work.model, &rankings, self.heads, self.ffn)?;
        apply(&mut work.model, &plan)?;
        let layers = LayerReport::changed(&before, &work.model.architecture().layers);
        Ok(PassReport { layers, ..PassReport::default() })
    }
}
