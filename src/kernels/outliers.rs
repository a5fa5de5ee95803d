//! Weights as the sum of two: most of each, whose products may be added in s16, and outliers, by how much a few go beyond that.
//!
//! ```text
//! weight = main + outlier
//! ```
//! Without a dot product for bytes, the fastest way to multiply them is in pairs that are added in s16 (`vpmaddubsw`), and it is faster
//! still if the sums of two such steps are added there before they are widened. For codes up to 255 that is exact if, of the four
//! weights whose products share an s16, those above 0 add up to at most 128 and those below to at least −128: 255 · 128 < 2^15. Of a
//! trained matrix one weight in 25 to 100 has to give something up for that, and what it gives up is multiplied apart, so that sums
//! are those of the whole weights.
//!
//! Source: outlier-aware quantization for 16-bit accumulation, Park et al., "Deep Learning Inference in Facebook Data Centers",
//! arXiv:1811.09886, on reduced precision, where what is beyond 7 bits is an outlier and sums may saturate. Here they cannot.

use super::layout::{PANEL, STRIP};

/// Most that weights of the same sign in one s16 add up to.
const MOST: i32 = 128;
/// Bytes of codes by input in which a four counts, so that a place fits 16 bits.
pub(super) const PLACE: usize = 8;
/// Most inputs of a matrix that is split.
pub(super) const MOST_INPUTS: usize = (u16::MAX as usize + 1) * PLACE / STRIP;

/// Four outliers of a column, the first two and the last two in an s16 each.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Four {
    /// Where their inputs' codes lie, in units of [`PLACE`] bytes.
    pub(super) places: [u16; 4],
    /// Two of them twice, then the others twice.
    pub(super) weights: [[i8; 4]; 2],
}

/// The outliers of a column: chains of fours, in which all first pairs, and all second ones, add up to what fits s16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub(super) struct Chains {
    pub(super) n: u16,
    /// In each.
    pub(super) fours: u16,
    /// Of the panel.
    pub(super) column: u16,
}

/// The columns of a panel. Those with as many outliers follow each other, so that loops over them end where the last one did.
pub(super) type PanelChains = [Chains; PANEL];

/// The outliers of a matrix, panel by panel, column by column as [`PanelChains`] has them, and chain by chain.
#[derive(Debug, Clone, Default)]
pub(super) struct Outliers {
    fours: Vec<Four>,
    /// Beside where the panel's first four stands.
    panels: Vec<(usize, PanelChains)>,
}

/// Two outliers, by input, in an s16.
type Pair = [(u16, i8); 2];

impl Outliers {
    /// Takes the outliers of the next panel from its weights, which are given by column and input.
    pub(super) fn take(&mut self, columns: &mut [Vec<i8>; PANEL]) {
        let first = self.fours.len();
        let count = |n: usize| u16::try_from(n).expect("a column has at most 16,384 inputs");
        let mut taken: Vec<(Chains, Vec<Vec<Pair>>)> = Vec::with_capacity(PANEL);
        for (column, weights) in columns.iter_mut().enumerate() {
            let pairs = in_pairs(take(weights));
            // More chains always do at last: those of a pair each.
            let runs = (0..).find_map(|n| in_runs(&pairs, 2 * n)).expect("there is no end of chains");
            let fours = runs.iter().map(Vec::len).max().unwrap_or(0);
            taken.push((Chains { n: count(runs.len() / 2), fours: count(fours), column: count(column) }, runs));
        }
        taken.sort_by_key(|&(chains, _)| chains);
        for chain in taken.iter().flat_map(|(chains, runs)| runs.chunks_exact(2).map(move |runs| (chains, runs))) {
            let (chains, [first, second]) = (chain.0, chain.1) else { unreachable!("chunks of two") };
            let pair = |run: &[Pair], at: u16| run.get(usize::from(at)).copied().unwrap_or_default();
            self.fours.extend((0..chains.fours).map(|at| Four::new(pair(first, at), pair(second, at))));
        }
        self.panels.push((first, std::array::from_fn(|at| taken[at].0)));
    }

    /// Products that are computed for them, zeros included, for each row.
    pub(super) fn products(&self) -> usize {
        self.fours.len() * 4
    }

    /// Those of a panel.
    pub(super) fn panel(&self, panel: usize) -> (&[Four], &PanelChains) {
        let (first, chains) = &self.panels[panel];
        let n = chains.iter().map(|chains| usize::from(chains.n) * usize::from(chains.fours)).sum::<usize>();
        (&self.fours[*first..first + n], chains)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.fours.as_slice()) + size_of_val(self.panels.as_slice())
    }
}

impl Four {
    fn new(first: Pair, second: Pair) -> Self {
        let place = |input: u16| input * (STRIP / PLACE) as u16;
        let [(i0, w0), (i1, w1)] = first;
        let [(i2, w2), (i3, w3)] = second;
        Self { places: [i0, i1, i2, i3].map(place), weights: [[w0, w1, w0, w1], [w2, w3, w2, w3]] }
    }
}

/// What weights of each sign add up to.
fn sizes(pair: Pair) -> [i32; 2] {
    [1, -1].map(|sign| pair.iter().map(|&(_, weight)| (i32::from(weight) * sign).max(0)).sum())
}

/// Takes from a column's weights what is too much, always from the largest; returns it by input.
fn take(weights: &mut [i8]) -> Vec<(u16, i8)> {
    let mut outliers = Vec::new();
    for first in (0..weights.len()).step_by(8) {
        // Two bytes of a group of four inputs are a lane, to which those of the next group are added.
        for lane in [0, 2] {
            let together = [0, 1, 4, 5].map(|k| first + lane + k);
            for sign in [1, -1] {
                loop {
                    let size = |&k: &usize| weights.get(k).map_or(0, |&weight| i32::from(weight) * sign).max(0);
                    let excess = together.iter().map(size).sum::<i32>() - MOST;
                    let Some(&largest) = together.iter().max_by_key(|k| size(k)).filter(|_| excess > 0) else { break };
                    let outlier = excess.min(size(&largest)) * sign;
                    let outlier = i8::try_from(outlier).expect("no more than the weight");
                    weights[largest] -= outlier;
                    outliers.push((u16::try_from(largest).expect("inputs are limited to 65,536"), outlier));
                }
            }
        }
    }
    outliers
}

/// Puts a column's outliers into pairs: the most negative beside the most positive, so that pairs stay small.
fn in_pairs(mut outliers: Vec<(u16, i8)>) -> Vec<Pair> {
    outliers.sort_unstable_by_key(|&(input, weight)| (weight, input));
    let mut pairs: Vec<Pair> = Vec::with_capacity(outliers.len().div_ceil(2));
    let mut rest = outliers.as_slice();
    while let [low, between @ .., high] = rest {
        if sizes([*low, *high]).into_iter().all(|size| size <= MOST) {
            pairs.push([*low, *high]);
            rest = between;
        } else if low.1 < 0 {
            pairs.push([*low, (0, 0)]);
            rest = &rest[1..];
        } else {
            pairs.push([*high, (0, 0)]);
            rest = &rest[..rest.len() - 1];
        }
    }
    pairs.extend(rest.first().map(|&single| [single, (0, 0)]));
    pairs
}

/// Puts pairs into `n` runs, evenly, so that each fits s16; `None` if that leaves one over.
fn in_runs(pairs: &[Pair], n: usize) -> Option<Vec<Vec<Pair>>> {
    let mut sorted = pairs.to_vec();
    sorted.sort_by_key(|&pair| std::cmp::Reverse(sizes(pair).into_iter().max()));
    let mut runs = vec![(Vec::new(), [0, 0]); n];
    for pair in sorted {
        let after = |sums: [i32; 2]| std::array::from_fn(|sign| sums[sign] + sizes(pair)[sign]);
        let fits = |sums: [i32; 2]| after(sums).into_iter().all(|size: i32| size <= MOST);
        let (run, sums) = runs.iter_mut().filter(|(_, sums)| fits(*sums)).min_by_key(|(run, _)| run.len())?;
        *sums = after(*sums);
        run.push(pair);
    }
    Some(runs.into_iter().map(|(run, _)| run).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Weights of any size, and such as are mostly small or mostly at the ends.
    fn weights() -> impl Strategy<Value = Vec<i8>> {
        let weight = prop_oneof![4 => any::<i8>(), 2 => -40..40i8, 1 => Just(-128), 1 => Just(127)];
        prop::collection::vec(weight, 0..70)
    }

    fn fits(weights: &[i8]) -> bool {
        let size = |sign: i32| weights.iter().map(|&weight| (i32::from(weight) * sign).max(0)).sum::<i32>();
        size(1) <= MOST && size(-1) <= MOST
    }

    proptest! {
        #[test]
        fn main_and_outliers_add_up_and_neither_overflows(weights in prop::collection::vec(weights(), 1..4)) {
            let mut main: [Vec<i8>; PANEL] = std::array::from_fn(|_| Vec::new());
            main[..weights.len()].clone_from_slice(&weights);
            let mut outliers = Outliers::default();
            outliers.take(&mut main);
            let (mut fours, chains) = outliers.panel(0);
            for &Chains { n, fours: in_each, column } in chains {
                let (at, column) = (usize::from(column), &main[usize::from(column)]);
                let mut sum: Vec<i32> = column.iter().map(|&weight| i32::from(weight)).collect();
                for _ in 0..n {
                    let (chain, rest) = fours.split_at(in_each.into());
                    fours = rest;
                    for half in 0..2 {
                        let run: Vec<i8> = chain.iter().flat_map(|four| four.weights[half][..2].to_vec()).collect();
                        prop_assert!(fits(&run), "{run:?}");
                    }
                    for four in chain {
                        let [[w0, w1, w2, w3], [w4, w5, w6, w7]] = four.weights;
                        prop_assert!((w0, w1, w4, w5) == (w2, w3, w6, w7));
                        for (place, weight) in four.places.into_iter().zip([w0, w1, w4, w5]).filter(|&(_, w)| w != 0) {
                            sum[usize::from(place) * PLACE / STRIP] += i32::from(weight);
                        }
                    }
                }
                let expected = weights.get(at).into_iter().flatten();
                prop_assert_eq!(sum, expected.map(|&weight| i32::from(weight)).collect::<Vec<_>>());
                for eight in column.chunks(8) {
                    for lane in [0, 2] {
                        let together = [0, 1, 4, 5].into_iter().filter_map(|k| eight.get(lane + k).copied());
                        prop_assert!(fits(&together.collect::<Vec<_>>()), "{eight:?}");
                    }
                }
            }
            prop_assert!(fours.is_empty());
        }
    }

    #[test]
    fn small_weights_have_no_outliers() {
        let mut main: [Vec<i8>; PANEL] = std::array::from_fn(|_| (0..64).map(|k| k - 32).collect());
        let weights = main.clone();
        let mut outliers = Outliers::default();
        outliers.take(&mut main);
        assert_eq!(main, weights);
        assert_eq!(outliers.products(), 0);
        assert!(
            outliers
                .panel(0)
                .1
                .iter()
                .enumerate()
                .all(|(at, chains)| (chains.n, usize::from(chains.column)) == (0, at))
        );
    }
}
