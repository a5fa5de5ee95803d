//! Instruction sets, and which of them this machine has.

use std::fmt;
use std::str::FromStr;

use super::arch::detect;

/// An instruction set that this machine has: [`Isa::detect`], [`Isa::all_supported`] and [`Isa::force`] are the only
/// sources of values, so holding one is the proof that its kernels may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(IsaName);

/// Names of the instruction sets that kernels exist for, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IsaName {
    /// AVX-512 VNNI with AMX-TILE and AMX-INT8, the matrix unit, which the system lets the process use.
    AmxInt8,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// x86-64 with AVX2, FMA, F16C and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AArch64 with the dot-product extension.
    NeonDotprod,
    /// Anything.
    Portable,
}

/// A requested instruction set that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// The name means nothing.
    #[error("unknown instruction set `{0}`: expected amx-int8, avx512-vnni, avx-vnni, avx2, neon-dotprod or portable")]
    Unknown(String),
    /// The machine lacks it.
    #[error("this machine does not have the instruction set {wanted}; it has {available}")]
    Unsupported {
        /// What was asked for.
        wanted: IsaName,
        /// What there is, best first.
        available: String,
    },
}

impl IsaName {
    /// All of them, best first.
    pub const ALL: [Self; 6] =
        [Self::AmxInt8, Self::Avx512Vnni, Self::AvxVnni, Self::Avx2, Self::NeonDotprod, Self::Portable];

    /// The name used by flags, logs and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AmxInt8 => "amx-int8",
            Self::Avx512Vnni => "avx512-vnni",
            Self::AvxVnni => "avx-vnni",
            Self::Avx2 => "avx2",
            Self::NeonDotprod => "neon-dotprod",
            Self::Portable => "portable",
        }
    }
}

impl fmt::Display for IsaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for IsaName {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        let wanted = name.to_ascii_lowercase().replace('_', "-");
        Self::ALL.into_iter().find(|isa| isa.as_str() == wanted).ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

impl Isa {
    /// The best instruction set of this machine.
    #[must_use]
    pub fn detect() -> Self {
        Self::all_supported()[0]
    }

    /// Every instruction set of this machine, best first; never empty.
    #[must_use]
    pub fn all_supported() -> Vec<Self> {
        IsaName::ALL.into_iter().filter(|name| detect::is_supported(*name)).map(Self).collect()
    }

    /// The named instruction set.
    ///
    /// # Errors
    /// If this machine does not have it.
    pub fn force(wanted: IsaName) -> Result<Self, IsaError> {
        if detect::is_supported(wanted) {
            return Ok(Self(wanted));
        }
        let available = Self::all_supported().iter().map(|isa| isa.name().as_str()).collect::<Vec<_>>().join(", ");
        Err(IsaError::Unsupported { wanted, available })
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> IsaName {
        self.0
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_unknown_ones_are_named() {
        for name in IsaName::ALL {
            assert_eq!(name.as_str().parse::<IsaName>(), Ok(name));
            assert_eq!(name.as_str().replace('-', "_").to_uppercase().parse::<IsaName>(), Ok(name));
        }
        assert_eq!("mmx".parse::<IsaName>(), Err(IsaError::Unknown("mmx".to_owned())));
    }

    #[test]
    fn what_is_detected_can_be_forced_and_what_is_missing_cannot() {
        let all = Isa::all_supported();
        assert_eq!(all[0], Isa::detect());
        assert_eq!(all.last().map(|isa| isa.name()), Some(IsaName::Portable));
        for name in IsaName::ALL {
            let forced = Isa::force(name);
            assert_eq!(forced.is_ok(), all.iter().any(|isa| isa.name() == name), "{name}");
        }
        let foreign = if cfg!(target_arch = "x86_64") { IsaName::NeonDotprod } else { IsaName::Avx2 };
        let message = Isa::force(foreign).unwrap_err().to_string();
        assert!(message.contains(foreign.as_str()) && message.contains("portable"), "{message}");
    }
}
