//! Exact-erf GELU that compiles to vector code. candle's own calls a scalar `erff` per element, which costs as much
//! as the matrix products around it.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// `x · Φ(x) = x/2 · (1 + erf(x/√2))`, with a backward.
pub(super) fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu)
}

/// The error function.
///
/// ```text
/// erf(x) ≈ x · P(x²) / Q(x²),   x clamped to ±4
/// ```
///
/// *Error*: at most 3e-7 absolute against the function itself. *Source*: the rational approximation of Eigen
/// (`generic_fast_erf_float`), which XLA and TensorFlow use for f32.
#[inline(always)]
fn erf(x: f32) -> f32 {
    const P: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const Q: [f32; 5] = [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_474e-2];
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let p = P.iter().fold(0.0, |sum, &coefficient| sum * square + coefficient);
    let q = Q.iter().fold(0.0, |sum, &coefficient| sum * square + coefficient);
    x * p / q
}

#[inline(always)]
fn gelu_scalar(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// `d/dx x·Φ(x) = Φ(x) + x · φ(x)`.
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    const INV_SQRT_2_PI: f32 = 0.398_942_3;
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * INV_SQRT_2_PI * (-0.5 * x * x).exp()
}

/// Elements from which the work is split over candle's number of threads; below, starting them costs more.
const SPLIT_FROM: usize = 1 << 18;

fn map(storage: &CpuStorage, layout: &Layout, f: fn(&[f32], &mut [f32])) -> Result<(CpuStorage, Shape)> {
    let values: &[f32] = storage.as_slice()?;
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: "gelu" }.bt());
    };
    let values = &values[start..end];
    let mut out = vec![0.0; values.len()];
    let n_threads = candle_core::utils::get_num_threads();
    if values.len() < SPLIT_FROM || n_threads < 2 {
        f(values, &mut out);
    } else {
        let part = values.len().div_ceil(n_threads);
        std::thread::scope(|scope| {
            for (values, out) in values.chunks(part).zip(out.chunks_mut(part)) {
                scope.spawn(move || f(values, out));
            }
        });
    }
    Ok((CpuStorage::F32(out), layout.shape().clone()))
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        map(storage, layout, |x, y| x.iter().zip(y).for_each(|(&x, y)| *y = gelu_scalar(x)))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(arg.apply_op1_no_bwd(&GeluSlope)?.mul(grad_res)?))
    }
}

struct GeluSlope;

impl CustomOp1 for GeluSlope {
    fn name(&self) -> &'static str {
        "gelu slope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        map(storage, layout, |x, y| x.iter().zip(y).for_each(|(&x, y)| *y = gelu_slope(x)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn is_the_exact_gelu_within_the_stated_error() {
        let xs: Vec<f32> = (-6_000..=6_000u16 as i32).map(|step| step as f32 * 1e-3).collect();
        let x = Tensor::new(xs.as_slice(), &Device::Cpu).unwrap();
        let ours: Vec<f32> = gelu(&x).unwrap().to_vec1().unwrap();
        let exact: Vec<f64> = x.to_dtype(candle_core::DType::F64).unwrap().gelu_erf().unwrap().to_vec1().unwrap();
        for ((x, ours), exact) in xs.iter().zip(&ours).zip(&exact) {
            let error = (f64::from(*ours) - exact).abs();
            assert!(error <= 4e-7 * f64::from(x.abs().max(1.0)), "x {x}: {ours} is not {exact}");
        }
    }

    #[test]
    fn slope_is_the_derivative() {
        for step in -400..=400 {
            let x = f64::from(step) * 0.01;
            let exact = |x: f64| Tensor::new(x, &Device::Cpu).unwrap().gelu_erf().unwrap().to_scalar::<f64>().unwrap();
            let difference = (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5;
            #[allow(clippy::cast_possible_truncation, reason = "test values are small")]
            let slope = f64::from(gelu_slope(x as f32));
            assert!((slope - difference).abs() < 2e-6, "x {x}: {slope} is not {difference}");
        }
    }
}
