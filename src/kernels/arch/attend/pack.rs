//! Packing: keys and values of a head coded and laid out for the tiles.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use std::ops::Range;

use super::super::simd::Simd;
use super::Head;
use super::integers::Integers;
use super::products::Products;
use crate::kernels::attention::{CacheLine, Heads, KEY_BLOCK};
use crate::kernels::half::half_to_f32;
use crate::kernels::layout::PANEL;

/// Least that the largest number of a dimension counts as: one that is 0 throughout has any step.
pub(super) const LEAST_LARGEST: f32 = f32::MIN_POSITIVE * 1e6;

/// Which third of `qkv`.
#[derive(Clone, Copy)]
pub(super) enum Third {
    Query = 0,
    Key = 1,
    Value = 2,
}

/// Dimensions of a head in one third of `qkv`.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    pub(super) head: Head<'a>,
    first: usize,
}

impl<'a> Columns<'a> {
    pub(super) fn new(head: &Head<'a>, third: Third) -> Self {
        Self { head: *head, first: third as usize * head.heads.d_context() + head.head * head.heads.d_head }
    }

    /// Where dimension `j` of the first token stands; those of the next tokens follow, [`PANEL`] apart.
    #[inline(always)]
    pub(super) unsafe fn start(&self, j: usize) -> *const u16 {
        let Self { head, first } = self;
        let column = first + j;
        // SAFETY: the columns are the head's.
        unsafe { head.qkv.add((column / PANEL * head.n_rows + head.first_row) * PANEL + column % PANEL) }
    }

    /// Whether all vectors of `width` are whole and do not cross a panel, so that they can be read from [`Columns::start`] on.
    #[inline(always)]
    pub(super) fn are_whole(&self, width: usize) -> bool {
        let Heads { d_head, .. } = self.head.heads;
        self.first.is_multiple_of(width) && d_head.is_multiple_of(width) && d_head == self.head.heads.d_padded()
    }

    /// Dimensions `j..j + LANES` of every token.
    #[inline(always)]
    pub(super) unsafe fn vector<S: Simd>(&self, j: usize) -> impl Fn(usize) -> S::F {
        let columns = *self;
        // SAFETY: in whole vectors all columns are the head's.
        let start = columns.are_whole(S::LANES).then(|| unsafe { columns.start(j) });
        // SAFETY: the token is one of the sequence's.
        move |position| unsafe {
            match start {
                Some(start) => S::load_half(start.add(position * PANEL)),
                None => columns.read::<S>(position, j),
            }
        }
    }

    /// Dimensions `j..j + LANES` of the token at `position`, 0 beyond the head.
    #[inline(always)]
    pub(super) unsafe fn read<S: Simd>(&self, position: usize, j: usize) -> S::F {
        // SAFETY: the token is one of the sequence's, the columns are the head's; whole vectors do not cross a panel.
        unsafe {
            let d_head = self.head.heads.d_head;
            if self.first.is_multiple_of(16) && j + S::LANES <= d_head {
                return S::load_half(self.start(j).add(position * PANEL));
            }
            let mut lanes = [0.0f32; 16];
            for (lane, value) in lanes.iter_mut().enumerate().take(S::LANES) {
                if j + lane < d_head {
                    *value = half_to_f32(*self.start(j + lane).add(position * PANEL));
                }
            }
            S::load(lanes.as_ptr())
        }
    }
}

/// Writes the step of each dimension and its inverse: `[d_padded]` each.
#[inline(always)]
unsafe fn steps<P: Products>(columns: &Columns<'_>, step: *mut f32, inverse: *mut f32) {
    let head = &columns.head;
    // SAFETY: both hold `d_padded` by contract.
    unsafe {
        let mut j = 0;
        while j < head.heads.d_padded() {
            let read = columns.vector::<P::S>(j);
            // Four chains hide the latency of the maxima.
            let mut largest = [P::S::splat(0.0); 4];
            let whole = head.len / 4 * 4;
            for position in (0..whole).step_by(4) {
                for chain in 0..4 {
                    largest[chain] = P::S::max(largest[chain], P::S::abs(read(position + chain)));
                }
            }
            for position in whole..head.len {
                largest[0] = P::S::max(largest[0], P::S::abs(read(position)));
            }
            let largest = P::S::max(P::S::max(largest[0], largest[1]), P::S::max(largest[2], largest[3]));
            let largest = P::S::max(largest, P::S::splat(LEAST_LARGEST));
            P::S::store(step.add(j), P::S::mul(largest, P::S::splat(1.0 / P::LARGEST)));
            P::S::store(inverse.add(j), P::S::div(P::S::splat(P::LARGEST), largest));
            j += P::S::LANES;
        }
    }
}

/// A vector of what a slot holds: a key or value, or the mean of several; 0 in a gap. `read` reads that of a token.
#[inline(always)]
unsafe fn read_slot<S: Simd>(read: &impl Fn(usize) -> S::F, keys: &Range<usize>) -> S::F {
    // SAFETY: positions are in the sequence.
    unsafe {
        match keys.len() {
            0 => S::splat(0.0),
            1 => read(keys.start),
            n => {
                let mut sum = S::splat(0.0);
                for position in keys.clone() {
                    sum = S::add(sum, read(position));
                }
                #[allow(clippy::cast_precision_loss, reason = "blocks are far below 2^24")]
                let share = S::splat(1.0 / n as f32);
                S::mul(sum, share)
            }
        }
    }
}

/// Packs keys and values of one head.
#[inline(always)]
pub(in crate::kernels::arch) unsafe fn pack<P: Products>(head: &Head<'_>, packed: *mut CacheLine, scratch: *mut f32) {
    // SAFETY: `packed` holds `lines` and `scratch` holds `scratch` for this head (the façade's checks).
    unsafe {
        let d = head.heads.d_padded();
        let n_slots = head.slots.n_slots(head.len);
        let (key_columns, value_columns) = (Columns::new(head, Third::Key), Columns::new(head, Third::Value));
        let step: *mut f32 = packed.cast();
        let (key_inverse, value_inverse, rows) = (scratch, scratch.add(d), scratch.add(2 * d));
        if P::GROUP > 1 {
            steps::<P>(&key_columns, step, key_inverse);
            steps::<P>(&value_columns, step.add(d), value_inverse);
        }
        let keys = step.add(2 * d);
        let values = keys.add(n_slots * d / P::GROUP);
        let n_groups = d / P::GROUP;
        let code = |x: <P::S as Simd>::F, inverse: *const f32| {
            if P::GROUP > 1 { P::S::mul(x, P::S::load(inverse)) } else { x }
        };
        for block in 0..n_slots / KEY_BLOCK {
            let first = block * KEY_BLOCK;
            let values = values.add(first / P::GROUP * d);
            let held: [Range<usize>; KEY_BLOCK] = match head.slots.natural && first + KEY_BLOCK <= head.len {
                true => std::array::from_fn(|index| first + index..first + index + 1),
                false => std::array::from_fn(|index| head.slots.keys(first + index, head.len)),
            };
            let mut j = 0;
            while j < d {
                let (key, value) = (key_columns.vector::<P::S>(j), value_columns.vector::<P::S>(j));
                for (index, held) in held.iter().enumerate() {
                    let x = code(read_slot::<P::S>(&key, held), key_inverse.add(j));
                    P::store_key(rows.add(index * n_groups), j, x);
                }
                for (index, group) in held.chunks_exact(P::GROUP).enumerate() {
                    let mut x = [P::S::splat(0.0); 4];
                    for g in 0..P::GROUP {
                        x[g] = code(read_slot::<P::S>(&value, &group[g]), value_inverse.add(j));
                    }
                    P::store_values(values.add(index * d + j), x);
                }
                j += P::S::LANES;
            }
            let to = keys.add(block * n_groups * KEY_BLOCK);
            for group in (0..n_groups).step_by(8) {
                for half in [0, 8] {
                    let from = rows.add(half * n_groups + group);
                    P::S::transpose(from, n_groups, to.add(group * KEY_BLOCK + half), KEY_BLOCK);
                }
            }
        }
    }
}
