use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::*;

fn cores(n: usize) -> Arc<Cores> {
    Arc::new(Cores::new(n).unwrap())
}

#[test]
fn every_part_runs_once_for_every_size() {
    for n_cores in [1, 2, 3, 5] {
        let cores = cores(n_cores);
        let mut seat = cores.enter();
        for n_parts in (0..40).chain([1000]) {
            let counts: Vec<AtomicUsize> = (0..n_parts).map(|_| AtomicUsize::new(0)).collect();
            seat.run(n_parts, &|lane, part| {
                assert!(lane < n_cores);
                counts[part].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{n_cores} cores, {n_parts} parts");
        }
    }
}

#[test]
fn a_lone_player_gets_help_after_parking_too() {
    let cores = cores(2);
    let mut seat = cores.enter();
    for pause in [0, 1, 20] {
        thread::sleep(Duration::from_millis(pause));
        // Each part waits for the other: this ends only if two threads run at once.
        let met = std::sync::Barrier::new(2);
        seat.run(2, &|_, _| {
            met.wait();
        });
    }
}

#[test]
fn lanes_are_never_shared() {
    let cores = cores(4);
    let mut seat = cores.enter();
    for _ in 0..200 {
        let busy: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
        seat.run(64, &|lane, _| {
            assert!(!busy[lane].swap(true, SeqCst), "lane {lane} is used twice at once");
            std::hint::spin_loop();
            busy[lane].store(false, SeqCst);
        });
    }
}

#[test]
fn a_helper_has_the_same_lane_whoever_it_helps() {
    let cores = cores(4);
    let busy: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..300 {
                    cores.enter().run(12, &|lane, _| {
                        assert!(lane == 0 || !busy[lane].swap(true, SeqCst), "lane {lane} is used twice at once");
                        std::hint::spin_loop();
                        busy[lane].store(false, SeqCst);
                    });
                }
            });
        }
    });
}

#[test]
fn never_more_threads_compute_than_there_are_cores() {
    for n_cores in [1, 2, 3] {
        let cores = cores(n_cores);
        let inside = AtomicUsize::new(0);
        let most = AtomicUsize::new(0);
        let parts_run = AtomicUsize::new(0);
        thread::scope(|scope| {
            for player in 0..6 {
                let (cores, inside, most, parts_run) = (&cores, &inside, &most, &parts_run);
                scope.spawn(move || {
                    for round in 0..300 {
                        let mut seat = cores.enter();
                        for n_parts in [1, 7, (round + player) % 5] {
                            seat.run(n_parts, &|_, _| {
                                most.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                                parts_run.fetch_add(1, SeqCst);
                                inside.fetch_sub(1, SeqCst);
                            });
                        }
                        drop(seat);
                        if round % 97 == 0 {
                            thread::sleep(Duration::from_micros(200));
                        }
                    }
                });
            }
        });
        let expected: usize = (0..6).flat_map(|p| (0..300).map(move |r| 8 + (r + p) % 5)).sum();
        assert_eq!(parts_run.load(SeqCst), expected);
        assert!(most.load(SeqCst) <= n_cores, "{} of {n_cores}", most.load(SeqCst));
        assert_eq!(cores.shared.permits.load(SeqCst), n_cores, "a permit was lost");
    }
}

#[test]
fn helpers_are_given_back_when_somebody_waits() {
    let cores = cores(2);
    let mut seat = cores.enter();
    let entered = AtomicBool::new(false);
    thread::scope(|scope| {
        seat.run(2, &|_, _| thread::sleep(Duration::from_millis(1)));
        scope.spawn(|| {
            let _second = cores.enter();
            entered.store(true, SeqCst);
        });
        // The second player gets in although the first never leaves.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !entered.load(SeqCst) && Instant::now() < deadline {
            seat.run(4, &|_, _| std::hint::spin_loop());
        }
        assert!(entered.load(SeqCst));
    });
}

#[test]
fn a_panic_in_a_part_reaches_the_player_and_harms_nothing() {
    let cores = cores(3);
    let mut seat = cores.enter();
    for victim in 0..8 {
        let result = catch_unwind(AssertUnwindSafe(|| {
            seat.run(8, &|_, part| assert!(part != victim, "part {part}"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        seat.run(100, &|_, part| {
            sum.fetch_add(part, SeqCst);
        });
        assert_eq!(sum.load(SeqCst), 4950);
    }
    drop(seat);
    assert_eq!(cores.shared.permits.load(SeqCst), 3);
}

#[test]
fn dropping_ends_the_helpers_in_every_state() {
    for pause in [0, 0, 0, 1, 3] {
        let cores = cores(4);
        let mut seat = cores.enter();
        seat.run(8, &|_, _| {});
        drop(seat);
        thread::sleep(Duration::from_millis(pause));
        drop(cores);
    }
}

#[test]
fn parts_are_disjoint_and_complete() {
    let cores = cores(3);
    let mut seat = cores.enter();
    let bounds = [0, 3, 3, 4, 9];
    let mut rows = vec![0u32; 9 * 4];
    let mut panels = vec![0u32; 2 * 9 * 8];
    let parts =
        (RowParts::new(&mut rows, 4, Cut::At(&bounds)), PanelRowParts::new(&mut panels, 9, 8, Cut::At(&bounds)));
    seat.for_each(parts, |_, index, (rows, mut panels)| {
        rows.iter_mut().for_each(|value| *value += u32::try_from(index).unwrap() + 1);
        for panel in 0..2 {
            panels.panel(panel).iter_mut().for_each(|value| *value += u32::try_from(index).unwrap() + 1);
        }
    });
    let expected = [1, 1, 1, 3, 4, 4, 4, 4, 4];
    for row in 0..9 {
        assert!(rows[row * 4..row * 4 + 4].iter().all(|&value| value == expected[row]));
        for panel in 0..2 {
            assert!(panels[(panel * 9 + row) * 8..][..8].iter().all(|&value| value == expected[row]));
        }
    }
}

#[test]
#[should_panic(expected = "rows of 4")]
fn a_cut_beyond_the_slice_is_refused() {
    drop(RowParts::new(&mut [0u8; 15], 4, Cut::Even { n_rows: 4, block: 2 }));
}

#[test]
fn a_slower_thread_gets_less_and_every_row_once() {
    let cores = cores(2);
    let mut seat = cores.enter();
    let mut rows = vec![0u32; 100];
    let mut widths = Vec::new();
    for turn in 1..=12 {
        let shares = seat.shares(100, 64, 80, 1);
        let cut = shares.cut();
        widths = (0..cut.n_parts()).map(|part| cut.rows(part).len()).collect();
        seat.for_each_share(cut, RowParts::new(&mut rows, 1, cut), |lane, _, rows: &mut [u32]| {
            rows.iter_mut().for_each(|row| *row += 1);
            let time = if lane == 0 { 50 } else { 100 };
            thread::sleep(Duration::from_micros(time * rows.len() as u64));
        });
        assert!(rows.iter().all(|&row| row == turn), "every row once");
    }
    assert!(widths.len() == 2 && widths[0] > widths[1] + 10, "{widths:?}");
}

#[test]
fn more_rows_than_a_block_each_fall_into_even_blocks() {
    let cores = cores(2);
    let mut seat = cores.enter();
    let even = |shares: &Shares| shares.each().is_none();
    assert!(even(&seat.shares(129, 64, 80, 1)));
    assert!(even(&seat.shares(31, 64, 80, 16)), "less than a grain each");
    assert!(!even(&seat.shares(128, 64, 80, 16)));
    // Nobody is left to help once another player computes.
    drop(seat);
    let (mut one, _other) = (cores.enter(), cores.enter());
    assert!(even(&one.shares(100, 64, 80, 1)));
}
