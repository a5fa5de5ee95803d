//! Before a model serves, it answers the golden inputs of its artefact.

use anyhow::bail;

use crate::checkpoint::{Checkpoint, Golden, Manifest};
use crate::cli::args::ModelArgs;
use crate::model::{Forward, Outputs, RaggedBatch, Want};
use crate::telemetry::{Metrics, events};

/// How far the answer to a golden input may be from the one measured when the artefact was made, times its [`leeway`]: other
/// instruction sets round other last bits, anything beyond is damage.
const COSINE_SLACK: f64 = 0.005;
/// The same for a number of a classification head, relative to the largest of them (or 1).
const SCORE_SLACK: f64 = 0.05;

/// The golden inputs whose recorded answers say something about the model as it is run.
fn telling<'a>(manifest: &'a Manifest, checkpoint: &Checkpoint, args: &ModelArgs) -> Vec<(usize, &'a Golden)> {
    let architecture = checkpoint.architecture();
    // Another pooling makes other embeddings; a classification head knows no other.
    if args.pooling.is_some() && architecture.pooling != manifest.architecture.pooling {
        return Vec::new();
    }
    let overridden = args.attention.is_some();
    let tells = |golden: &Golden| {
        let len = golden.ids.len();
        // Within the window a band hides nothing, so that answers are the same to the last bit: if both the recorded
        // attention and the one in use see everything, they must agree.
        let layers = architecture.layers.iter().chain(&manifest.architecture.layers);
        len <= architecture.max_input_tokens
            && (!overridden || layers.into_iter().all(|layer| layer.band.is_full_for(len)))
    };
    manifest.golden.iter().enumerate().filter(|(_, golden)| tells(golden)).collect()
}

/// Plays the artefact's golden inputs and compares with the uncompressed model's answers.
pub(super) fn self_check(
    checkpoint: &Checkpoint,
    args: &ModelArgs,
    worker: &mut dyn Forward,
    metrics: &Metrics,
    model: &str,
) -> anyhow::Result<()> {
    let goldens = checkpoint.manifest().map(|manifest| telling(manifest, checkpoint, args)).unwrap_or_default();
    let is_classifier = checkpoint.architecture().head.is_some();
    let mut out = Outputs::default();
    let mut worst: Option<(f64, f64, f64)> = None;
    for (index, golden) in goldens {
        worker.forward(&RaggedBatch::from_sequences(&[&golden.ids])?, Want::Pooled, &mut out)?;
        let (found, bound, drift) = if is_classifier {
            let Some(error) = golden.score_error else { continue };
            let largest = golden.scores.iter().fold(1.0, |max: f64, score| max.max(f64::from(score.abs())));
            (difference(&out.pooled, &golden.scores), error + SCORE_SLACK * largest, 0.0)
        } else {
            // Counted from 1, so that in both cases more is worse.
            let (found, recorded) = (1.0 - cosine(&out.pooled, &golden.reference), 1.0 - golden.cosine);
            let leeway = leeway(golden.cosine);
            (found, recorded + COSINE_SLACK * leeway, (found - recorded) / leeway)
        };
        // A NaN must not pass.
        if found.is_nan() || found > bound {
            let what = if is_classifier { "differs by" } else { "has a cosine distance of" };
            bail!("self-check: golden input {index} {what} {found:.5} to its reference, more than {bound:.5}");
        }
        let (most, allowed, furthest) = worst.unwrap_or((found, bound, drift));
        worst = Some((most.max(found), allowed.max(bound), furthest.max(drift)));
    }
    match worst {
        Some((found, bound, _)) if is_classifier => {
            events::not_self_checked(metrics, model);
            events::scores_checked(model, found, bound);
        }
        Some((found, bound, drift)) => events::self_checked(metrics, model, 1.0 - found, 1.0 - bound, drift),
        // Nothing was checked, and the metric says so.
        None => events::not_self_checked(metrics, model),
    }
    Ok(())
}

/// How much more the cosine of an artefact that lies far from the uncompressed model may move.
///
/// Rounding turns an embedding by some small angle ε, whatever the artefact. Its cosine to the reference, at an angle θ from
/// it, moves by up to ε · sin θ: by little where the artefact is close, by ε where little is left of the original.
fn leeway(cosine: f64) -> f64 {
    1.0 + 4.0 * (1.0 - cosine * cosine).max(0.0).sqrt()
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let differences = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    differences.fold(0.0, |max: f64, d| if d > max || d.is_nan() { d } else { max })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
