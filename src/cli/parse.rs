//! Values of flags that are more than a number or a path.

use crate::model::{Band, BandError};

/// An attention pattern, as [`Band`] reads it.
pub(super) fn attention(text: &str) -> Result<Band, String> {
    text.parse().map_err(|error: BandError| error.to_string())
}

/// A share that can be removed.
pub(super) fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=0.9).contains(&share) => Ok(share),
        _ => Err(format!("`{text}` is not a share between 0 and 0.9")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        assert_eq!(share("0.25"), Ok(0.25));
        for wrong in ["1", "-0.1", "NaN", "a quarter", ""] {
            assert!(share(wrong).is_err(), "{wrong} was accepted");
        }
    }
}
