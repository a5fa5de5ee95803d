//! Stored weights and the linear symmetric format.

use std::borrow::Cow;

/// A matrix as it is stored, row-major `[rows, cols]`, one output channel (or one embedding) per row.
#[derive(Debug, Clone)]
pub enum Weight<'a> {
    /// Plain numbers.
    F32(Cow<'a, [f32]>),
    /// Linear symmetric INT8: `value[r, c] = scale[r] · codes[r, c]`.
    Int8 {
        /// `[rows, cols]`, in −127..=127.
        codes: Cow<'a, [i8]>,
        /// `[rows]`, positive.
        scale: Cow<'a, [f32]>,
    },
}

impl Weight<'_> {
    /// The numbers that the stored form stands for, `[rows, cols]`; `cols` must divide the stored length.
    #[must_use]
    pub fn to_f32(&self, cols: usize) -> Vec<f32> {
        match self {
            Self::F32(values) => values.to_vec(),
            Self::Int8 { codes, scale } => codes
                .chunks_exact(cols)
                .zip(scale.iter())
                .flat_map(|(row, &scale)| row.iter().map(move |&code| f32::from(code) * scale))
                .collect(),
        }
    }

    /// Number of stored elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Int8 { codes, .. } => codes.len(),
        }
    }

    /// Whether nothing is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Linear symmetric quantization to s8 with one scale per row.
///
/// ```text
/// scale[r] = max_c |w[r, c]| / 127        codes[r, c] = round_half_even(w[r, c] / scale[r])
/// ```
///
/// *Shapes*: `values: [rows, cols]` with `rows = values.len() / cols`. *Range*: codes in −127..=127 (−128 is not
/// used, so that negation is exact). *Error*: at most `scale[r] / 2` per element. A row of zeros has scale 1.
/// *Source*: Jacob et al. 2018, §2.1, with a zero point of 0; per channel as in Krishnamoorthi 2018, §2.4.
///
/// # Panics
/// If `cols` is 0 or does not divide the length.
#[must_use]
pub fn quantize_rows_symmetric(values: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>) {
    assert!(cols > 0 && values.len().is_multiple_of(cols), "{} values in rows of {cols}", values.len());
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / cols);
    for row in values.chunks_exact(cols) {
        let max_abs = row.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let scale = if max_abs > 0.0 { max_abs / 127.0 } else { 1.0 };
        #[allow(clippy::cast_possible_truncation, reason = "clamped to the range of i8")]
        codes.extend(row.iter().map(|value| (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8));
        scales.push(scale);
    }
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_is_at_most_half_a_step_and_extremes_are_exact() {
        let values = [0.0, -1.27, 0.5, 0.004_9, 0.0, 0.0, 0.0, 0.0, 3.0, -3.0, 1.0, 2.9];
        let (codes, scale) = quantize_rows_symmetric(&values, 4);
        assert_eq!(codes[1], -127);
        assert_eq!((codes[8], codes[9]), (127, -127));
        assert_eq!(scale[1], 1.0);
        let back = Weight::Int8 { codes: codes.into(), scale: scale.clone().into() }.to_f32(4);
        for (index, (value, restored)) in values.iter().zip(&back).enumerate() {
            assert!((value - restored).abs() <= scale[index / 4] * 0.5001, "{value} became {restored}");
        }
    }
}
