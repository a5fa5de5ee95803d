//! Activation functions, written once over [`Simd`] and instantiated per instruction set.
#![allow(clippy::inline_always, reason = "bodies must be inlined into functions that carry the target features")]

use super::simd::{Simd, exp2};
use crate::kernels::Nonlinearity;

/// Coefficients of [`gelu`], highest power first.
const GELU: [f32; 10] = [
    -1.104_339e-3,
    4.380_627_6e-3,
    -7.525_05e-3,
    1.057_640_1e-2,
    -1.765_796_8e-2,
    2.841_501_2e-2,
    -4.040_332_5e-2,
    5.470_245_8e-2,
    -7.717_735e-2,
    1.569_046_4e-1,
];
const GELU_REACH: f32 = 4.5;

/// Coefficients of [`gelu_by_pieces`], lowest power first.
const GELU_PIECES: [[f32; 32]; 3] = [
    [
        -1.247_841_2e-7,
        -7.919_263_6e-5,
        -1.391_106_8e-3,
        -6.811_870_7e-3,
        -2.009_590_3e-2,
        -4.463_694e-2,
        -8.227_386e-2,
        -1.324_761_7e-1,
        -1.921_259_6e-1,
        -2.559_397_2e-1,
        -3.173_997_7e-1,
        -3.699_426_4e-1,
        -4.081_09e-1,
        -4.284_019_2e-1,
        -4.296_941_5e-1,
        -4.131_679_8e-1,
        -3.818_621_3e-1,
        -3.399_682_6e-1,
        -2.920_794_8e-1,
        -2.425_196_2e-1,
        -1.948_622_9e-1,
        -1.516_752_7e-1,
        -1.144_755_9e-1,
        -8.384_424_4e-2,
        -5.963_511_4e-2,
        -4.121_62e-2,
        -2.769_541_6e-2,
        -1.810_223e-2,
        -1.151_404_1e-2,
        -7.129_553_7e-3,
        -4.299_186_6e-3,
        0.0,
    ],
    [
        2.502_056e-5,
        1.661_335_5e-3,
        1.305_981_9e-2,
        4.207_174e-2,
        9.324_229_5e-2,
        1.670_038_8e-1,
        2.597_140_4e-1,
        3.644_575_2e-1,
        4.723_944_7e-1,
        5.743_388_5e-1,
        6.622_356e-1,
        7.302_671_7e-1,
        7.754_344_3e-1,
        7.975_882e-1,
        7.989_963e-1,
        7.836_201e-1,
        7.562_827e-1,
        7.218_801e-1,
        6.847_818e-1,
        6.484_524e-1,
        6.153_018_5e-1,
        5.867_217e-1,
        5.632_461e-1,
        5.447_728_6e-1,
        5.307_929_5e-1,
        5.205_902e-1,
        5.133_94e-1,
        5.084_806_7e-1,
        5.052_289_4e-1,
        5.031_407_5e-1,
        5.018_384_5e-1,
        5.0e-1,
    ],
    [
        3.982_874_2e-1,
        3.898_988_4e-1,
        3.649_501_5e-1,
        3.260_099_3e-1,
        2.766_502_8e-1,
        2.211_685_5e-1,
        1.640_367_4e-1,
        1.093_750_2e-1,
        6.052_878_5e-2,
        1.980_236e-2,
        -1.163_100_1e-2,
        -3.365_65e-2,
        -4.702_149e-2,
        -5.306_836_6e-2,
        -5.344_965e-2,
        -4.987_283_8e-2,
        -4.390_433_4e-2,
        -3.684_106e-2,
        -2.965_578_6e-2,
        -2.299_765_9e-2,
        -1.723_245_2e-2,
        -1.250_380_65e-2,
        -8.799_93e-3,
        -6.014_603e-3,
        -3.996_313e-3,
        -2.583_368e-3,
        -1.625_823e-3,
        -9.966_843e-4,
        -5.954_408e-4,
        -3.468_048_5e-4,
        -1.969_890_6e-4,
        0.0,
    ],
];

/// `x · Φ(x)`, exact-erf GELU.
///
/// ```text
/// c = clamp(x, ±4.5), u = 2c²/4.5² − 1:   x · (½ + c · P(u)), P of degree 9
/// ```
/// *Error*: absolute 1.7e-5 (measured against f64; 1.5e-5 of it is `Φ(−4.5)·4.5`), or 3e-8 · |x| where that is more.
/// *Source*: minimax fit of `(Φ(x) − ½)/x` weighted by x², held to reach ½ at 4.5, but for a rounding, of which beyond it |x| times
/// is left.
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        if S::PICKS {
            return gelu_by_pieces::<S, 1>([x])[0];
        }
        let c = S::max(S::min(x, S::splat(GELU_REACH)), S::splat(-GELU_REACH));
        let u = S::fma(S::mul(c, c), S::splat(2.0 / (GELU_REACH * GELU_REACH)), S::splat(-1.0));
        let mut p = S::splat(GELU[0]);
        for &coefficient in &GELU[1..] {
            p = S::fma(p, u, S::splat(coefficient));
        }
        S::mul(x, S::fma(c, p, S::splat(0.5)))
    }
}

/// `x · Φ(x)`, exact-erf GELU, where a vector of 32 numbers can be looked up in one instruction.
///
/// ```text
/// a = |x|, i = min(round(a · 30.5/4.5), 31):   ½x + (c₂[i] a + c₁[i]) a + c₀[i]
/// ```
/// *Error*: absolute 1.7e-5 for finite x (measured against f64; 1.5e-5 of it is `Φ(−4.5)·4.5`, where the last piece,
/// which is `½(x + |x|)`, begins).
/// *Source*: minimax fits of `|x| (Φ(|x|) − ½)`, an even function, on 31 pieces.
#[inline(always)]
unsafe fn gelu_by_pieces<S: Simd, const N: usize>(x: [S::F; N]) -> [S::F; N] {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        // Beyond 2^23 a float's last bits are an integer.
        let integer = 8_388_608.0;
        let (mut a, mut piece, mut y) = (x, x, x);
        for i in 0..N {
            a[i] = S::abs(x[i]);
        }
        for i in 0..N {
            piece[i] = S::fma(a[i], S::splat(30.5 / GELU_REACH), S::splat(integer));
        }
        for i in 0..N {
            piece[i] = S::min(piece[i], S::splat(integer + 31.0));
        }
        // Not in a closure: it would not have the target features.
        let (c0, c1, c2) = (&GELU_PIECES[0], &GELU_PIECES[1], &GELU_PIECES[2]);
        let mut slope = x;
        for i in 0..N {
            slope[i] = S::pick(c2, piece[i]);
        }
        for i in 0..N {
            slope[i] = S::fma(slope[i], a[i], S::pick(c1, piece[i]));
        }
        for i in 0..N {
            y[i] = S::fma(x[i], S::splat(0.5), S::pick(c0, piece[i]));
        }
        for i in 0..N {
            y[i] = S::fma(slope[i], a[i], y[i]);
        }
        y
    }
}

/// The tanh form of GELU, `x · σ(2√(2/π)(x + 0.044715x³))`.
///
/// *Error*: absolute 2e-6 · max(1, |x|).
#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        // 2 √(2/π) log2 e
        let inner = S::mul(x, S::fma(S::mul(x, x), S::splat(0.044_715), S::splat(1.0)));
        let z = S::mul(inner, S::splat(2.302_208_2));
        let (lower, sign) = folded_sigmoid::<S>(z);
        // σ(z) = ½ + sign(z) (½ − σ(−|z|))
        S::mul(x, S::fma(sign, S::sub(S::splat(0.5), lower), S::splat(0.5)))
    }
}

/// Where the folded sigmoid is held.
const FOLDED: f32 = 1e30;

/// `σ(−|y|)` and the sign of `y`, of `z = y log2 e`: on this side `exp2` sees nothing above 0.
#[inline(always)]
unsafe fn folded_sigmoid<S: Simd>(z: S::F) -> (S::F, S::F) {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        // Far beyond where `exp2` ends, and finite. No number stays none as the second operand.
        let z = S::min(S::splat(FOLDED), S::max(S::splat(-FOLDED), z));
        let magnitude = S::abs(z);
        let e = exp2::<S>(S::sub(S::splat(0.0), magnitude));
        let lower = S::div(e, S::add(S::splat(1.0), e));
        // sign(z) · a as max/min of z against ±a would clip, so divide instead.
        (lower, S::div(z, S::max(magnitude, S::splat(1e-30))))
    }
}

/// `tanh x = sign(x) (1 − 2 σ(−2|x|))`.
#[inline(always)]
unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        let (lower, sign) = folded_sigmoid::<S>(S::mul(x, S::splat(2.0 * std::f32::consts::LOG2_E)));
        S::mul(sign, S::sub(S::splat(1.0), S::add(lower, lower)))
    }
}

/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn apply<S: Simd>(kind: Nonlinearity, x: S::F) -> S::F {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        match kind {
            Nonlinearity::Gelu => gelu::<S>(x),
            Nonlinearity::GeluTanh => gelu_tanh::<S>(x),
            Nonlinearity::Relu => S::max(x, S::splat(0.0)),
            Nonlinearity::Tanh => tanh::<S>(x),
        }
    }
}

/// [`apply`] to four vectors, step by step: each waits for its own last step alone.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn apply_four<S: Simd>(kind: Nonlinearity, x: [S::F; 4]) -> [S::F; 4] {
    // SAFETY: the instruction set is present by contract.
    unsafe {
        if kind == Nonlinearity::Gelu && S::PICKS {
            return gelu_by_pieces::<S, 4>(x);
        }
        [apply::<S>(kind, x[0]), apply::<S>(kind, x[1]), apply::<S>(kind, x[2]), apply::<S>(kind, x[3])]
    }
}

/// Calls `$each::<S>($kind, ..)` so that each function has a loop of its own.
macro_rules! by_kind {
    ($kind:expr, $each:ident::<$simd:ident>($($arg:expr),*)) => {
        match $kind {
            Nonlinearity::Gelu => $each::<$simd>(Nonlinearity::Gelu, $($arg),*),
            Nonlinearity::GeluTanh => $each::<$simd>(Nonlinearity::GeluTanh, $($arg),*),
            Nonlinearity::Relu => $each::<$simd>(Nonlinearity::Relu, $($arg),*),
            Nonlinearity::Tanh => $each::<$simd>(Nonlinearity::Tanh, $($arg),*),
        }
    };
}
pub(super) use by_kind;

#[inline(always)]
unsafe fn activate_as<S: Simd>(kind: Nonlinearity, values: *mut f32, n: usize) {
    // SAFETY: `values` is valid for `n` by contract.
    unsafe {
        let whole = n / S::LANES * S::LANES;
        let mut i = 0;
        while i < whole {
            S::store(values.add(i), apply::<S>(kind, S::load(values.add(i))));
            i += S::LANES;
        }
        if whole < n {
            let x = S::load_some(values.add(whole), n - whole, 0.0);
            S::store_some(values.add(whole), n - whole, apply::<S>(kind, x));
        }
    }
}

/// The least value of the function.
pub(super) const fn floor(kind: Nonlinearity) -> f32 {
    match kind {
        // At −0.7517915 and −0.7524614.
        Nonlinearity::Gelu => -0.169_971_2,
        Nonlinearity::GeluTanh => -0.170_040_8,
        Nonlinearity::Relu => 0.0,
        Nonlinearity::Tanh => -1.0,
    }
}

/// What the function is at most of numbers up to each of `tops`; of a top that is not finite, no number.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn ceilings<S: Simd>(kind: Nonlinearity, tops: [f32; 4]) -> [f32; 4] {
    let mut lanes = [0.0f32; 16];
    lanes[..4].copy_from_slice(&tops);
    // SAFETY: the instruction set is present by contract; a vector has at least 4 lanes, and at most 16.
    unsafe { S::store(lanes.as_mut_ptr(), apply::<S>(kind, S::load(lanes.as_ptr()))) }
    std::array::from_fn(|i| match kind {
        _ if !tops[i].is_finite() => f32::NAN,
        Nonlinearity::Tanh => lanes[i],
        // Below 0 they come near to it on the far side of the least value.
        Nonlinearity::Gelu | Nonlinearity::GeluTanh | Nonlinearity::Relu => lanes[i].max(0.0),
    })
}

/// `values[i] = f(values[i])` for `i < n`.
#[inline(always)]
pub(super) unsafe fn activate<S: Simd>(kind: Nonlinearity, values: *mut f32, n: usize) {
    // SAFETY: passed on unchanged.
    unsafe { by_kind!(kind, activate_as::<S>(values, n)) }
}
