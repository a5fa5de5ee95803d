//! Values of flags that are more than a number or a path.

use crate::model::Band;

/// `window=W[,globals=cls|N]`.
pub(super) fn attention(text: &str) -> Result<Band, String> {
    let mut window = None;
    let mut globals = 0;
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is not of the form key=value"))?;
        let number = |value: &str| value.parse::<u32>().map_err(|_| format!("`{value}` is not a number of tokens"));
        match key.trim() {
            "window" => window = Some(number(value.trim())?),
            "globals" if value.trim() == "cls" => globals = 1,
            "globals" => globals = number(value.trim())?,
            other => return Err(format!("`{other}` is unknown; window and globals are known")),
        }
    }
    let window = window.ok_or("window=W is missing")?;
    if window == 0 {
        return Err("window must be at least 1".to_owned());
    }
    Ok(Band::symmetric(window, globals))
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
    fn attention_patterns() {
        assert_eq!(attention("window=128,globals=cls"), Ok(Band::symmetric(128, 1)));
        assert_eq!(attention("globals=4, window=8"), Ok(Band::symmetric(8, 4)));
        for wrong in ["", "window", "window=0", "window=x", "globals=cls", "window=-1", "width=3", "window=99999999999"]
        {
            assert!(attention(wrong).is_err(), "{wrong} was accepted");
        }
    }

    #[test]
    fn shares() {
        assert_eq!(share("0.25"), Ok(0.25));
        for wrong in ["1", "-0.1", "NaN", "a quarter", ""] {
            assert!(share(wrong).is_err(), "{wrong} was accepted");
        }
    }
}
