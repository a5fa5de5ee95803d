//! Row passes of every instruction set of this machine against `kernels::reference`, and products whose values go on into one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::ops::Range;

use common::forms::{KINDS, Kind, store};
use common::numbers::{floats, rng, sets};
use niwaki::kernels::layout::{CodeRows, PANEL, RowScale, RowSums, RowTop, block_index, code_stride};
use niwaki::kernels::{Block, CodeRowsMut, IsaName, KernelSet, Nonlinearity, Norm, Reduction, Stream, reference};
use niwaki::quant::pack_matrix;
use rand::RngExt;

/// Row-major values as a block in panels; what no column stands for is poison.
fn to_block(values: &[f32], n: usize) -> Vec<f32> {
    let n_rows = values.len() / n;
    let mut block = vec![f32::NAN; n.div_ceil(PANEL) * n_rows * PANEL];
    for (index, &value) in values.iter().enumerate() {
        block[block_index(n_rows, index / n, index % n)] = value;
    }
    block
}

/// Addition and LayerNorm at once.
fn add_norm(
    set: &KernelSet,
    block: Option<(Block<'_>, Range<usize>)>,
    rows: &mut [f32],
    norm: Norm<'_>,
    to: &mut CodeRowsMut<'_>,
) {
    let mut sums = vec![RowSums::EMPTY; to.scales.len()];
    let mut stream = Stream { rows, n: norm.gain.len(), sums: &mut sums };
    set.add(block, &mut stream);
    set.normalize(&mut stream, norm, to);
}

/// Room for the codes of rows.
fn coded(n_rows: usize, n: usize) -> (Vec<u8>, Vec<RowScale>) {
    (vec![0; n_rows * code_stride(n)], vec![RowScale::default(); n_rows])
}

fn into<'a>(codes: &'a mut [u8], scales: &'a mut [RowScale], n: usize) -> CodeRowsMut<'a> {
    CodeRowsMut { codes, stride: code_stride(n), scales, range: None }
}

#[test]
fn rows_are_quantized_as_the_reference_does() {
    for n in [1, 4, 15, 16, 63, 64, 65, 77, 100, 384] {
        let mut values = floats(&mut rng(n as u64), 5 * n, 3.0);
        values[n..2 * n].fill(0.25); // a constant row
        values[2 * n..3 * n].iter_mut().for_each(|value| *value = value.abs() + 10.0); // no zero inside
        let block = to_block(&values, n);
        let stride = code_stride(n);
        for set in sets() {
            for rows in [0..5, 2..4, 3..3] {
                let mut codes = vec![0xcdu8; rows.len() * stride];
                let mut scales = vec![RowScale::default(); rows.len()];
                let mut to = CodeRowsMut { codes: &mut codes, stride, scales: &mut scales, range: None };
                set.quantize(Block { data: &block, n_rows: 5, n }, rows.clone(), &mut to);
                for (index, row) in rows.enumerate() {
                    let (scale, expected) = reference::quantize(&values[row * n..(row + 1) * n]);
                    assert_eq!(scales[index], scale, "{} width {n}", set.name());
                    assert_eq!(&codes[index * stride..index * stride + n], expected, "{} width {n}", set.name());
                    let gap = &codes[index * stride + n..(index + 1) * stride];
                    assert!(gap.iter().all(|&byte| byte == 0xcd), "wrote beyond the row");
                }
            }
        }
    }
}

/// Codes of activated rows stand for what the function makes of the rows, and are those of each row alone.
#[test]
fn activated_rows_are_coded_within_the_stated_error() {
    for n in [1, 5, 16, 63, 64, 65, 77, 128, 384] {
        let n_rows = 9;
        let mut values = floats(&mut rng(n as u64), n_rows * n, 3.0);
        values[n..2 * n].iter_mut().for_each(|value| *value -= 5.0); // all far below 0
        values[2 * n..3 * n].iter_mut().for_each(|value| *value = -0.3 + *value / 100.0);
        values[3 * n..4 * n].iter_mut().for_each(|value| *value *= 10.0);
        values[4 * n..5 * n].iter_mut().for_each(|value| *value = value.abs() + 1.0);
        values[5 * n..6 * n].fill(0.0);
        let (block, stride) = (to_block(&values, n), code_stride(n));
        for set in sets() {
            let in_pieces = matches!(set.isa().name(), IsaName::Avx512Vnni | IsaName::AmxInt8);
            for kind in [Nonlinearity::Gelu, Nonlinearity::GeluTanh, Nonlinearity::Relu, Nonlinearity::Tanh] {
                let block = Block { data: &block, n_rows, n };
                let codes_of = |rows: Range<usize>| {
                    let mut codes = vec![0xcdu8; rows.len() * stride];
                    let mut scales = vec![RowScale::default(); rows.len()];
                    let mut to = CodeRowsMut { codes: &mut codes, stride, scales: &mut scales, range: None };
                    set.quantize_activated(block, rows, kind, None, &mut to);
                    (codes, scales)
                };
                let (codes, scales) = codes_of(0..n_rows);
                for row in 0..n_rows {
                    let what = format!("{} {kind:?} width {n}, row {row}", set.name());
                    let alone = codes_of(row..row + 1);
                    let of_row = &codes[row * stride..(row + 1) * stride];
                    assert!(alone == (of_row.to_vec(), vec![scales[row]]), "{what}: alone");
                    assert!(of_row[n..].iter().all(|&byte| byte == 0xcd), "{what}: wrote beyond the row");
                    let RowScale { scale, low } = scales[row];
                    let xs = &values[row * n..(row + 1) * n];
                    let top = xs.iter().fold(f32::MIN, |top, &x| top.max(x));
                    let is_gelu = matches!(kind, Nonlinearity::Gelu | Nonlinearity::GeluTanh);
                    let pieces = if in_pieces && is_gelu && (1.0..=12.0).contains(&top) { 0.08 * scale } else { 0.0 };
                    for (&x, &code) in xs.iter().zip(of_row) {
                        let want = reference::activate(kind, f64::from(x));
                        let error = (f64::from(low + scale * f32::from(code)) - want).abs();
                        let allowed = 0.51 * scale + pieces + 2e-5 + 1e-6 * x.abs();
                        assert!(error <= f64::from(allowed), "{what}: {x} has code {code}, off by {error}");
                    }
                }
            }
        }
    }
}

/// What a product hands on to a row pass is what it would have stored, bit by bit, in every form and for every width.
#[test]
fn products_go_on_into_row_passes_as_if_they_had_been_stored() {
    for (n_out, n_in) in [(64, 64), (128, 100), (100, 64), (192, 384), (1, 8), (70, 36)] {
        for n_rows in [1, 5, 6, 7, 13, 64] {
            let mut rng = rng((n_out * n_rows) as u64);
            let stride = code_stride(n_in);
            let codes: Vec<u8> = (0..n_rows * stride).map(|_| rng.random()).collect();
            let scales: Vec<RowScale> =
                (0..n_rows).map(|_| RowScale { scale: rng.random_range(0.001..0.01), low: -0.7 }).collect();
            let x = CodeRows::new(&codes, stride, &scales);
            let (weights, bias) = (floats(&mut rng, n_out * n_in, 0.4), floats(&mut rng, n_out, 0.5));
            let residual = floats(&mut rng, n_rows * n_out, 2.0);
            let (gain, shift) = (floats(&mut rng, n_out, 1.5), floats(&mut rng, n_out, 0.3));
            for kind in KINDS.into_iter().filter(|kind| !matches!(kind, Kind::LowRank | Kind::LowRankCodebook)) {
                let packed = pack_matrix(&store(kind, &weights, n_in), &bias, n_in);
                for set in sets() {
                    let what = format!("{} {kind:?} {n_rows}x{n_in}x{n_out}", set.name());
                    let mut stored = vec![f32::NAN; packed.n_panels() * n_rows * PANEL];
                    let mut topped = stored.clone();
                    let mut tops = vec![RowTop::EMPTY; n_rows];
                    let (mut room, mut sums) = (vec![f32::NAN; n_rows * PANEL], vec![RowSums::EMPTY; n_rows]);
                    let mut rows = residual.clone();
                    let mut stream = Stream { rows: &mut rows, n: n_out, sums: &mut sums };
                    for panel in 0..packed.n_panels() {
                        let at = panel * n_rows * PANEL..(panel + 1) * n_rows * PANEL;
                        set.product_f32(&x, &packed, panel..packed.n_panels(), &mut stored[at.clone()]);
                        set.product_topped(&x, &packed, panel..packed.n_panels(), &mut tops, &mut topped[at]);
                        set.product_add(&x, &packed, panel..packed.n_panels(), &mut stream, &mut room);
                    }
                    let block = Block { data: &stored, n_rows, n: n_out };
                    let codes_of = |tops: Option<&[RowTop]>, data: &[f32]| {
                        let (mut codes, mut scales) = coded(n_rows, n_out);
                        let mut to = into(&mut codes, &mut scales, n_out);
                        let block = Block { data, n_rows, n: n_out };
                        set.quantize_activated(block, 0..n_rows, Nonlinearity::Gelu, tops, &mut to);
                        (codes, scales)
                    };
                    assert!(codes_of(Some(&tops), &topped) == codes_of(None, &stored), "{what}: activated");

                    let norm = Norm { gain: &gain, bias: &shift, eps: 1e-5 };
                    let (mut codes, mut scales) = coded(n_rows, n_out);
                    set.normalize(&mut stream, norm, &mut into(&mut codes, &mut scales, n_out));
                    let mut later = residual.clone();
                    let (mut codes_later, mut scales_later) = coded(n_rows, n_out);
                    let mut to = into(&mut codes_later, &mut scales_later, n_out);
                    add_norm(&set, Some((block, 0..n_rows)), &mut later, norm, &mut to);
                    assert!(codes == codes_later && scales == scales_later, "{what}: codes of the residual stream");
                    let equal = rows.iter().zip(&later).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(equal, "{what}: the residual stream");
                }
            }
        }
    }
}

/// Rows whose mean is far from 0 lose nothing by having been summed up with their squares.
#[test]
fn rows_far_from_zero_are_normalised_around_their_mean() {
    let n = 384;
    let ones = vec![1.0; n];
    let zeros = vec![0.0; n];
    for (centre, width) in [(0.0, 1.0), (0.9, 1.0), (3.0, 1.0), (100.0, 1.0), (-1000.0, 0.5), (0.0, 1e-3)] {
        let residual: Vec<f32> = floats(&mut rng(7), 5 * n, width).iter().map(|x| x + centre).collect();
        for set in sets() {
            let mut rows = residual.clone();
            let (mut codes, mut scales) = coded(5, n);
            let norm = Norm { gain: &ones, bias: &zeros, eps: 1e-12 };
            add_norm(&set, None, &mut rows, norm, &mut into(&mut codes, &mut scales, n));
            for (row, from) in rows.chunks(n).zip(residual.chunks(n)) {
                let from: Vec<f64> = from.iter().map(|&x| x.into()).collect();
                let want = reference::layer_norm(&from, &ones, &zeros, 1e-12);
                // What the inputs themselves are rounded to.
                let allowed = 4e-6 + f64::from(1.2e-7 * (centre / width).abs()) * 2.0;
                for (got, want) in row.iter().zip(&want) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error < allowed, "{}: {got} for {want} around {centre}", set.name());
                }
            }
        }
    }
}

/// Every row gets the given scale; what lies outside is clipped, also what is no number.
#[test]
fn a_fixed_range_clips_what_lies_outside_of_it() {
    let range = RowScale { scale: 3.0 / 255.0, low: -1.0 };
    let expected = |value: f32| ((value - range.low) * (1.0 / range.scale)).clamp(0.0, 255.0).round_ties_even();
    for n in [1, 15, 64, 77, 384] {
        let mut values = floats(&mut rng(n as u64), 4 * n, 6.0);
        values[0] = f32::INFINITY;
        values[n] = -1e30;
        let block = to_block(&values, n);
        let stride = code_stride(n);
        let ones = vec![1.0; n];
        for set in sets() {
            let (mut codes, mut scales) = (vec![0u8; 4 * stride], vec![RowScale::default(); 4]);
            let mut to = CodeRowsMut { codes: &mut codes, stride, scales: &mut scales, range: Some(range) };
            set.quantize(Block { data: &block, n_rows: 4, n }, 0..4, &mut to);
            let rows = values.chunks(n).zip(codes.chunks(stride));
            for (value, code) in rows.flat_map(|(values, codes)| values.iter().zip(codes)) {
                assert!((f32::from(*code) - expected(*value)).abs() <= 1.0, "{}: {code} for {value}", set.name());
            }
            assert!(scales.iter().all(|scale| (scale.scale - range.scale).abs() < 1e-8 && scale.low == range.low));
            assert_eq!((codes[0], codes[stride]), (255, 0), "{}", set.name());

            // The same of a LayerNorm's result.
            let mut rows: Vec<f32> = floats(&mut rng(n as u64 + 1), 4 * n, 6.0);
            let norm = Norm { gain: &ones, bias: &ones, eps: 1e-5 };
            let mut to = CodeRowsMut { codes: &mut codes, stride, scales: &mut scales, range: Some(range) };
            add_norm(&set, None, &mut rows, norm, &mut to);
            let rows = rows.chunks(n).zip(codes.chunks(stride));
            for (value, code) in rows.flat_map(|(values, codes)| values.iter().zip(codes)) {
                assert!((f32::from(*code) - expected(*value)).abs() <= 1.0, "{}: {code} for {value}", set.name());
            }
        }
    }
}

#[test]
fn residual_and_norm_are_within_the_stated_error() {
    for n in [1, 5, 16, 60, 64, 72, 100, 384, 768] {
        let mut rng = rng(n as u64);
        let n_rows = 3;
        let add = floats(&mut rng, n_rows * n, 4.0);
        let residual = floats(&mut rng, n_rows * n, 2.0);
        let gain: Vec<f32> = floats(&mut rng, n, 1.0).iter().map(|x| 1.0 + x / 2.0).collect();
        let bias = floats(&mut rng, n, 0.5);
        let block = to_block(&add, n);
        let norm = Norm { gain: &gain, bias: &bias, eps: 1e-5 };
        let stride = code_stride(n);
        for set in sets() {
            for with_block in [true, false] {
                let mut rows = residual.clone();
                let mut codes = vec![0u8; n_rows * stride];
                let mut scales = vec![RowScale::default(); n_rows];
                let mut to = CodeRowsMut { codes: &mut codes, stride, scales: &mut scales, range: None };
                let block = with_block.then_some((Block { data: &block, n_rows, n }, 0..n_rows));
                add_norm(&set, block, &mut rows, norm, &mut to);
                for row in 0..n_rows {
                    let at = row * n..(row + 1) * n;
                    let sum = residual[at.clone()].iter().zip(&add[at.clone()]);
                    let sum: Vec<f64> = sum.map(|(&r, &a)| f64::from(if with_block { r + a } else { r })).collect();
                    let expected = reference::layer_norm(&sum, &gain, &bias, 1e-5);
                    let largest = expected.iter().fold(1.0f64, |max, value| max.max(value.abs()));
                    for (got, want) in rows[at.clone()].iter().zip(&expected) {
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < 2e-6 * largest, "{} width {n}: {got} for {want}", set.name());
                    }
                    let (scale, expected) = reference::quantize(&rows[at]);
                    assert_eq!(scales[row], scale, "{} width {n}", set.name());
                    assert_eq!(&codes[row * stride..row * stride + n], expected, "{} width {n}", set.name());
                }
            }
        }
    }
}

#[test]
fn embedding_rows_are_added_and_rows_are_reduced() {
    for n in [1, 7, 16, 33, 384] {
        let mut rng = rng(n as u64);
        let codes: Vec<i8> = (0..n).map(|_| rng.random()).collect();
        let start = floats(&mut rng, n, 1.0);
        let rows = floats(&mut rng, 9 * n, 2.0);
        for set in sets() {
            let mut row = start.clone();
            set.add_codes(&mut row, &codes, 0.037);
            for c in 0..n {
                let want = f64::from(start[c]) + 0.037f32 as f64 * f64::from(codes[c]);
                assert!((f64::from(row[c]) - want).abs() < 1e-6, "{}", set.name());
            }
            for kind in [Reduction::Max, Reduction::Sum { factor: 1.0 / 9.0 }] {
                let mut out = vec![0.0f32; n];
                set.reduce(kind, &rows, &mut out);
                for (got, want) in out.iter().zip(reference::reduce(kind, &rows, n)) {
                    assert!((f64::from(*got) - want).abs() < 2e-6, "{} {kind:?}: {got} for {want}", set.name());
                }
            }
        }
    }
}
