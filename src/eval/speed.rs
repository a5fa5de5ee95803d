//! Latency and throughput of models in process, in turn, so that what disturbs the machine disturbs all of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::EvalError;
use super::stats::quantile;
use crate::model::{Architecture, Forward, ModelError, Outputs, RaggedBatch, Want};

/// A model with what it is asked.
#[expect(missing_debug_implementations, reason = "a model has none")]
pub struct Contender<'a> {
    /// They share the weights; the first answers single requests, all together answer a load.
    pub workers: &'a mut [Box<dyn Forward>],
    /// Token ids of the inputs.
    pub sequences: &'a [Vec<u32>],
}

/// How much to measure.
#[derive(Debug, Clone, Copy)]
pub struct SpeedSettings {
    /// Passes that are counted; one that is not goes before them.
    pub rounds: usize,
    /// Single requests of a pass, taken evenly from the inputs.
    pub requests: usize,
    /// Tokens of a batch under load.
    pub batch_tokens: usize,
}

impl Default for SpeedSettings {
    fn default() -> Self {
        Self { rounds: 5, requests: 100, batch_tokens: 1_024 }
    }
}

/// Result of [`measure_speed`].
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Speed {
    /// Inputs of a pass.
    pub n_sequences: usize,
    /// Tokens of a pass.
    pub n_tokens: usize,
    /// Passes.
    pub rounds: usize,
    /// Median time of a single request, the only one at its time.
    pub p50_ms: f64,
    /// 99th percentile of that time.
    pub p99_ms: f64,
    /// Tokens per second when all workers play batches of similar lengths; median of the passes.
    pub tokens_per_s: f64,
    /// The same in inputs.
    pub sequences_per_s: f64,
    #[serde(skip)]
    per_round: Vec<f64>,
}

impl Speed {
    /// The median over passes of this throughput by another model's of the same pass.
    ///
    /// # Panics
    /// If one of the two was not measured in turn with the other.
    #[must_use]
    pub fn throughput_ratio(&self, other: &Self) -> f64 {
        assert_eq!(self.per_round.len(), other.per_round.len(), "a ratio needs the same passes");
        let mut ratios: Vec<f64> = self.per_round.iter().zip(&other.per_round).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        quantile(&ratios, 0.5)
    }
}

/// Made-up inputs of 4 to 128 tokens, short ones more often, for measuring without text.
#[must_use]
pub fn made_up_sequences(architecture: &Architecture, count: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let longest = architecture.max_input_tokens.min(128) as f64;
    let shortest = longest.min(4.0);
    let vocab_size = u32::try_from(architecture.vocab_size).unwrap_or(u32::MAX);
    (0..count)
        .map(|_| {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 4 and 128")]
            let len = (shortest * (longest / shortest).powf(rng.random_range(0.0..1.0))) as usize;
            (0..len.max(1)).map(|_| rng.random_range(0..vocab_size)).collect()
        })
        .collect()
}

/// Batches in order of length, longest first, of at most `max_tokens` tokens (a longer input is a batch of its own) and
/// `max_count` inputs.
///
/// # Errors
/// For an empty input.
pub fn batches(
    sequences: &[Vec<u32>],
    max_tokens: usize,
    max_count: Option<usize>,
) -> Result<Vec<RaggedBatch>, ModelError> {
    let mut sorted: Vec<&Vec<u32>> = sequences.iter().collect();
    sorted.sort_by_key(|ids| std::cmp::Reverse(ids.len()));
    let mut batches = Vec::new();
    let mut batch = RaggedBatch::new();
    for ids in sorted {
        let full = batch.n_tokens() + ids.len() > max_tokens || max_count.is_some_and(|max| batch.n_seqs() >= max);
        if full && batch.n_seqs() > 0 {
            batches.push(std::mem::take(&mut batch));
        }
        batch.push(ids)?;
    }
    batches.push(batch);
    Ok(batches)
}

/// What one pass over batches took.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Seconds of each forward call.
    pub samples: Vec<f64>,
    /// Seconds from start to end.
    pub wall: f64,
}

/// Plays all batches once; with several workers each takes the next batch that is left. The first plays on the caller's thread, so that
/// passes of a lone worker find everything as warm as calls that follow each other do.
///
/// # Errors
/// If the model fails.
///
/// # Panics
/// If the model does, or there is no worker.
pub fn play(workers: &mut [Box<dyn Forward>], batches: &[RaggedBatch]) -> Result<Pass, ModelError> {
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let (first, others) = workers.split_first_mut().expect("somebody plays");
    let samples = std::thread::scope(|scope| {
        let play = |worker: &mut Box<dyn Forward>| play_next(worker.as_mut(), batches, &next);
        let threads: Vec<_> = others.iter_mut().map(|worker| scope.spawn(move || play(worker))).collect();
        let mut samples = play(first)?;
        for thread in threads {
            samples.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<_, ModelError>(samples)
    })?;
    Ok(Pass { samples, wall: started.elapsed().as_secs_f64() })
}

/// Plays the next batch as long as one is left; returns the seconds of each.
fn play_next(worker: &mut dyn Forward, batches: &[RaggedBatch], next: &AtomicUsize) -> Result<Vec<f64>, ModelError> {
    let mut out = Outputs::default();
    let mut samples = Vec::new();
    while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
        let started = Instant::now();
        worker.forward(batch, Want::Pooled, &mut out)?;
        samples.push(started.elapsed().as_secs_f64());
    }
    Ok(samples)
}

/// Measures all models in turn, pass by pass; the order rotates. `progress` is told of every pass of a model.
///
/// # Errors
/// If a model fails.
///
/// # Panics
/// If a contender has no worker or no input.
pub fn measure_speed(
    contenders: &mut [Contender<'_>],
    settings: &SpeedSettings,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Speed>, EvalError> {
    let load = contenders
        .iter()
        .map(|contender| batches(contender.sequences, settings.batch_tokens, None))
        .collect::<Result<Vec<_>, _>>()?;
    let requests = contenders
        .iter()
        .map(|contender| {
            let n = contender.sequences.len();
            let count = settings.requests.clamp(1, n);
            (0..count).map(|i| RaggedBatch::from_sequences(&[&contender.sequences[i * n / count]])).collect()
        })
        .collect::<Result<Vec<Vec<_>>, _>>()?;
    let n = contenders.len();
    let mut walls = vec![Vec::new(); n];
    let mut latencies = vec![Vec::new(); n];
    for round in 0..=settings.rounds {
        for place in 0..n {
            let index = (round + place) % n;
            let workers = &mut *contenders[index].workers;
            let pass = play(workers, &load[index])?;
            let single = play(&mut workers[..1], &requests[index])?;
            if round > 0 {
                walls[index].push(pass.wall);
                latencies[index].extend(single.samples);
            }
            progress(1);
        }
    }
    Ok(contenders
        .iter()
        .zip(walls)
        .zip(latencies)
        .map(|((contender, walls), mut latencies)| {
            let n_tokens: usize = contender.sequences.iter().map(Vec::len).sum();
            let n_sequences = contender.sequences.len();
            latencies.sort_by(f64::total_cmp);
            let per_round: Vec<f64> = walls.iter().map(|wall| n_tokens as f64 / wall).collect();
            let mut sorted = per_round.clone();
            sorted.sort_by(f64::total_cmp);
            let tokens_per_s = quantile(&sorted, 0.5);
            Speed {
                n_sequences,
                n_tokens,
                rounds: settings.rounds,
                p50_ms: quantile(&latencies, 0.5) * 1e3,
                p99_ms: quantile(&latencies, 0.99) * 1e3,
                tokens_per_s,
                sequences_per_s: tokens_per_s * n_sequences as f64 / n_tokens as f64,
                per_round,
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Activation, ArchitectureSpec, Band, Family, ForwardMemory, LayerConfig, Pooling, Positions};
    use std::time::Duration;

    /// Takes a given time per call and counts its calls.
    struct Slow {
        architecture: Architecture,
        per_call: Duration,
    }

    impl Forward for Slow {
        fn architecture(&self) -> &Architecture {
            &self.architecture
        }
        fn forward(&mut self, _batch: &RaggedBatch, _want: Want, _out: &mut Outputs) -> Result<(), ModelError> {
            std::thread::sleep(self.per_call);
            Ok(())
        }
        fn memory(&self) -> ForwardMemory {
            ForwardMemory::default()
        }
    }

    fn architecture() -> Architecture {
        Architecture::new(ArchitectureSpec {
            ranges: Vec::new(),
            family: Family::Bert,
            vocab_size: 50,
            n_token_types: 2,
            positions: Positions { table_len: 64, offset: 0, tiled: false },
            d_model: 8,
            norm_eps: 1e-12,
            activation: Activation::Gelu,
            layers: vec![LayerConfig { n_heads: 2, d_head: 4, d_ffn: 16, band: Band::FULL }],
            pooling: Pooling::Mean,
            normalize: true,
            max_input_tokens: 60,
            head: None,
        })
        .unwrap()
    }

    #[test]
    fn a_model_that_takes_longer_is_slower() {
        let sequences = made_up_sequences(&architecture(), 12, 1);
        assert!(sequences.iter().all(|ids| (4..=60).contains(&ids.len()) && ids.iter().all(|id| *id < 50)));
        let worker = |ms| -> Box<dyn Forward> {
            Box::new(Slow { architecture: architecture(), per_call: Duration::from_millis(ms) })
        };
        let (mut fast, mut slow) = (vec![worker(2)], vec![worker(8), worker(8)]);
        let mut contenders = [
            Contender { workers: &mut fast, sequences: &sequences },
            Contender { workers: &mut slow, sequences: &sequences },
        ];
        let settings = SpeedSettings { rounds: 3, requests: 2, batch_tokens: 60 };
        let mut steps = 0;
        let speeds = measure_speed(&mut contenders, &settings, |n| steps += n).unwrap();
        assert_eq!(steps, 2 * 4);
        assert!(speeds[0].p50_ms >= 2.0 && speeds[1].p50_ms >= 8.0 && speeds[1].p99_ms >= speeds[1].p50_ms);
        assert_eq!(speeds[0].n_tokens, sequences.iter().map(Vec::len).sum::<usize>());
        // A quarter of the speed, twice the workers.
        let ratio = speeds[1].throughput_ratio(&speeds[0]);
        assert!((0.3..0.8).contains(&ratio), "{ratio}");
    }

    #[test]
    fn batches_hold_every_input_within_the_limits() {
        let sequences: Vec<Vec<u32>> = [3, 9, 2, 4, 4].iter().map(|&len| vec![1; len]).collect();
        let shape = |max_tokens, max_count| -> Vec<Vec<usize>> {
            let batches = batches(&sequences, max_tokens, max_count).unwrap();
            batches.iter().map(|batch| (0..batch.n_seqs()).map(|i| batch.sequence(i).len()).collect()).collect()
        };
        assert_eq!(shape(8, None), [vec![9], vec![4, 4], vec![3, 2]]);
        assert_eq!(shape(100, Some(3)), [vec![9, 4, 4], vec![3, 2]]);
    }
}
