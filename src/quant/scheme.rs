//! Linear quantization of rows to INT8.

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
        codes.extend(row.iter().map(|value| to_code(value / scale)));
        scales.push(scale);
    }
    (codes, scales)
}

/// Linear asymmetric quantization to s8 with one scale and one real-valued offset per row.
///
/// ```text
/// offset[r] = (min_c w[r, c] + max_c w[r, c]) / 2     scale[r] = (max − min) / 254
/// codes[r, c] = round_half_even((w[r, c] − offset[r]) / scale[r])
/// ```
///
/// Returns codes, scales and offsets. *Shapes* and *error* as for [`quantize_rows_symmetric`], whose step is never
/// smaller. A constant row has scale 1 and is exact.
///
/// # Panics
/// If `cols` is 0 or does not divide the length.
#[must_use]
pub fn quantize_rows_affine(values: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
    assert!(cols > 0 && values.len().is_multiple_of(cols), "{} values in rows of {cols}", values.len());
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / cols);
    let mut offsets = Vec::with_capacity(values.len() / cols);
    for row in values.chunks_exact(cols) {
        let low = row.iter().copied().fold(f32::INFINITY, f32::min);
        let high = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scale = if high > low { (high - low) / 254.0 } else { 1.0 };
        let offset = low / 2.0 + high / 2.0;
        codes.extend(row.iter().map(|value| to_code((value - offset) / scale)));
        scales.push(scale);
        offsets.push(offset);
    }
    (codes, scales, offsets)
}

#[allow(clippy::cast_possible_truncation, reason = "clamped to the range of i8")]
pub(super) fn to_code(x: f32) -> i8 {
    /// Sums with it are rounded to integers, ties to even: its last place is 1. Rounding itself is no instruction of every processor.
    const INTEGER: f32 = 1.5 * 8_388_608.0;
    (x.clamp(-127.0, 127.0) + INTEGER - INTEGER) as i8
}

#[cfg(test)]
mod tests {
    use super::to_code;

    #[test]
    fn codes_are_the_nearest_ties_to_even() {
        let halves = (-300..=300i16).map(|i| f32::from(i) / 2.0);
        let near = halves.flat_map(|x| [x.next_down(), x, x.next_up()]);
        for x in near.chain([f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40]) {
            #[allow(clippy::cast_possible_truncation, reason = "held to what a code holds")]
            let expected = x.round_ties_even().clamp(-127.0, 127.0) as i8;
            assert_eq!(to_code(x), expected, "{x}");
        }
    }
}
