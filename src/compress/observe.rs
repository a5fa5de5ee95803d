//! Players that look at a forward of the score from inside.

use candle_core::{Tensor, Var};

use crate::exec::candle::{CandleBuild, CandleF32, CandleLinear, CandleNorm, CandleTables, WeightSource, activate};
use crate::model::{
    Activation, Architecture, AttentionSpec, Build, Encoder, LinearSlot, ModelError, NormSlot, Ops, Pooling, Ragged,
    RaggedBatch,
};

/// One residual branch of one layer as it was played: `out = LayerNorm(residual + input Wᵀ + b)`.
#[derive(Debug, Clone)]
pub(super) struct Branch {
    /// Input of the branch's output matrix, `[n_tokens, n_in]`.
    pub(super) input: Tensor,
    /// `input Wᵀ + b`, `[n_tokens, d_model]`.
    pub(super) output: Tensor,
    /// What the branch is added to, `[n_tokens, d_model]`.
    pub(super) residual: Tensor,
}

/// A linear layer that leads into attention or an activation, as it was played.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// `[n_tokens, d_model]`.
    pub(super) input: Tensor,
    /// `input Wᵀ + b`, `[n_tokens, n_out]`, before any activation.
    pub(super) output: Tensor,
}

/// The f32 player with an ear on the residual branches.
#[derive(Debug, Default)]
pub(super) struct Listening {
    /// Where a layer's forward starts from instead of embeddings.
    resume: Option<Tensor>,
    /// Branches in the order they were played: attention, FFN, attention, …
    pub(super) branches: Vec<Branch>,
    /// Whether the linear layers within the branches are kept as well.
    entering: bool,
    /// These layers in the order they were played: queries, keys and values, FFN, …
    pub(super) entries: Vec<Entry>,
    /// Whether a zero variable is added to every branch's output, so that a gradient arrives there.
    probing: bool,
    /// These variables, in the order of `branches`.
    pub(super) probes: Vec<Var>,
}

/// `output` plus a variable of zeros.
fn probed(output: &Tensor) -> candle_core::Result<(Tensor, Var)> {
    let probe = Var::zeros(output.shape(), output.dtype(), output.device())?;
    Ok(((output + probe.as_tensor())?, probe))
}

impl Listening {
    /// A player whose branches' outputs can be asked for gradients.
    pub(super) fn probing() -> Self {
        Self { probing: true, ..Self::default() }
    }

    /// A player that keeps the inputs of all linear layers.
    pub(super) fn entering() -> Self {
        Self { entering: true, ..Self::default() }
    }
}

impl Ops for Listening {
    type Act = Tensor;
    type Tables = Option<CandleTables>;
    type Linear = CandleLinear;
    type Norm = CandleNorm;

    fn embed(
        &mut self,
        tables: &Option<CandleTables>,
        norm: &CandleNorm,
        batch: &Ragged<'_>,
    ) -> Result<Tensor, ModelError> {
        match (self.resume.take(), tables) {
            (Some(rows), _) => Ok(rows),
            (None, Some(tables)) => CandleF32.embed(tables, norm, batch),
            (None, None) => unreachable!("LayerAlone::play gives rows to a layer without tables"),
        }
    }

    fn linear(&mut self, linear: &CandleLinear, x: &Tensor, then: Activation) -> Result<Tensor, ModelError> {
        if !self.entering {
            return CandleF32.linear(linear, x, then);
        }
        let mut play = || -> candle_core::Result<Tensor> {
            let output = linear.apply(x)?;
            self.entries.push(Entry { input: x.detach(), output: output.detach() });
            activate(output, then)
        };
        play().map_err(ModelError::player)
    }

    fn attend(&mut self, qkv: Tensor, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        CandleF32.attend(qkv, spec, batch)
    }

    fn linear_add_norm(
        &mut self,
        linear: &CandleLinear,
        x: Tensor,
        residual: Tensor,
        norm: &CandleNorm,
    ) -> Result<Tensor, ModelError> {
        let mut play = || -> candle_core::Result<Tensor> {
            let mut output = linear.apply(&x)?;
            self.branches.push(Branch { input: x.detach(), output: output.detach(), residual: residual.detach() });
            if self.probing {
                let (sum, probe) = probed(&output)?;
                output = sum;
                self.probes.push(probe);
            }
            norm.apply(&(output + &residual)?)
        };
        play().map_err(ModelError::player)
    }

    fn pool(&mut self, x: &Tensor, pooling: Pooling, batch: &Ragged<'_>) -> Result<Tensor, ModelError> {
        CandleF32.pool(x, pooling, batch)
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<(), ModelError> {
        CandleF32.read(x, out)
    }
}

/// Handles of the f32 player for [`Listening`]; with `only_layer`, those of one layer under the slots of layer 0.
struct ListeningBuild<'a> {
    inner: CandleBuild<'a>,
    only_layer: Option<usize>,
}

impl Build<Listening> for ListeningBuild<'_> {
    fn tables(&mut self) -> Result<Option<CandleTables>, ModelError> {
        match self.only_layer {
            Some(_) => Ok(None),
            None => Build::<CandleF32>::tables(&mut self.inner).map(Some),
        }
    }

    fn norm(&mut self, slot: NormSlot) -> Result<CandleNorm, ModelError> {
        let slot = match (slot, self.only_layer) {
            (NormSlot::Attention(_), Some(layer)) => NormSlot::Attention(layer),
            (NormSlot::Ffn(_), Some(layer)) => NormSlot::Ffn(layer),
            (slot, _) => slot,
        };
        Build::<CandleF32>::norm(&mut self.inner, slot)
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<CandleLinear, ModelError> {
        let slot = match (slot, self.only_layer) {
            (LinearSlot::Qkv(_), Some(layer)) => LinearSlot::Qkv(layer),
            (LinearSlot::AttentionOut(_), Some(layer)) => LinearSlot::AttentionOut(layer),
            (LinearSlot::FfnUp(_), Some(layer)) => LinearSlot::FfnUp(layer),
            (LinearSlot::FfnDown(_), Some(layer)) => LinearSlot::FfnDown(layer),
            (slot, None) => slot,
        };
        Build::<CandleF32>::linear(&mut self.inner, slot)
    }
}

/// The whole encoder for a listening player.
pub(super) fn listening_encoder(source: &dyn WeightSource) -> Result<Encoder<Listening>, ModelError> {
    let mut build = ListeningBuild { inner: CandleBuild::new(source), only_layer: None };
    Encoder::build(source.architecture(), &mut build)
}

/// One layer, played from given rows: the score of a one-layer model whose embedding is those rows.
pub(super) struct LayerAlone {
    encoder: Encoder<Listening>,
}

/// What playing one layer shows.
pub(super) struct LayerTrace {
    pub(super) qkv: Entry,
    pub(super) attention: Branch,
    pub(super) up: Entry,
    pub(super) ffn: Branch,
    /// Rows after the layer.
    pub(super) out: Tensor,
}

impl LayerAlone {
    pub(super) fn new(source: &dyn WeightSource, layer: usize) -> Result<Self, ModelError> {
        let mut spec = source.architecture().spec();
        spec.layers = vec![spec.layers[layer]];
        let mut build = ListeningBuild { inner: CandleBuild::new(source), only_layer: Some(layer) };
        Ok(Self { encoder: Encoder::build(&Architecture::new(spec)?, &mut build)? })
    }

    pub(super) fn play(&self, rows: &Tensor, batch: &Ragged<'_>) -> Result<LayerTrace, ModelError> {
        let mut player = Listening { resume: Some(rows.clone()), ..Listening::entering() };
        let out = self.encoder.forward(&mut player, batch)?;
        let [attention, ffn]: [Branch; 2] =
            player.branches.try_into().expect("the score of a layer has two residual branches");
        let [qkv, up]: [Entry; 2] = player.entries.try_into().expect("each branch has one linear layer within");
        Ok(LayerTrace { qkv, attention, up, ffn, out })
    }
}

/// Rows after the embedding, batch by batch.
pub(super) fn embedded(source: &dyn WeightSource, batches: &[RaggedBatch]) -> Result<Vec<Tensor>, ModelError> {
    let mut build = CandleBuild::new(source);
    let tables = Build::<CandleF32>::tables(&mut build)?;
    let norm = Build::<CandleF32>::norm(&mut build, NormSlot::Embedding)?;
    batches.iter().map(|batch| CandleF32.embed(&tables, &norm, &batch.view(0..batch.n_seqs()))).collect()
}
