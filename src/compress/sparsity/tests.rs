use super::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};

fn random(rows: usize, cols: usize, rng: &mut StdRng) -> Mat<f64> {
    Mat::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
}

/// A weight, samples `[n_in, n]` of correlated inputs, and their second moments.
fn case(n_out: usize, n_in: usize, seed: u64) -> (Mat<f64>, Mat<f64>, Mat<f64>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let samples = random(n_in, n_in, &mut rng) * random(n_in, 5 * n_in, &mut rng);
    let moments = &samples * samples.transpose() * (1.0 / (5 * n_in) as f64);
    (random(n_out, n_in, &mut rng), samples, moments)
}

/// Mean squared error of the output, straight from the samples.
fn output_error(a: &Mat<f64>, b: &Mat<f64>, samples: &Mat<f64>) -> f64 {
    let difference = (a - b) * samples;
    difference.squared_norm_l2() / samples.ncols() as f64
}

const PATTERNS: [Pattern; 4] = [
    Pattern::Unstructured { density: 0.5 },
    Pattern::NOfM { n: 2, m: 4 },
    Pattern::Blocks { rows: 4, cols: 2, density: 0.5 },
    Pattern::Blocks { rows: 8, cols: 4, density: 0.25 },
];

#[test]
fn zeros_stand_where_the_pattern_puts_them_and_as_many_as_it_says() {
    let (weight, _, moments) = case(8, 16, 1);
    for pattern in PATTERNS {
        for score in [Score::Magnitude, Score::Activation, Score::Surgeon] {
            for refit in [false, true] {
                let sparse = sparsify(&weight, &moments, pattern, score, refit).unwrap();
                for (at, &kept) in sparse.kept.iter().enumerate() {
                    let value = sparse.weight[(at / 16, at % 16)];
                    assert!(kept || value == 0.0);
                    assert!(refit || !kept || value == weight[(at / 16, at % 16)]);
                }
                match pattern {
                    Pattern::Unstructured { density } => assert!((sparse.density() - density).abs() < 1e-9),
                    Pattern::NOfM { n, m } => {
                        let groups = sparse.kept.chunks_exact(m);
                        assert!(groups.into_iter().all(|group| group.iter().filter(|&&kept| kept).count() == n));
                    }
                    Pattern::Blocks { rows, cols, density } => {
                        assert!((sparse.density() - density).abs() < 1e-9);
                        for i in 0..8 {
                            for j in 0..16 {
                                let corner = (i / rows * rows) * 16 + j / cols * cols;
                                assert_eq!(sparse.kept[i * 16 + j], sparse.kept[corner], "{pattern:?}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn refitted_weights_are_the_least_squares_solution_on_their_places() {
    let (weight, samples, moments) = case(6, 12, 2);
    let sparse = sparsify(&weight, &moments, Pattern::Unstructured { density: 0.6 }, Score::Activation, true).unwrap();
    let wanted = &weight * &samples;
    for row in 0..6 {
        let columns: Vec<usize> = (0..12).filter(|j| sparse.kept[row * 12 + j]).collect();
        // By a QR decomposition of the samples, which knows nothing of second moments.
        let inputs = Mat::from_fn(samples.ncols(), columns.len(), |t, j| samples[(columns[j], t)]);
        let target = Mat::from_fn(samples.ncols(), 1, |t, _| wanted[(row, t)]);
        let exact = faer::linalg::solvers::SolveLstsq::solve_lstsq(&inputs.qr(), &target);
        for (at, &column) in columns.iter().enumerate() {
            let ours = sparse.weight[(row, column)];
            assert!((ours - exact[(at, 0)]).abs() < 1e-8, "row {row}, column {column}: {ours}, {}", exact[(at, 0)]);
        }
    }
}

#[test]
fn refitting_never_hurts_and_the_surgeon_loses_least() {
    for pattern in PATTERNS {
        let total = |score, refit| -> f64 {
            (20..30)
                .map(|seed| {
                    let (weight, samples, moments) = case(16, 32, seed);
                    let sparse = sparsify(&weight, &moments, pattern, score, refit).unwrap();
                    output_error(&weight, &sparse.weight, &samples)
                })
                .sum()
        };
        for score in [Score::Magnitude, Score::Activation, Score::Surgeon] {
            assert!(total(score, true) <= total(score, false) * (1.0 + 1e-9), "{pattern:?} {score}");
        }
        let surgeon = total(Score::Surgeon, true);
        for other in [Score::Magnitude, Score::Activation] {
            assert!(surgeon < total(other, false), "{pattern:?}, {other}");
            // Elements are chosen a window at a time, so only the exact surgeon on blocks wins over others' places that
            // are refitted too.
            let exact = matches!(pattern, Pattern::Blocks { .. });
            assert!(!exact || surgeon < total(other, true), "{pattern:?}, {other} refitted");
        }
    }
}

/// Where inputs do not depend on each other nothing can make up for anything, and the best places are known.
#[test]
fn with_independent_inputs_the_surgeon_finds_the_best_of_all_choices_of_blocks() {
    let mut rng = StdRng::seed_from_u64(9);
    let weight = random(4, 8, &mut rng);
    let moments = Mat::from_fn(8, 8, |i, j| if i == j { 0.2 + i as f64 } else { 0.0 });
    // 2 panels of 2 rows, 4 groups of 2 columns each: 8 blocks, of which 4 stay.
    let pattern = Pattern::Blocks { rows: 2, cols: 2, density: 0.5 };
    let ours = sparsify(&weight, &moments, pattern, Score::Surgeon, true).unwrap();
    let least = (0u32..256)
        .filter(|bits| bits.count_ones() == 4)
        .map(|bits| {
            let blocks: Vec<bool> = (0..8).map(|block| (bits >> block) & 1 == 1).collect();
            super::output_error(&weight, &masked(&weight, &spread(&blocks, 4, 8, 2, 2)), &moments)
        })
        .fold(f64::INFINITY, f64::min);
    assert!((super::output_error(&weight, &ours.weight, &moments) - least).abs() < 1e-12);
}

#[test]
fn elements_are_compensated_column_by_column_as_in_the_paper() {
    // Without choosing anew (density 0 in the first window would be everything): one window, compare the places with a
    // direct computation of the saliency w² / [H⁻¹]_jj after elimination of the columns left of j.
    let (weight, _, moments) = case(5, 8, 4);
    let pattern = Pattern::NOfM { n: 1, m: 2 };
    let ours = surgeon_elements(&weight, &moments, pattern).unwrap();
    let mut rows: Vec<Vec<f64>> = (0..5).map(|i| (0..8).map(|j| weight[(i, j)]).collect()).collect();
    let mut expected = vec![true; 40];
    for start in (0..8).step_by(2) {
        // H⁻¹ of the columns that are not frozen yet.
        let inverse_from = |first: usize| {
            let rest = Mat::from_fn(8 - first, 8 - first, |i, j| moments[(first + i, first + j)]);
            rest.llt(Side::Lower).unwrap().inverse()
        };
        for i in 0..5 {
            let scores = [0, 1].map(|offset| rows[i][start + offset].powi(2) / inverse_from(start + offset)[(0, 0)]);
            let goes = start + usize::from(scores[1] < scores[0] || scores[0] == scores[1]);
            expected[i * 8 + goes] = false;
            let inverse = inverse_from(goes);
            let loss = rows[i][goes] / inverse[(0, 0)];
            (goes..8).for_each(|j| rows[i][j] -= loss * inverse[(j - goes, 0)]);
        }
    }
    assert_eq!(ours, expected);
}

#[test]
fn moments_that_are_not_positive_are_refused() {
    let (weight, _, moments) = case(4, 4, 5);
    let negative = Mat::from_fn(4, 4, |i, j| -moments[(i, j)]);
    for pattern in [Pattern::Unstructured { density: 0.5 }, Pattern::Blocks { rows: 2, cols: 2, density: 0.5 }] {
        assert!(sparsify(&weight, &negative, pattern, Score::Surgeon, true).is_none());
    }
}
