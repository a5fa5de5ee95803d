//! Attention in bytes with AVX-512 for queries that all see the same keys from the first one on, as in full attention: 16 queries
//! at once, whose maxima, sums and codes are reduced together; every other kind is [`super::attend`]'s. The packed head is the same,
//! and so is every number: products are integers, and what is not is computed in the same order.
//!
//! ```text
//! scores   16 queries [16][d] s8        by keys   [d / 4][16] dwords of u8
//! context  16 queries [16][keys] u8     by values [keys / 4][d] dwords of s8
//! ```
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::avx512::Avx512;
use super::integers::{Vnni, exponent, weights};
use super::pack::{Columns, Third};
use super::products::{Bytes, Products as ProductsOf};
use super::{Attend, CHUNK, LEAST_QUERY, exponent_unit, wide, write_row};
use crate::kernels::attention::{AttentionForm, KEY_BLOCK, SlotRange};

/// The products of a tile.
///
/// # Safety
/// The instruction set must be there when its functions are called.
pub(in crate::kernels::arch) unsafe trait Tiles {
    /// Whether the last keys' values are read in whole steps, with zeros behind the last.
    const WHOLE_STEPS: bool;

    /// To be called before the others.
    unsafe fn prepare();
    /// Scores of the first `n_queries` of 16 queries, and the largest of each by lane. `queries` is `[16, QUERY_STRIDE]`, zeros
    /// beyond the dimensions up to a whole step; `to` is `[16, stride]`, in bytes.
    unsafe fn scores(queries: *const u8, n_queries: usize, keys: Keys, to: *mut u8, stride: usize, highest: &mut Lanes);
    /// Sums of weights times values for the first `n_queries` of 16 queries; `weights` is `[16, WEIGHT_STRIDE]`, zeros up to a whole
    /// step.
    unsafe fn context(weights: *const u8, n_queries: usize, values: Values, sums: &mut Sums);
}

/// Queries, keys and dimensions of a tile of sums.
pub(super) const TILE: usize = 16;
/// Bytes of a step: dimensions of the scores' products, keys of the context's.
pub(super) const STEP: usize = 64;
/// Widest packed head.
pub(super) const MAX_D: usize = 128;
/// Dimensions that are computed at once.
pub(super) const PAIR: usize = 2 * TILE;
/// Bytes from a query's codes to the next one's.
pub(super) const QUERY_STRIDE: usize = MAX_D;
/// Bytes from a query's weights to the next one's. Rows a whole number of pages apart would all meet in the same few lines of the first
/// cache; so it is with scores.
pub(super) const WEIGHT_STRIDE: usize = AttentionForm::Int8.max_keys() + STEP;

pub(super) type Products = Bytes<Avx512, Vnni>;

/// Where the parts of a tile lie in scratch, in bytes from its start; all are whole cache lines.
struct Room {
    scores: usize,
    score_stride: usize,
    weights: usize,
    end: usize,
}

impl Room {
    fn new(n_keys: usize) -> Self {
        let score_stride = 4 * n_keys.next_multiple_of(STEP) + STEP;
        let scores = TILE * QUERY_STRIDE;
        let weights = scores + TILE * score_stride;
        Self { scores, score_stride, weights, end: weights + TILE * WEIGHT_STRIDE }
    }
}

/// Floats of scratch; see [`super::scratch`].
pub(in crate::kernels::arch) fn scratch(width: usize, d_padded: usize) -> usize {
    let width_here = width.min(AttentionForm::Int8.max_keys().next_multiple_of(KEY_BLOCK));
    super::scratch(width, d_padded).max(Room::new(width_here).end / 4)
}

/// Keys that all queries see, if these are the first so many and nothing else.
fn n_keys(args: &Attend<'_>) -> Option<usize> {
    let (seen, head) = (&args.keys[0], &args.head);
    let mut ranges = seen.shared.iter().filter(|range| !range.is_empty());
    let (Some(SlotRange { start: 0, end }), None) = (ranges.next(), ranges.next()) else {
        return None;
    };
    let n = *end as usize;
    let alone = args.uniform && seen.own.iter().all(SlotRange::is_empty) && head.slots.pooled == 0;
    (alone && n <= AttentionForm::Int8.max_keys() && head.heads.d_padded() <= MAX_D).then_some(n)
}

/// A vector for each of 16 queries.
pub(super) type Lanes = [__m512i; TILE];

/// `n_keys` packed keys in `n_slots` slots, the next multiple of [`KEY_BLOCK`]; readable up to a whole step.
#[derive(Clone, Copy)]
pub(in crate::kernels::arch) struct Keys {
    pub(super) first: *const u8,
    pub(super) d: usize,
    pub(super) n_keys: usize,
    pub(super) n_slots: usize,
}

/// Values of up to [`CHUNK`] keys, from the first dimension of a pair on.
#[derive(Clone, Copy)]
pub(in crate::kernels::arch) struct Values {
    pub(super) first: *const u8,
    pub(super) n_keys: usize,
    /// The keys behind the last whole step, filled up; if [`Tiles::WHOLE_STEPS`] and there are any.
    pub(super) rest: *const u8,
    /// Bytes from one group of four keys to the next.
    pub(super) line: usize,
}

/// Sums of 16 queries by [`PAIR`] dimensions.
#[repr(C, align(64))]
pub(in crate::kernels::arch) struct Sums(pub(super) [MaybeUninit<i32>; TILE * PAIR]);

/// One number of each of 16 rows: what `combine` makes of the row's lanes, in pairs, pairs of pairs and so on.
macro_rules! reduce {
    ($rows:expr, $combine:ident) => {{
        let rows = &$rows;
        let mut fours = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            let mut twos = [_mm512_setzero_si512(); 2];
            for j in 0..2 {
                let (a, b) = (rows[4 * i + 2 * j], rows[4 * i + 2 * j + 1]);
                twos[j] = $combine(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            }
            fours[i] = $combine(_mm512_unpacklo_epi64(twos[0], twos[1]), _mm512_unpackhi_epi64(twos[0], twos[1]));
        }
        let mut halves = [_mm512_setzero_si512(); 2];
        for i in 0..2 {
            let (a, b) = (fours[2 * i], fours[2 * i + 1]);
            halves[i] = $combine(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        }
        let [a, b] = halves;
        $combine(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b))
    }};
}
pub(super) use reduce;

/// A number for each of the tile's queries.
#[repr(C, align(64))]
pub(super) struct PerQuery(pub(super) [f32; TILE]);

impl PerQuery {
    #[inline(always)]
    pub(super) unsafe fn new(x: __m512) -> Self {
        let mut numbers = Self([0.0; TILE]);
        // SAFETY: AVX-512 F is there by contract.
        unsafe { _mm512_store_ps(numbers.0.as_mut_ptr(), x) }
        numbers
    }
}

/// Codes `size` queries from the one at `position` on; returns what the scores of each are multiplied with. (The same as
/// [`super::code_query`] of each, but 16 at a time.)
///
/// # Safety
/// AVX-512 must be there; `to` is `[16, QUERY_STRIDE]`, `steps` one per dimension, and `d` at most [`MAX_D`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn code_queries(
    columns: &Columns<'_>,
    position: usize,
    size: usize,
    steps: *const f32,
    to: *mut u8,
) -> __m512 {
    // SAFETY: as the contract says.
    unsafe {
        let heads = columns.head.heads;
        let d = heads.d_padded();
        // Numbers that are not negative are in the order of their bits.
        let mut largest = [_mm512_setzero_si512(); TILE];
        largest[..size].fill(_mm512_castps_si512(_mm512_set1_ps(LEAST_QUERY)));
        let mut scaled = [[const { MaybeUninit::<__m512>::uninit() }; TILE]; MAX_D / TILE];
        for v in 0..d / TILE {
            let read = columns.vector::<Avx512>(v * TILE);
            let step = _mm512_loadu_ps(steps.add(v * TILE));
            for q in 0..size {
                let x = _mm512_mul_ps(read(position + q), step);
                scaled[v][q].write(x);
                largest[q] = _mm512_max_epi32(largest[q], _mm512_castps_si512(_mm512_abs_ps(x)));
            }
        }
        let largest = _mm512_castsi512_ps(reduce!(largest, _mm512_max_epi32));
        let most = <Products as ProductsOf>::LARGEST;
        let inverse = PerQuery::new(_mm512_div_ps(_mm512_set1_ps(most), largest));
        for v in 0..d / TILE {
            for q in 0..size {
                let inverse = _mm512_set1_ps(inverse.0[q]);
                let code = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[v][q].assume_init(), inverse));
                _mm_storeu_si128(to.add(q * QUERY_STRIDE + v * TILE).cast(), _mm512_cvtepi32_epi8(code));
            }
        }
        _mm512_mul_ps(largest, _mm512_set1_ps(exponent_unit(heads) / most))
    }
}

/// The largest of the first `n` scores, by lane.
///
/// # Safety
/// AVX-512 must be there; scores must be as wide as whole vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn highest(scores: *const i32, n: usize) -> __m512i {
    // SAFETY: as the contract says.
    unsafe {
        let mut highest = [_mm512_set1_epi32(i32::MIN); 2];
        let mut i = 0;
        while i + 32 <= n {
            highest[0] = _mm512_max_epi32(highest[0], _mm512_loadu_si512(scores.add(i).cast()));
            highest[1] = _mm512_max_epi32(highest[1], _mm512_loadu_si512(scores.add(i + 16).cast()));
            i += 32;
        }
        if i + 16 <= n {
            highest[0] = _mm512_max_epi32(highest[0], _mm512_loadu_si512(scores.add(i).cast()));
            i += 16;
        }
        if i < n {
            let last = _mm512_loadu_si512(scores.add(i).cast());
            highest[1] = _mm512_mask_max_epi32(highest[1], seen(n), highest[1], last);
        }
        _mm512_max_epi32(highest[0], highest[1])
    }
}

/// Lanes of the last of `n` scores' vectors, if it is not whole.
pub(super) fn seen(n: usize) -> u16 {
    (1 << (n % 16)) - 1
}

/// Weights of a row of `n` scores, zeros up to the end of the step; returns their sums by lane. Exponents are `scale · score +
/// offset`.
///
/// # Safety
/// AVX-512 must be there; scores and weights must be as wide as the steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn weigh(scores: *const i32, n: usize, scale: f32, offset: f32, to: *mut u8) -> __m512i {
    // SAFETY: as the contract says.
    unsafe {
        let (scale, offset) = (_mm512_set1_ps(scale), _mm512_set1_ps(offset));
        let mut total = _mm512_setzero_si512();
        let mut i = 0;
        while i + STEP <= n {
            let mut x = [_mm512_setzero_si512(); 4];
            for v in 0..4 {
                let score = _mm512_cvtepi32_ps(_mm512_loadu_si512(scores.add(i + v * 16).cast()));
                x[v] = _mm512_cvtps_epi32(_mm512_fmadd_ps(score, scale, offset));
            }
            let bytes = weights(x);
            total = _mm512_dpbusd_epi32(total, bytes, _mm512_set1_epi8(1));
            _mm512_storeu_si512(to.add(i).cast(), bytes);
            i += STEP;
        }
        if i < n {
            // What is hidden has the smallest exponent.
            let mut x = [_mm512_set1_epi32(i32::MIN); 4];
            for v in 0..4 {
                let at = i + v * 16;
                if at < n {
                    let score = _mm512_cvtepi32_ps(_mm512_loadu_si512(scores.add(at).cast()));
                    x[v] = _mm512_cvtps_epi32(_mm512_fmadd_ps(score, scale, offset));
                }
                if at < n && at + 16 > n {
                    x[v] = _mm512_mask_mov_epi32(_mm512_set1_epi32(i32::MIN), seen(n), x[v]);
                }
            }
            let bytes = weights(x);
            total = _mm512_dpbusd_epi32(total, bytes, _mm512_set1_epi8(1));
            _mm512_storeu_si512(to.add(i).cast(), bytes);
        }
        total
    }
}

/// [`super::attend`] in bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(in crate::kernels::arch) unsafe fn attend<T: Tiles>(args: &Attend<'_>) {
    let Some(n_keys) = n_keys(args) else {
        // SAFETY: passed on unchanged.
        return unsafe { super::attend::<Products, 8, 2, 1>(args) };
    };
    let head = &args.head;
    let d = head.heads.d_padded();
    let room = Room::new(n_keys);
    // SAFETY: `packed` was filled by `pack` for the same head: steps, then keys, then values, as `super` draws them. Behind the
    // last block of keys come at least as many bytes of values, which is what a step reads too much of it. `scratch` and `out`
    // have the sizes of the façade. An `Isa` is the proof of the instruction set.
    unsafe {
        T::prepare();
        let step: *const f32 = args.packed.cast();
        let keys: *const u8 = step.add(2 * d).cast();
        let values = keys.add(head.slots.n_slots(head.len) * d);
        let base: *mut u8 = args.scratch.cast();
        let (queries, scores, weights) = (base, base.add(room.scores), base.add(room.weights));
        if !d.is_multiple_of(STEP) {
            queries.write_bytes(0, TILE * QUERY_STRIDE);
        }
        let n_slots = n_keys.next_multiple_of(KEY_BLOCK);
        let (n_whole, n_rest) = (n_slots / STEP, n_slots % STEP);
        let mut filled = Filled([const { MaybeUninit::uninit() }; STEP * MAX_D]);
        let rest: *mut u8 = filled.0.as_mut_ptr().cast();
        if T::WHOLE_STEPS && n_rest > 0 {
            rest.copy_from(values.add(n_whole * STEP * d), n_rest * d);
            rest.add(n_rest * d).write_bytes(0, (STEP - n_rest) * d);
        }
        let keys = Keys { first: keys, d, n_keys, n_slots };
        let columns = Columns::new(head, Third::Query);
        for first in (0..args.keys.len()).step_by(TILE) {
            let size = TILE.min(args.keys.len() - first);
            let scale = match wide::code_queries(head, args.first + first, size, step, queries) {
                Some(scale) => scale,
                None => code_queries(&columns, args.first + first, size, step, queries),
            };
            let mut rows = [_mm512_setzero_si512(); TILE];
            T::scores(queries, size, keys, scores, room.score_stride, &mut rows);
            // Sums of products of bytes are below 2^24.
            let highest = _mm512_cvtepi32_ps(reduce!(rows, _mm512_max_epi32));
            let (scale, offset) = exponent(highest, scale);
            let (scale, offset) = (PerQuery::new(scale), PerQuery::new(offset));
            for q in 0..size {
                let (row, to) = (scores.add(q * room.score_stride).cast(), weights.add(q * WEIGHT_STRIDE));
                rows[q] = weigh(row, n_keys, scale.0[q], offset.0[q], to);
            }
            let sums = _mm512_cvtepi32_ps(reduce!(rows, _mm512_add_epi32));
            let inverse = PerQuery::new(_mm512_div_ps(_mm512_set1_ps(1.0), sums));
            for dimension in (0..d).step_by(PAIR) {
                let mut context = [[_mm512_setzero_ps(); 2]; TILE];
                let mut sums = Sums([const { MaybeUninit::uninit() }; TILE * PAIR]);
                for key in (0..n_slots).step_by(CHUNK) {
                    let of_chunk = Values {
                        first: values.add(key * d + 4 * dimension),
                        n_keys: CHUNK.min(n_slots - key),
                        rest: rest.add(4 * dimension),
                        line: 4 * d,
                    };
                    T::context(weights.add(key), size, of_chunk, &mut sums);
                    for q in 0..size {
                        for v in 0..2 {
                            let sum = _mm512_load_si512(sums.0.as_ptr().add(q * PAIR + v * TILE).cast());
                            context[q][v] = _mm512_add_ps(context[q][v], _mm512_cvtepi32_ps(sum));
                        }
                    }
                }
                let n = PAIR.min(head.heads.d_head.saturating_sub(dimension));
                for q in 0..size {
                    for v in 0..2 {
                        let step = _mm512_loadu_ps(step.add(d + dimension + v * TILE));
                        context[q][v] = _mm512_mul_ps(context[q][v], step);
                    }
                    write_row::<Avx512, 2>(args, first + q, dimension, &context[q], n, inverse.0[q]);
                }
            }
        }
    }
}

/// The last keys' values, zeros behind them.
#[repr(C, align(64))]
struct Filled([MaybeUninit<u8>; STEP * MAX_D]);
