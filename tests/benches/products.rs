//! Matrix products of every stored form against dense INT8, on one thread.
//!
//! `cargo bench --bench products` gives criterion's statistics. `cargo bench --bench products -- --ratios` measures all
//! forms of a shape in turns, so that a machine's slow phases fall on all alike, and prints how many times as fast as dense
//! INT8 each is; a number after it measures that number of rows alone. Factors are two products, with what is between them
//! rounded to codes.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that cannot go on fails")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use niwaki::kernels::forms::PackedMatrix;
use niwaki::kernels::layout::{CodeRows, PANEL, RowScale, code_stride};
use niwaki::kernels::{Block, CodeRowsMut, Isa, KernelSet};
use niwaki::quant::{BlockSparse, Codebook4, Weight, pack_matrix, quantize_rows_affine, quantize_rows_symmetric};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Most rows that are computed together; how many are is the player's choice, by instruction set.
const BLOCK_ROWS: usize = KernelSet::MOST_BLOCK_ROWS;
/// `(n_in, n_out)`: the two products of the FFN of all-MiniLM-L6-v2.
const SHAPES: [(usize, usize); 2] = [(384, 1536), (1536, 384)];
const ROWS: [usize; 4] = [1, 16, 128, 4096];

fn codebook(values: &[f32], n_in: usize, table: [i8; 16], wanted: usize) -> Weight<'static> {
    let n_groups = Codebook4::n_groups(n_in, wanted);
    let scale = vec![1.0 / 8.0; values.len() / n_in * n_groups];
    Weight::Codebook4(Codebook4::nearest(values, n_in, table, scale, None, n_groups))
}

/// A matrix, or two factors: the second takes the first's results, rounded to codes.
struct Form {
    name: String,
    first: PackedMatrix,
    second: Option<PackedMatrix>,
}

/// All forms of one matrix, as `set` wants them, dense INT8 first.
fn forms(set: &KernelSet, n_in: usize, n_out: usize) -> Vec<Form> {
    let mut rng = StdRng::seed_from_u64(1);
    // Most near zero, as trained ones are.
    let mut value = || (0..3).map(|_| rng.random_range(-1.0f32..1.0)).sum();
    let values: Vec<f32> = (0..n_in * n_out).map(|_| value()).collect();
    let (codes, scale) = quantize_rows_symmetric(&values, n_in);
    let mut forms = vec![("int8".to_owned(), Weight::Int8 { codes: codes.into(), scale: scale.into() })];
    let (codes, scale, offset) = quantize_rows_affine(&values, n_in);
    let affine = Weight::Int8Affine { codes: codes.into(), scale: scale.into(), offset: offset.into() };
    forms.push(("int8 affine".to_owned(), affine));
    let linear = std::array::from_fn(|i| i8::try_from(i).unwrap() - 8);
    let powers = [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64, 48];
    let wide = std::array::from_fn(|i| i8::try_from(i16::try_from(i).unwrap() * 17 - 127).unwrap_or(127));
    forms.push(("codebook within 8".to_owned(), codebook(&values, n_in, linear, n_in)));
    forms.push(("codebook within 64".to_owned(), codebook(&values, n_in, powers, n_in)));
    forms.push(("codebook within 127".to_owned(), codebook(&values, n_in, wide, n_in)));
    forms.push(("codebook within 8, groups of 64".to_owned(), codebook(&values, n_in, linear, 64)));
    for width in [64, 32] {
        for percent in [100, 95, 90, 85, 75, 50, 25, 10] {
            let keep: Vec<bool> = (0..n_out / width * n_in / 4).map(|_| rng.random_range(0..100) < percent).collect();
            let sparse = Weight::BlockSparse(BlockSparse::encode(&values, n_in, width, Some(&keep)));
            forms.push((format!("blocks {width}x4 at {percent} %"), sparse));
        }
    }
    let pack = |weight: &Weight<'_>, n_out, n_in| set.fit(pack_matrix(weight, &vec![0.0; n_out], n_in));
    let mut packed: Vec<Form> = forms
        .into_iter()
        .map(|(name, weight)| Form { name, first: pack(&weight, n_out, n_in), second: None })
        .collect();
    for rank in [64, 128, 192, 224, 256] {
        let dense = |n_out: usize, n_in: usize| {
            let (codes, scale) = quantize_rows_symmetric(&values[..n_out * n_in], n_in);
            pack(&Weight::Int8 { codes: codes.into(), scale: scale.into() }, n_out, n_in)
        };
        let share = 100 * rank * (n_in + n_out) / (n_in * n_out);
        let name = format!("rank {rank}, {share} % of the products");
        packed.push(Form { name, first: dense(rank, n_in), second: Some(dense(n_out, rank)) });
    }
    packed
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
fn product(set: &KernelSet, x: &Input, form: &Form, room: &mut Room) {
    let Room { out, middle, codes: between, scales: steps, turned } = room;
    let mut panels = |rows: CodeRows<'_>, weights: &PackedMatrix, out: &mut [f32]| {
        let rows = &set.turn(rows, weights, |n| &mut turned[..n]);
        for (panel, out) in (0..weights.n_panels()).zip(out.chunks_exact_mut(rows.scales.len() * PANEL)) {
            set.product_f32(rows, weights, panel..weights.n_panels(), out);
        }
    };
    let block = set.block_rows(form.first.n_in());
    for (codes, scales) in x.codes.chunks(block * x.stride).zip(x.scales.chunks(block)) {
        let rows = CodeRows::new(codes, x.stride, scales);
        let Some(second) = &form.second else {
            panels(rows, &form.first, out);
            continue;
        };
        let (n_rows, rank) = (scales.len(), form.first.n_out());
        panels(rows, &form.first, middle);
        let stride = code_stride(rank);
        let data = &middle[..form.first.n_panels() * n_rows * PANEL];
        let (codes, scales) = (&mut between[..n_rows * stride], &mut steps[..n_rows]);
        let mut to = CodeRowsMut { codes: &mut *codes, stride, scales: &mut *scales, range: None };
        set.quantize(Block { data, n_rows, n: rank }, 0..n_rows, &mut to);
        panels(CodeRows::new(codes, stride, scales), second, out);
    }
}

/// Room for the results of a block of rows, and for what is between two factors.
struct Room {
    out: Vec<f32>,
    middle: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<RowScale>,
    turned: Vec<u8>,
}

impl Room {
    fn new(n_in: usize, n_out: usize) -> Self {
        let block = |n: usize| vec![0.0; n.next_multiple_of(PANEL) * BLOCK_ROWS];
        let scales = vec![RowScale { scale: 1.0, low: 0.0 }; BLOCK_ROWS];
        let widest = n_in.max(n_out);
        let codes = || vec![0; BLOCK_ROWS * code_stride(widest)];
        Self { out: block(n_out), middle: block(widest), codes: codes(), scales, turned: codes() }
    }
}

fn statistics(criterion: &mut Criterion, set: &KernelSet) {
    for (n_in, n_out) in SHAPES {
        let forms = forms(set, n_in, n_out);
        for n_rows in ROWS {
            let x = Input::new(n_rows, n_in);
            let mut group = criterion.benchmark_group(format!("{} {n_in}x{n_out}", set.isa()));
            group.throughput(Throughput::Elements((n_rows * n_in * n_out) as u64));
            for form in &forms {
                let mut room = Room::new(n_in, n_out);
                group.bench_with_input(BenchmarkId::new(&form.name, n_rows), &n_rows, |bencher, _| {
                    bencher.iter(|| product(set, &x, form, black_box(&mut room)));
                });
            }
        }
    }
}

/// The fastest of many turns of each form.
fn ratios(set: &KernelSet, only: Option<usize>) {
    for (n_in, n_out) in SHAPES {
        let forms = forms(set, n_in, n_out);
        for n_rows in only.map_or(ROWS.to_vec(), |only| vec![only.max(1)]) {
            let x = Input::new(n_rows, n_in);
            let mut room = Room::new(n_in, n_out);
            let mut best = vec![Duration::MAX; forms.len()];
            let repeats = (256 / n_rows).max(1);
            for _ in 0..if n_rows > 1000 { 9 } else { 60 } {
                for (best, form) in best.iter_mut().zip(&forms) {
                    let start = Instant::now();
                    for _ in 0..repeats {
                        product(set, &x, form, black_box(&mut room));
                    }
                    *best = (*best).min(start.elapsed());
                }
            }
            println!("{} {n_in}x{n_out}, {n_rows} rows", set.isa());
            for (best_of, Form { name, .. }) in best.iter().zip(&forms) {
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
    let args: Vec<String> = std::env::args().collect();
    if let Some(place) = args.iter().position(|arg| arg == "--ratios") {
        ratios(&set, args.get(place + 1).and_then(|rows| rows.parse().ok()));
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
