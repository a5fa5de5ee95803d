use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::quant::{quantize_rows_affine, quantize_rows_symmetric, round_scales_to_half};

const LINEAR: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];

fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0) + 0.3).collect()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn error_is_at_most_half_a_step_and_extremes_are_exact() {
    let values = [0.0, -1.27, 0.5, 0.004_9, 0.0, 0.0, 0.0, 0.0, 3.0, -3.0, 1.0, 2.9];
    let (codes, scale) = quantize_rows_symmetric(&values, 4);
    assert_eq!(codes[1], -127);
    assert_eq!((codes[8], codes[9]), (127, -127));
    assert_eq!(scale[1], 1.0);
    let back = Weight::Int8 { codes: codes.into(), scale: scale.clone().into() }.to_f32(4);
    for (index, (value, restored)) in values.iter().zip(&back).enumerate() {
        assert!((value - restored).abs() <= scale[index / 4] * 0.5001, "{value} became {restored}");
    }
}

#[test]
fn asymmetric_rows_use_the_whole_range() {
    let values = [1.0, 2.0, 1.5, 1.75, -3.0, -3.0, -3.0, -3.0];
    let (codes, scale, offset) = quantize_rows_affine(&values, 4);
    assert_eq!((codes[0], codes[1], scale[0], offset[0]), (-127, 127, 1.0 / 254.0, 1.5));
    assert_eq!((scale[1], offset[1]), (1.0, -3.0));
    let weight = Weight::Int8Affine { codes: codes.into(), scale: scale.into(), offset: offset.into() };
    weight.check(2, 4).unwrap();
    assert!(worst(&weight.to_f32(4), &values) <= 0.5001 / 254.0);
}

#[test]
fn a_codebook_takes_the_nearest_entry_per_group() {
    let (rows, cols) = (5, 37);
    let values = values(1, rows * cols);
    for wanted in [cols, 32, 16, 8] {
        let n_groups = Codebook4::n_groups(cols, wanted);
        let group = Codebook4::group_len(cols, n_groups);
        assert_eq!(cols.div_ceil(group), n_groups);
        for zero in [None, Some(vec![3i8; rows * n_groups])] {
            let mut scale = vec![0.2; rows * n_groups];
            round_scales_to_half(&mut scale);
            let codebook = Codebook4::nearest(&values, cols, LINEAR, scale.clone(), zero.clone(), n_groups);
            assert!(codebook.has_half_scales());
            let weight = Weight::Codebook4(codebook);
            weight.check(rows, cols).unwrap();
            assert_eq!(weight.n_rows(cols), rows);
            let back = weight.to_f32(cols);
            let shift = zero.as_ref().map_or(0.0, |_| 3.0);
            for (value, restored) in values.iter().zip(&back) {
                let best = LINEAR
                    .iter()
                    .map(|&entry| (f32::from(entry) - shift) * scale[0])
                    .fold(f32::MAX, |best, x| if (x - value).abs() < (best - value).abs() { x } else { best });
                assert!((restored - value).abs() <= (best - value).abs() + 1e-6, "{value}: {restored}, not {best}");
            }
        }
    }
}

#[test]
fn a_product_is_its_factors_multiplied() {
    let (rows, cols, rank) = (6, 10, 3);
    let (up, down) = (values(2, rows * rank), values(3, rank * cols));
    let weight = Weight::LowRank(LowRank {
        rank,
        down: Box::new(Weight::F32(down.clone().into())),
        up: Box::new(Weight::F32(up.clone().into())),
    });
    weight.check(rows, cols).unwrap();
    assert_eq!((weight.n_rows(cols), weight.macs(rows, cols)), (rows, 3 * 16));
    let back = weight.to_f32(cols);
    for (index, value) in back.iter().enumerate() {
        let want: f32 = (0..rank).map(|k| up[index / cols * rank + k] * down[k * cols + index % cols]).sum();
        assert!((value - want).abs() < 1e-6);
    }
    let nested = Weight::LowRank(LowRank { rank, down: Box::new(Weight::F32(down.into())), up: Box::new(weight) });
    assert!(nested.check(rows, cols).is_err());
}

#[test]
fn blocks_keep_what_the_mask_says() {
    let (rows, cols) = (100, 77);
    let dense = values(4, rows * cols);
    for width in [32, 64] {
        let groups = cols.div_ceil(4);
        let keep: Vec<bool> = (0..rows.div_ceil(width) * groups).map(|i| i % 3 == 0).collect();
        let sparse = BlockSparse::encode(&dense, cols, width, Some(&keep));
        assert_eq!(sparse.n_blocks(), keep.iter().filter(|keep| **keep).count());
        let scale = sparse.scale.to_vec();
        let weight = Weight::BlockSparse(sparse);
        weight.check(rows, cols).unwrap();
        let back = weight.to_f32(cols);
        for (index, (&value, &restored)) in dense.iter().zip(&back).enumerate() {
            let (row, col) = (index / cols, index % cols);
            let want = if keep[row / width * groups + col / 4] { value } else { 0.0 };
            assert!((want - restored).abs() <= 0.5001 * scale[row], "[{row}, {col}] {want} became {restored}");
        }
        // What is zero already needs no mask, and encoding again changes nothing.
        assert_eq!(Weight::BlockSparse(BlockSparse::encode(&back, cols, width, None)).to_f32(cols), back);
    }
}

#[test]
fn a_bitmap_stores_what_is_not_zero() {
    let (rows, cols) = (7, 19);
    let mut dense = values(5, rows * cols);
    dense.iter_mut().step_by(3).for_each(|value| *value = 0.0);
    let bitmap = Bitmap::encode(&dense, cols);
    assert_eq!(bitmap.codes.len(), dense.iter().filter(|value| **value != 0.0).count());
    let (codes, scale) = quantize_rows_symmetric(&dense, cols);
    assert_eq!(bitmap.dense_codes(cols), codes, "the same codes as those of dense INT8");
    let weight = Weight::Bitmap(bitmap);
    weight.check(rows, cols).unwrap();
    assert_eq!(weight.to_f32(cols), Weight::Int8 { codes: codes.into(), scale: scale.into() }.to_f32(cols));
    assert_eq!(weight.macs(rows, cols), (rows * cols) as u64, "absent elements save no work");
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let codebook = || Codebook4::nearest(&values(6, 64), 16, LINEAR, vec![0.1; 8], None, 2);
    let grouped = || Int8Grouped { codes: vec![1; 64].into(), scale: vec![1.0; 8].into(), offset: None, n_groups: 2 };
    assert!(Weight::Int8Grouped(grouped()).check(4, 16).is_ok());
    let broken: [(&str, Weight<'static>); 16] = [
        ("scale", Weight::Codebook4(Codebook4 { scale: vec![0.1; 7].into(), ..codebook() })),
        ("scale", Weight::Codebook4(Codebook4 { scale: vec![f32::NAN; 8].into(), ..codebook() })),
        ("scale", Weight::Codebook4(Codebook4 { n_groups: 3, ..codebook() })),
        ("scale", Weight::Codebook4(Codebook4 { n_groups: 0, ..codebook() })),
        ("indices", Weight::Codebook4(Codebook4 { indices: vec![0; 31].into(), ..codebook() })),
        ("zero", Weight::Codebook4(Codebook4 { zero: Some(vec![0; 4].into()), ..codebook() })),
        ("zero", Weight::Codebook4(Codebook4 { zero: Some(vec![-128; 8].into()), ..codebook() })),
        ("codes", Weight::Int8 { codes: vec![1; 63].into(), scale: vec![1.0; 4].into() }),
        (
            "offset",
            Weight::Int8Affine {
                codes: vec![1; 64].into(),
                scale: vec![1.0; 4].into(),
                offset: vec![0.0, f32::INFINITY, 0.0, 0.0].into(),
            },
        ),
        ("scale", Weight::Int8Grouped(Int8Grouped { n_groups: 1, ..grouped() })),
        ("scale", Weight::Int8Grouped(Int8Grouped { scale: vec![1.0; 7].into(), ..grouped() })),
        ("codes", Weight::Int8Grouped(Int8Grouped { codes: vec![1; 63].into(), ..grouped() })),
        ("offset", Weight::Int8Grouped(Int8Grouped { offset: Some(vec![f32::NAN; 8].into()), ..grouped() })),
        (
            "mask",
            Weight::BlockSparse(BlockSparse {
                width: 64,
                mask: vec![0b1_0001].into(),
                blocks: vec![0; 512].into(),
                scale: vec![1.0; 4].into(),
            }),
        ),
        (
            "mask",
            Weight::BlockSparse(BlockSparse {
                width: 64,
                mask: vec![0b101].into(),
                blocks: vec![0; 256].into(),
                scale: vec![1.0; 4].into(),
            }),
        ),
        (
            "mask",
            Weight::Bitmap(Bitmap { mask: vec![255; 8].into(), codes: vec![0; 63].into(), scale: vec![1.0; 4].into() }),
        ),
    ];
    for (index, (part, weight)) in broken.iter().enumerate() {
        let error = weight.check(4, 16).unwrap_err();
        assert_eq!(error.part, *part, "case {index}: {error}");
    }
    // Sizes whose product overflows are refused, not computed with.
    assert!(broken[0].1.check(usize::MAX, 16).is_err());
}

proptest! {
    #[test]
    fn nibbles_come_back(cols in 1usize..40, indices in prop::collection::vec(0u8..16, 1..400)) {
        let rows = indices.len() / cols;
        let indices = &indices[..rows * cols];
        let codebook = Codebook4 {
            indices: crate::quant::pack_nibbles(indices, cols).into(),
            table: LINEAR,
            scale: vec![1.0; rows].into(),
            zero: None,
            n_groups: 1,
        };
        prop_assert_eq!(codebook.indices.len(), rows * cols.div_ceil(2));
        for (at, &index) in indices.iter().enumerate() {
            prop_assert_eq!(codebook.index(cols, at / cols, at % cols), index);
        }
    }

    #[test]
    fn groups_cover_a_row_as_wanted(cols in 1usize..5000, wanted in 1usize..600) {
        let n_groups = Codebook4::n_groups(cols, wanted);
        let group = Codebook4::group_len(cols, n_groups);
        prop_assert_eq!(cols.div_ceil(group), n_groups);
        prop_assert!(n_groups == 1 || group <= wanted.next_multiple_of(8));
        if wanted.is_multiple_of(8) && cols.is_multiple_of(wanted) {
            prop_assert_eq!(group, wanted);
        }
    }
}
