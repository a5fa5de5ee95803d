//! One walk through a model that is changed on the way: each linear layer meets the inputs that the model as changed so
//! far feeds it, and the outputs that the reference model gave there.

use candle_core::Tensor;

use super::CompressError;
use super::calibration::CalibrationText;
use super::moments::Moments;
use super::progress::Progress;
use super::weights::Weights;
use crate::exec::candle::{CandleBuild, CandleF32, CandleLinear, CandleNorm, CandleTables, WeightSource, activate};
use crate::model::{
    Activation, AttentionSpec, Build, Encoder, LinearSlot, ModelError, NormSlot, Ops, Pooling, Ragged, RaggedBatch,
};

/// What is done where: gets the model, the linear layer, and the moments of its inputs `x` and of what its output should
/// be, `y`. For output matrices `y` is what brings the residual stream back to the reference's.
pub(super) type Visit<'a> = dyn FnMut(&mut Weights, LinearSlot, &Moments) -> Result<(), CompressError> + 'a;

/// Walks through `model` beside `reference`, which must be of the same shape, and stops at the linear layers that
/// `stops` accepts. The activations of the whole text are held at once: about 25 kB a token for widths of 384 and 1,536.
///
/// # Errors
/// If a player or the visitor fails.
pub(super) fn walk(
    reference: &Weights,
    model: &mut Weights,
    text: &CalibrationText,
    stops: &dyn Fn(LinearSlot) -> bool,
    visit: &mut Visit<'_>,
    progress: &dyn Progress,
) -> Result<(), CompressError> {
    let Some(first) = text.batches.first() else { return Ok(()) };
    let encoder = Encoder::build(reference.architecture(), &mut PairBuild { reference, model })?;
    let mut walker = Walker { batches: &text.batches, model, stops, visit, progress };
    // The walker plays every batch at each verb; the one given here only sets the score going.
    match encoder.forward(&mut walker, &first.view(0..first.n_seqs())) {
        Ok(_) => Ok(()),
        Err(ModelError::Player(error)) => match error.downcast::<CompressError>() {
            Ok(error) => Err(*error),
            Err(error) => Err(ModelError::Player(error).into()),
        },
        Err(error) => Err(error.into()),
    }
}

struct Walker<'a> {
    batches: &'a [RaggedBatch],
    model: &'a mut Weights,
    stops: &'a dyn Fn(LinearSlot) -> bool,
    visit: &'a mut Visit<'a>,
    progress: &'a dyn Progress,
}

/// Activations of every batch, in both models.
struct Pair<T> {
    reference: T,
    model: T,
}

type Acts = Pair<Vec<Tensor>>;

struct PairBuild<'a> {
    reference: &'a Weights,
    model: &'a Weights,
}

fn build<'a>(source: &'a dyn WeightSource) -> impl Build<CandleF32> + 'a {
    CandleBuild::new(source)
}

impl<'w> Build<Walker<'w>> for PairBuild<'_> {
    fn tables(&mut self) -> Result<Pair<CandleTables>, ModelError> {
        Ok(Pair { reference: build(self.reference).tables()?, model: build(self.model).tables()? })
    }

    fn norm(&mut self, slot: NormSlot) -> Result<Pair<CandleNorm>, ModelError> {
        Ok(Pair { reference: build(self.reference).norm(slot)?, model: build(self.model).norm(slot)? })
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<CandleLinear, ModelError> {
        // The model's is built when the walk comes by: it may change until then.
        build(self.reference).linear(slot)
    }
}

fn each<'a>(
    tensors: impl IntoIterator<Item = &'a Tensor>,
    f: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Vec<Tensor>, ModelError> {
    tensors.into_iter().map(f).collect::<Result<_, _>>().map_err(ModelError::player)
}

impl Walker<'_> {
    /// Stops at `slot` with inputs `x` and wanted outputs `y`, and gives the layer as it is afterwards.
    fn stop(&mut self, slot: LinearSlot, x: &[Tensor], y: &[Tensor]) -> Result<CandleLinear, ModelError> {
        if (self.stops)(slot) {
            let linear = self.model.dense(slot);
            let mut moments = Moments::new(linear.n_in, linear.n_out);
            for (x, y) in x.iter().zip(y) {
                moments.add(x, y).map_err(ModelError::player)?;
            }
            (self.visit)(self.model, slot, &moments).map_err(ModelError::player)?;
            self.progress.advanced(1);
        }
        build(self.model).linear(slot)
    }
}

impl Ops for Walker<'_> {
    type Act = Acts;
    type Tables = Pair<CandleTables>;
    type Linear = CandleLinear;
    type Norm = Pair<CandleNorm>;

    fn embed(
        &mut self,
        tables: &Pair<CandleTables>,
        norm: &Pair<CandleNorm>,
        _batch: &Ragged<'_>,
    ) -> Result<Acts, ModelError> {
        let batches = self.batches;
        let all = |tables: &CandleTables, norm: &CandleNorm| {
            let rows = batches.iter().map(|batch| CandleF32.embed(tables, norm, &batch.view(0..batch.n_seqs())));
            rows.collect::<Result<Vec<_>, _>>()
        };
        Ok(Pair { reference: all(&tables.reference, &norm.reference)?, model: all(&tables.model, &norm.model)? })
    }

    fn linear(&mut self, linear: &CandleLinear, x: &Acts, then: Activation) -> Result<Acts, ModelError> {
        let wanted = each(&x.reference, |x| linear.apply(x))?;
        let now = self.stop(linear.slot, &x.model, &wanted)?;
        let model = each(&x.model, |x| now.apply(x).and_then(|y| activate(y, then)))?;
        Ok(Pair { reference: each(&wanted, |y| activate(y.clone(), then))?, model })
    }

    fn attend(&mut self, qkv: Acts, spec: &AttentionSpec, _batch: &Ragged<'_>) -> Result<Acts, ModelError> {
        let batches = self.batches;
        let all = |qkv: Vec<Tensor>| {
            qkv.into_iter()
                .zip(batches)
                .map(|(qkv, batch)| CandleF32.attend(qkv, spec, &batch.view(0..batch.n_seqs())))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Pair { reference: all(qkv.reference)?, model: all(qkv.model)? })
    }

    fn linear_add_norm(
        &mut self,
        linear: &CandleLinear,
        x: Acts,
        residual: Acts,
        norm: &Pair<CandleNorm>,
    ) -> Result<Acts, ModelError> {
        let streams = x.reference.iter().zip(&residual.reference).map(|(x, residual)| linear.apply(x)? + residual);
        let streams: Vec<Tensor> = streams.collect::<candle_core::Result<_>>().map_err(ModelError::player)?;
        let wanted = streams.iter().zip(&residual.model).map(|(stream, residual)| stream - residual);
        let wanted: Vec<Tensor> = wanted.collect::<candle_core::Result<_>>().map_err(ModelError::player)?;
        let now = self.stop(linear.slot, &x.model, &wanted)?;
        let model =
            x.model.iter().zip(&residual.model).map(|(x, residual)| norm.model.apply(&(now.apply(x)? + residual)?));
        let model = model.collect::<candle_core::Result<_>>().map_err(ModelError::player)?;
        Ok(Pair { reference: each(&streams, |stream| norm.reference.apply(stream))?, model })
    }

    fn pool(&mut self, _x: &Acts, _pooling: Pooling, _batch: &Ragged<'_>) -> Result<Acts, ModelError> {
        unreachable!("a walk ends with the last layer")
    }

    fn read(&mut self, _x: &Acts, _out: &mut Vec<f32>) -> Result<(), ModelError> {
        unreachable!("a walk ends with the last layer")
    }
}
