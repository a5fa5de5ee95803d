//! `low-rank`: matrices as products of two thin ones, where that is smaller and faster.

use std::collections::BTreeMap;

use faer::Mat;
use serde::{Deserialize, Serialize};

use super::quantize::corrected_bias;
use super::report::relative_error;
use super::zeros::{check_ridge, linears, to_mat};
use super::{CompressionPass, MatrixReport, PassReport, Refusal, Stage, Work};
use crate::compress::CompressError;
use crate::compress::allocate::{Choice, choose};
use crate::compress::calibration::CalibrationText;
use crate::compress::lowrank::{Factorization, factorize};
use crate::compress::moments::{Moments, regularize};
use crate::compress::progress::Progress;
use crate::compress::reconstruct::fit;
use crate::compress::sense::{Sensitivities, sense};
use crate::compress::slots::{Group, MatrixSlot, linear_slots};
use crate::compress::sparsity::output_error;
use crate::compress::walk::walk;
use crate::compress::weights::{DenseLinear, Weights};
use crate::model::{Architecture, LinearSlot};
use crate::quant::{LowRank as Product, Weight, quantize_rows_symmetric};

/// Two products take at most this much more time per multiply-accumulate than one (as measured at 4,096 rows by
/// `cargo bench --bench products -- --ratios 4096`: 1.00 to 1.14, most where a rank leaves part of a panel empty). Factors
/// that save less may be no faster.
const OVERHEAD: f64 = 1.15;

/// Of every matrix its spectrum and its shape `(rows, cols)`.
type Spectra = BTreeMap<MatrixSlot, (Factorization, (usize, usize))>;

/// What an error costs while factors are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// The same everywhere: the singular value decomposition of the matrix itself.
    Plain,
    /// Rows weigh what their errors do to the sentence embedding (squared gradients); rows of the embedding, how often
    /// their token occurs.
    Fisher,
    /// The error of the output on the calibration text; for the embedding, what the sentence embedding feels of it.
    #[default]
    Whitened,
    /// Both.
    WhitenedFisher,
}

impl Metric {
    fn rows(self) -> bool {
        matches!(self, Self::Fisher | Self::WhitenedFisher)
    }

    fn columns(self) -> bool {
        matches!(self, Self::Whitened | Self::WhitenedFisher)
    }
}

/// Stores matrices as INT8 factors. Exactly one of `rank`, `energy` and `share` says how thin they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LowRank {
    /// Which matrices; of the tables, the word embedding.
    pub group: Group,
    /// The same rank for every matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The smallest rank that keeps this share of the energy in the metric, matrix by matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy: Option<f64>,
    /// Share of the weights of all these matrices together that stays; ranks are chosen for the least sum of relative errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// What an error costs.
    pub metric: Metric,
    /// Whether factors aim at the weights that fit the reference's outputs best on the inputs as they are now.
    pub refit: bool,
    /// Added to moments, relative to their mean diagonal.
    pub ridge: f64,
}

impl Default for LowRank {
    fn default() -> Self {
        let metric = Metric::default();
        Self { group: Group::All, rank: None, energy: None, share: None, metric, refit: true, ridge: 0.01 }
    }
}

/// Metric of one matrix: per row, and between columns.
#[derive(Default)]
struct Costs {
    rows: Option<Vec<f64>>,
    columns: Option<Mat<f64>>,
}

/// What became of a matrix.
enum Made {
    Factors {
        form: Weight<'static>,
        rank: usize,
    },
    /// Factors of this rank would be larger or slower.
    Refused(String),
}

impl LowRank {
    fn slots(&self, model: &Weights) -> Vec<MatrixSlot> {
        let word = self.group.contains(MatrixSlot::Word).then_some(MatrixSlot::Word);
        word.into_iter().chain(linears(model, self.group).into_iter().map(MatrixSlot::Linear)).collect()
    }

    /// The rank by the settings, when no budget is shared.
    fn own_rank(&self, factorization: &Factorization) -> usize {
        let most = factorization.energies().len();
        match (self.rank, self.energy) {
            (Some(rank), _) => rank.min(most),
            (None, Some(energy)) => factorization.rank_for_energy(energy),
            (None, None) => most,
        }
    }

    /// Whether linear layers are factorised along the model, on what the earlier ones feed them.
    fn needs_walk(&self) -> bool {
        self.refit || self.metric.columns()
    }

    fn linear_costs(&self, slot: LinearSlot, moments: Option<&Moments>, sensed: Option<&Sensitivities>) -> Costs {
        let rows = sensed.filter(|_| self.metric.rows()).map(|sensed| roots(&sensed.outputs[&slot]));
        let columns = moments.filter(|_| self.metric.columns()).map(|moments| self.covariance(moments));
        Costs { rows, columns }
    }

    fn covariance(&self, moments: &Moments) -> Mat<f64> {
        let mut covariance = moments.covariance();
        regularize(&mut covariance, self.ridge);
        covariance
    }

    fn table_costs(&self, text: Option<&CalibrationText>, n_rows: usize, sensed: Option<&Sensitivities>) -> Costs {
        let rows = text.filter(|_| self.metric.rows()).map(|text| roots(&frequencies(text, n_rows)));
        let columns = sensed.filter(|_| self.metric.columns()).map(|sensed| {
            let mut metric = sensed.embedding.clone();
            regularize(&mut metric, self.ridge);
            metric
        });
        Costs { rows, columns }
    }

    /// Ranks of all matrices within the shared budget; those that stay whole are left out.
    fn shared_ranks(
        &self,
        share: f64,
        spectra: &BTreeMap<MatrixSlot, (Factorization, (usize, usize))>,
    ) -> Result<BTreeMap<MatrixSlot, usize>, CompressError> {
        let mut options: Vec<Vec<(usize, Choice)>> = Vec::new();
        for (slot, (factorization, (n_out, n_in))) in spectra {
            let step = rank_step(*n_out, *n_in);
            let price = |rank: usize| (rank * (n_out + n_in)) as u64;
            let whole = Choice { price: (n_out * n_in) as u64, cost: 0.0 };
            let total = factorization.error(0).max(f64::MIN_POSITIVE);
            let ranks = (step..n_out.min(n_in).to_owned()).step_by(step);
            let mut of_matrix: Vec<(usize, Choice)> = ranks
                .filter(|&rank| refusal(*slot, rank, *n_out, *n_in).is_none())
                .map(|rank| (rank, Choice { price: price(rank), cost: factorization.error(rank) / total }))
                .collect();
            of_matrix.push((0, whole));
            options.push(of_matrix);
        }
        let weights: usize = spectra.values().map(|(_, (n_out, n_in))| n_out * n_in).sum();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
        let budget = (weights as f64 * share) as u64;
        let parts: Vec<Vec<Choice>> =
            options.iter().map(|options| options.iter().map(|(_, choice)| *choice).collect()).collect();
        let picks = choose(&parts, budget).ok_or_else(|| CompressError::Setting {
            setting: "share".to_owned(),
            reason: format!("{share} of {weights} weights cannot be met, not even with the lowest ranks"),
        })?;
        let ranks = spectra.keys().zip(picks).zip(&options).map(|((slot, pick), options)| (*slot, options[pick].0));
        Ok(ranks.filter(|(_, rank)| *rank > 0).collect())
    }

    /// Factors of one matrix, or why it stays whole. `rank` is that of a shared budget.
    fn make(
        &self,
        slot: MatrixSlot,
        values: &Mat<f64>,
        costs: &Costs,
        ranks: Option<&BTreeMap<MatrixSlot, usize>>,
    ) -> Result<Made, CompressError> {
        let (n_out, n_in) = (values.nrows(), values.ncols());
        let factorization = factorize(values, costs.rows.as_deref(), costs.columns.as_ref())
            .ok_or(CompressError::NotPositive { n: n_in })?;
        let rank = match ranks {
            Some(ranks) => match ranks.get(&slot) {
                Some(&rank) => rank,
                None => return Ok(Made::Refused(format!("{slot} stays whole: the budget is better spent elsewhere"))),
            },
            None => self.own_rank(&factorization),
        };
        if let Some(reason) = refusal(slot, rank, n_out, n_in) {
            return Ok(Made::Refused(reason));
        }
        Ok(Made::Factors { form: int8_factors(&factorization, rank, n_in), rank })
    }

    /// A linear layer on the walk: its factors go into the model, and the bias that belongs to them.
    fn on_the_walk(
        &self,
        model: &mut Weights,
        slot: LinearSlot,
        moments: &Moments,
        sensed: Option<&Sensitivities>,
        ranks: Option<&BTreeMap<MatrixSlot, usize>>,
    ) -> Result<Result<MatrixReport, String>, CompressError> {
        let start = model.dense(slot).clone();
        let n_in = start.n_in;
        let wanted = self.wanted(&start, moments)?;
        let costs = self.linear_costs(slot, Some(moments), sensed);
        let (form, rank) = match self.make(MatrixSlot::Linear(slot), &wanted, &costs, ranks)? {
            Made::Refused(reason) => return Ok(Err(reason)),
            Made::Factors { form, rank } => (form, rank),
        };
        let covariance = self.covariance(moments);
        // The plain decomposition at the same rank, to compare with.
        let plain = factorize(&wanted, None, None).ok_or(CompressError::NotPositive { n: n_in })?;
        let plain = to_mat(&plain.factors(rank).product(n_in), n_in);
        let stored = form.to_f32(n_in);
        let bias = corrected_bias(&stored, moments);
        model.store(MatrixSlot::Linear(slot), form);
        model.replace_bias(slot, bias);
        Ok(Ok(MatrixReport {
            weight_error: Some(relative_error(&start.weight, &stored)),
            error_before: Some(output_error(&wanted, &plain, &covariance)),
            error_after: Some(output_error(&wanted, &to_mat(&stored, n_in), &covariance)),
            ..model.report(MatrixSlot::Linear(slot))
        }))
    }

    fn wanted(&self, start: &DenseLinear, moments: &Moments) -> Result<Mat<f64>, CompressError> {
        let fitted = if self.refit { Some(fit(moments, start, 1.0, self.ridge)?.weight) } else { None };
        Ok(to_mat(fitted.as_ref().unwrap_or(&start.weight), start.n_in))
    }

    /// Spectra of all matrices in the metric, before anything is changed.
    fn spectra(
        &self,
        work: &Work<'_>,
        slots: &[MatrixSlot],
        sensed: Option<&Sensitivities>,
        progress: &dyn Progress,
    ) -> Result<Spectra, CompressError> {
        let mut spectra = BTreeMap::new();
        let mut add = |slot: MatrixSlot, values: &Mat<f64>, costs: &Costs| {
            let found = factorize(values, costs.rows.as_deref(), costs.columns.as_ref())
                .ok_or(CompressError::NotPositive { n: values.ncols() })?;
            spectra.insert(slot, (found, (values.nrows(), values.ncols())));
            Ok(())
        };
        progress.phase_started("measure spectra", slots.len() as u64);
        let mut model = work.model.clone();
        for &slot in slots {
            let (rows, cols) = model.shape(slot);
            let costs = match slot {
                MatrixSlot::Linear(_) if self.needs_walk() => continue,
                MatrixSlot::Linear(linear) => self.linear_costs(linear, None, sensed),
                _ => self.table_costs(work.text.as_deref(), rows, sensed),
            };
            add(slot, &to_mat(model.values(slot), cols), &costs)?;
            progress.advanced(1);
        }
        if self.needs_walk() && slots.iter().any(|slot| matches!(slot, MatrixSlot::Linear(_))) {
            let stops = |slot| slots.contains(&MatrixSlot::Linear(slot));
            let mut visit = |model: &mut Weights, slot: LinearSlot, moments: &Moments| {
                let costs = self.linear_costs(slot, Some(moments), sensed);
                let wanted = self.wanted(model.dense(slot), moments)?;
                add(MatrixSlot::Linear(slot), &wanted, &costs)
            };
            walk(&work.reference, &mut model, &*work.text()?, &stops, &mut visit, progress)?;
        }
        progress.phase_finished();
        Ok(spectra)
    }
}

/// Ranks that a budget chooses from are multiples of this.
fn rank_step(n_out: usize, n_in: usize) -> usize {
    (n_out.min(n_in) / 24).max(1)
}

fn roots(squares: &[f64]) -> Vec<f64> {
    let mean = squares.iter().sum::<f64>() / squares.len().max(1) as f64;
    // A row that nothing depends on must not vanish altogether: what is left of it would be anything.
    squares.iter().map(|square| square.max(mean * 1e-4).max(1e-30).sqrt()).collect()
}

/// How often each token occurs, counted from 1.
fn frequencies(text: &CalibrationText, n_rows: usize) -> Vec<f64> {
    let mut counts = vec![1.0; n_rows];
    for batch in &text.batches {
        for &id in (0..batch.n_seqs()).flat_map(|seq| batch.sequence(seq)) {
            counts[id as usize] += 1.0;
        }
    }
    counts
}

fn int8(values: &[f32], cols: usize) -> Box<Weight<'static>> {
    let (codes, scale) = quantize_rows_symmetric(values, cols);
    Box::new(Weight::Int8 { codes: codes.into(), scale: scale.into() })
}

fn int8_factors(factorization: &Factorization, rank: usize, n_in: usize) -> Weight<'static> {
    let factors = factorization.factors(rank);
    Weight::LowRank(Product { rank, down: int8(&factors.down, n_in), up: int8(&factors.up, rank) })
}

/// Why factors of this rank are no gain, in bytes or, for what is multiplied, in time.
fn refusal(slot: MatrixSlot, rank: usize, n_out: usize, n_in: usize) -> Option<String> {
    let whole = n_out * n_in;
    let thin = rank * (n_out + n_in);
    let (whole_bytes, thin_bytes) = (whole + 4 * n_out, thin + 4 * (n_out + rank));
    if thin_bytes >= whole_bytes {
        return Some(format!(
            "{slot} stays whole: at rank {rank} its factors take {thin_bytes} bytes, it takes {whole_bytes}"
        ));
    }
    let work = thin as f64 * OVERHEAD / whole as f64;
    if matches!(slot, MatrixSlot::Linear(_)) && work >= 1.0 {
        return Some(format!("{slot} stays whole: at rank {rank} its factors take {work:.2} times its time"));
    }
    None
}

impl CompressionPass for LowRank {
    fn stage(&self) -> Stage {
        Stage::Store
    }

    fn stores(&self) -> Option<Group> {
        Some(self.group)
    }

    fn needs_text(&self) -> bool {
        self.metric != Metric::Plain || (self.refit && self.group != Group::Embedding)
    }

    fn summary(&self) -> String {
        let thin = match (self.rank, self.energy, self.share) {
            (Some(rank), ..) => format!("rank {rank}"),
            (_, Some(energy), _) => format!("{energy} of the energy"),
            (.., share) => format!("{} of the weights", share.unwrap_or_default()),
        };
        let metric = match self.metric {
            Metric::Plain => "plain",
            Metric::Fisher => "weighted by sensitivity",
            Metric::Whitened => "whitened",
            Metric::WhitenedFisher => "whitened, weighted by sensitivity",
        };
        format!("{}: factors of {thin}, {metric}", self.group)
    }

    fn check(&self, architecture: &Architecture) -> Result<(), Refusal> {
        check_ridge(self.ridge)?;
        let given = [self.rank.is_some(), self.energy.is_some(), self.share.is_some()];
        if given.iter().filter(|&&given| given).count() != 1 {
            return Err(Refusal::new("", "give one of `rank`, `energy` and `share`"));
        }
        let in_range = |field, value: Option<f64>| match value {
            Some(value) if !(value > 0.0 && value < 1.0) => {
                Err(Refusal::new(field, format!("{value} is not between 0 and 1")))
            }
            _ => Ok(()),
        };
        in_range("energy", self.energy)?;
        in_range("share", self.share)?;
        if self.rank == Some(0) {
            return Err(Refusal::new("rank", "0 leaves nothing"));
        }
        let d_model = architecture.d_model;
        let word = (MatrixSlot::Word, (architecture.vocab_size, d_model));
        let linears = architecture.layers.iter().enumerate().flat_map(|(layer, config)| {
            linear_slots(layer).map(move |slot| (MatrixSlot::Linear(slot), slot.shape(config, d_model)))
        });
        let (mut all, mut least) = (0, 0);
        for (slot, (n_out, n_in)) in std::iter::once(word).chain(linears).filter(|(slot, _)| self.group.contains(*slot))
        {
            match self.rank {
                Some(rank) if rank > n_out.min(n_in) => {
                    return Err(Refusal::new("rank", format!("{rank} is above the matrix: {slot} is {n_out}x{n_in}")));
                }
                _ => {}
            }
            all += n_out * n_in;
            least += rank_step(n_out, n_in) * (n_out + n_in);
        }
        match self.share {
            Some(share) if share * (all as f64) < least as f64 => {
                let reason = format!("{share} cannot be met: the lowest ranks take {:.3}", least as f64 / all as f64);
                Err(Refusal::new("share", reason))
            }
            _ => Ok(()),
        }
    }

    fn run(&self, work: &mut Work<'_>, progress: &dyn Progress) -> Result<PassReport, CompressError> {
        let slots = self.slots(&work.model);
        let tables = self.group.contains(MatrixSlot::Word) && self.metric.columns();
        let sensed = match self.metric.rows() || tables {
            true => Some(sense(&work.reference, &*work.text()?, work.seed, progress)?),
            false => None,
        };
        let sensed = sensed.as_ref();
        let ranks = match self.share {
            Some(share) => Some(self.shared_ranks(share, &self.spectra(work, &slots, sensed, progress)?)?),
            None => None,
        };
        let ranks = ranks.as_ref();
        let (mut matrices, mut notes) = (Vec::new(), Vec::new());
        progress.phase_started("factorise", slots.len() as u64);
        for &slot in &slots {
            let (rows, cols) = work.model.shape(slot);
            let costs = match slot {
                MatrixSlot::Linear(_) if self.needs_walk() => continue,
                MatrixSlot::Linear(linear) => self.linear_costs(linear, None, sensed),
                _ => self.table_costs(work.text.as_deref(), rows, sensed),
            };
            let before = work.model.values(slot).to_vec();
            match self.make(slot, &to_mat(&before, cols), &costs, ranks)? {
                Made::Refused(reason) => notes.push(reason),
                Made::Factors { form, .. } => {
                    work.model.store(slot, form);
                    let weight_error = Some(relative_error(&before, work.model.values(slot)));
                    matrices.push(MatrixReport { weight_error, ..work.model.report(slot) });
                }
            }
            progress.advanced(1);
        }
        if self.needs_walk() && slots.iter().any(|slot| matches!(slot, MatrixSlot::Linear(_))) {
            let text = work.text()?;
            let stops = |slot| slots.contains(&MatrixSlot::Linear(slot));
            let mut visit = |model: &mut Weights, slot: LinearSlot, moments: &Moments| {
                match self.on_the_walk(model, slot, moments, sensed, ranks)? {
                    Ok(report) => matrices.push(report),
                    Err(reason) => notes.push(reason),
                }
                Ok(())
            };
            walk(&work.reference, &mut work.model, &text, &stops, &mut visit, progress)?;
        }
        progress.phase_finished();
        if matrices.is_empty() {
            notes.push("no matrix is smaller and faster as a product: nothing was changed".to_owned());
        }
        Ok(PassReport { matrices, notes, ..PassReport::default() })
    }
}
