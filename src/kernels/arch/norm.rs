//! The residual stream's passes, written once over [`Simd`] and instantiated per instruction set: addition, LayerNorm, codes.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::rows::{FAR, NOT, TOGETHER, code_run, in_fours, steps};
use super::simd::Simd;
use crate::kernels::layout::{PANEL, RowScale, RowSums};

/// `n_rows` rows of a block, or nothing, to be added to columns of the residual stream.
pub(super) struct Add {
    /// The first row in the block's first panel, or null; those of the next panels lie `panel` floats further.
    pub(super) block: *const f32,
    pub(super) panel: usize,
    pub(super) n_rows: usize,
    /// The first column, a panel's first, of the first row; rows are `stride` apart.
    pub(super) stream: *mut f32,
    pub(super) stride: usize,
    /// Columns that are taken.
    pub(super) width: usize,
    /// One per row: takes the results along.
    pub(super) sums: *mut RowSums,
}

/// Rows of the residual stream to be normalised and turned into codes.
pub(super) struct Normalize {
    pub(super) n_rows: usize,
    pub(super) n: usize,
    /// `[n_rows, n]`; receives the result.
    pub(super) stream: *mut f32,
    /// The sums of each row.
    pub(super) sums: *const RowSums,
    pub(super) gain: *const f32,
    pub(super) bias: *const f32,
    pub(super) eps: f32,
    pub(super) codes: *mut u8,
    pub(super) stride: usize,
    pub(super) scales: *mut RowScale,
    pub(super) range: Option<RowScale>,
}

/// The sums of up to four vectors that lie side by side in a panel, and those of their squares, by lane. Whoever adds up rows does it
/// by these, so that the sums are the same bits whatever the rows come from.
pub(super) struct Moments<S: Simd> {
    sum: S::F,
    square: S::F,
}

impl<S: Simd> Clone for Moments<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Simd> Copy for Moments<S> {}

/// # Safety
/// Of its functions, as for [`Simd`].
impl<S: Simd> Moments<S> {
    #[inline(always)]
    pub(super) unsafe fn of(x: S::F) -> Self {
        // SAFETY: the instruction set is present by contract.
        Self { sum: x, square: unsafe { S::mul(x, x) } }
    }

    #[inline(always)]
    pub(super) unsafe fn and(self, x: S::F) -> Self {
        // SAFETY: the instruction set is present by contract.
        unsafe { Self { sum: S::add(self.sum, x), square: S::fma(x, x, self.square) } }
    }

    /// Takes them into the sums of their row.
    #[inline(always)]
    pub(super) unsafe fn take(self, sums: *mut RowSums) {
        // SAFETY: there are sums, by contract.
        unsafe {
            let (sum, square) = ((*sums).sum.as_mut_ptr(), (*sums).square.as_mut_ptr());
            S::store(sum, S::add(S::load(sum), self.sum));
            S::store(square, S::add(S::load(square), self.square));
        }
    }
}

/// `stream += block`, if there is a block, and the sums of what results.
#[inline(always)]
pub(super) unsafe fn add<S: Simd>(args: &Add) {
    // SAFETY: rows, sums and the block's panels are there (the façade's checks).
    unsafe {
        for row in 0..args.n_rows {
            let (stream, sums) = (args.stream.add(row * args.stride), args.sums.add(row));
            for column in (0..args.width).step_by(PANEL) {
                let from = args.block.wrapping_add(column / PANEL * args.panel + row * PANEL);
                let (x, width) = (stream.add(column), PANEL.min(args.width - column));
                let mut i = 0;
                while i + 4 * S::LANES <= width {
                    let mut values = [S::splat(0.0); 4];
                    for j in 0..4 {
                        let at = i + j * S::LANES;
                        values[j] = S::load(x.add(at));
                        if !args.block.is_null() {
                            values[j] = S::add(values[j], S::load(from.add(at)));
                            S::store(x.add(at), values[j]);
                        }
                    }
                    let [a, b, c, d] = values;
                    Moments::<S>::of(a).and(b).and(c).and(d).take(sums);
                    i += 4 * S::LANES;
                }
                while i < width {
                    let rest = S::LANES.min(width - i);
                    let mut value = S::load_some(x.add(i), rest, 0.0);
                    if !args.block.is_null() {
                        value = S::add(value, S::load_some(from.add(i), rest, 0.0));
                        S::store_some(x.add(i), rest, value);
                    }
                    Moments::<S>::of(value).take(sums);
                    i += rest;
                }
            }
        }
    }
}

/// Four sums, each of which waits for its own last addition alone.
#[inline(always)]
unsafe fn total<S: Simd>(sums: [S::F; 4]) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe { S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])) }
}

/// `Σ (x − mean)²`, by lane.
#[inline(always)]
unsafe fn squares_around<S: Simd>(x: *const f32, n: usize, mean: f32) -> S::F {
    // SAFETY: `x` holds `n`.
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        let centre = S::splat(mean);
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            for j in 0..4 {
                let centred = S::sub(S::load(x.add(i + j * S::LANES)), centre);
                sums[j] = S::fma(centred, centred, sums[j]);
            }
            i += 4 * S::LANES;
        }
        while i < n {
            let rest = S::LANES.min(n - i);
            let centred = S::sub(S::load_some(x.add(i), rest, mean), centre);
            sums[0] = S::fma(centred, centred, sums[0]);
            i += rest;
        }
        total::<S>(sums)
    }
}

/// `x = (x − mean) · inverse · gain + bias`; returns the range of what results, by lane.
#[inline(always)]
unsafe fn scale<S: Simd>(args: &Normalize, x: *mut f32, mean: f32, inverse: f32) -> (S::F, S::F) {
    // SAFETY: `x`, gain and bias hold `n`.
    unsafe {
        let (mut low, mut high) = ([S::splat(f32::INFINITY); 4], [S::splat(f32::NEG_INFINITY); 4]);
        let (n, mean, inverse) = (args.n, S::splat(mean), S::splat(inverse));
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            for j in 0..4 {
                let at = i + j * S::LANES;
                let gain = S::mul(S::load(args.gain.add(at)), inverse);
                let y = S::fma(S::sub(S::load(x.add(at)), mean), gain, S::load(args.bias.add(at)));
                S::store(x.add(at), y);
                low[j] = S::min(low[j], y);
                high[j] = S::max(high[j], y);
            }
            i += 4 * S::LANES;
        }
        while i < n {
            let rest = S::LANES.min(n - i);
            let gain = S::mul(S::load_some(args.gain.add(i), rest, 0.0), inverse);
            let centred = S::sub(S::load_some(x.add(i), rest, 0.0), mean);
            S::store_some(x.add(i), rest, S::fma(centred, gain, S::load_some(args.bias.add(i), rest, 0.0)));
            low[0] = S::min(low[0], S::load_some(x.add(i), rest, f32::INFINITY));
            high[0] = S::max(high[0], S::load_some(x.add(i), rest, f32::NEG_INFINITY));
            i += rest;
        }
        let low = S::min(S::min(low[0], low[1]), S::min(low[2], low[3]));
        (low, S::max(S::max(high[0], high[1]), S::max(high[2], high[3])))
    }
}

/// [`normalize`] of the `R` rows from `first` on.
#[inline(always)]
unsafe fn rows<S: Simd, const R: usize, const BEYOND: u8>(args: &Normalize, first: usize) {
    // SAFETY: the rows are there, sizes as in `normalize`.
    unsafe {
        let n = args.n;
        #[allow(clippy::cast_precision_loss, reason = "widths are at most 65,536")]
        let inverse_n = 1.0 / n as f32;
        let x = args.stream.add(first * n);
        let (mut sums, mut squares) = ([S::splat(0.0); TOGETHER], [S::splat(0.0); TOGETHER]);
        for r in 0..R {
            let of_row = &*args.sums.add(first + r);
            (sums[r], squares[r]) = (S::load(of_row.sum.as_ptr()), S::load(of_row.square.as_ptr()));
        }
        let means = S::sums(sums).map(|sum| sum * inverse_n);
        let mut inverses = S::sums(squares);
        for r in 0..R {
            let mean = means[r];
            let mut variance = inverses[r] * inverse_n - mean * mean;
            // The difference of two large numbers has lost what matters of them.
            if variance < mean * mean {
                variance = S::sum(squares_around::<S>(x.add(r * n), n, mean)) * inverse_n;
            }
            inverses[r] = 1.0 / (variance + args.eps).sqrt();
        }
        let (mut low, mut high) = ([S::splat(0.0); TOGETHER], [S::splat(0.0); TOGETHER]);
        for r in 0..R {
            (low[r], high[r]) = scale::<S>(args, x.add(r * n), means[r], inverses[r]);
        }
        let by = steps(S::lowests(low), S::highests(high), args.range);
        for r in 0..R {
            *args.scales.add(first + r) = by[r].0;
            let to = args.codes.add((first + r) * args.stride);
            code_run::<S, BEYOND>(None, x.add(r * n), n, to, S::splat(by[r].0.low), S::splat(by[r].1));
        }
    }
}

/// `y = (x − mean) / √(var + eps) · gain + bias` and codes of y, per row. The sums of a few rows are reduced together.
///
/// The variance is that of the sums, `Σx² / n − mean²`, unless the mean is larger than the deviation: then it is taken around the
/// mean in a pass of its own.
#[inline(always)]
pub(super) unsafe fn normalize<S: Simd>(args: &Normalize) {
    // SAFETY: stream, sums, codes and scales hold `n_rows`, `gain` and `bias` hold `n` (the façade's checks).
    unsafe {
        match args.range {
            None => in_fours!(args.n_rows, |first| rows::<S, NOT>(args, first)),
            Some(_) => in_fours!(args.n_rows, |first| rows::<S, FAR>(args, first)),
        }
    }
}
