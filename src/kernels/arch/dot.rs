//! The byte operations that matrix products are written in. As with [`Simd`], a
//! body generic over [`Dot`] is instantiated under the target features of each instruction set.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::portable::Portable;
use super::simd::Simd;

/// Dot products of four bytes, and bytes by table. A vector of bytes belongs to as many columns as the vectors of `S` have
/// lanes, four consecutive bytes to each.
///
/// # Safety
/// As for [`Simd`].
pub(super) unsafe trait Dot: Copy {
    /// The numbers that sums become.
    type S: Simd;
    /// Bytes, four per column.
    type B: Copy;
    /// Bytes of weights, made ready for [`Dot::dot`].
    type W: Copy;
    /// Four codes, the same for every column, made ready for [`Dot::dot`].
    type C: Copy;
    /// Sums under way.
    type A: Copy;
    /// Room for a few rows of codes in the form that [`Dot::codes`] reads.
    type Room;
    /// Bytes of a code in that form.
    const CODE_BYTES: usize = 1;
    /// Whether two steps are cheaper together, as [`Dot::dot_two`].
    const PAIRED: bool = false;
    /// What [`Dot::dot`] subtracts from every code.
    const CODE_BIAS: i32 = 0;

    fn room() -> Self::Room;
    /// Rows of `k` codes that fit the room; there is always one.
    fn rows_at_once(k: usize) -> usize;
    /// Puts `n_rows` rows of `k` codes (a multiple of four, at most 65,536) into the form that [`Dot::codes`] reads; returns
    /// where, and the bytes from row to row.
    unsafe fn prepare(
        room: &mut Self::Room,
        codes: *const u8,
        stride: usize,
        n_rows: usize,
        k: usize,
    ) -> (*const u8, usize);
    unsafe fn zero() -> Self::A;
    /// Where sums start so that the codes' bias is made up for; `sums` holds the sum of the weights of each column.
    unsafe fn start(sums: *const i32) -> Self::A;
    /// The sums, one per column.
    unsafe fn finish(sums: Self::A) -> <Self::S as Simd>::I;
    unsafe fn bytes(from: *const u8) -> Self::B;
    /// One byte per column, repeated four times.
    unsafe fn spread(from: *const i8) -> Self::B;
    /// The lower halves of all bytes.
    unsafe fn low(x: Self::B) -> Self::B;
    /// The upper halves of all bytes.
    unsafe fn high(x: Self::B) -> Self::B;
    /// `table[index]` for indices below 16; the table is repeated in [`Dot::table`].
    unsafe fn lookup(table: Self::B, index: Self::B) -> Self::B;
    /// 16 bytes, wherever [`Dot::lookup`] wants them.
    unsafe fn table(from: *const i8) -> Self::B;
    unsafe fn sub(a: Self::B, b: Self::B) -> Self::B;
    /// Keeps the bytes of each column that `mask` has ones for.
    unsafe fn keep(x: Self::B, mask: u32) -> Self::B;
    unsafe fn weights(x: Self::B) -> Self::W;
    /// [`Dot::weights`] of bytes in memory.
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::W {
        // SAFETY: passed on.
        unsafe { Self::weights(Self::bytes(from)) }
    }
    unsafe fn codes(from: *const u8) -> Self::C;
    /// `sums[n] + Σ_j (codes[j] − CODE_BIAS) · weights[n][j]`.
    unsafe fn dot(sums: Self::A, codes: Self::C, weights: Self::W) -> Self::A;
    /// [`Dot::dot`] of two.
    #[inline(always)]
    unsafe fn dot_two(sums: Self::A, codes: [Self::C; 2], weights: [Self::W; 2]) -> Self::A {
        // SAFETY: passed on.
        unsafe { Self::dot(Self::dot(sums, codes[0], weights[0]), codes[1], weights[1]) }
    }
    /// Sum of `n` codes as they were before [`Dot::prepare`].
    #[inline(always)]
    unsafe fn sum_codes(from: *const u8, n: usize) -> i32 {
        let mut sum = 0i32;
        for i in 0..n {
            // SAFETY: `from` is valid for `n` by contract.
            sum += i32::from(unsafe { *from.add(i) });
        }
        sum
    }
}

/// The functions of [`Dot`] for codes that are read as they are.
macro_rules! codes_as_they_are {
    () => {
        type Room = ();

        #[inline(always)]
        fn room() {}
        #[inline(always)]
        fn rows_at_once(_k: usize) -> usize {
            usize::MAX
        }
        #[inline(always)]
        unsafe fn prepare(
            _room: &mut (),
            codes: *const u8,
            stride: usize,
            _n_rows: usize,
            _k: usize,
        ) -> (*const u8, usize) {
            (codes, stride)
        }
    };
}
pub(super) use codes_as_they_are;

/// Functions of [`Dot`] that are one expression each.
macro_rules! dots {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) -> $result {
            // SAFETY: the instruction set is present and the pointers are valid, by the trait's contract.
            #[allow(unused_unsafe, reason = "some bodies are plain Rust")]
            unsafe { $body }
        }
    )*};
}
pub(super) use dots;

#[inline(always)]
fn each(f: impl Fn(usize) -> u8) -> [u8; 16] {
    std::array::from_fn(f)
}

// SAFETY: no instruction set is needed; pointers are valid for what is read, by contract.
unsafe impl Dot for Portable {
    type S = Self;
    type B = [u8; 16];
    type W = [u8; 16];
    type C = [u8; 4];
    type A = [i32; 4];

    codes_as_they_are!();
    dots! {
        fn finish(sums: [i32; 4]) -> [i32; 4] = sums;
        fn zero() -> [i32; 4] = [0; 4];
        fn start(_sums: *const i32) -> [i32; 4] = [0; 4];
        fn bytes(from: *const u8) -> [u8; 16] = from.cast::<[u8; 16]>().read_unaligned();
        fn spread(from: *const i8) -> [u8; 16] = {
            let four = from.cast::<[u8; 4]>().read_unaligned();
            each(|i| four[i / 4])
        };
        fn low(x: [u8; 16]) -> [u8; 16] = each(|i| x[i] & 15);
        fn high(x: [u8; 16]) -> [u8; 16] = each(|i| x[i] >> 4);
        fn lookup(table: [u8; 16], index: [u8; 16]) -> [u8; 16] = each(|i| table[usize::from(index[i] & 15)]);
        fn table(from: *const i8) -> [u8; 16] = from.cast::<[u8; 16]>().read_unaligned();
        fn sub(a: [u8; 16], b: [u8; 16]) -> [u8; 16] = each(|i| a[i].wrapping_sub(b[i]));
        fn keep(x: [u8; 16], mask: u32) -> [u8; 16] = {
            let mask = mask.to_le_bytes();
            each(|i| x[i] & mask[i % 4])
        };
        fn weights(x: [u8; 16]) -> [u8; 16] = x;
        fn codes(from: *const u8) -> [u8; 4] = from.cast::<[u8; 4]>().read_unaligned();
        fn dot(sums: [i32; 4], codes: [u8; 4], weights: [u8; 16]) -> [i32; 4] = {
            let mut sums = sums;
            for n in 0..4 {
                for j in 0..4 {
                    sums[n] += i32::from(codes[j]) * i32::from(weights[n * 4 + j].cast_signed());
                }
            }
            sums
        };
    }
}
