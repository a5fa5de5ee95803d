//! What each head and neuron is worth, measured on calibration text.
//!
//! A self-distillation loss is flat where student and teacher agree, so its gradient at the start is zero and ranks
//! nothing. Instead the embedding itself is probed: with `L = v · e(x)`, where `e` is the normalised sentence
//! embedding and `v` a fresh vector of random signs for each text, `E_v[(∂L/∂m)²] = ‖∂e/∂m‖²` for anything `m` in the
//! model (Gauss-Newton on random projections).

use std::fmt;
use std::str::FromStr;

use candle_core::{Device, Tensor};
use faer::Mat;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::CompressError;
use super::allocate::Ranking;
use super::calibration::CalibrationText;
use super::moments::{Moments, regularize};
use super::observe::{Listening, listening_encoder};
use super::progress::Progress;
use super::surgeon;
use super::weights::Weights;
use crate::exec::candle::normalize;
use crate::model::{LinearSlot, Ops};

/// How importance is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Importance {
    /// `‖W_S‖²`: squares of the weights that lead out of the head or neuron. Sees no text; layers compare badly.
    Magnitude,
    /// `tr(W_S C_SS W_Sᵀ)`: how much of the branch's output comes from the head or neuron, if nothing makes up for it.
    Activation,
    /// `mean_texts |∂L/∂mask|`: the first-order change of the embedding along a random direction (Michel et al. 2019,
    /// §4.1; Molchanov et al. 2019).
    Taylor,
    /// `mean_texts (∂L/∂mask)²`: what the embedding loses at first order if nothing makes up for the loss.
    GaussNewton,
    /// What the branch's output loses after the surviving inputs made up for it by least squares (optimal brain
    /// surgeon on whole columns).
    OutputError,
    /// The same, with errors of the output weighted by what they do to the embedding (Gauss-Newton): comparable
    /// across layers, which the plain output error is not.
    #[default]
    Curvature,
}

impl Importance {
    /// All of them, by name.
    pub const ALL: [Self; 6] =
        [Self::Magnitude, Self::Activation, Self::Taylor, Self::GaussNewton, Self::OutputError, Self::Curvature];

    /// The name in flags and manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Activation => "activation",
            Self::Taylor => "taylor",
            Self::GaussNewton => "gauss-newton",
            Self::OutputError => "output-error",
            Self::Curvature => "curvature",
        }
    }
}

impl fmt::Display for Importance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Importance {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|importance| importance.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{name}` is not one of {names}")
        })
    }
}

/// Units in the order of their own cost, with costs that add up.
fn ranking(costs: &[f64]) -> Ranking {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[a].total_cmp(&costs[b]).then(a.cmp(&b)));
    let mut cost = vec![0.0];
    cost.extend(order.iter().scan(0.0, |sum, &unit| {
        *sum += costs[unit];
        Some(*sum)
    }));
    Ranking { order, cost }
}

/// Ridge of the inverse input covariance, relative to its mean diagonal.
const RIDGE: f64 = 1e-3;

/// Measurements at the input of one output matrix (`W_O` or `W_down`).
#[derive(Debug)]
struct Site {
    slot: LinearSlot,
    /// Columns that go together: a head's width, or 1.
    group: usize,
    input: Moments,
    /// `Σ_tokens g gᵀ`, `[d_model, d_model]`, where `g = ∂L/∂output`.
    gradient: Vec<f64>,
    /// `Σ_texts |∂L/∂mask|` and `Σ_texts (∂L/∂mask)²` per group.
    taylor: Vec<f64>,
    mask: Vec<f64>,
}

/// Measurements of a whole model; from them rankings of every kind can be made.
#[derive(Debug)]
pub struct Measurements {
    sites: Vec<Site>,
    n_texts: usize,
}

/// The rankings of a layer.
#[derive(Debug, Clone)]
pub struct LayerRanking {
    /// Heads.
    pub heads: Ranking,
    /// FFN neurons.
    pub neurons: Ranking,
}

/// Plays the calibration text through `model`, forward and backward.
///
/// # Errors
/// If the player fails.
pub fn measure(
    model: &Weights,
    text: &CalibrationText,
    seed: u64,
    progress: &dyn Progress,
) -> Result<Measurements, CompressError> {
    let spec = model.architecture();
    let width = spec.d_model;
    let mut sites: Vec<Site> = Vec::new();
    for (layer, config) in spec.layers.iter().enumerate() {
        for (slot, group, n_in) in [
            (LinearSlot::AttentionOut(layer), config.d_head, config.d_context()),
            (LinearSlot::FfnDown(layer), 1, config.d_ffn),
        ] {
            let zeros = vec![0.0; n_in / group];
            let gradient = vec![0.0; width * width];
            sites.push(Site {
                slot,
                group,
                input: Moments::new(n_in, 0),
                gradient,
                taylor: zeros.clone(),
                mask: zeros,
            });
        }
    }
    let encoder = listening_encoder(model)?;
    let matrices = sites
        .iter()
        .map(|site| {
            let linear = model.dense(site.slot);
            Tensor::from_slice(&linear.weight, (linear.n_out, linear.n_in), &Device::Cpu)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut rng = StdRng::seed_from_u64(seed);
    progress.phase_started("measure importance", text.n_tokens as u64);
    for batch in &text.batches {
        let view = batch.view(0..batch.n_seqs());
        let mut player = Listening::probing();
        let rows = encoder.forward(&mut player, &view)?;
        let embedding = normalize(&player.pool(&rows, spec.pooling, &view)?)?;
        let gradients = (embedding * signs(&mut rng, batch.n_seqs(), width)?)?.sum_all()?.backward()?;
        for (((site, branch), probe), matrix) in
            sites.iter_mut().zip(&player.branches).zip(&player.probes).zip(&matrices)
        {
            let gradient = gradients.get(probe).ok_or(CompressError::NoGradient { slot: site.slot })?;
            let per_token = gradient.matmul(matrix)?.mul(&branch.input)?;
            for rows in view.sequences() {
                let sums: Vec<f32> = per_token.narrow(0, rows.start, rows.len())?.sum(0)?.to_vec1()?;
                for (unit, columns) in sums.chunks_exact(site.group).enumerate() {
                    let slope = columns.iter().map(|&value| f64::from(value)).sum::<f64>();
                    site.taylor[unit] += slope.abs();
                    site.mask[unit] += slope.powi(2);
                }
            }
            let square: Vec<f32> = gradient.t()?.contiguous()?.matmul(gradient)?.flatten_all()?.to_vec1()?;
            site.gradient.iter_mut().zip(square).for_each(|(sum, value)| *sum += f64::from(value));
            site.input.add_x(&branch.input)?;
        }
        progress.advanced(batch.n_tokens() as u64);
    }
    progress.phase_finished();
    Ok(Measurements { sites, n_texts: text.n_texts })
}

fn signs(rng: &mut StdRng, n_seqs: usize, width: usize) -> candle_core::Result<Tensor> {
    let signs: Vec<f32> = (0..n_seqs * width).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect();
    Tensor::from_vec(signs, (n_seqs, width), &Device::Cpu)
}

impl Measurements {
    /// Ranks the heads and neurons of every layer.
    ///
    /// # Errors
    /// If a covariance cannot be factorised.
    pub fn rank(
        &self,
        model: &Weights,
        importance: Importance,
        progress: &dyn Progress,
    ) -> Result<Vec<LayerRanking>, CompressError> {
        progress.phase_started("rank heads and neurons", self.sites.len() as u64);
        let mut rankings: Vec<Option<Result<Ranking, CompressError>>> = self.sites.iter().map(|_| None).collect();
        // Sites are independent: which thread ranks one changes nothing.
        let n_threads = candle_core::utils::get_num_threads().clamp(1, self.sites.len());
        let part = self.sites.len().div_ceil(n_threads);
        std::thread::scope(|scope| {
            for (sites, rankings) in self.sites.chunks(part).zip(rankings.chunks_mut(part)) {
                scope.spawn(move || {
                    for (site, ranking) in sites.iter().zip(rankings) {
                        *ranking = Some(self.rank_site(site, model, importance));
                    }
                });
            }
        });
        let mut rankings = rankings.into_iter().map(|ranking| ranking.expect("every chunk was ranked"));
        let mut layers = Vec::with_capacity(self.sites.len() / 2);
        while let (Some(heads), Some(neurons)) = (rankings.next(), rankings.next()) {
            layers.push(LayerRanking { heads: heads?, neurons: neurons? });
            progress.advanced(2);
        }
        progress.phase_finished();
        Ok(layers)
    }

    fn rank_site(&self, site: &Site, model: &Weights, importance: Importance) -> Result<Ranking, CompressError> {
        let n_texts = self.n_texts as f64;
        let linear = model.dense(site.slot);
        let each = |cost: &dyn Fn(usize) -> f64| Ok(ranking(&(0..site.mask.len()).map(cost).collect::<Vec<f64>>()));
        match importance {
            Importance::Magnitude => {
                return each(&|unit| {
                    let columns = unit * site.group..(unit + 1) * site.group;
                    let rows = linear.weight.chunks_exact(linear.n_in);
                    rows.flat_map(|row| &row[columns.clone()]).map(|&value| f64::from(value).powi(2)).sum()
                });
            }
            Importance::Activation => {
                let covariance = site.input.covariance();
                return each(&|unit| {
                    let columns = unit * site.group..(unit + 1) * site.group;
                    let rows = linear.weight.chunks_exact(linear.n_in).map(|row| &row[columns.clone()]);
                    let quadratic = |row: &[f32]| -> f64 {
                        let pairs = (0..site.group).flat_map(|i| (0..site.group).map(move |j| (i, j)));
                        pairs
                            .map(|(i, j)| {
                                let place = (columns.start + i, columns.start + j);
                                f64::from(row[i]) * covariance[place] * f64::from(row[j])
                            })
                            .sum()
                    };
                    rows.map(quadratic).sum()
                });
            }
            Importance::Taylor => return each(&|unit| site.taylor[unit] / n_texts),
            Importance::GaussNewton => return each(&|unit| site.mask[unit] / n_texts),
            Importance::OutputError | Importance::Curvature => {}
        }
        let mut covariance = site.input.covariance();
        regularize(&mut covariance, RIDGE);
        let weight = Mat::from_fn(linear.n_out, linear.n_in, |i, j| f64::from(linear.weight[i * linear.n_in + j]));
        let metric = (importance == Importance::Curvature)
            .then(|| Mat::from_fn(linear.n_out, linear.n_out, |i, j| site.gradient[i * linear.n_out + j] / n_texts));
        surgeon::rank(&weight, &covariance, metric.as_ref(), site.group)
            .ok_or(CompressError::NotPositive { n: linear.n_in })
    }
}
