//! What a query sees, as ranges: the form that loops run over.

use std::ops::Range;

use super::{Band, Shape, count};

/// What one query of a sequence sees, every key once, as ranges of three lists: the positions, [`Band::list`], and the
/// summaries of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Leading positions, before `near`.
    pub leading: Range<usize>,
    /// Positions around the query.
    pub near: Range<usize>,
    /// Entries of [`Band::list`].
    pub listed: [Range<usize>; 2],
    /// Blocks whose summaries are seen.
    pub pooled: [Range<usize>; 2],
}

impl Seen {
    fn positions(leading: usize, near: Range<usize>) -> Self {
        // Leading positions that do not end before the surroundings continue them.
        let near = if leading >= near.start { near.start..near.end.max(leading) } else { near };
        Self { leading: 0..leading.min(near.start), near, listed: [0..0, 0..0], pooled: [0..0, 0..0] }
    }

    /// Keys, without summaries.
    #[must_use]
    pub fn n_keys(&self) -> usize {
        self.leading.len() + self.near.len() + self.listed.iter().map(ExactSizeIterator::len).sum::<usize>()
    }

    /// Keys and summaries.
    #[must_use]
    pub fn n_all(&self) -> usize {
        self.n_keys() + self.pooled.iter().map(ExactSizeIterator::len).sum::<usize>()
    }
}

/// Tokens `r, r + step, …` of every residue `r`, one after the other.
struct Residues {
    len: usize,
    step: usize,
}

impl Residues {
    fn new(len: usize, step: u32) -> Self {
        Self { len, step: count(step).clamp(1, len.max(1)) }
    }

    /// Where residue `r` starts.
    fn start(&self, r: usize) -> usize {
        r * (self.len / self.step) + r.min(self.len % self.step)
    }

    /// Tokens of residue `r` before position `end`.
    fn before(&self, r: usize, end: usize) -> usize {
        end.saturating_sub(r).div_ceil(self.step)
    }
}

impl Band {
    /// What `query` sees in a sequence of `len` tokens.
    #[must_use]
    pub fn seen(&self, query: usize, len: usize) -> Seen {
        let leading = self.leading().min(len);
        let is_global = query < count(self.globals);
        let (left, right) = (count(self.left), count(self.right));
        let around =
            |at: usize, end: usize| at.saturating_sub(left)..at.saturating_add(right).saturating_add(1).min(end);
        if let Shape::Dilated { step } = self.shape {
            // The list holds the leading tokens, and after them all tokens by residue.
            if is_global {
                return Seen { listed: [0..0, leading..leading + len], ..Seen::positions(0, 0..0) };
            }
            let residues = Residues::new(len, step);
            let (r, at) = (query % residues.step, query / residues.step);
            let window = around(at, residues.before(r, len));
            let start = leading + residues.start(r);
            let first = window.start.max(residues.before(r, leading));
            let window = start + first..start + window.end.max(first);
            return Seen { listed: [0..leading, window], ..Seen::positions(0, 0..0) };
        }
        if is_global {
            return Seen::positions(0, 0..len);
        }
        match self.shape {
            Shape::Window | Shape::Dilated { .. } => Seen::positions(leading, around(query, len)),
            Shape::Strided { stride } => {
                let residues = Residues::new(len, stride);
                let (r, at) = (query % residues.step, query / residues.step);
                let near = around(query, len);
                // Of the query's residue, those in the window and the leading ones are seen already.
                let inside = residues.before(r, near.start)..residues.before(r, near.end);
                debug_assert!(inside.contains(&at));
                let start = residues.start(r);
                let before = residues.before(r, leading);
                let listed = [
                    start + before.min(inside.start)..start + inside.start,
                    start + inside.end.max(before)..start + residues.before(r, len).max(before),
                ];
                Seen { listed, ..Seen::positions(leading, near) }
            }
            Shape::Fixed { block, columns } => {
                let (block, n_columns) = (count(block).max(1), count(columns));
                let first = query / block * block;
                let near = first..first.saturating_add(block).min(len);
                let before = columns_before(leading, block, n_columns);
                let inside = columns_before(near.start, block, n_columns)..columns_before(near.end, block, n_columns);
                let all = columns_before(len, block, n_columns);
                let listed = [before.min(inside.start)..inside.start, inside.end.max(before)..all.max(before)];
                Seen { listed, ..Seen::positions(leading, near) }
            }
            Shape::Pooled { block } => {
                let block = count(block).max(1);
                let n_blocks = len.div_ceil(block);
                let blocks = around(query / block, n_blocks);
                let near = blocks.start * block..blocks.end.saturating_mul(block).min(len);
                Seen { pooled: [0..blocks.start, blocks.end..n_blocks], ..Seen::positions(leading, near) }
            }
        }
    }

    /// Appends the list that [`Seen::listed`] counts in.
    ///
    /// # Panics
    /// If `len` does not fit 32 bits.
    pub fn list(&self, len: usize, to: &mut Vec<u32>) {
        let end = u32::try_from(len).expect("sequences are shorter than 2^32");
        let by_residue = |step: u32, to: &mut Vec<u32>| {
            let step = step.clamp(1, end.max(1));
            for r in 0..step.min(end) {
                to.extend((r..end).step_by(step as usize));
            }
        };
        match self.shape {
            Shape::Window | Shape::Pooled { .. } => {}
            Shape::Dilated { step } => {
                to.extend(0..self.globals.max(self.sinks).min(end));
                by_residue(step, to);
            }
            Shape::Strided { stride } => by_residue(stride, to),
            Shape::Fixed { block, columns } => {
                let block = block.max(1);
                to.extend((0..end).filter(|key| key % block >= block.saturating_sub(columns)));
            }
        }
    }

    /// Entries of [`Band::list`].
    #[must_use]
    pub fn n_listed(&self, len: usize) -> usize {
        match self.shape {
            Shape::Window | Shape::Pooled { .. } => 0,
            Shape::Dilated { .. } => self.leading().min(len) + len,
            Shape::Strided { .. } => len,
            Shape::Fixed { block, columns } => columns_before(len, count(block).max(1), count(columns)),
        }
    }

    /// Whether queries see positions in order, besides what is listed.
    #[must_use]
    pub fn sees_positions(&self) -> bool {
        !matches!(self.shape, Shape::Dilated { .. })
    }

    /// Whether neighbouring queries see different parts of the list.
    #[must_use]
    pub fn lists_differ(&self) -> bool {
        matches!(self.shape, Shape::Strided { .. })
    }

    /// Queries this far apart see nearly the same keys.
    #[must_use]
    pub fn query_step(&self) -> usize {
        match self.shape {
            Shape::Dilated { step } => count(step).max(1),
            _ => 1,
        }
    }

    /// Tokens of a block that has a summary; 0 when there are none.
    #[must_use]
    pub fn pooled_block(&self) -> usize {
        match self.shape {
            Shape::Pooled { block } => count(block).max(1),
            _ => 0,
        }
    }

    /// At least as many as any query of a sequence of `len` tokens sees.
    #[must_use]
    pub fn max_keys(&self, len: usize) -> usize {
        let around = count(self.left).saturating_add(count(self.right)).saturating_add(1);
        let n_pooled = if self.pooled_block() == 0 { 0 } else { len.div_ceil(self.pooled_block()) };
        if self.globals > 0 {
            return len + n_pooled;
        }
        let near = match self.shape {
            Shape::Window | Shape::Dilated { .. } => around,
            Shape::Strided { stride } => around.saturating_add(len.div_ceil(count(stride).max(1))),
            Shape::Fixed { block, .. } => count(block).saturating_add(self.n_listed(len)),
            Shape::Pooled { block } => around.saturating_mul(count(block).max(1)),
        };
        near.saturating_add(self.leading()).min(len) + n_pooled
    }
}

/// Keys before position `end` that are among the last `columns` of their block.
fn columns_before(end: usize, block: usize, columns: usize) -> usize {
    let columns = columns.min(block);
    end / block * columns + (end % block).saturating_sub(block - columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_shape() -> impl Strategy<Value = Shape> {
        prop_oneof![
            Just(Shape::Window),
            (1u32..9).prop_map(|step| Shape::Dilated { step }),
            (1u32..20).prop_map(|stride| Shape::Strided { stride }),
            (1u32..20, 0u32..22).prop_map(|(block, columns)| Shape::Fixed { block, columns }),
            (1u32..20).prop_map(|block| Shape::Pooled { block }),
        ]
    }

    proptest! {
        #[test]
        fn ranges_are_exactly_the_definition(
            left in 0u32..40, right in 0u32..40, globals in 0u32..6, sinks in 0u32..6, shape in any_shape(),
            len in 1usize..70,
        ) {
            let band = Band { left, right, globals, sinks, shape };
            let mut list = Vec::new();
            band.list(len, &mut list);
            prop_assert_eq!(list.len(), band.n_listed(len));
            let mut pairs = 0;
            let mut keys_seen = 0;
            let mut most = 0;
            for query in 0..len {
                let seen = band.seen(query, len);
                prop_assert!(band.sees_positions() || seen.near.is_empty() && seen.leading.is_empty());
                let mut times = vec![0; len];
                seen.leading.clone().chain(seen.near.clone()).for_each(|key| times[key] += 1);
                seen.listed.iter().cloned().flatten().for_each(|entry| times[list[entry] as usize] += 1);
                for key in 0..len {
                    let expected = usize::from(band.contains(query, key));
                    prop_assert_eq!(times[key], expected, "{:?}: query {} key {}", band, query, key);
                }
                prop_assert_eq!(times[query], 1);
                keys_seen += times.iter().sum::<usize>();
                // A summary is seen of exactly those blocks that are not seen themselves, leading keys aside.
                for block in 0..len.div_ceil(band.pooled_block().max(1)) * usize::from(band.pooled_block() > 0) {
                    let n = seen.pooled.iter().filter(|range| range.contains(&block)).count();
                    let own = query / band.pooled_block();
                    let near = block + left as usize >= own && block <= own + right as usize;
                    let hidden = !near && query >= globals as usize;
                    prop_assert_eq!(n, usize::from(hidden), "{:?}: query {} block {}", band, query, block);
                }
                pairs += seen.n_all() as u64;
                most = most.max(seen.n_all());
            }
            prop_assert_eq!(pairs, band.n_pairs(len));
            // Not the other way round: leading tokens may be all that there are.
            prop_assert!(!band.is_full_for(len) || keys_seen == len * len);
            prop_assert!(band.max_keys(len) >= most);
        }
    }
}
