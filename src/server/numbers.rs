//! An embedding in the numbers that a request asks for.

use std::borrow::Cow;

use half::f16;

use super::api::OutputDtype;

/// The numbers of one vector.
#[derive(Debug)]
pub(crate) enum Numbers<'a> {
    Float(&'a [f32]),
    Half(Vec<f16>),
    /// `value = scale · code`.
    Int8 {
        codes: Vec<i8>,
        scale: f32,
    },
    /// Bits in bytes, from the most significant.
    Bits {
        bytes: Vec<u8>,
        signed: bool,
    },
}

impl<'a> Numbers<'a> {
    /// `values` as `dtype`.
    ///
    /// ```text
    /// float16  nearest binary16, at most ±65504
    /// int8     round(x / s), s = max |x| / 127                     error at most s / 2; a vector of zeros has s = 1
    /// binary   bit i of the vector is x_i > 0 (numpy's packbits); each byte less 128 as in sentence-transformers
    /// ```
    pub(crate) fn of(values: &'a [f32], dtype: OutputDtype) -> Self {
        match dtype {
            OutputDtype::Float => Self::Float(values),
            OutputDtype::Float16 => {
                let (low, high) = (f16::MIN.to_f32(), f16::MAX.to_f32());
                Self::Half(values.iter().map(|value| f16::from_f32(value.clamp(low, high))).collect())
            }
            OutputDtype::Int8 => {
                let largest = values.iter().fold(0.0f32, |max, value| max.max(value.abs()));
                let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
                #[allow(clippy::cast_possible_truncation, reason = "clamped to the range of i8")]
                let code = |value: &f32| (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
                Self::Int8 { codes: values.iter().map(code).collect(), scale }
            }
            OutputDtype::Binary | OutputDtype::Ubinary => {
                let byte = |values: &[f32]| {
                    let bits = values.iter().enumerate().filter(|(_, value)| **value > 0.0);
                    bits.fold(0u8, |byte, (bit, _)| byte | 0x80 >> bit)
                };
                Self::Bits { bytes: values.chunks(8).map(byte).collect(), signed: dtype == OutputDtype::Binary }
            }
        }
    }

    /// What integers are to be multiplied by.
    pub(crate) fn scale(&self) -> Option<f32> {
        match self {
            Self::Int8 { scale, .. } => Some(*scale),
            _ => None,
        }
    }

    /// Appends a JSON list.
    pub(crate) fn push_json(&self, out: &mut Vec<u8>) {
        match self {
            Self::Float(values) => push_list(out, values.iter().copied(), push_float),
            Self::Half(values) => push_list(out, values.iter().map(|value| value.to_f32()), push_float),
            Self::Int8 { codes, .. } => push_list(out, codes.iter().copied(), push_integer),
            Self::Bits { bytes, signed: false } => push_list(out, bytes.iter().copied(), push_integer),
            Self::Bits { bytes, signed: true } => {
                push_list(out, bytes.iter().map(|byte| less_128(*byte)), push_integer)
            }
        }
    }

    /// The numbers' bytes, little-endian.
    pub(crate) fn to_bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Float(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Half(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Int8 { codes, .. } => bytemuck::cast_slice(codes).into(),
            Self::Bits { bytes, signed: false } => bytes.into(),
            Self::Bits { bytes, signed: true } => bytes.iter().flat_map(|byte| less_128(*byte).to_le_bytes()).collect(),
        }
    }
}

/// `byte - 128`.
fn less_128(byte: u8) -> i8 {
    (byte ^ 0x80).cast_signed()
}

fn push_float(out: &mut Vec<u8>, value: f32) {
    // Shortest notation that reads back as the same number; the engine lets only finite ones through.
    serde_json::to_writer(out, &value).expect("a number is always JSON and memory takes every write");
}

fn push_integer<T: serde::Serialize>(out: &mut Vec<u8>, value: T) {
    serde_json::to_writer(out, &value).expect("a number is always JSON and memory takes every write");
}

fn push_list<T>(out: &mut Vec<u8>, values: impl Iterator<Item = T>, push: impl Fn(&mut Vec<u8>, T)) {
    out.push(b'[');
    for (index, value) in values.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        push(out, value);
    }
    out.push(b']');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(values: &[f32], dtype: OutputDtype) -> String {
        let mut out = Vec::new();
        Numbers::of(values, dtype).push_json(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn every_dtype_is_what_it_says() {
        let values = [0.5, -1.0, 0.25, 0.0, 1e-9, -0.1, 0.3, 2.0, 0.125, -3.0];
        assert_eq!(json(&values[..3], OutputDtype::Float), "[0.5,-1.0,0.25]");
        assert_eq!(json(&[0.1, 1e9, -1e9], OutputDtype::Float16), "[0.099975586,65504.0,-65504.0]");
        assert_eq!(json(&[1.27, -0.5, 0.004, 0.006], OutputDtype::Int8), "[127,-50,0,1]");
        assert_eq!(json(&[0.0, 0.0], OutputDtype::Int8), "[0,0]");
        // 1 0 1 0 1 0 1 1 | 1 0, and the rest of the last byte is 0.
        assert_eq!(json(&values, OutputDtype::Ubinary), "[171,128]");
        assert_eq!(json(&values, OutputDtype::Binary), "[43,0]");
    }

    #[test]
    fn bytes_are_little_endian() {
        let bytes = |values: &[f32], dtype| Numbers::of(values, dtype).to_bytes().into_owned();
        assert_eq!(bytes(&[1.0, -2.0], OutputDtype::Float), [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
        assert_eq!(bytes(&[1.0], OutputDtype::Float16), [0x00, 0x3c]);
        assert_eq!(bytes(&[127.0, -1.0], OutputDtype::Int8), [127, 255]);
        assert_eq!(bytes(&[1.0], OutputDtype::Ubinary), [128]);
        assert_eq!(bytes(&[1.0], OutputDtype::Binary), [0]);
        assert_eq!(Numbers::of(&[254.0], OutputDtype::Int8).scale(), Some(2.0));
    }
}
