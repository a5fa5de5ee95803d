//! The vector operations that the row passes and the f32 attention are written in.
//!
//! A body generic over [`Simd`] is `#[inline(always)]` and instantiated once per instruction set inside a function with
//! that set's target features, so the operations compile to single instructions.

#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

/// The largest number of binary16.
const LARGEST_HALF: f32 = 65_504.0;

/// A vector instruction set.
///
/// # Safety
/// Every function must only be called where the instruction set is present; pointers must be valid for the lanes they
/// name. Loads and stores need no alignment.
pub(super) unsafe trait Simd: Copy {
    /// Lanes of f32, a power of two, at most 16.
    const LANES: usize;
    /// `LANES` f32.
    type F: Copy;
    /// `LANES` i32.
    type I: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, x: Self::F);
    /// Reads IEEE binary16.
    unsafe fn load_half(from: *const u16) -> Self::F;
    /// Writes IEEE binary16, rounding to nearest even.
    unsafe fn store_half(to: *mut u16, x: Self::F);
    /// Writes IEEE binary16, rounding to nearest; numbers beyond its own are held to the largest. Below 2⁻¹⁴ the last place may be
    /// cut off, and from 3.4e38 on it may be infinite.
    #[inline(always)]
    unsafe fn store_held_half(to: *mut u16, x: Self::F) {
        // SAFETY: passed on.
        unsafe {
            // Of two operands of which one is no number, x86 takes the second: what is no number stays none.
            let held = Self::min(Self::splat(LARGEST_HALF), Self::max(Self::splat(-LARGEST_HALF), x));
            Self::store_half(to, held);
        }
    }
    unsafe fn load_s8(from: *const i8) -> Self::F;
    /// Writes the low byte of each lane; lanes must be in 0..=255.
    unsafe fn store_u8(to: *mut u8, x: Self::I);
    /// Whether [`Simd::store_four_u8`] takes −1 for 0 and 256 for 255.
    const SATURATES: bool = false;
    /// [`Simd::store_u8`] of four vectors, one behind the other.
    #[inline(always)]
    unsafe fn store_four_u8(to: *mut u8, x: [Self::I; 4]) {
        // SAFETY: passed on.
        unsafe {
            for v in 0..4 {
                Self::store_u8(to.add(v * Self::LANES), x[v]);
            }
        }
    }
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `|x|`.
    unsafe fn abs(x: Self::F) -> Self::F;
    /// `a · b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even; |x| < 2^22.
    unsafe fn round(x: Self::F) -> Self::I;
    unsafe fn store_int(to: *mut i32, x: Self::I);
    unsafe fn to_float(x: Self::I) -> Self::F;
    /// `2^x` for x in −126..=127.
    unsafe fn power_of_two(x: Self::I) -> Self::F;
    /// To the nearest integer, ties to even, as a float.
    #[inline(always)]
    unsafe fn round_float(x: Self::F) -> Self::F {
        // SAFETY: passed on.
        unsafe { Self::to_float(Self::round(x)) }
    }
    /// `x · 2^n` for whole n in −126..=127.
    #[inline(always)]
    unsafe fn scale_by_power(x: Self::F, n: Self::F) -> Self::F {
        // SAFETY: passed on.
        unsafe { Self::mul(x, Self::power_of_two(Self::round(n))) }
    }
    unsafe fn sum(x: Self::F) -> f32;
    unsafe fn lowest(x: Self::F) -> f32;
    unsafe fn highest(x: Self::F) -> f32;
    /// [`Simd::sum`] of each of four vectors, added up in the same order.
    #[inline(always)]
    unsafe fn sums(x: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: passed on.
        unsafe { [Self::sum(x[0]), Self::sum(x[1]), Self::sum(x[2]), Self::sum(x[3])] }
    }
    /// [`Simd::lowest`] of each.
    #[inline(always)]
    unsafe fn lowests(x: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: passed on.
        unsafe { [Self::lowest(x[0]), Self::lowest(x[1]), Self::lowest(x[2]), Self::lowest(x[3])] }
    }
    /// [`Simd::highest`] of each.
    #[inline(always)]
    unsafe fn highests(x: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: passed on.
        unsafe { [Self::highest(x[0]), Self::highest(x[1]), Self::highest(x[2]), Self::highest(x[3])] }
    }

    /// Reads `n ≤ LANES` floats, the other lanes are `fill`.
    #[inline(always)]
    unsafe fn load_some(from: *const f32, n: usize, fill: f32) -> Self::F {
        // SAFETY: `from` is valid for `n` by contract, and `n` is at most 16.
        unsafe {
            if n == Self::LANES {
                return Self::load(from);
            }
            let mut lanes = [fill; 16];
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
            Self::load(lanes.as_ptr())
        }
    }
    /// Writes the first `n ≤ LANES` lanes.
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, n: usize, x: Self::F) {
        // SAFETY: `to` is valid for `n` by contract, and `n` is at most 16.
        unsafe {
            if n == Self::LANES {
                return Self::store(to, x);
            }
            let mut lanes = [0.0f32; 16];
            Self::store(lanes.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }
    /// Writes the first `n < LANES` lanes as bytes; lanes must be in 0..=255.
    #[inline(always)]
    unsafe fn store_some_u8(to: *mut u8, n: usize, x: Self::I) {
        let mut lanes = [0u8; 16];
        // SAFETY: `to` is valid for `n` by contract, and `n` is below 16.
        unsafe {
            Self::store_u8(lanes.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }

    /// Whether [`Simd::pick`] is one instruction.
    const PICKS: bool = false;
    /// `table[the last five bits of each lane]`.
    #[inline(always)]
    unsafe fn pick(table: &[f32; 32], lanes: Self::F) -> Self::F {
        let mut picked = [0.0f32; 16];
        // SAFETY: a vector has at most 16 lanes.
        unsafe {
            Self::store(picked.as_mut_ptr(), lanes);
            picked.iter_mut().for_each(|lane| *lane = table[(lane.to_bits() & 31) as usize]);
            Self::load(picked.as_ptr())
        }
    }
}

/// `2^x` for x below 127, 0 below about −100 being cut to `2^−100`.
///
/// ```text
/// n = round(x), f = x − n ∈ [−½, ½]:   2^x = 2^n · P(f), P of degree 5
/// ```
/// *Error*: relative 2e-7. *Source*: minimax fit of `P(f) / 2^f` with P(0) = 1, so that powers of
/// two are exact (error of the fit 9e-8). The cut keeps products with
/// the result out of the denormal range, which costs a factor of 4 in banded attention.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(x: S::F) -> S::F {
    // SAFETY: passed on.
    unsafe {
        // The fit's slope lies this far below ln 2.
        let slope = std::f32::consts::LN_2 - 1.8e-7;
        exp2_by::<S, 6>(x, [1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, slope, 1.0])
    }
}

/// The same where the result is rounded to 12 bits or fewer. *Error*: relative 3e-6.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn exp2_coarse<S: Simd>(x: S::F) -> S::F {
    // SAFETY: passed on.
    unsafe { exp2_by::<S, 5>(x, [9.570_102e-3, 5.591_786e-2, 2.402_474_4e-1, 6.931_218e-1, 0.999_999_3]) }
}

/// The same where the result is rounded to 8 bits. *Error*: relative 8e-5.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn exp2_coarsest<S: Simd>(x: S::F) -> S::F {
    // SAFETY: passed on.
    unsafe { exp2_by::<S, 4>(x, [5.517_167e-2, 2.426_111_2e-1, 6.932_61e-1, 9.999_281e-1]) }
}

#[inline(always)]
unsafe fn exp2_by<S: Simd, const N: usize>(x: S::F, coefficients: [f32; N]) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        let x = S::max(x, S::splat(-100.0));
        let n = S::round_float(x);
        let f = S::sub(x, n);
        let mut p = S::splat(coefficients[0]);
        for &coefficient in &coefficients[1..] {
            p = S::fma(p, f, S::splat(coefficient));
        }
        S::scale_by_power(p, n)
    }
}

#[cfg(test)]
mod tests {
    use super::Simd;
    use crate::kernels::arch::portable::Portable;

    /// # Safety
    /// The instruction set must be there.
    unsafe fn check<S: Simd>() {
        let number = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.37;
        let from: Vec<f32> = (0..4 * 16).map(number).collect();
        // SAFETY: each vector has 16 floats, and at most 16 lanes.
        unsafe {
            let x: [S::F; 4] = std::array::from_fn(|v| S::load(from.as_ptr().add(v * 16)));
            assert_eq!(S::sums(x).map(f32::to_bits), x.map(|x| S::sum(x).to_bits()));
            assert_eq!(S::lowests(x), x.map(|x| S::lowest(x)));
            assert_eq!(S::highests(x), x.map(|x| S::highest(x)));
            for n in 1..=S::LANES {
                let mut lanes = [7.0f32; 16];
                S::store(lanes.as_mut_ptr(), S::load_some(from.as_ptr(), n, -1.5));
                let expected: Vec<f32> = (0..S::LANES).map(|i| if i < n { number(i) } else { -1.5 }).collect();
                assert_eq!(lanes[..S::LANES], expected);

                let mut some = [7.0f32; 16];
                S::store_some(some.as_mut_ptr(), n, x[0]);
                assert!(some.iter().enumerate().all(|(i, &lane)| lane == if i < n { number(i) } else { 7.0 }));
            }
            for n in 1..S::LANES {
                let mut bytes = [9u8; 16];
                S::store_some_u8(bytes.as_mut_ptr(), n, S::round(S::splat(201.0)));
                assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == if i < n { 201 } else { 9 }));
            }
        }
    }

    #[test]
    fn four_vectors_are_reduced_as_each_alone_and_no_lane_is_touched_that_is_not_asked_for() {
        // SAFETY: plain Rust, and instruction sets that are there.
        unsafe {
            check::<Portable>();
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                {
                    check::<crate::kernels::arch::avx2::Avx2>();
                }
                if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bw") {
                    check::<crate::kernels::arch::avx512::Avx512>();
                }
            }
            #[cfg(target_arch = "aarch64")]
            check::<crate::kernels::arch::neon::Neon>();
        }
    }
}
