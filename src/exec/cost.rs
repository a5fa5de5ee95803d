//! A player that computes nothing and counts what the others compute.

use super::candle::WeightSource;
use crate::model::{
    Activation, Architecture, AttentionSpec, Build, Encoder, LayerConfig, LinearSlot, ModelError, NormSlot, Ops,
    Pooling, Ragged, RaggedBatch,
};

/// The operations of a forward that cost something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// Gathering and adding embedding rows.
    Embed,
    /// A matrix product.
    Linear(LinearSlot),
    /// `Q Kᵀ` and `P V` of a layer, over the pairs in the band.
    Attention(usize),
}

/// Cost of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Which operation.
    pub operation: Operation,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Weight elements read at least once (embedding: elements of the rows gathered).
    pub weights: u64,
    /// Bytes of these weights as they are stored; as INT8 where no stored form is known.
    pub weight_bytes: u64,
    /// Activation elements written.
    pub activations: u64,
}

/// Counts the operations of one forward over sequences of the given lengths.
///
/// ```text
/// linear:     n_tokens · n_out · n_in
/// attention:  2 · n_heads · d_head · Σ_sequences n_pairs(band, len)
/// ```
///
/// # Errors
/// [`ModelError::EmptySequence`] for a length of 0.
pub fn forward_costs(architecture: &Architecture, lens: &[usize]) -> Result<Vec<Cost>, ModelError> {
    costs(&mut Shapes { architecture, source: None }, lens)
}

/// The same for weights as `source` stores them: a low rank counts its two products, absent blocks count nothing, absent
/// single elements count as if they were there, because they are multiplied with all the same.
///
/// # Errors
/// [`ModelError::EmptySequence`] for a length of 0, or if a weight cannot be read.
pub fn stored_costs(source: &dyn WeightSource, lens: &[usize]) -> Result<Vec<Cost>, ModelError> {
    costs(&mut Shapes { architecture: source.architecture(), source: Some(source) }, lens)
}

fn costs(shapes: &mut Shapes<'_>, lens: &[usize]) -> Result<Vec<Cost>, ModelError> {
    let mut batch = RaggedBatch::new();
    for &len in lens {
        batch.push(&vec![0; len])?;
    }
    let architecture = shapes.architecture;
    let mut player = Counting { d_model: architecture.d_model, costs: Vec::new() };
    let encoder = Encoder::build(architecture, shapes)?;
    encoder.forward(&mut player, &batch.view(0..batch.n_seqs()))?;
    Ok(player.costs)
}

/// Multiply-accumulates per token of the encoder's matrix products: the part of the work that does not depend on the
/// length of the input.
#[must_use]
pub fn linear_macs_per_token(layers: &[LayerConfig], d_model: usize) -> u64 {
    layers
        .iter()
        .enumerate()
        .flat_map(|(layer, config)| {
            [
                LinearSlot::Qkv(layer),
                LinearSlot::AttentionOut(layer),
                LinearSlot::FfnUp(layer),
                LinearSlot::FfnDown(layer),
            ]
            .map(|slot| slot.shape(config, d_model))
        })
        .map(|(n_out, n_in)| n_out as u64 * n_in as u64)
        .sum()
}

struct Counting {
    d_model: usize,
    costs: Vec<Cost>,
}

/// Rows and columns of an activation.
struct Extent {
    rows: u64,
    cols: usize,
}

struct LinearShape {
    slot: LinearSlot,
    n_out: usize,
    n_in: usize,
    /// Per token.
    macs: u64,
    bytes: u64,
}

/// What the embedding sums of one token read.
struct TableShape {
    bytes: u64,
}

struct Shapes<'a> {
    architecture: &'a Architecture,
    source: Option<&'a dyn WeightSource>,
}

impl Build<Counting> for Shapes<'_> {
    fn tables(&mut self) -> Result<TableShape, ModelError> {
        let width = self.architecture.d_model;
        let Some(source) = self.source else { return Ok(TableShape { bytes: width as u64 }) };
        let word = source.tables().map_err(ModelError::player)?.word;
        Ok(TableShape { bytes: word.n_bytes() as u64 / word.n_rows(width).max(1) as u64 })
    }

    fn norm(&mut self, _slot: NormSlot) -> Result<(), ModelError> {
        Ok(())
    }

    fn linear(&mut self, slot: LinearSlot) -> Result<LinearShape, ModelError> {
        let (n_out, n_in) = slot.shape(&self.architecture.layers[slot.layer()], self.architecture.d_model);
        let elements = n_out as u64 * n_in as u64;
        let (macs, bytes) = match self.source {
            None => (elements, elements),
            Some(source) => {
                let weight = source.linear(slot).map_err(ModelError::player)?.weight;
                (weight.macs(n_out, n_in), weight.n_bytes() as u64)
            }
        };
        Ok(LinearShape { slot, n_out, n_in, macs, bytes })
    }
}

impl Ops for Counting {
    type Act = Extent;
    type Tables = TableShape;
    type Linear = LinearShape;
    type Norm = ();

    fn embed(&mut self, tables: &TableShape, _norm: &(), batch: &Ragged<'_>) -> Result<Extent, ModelError> {
        let elements = batch.n_tokens() as u64 * self.d_model as u64;
        self.costs.push(Cost {
            operation: Operation::Embed,
            macs: 0,
            weights: elements,
            weight_bytes: batch.n_tokens() as u64 * tables.bytes,
            activations: elements,
        });
        Ok(Extent { rows: batch.n_tokens() as u64, cols: self.d_model })
    }

    fn linear(&mut self, linear: &LinearShape, x: &Extent, _then: Activation) -> Result<Extent, ModelError> {
        debug_assert_eq!(x.cols, linear.n_in, "{}", linear.slot);
        let weights = linear.n_out as u64 * linear.n_in as u64;
        self.costs.push(Cost {
            operation: Operation::Linear(linear.slot),
            macs: x.rows * linear.macs,
            weights,
            weight_bytes: linear.bytes,
            activations: x.rows * linear.n_out as u64,
        });
        Ok(Extent { rows: x.rows, cols: linear.n_out })
    }

    fn attend(&mut self, qkv: Extent, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Extent, ModelError> {
        let width = spec.n_heads * spec.d_head;
        let pairs: u64 = batch.sequences().map(|rows| spec.band.n_pairs(rows.len())).sum();
        self.costs.push(Cost {
            operation: Operation::Attention(spec.layer),
            macs: 2 * width as u64 * pairs,
            weights: 0,
            weight_bytes: 0,
            activations: qkv.rows * width as u64,
        });
        Ok(Extent { rows: qkv.rows, cols: width })
    }

    fn linear_add_norm(
        &mut self,
        linear: &LinearShape,
        x: Extent,
        _residual: Extent,
        _norm: &(),
    ) -> Result<Extent, ModelError> {
        self.linear(linear, &x, Activation::Identity)
    }

    fn pool(&mut self, x: &Extent, _pooling: Pooling, batch: &Ragged<'_>) -> Result<Extent, ModelError> {
        Ok(Extent { rows: batch.n_seqs() as u64, cols: x.cols })
    }

    fn read(&mut self, _x: &Extent, _out: &mut Vec<f32>) -> Result<(), ModelError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ArchitectureSpec, Band, Family, Positions};

    #[test]
    fn counts_products_and_the_pairs_of_the_band() {
        let full = LayerConfig { n_heads: 12, d_head: 32, d_ffn: 1536, band: Band::FULL };
        let pruned = LayerConfig { n_heads: 8, d_head: 32, d_ffn: 768, band: Band::symmetric(1, 0) };
        let architecture = Architecture::new(ArchitectureSpec {
            ranges: Vec::new(),
            family: Family::Bert,
            vocab_size: 100,
            n_token_types: 2,
            positions: Positions { table_len: 512, offset: 0, tiled: false },
            d_model: 384,
            norm_eps: 1e-12,
            activation: Activation::Gelu,
            layers: vec![full, pruned],
            pooling: Pooling::Mean,
            normalize: true,
            max_input_tokens: 512,
            head: None,
        })
        .unwrap();
        let costs = forward_costs(&architecture, &[10, 3]).unwrap();
        let of = |operation| costs.iter().find(|cost| cost.operation == operation).unwrap();
        assert_eq!(of(Operation::Attention(0)).macs, 2 * 384 * (100 + 9));
        assert_eq!(of(Operation::Attention(1)).macs, 2 * 256 * ((10 + 9 * 2) + (3 + 2 * 2)));
        assert_eq!(of(Operation::Linear(LinearSlot::FfnDown(1))).macs, 13 * 768 * 384);
        let products: u64 =
            costs.iter().filter(|cost| matches!(cost.operation, Operation::Linear(_))).map(|cost| cost.macs).sum();
        assert_eq!(products, 13 * linear_macs_per_token(&architecture.layers, 384));
        assert_eq!(linear_macs_per_token(&[full], 384), 4 * 384 * 384 + 2 * 384 * 1536);
        assert!(forward_costs(&architecture, &[0]).is_err());
    }
}
