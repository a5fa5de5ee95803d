//! Reference attention: sequences of similar length share padded products, under masks made from the band.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::softmax;

use super::index;
use crate::model::{AttentionSpec, Ragged};

/// Padded tokens per real token that a group of sequences may have.
const MAX_PADDING: f64 = 1.25;

/// Scores held at once; longer inputs are computed in blocks of queries.
const MAX_SCORES: usize = 1 << 23;

/// `softmax(Q Kᵀ / √d_head + mask) V` per sequence and head; the mask is 0 inside the band and −∞ outside.
///
/// Where the band has summaries of blocks, means of keys and values are columns besides, with ln n added to the scores of
/// those that stand for n tokens.
pub(super) fn attend(qkv: &Tensor, spec: &AttentionSpec, batch: &Ragged<'_>) -> Result<Tensor> {
    let groups = groups_by_length(batch);
    let mut contexts = Vec::with_capacity(groups.len());
    // Row of the concatenated contexts where each token of the batch is found.
    let mut found_at = vec![0u32; batch.n_tokens()];
    let mut n_rows = 0;
    for group in &groups {
        let max_len = group.iter().map(|&seq| batch.rows(seq).len()).max().unwrap_or(0);
        let mut gather = Vec::with_capacity(group.len() * max_len);
        for &seq in group {
            let rows = batch.rows(seq);
            for position in 0..max_len {
                // Padding repeats the last token: it is finite and no real query sees it.
                gather.push(row_id(rows.start + position.min(rows.len() - 1)));
                if position < rows.len() {
                    found_at[rows.start + position] = row_id(n_rows + position);
                }
            }
            n_rows += max_len;
        }
        let lens: Vec<usize> = group.iter().map(|&seq| batch.rows(seq).len()).collect();
        contexts.push(attend_group(&qkv.index_select(&index(gather)?, 0)?, spec, &lens, max_len)?);
    }
    Tensor::cat(&contexts, 0)?.index_select(&index(found_at)?, 0)
}

fn row_id(row: usize) -> u32 {
    u32::try_from(row).expect("RaggedBatch holds fewer than 2^32 tokens, padding adds a quarter")
}

/// Sequences in order of length, cut so that padding stays within [`MAX_PADDING`].
fn groups_by_length(batch: &Ragged<'_>) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..batch.n_seqs()).collect();
    order.sort_by_key(|&seq| batch.rows(seq).len());
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut n_tokens = 0;
    for seq in order {
        let len = batch.rows(seq).len();
        match groups.last_mut() {
            Some(group) if ((group.len() + 1) * len) as f64 <= MAX_PADDING * (n_tokens + len) as f64 => {
                group.push(seq);
                n_tokens += len;
            }
            _ => {
                groups.push(vec![seq]);
                n_tokens = len;
            }
        }
    }
    groups
}

/// `qkv: [n_seqs · max_len, 3 · n_heads · d_head]`; result `[n_seqs · max_len, n_heads · d_head]`.
fn attend_group(qkv: &Tensor, spec: &AttentionSpec, lens: &[usize], max_len: usize) -> Result<Tensor> {
    let (n_heads, d_head) = (spec.n_heads, spec.d_head);
    let parts = qkv.reshape((lens.len(), max_len, 3, n_heads, d_head))?.permute((2, 0, 3, 1, 4))?;
    let part = |which: usize| parts.get(which)?.contiguous(); // [n_seqs, n_heads, max_len, d_head]
    let (queries, mut keys, mut values) = (part(0)?.affine(1.0 / (d_head as f64).sqrt(), 0.0)?, part(1)?, part(2)?);
    if spec.band.pooled_block() > 0 {
        let means =
            pooling(spec, lens, max_len)?.broadcast_as((lens.len(), n_heads, n_pooled(spec, max_len), max_len))?;
        let means = means.contiguous()?.to_dtype(keys.dtype())?;
        keys = Tensor::cat(&[&keys, &means.matmul(&keys)?], 2)?;
        values = Tensor::cat(&[&values, &means.matmul(&values)?], 2)?;
    }
    let keys = keys.transpose(2, 3)?.contiguous()?;
    let masked =
        spec.band.pooled_block() > 0 || !spec.band.is_full_for(max_len) || lens.iter().any(|&len| len != max_len);
    let block = (MAX_SCORES / (lens.len() * n_heads * max_len)).clamp(1, max_len);
    let mut contexts = Vec::new();
    for start in (0..max_len).step_by(block) {
        let n_queries = block.min(max_len - start);
        let mut scores = queries.narrow(2, start, n_queries)?.contiguous()?.matmul(&keys)?;
        if masked {
            let mask = mask(spec, lens, max_len, start..start + n_queries)?;
            scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        }
        contexts.push(softmax(&scores, D::Minus1)?.matmul(&values)?);
    }
    Tensor::cat(&contexts, 2)?.transpose(1, 2)?.reshape((lens.len() * max_len, n_heads * d_head))
}

/// Summaries of a sequence of `max_len` tokens.
fn n_pooled(spec: &AttentionSpec, max_len: usize) -> usize {
    match spec.band.pooled_block() {
        0 => 0,
        block => max_len.div_ceil(block),
    }
}

/// The tokens of block `block` of a sequence of `len` tokens.
fn block_of(spec: &AttentionSpec, block: usize, len: usize) -> std::ops::Range<usize> {
    let size = spec.band.pooled_block();
    (block * size).min(len)..((block + 1) * size).min(len)
}

/// `[n_seqs, 1, n_pooled, max_len]`: rows that take the mean of each block.
fn pooling(spec: &AttentionSpec, lens: &[usize], max_len: usize) -> Result<Tensor> {
    let n_pooled = n_pooled(spec, max_len);
    let mut values = Vec::with_capacity(lens.len() * n_pooled * max_len);
    for &len in lens {
        for block in 0..n_pooled {
            let tokens = block_of(spec, block, len);
            let share = 1.0 / tokens.len().max(1) as f32;
            values.extend((0..max_len).map(|key| if tokens.contains(&key) { share } else { 0.0 }));
        }
    }
    Tensor::from_vec(values, (lens.len(), 1, n_pooled, max_len), &Device::Cpu)
}

/// `[n_seqs, 1, n_queries, max_len + n_pooled]`. Queries that are padding see every real key, so that no row is empty.
fn mask(spec: &AttentionSpec, lens: &[usize], max_len: usize, queries: std::ops::Range<usize>) -> Result<Tensor> {
    let n_pooled = n_pooled(spec, max_len);
    let mut values = Vec::with_capacity(lens.len() * queries.len() * (max_len + n_pooled));
    for &len in lens {
        for query in queries.clone() {
            values.extend((0..max_len).map(|key| {
                let seen = key < len && (query >= len || spec.band.contains(query, key));
                if seen { 0.0 } else { f32::NEG_INFINITY }
            }));
            let pooled = if query < len { spec.band.seen(query, len).pooled } else { [0..0, 0..0] };
            values.extend((0..n_pooled).map(|block| match pooled.iter().any(|range| range.contains(&block)) {
                true => (block_of(spec, block, len).len() as f32).ln(),
                false => f32::NEG_INFINITY,
            }));
        }
    }
    Tensor::from_vec(values, (lens.len(), 1, queries.len(), max_len + n_pooled), &Device::Cpu)
}
