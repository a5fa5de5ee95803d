//! `prune-structured`: whole heads and whole FFN neurons.

use serde::{Deserialize, Serialize};

use super::{CompressionPass, LayerReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::budget::{Budget, LayerPrices, least_share, plan_within, prices, time_prices};
use crate::compress::importance::{Importance, LayerRanking, measure};
use crate::compress::progress::Progress;
use crate::compress::prune::{FFN_PANEL, Plan, apply, check_share, plan};
use crate::model::Architecture;

/// Removes the heads and neurons that matter least, by one ranking over all layers: shares of heads and of neurons, or
/// a share of what both take together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneStructured {
    /// Share of all attention heads to remove, 0 to 0.9.
    pub heads: f64,
    /// Share of all FFN neurons to remove, 0 to 0.9.
    pub ffn: f64,
    /// Share of `of` to remove, 0 to 0.9, instead of `heads` and `ffn`: how it falls on both is part of the choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// What `share` is a share of.
    pub of: Budget,
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
        match self.share {
            Some(share) => format!("{share} of the encoder's {}, by {}", self.of, self.importance),
            None => format!("{} of the heads, {} of the FFN neurons, by {}", self.heads, self.ffn, self.importance),
        }
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        let Some(share) = self.share else {
            check_share("heads", architecture.layers.iter().map(|layer| layer.n_heads), 1, self.heads)?;
            check_share("ffn", architecture.layers.iter().map(|layer| layer.d_ffn), FFN_PANEL, self.ffn)?;
            if self.of != Budget::default() {
                return Err(Refusal::new("of", "says what `share` is a share of, which is not given"));
            }
            if self.heads == 0.0 && self.ffn == 0.0 {
                return Err(Refusal::new("", "removes nothing: give `share`, or `heads` or `ffn`"));
            }
            return Ok(());
        };
        if !(0.0..=0.9).contains(&share) {
            return Err(Refusal::new("share", format!("{share} is not a share from 0 to 0.9")));
        }
        if self.heads != 0.0 || self.ffn != 0.0 {
            let reason = "is of heads and neurons together: give either this, or `heads` and `ffn`";
            return Err(Refusal::new("share", reason));
        }
        // What a layer takes at least, in time, is only known when it is measured.
        let most = 1.0 - least_share(architecture, self.of);
        if share > most {
            let reason = format!(
                "{share} cannot be met: with a head and a panel of {FFN_PANEL} neurons in every layer {most:.3} is gone"
            );
            return Err(Refusal::new("share", reason));
        }
        Ok(())
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let text = work.text()?;
        let before = work.model.architecture().layers.clone();
        let rankings =
            measure(&work.model, &text, work.seed, progress)?.rank(&work.model, self.importance, progress)?;
        let plan = match self.share {
            Some(share) => self.plan_share(work, &rankings, share, progress)?,
            None => plan(&work.model, &rankings, self.heads, self.ffn)?,
        };
        apply(&mut work.model, &plan)?;
        let layers = LayerReport::changed(&before, &work.model.architecture().layers);
        Ok(PassReport { layers, ..PassReport::default() })
    }
}

impl PruneStructured {
    fn plan_share(
        &self,
        work: &Work<'_>,
        rankings: &[LayerRanking],
        share: f64,
        progress: &dyn Progress,
    ) -> Result<Plan, CompressError> {
        let architecture = work.model.architecture();
        let prices = match self.of {
            Budget::Latency => time_prices(architecture, &*work.text()?, work.runtime, progress)?,
            counted => prices(architecture, counted),
        };
        let whole: u64 = prices.iter().map(LayerPrices::whole).sum();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a whole number")]
        let budget = (whole as f64 * (1.0 - share)) as u64;
        plan_within(&architecture.layers, rankings, &prices, budget).ok_or_else(|| CompressError::Setting {
            setting: "share".to_owned(),
            reason: format!("{share} of the {} cannot be met with one head and {FFN_PANEL} neurons a layer", self.of),
        })
    }
}
