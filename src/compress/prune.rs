//! Structured pruning: whole heads and whole FFN neurons, so that what remains is a smaller dense model.

use super::CompressError;
use super::allocate::{Ranking, allocate};
use super::importance::LayerRanking;
use super::passes::Refusal;
use super::weights::Weights;

/// FFN widths are kept at multiples of this: the INT8 kernels pack output channels in panels of 64.
pub const FFN_PANEL: usize = 64;

/// Heads and neurons that stay in each layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Indices of heads per layer.
    pub heads: Vec<Vec<usize>>,
    /// Indices of FFN neurons per layer.
    pub neurons: Vec<Vec<usize>>,
}

/// Divides the target shares over the layers by their rankings.
///
/// # Errors
/// If a share cannot be met with at least one head and one panel of neurons in every layer.
pub fn plan(
    model: &Weights,
    rankings: &[LayerRanking],
    share_of_heads: f64,
    share_of_neurons: f64,
) -> Result<Plan, CompressError> {
    let layers = &model.architecture().layers;
    let heads: Vec<(usize, &Ranking)> =
        layers.iter().zip(rankings).map(|(layer, ranking)| (layer.n_heads, &ranking.heads)).collect();
    let neurons: Vec<(usize, &Ranking)> =
        layers.iter().zip(rankings).map(|(layer, ranking)| (layer.d_ffn, &ranking.neurons)).collect();
    Ok(Plan {
        heads: divide("heads", &heads, 1, share_of_heads)?,
        neurons: divide("ffn", &neurons, FFN_PANEL, share_of_neurons)?,
    })
}

/// Panels that stay when `share` of all units goes.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count of panels")]
fn panels_kept(n_panels: usize, share: f64) -> usize {
    (n_panels as f64 * (1.0 - share)).round() as usize
}

fn divide(
    setting: &'static str,
    layers: &[(usize, &Ranking)],
    panel: usize,
    share: f64,
) -> Result<Vec<Vec<usize>>, CompressError> {
    let n_panels: usize = layers.iter().map(|(n_units, _)| n_units.div_ceil(panel)).sum();
    let target = panels_kept(n_panels, share);
    let kept = allocate(layers, panel, target).ok_or_else(|| CompressError::Setting {
        setting: setting.to_owned(),
        reason: format!("{share} would leave {target} of {n_panels} units in {} layers of at least one", layers.len()),
    })?;
    Ok(layers.iter().zip(kept).map(|((n_units, ranking), kept)| ranking.keep(*n_units, n_units - kept)).collect())
}

/// Checks that `share` can be met at all, before anything is measured.
///
/// # Errors
/// Naming the field.
pub(super) fn check_share(
    setting: &'static str,
    units: impl Iterator<Item = usize>,
    panel: usize,
    share: f64,
) -> Result<(), Refusal> {
    let refuse = |reason: String| Err(Refusal::new(setting, reason));
    if !(0.0..=0.9).contains(&share) {
        return refuse(format!("{share} is not a share from 0 to 0.9"));
    }
    let panels: Vec<usize> = units.map(|n_units| n_units.div_ceil(panel)).collect();
    let n_panels: usize = panels.iter().sum();
    let kept = panels_kept(n_panels, share);
    if kept < panels.len() {
        return refuse(format!(
            "{share} would leave {kept} of {n_panels} units of {panel}, but each of the {} layers keeps one",
            panels.len()
        ));
    }
    Ok(())
}

/// Removes what the plan does not keep.
///
/// # Errors
/// If the plan leaves a layer empty.
pub fn apply(model: &mut Weights, plan: &Plan) -> Result<(), CompressError> {
    for (layer, (heads, neurons)) in plan.heads.iter().zip(&plan.neurons).enumerate() {
        let config = model.architecture().layers[layer];
        if heads.len() != config.n_heads {
            model.keep_heads(layer, heads)?;
        }
        if neurons.len() != config.d_ffn {
            model.keep_neurons(layer, neurons)?;
        }
    }
    Ok(())
}
