//! IEEE binary16, one number at a time: the meaning of the vector conversions, and the fallback where there are none.

/// The value of a binary16; exact.
#[must_use]
pub fn half_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10 & 0x1f);
    let mantissa = u32::from(bits & 0x3ff);
    match (exponent, mantissa) {
        (0, _) => {
            // Subnormal: mantissa · 2^−24.
            #[allow(clippy::cast_precision_loss, reason = "ten bits")]
            let magnitude = mantissa as f32 * f32::from_bits((127 - 24) << 23);
            f32::from_bits(magnitude.to_bits() | sign)
        }
        (31, 0) => f32::from_bits(sign | 0x7f80_0000),
        (31, _) => f32::from_bits(sign | 0x7fc0_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// The nearest binary16, ties to even; beyond ±65,519 infinity.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "each cast value is masked or below 2^16")]
pub fn f32_to_half(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Subnormal: adding ½ lets the hardware round at 2^−24.
        let rounded = f32::from_bits(magnitude) + 0.5;
        return sign | (rounded.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - (112 << 23);
    sign | (rounded >> 13) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_and_rounding_is_to_even() {
        for bits in 0..=u16::MAX {
            let value = half_to_f32(bits);
            assert_eq!(value.is_nan(), half::f16::from_bits(bits).is_nan());
            if !value.is_nan() {
                assert_eq!(value.to_bits(), half::f16::from_bits(bits).to_f32().to_bits());
                assert_eq!(f32_to_half(value), bits);
                let above = f32::from_bits(value.to_bits().wrapping_add(0x0fff));
                if above.is_finite() {
                    assert_eq!(f32_to_half(above), half::f16::from_f32(above).to_bits(), "{above}");
                }
            }
        }
        for value in [65_519.0f32, 65_520.0, 1e-8, 5.9e-8, 2.98e-8, 1e30, -1e30, 0.1, 1.0 / 3.0] {
            assert_eq!(f32_to_half(value), half::f16::from_f32(value).to_bits(), "{value}");
        }
    }
}
