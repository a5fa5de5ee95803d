//! Matrix products of every stored form against dense INT8, on one thread.
//!
//! `cargo bench --bench products` gives criterion's statistics. `cargo bench --bench products -- --ratios` measures all
//! forms of a shape in turns, so that a machine's slow phases fall on all alike, and prints how many times as fast as dense
//! INT8 each is.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that cannot go on fails")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use niwaki::kernels::forms::PackedMatrix;
use niwaki::kernels::layout::{CodeRows, PANEL, RowScale, code_stride};
use niwaki::kernels::{Isa, KernelSet};
use niwaki::quant::{BlockSparse, Codebook4, Weight, pack_matrix, quantize_rows_affine, quantize_rows_symmetric};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Rows that are computed together, as the player does.
const BLOCK_ROWS: usize = 48;
/// `(n_in, n_out)`: the two products of the FFN of all-MiniLM-L6-v2.
const SHAPES: [(usize, usize); 2] = [(384, 1536), (1536, 384)];
const ROWS: [usize; 4] = [1, 16, 128, 4096];

fn codebook(values: &[f32], n_in: usize, table: [i8; 16], wanted: usize) -> Weight<'static> {
    let n_groups = Codebook4::n_groups(n_in, wanted);
    let scale = vec![1.0 / 8.0; values.len() / n_in * n_groups];
    Weight::Codebook4(Codebook4::nearest(values, n_in, table, scale, None, n_groups))
}

/// All forms of one matrix, dense INT8 first.
fn forms(n_in: usize, n_out: usize) -> Vec<(String, PackedMatrix)> {
    let mut rng = StdRng::seed_from_u64(1);
    let values: Vec<f32> = (0..n_in * n_out).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    let (codes, scale) = quantize_rows_symmetric(&values, n_in);
    let mut forms = vec![("int8".to_owned(), Weight::Int8 { codes: codes.into(), scale: scale.into() })];
    let (codes, scale, offset) = quantize_rows_affine(&values, n_in);
    let affine = Weight::Int8Affine { codes: codes.into(), scale: scale.into(), offset: offset.into() };
    forms.push(("int8 affine".to_owned(), affine));
    let linear = std::array::from_fn(|i| i8::try_from(i).unwrap() - 8);
    let powers = [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64, 48];
    let wide = std::array::from_fn(|i| i8::try_from(i * 16).unwrap_or(127).wrapping_sub(100));
    forms.push(("codebook within 8".to_owned(), codebook(&values, n_in, linear, n_in)));
    forms.push(("codebook within 64".to_owned(), codebook(&values, n_in, powers, n_in)));
    forms.push(("codebook within 127".to_owned(), codebook(&values, n_in, wide, n_in)));
    forms.push(("codebook within 8, groups of 64".to_owned(), codebook(&values, n_in, linear, 64)));
    for width in [64, 32] {
        for percent in [100, 95, 90, 75, 50, 25, 10] {
            let keep: Vec<bool> = (0..n_out / width * n_in / 4).map(|_| rng.random_range(0..100) < percent).collect();
            let sparse = Weight::BlockSparse(BlockSparse::encode(&values, n_in, width, Some(&keep)));
            forms.push((format!("blocks {width}x4 at {percent} %"), sparse));
        }
    }
    forms.into_iter().map(|(name, weight)| (name, pack_matrix(&weight, &vec![0.0; n_out], n_in))).collect()
}

struct Input {
    codes: Vec<u8>,
    scales: Vec<RowScale>,
    stride: usize,
}

impl Input {
    fn new(n_rows: usize, n_in: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(2);
        let stride = code_stride(n_in);
        let codes = (0..n_rows * stride).map(|_| rng.random()).collect();
        Self { codes, scales: vec![RowScale { scale: 0.01, low: -1.0 }; n_rows], stride }
    }
}

/// All rows, in blocks whose results stay in the L2 cache.
fn product(set: &KernelSet, x: &Input, weights: &PackedMatrix, out: &mut [f32]) {
    for (codes, scales) in x.codes.chunks(BLOCK_ROWS * x.stride).zip(x.scales.chunks(BLOCK_ROWS)) {
        let rows = CodeRows { codes, stride: x.stride, scales };
        for (panel, out) in (0..weights.n_panels()).zip(out.chunks_exact_mut(scales.len() * PANEL)) {
            set.product_f32(&rows, weights, panel, out);
        }
    }
}

fn results(weights: &PackedMatrix) -> Vec<f32> {
    vec![0.0; weights.n_panels() * BLOCK_ROWS * PANEL]
}

fn statistics(criterion: &mut Criterion, set: &KernelSet) {
    for (n_in, n_out) in SHAPES {
        let forms = forms(n_in, n_out);
        for n_rows in ROWS {
            let x = Input::new(n_rows, n_in);
            let mut group = criterion.benchmark_group(format!("{} {n_in}x{n_out}", set.isa()));
            group.throughput(Throughput::Elements((n_rows * n_in * n_out) as u64));
            for (name, weights) in &forms {
                let mut out = results(weights);
                group.bench_with_input(BenchmarkId::new(name, n_rows), &n_rows, |bencher, _| {
                    bencher.iter(|| product(set, &x, weights, black_box(&mut out)));
                });
            }
        }
    }
}

/// The fastest of many turns of each form.
fn ratios(set: &KernelSet) {
    for (n_in, n_out) in SHAPES {
        let forms = forms(n_in, n_out);
        for n_rows in ROWS {
            let x = Input::new(n_rows, n_in);
            let mut out = results(&forms[0].1);
            let mut best = vec![Duration::MAX; forms.len()];
            let repeats = (256 / n_rows).max(1);
            for _ in 0..if n_rows > 1000 { 9 } else { 60 } {
                for (best, (_, weights)) in best.iter_mut().zip(&forms) {
                    let start = Instant::now();
                    for _ in 0..repeats {
                        product(set, &x, weights, black_box(&mut out));
                    }
                    *best = (*best).min(start.elapsed());
                }
            }
            println!("{} {n_in}x{n_out}, {n_rows} rows", set.isa());
            for (best_of, (name, _)) in best.iter().zip(&forms) {
                let seconds = best_of.as_secs_f64() / repeats as f64;
                let macs = (n_rows * n_in * n_out) as f64;
                let ratio = best[0].as_secs_f64() / best_of.as_secs_f64();
                println!("  {name:<32} {:>10.1} us {:>7.1} GMAC/s {ratio:>6.2}x", seconds * 1e6, macs / seconds / 1e9);
            }
        }
    }
}

fn main() {
    let set = KernelSet::new(match std::env::var("NIWAKI_ISA") {
        Ok(name) => Isa::force(name.parse().unwrap()).unwrap(),
        Err(_) => Isa::detect(),
    });
    if std::env::args().any(|arg| arg == "--ratios") {
        ratios(&set);
        return;
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    statistics(&mut criterion, &set);
    criterion.final_summary();
}
