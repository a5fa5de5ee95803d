use super::super::settings::{Compensate, Weighting};
use super::*;
use crate::compress::passes::CompressionPass;
use faer::Mat;
use rand::{RngExt, SeedableRng, rngs::StdRng};

const ROWS: usize = 24;
const COLS: usize = 48;

/// About normal, rows of different spread, two outliers, and a constant row.
fn values() -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(5);
    let mut values: Vec<f32> = (0..ROWS * COLS)
        .map(|at| (0..8).map(|_| rng.random_range(-0.5f32..0.5)).sum::<f32>() * (1.0 + (at / COLS) as f32 * 0.1) + 0.05)
        .collect();
    values[7] = 9.0;
    values[COLS * 3 + 1] = -7.0;
    values[COLS * 5..COLS * 6].fill(0.25);
    values
}

fn costs(compensated: bool) -> Costs {
    let mut rng = StdRng::seed_from_u64(6);
    let mix = Mat::from_fn(COLS, COLS / 2, |_, _| rng.random_range(-1.0..1.0));
    let mut metric = &mix * mix.transpose();
    (0..COLS).for_each(|i| metric[(i, i)] += 0.2);
    Costs {
        rows: Some((0..ROWS).map(|row| 1.0 + row as f64).collect()),
        columns: Some((0..COLS).map(|i| metric[(i, i)]).collect()),
        compensation: compensated.then(|| Compensation::new(&metric).unwrap()),
    }
}

fn every() -> Vec<Quantize> {
    let mut all = Vec::new();
    let formats = [Format::Linear, Format::Log2, Format::Log2Sum, Format::Kmeans, Format::Nf4];
    let ranges = [RangeMethod::MinMax, RangeMethod::Percentile, RangeMethod::Mse, RangeMethod::Entropy];
    for (format, bits) in formats.map(|format| (format, 4)).into_iter().chain([(Format::Linear, 8)]) {
        for per in [Per::Tensor, Per::Channel, Per::Group] {
            for symmetric in [true, false] {
                for range in ranges {
                    let (range, default) = (Some(range), Quantize::default());
                    let group_size = if per == Per::Group { 16 } else { default.group_size };
                    all.push(Quantize { format, bits, per, symmetric, range, group_size, ..default });
                }
            }
        }
    }
    all.into_iter().filter(|settings| settings.check(&architecture()).is_ok()).collect()
}

fn architecture() -> crate::model::Architecture {
    use crate::model::{Activation, Architecture, ArchitectureSpec, Band, Family, LayerConfig, Pooling, Positions};
    Architecture::new(ArchitectureSpec {
        ranges: Vec::new(),
        family: Family::Bert,
        vocab_size: 50,
        n_token_types: 2,
        positions: Positions { table_len: 16, offset: 0, tiled: false },
        d_model: COLS,
        norm_eps: 1e-12,
        activation: Activation::Gelu,
        layers: vec![LayerConfig { n_heads: 3, d_head: 16, d_ffn: 96, band: Band::FULL }; 2],
        pooling: Pooling::Mean,
        normalize: true,
        max_input_tokens: 16,
        head: None,
    })
    .unwrap()
}

fn square_error(values: &[f32], form: &Weight<'_>) -> f64 {
    values.iter().zip(form.to_f32(COLS)).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
}

#[test]
fn every_setting_gives_a_form_that_holds_the_matrix() {
    let values = values();
    let norm: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
    let settings = every();
    assert!(settings.len() > 60, "{} settings", settings.len());
    for settings in settings {
        let form = store(&settings, &values, COLS, &Costs::default()).form;
        form.check(ROWS, COLS).unwrap_or_else(|error| panic!("{settings:?}: {error}"));
        let error = square_error(&values, &form) / norm;
        let (bits, clipped) = (settings.bits, settings.range() != RangeMethod::MinMax);
        // Outliers that are clipped cost what they are; everything else is within the format's precision.
        let most = match (bits, settings.per) {
            (8, _) if !clipped => 2e-3,
            (4, Per::Tensor) => 0.9,
            (4, _) if !clipped => 0.12,
            _ => 0.3,
        };
        assert!(error < most, "{settings:?}: relative error {error}");
        match (bits, settings.symmetric, &form) {
            (8, symmetric, Weight::Int8Grouped(grouped)) => {
                assert_eq!((grouped.offset.is_none(), grouped.n_groups), (symmetric, 3));
                assert_eq!(settings.per, Per::Group);
            }
            (8, true, Weight::Int8 { .. }) | (8, false, Weight::Int8Affine { .. }) => {
                assert_ne!(settings.per, Per::Group);
            }
            (4, symmetric, Weight::Codebook4(codebook)) => {
                assert_eq!(codebook.zero.is_none(), symmetric);
                assert_eq!(codebook.n_groups, if settings.per == Per::Group { 3 } else { 1 });
                assert!(codebook.has_half_scales(), "{settings:?}");
            }
            other => panic!("{settings:?}: {other:?}"),
        }
    }
}

#[test]
fn finer_scales_and_better_ranges_pay() {
    let values = values();
    let error = |settings: Quantize| square_error(&values, &store(&settings, &values, COLS, &Costs::default()).form);
    let base = Quantize { bits: 4, ..Quantize::default() };
    let mse = |per| error(Quantize { per, group_size: 16, ..base.clone() });
    assert!(mse(Per::Group) < mse(Per::Channel) && mse(Per::Channel) < mse(Per::Tensor));
    let min_max = error(Quantize { range: Some(RangeMethod::MinMax), ..base.clone() });
    assert!(mse(Per::Channel) < min_max);
    let kmeans = error(Quantize { format: Format::Kmeans, ..base.clone() });
    assert!(kmeans < mse(Per::Channel), "a learnt table is better than an even one");
    // Rows far from 0 want an offset.
    let shifted: Vec<f32> = values.iter().map(|x| x + 4.0).collect();
    let at = |symmetric| {
        let settings = Quantize { symmetric, ..base.clone() };
        square_error(&shifted, &store(&settings, &shifted, COLS, &Costs::default()).form)
    };
    assert!(at(false) < at(true) / 2.0, "{} {}", at(false), at(true));
}

#[test]
fn compensation_pays_for_every_format_and_keeps_the_form_whole() {
    let values = values();
    let formats = [Format::Linear, Format::Log2, Format::Log2Sum, Format::Kmeans, Format::Nf4];
    for (format, symmetric) in formats.map(|format| (format, true)).into_iter().chain([(Format::Linear, false)]) {
        for per in [Per::Channel, Per::Group] {
            let settings = Quantize {
                format,
                per,
                symmetric,
                bits: 4,
                group_size: 16,
                weighting: Weighting::Fisher,
                compensate: Compensate::Gptq,
                ..Quantize::default()
            };
            let stored = store(&settings, &values, COLS, &costs(true));
            stored.form.check(ROWS, COLS).unwrap();
            let (before, after) = (stored.error_nearest.unwrap(), stored.error.unwrap());
            assert!(after < 0.8 * before, "{settings:?}: {before} became {after}");
            // What is reported is what is stored.
            let codes = stored.form.to_f32(COLS);
            let really = costs(true).compensation.unwrap().relative_error(&values, |r, c| codes[r * COLS + c]);
            assert!((really - after).abs() < 1e-5 + 1e-3 * after, "{really} is not {after}");
        }
    }
}

#[test]
fn costs_draw_precision_to_where_they_are() {
    let values = values();
    let settings = Quantize { bits: 4, format: Format::Kmeans, ..Quantize::default() };
    let mut columns = vec![1.0; COLS];
    columns[..8].fill(1_000.0);
    let weighted = Costs { columns: Some(columns), ..Costs::default() };
    let error = |costs: &Costs| {
        let form = store(&settings, &values, COLS, costs).form.to_f32(COLS);
        (0..ROWS * COLS).filter(|at| at % COLS < 8).map(|at| f64::from(values[at] - form[at]).powi(2)).sum::<f64>()
    };
    assert!(error(&weighted) < 0.8 * error(&Costs::default()));
}

#[test]
fn levels_with_an_offset_reach_values_far_from_zero() {
    let far: Vec<f32> = (0..ROWS * COLS).map(|at| 0.3 + 0.01 * (at % 4) as f32).collect();
    for sign in [1.0, -1.0] {
        let values: Vec<f32> = far.iter().map(|value| sign * value).collect();
        for bits in [4, 8] {
            let settings = Quantize { bits, symmetric: false, per: Per::Group, group_size: 16, ..Quantize::default() };
            let form = store(&settings, &values, COLS, &Costs::default()).form;
            form.check(ROWS, COLS).unwrap();
            // Half of a level, 4 / 127 of what is farthest off.
            let most = values.iter().zip(form.to_f32(COLS)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(most < 0.33 * 4.0 / 127.0 / 2.0 * 1.1, "{bits} bits, {sign}: {most}");
        }
    }
}
