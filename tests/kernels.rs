//! Kernels of every instruction set of this machine against `kernels::reference`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::numbers::{floats, rng, sets};
use niwaki::kernels::attention::{
    Attention, CacheLine, HalfPanels, Heads, KEY_BLOCK, KeySlots, Queries, QueryKeys, SequenceHeads, SlotRange,
};
use niwaki::kernels::forms::{GroupParts, LayerShape, PackedGroups, PackedMatrix};
use niwaki::kernels::layout::{CodeRows, PANEL, PackedLinear, RowScale, block_index, code_stride};
use niwaki::kernels::{
    AttentionForm, Block, CodeRowsMut, Isa, IsaName, KernelSet, Nonlinearity, f32_to_half, half_to_f32, reference,
};
use std::ops::Range;

use proptest::prelude::*;
use rand::RngExt;
use rand::rngs::StdRng;

/// Whether no binary16 is nearer; of two that are as near, either will do.
fn is_nearest_half(half: u16, value: f32) -> bool {
    (half_to_f32(half) - value).abs() <= (half_to_f32(f32_to_half(value)) - value).abs()
}

/// A problem: codes and weights of the given sizes; `extreme` ones are all 0, 255, −127, −128 or 127.
struct Product {
    k: usize,
    codes: Vec<u8>,
    scales: Vec<RowScale>,
    weights: Vec<i8>,
    weight_scale: Vec<f32>,
    bias: Vec<f32>,
}

impl Product {
    fn new(seed: u64, m: usize, n: usize, k: usize, extreme: bool) -> Self {
        let mut rng = rng(seed);
        let mut code = || if extreme { [0, 255][rng.random_range(0..2)] } else { rng.random() };
        let codes = (0..m * k).map(|_| code()).collect();
        let mut weight = || if extreme { [-128, -127, 127][rng.random_range(0..3)] } else { rng.random() };
        let weights = (0..n * k).map(|_| weight()).collect();
        let scale =
            |rng: &mut StdRng| RowScale { scale: rng.random_range(0.001..0.1), low: rng.random_range(-5.0..1.0) };
        Self {
            k,
            codes,
            scales: (0..m).map(|_| scale(&mut rng)).collect(),
            weights,
            weight_scale: (0..n).map(|_| rng.random_range(0.001..0.01)).collect(),
            bias: floats(&mut rng, n, 1.0),
        }
    }

    fn packed(&self) -> PackedLinear {
        PackedLinear::new(&self.weights, &self.weight_scale, &self.bias, self.k)
    }

    /// Codes at the kernels' row distance; the gap holds garbage, which zero weights must silence.
    fn rows(&self) -> (Vec<u8>, usize) {
        let stride = code_stride(self.k);
        let mut rows = vec![0xabu8; self.scales.len() * stride];
        for (from, to) in self.codes.chunks_exact(self.k.max(1)).zip(rows.chunks_exact_mut(stride)) {
            to[..self.k].copy_from_slice(from);
        }
        (rows, stride)
    }
}

#[test]
fn accumulators_are_bit_equal_to_the_reference() {
    let widths = [(1, 1), (64, 4), (63, 3), (65, 5), (128, 64), (100, 77), (384, 352), (192, 130)];
    for (index, (n, k)) in widths.into_iter().enumerate() {
        for m in [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 32, 37] {
            for extreme in [false, true] {
                let problem = Product::new(index as u64 * 100 + m as u64, m, n, k, extreme);
                let expected = reference::gemm_i32(&problem.codes, &problem.weights, k);
                let packed = problem.packed();
                let (rows, stride) = problem.rows();
                let x = CodeRows::new(&rows, stride, &problem.scales);
                // Half of the weights of a few columns are outliers, or all; no share is too large here.
                let split = PackedMatrix::Dense(packed.clone().split(f64::INFINITY));
                let packed = PackedMatrix::Dense(packed);
                for set in sets() {
                    let mut room = Vec::new();
                    let turned = set.turn(x, &split, |n| {
                        room.resize(n, 0xcd);
                        &mut room
                    });
                    let mut out = vec![i32::MIN; m * PANEL];
                    let both = [(x, &packed), (turned, &split)].into_iter().take(1 + usize::from(set.turns()));
                    for ((x, packed), panel) in both.flat_map(|both| (0..packed.n_panels()).map(move |p| (both, p))) {
                        set.product_i32(&x, packed, panel, &mut out);
                        for row in 0..m {
                            for column in 0..PANEL {
                                let n_column = panel * PANEL + column;
                                let want = if n_column < n { expected[row * n + n_column] } else { 0 };
                                let got = out[row * PANEL + column];
                                assert_eq!(got, want, "{} {m}x{n}x{k} [{row}, {n_column}]", set.name());
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn long_sums_do_not_overflow_or_saturate() {
    // The largest inner width that is allowed; 65,536 · 255 · 128 is just below 2^31.
    for weight in [-128i8, 127] {
        let k = 65_536;
        let packed = PackedLinear::new(&vec![weight; k], &[1.0], &[0.0], k);
        let rows = vec![255u8; k];
        let scales = [RowScale { scale: 1.0, low: 0.0 }];
        for set in sets() {
            let mut out = vec![0i32; PANEL];
            set.gemm_i32(&CodeRows::new(&rows, k, &scales), &packed, 0, &mut out);
            assert_eq!(out[0], 65_536 * 255 * i32::from(weight), "{}", set.name());
        }
    }
}

#[test]
fn values_of_a_product_are_within_rounding() {
    for (m, n, k) in [(1, 64, 384), (7, 100, 77), (16, 192, 352), (50, 65, 1536)] {
        let problem = Product::new(9, m, n, k, false);
        let expected = reference::linear(
            &problem.codes,
            &problem.scales,
            &problem.weights,
            &problem.weight_scale,
            &problem.bias,
            k,
        );
        let largest = expected.iter().fold(0.0f64, |max, value| max.max(value.abs()));
        let packed = problem.packed();
        let (rows, stride) = problem.rows();
        let x = CodeRows::new(&rows, stride, &problem.scales);
        for set in sets() {
            let mut values = vec![0.0f32; m * PANEL];
            let mut halves = vec![0u16; m * PANEL];
            for panel in 0..packed.n_panels() {
                set.gemm_f32(&x, &packed, panel, &mut values);
                set.gemm_half(&x, &packed, panel, &mut halves);
                for row in 0..m {
                    for column in 0..PANEL.min(n - panel * PANEL) {
                        let want = expected[row * n + panel * PANEL + column];
                        let got = values[row * PANEL + column];
                        let error = (f64::from(got) - want).abs();
                        assert!(error < 2e-6 * largest, "{}: {got} for {want}", set.name());
                        assert!(is_nearest_half(halves[row * PANEL + column], got), "{}", set.name());
                    }
                }
            }
        }
    }
}

#[test]
fn functions_are_within_their_stated_errors() {
    let mut xs: Vec<f32> = (-40_000..=40_000u32 as i32).map(|i| i as f32 / 4_000.0).collect();
    xs.extend([0.0, -0.0, 1e-30, -1e-30, 15.0, -15.0, 100.0, -100.0, 4.5, -4.5, 4.500_001, -4.500_001]);
    xs.extend([1e4, -1e4, 3e13, -3e13, 2e38, -2e38]);
    for set in sets() {
        for (kind, bound, relative) in [
            (Nonlinearity::Gelu, 1.7e-5, 0.0),
            (Nonlinearity::GeluTanh, 2e-6, 2e-6),
            (Nonlinearity::Relu, 0.0, 0.0),
            (Nonlinearity::Tanh, 1e-6, 0.0),
        ] {
            // Lengths around the vectors'.
            for n in [0, 1, 3, 4, 7, 15, 16, 17, 31, xs.len()] {
                let mut values = xs[..n].to_vec();
                set.activate(kind, &mut values);
                for (&x, &y) in xs.iter().zip(&values) {
                    let error = (f64::from(y) - reference::activate(kind, f64::from(x))).abs();
                    let allowed = bound + relative * f64::from(x.abs()) + 1e-7 * f64::from(x.abs());
                    assert!(error <= allowed, "{} {kind:?}({x}) = {y}, off by {error:e}", set.name());
                }
            }
        }
    }
}

#[test]
fn the_reference_error_function_is_exact() {
    // Values of DLMF table 7.23 / mpmath.
    for (x, expected) in [(0.0, 0.0), (0.5, 0.520_499_877_813_046_5), (1.0, 0.842_700_792_949_714_9)]
        .into_iter()
        .chain([(2.0, 0.995_322_265_018_952_7), (3.0, 0.999_977_909_503_001_4), (4.0, 0.999_999_984_582_742_1)])
    {
        assert!((reference::erf(x) - expected).abs() < 1e-15, "erf({x})");
        assert!((reference::erf(-x) + expected).abs() < 1e-15);
    }
}

#[test]
fn what_binary16_cannot_hold_is_held_to_its_largest_and_an_infinity_is_not_hidden() {
    // Weights of 127 and codes of 255 at scale 1: columns of ±32,385 · 64.
    let (k, n) = (64, PANEL);
    let weights: Vec<i8> = (0..n * k).map(|i| if (i / k).is_multiple_of(2) { 127 } else { -127 }).collect();
    let packed = PackedLinear::new(&weights, &vec![1.0; n], &vec![0.0; n], k);
    let scales = [RowScale { scale: 1.0, low: 0.0 }];
    let x = CodeRows::new(&[255; 64], 64, &scales);
    for set in sets() {
        let mut halves = [0u16; PANEL];
        set.gemm_half(&x, &packed, 0, &mut halves);
        let values = halves.map(half_to_f32);
        assert_eq!((values[0], values[1]), (65_504.0, -65_504.0), "{}", set.name());

        for odd in [f32::INFINITY, f32::NEG_INFINITY] {
            let mut block = [0.5f32; PANEL];
            (block[3], block[9]) = (odd, 2.0);
            let (mut codes, mut scales) = ([0u8; 64], [RowScale::default()]);
            let mut to = CodeRowsMut { codes: &mut codes, stride: 64, scales: &mut scales, range: None };
            set.quantize(Block { data: &block, n_rows: 1, n }, 0..1, &mut to);
            let value = scales[0].low + scales[0].scale * f32::from(codes[0]);
            assert!(value.is_nan(), "{}: a row with {odd} reads {value}", set.name());
        }
    }
}

/// Two sequences in one `qkv`; the second is the one looked at.
struct Heading {
    heads: Heads,
    len: usize,
    first_row: usize,
    qkv: Vec<u16>,
    natural: bool,
    listed: Vec<u32>,
    pooled: usize,
    /// What each query sees.
    keys: Vec<QueryKeys>,
    step: usize,
}

impl Heading {
    /// All keys for all.
    fn full(seed: u64, heads: Heads, len: usize, sharpness: f32) -> Self {
        let mut rng = rng(seed);
        let first_row = 3;
        let n_rows = first_row + len;
        let n = 3 * heads.d_context();
        let mut qkv = vec![f32_to_half(1e4); heads.qkv_panels() * n_rows * PANEL];
        for row in 0..n_rows {
            for column in 0..n {
                let width = if column < heads.d_context() { sharpness } else { 1.0 };
                // Dimensions differ in size and offset, as keys and values of real models do.
                let bias = ((column * 7 % 5) as f32 - 2.0) * 0.2;
                qkv[block_index(n_rows, row, column)] = f32_to_half(rng.random_range(-width..width) * 1.7 + bias);
            }
        }
        let keys = vec![QueryKeys::range(0, len); len];
        Self { heads, len, first_row, qkv, natural: true, listed: Vec::new(), pooled: 0, keys, step: 1 }
    }

    /// A window, and leading keys for all.
    fn window(
        seed: u64,
        heads: Heads,
        len: usize,
        (left, right, leading): (usize, usize, usize),
        sharpness: f32,
    ) -> Self {
        let mut problem = Self::full(seed, heads, len, sharpness);
        problem.keys = (0..len)
            .map(|query| {
                let window = query.saturating_sub(left)..(query + right + 1).min(len);
                let mut keys = QueryKeys::default();
                keys.shared[0] = SlotRange::new(0, leading.min(window.start));
                keys.shared[1] = SlotRange::new(window.start, window.end);
                keys
            })
            .collect();
        problem
    }

    /// Any ranges at all, over all three parts of the slots.
    fn scattered(seed: u64, heads: Heads, len: usize, natural: bool, pooled: usize, step: usize) -> Self {
        let mut problem = Self::full(seed, heads, len, 1.5);
        let mut rng = rng(seed + 1);
        let n_listed = rng.random_range(usize::from(!natural)..len + 1);
        problem.listed = (0..n_listed).map(|_| rng.random_range(0..len as u32)).collect();
        (problem.natural, problem.pooled, problem.step) = (natural, pooled, step);
        let slots = problem.slots();
        let n_slots = slots.n_slots(len);
        let is_gap = |slot: usize| problem.meaning(slot).is_empty();
        problem.keys = (0..len)
            .map(|_| {
                loop {
                    // Six ascending ranges between twelve cuts, none with a gap in it.
                    let mut cuts: Vec<usize> = (0..12).map(|_| rng.random_range(0..n_slots + 1)).collect();
                    cuts.sort_unstable();
                    let mut ranges = cuts.chunks_exact(2).map(|cut| match (cut[0]..cut[1]).any(is_gap) {
                        true => SlotRange::default(),
                        false => SlotRange::new(cut[0], cut[1]),
                    });
                    let keys = QueryKeys {
                        shared: std::array::from_fn(|_| ranges.next().unwrap()),
                        own: std::array::from_fn(|_| ranges.next().unwrap()),
                    };
                    if keys.ranges().any(|range| !range.is_empty()) {
                        break keys;
                    }
                }
            })
            .collect();
        problem
    }

    fn slots(&self) -> KeySlots<'_> {
        KeySlots { natural: self.natural, listed: &self.listed, pooled: self.pooled }
    }

    /// Keys that a slot stands for, empty for a gap: the parts of the slots once more, step by step.
    fn meaning(&self, slot: usize) -> Range<usize> {
        let mut slot = slot;
        if self.natural {
            if slot < self.len.next_multiple_of(KEY_BLOCK) {
                return if slot < self.len { slot..slot + 1 } else { 0..0 };
            }
            slot -= self.len.next_multiple_of(KEY_BLOCK);
        }
        if slot < self.listed.len().next_multiple_of(KEY_BLOCK) {
            return self.listed.get(slot).map_or(0..0, |&key| key as usize..key as usize + 1);
        }
        slot -= self.listed.len().next_multiple_of(KEY_BLOCK);
        (slot * self.pooled).min(self.len)..((slot + 1) * self.pooled).min(self.len)
    }

    fn sequence(&self) -> SequenceHeads<'_> {
        let qkv = HalfPanels { data: &self.qkv, n_rows: self.first_row + self.len };
        SequenceHeads { qkv, heads: self.heads, first_row: self.first_row, len: self.len, slots: self.slots() }
    }

    fn third(&self, third: usize, head: usize) -> Vec<f64> {
        let d = self.heads.d_head;
        let first = third * self.heads.d_context() + head * d;
        let n_rows = self.first_row + self.len;
        let value = |row: usize, j: usize| self.qkv[block_index(n_rows, self.first_row + row, first + j)];
        (0..self.len)
            .flat_map(|row| (0..d).map(move |j| (row, j)))
            .map(|(r, j)| half_to_f32(value(r, j)).into())
            .collect()
    }

    /// Context by one form of attention, queries in blocks of `block`: `[len, d_context]`.
    fn run(&self, attention: &Attention, block: usize) -> Vec<f32> {
        let sequence = self.sequence();
        let lines = attention.packed_lines(self.heads, &sequence.slots, self.len);
        let mut packed = vec![CacheLine::ZERO; lines * self.heads.n_heads];
        let mut scratch = vec![f32::NAN; attention.scratch_of_width(self.heads, 0)];
        for (head, packed) in packed.chunks_exact_mut(lines).enumerate() {
            attention.pack_head(&sequence, head, packed, &mut scratch);
        }
        let n = self.heads.d_context();
        let mut out = Vec::new();
        for first in (0..self.len).step_by(block) {
            let keys = &self.keys[first..(first + block).min(self.len)];
            let queries = Queries { first, keys, step: self.step };
            let mut result = vec![f32::NAN; n.div_ceil(PANEL) * keys.len() * PANEL];
            let mut scratch = vec![f32::NAN; attention.scratch(self.heads, keys)];
            attention.attend(&sequence, 0..self.heads.n_heads, queries, &packed, &mut scratch, &mut result);
            // Heads computed apart give the same numbers, from their own first column on.
            for first_head in (0..self.heads.n_heads).step_by(self.heads.panel_grain()) {
                let run = first_head..(first_head + self.heads.panel_grain()).min(self.heads.n_heads);
                let packed = &packed[run.start * lines..run.end * lines];
                let columns = run.start * self.heads.d_head..run.end * self.heads.d_head;
                let mut apart = vec![f32::NAN; columns.len().div_ceil(PANEL) * keys.len() * PANEL];
                attention.attend(&sequence, run, queries, packed, &mut scratch, &mut apart);
                for row in 0..keys.len() {
                    for column in columns.clone() {
                        let (whole, part) = (
                            block_index(keys.len(), row, column),
                            block_index(keys.len(), row, column - columns.start),
                        );
                        assert_eq!(result[whole].to_bits(), apart[part].to_bits(), "row {row}, column {column}");
                    }
                }
            }
            for row in 0..keys.len() {
                out.extend((0..n).map(|column| result[block_index(keys.len(), row, column)]));
            }
        }
        out
    }

    /// Context in f64.
    fn expected(&self) -> Vec<f64> {
        let (d, n) = (self.heads.d_head, self.heads.d_context());
        let seen = |query: usize| self.keys[query].ranges().flatten().map(|slot| self.meaning(slot)).collect();
        let mut out = vec![0.0; self.len * n];
        for head in 0..self.heads.n_heads {
            let [q, k, v] = [0, 1, 2].map(|third| self.third(third, head));
            for (row, values) in reference::attend(&q, &k, &v, d, seen).chunks_exact(d).enumerate() {
                out[row * n + head * d..row * n + (head + 1) * d].copy_from_slice(values);
            }
        }
        out
    }
}

/// Root mean square of the error relative to that of the expected values.
fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let error: f64 = got.iter().zip(expected).map(|(&got, want)| (f64::from(got) - want).powi(2)).sum();
    (error / expected.iter().map(|want| want * want).sum::<f64>()).sqrt()
}

/// Every instruction set with every form of attention, and the relative error that the form states.
fn attentions(heads: Heads) -> Vec<(Attention, f64)> {
    let bound = |form| match form {
        AttentionForm::F32 => 1e-5,
        AttentionForm::Int16 => 3e-3,
        AttentionForm::Int8 => 4e-2,
    };
    let all = sets().into_iter().flat_map(|set| AttentionForm::ALL.map(|form| Some((set.with_attention(form)?, form))));
    all.flatten().map(|(set, form)| (set.attention(heads, 1), bound(form))).collect()
}

#[test]
fn attention_is_within_the_stated_error_for_every_shape() {
    let shapes = [(2, 32), (1, 64), (3, 16), (2, 48), (1, 20), (2, 7), (1, 128), (5, 32)];
    for (index, (n_heads, d_head)) in shapes.into_iter().enumerate() {
        for len in [1, 2, 8, 15, 16, 17, 33, 64, 100] {
            let heads = Heads { n_heads, d_head };
            let problem = Heading::full(index as u64, heads, len, 1.0);
            let expected = problem.expected();
            for (attention, bound) in attentions(heads) {
                let got = problem.run(&attention, 48);
                let error = relative_error(&got, &expected);
                assert!(error < bound, "{attention:?} {heads:?} length {len}: {error:e}");
            }
        }
    }
}

#[test]
fn attention_holds_its_error_at_length_and_for_flat_and_sharp_scores() {
    let heads = Heads { n_heads: 1, d_head: 32 };
    for (len, window) in [(512, None), (1500, None), (700, Some((64, 64, 1)))] {
        for sharpness in [0.05, 1.0, 6.0] {
            let problem = match window {
                None => Heading::full(5, heads, len, sharpness),
                Some(window) => Heading::window(5, heads, len, window, sharpness),
            };
            let expected = problem.expected();
            for (attention, bound) in attentions(heads) {
                if problem.keys[0].ranges().map(|range| range.len()).sum::<usize>() > attention.form().max_keys() {
                    continue;
                }
                let error = relative_error(&problem.run(&attention, 40), &expected);
                assert!(error < bound, "{attention:?} length {len}, sharpness {sharpness}: {error:e}");
            }
        }
    }
}

/// Heads too wide for the sums of a form are left to f32, and long rows to forms that are fine enough.
#[test]
fn forms_are_used_where_they_hold() {
    for set in sets() {
        let chosen = |d_head, n_keys| set.attention(Heads { n_heads: 1, d_head }, n_keys).form();
        assert_eq!(
            chosen(513, 10),
            if chosen(32, 10) == AttentionForm::Int8 { AttentionForm::Int8 } else { AttentionForm::F32 }
        );
        assert_ne!(chosen(32, 513), AttentionForm::Int8);
        for form in AttentionForm::ALL {
            if let Some(set) = set.with_attention(form) {
                assert_eq!(set.attention(Heads { n_heads: 1, d_head: 32 }, 1 << 20).form(), form);
            }
        }
    }
}

/// The integer forms compute the same integers everywhere, so that instruction sets differ by the rounding of a few f32
/// operations only.
#[test]
fn integer_forms_agree_between_instruction_sets() {
    let heads = Heads { n_heads: 2, d_head: 32 };
    let problem = Heading::scattered(3, heads, 90, true, 7, 1);
    for form in [AttentionForm::Int16, AttentionForm::Int8] {
        let with_form = sets().into_iter().filter_map(|set| set.with_attention(form));
        let results: Vec<Vec<f32>> = with_form.map(|set| problem.run(&set.attention(heads, 1), 48)).collect();
        for other in &results[1..] {
            let first: Vec<f64> = results[0].iter().map(|&x| f64::from(x)).collect();
            let error = relative_error(other, &first);
            // A code that lies between two integers may round either way.
            assert!(error < if form == AttentionForm::Int16 { 1e-4 } else { 3e-3 }, "{form:?}: {error:e}");
        }
    }
}

/// Hidden slots weigh nothing for a query that is nothing itself, nor among keys that are nothing.
#[test]
fn a_zero_query_sees_its_keys_alike_and_no_others() {
    let heads = Heads { n_heads: 2, d_head: 32 };
    for (third, len) in [(0, 17), (1, 17), (0, 40), (0, 90)] {
        let mut problem = Heading::full(7, heads, len, 1.0);
        let n_rows = problem.first_row + len;
        for row in 0..n_rows {
            for column in third * heads.d_context()..(third + 1) * heads.d_context() {
                problem.qkv[block_index(n_rows, row, column)] = 0;
            }
        }
        let expected = problem.expected();
        for (attention, bound) in attentions(heads) {
            let error = relative_error(&problem.run(&attention, 48), &expected);
            assert!(error < bound, "{attention:?}, third {third}, {len} tokens: {error:e}");
        }
    }
}

/// Queries that all see the same may be computed in a way of their own; one that sees less must not change the others.
#[test]
fn a_query_has_the_same_bits_beside_queries_that_see_something_else() {
    for (n_heads, d_head) in [(2, 32), (1, 64), (3, 20), (1, 128)] {
        let heads = Heads { n_heads, d_head };
        for len in [2, 16, 21, 33, 64, 100, 257, 511] {
            let same = Heading::full(len as u64, heads, len, 1.5);
            let mut other = Heading::full(len as u64, heads, len, 1.5);
            other.keys[len - 1] = QueryKeys::range(0, len / 2);
            for (attention, _) in attentions(heads) {
                let [a, b] = [&same, &other].map(|problem| problem.run(&attention, len));
                let rows = (len - 1) * heads.d_context();
                let equal = a[..rows].iter().zip(&b[..rows]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(equal && a[rows..] != b[rows..], "{attention:?} {heads:?}, {len} tokens");
            }
        }
    }
}

/// AMX multiplies integers where AVX-512 does, and all else is the same: so is every bit.
#[test]
fn the_matrix_unit_gives_the_bits_of_avx512() {
    let set = |name| Isa::force(name).map(KernelSet::new);
    let (Ok(amx), Ok(avx512)) = (set(IsaName::AmxInt8), set(IsaName::Avx512Vnni)) else {
        println!("skipped: this machine has no AMX");
        return;
    };
    for (n, k) in [(64, 64), (65, 100), (128, 352), (192, 384), (64, 400), (70, 1000), (64, 1536)] {
        for m in [1, 15, 16, 17, 31, 32, 33, 48, 50, 64, 79, 96] {
            let problem = Product::new(m as u64, m, n, k, false);
            let (packed, (rows, stride)) = (problem.packed(), problem.rows());
            let whole = CodeRows::new(&rows, stride, &problem.scales);
            // The last row ends with its last code, so that no line may be read to its end.
            let codes = &rows[..(m - 1) * stride + k.next_multiple_of(4)];
            let short = CodeRows::new(codes, stride, &problem.scales);
            for x in [whole, short] {
                for panel in 0..packed.n_panels() {
                    let [a, b] = [&amx, &avx512].map(|set| {
                        let mut out = vec![f32::NAN; m * PANEL];
                        set.gemm_f32(&x, &packed, panel, &mut out);
                        out
                    });
                    assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{m}x{n}x{k}, panel {panel}");
                }
            }
        }
    }
    for (n_in, group) in [(64, 64), (192, 64), (256, 128), (192, 32), (200, 64)] {
        for m in [1, 16, 31, 33, 64, 80] {
            let problem = Product::new(m as u64, m, 100, n_in, false);
            let n_groups = n_in.div_ceil(group);
            let scale = floats(&mut rng(3), 100 * n_groups, 0.01);
            let parts = GroupParts { codes: &problem.weights, scale: &scale, offset: None, group };
            let packed = PackedGroups::new(parts, LayerShape { bias: &problem.bias, n_in });
            let packed = PackedMatrix::Groups(packed);
            let (rows, stride) = problem.rows();
            let x = CodeRows::new(&rows, stride, &problem.scales);
            for panel in 0..packed.n_panels() {
                let [a, b] = [&amx, &avx512].map(|set| {
                    let (mut out, mut halves) = (vec![f32::NAN; m * PANEL], vec![0; m * PANEL]);
                    set.product_f32(&x, &packed, panel..packed.n_panels(), &mut out);
                    set.product_half(&x, &packed, panel..packed.n_panels(), &mut halves);
                    (out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), halves)
                });
                assert!(a == b, "{m} rows of {n_in} in groups of {group}, panel {panel}");
            }
        }
    }
    for (n_heads, d_head) in [(2, 32), (1, 64), (3, 20), (1, 96), (1, 128), (1, 160)] {
        let heads = Heads { n_heads, d_head };
        for len in [1, 15, 16, 17, 40, 64, 100, 256, 257, 300, 511, 512] {
            let problem = Heading::full(len as u64, heads, len, 1.5);
            for block in [5, 16, 48] {
                let [a, b] = [&amx, &avx512].map(|set| {
                    let set = set.with_attention(AttentionForm::Int8).unwrap();
                    problem.run(&set.attention(heads, len), block)
                });
                let same = a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{heads:?}, {len} tokens, blocks of {block}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_over_any_ranges_is_the_definition_and_does_not_depend_on_the_block(
        len in 1usize..150, block in 1usize..60, seed in 0u64..1000, kind in 0usize..3, pooled in 0usize..9,
        step in 1usize..5, window in (0usize..70, 0usize..70, 0usize..40),
    ) {
        let heads = Heads { n_heads: 2, d_head: 32 };
        let problem = match kind {
            0 => Heading::window(seed, heads, len, window, 1.5),
            _ => Heading::scattered(seed, heads, len, kind == 1, pooled, step),
        };
        let expected = problem.expected();
        for (attention, bound) in attentions(heads) {
            let got = problem.run(&attention, block);
            let error = relative_error(&got, &expected);
            prop_assert!(error < bound, "{:?}: {:e}", attention, error);
            let whole = problem.run(&attention, len);
            let same = got.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same, "{:?}: blocks of {} differ from one block", attention, block);
        }
    }
}

#[test]
#[should_panic(expected = "codes")]
fn rows_whose_sizes_have_no_product_are_refused() {
    let packed = PackedLinear::new(&[1; 64 * 64], &[1.0; 64], &[0.0; 64], 64);
    let scales = [RowScale::default(); 3];
    let x = CodeRows::new(&[0; 192], 1 << 63, &scales);
    sets()[0].gemm_f32(&x, &packed, 0, &mut [0.0; 3 * PANEL]);
}

#[test]
#[should_panic(expected = "elements")]
fn a_block_whose_size_is_beyond_the_numbers_is_refused() {
    let mut to = CodeRowsMut { codes: &mut [0; 64], stride: 64, scales: &mut [RowScale::default()], range: None };
    sets()[0].quantize(Block { data: &[], n_rows: 1 << 58, n: 64 }, 0..1, &mut to);
}

#[test]
fn weights_that_were_split_are_refused_where_codes_are_not_turned_for_them() {
    let split = PackedLinear::new(&[127; 64 * 64], &[1.0; 64], &[0.0; 64], 64).split(f64::INFINITY);
    let scales = [RowScale::default(); 2];
    for set in sets() {
        let product = || set.gemm_f32(&CodeRows::new(&[0; 128], 64, &scales), &split, 0, &mut [0.0; 2 * PANEL]);
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(product)).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.starts_with("weights with outliers"), "{}: {message}", set.name());
    }
}

#[test]
fn weights_are_split_where_that_pays_and_the_kernels_want_it() {
    let near_zero: Vec<i8> = (0..64 * 64).map(|i| [3, -20, 40, 7, -90, 0, 12, -1, 127, 5, 9][i % 11]).collect();
    for (weights, pays) in [(near_zero, true), (vec![127; 64 * 64], false)] {
        let packed = || PackedMatrix::Dense(PackedLinear::new(&weights, &[1.0; 64], &[0.0; 64], 64));
        for set in sets() {
            let fitted = set.fit(packed());
            // Outliers take room.
            let split = fitted.bytes() > packed().bytes();
            assert_eq!(split, pays && set.turns(), "{}: {} bytes", set.name(), fitted.bytes());
        }
    }
}

#[test]
#[should_panic(expected = "codes")]
fn too_short_rows_are_refused() {
    let packed = PackedLinear::new(&[1; 64 * 64], &[1.0; 64], &[0.0; 64], 64);
    let scales = [RowScale::default(); 2];
    let x = CodeRows::new(&[0; 127], 64, &scales);
    sets()[0].gemm_f32(&x, &packed, 0, &mut [0.0; 2 * PANEL]);
}
