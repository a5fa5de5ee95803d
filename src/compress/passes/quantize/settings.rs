//! What a `quantize` pass can be told.

use serde::{Deserialize, Serialize};

use super::super::Refusal;
use crate::compress::rounding::RangeMethod;
use crate::compress::slots::{Group, MatrixSlot};
use crate::model::Architecture;

/// What the levels of a stored number are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Evenly spaced.
    #[default]
    Linear,
    /// Powers of two.
    Log2,
    /// Sums of two powers of two.
    Log2Sum,
    /// 16 values learnt from the matrix.
    Kmeans,
    /// 16 quantiles of a normal distribution.
    Nf4,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Per {
    /// The whole matrix.
    Tensor,
    /// An output channel, or a row of a table.
    #[default]
    Channel,
    /// A run of `group_size` neighbours within a channel.
    Group,
}

/// What an error costs while scales and tables are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// The same everywhere.
    #[default]
    None,
    /// As much as its input varies on the calibration text.
    Inputs,
    /// As much as its output moves the sentence embedding (squared gradients), and for linear layers on the walk of
    /// `compensate` as much as its input varies besides.
    Fisher,
}

/// Whether rounding makes up for its errors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compensate {
    /// Every number is rounded to the nearest.
    #[default]
    None,
    /// Errors are made up for within a row (GPTQ), by what the inputs of linear layers show on the calibration text, and for
    /// tables by what the sentence embedding feels of them.
    Gptq,
}

/// Stores the matrices of a group in few bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quantize {
    /// Which matrices.
    pub group: Group,
    /// The levels.
    pub format: Format,
    /// Bits of an element: 8 (linear only) or 4.
    pub bits: u8,
    /// What shares a scale.
    pub per: Per,
    /// Elements that share a scale with `per = "group"`.
    pub group_size: usize,
    /// Whether levels lie around 0, or have an offset (linear only).
    pub symmetric: bool,
    /// How ranges are found (default: `min-max` for 8 bits, `mse` for 4).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<RangeMethod>,
    /// Share of the magnitudes that `range = "percentile"` covers.
    pub percentile: f64,
    /// What an error costs.
    pub weighting: Weighting,
    /// Whether rounding makes up for its errors.
    pub compensate: Compensate,
    /// Added to the metric of `compensate`, relative to its mean diagonal.
    pub ridge: f64,
    /// Whether `compensate` aims at the weights that fit the reference's outputs best on the inputs as they are now,
    /// instead of at the weights themselves: errors of earlier layers are made up for too.
    pub refit: bool,
    /// Pull of `refit` to the weights themselves, relative to the mean variance of the inputs.
    pub refit_ridge: f64,
    /// Rounds of coordinate descent after `compensate`.
    pub sweeps: usize,
    /// Largest code of 4-bit tables. Up to 32, then up to 64, integer products are fastest on processors that add pairs
    /// of products in 16 bits (AVX2).
    pub table_reach: i8,
}

impl Default for Quantize {
    fn default() -> Self {
        Self {
            group: Group::All,
            format: Format::Linear,
            bits: 8,
            per: Per::Channel,
            group_size: 64,
            symmetric: true,
            range: None,
            percentile: 0.999,
            weighting: Weighting::None,
            compensate: Compensate::None,
            ridge: 0.01,
            refit: false,
            refit_ridge: 0.01,
            sweeps: 4,
            table_reach: 64,
        }
    }
}

impl Quantize {
    /// How ranges are found.
    #[must_use]
    pub fn range(&self) -> RangeMethod {
        self.range.unwrap_or(if self.bits == 8 { RangeMethod::MinMax } else { RangeMethod::Mse })
    }

    pub(super) fn describe(&self) -> String {
        let format = match (self.format, self.bits) {
            (Format::Linear, 8) => "INT8",
            (Format::Linear, _) => "4-bit linear",
            (Format::Log2, _) => "4-bit powers of two",
            (Format::Log2Sum, _) => "4-bit sums of two powers of two",
            (Format::Kmeans, _) => "4-bit k-means",
            (Format::Nf4, _) => "NF4",
        };
        let per = match self.per {
            Per::Tensor => "a scale per matrix".to_owned(),
            Per::Channel => "a scale per row".to_owned(),
            Per::Group => format!("a scale per {} elements", self.group_size),
        };
        let mut text = format!("{}: {format}, {per}", self.group);
        if !self.symmetric {
            text += ", with offsets";
        }
        if self.weighting != Weighting::None {
            text += ", weighted by sensitivity";
        }
        if self.compensate == Compensate::Gptq {
            text += ", errors compensated";
        }
        text
    }

    pub(super) fn refuse(&self, architecture: &Architecture) -> Result<(), Refusal> {
        let positive = |field, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Refusal::new(field, format!("{value} is not a number above 0"))),
        };
        match (self.bits, self.format) {
            (8, Format::Linear) | (4, _) => {}
            (8, _) => return Err(Refusal::new("bits", "8 bits are linear; the other formats have 4")),
            (bits, _) => return Err(Refusal::new("bits", format!("{bits} is neither 8 nor 4"))),
        }
        if self.per == Per::Group {
            let narrowest = architecture.layers.iter().flat_map(|layer| [layer.d_context(), layer.d_ffn]);
            let narrowest = narrowest.chain([architecture.d_model]).min().unwrap_or(0);
            if !(8..=narrowest).contains(&self.group_size) {
                let reason = format!("{} is not in 8..={narrowest}, the narrowest matrix", self.group_size);
                return Err(Refusal::new("group_size", reason));
            }
        }
        if !self.symmetric && self.format != Format::Linear {
            return Err(Refusal::new("symmetric", "only linear levels can have an offset"));
        }
        if self.format == Format::Kmeans && self.range() != RangeMethod::Mse {
            return Err(Refusal::new("range", "k-means finds its scales by mse"));
        }
        self.refuse_idle_settings()?;
        if self.compensate == Compensate::Gptq && self.per == Per::Tensor {
            return Err(Refusal::new("compensate", "gptq needs a scale per channel or group"));
        }
        if self.refit && self.compensate == Compensate::None {
            return Err(Refusal::new("refit", "is a setting of compensate = \"gptq\""));
        }
        if !(0.5..=1.0).contains(&self.percentile) {
            return Err(Refusal::new("percentile", format!("{} is not in 0.5..=1", self.percentile)));
        }
        if !(16..=127).contains(&self.table_reach) {
            return Err(Refusal::new("table_reach", format!("{} is not in 16..=127", self.table_reach)));
        }
        if self.sweeps > 100 {
            return Err(Refusal::new("sweeps", format!("{} is not in 0..=100", self.sweeps)));
        }
        positive("ridge", self.ridge)?;
        positive("refit_ridge", self.refit_ridge)
    }

    /// Refuses what would be measured and then change nothing.
    fn refuse_idle_settings(&self) -> Result<(), Refusal> {
        if self.weighting != Weighting::None {
            if self.range() != RangeMethod::Mse {
                return Err(Refusal::new("weighting", "weighs errors, which only range = \"mse\" looks at"));
            }
            if !self.symmetric {
                return Err(Refusal::new("weighting", "levels with an offset are found without weights"));
            }
        }
        // A factor for a whole row of a linear layer moves neither its range nor its codes; a table is shared by all rows.
        let tables_learnt = self.format == Format::Kmeans;
        if self.weighting == Weighting::Fisher && !tables_learnt && !self.group.contains(MatrixSlot::Word) {
            let reason =
                "fisher weighs the rows of linear layers, which only a table that they share (k-means) can heed";
            return Err(Refusal::new("weighting", reason));
        }
        self.refuse_settings_of_others()
    }

    /// Refuses settings of a choice that is not made. What has its default may stand: recipes that artefacts carry spell out all.
    fn refuse_settings_of_others(&self) -> Result<(), Refusal> {
        let default = Self::default();
        let compensated = self.compensate != Compensate::None;
        // The ridge is in the metric that weighs errors too.
        let with_metric = compensated || self.weighting != Weighting::None;
        let settings = [
            (
                "table_reach",
                self.table_reach != default.table_reach,
                self.format == Format::Kmeans,
                "format = \"kmeans\"",
            ),
            (
                "percentile",
                self.percentile != default.percentile,
                self.range() == RangeMethod::Percentile,
                "range = \"percentile\"",
            ),
            ("group_size", self.group_size != default.group_size, self.per == Per::Group, "per = \"group\""),
            ("sweeps", self.sweeps != default.sweeps, compensated, "compensate = \"gptq\""),
            ("ridge", self.ridge != default.ridge, with_metric, "compensate = \"gptq\" or of weighting"),
            ("refit_ridge", self.refit_ridge != default.refit_ridge, self.refit, "refit = true"),
        ];
        match settings.into_iter().find(|(_, is_set, is_used, _)| *is_set && !is_used) {
            Some((field, .., choice)) => Err(Refusal::new(field, format!("is a setting of {choice}"))),
            None if self.refit && self.group == Group::Embedding => {
                Err(Refusal::new("refit", "fits linear layers to their inputs; embedding tables have none"))
            }
            None => Ok(()),
        }
    }
}
