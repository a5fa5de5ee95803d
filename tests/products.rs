//! Matrix products of every form, on every instruction set of this machine, against plain loops over the stored numbers.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::forms::{KINDS, Kind, store};
use common::numbers::sets;
use niwaki::kernels::forms::PackedMatrix;
use niwaki::kernels::layout::{CodeRows, PANEL, RowScale, code_stride};
use niwaki::kernels::{f32_to_half, half_to_f32, reference};
use niwaki::quant::{Bitmap, BlockSparse, Codebook4, Weight, pack_matrix};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Outputs and inputs: multiples of everything, of nothing, and single ones.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (64, 8), (63, 3), (65, 5), (128, 64), (100, 77), (96, 352), (32, 130), (192, 36)];

/// Rows of codes; the gap between rows holds garbage, which must not show.
struct Rows {
    codes: Vec<u8>,
    scales: Vec<RowScale>,
    stride: usize,
    n_in: usize,
}

impl Rows {
    fn new(rng: &mut StdRng, n_rows: usize, n_in: usize, extreme: bool) -> Self {
        let stride = code_stride(n_in);
        let mut codes = vec![0xabu8; n_rows * stride];
        for row in codes.chunks_exact_mut(stride) {
            for code in &mut row[..n_in] {
                *code = if extreme { [0, 255][rng.random_range(0..2)] } else { rng.random() };
            }
        }
        let scale = |_| RowScale { scale: rng.random_range(0.001..0.1), low: rng.random_range(-5.0..1.0) };
        Self { codes, scales: (0..n_rows).map(scale).collect(), stride, n_in }
    }

    fn view(&self) -> CodeRows<'_> {
        CodeRows::new(&self.codes, self.stride, &self.scales)
    }

    fn dense(&self) -> Vec<u8> {
        self.codes.chunks_exact(self.stride).flat_map(|row| row[..self.n_in].to_vec()).collect()
    }
}

fn floats(rng: &mut StdRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// The forms whose sums are integers, with tables of every reach and random or extreme codes, and their codes.
fn integer_forms(
    rng: &mut StdRng,
    n_out: usize,
    n_in: usize,
    extreme: bool,
) -> Vec<(String, Weight<'static>, Vec<i8>)> {
    let mut forms = Vec::new();
    for reach in [7i8, 32, 33, 64, 65, 127] {
        let mut table: [i8; 16] = std::array::from_fn(|_| rng.random_range(-reach..=reach));
        (table[0], table[15]) = (reach, -reach);
        let indices: Vec<u8> = (0..n_out * n_in)
            .map(|_| if extreme { [0, 15][rng.random_range(0..2)] } else { rng.random_range(0..16) })
            .collect();
        let codes = indices.iter().map(|&index| table[usize::from(index)]).collect();
        let weight = Weight::Codebook4(Codebook4 {
            indices: niwaki::quant::pack_nibbles(&indices, n_in).into(),
            table,
            scale: floats(rng, n_out).iter().map(|x| x.abs() + 0.01).collect(),
            zero: None,
            n_groups: 1,
        });
        forms.push((format!("codebook within {reach}"), weight, codes));
    }
    for width in [32, 64] {
        for percent in [0, 25, 50, 100] {
            let values: Vec<f32> = floats(rng, n_out * n_in)
                .iter()
                .map(|&x| if extreme { 127.0f32.copysign(x) } else { (x * 127.0).round() })
                .collect();
            let n_blocks = n_out.div_ceil(width) * n_in.div_ceil(4);
            let keep: Vec<bool> = (0..n_blocks).map(|_| rng.random_range(0..100) < percent).collect();
            let sparse = BlockSparse::encode(&values, n_in, width, Some(&keep));
            let codes = sparse.dense_codes(n_in);
            forms.push((format!("blocks of {width} at {percent} %"), Weight::BlockSparse(sparse), codes));
        }
    }
    let thinned: Vec<f32> = floats(rng, n_out * n_in).iter().map(|&x| if x > 0.5 { 0.0 } else { x }).collect();
    let bitmap = Bitmap::encode(&thinned, n_in);
    let codes = bitmap.dense_codes(n_in);
    forms.push(("bitmap".to_owned(), Weight::Bitmap(bitmap), codes));
    forms
}

#[test]
fn integer_sums_are_bit_equal_to_the_reference() {
    let mut rng = StdRng::seed_from_u64(1);
    for (n_out, n_in) in SHAPES {
        for extreme in [false, true] {
            for (name, weight, codes) in integer_forms(&mut rng, n_out, n_in, extreme) {
                weight.check(n_out, n_in).unwrap();
                let packed = pack_matrix(&weight, &vec![0.5; n_out], n_in);
                assert_eq!((packed.n_out(), packed.n_in(), packed.n_panels()), (n_out, n_in, n_out.div_ceil(PANEL)));
                for n_rows in [0, 1, 2, 3, 4, 5, 6, 7, 11, 13, 37] {
                    let x = Rows::new(&mut rng, n_rows, n_in, extreme);
                    let expected = reference::gemm_i32(&x.dense(), &codes, n_in);
                    for set in sets() {
                        let mut out = vec![i32::MIN; n_rows * PANEL];
                        for panel in 0..packed.n_panels() {
                            set.product_i32(&x.view(), &packed, panel, &mut out);
                            for row in 0..n_rows {
                                for column in 0..PANEL.min(n_out - panel * PANEL) {
                                    let n = panel * PANEL + column;
                                    assert_eq!(
                                        out[row * PANEL + column],
                                        expected[row * n_out + n],
                                        "{} {name} {n_rows}x{n_out}x{n_in} [{row}, {n}]",
                                        set.isa()
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_widest_sums_neither_overflow_nor_saturate() {
    let n_in = 65_536;
    for entry in [-128i8, -64, -32, 32, 64, 127] {
        let codebook = Weight::Codebook4(Codebook4 {
            indices: vec![0; n_in / 2].into(),
            table: [entry; 16],
            scale: vec![1.0].into(),
            zero: None,
            n_groups: 1,
        });
        let blocks = Weight::BlockSparse(BlockSparse {
            width: 64,
            mask: vec![255; n_in / 32].into(),
            blocks: vec![entry; n_in * 64].into(),
            scale: vec![1.0].into(),
        });
        let codes = vec![255u8; n_in];
        let scales = [RowScale { scale: 1.0, low: 0.0 }];
        for weight in [codebook, blocks] {
            let packed = pack_matrix(&weight, &[0.0], n_in);
            for set in sets() {
                let mut out = vec![0i32; PANEL];
                set.product_i32(&CodeRows::new(&codes, n_in, &scales), &packed, 0, &mut out);
                assert_eq!(out[0], 65_536 * 255 * i32::from(entry), "{} {}", set.isa(), weight.scheme());
            }
        }
    }
}

/// `x Wᵀ + b` over the numbers that the stored form stands for.
fn linear(x: &Rows, weight: &Weight<'_>, bias: &[f32]) -> Vec<f64> {
    let values = weight.to_f32(x.n_in);
    let mut out = Vec::new();
    for (codes, scale) in x.codes.chunks_exact(x.stride).zip(&x.scales) {
        let x_value = |code: u8| f64::from(scale.low) + f64::from(scale.scale) * f64::from(code);
        for (row, &bias) in values.chunks_exact(x.n_in).zip(bias) {
            let sum: f64 = codes.iter().zip(row).map(|(&code, &weight)| x_value(code) * f64::from(weight)).sum();
            out.push(sum + f64::from(bias));
        }
    }
    out
}

#[test]
fn values_are_those_of_the_stored_numbers() {
    let mut rng = StdRng::seed_from_u64(2);
    for (n_out, n_in) in SHAPES {
        for kind in KINDS.into_iter().filter(|kind| !matches!(kind, Kind::LowRank | Kind::LowRankCodebook)) {
            let weight = store(kind, &floats(&mut rng, n_out * n_in), n_in);
            weight.check(n_out, n_in).unwrap();
            let bias = floats(&mut rng, n_out);
            let packed = pack_matrix(&weight, &bias, n_in);
            for n_rows in [1, 3, 4, 6, 17] {
                let x = Rows::new(&mut rng, n_rows, n_in, false);
                let expected = linear(&x, &weight, &bias);
                // The two halves of a value, that of the codes and that of the rows' minima, may cancel.
                let size = |row: usize| 255.0 * f64::from(x.scales[row].scale) + f64::from(x.scales[row].low).abs();
                let heaviest = weight
                    .to_f32(n_in)
                    .chunks_exact(n_in)
                    .map(|row| row.iter().map(|weight| f64::from(weight.abs())).sum::<f64>())
                    .fold(1.0f64, f64::max);
                for set in sets() {
                    let mut values = vec![f32::NAN; n_rows * PANEL];
                    let mut halves = vec![0u16; n_rows * PANEL];
                    for panel in 0..packed.n_panels() {
                        set.product_f32(&x.view(), &packed, panel..packed.n_panels(), &mut values);
                        set.product_half(&x.view(), &packed, panel..packed.n_panels(), &mut halves);
                        for row in 0..n_rows {
                            for column in 0..PANEL.min(n_out - panel * PANEL) {
                                let want = expected[row * n_out + panel * PANEL + column];
                                let got = values[row * PANEL + column];
                                let error = (f64::from(got) - want).abs();
                                assert!(
                                    error <= 1e-6 * size(row) * heaviest,
                                    "{} {kind:?} {n_rows}x{n_out}x{n_in} [{row}, {column}]: {got} for {want}",
                                    set.isa()
                                );
                                let half = half_to_f32(halves[row * PANEL + column]);
                                let nearest = half_to_f32(f32_to_half(got));
                                assert!((half - got).abs() <= (nearest - got).abs(), "{} {kind:?}", set.isa());
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn packed_forms_are_as_small_as_they_say() {
    let (n_out, n_in) = (1536, 384);
    let values = floats(&mut StdRng::seed_from_u64(3), n_out * n_in);
    let bytes = |weight: &Weight<'_>| match pack_matrix(weight, &vec![0.0; n_out], n_in) {
        PackedMatrix::Dense(dense) => dense.bytes(),
        packed => packed.bytes(),
    };
    let dense = bytes(&store(Kind::Int8, &values, n_in));
    let codebook = bytes(&store(Kind::Codebook, &values, n_in));
    let groups = Codebook4::n_groups(n_in, 64);
    let scale = vec![0.1; n_out * groups];
    let grouped = Codebook4::nearest(&values, n_in, common::forms::LINEAR, scale, None, groups);
    let grouped = bytes(&Weight::Codebook4(grouped));
    let keep: Vec<bool> = (0..n_out / 64 * n_in / 4).map(|i| i % 4 == 0).collect();
    let sparse = bytes(&Weight::BlockSparse(BlockSparse::encode(&values, n_in, 64, Some(&keep))));
    // Beside the weights there are 16 bytes per column, which all forms have, and scales and zeros of groups.
    let columns = n_out * 16;
    assert_eq!(dense, n_out * n_in + columns);
    assert_eq!(codebook, n_out * n_in / 2 + columns);
    assert_eq!(grouped, n_out * n_in / 2 + columns + n_out * groups * 5);
    assert!(sparse < n_out * n_in / 4 + columns + 10_000, "{sparse}");
}
