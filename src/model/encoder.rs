//! The forward pass: the only place in the project where the order of a layer's operations stands.

use super::{Activation, Architecture, AttentionSpec, Build, LinearSlot, ModelError, NormSlot, Ops, Ragged};

/// A stack of post-norm encoder layers over summed embeddings.
pub struct Encoder<O: Ops> {
    tables: O::Tables,
    embedding_norm: O::Norm,
    layers: Vec<EncoderLayer<O>>,
}

/// One layer's weights.
pub struct EncoderLayer<O: Ops> {
    attention: AttentionSpec,
    activation: Activation,
    qkv: O::Linear,
    attention_out: O::Linear,
    attention_norm: O::Norm,
    ffn_up: O::Linear,
    ffn_down: O::Linear,
    ffn_norm: O::Norm,
}

impl<O: Ops> std::fmt::Debug for Encoder<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("n_layers", &self.layers.len()).finish_non_exhaustive()
    }
}

impl<O: Ops> std::fmt::Debug for EncoderLayer<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncoderLayer").field("attention", &self.attention).finish_non_exhaustive()
    }
}

impl<O: Ops> Encoder<O> {
    /// Takes every handle of `architecture` from `build`.
    ///
    /// # Errors
    /// If a weight is missing or does not fit.
    pub fn build(architecture: &Architecture, build: &mut impl Build<O>) -> Result<Self, ModelError> {
        let tables = build.tables()?;
        let embedding_norm = build.norm(NormSlot::Embedding)?;
        let layers = (0..architecture.layers.len())
            .map(|layer| {
                Ok(EncoderLayer {
                    attention: AttentionSpec::new(layer, &architecture.layers[layer]),
                    activation: architecture.activation,
                    qkv: build.linear(LinearSlot::Qkv(layer))?,
                    attention_out: build.linear(LinearSlot::AttentionOut(layer))?,
                    attention_norm: build.norm(NormSlot::Attention(layer))?,
                    ffn_up: build.linear(LinearSlot::FfnUp(layer))?,
                    ffn_down: build.linear(LinearSlot::FfnDown(layer))?,
                    ffn_norm: build.norm(NormSlot::Ffn(layer))?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self { tables, embedding_norm, layers })
    }

    /// Token rows after the last layer: `[n_tokens, d_model]`.
    ///
    /// # Errors
    /// If an input is out of range or the player fails.
    pub fn forward(&self, ops: &mut O, batch: &Ragged<'_>) -> Result<O::Act, ModelError> {
        let mut x = ops.embed(&self.tables, &self.embedding_norm, batch)?;
        for layer in &self.layers {
            x = layer.forward(ops, x, batch)?;
        }
        Ok(x)
    }

    /// The rows after the embedding and after each layer are handed to `visit` in order (index 0 = embedding).
    ///
    /// # Errors
    /// If an input is out of range, the player fails or `visit` does.
    pub fn forward_visiting(
        &self,
        ops: &mut O,
        batch: &Ragged<'_>,
        mut visit: impl FnMut(&mut O, usize, &O::Act) -> Result<(), ModelError>,
    ) -> Result<O::Act, ModelError> {
        let mut x = ops.embed(&self.tables, &self.embedding_norm, batch)?;
        visit(ops, 0, &x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(ops, x, batch)?;
            visit(ops, index + 1, &x)?;
        }
        Ok(x)
    }
}

impl<O: Ops> EncoderLayer<O> {
    /// Post-norm encoder layer (Vaswani et al. 2017, §3.1; BERT's order). `x` and result: `[n_tokens, d_model]`.
    fn forward(&self, ops: &mut O, x: O::Act, batch: &Ragged<'_>) -> Result<O::Act, ModelError> {
        let qkv = ops.linear(&self.qkv, &x, Activation::Identity)?; //         [n_tokens, 3 · n_heads · d_head]
        let context = ops.attend(qkv, &self.attention, batch)?; //             [n_tokens, n_heads · d_head]
        let x = ops.linear_add_norm(&self.attention_out, context, x, &self.attention_norm)?;
        let hidden = ops.linear(&self.ffn_up, &x, self.activation)?; //        [n_tokens, d_ffn]
        ops.linear_add_norm(&self.ffn_down, hidden, x, &self.ffn_norm)
    }
}
