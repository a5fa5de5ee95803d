//! The codes that a scaled number can be rounded to.

use crate::quant::TABLE_LEN;

/// Powers of two: `±2^k`, k = 0 … 6, and 0 twice. *Source*: Miyashita et al. 2016 (§3.1), weights in the log domain.
pub(in crate::compress) const LOG2: [i8; TABLE_LEN] = [-64, -32, -16, -8, -4, -2, -1, 0, 0, 1, 2, 4, 8, 16, 32, 64];

/// Sums of two powers of two, one of {0, 1/2, 1/4, 1/16} and one of {0, 1/8}, times 96: evenly spaced near 0, coarser
/// outside. *Source*: Li et al. 2020 (APoT, §2.2) for 3 bits of magnitude.
pub(in crate::compress) const LOG2_SUM: [i8; TABLE_LEN] =
    [-60, -48, -36, -24, -18, -12, -6, 0, 0, 6, 12, 18, 24, 36, 48, 60];

/// Quantiles of a normal distribution scaled to ±1, times 64, with an exact 0. *Source*: Dettmers et al. 2023 (QLoRA,
/// appendix E).
pub(in crate::compress) const NF4: [i8; TABLE_LEN] =
    [-64, -45, -34, -25, -18, -12, -6, 0, 5, 10, 16, 22, 28, 36, 46, 64];

/// Evenly spaced, `step · (i − 8)`.
pub(in crate::compress) fn linear_table(step: i8) -> [i8; TABLE_LEN] {
    std::array::from_fn(|index| {
        let offset = i8::try_from(index).expect("a table is short") - 8;
        step * offset
    })
}

/// The codes that exist.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::compress) enum Grid {
    /// All whole numbers from −127 to 127.
    Bytes,
    /// The 16 entries of a table.
    Table {
        /// As it is stored.
        table: [i8; TABLE_LEN],
        /// The entries in rising order, as numbers, and the middles between neighbours.
        sorted: [f32; TABLE_LEN],
        middles: [f32; TABLE_LEN - 1],
    },
}

impl Grid {
    /// The grid of a table.
    pub(in crate::compress) fn of(table: [i8; TABLE_LEN]) -> Self {
        let mut codes = table;
        codes.sort_unstable();
        let sorted = codes.map(f32::from);
        let middles = std::array::from_fn(|index| (sorted[index] + sorted[index + 1]) / 2.0);
        Self::Table { table, sorted, middles }
    }

    /// The nearest code.
    pub(in crate::compress) fn round(&self, x: f32) -> f32 {
        match self {
            Self::Bytes => x.round_ties_even().clamp(-127.0, 127.0),
            Self::Table { sorted, middles, .. } => {
                // Without branches, so that loops over elements become vector code.
                let mut code = sorted[0];
                for index in 0..TABLE_LEN - 1 {
                    code = if x > middles[index] { sorted[index + 1] } else { code };
                }
                code
            }
        }
    }

    /// The largest magnitude that both signs have.
    pub(in crate::compress) fn reach(&self) -> f32 {
        match self {
            Self::Bytes => 127.0,
            Self::Table { sorted, .. } => sorted[TABLE_LEN - 1].min(-sorted[0]),
        }
    }

    /// The index of a code that [`Grid::round`] gave.
    pub(in crate::compress) fn index(&self, code: f32) -> u8 {
        match self {
            Self::Bytes => 0,
            Self::Table { table, .. } => {
                let index = table.iter().position(|&entry| f32::from(entry) == code);
                u8::try_from(index.unwrap_or(0)).expect("a table is short")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_what_they_are_called() {
        assert!(LOG2.iter().all(|&code| code == 0 || code.unsigned_abs().is_power_of_two()));
        // Every entry is a sum of one of {0, 48, 24, 6} and one of {0, 12}.
        for code in LOG2_SUM {
            let magnitude = code.abs();
            assert!([0, 48, 24, 6].iter().any(|a| [0, 12].iter().any(|b| a + b == magnitude)), "{code}");
        }
        // Quantiles: between neighbours lies the same probability, except around the exact 0.
        let published = [
            -1.0,
            -0.696_192_8,
            -0.525_073_05,
            -0.394_917_5,
            -0.284_441_38,
            -0.184_773_43,
            -0.091_050_036,
            0.0,
            0.079_580_3,
            0.160_930_2,
            0.246_112_3,
            0.337_915_24,
            0.440_709_83,
            0.562_617,
            0.722_956_84,
            1.0,
        ];
        for (code, published) in NF4.iter().zip(published) {
            assert!((f64::from(*code) / 64.0 - published).abs() <= 0.5 / 64.0 + 1e-9, "{code} is not {published}");
        }
        assert_eq!(linear_table(1)[0], -8);
        assert_eq!(linear_table(4)[15], 28);
    }

    #[test]
    fn rounding_finds_the_nearest_code() {
        for table in [LOG2, LOG2_SUM, NF4, linear_table(1), linear_table(8)] {
            let grid = Grid::of(table);
            for step in -1_500..1_500i16 {
                let x = f32::from(step) * 0.057;
                let code = grid.round(x);
                let nearest = table.iter().map(|&entry| (f32::from(entry) - x).abs()).fold(f32::INFINITY, f32::min);
                assert!(((code - x).abs() - nearest).abs() < 1e-5, "{x} became {code}");
                assert_eq!(f32::from(table[usize::from(grid.index(code))]), code);
            }
        }
        assert_eq!([Grid::Bytes.round(0.5), Grid::Bytes.round(1.5), Grid::Bytes.round(-300.0)], [0.0, 2.0, -127.0]);
    }
}
