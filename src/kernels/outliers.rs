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

/// Outliers of a column from which its panel stays whole: putting them into runs takes time with the square of their number.
const MOST_OF_COLUMN: usize = 1_024;

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
    /// Beside where a panel's first four stands; none if the panel's weights are whole.
    panels: Vec<Option<(usize, PanelChains)>>,
}

/// Two outliers, by input, in an s16.
type Pair = [(u16, i8); 2];

/// Pairs that add up in an s16.
#[derive(Debug, Clone, Default)]
struct Run {
    pairs: Vec<Pair>,
    sizes: [i32; 2],
}

impl Outliers {
    /// Takes the outliers of the next panel from its weights, `[k_groups][PANEL][4]`, if they are at most a share `most` of them.
    pub(super) fn take(&mut self, weights: &mut [i8], most: f64) {
        let mut main = weights.to_vec();
        let mut outliers = take(&mut main);
        let limit = most * weights.len() as f64;
        let n: usize = outliers.iter().map(Vec::len).sum();
        if n as f64 > limit || outliers.iter().any(|column| column.len() > MOST_OF_COLUMN) {
            return self.panels.push(None);
        }
        let mut runs = Vec::new();
        let mut fours = Vec::new();
        let columns: Vec<(Chains, usize)> = outliers
            .iter_mut()
            .enumerate()
            .map(|(column, outliers)| {
                let (first, n) = (fours.len(), in_runs(&in_pairs(outliers), &mut runs));
                let longest = runs[..n].iter().map(|run| run.pairs.len()).max().unwrap_or(0);
                let pair = |run: &Run, at: usize| run.pairs.get(at).copied().unwrap_or_default();
                for chain in runs[..n].chunks_exact(2) {
                    fours.extend((0..longest).map(|at| Four::new(pair(&chain[0], at), pair(&chain[1], at))));
                }
                let count = |n: usize| u16::try_from(n).expect("a column has at most 16,384 inputs");
                (Chains { n: count(n / 2), fours: count(longest), column: count(column) }, first)
            })
            .collect();
        if (fours.len() * 4) as f64 > limit {
            return self.panels.push(None);
        }
        weights.copy_from_slice(&main);
        let mut sorted: [(Chains, usize); PANEL] = std::array::from_fn(|column| columns[column]);
        sorted.sort_unstable_by_key(|&(chains, _)| chains);
        self.panels.push(Some((self.fours.len(), sorted.map(|(chains, _)| chains))));
        for (chains, first) in sorted {
            self.fours.extend_from_slice(&fours[first..first + chains.in_all()]);
        }
    }

    /// Whether no panel has any.
    pub(super) fn is_empty(&self) -> bool {
        self.panels.iter().all(Option::is_none)
    }

    /// Those of a panel; none if its weights are whole.
    pub(super) fn panel(&self, panel: usize) -> Option<(&[Four], &PanelChains)> {
        let (first, chains) = self.panels[panel].as_ref()?;
        let n = chains.iter().map(|chains| chains.in_all()).sum::<usize>();
        Some((&self.fours[*first..first + n], chains))
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.fours.as_slice()) + size_of_val(self.panels.as_slice())
    }
}

impl Chains {
    /// Fours of the column.
    fn in_all(self) -> usize {
        usize::from(self.n) * usize::from(self.fours)
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

/// Takes from a panel's weights what is too much, always from the largest; returns it by column and input.
fn take(weights: &mut [i8]) -> [Vec<(u16, i8)>; PANEL] {
    /// Bytes of a group of four inputs: a lane of s16 is two of them and those of the next group.
    const GROUP: usize = PANEL * 4;
    let mut outliers = std::array::from_fn(|_| Vec::new());
    let mut exceeds = [false; GROUP / 2];
    for (pair, groups) in weights.chunks_mut(2 * GROUP).enumerate() {
        let (first, second) = groups.split_at_mut(GROUP);
        // The last group may have none to be added to.
        let mut none = [0; GROUP];
        let second = if second.is_empty() { &mut none } else { second };
        for (lane, exceeds) in exceeds.iter_mut().enumerate() {
            let four = [first[2 * lane], first[2 * lane + 1], second[2 * lane], second[2 * lane + 1]].map(i16::from);
            let (above, below) = (four.map(|weight| weight.max(0)), four.map(|weight| weight.min(0)));
            *exceeds = i32::from(above.iter().sum::<i16>()) > MOST || i32::from(below.iter().sum::<i16>()) < -MOST;
        }
        for (lane, _) in exceeds.iter().enumerate().filter(|&(_, &exceeds)| exceeds) {
            let four = [&mut first[2 * lane..2 * lane + 2], &mut second[2 * lane..2 * lane + 2]];
            for sign in [1, -1] {
                let size = |weight: i8| (i32::from(weight) * sign).max(0);
                loop {
                    let excess =
                        four.iter().flat_map(|pair| pair.iter()).map(|&weight| size(weight)).sum::<i32>() - MOST;
                    if excess <= 0 {
                        break;
                    }
                    let mut largest = (0, 0);
                    for at in [(0, 1), (1, 0), (1, 1)] {
                        if size(four[at.0][at.1]) > size(four[largest.0][largest.1]) {
                            largest = at;
                        }
                    }
                    let weight = &mut four[largest.0][largest.1];
                    let outlier = excess.min(size(*weight)) * sign;
                    let outlier = i8::try_from(outlier).expect("no more than the weight");
                    *weight -= outlier;
                    let input = pair * 8 + largest.0 * 4 + lane % 2 * 2 + largest.1;
                    outliers[lane / 2].push((u16::try_from(input).expect("inputs are limited"), outlier));
                }
            }
        }
    }
    outliers
}

/// Puts a column's outliers into pairs: the most negative beside the most positive, so that pairs stay small.
fn in_pairs(outliers: &mut [(u16, i8)]) -> Vec<Pair> {
    outliers.sort_unstable_by_key(|&(input, weight)| (weight, input));
    let mut pairs: Vec<Pair> = Vec::with_capacity(outliers.len().div_ceil(2));
    let mut rest = &*outliers;
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
    pairs.sort_by_key(|&pair| std::cmp::Reverse(sizes(pair).into_iter().max()));
    pairs
}

/// Puts pairs, the largest first, into as few runs as each fits s16, an even number, and evenly; returns how many.
fn in_runs(pairs: &[Pair], runs: &mut Vec<Run>) -> usize {
    let sums = pairs.iter().map(|&pair| sizes(pair)).fold([0, 0], |[a, b], [c, d]| [a + c, b + d]);
    let least = sums.into_iter().max().map_or(0, |sum| usize::try_from((sum + 2 * MOST - 1) / (2 * MOST)).unwrap_or(0));
    let mut chains = least;
    // More runs always do at last: those of a pair each.
    while !fill(pairs, 2 * chains, runs) {
        chains += 1 + chains / 8;
    }
    2 * chains
}

/// Whether `n` runs take all pairs; if so, the first runs hold them.
fn fill(pairs: &[Pair], n: usize, runs: &mut Vec<Run>) -> bool {
    runs.resize(n.max(runs.len()), Run::default());
    for run in &mut runs[..n] {
        run.pairs.clear();
        run.sizes = [0, 0];
    }
    pairs.iter().all(|&pair| {
        let [above, below] = sizes(pair);
        let after = |run: &Run| [run.sizes[0] + above, run.sizes[1] + below];
        let fits = |run: &Run| after(run).into_iter().all(|size| size <= MOST);
        let Some(run) = runs[..n].iter_mut().filter(|run| fits(run)).min_by_key(|run| run.pairs.len()) else {
            return false;
        };
        run.sizes = after(run);
        run.pairs.push(pair);
        true
    })
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

    /// Columns of a panel in the order of packed weights.
    fn packed(columns: &[Vec<i8>], n_groups: usize) -> Vec<i8> {
        let weight = |i: usize| columns.get(i / 4 % PANEL)?.get(i / (4 * PANEL) * 4 + i % 4).copied();
        (0..n_groups * PANEL * 4).map(|i| weight(i).unwrap_or(0)).collect()
    }

    fn fits(weights: &[i8]) -> bool {
        let size = |sign: i32| weights.iter().map(|&weight| (i32::from(weight) * sign).max(0)).sum::<i32>();
        size(1) <= MOST && size(-1) <= MOST
    }

    proptest! {
        #[test]
        fn main_and_outliers_add_up_and_neither_overflows(weights in prop::collection::vec(weights(), 1..4)) {
            let n_groups = weights.iter().map(|column| column.len().div_ceil(4)).max().unwrap_or(0);
            let mut main = packed(&weights, n_groups);
            let mut outliers = Outliers::default();
            outliers.take(&mut main, f64::INFINITY);
            let (mut fours, chains) = outliers.panel(0).unwrap();
            for &Chains { n, fours: in_each, column } in chains {
                let at = usize::from(column);
                let column: Vec<i8> = (0..n_groups * 4).map(|k| main[k / 4 * PANEL * 4 + at * 4 + k % 4]).collect();
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
                let expected = |k: usize| weights.get(at).and_then(|column| column.get(k)).map_or(0, |&weight| i32::from(weight));
                prop_assert_eq!(sum, (0..n_groups * 4).map(expected).collect::<Vec<_>>());
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
        let weights: Vec<i8> = (0..8 * PANEL * 4).map(|i| (i % 64) as i8 - 32).collect();
        let mut main = weights.clone();
        let mut outliers = Outliers::default();
        outliers.take(&mut main, 0.0);
        assert_eq!(main, weights);
        let (fours, chains) = outliers.panel(0).unwrap();
        assert!(fours.is_empty() && chains.iter().enumerate().all(|(at, chains)| usize::from(chains.column) == at));
    }

    #[test]
    fn a_panel_with_too_many_stays_whole() {
        let mut outliers = Outliers::default();
        for weight in [127, 10] {
            let mut weights = vec![weight; 8 * PANEL * 4];
            outliers.take(&mut weights, 0.15);
            assert!(weights.iter().all(|&main| main == weight));
        }
        assert!(outliers.panel(0).is_none() && outliers.panel(1).is_some() && !outliers.is_empty());
        // One column that would take long.
        let mut weights: Vec<i8> = (0..1_024 * PANEL * 4).map(|i| if i / 4 % PANEL == 7 { 65 } else { 1 }).collect();
        outliers.take(&mut weights, f64::INFINITY);
        assert!(outliers.panel(2).is_none());
    }
}
