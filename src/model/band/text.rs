//! Bands as they are typed: in flags, in recipes, and in reports.

use std::fmt;
use std::str::FromStr;

use super::{Band, Shape};

/// A text that is no band.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BandError {
    /// Not `key=value`.
    #[error("`{0}` is not of the form key=value")]
    NoValue(String),
    /// Not a count of tokens, or out of range.
    #[error("{key}: `{value}` is not {expected}")]
    Value {
        /// Which key.
        key: String,
        /// What was written.
        value: String,
        /// What is meant.
        expected: &'static str,
    },
    /// An unknown key.
    #[error("`{0}` is unknown; window, dilated, strided, fixed, pooled, globals and sinks are known, or `full`")]
    Unknown(String),
    /// A key that stands twice.
    #[error("`{0}` stands twice")]
    Twice(String),
    /// Two patterns that exclude each other.
    #[error("`{0}` and `{1}` exclude each other")]
    Both(&'static str, &'static str),
    /// No pattern.
    #[error("one of window=W, dilated=W:D, strided=S, fixed=B:C, pooled=B or full is missing")]
    Missing,
}

/// `first[:second]`, both counts of tokens from `least` on.
fn numbers(key: &str, value: &str, least: u32, expected: &'static str) -> Result<(u32, Option<u32>), BandError> {
    let refuse = || BandError::Value { key: key.to_owned(), value: value.to_owned(), expected };
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|&n| n >= least).ok_or_else(refuse);
    Ok(match value.split_once(':') {
        Some((first, second)) => (number(first)?, Some(number(second)?)),
        None => (number(value)?, None),
    })
}

impl FromStr for Band {
    type Err = BandError;

    /// One of
    ///
    /// ```text
    /// full | window=W | window=L:R | dilated=W:D | strided=S[,window=W] | fixed=B:C | pooled=B[:N]
    /// ```
    ///
    /// with `globals=cls`, `globals=G` and `sinks=N` besides. `strided=S` alone has a window of S on either side;
    /// `pooled=B` sees one neighbouring block on either side.
    fn from_str(text: &str) -> Result<Self, BandError> {
        let mut window = None;
        let mut shape: Option<(&'static str, Band)> = None;
        let (mut globals, mut sinks) = (None, None);
        for part in text.split(',').map(str::trim) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.trim(), value.trim()),
                None if part == "full" => (part, ""),
                None => return Err(BandError::NoValue(part.to_owned())),
            };
            let refuse =
                |expected: &'static str| BandError::Value { key: key.to_owned(), value: value.to_owned(), expected };
            let two = |expected: &'static str| -> Result<(u32, u32), BandError> {
                let (first, second) = numbers(key, value, 1, expected)?;
                Ok((first, second.ok_or_else(|| refuse(expected))?))
            };
            let made: (&'static str, Band) = match key {
                "window" => {
                    let (left, right) = numbers(key, value, 1, "W or L:R, from 1 token on")?;
                    if window.replace((left, right.unwrap_or(left))).is_some() {
                        return Err(BandError::Twice(key.to_owned()));
                    }
                    continue;
                }
                "globals" | "sinks" => {
                    let n = match value {
                        "cls" if key == "globals" => 1,
                        _ => value.parse().map_err(|_| refuse("a number of leading tokens"))?,
                    };
                    let count = if key == "globals" { &mut globals } else { &mut sinks };
                    if count.replace(n).is_some() {
                        return Err(BandError::Twice(key.to_owned()));
                    }
                    continue;
                }
                "full" if value.is_empty() => ("full", Self::FULL),
                "dilated" => {
                    let (width, step) = two("W:D, from 1 token on")?;
                    ("dilated", Self::symmetric(width, 0).with_shape(Shape::Dilated { step }))
                }
                "strided" => match numbers(key, value, 1, "S, from 1 token on")? {
                    (stride, None) => ("strided", Self::symmetric(stride, 0).with_shape(Shape::Strided { stride })),
                    _ => return Err(refuse("S, from 1 token on")),
                },
                "fixed" => {
                    let (block, columns) = two("B:C, from 1 token on")?;
                    if columns > block {
                        return Err(refuse("B:C with at most B columns"));
                    }
                    // The sides mean nothing here.
                    ("fixed", Self::symmetric(0, 0).with_shape(Shape::Fixed { block, columns }))
                }
                "pooled" => {
                    let (block, neighbours) = numbers(key, value, 1, "B or B:N, from 1 token on")?;
                    ("pooled", Self::symmetric(neighbours.unwrap_or(1), 0).with_shape(Shape::Pooled { block }))
                }
                other => return Err(BandError::Unknown(other.to_owned())),
            };
            if let Some((before, _)) = shape.replace(made) {
                return Err(if before == made.0 {
                    BandError::Twice(before.to_owned())
                } else {
                    BandError::Both(before, made.0)
                });
            }
        }
        let band = match (shape, window) {
            (None, None) => return Err(BandError::Missing),
            (None, Some((left, right))) => Self { left, right, ..Self::FULL },
            (Some(("strided", band)), Some((left, right))) => Self { left, right, ..band },
            (Some((name, _)), Some(_)) => return Err(BandError::Both(name, "window")),
            (Some((_, band)), None) => band,
        };
        Ok(Self { globals: globals.unwrap_or(0), sinks: sinks.unwrap_or(0), ..band })
    }
}

impl fmt::Display for Band {
    /// What [`Band::from_str`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (left, right) = (self.left, self.right);
        let window = |f: &mut fmt::Formatter<'_>| match left == right {
            true => write!(f, "window={left}"),
            false => write!(f, "window={left}:{right}"),
        };
        match self.shape {
            Shape::Window if (left, right) == (u32::MAX, u32::MAX) => f.write_str("full")?,
            Shape::Window => window(f)?,
            Shape::Dilated { step } => write!(f, "dilated={left}:{step}")?,
            Shape::Strided { stride } if (left, right) == (stride, stride) => write!(f, "strided={stride}")?,
            Shape::Strided { stride } => {
                write!(f, "strided={stride},")?;
                window(f)?;
            }
            Shape::Fixed { block, columns } => write!(f, "fixed={block}:{columns}")?,
            Shape::Pooled { block } if (left, right) == (1, 1) => write!(f, "pooled={block}")?,
            Shape::Pooled { block } => write!(f, "pooled={block}:{left}")?,
        }
        if self.globals > 0 {
            write!(f, ",globals={}", self.globals)?;
        }
        if self.sinks > 0 {
            write!(f, ",sinks={}", self.sinks)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_are_read_and_written_back() {
        let bands = [
            ("full", Band::FULL),
            ("window=128", Band::symmetric(128, 0)),
            ("window=128,globals=1", Band::symmetric(128, 1)),
            ("window=8:2", Band { left: 8, right: 2, ..Band::FULL }),
            ("window=64,sinks=4", Band { sinks: 4, ..Band::symmetric(64, 0) }),
            ("dilated=32:4", Band::symmetric(32, 0).with_shape(Shape::Dilated { step: 4 })),
            ("strided=64", Band::symmetric(64, 0).with_shape(Shape::Strided { stride: 64 })),
            ("strided=64,window=16", Band::symmetric(16, 0).with_shape(Shape::Strided { stride: 64 })),
            ("fixed=128:8", Band::symmetric(0, 0).with_shape(Shape::Fixed { block: 128, columns: 8 })),
            ("pooled=64,globals=1", Band::symmetric(1, 1).with_shape(Shape::Pooled { block: 64 })),
            ("pooled=64:2", Band::symmetric(2, 0).with_shape(Shape::Pooled { block: 64 })),
        ];
        for (text, band) in bands {
            assert_eq!(text.parse(), Ok(band), "{text}");
            assert_eq!(band.to_string(), text);
        }
        assert_eq!("window = 8 , globals=cls".parse(), Ok(Band::symmetric(8, 1)));
    }

    #[test]
    fn what_is_no_band_is_named() {
        for (wrong, part) in [
            ("", "key=value"),
            ("window", "key=value"),
            ("window=0", "from 1 token on"),
            ("window=x", "`x`"),
            ("window=-1", "`-1`"),
            ("window=99999999999", "from 1 token on"),
            ("globals=cls", "missing"),
            ("sinks=cls,window=3", "leading tokens"),
            ("width=3", "`width` is unknown"),
            ("window=3,window=4", "twice"),
            ("fixed=8:9", "at most B columns"),
            ("fixed=8", "B:C"),
            ("dilated=8", "W:D"),
            ("fixed=8:1,pooled=4", "`fixed` and `pooled` exclude"),
            ("full,window=3", "exclude"),
            ("full=3", "unknown"),
        ] {
            let message = wrong.parse::<Band>().unwrap_err().to_string();
            assert!(message.contains(part), "{wrong}: {message}");
        }
    }
}
