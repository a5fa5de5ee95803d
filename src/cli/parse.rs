//! Values of flags that are more than a number or a path.

use std::path::{Path, PathBuf};

use super::args::Place;
use crate::model::{Band, BandError};

/// `DIR` or `NAME=DIR`. What exists as it stands is a directory, whatever signs its name holds.
pub(super) fn place(text: &str) -> Result<Place, String> {
    let plain = || Place { name: None, dir: PathBuf::from(text) };
    if Path::new(text).exists() {
        return Ok(plain());
    }
    match text.split_once('=') {
        // A path that is not there is for the one who opens it to name.
        None => Ok(plain()),
        Some((name, dir)) if !dir.is_empty() && !name.is_empty() && name.chars().all(|c| !c.is_control()) => {
            Ok(Place { name: Some(name.to_owned()), dir: PathBuf::from(dir) })
        }
        Some(_) => Err("expected DIR or NAME=DIR".to_owned()),
    }
}

/// An attention pattern, as [`Band`] reads it.
pub(super) fn attention(text: &str) -> Result<Band, String> {
    text.parse().map_err(|error: BandError| error.to_string())
}

/// A share of anything.
pub(super) fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err(format!("`{text}` is not a share between 0 and 1")),
    }
}

/// A share that can be removed.
pub(super) fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=0.9).contains(&share) => Ok(share),
        _ => Err(format!("`{text}` is not a share between 0 and 0.9")),
    }
}

/// A number above 0.
pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err(format!("`{text}` is not a number above 0")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let named = Place { name: Some("small".to_owned()), dir: "/models/a=b".into() };
        assert_eq!(place("small=/models/a=b"), Ok(named));
        assert_eq!(place("/no/such/dir"), Ok(Place { name: None, dir: "/no/such/dir".into() }));
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a=b");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(place(&odd.to_string_lossy()), Ok(Place { name: None, dir: odd }));
        assert!(place("=dir").is_err() && place("name=").is_err());
    }

    #[test]
    fn shares() {
        assert_eq!(share("0.25"), Ok(0.25));
        for wrong in ["1", "-0.1", "NaN", "a quarter", ""] {
            assert!(share(wrong).is_err(), "{wrong} was accepted");
        }
    }
}
