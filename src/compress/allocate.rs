//! How much each layer gives up, so that the total is met at the least cost.

/// What removing costs in one layer: `cost[k]` after the `k` cheapest units are gone, `cost[0] = 0`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// Units in the order of their removal.
    pub order: Vec<usize>,
    /// `[order.len() + 1]`, cumulative.
    pub cost: Vec<f64>,
}

impl Ranking {
    /// The units that stay when `n_removed` go, in rising order. `n_units` is the number before removal.
    #[must_use]
    pub fn keep(&self, n_units: usize, n_removed: usize) -> Vec<usize> {
        let mut keep = vec![true; n_units];
        self.order[..n_removed].iter().for_each(|&unit| keep[unit] = false);
        (0..n_units).filter(|&unit| keep[unit]).collect()
    }
}

/// Units kept per layer: multiples of `panel` (or everything), at least one panel each, `target_panels` panels over
/// all layers, at the least total cost. `None` if that cannot be met.
///
/// Exact, by dynamic programming over layers: `best[l][p] = min_k best[l−1][p−k] + cost_l(k panels kept)`.
#[must_use]
pub fn allocate(layers: &[(usize, &Ranking)], panel: usize, target_panels: usize) -> Option<Vec<usize>> {
    let mut best = vec![f64::INFINITY; target_panels + 1];
    best[0] = 0.0;
    let mut choices: Vec<Vec<usize>> = Vec::new();
    for &(n_units, ranking) in layers {
        let mut next = vec![f64::INFINITY; target_panels + 1];
        let mut choice = vec![0; target_panels + 1];
        for kept in 1..=n_units.div_ceil(panel) {
            let n_removed = n_units - (kept * panel).min(n_units);
            let Some(cost) = ranking.cost.get(n_removed) else { continue };
            for total in kept..=target_panels {
                let sum = best[total - kept] + cost;
                if sum < next[total] {
                    next[total] = sum;
                    choice[total] = kept;
                }
            }
        }
        best = next;
        choices.push(choice);
    }
    if !best[target_panels].is_finite() {
        return None;
    }
    let mut total = target_panels;
    let mut kept = vec![0; layers.len()];
    for (layer, choice) in choices.iter().enumerate().rev() {
        kept[layer] = (choice[total] * panel).min(layers[layer].0);
        total -= choice[total];
    }
    Some(kept)
}

/// One way to shape a part of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// What it takes of the budget (multiply-accumulates, bytes, nanoseconds).
    pub price: u64,
    /// What it costs in quality.
    pub cost: f64,
}

/// Budgets are divided into at most this many steps; prices are rounded up to whole steps, so a budget is never
/// exceeded.
const MAX_STEPS: u64 = 1 << 14;

/// Picks one choice of every part so that the prices stay within `budget` at the least total cost; `None` if even the
/// cheapest do not fit.
///
/// Exact by dynamic programming if the prices have a common divisor of at least `budget / 16384` (heads and panels of
/// neurons do in multiply-accumulates and in bytes); else as if every price were rounded up to a multiple of that.
#[must_use]
pub fn choose(parts: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let divisor = parts.iter().flatten().fold(0, |divisor, choice| gcd(divisor, choice.price));
    let step = divisor.max(budget.div_ceil(MAX_STEPS)).max(1);
    let n_steps = usize::try_from(budget / step).ok()?;
    // best[s]: least cost with prices of s steps together.
    let mut best = vec![f64::INFINITY; n_steps + 1];
    best[0] = 0.0;
    let mut taken: Vec<Vec<usize>> = Vec::with_capacity(parts.len());
    for choices in parts {
        let mut next = vec![f64::INFINITY; n_steps + 1];
        let mut take = vec![usize::MAX; n_steps + 1];
        for (index, choice) in choices.iter().enumerate() {
            let price = usize::try_from(choice.price.div_ceil(step)).ok()?;
            for total in price..=n_steps {
                let sum = best[total - price] + choice.cost;
                if sum < next[total] {
                    next[total] = sum;
                    take[total] = index;
                }
            }
        }
        best = next;
        taken.push(take);
    }
    let mut total = (0..=n_steps).min_by(|&a, &b| best[a].total_cmp(&best[b]))?;
    if !best[total].is_finite() {
        return None;
    }
    let mut picks = vec![0; parts.len()];
    for (part, take) in taken.iter().enumerate().rev() {
        picks[part] = take[total];
        let price = parts[part][picks[part]].price.div_ceil(step);
        total -= usize::try_from(price).ok()?;
    }
    Some(picks)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    /// Every combination, one after another.
    fn brute_force(parts: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = parts.split_first() else { return Some(0.0) };
        first
            .iter()
            .filter(|choice| choice.price <= budget)
            .filter_map(|choice| Some(choice.cost + brute_force(rest, budget - choice.price)?))
            .min_by(f64::total_cmp)
    }

    #[test]
    fn the_best_of_all_combinations_is_chosen_within_the_budget() {
        let mut rng = StdRng::seed_from_u64(2);
        for round in 0..200 {
            let unit = if round % 2 == 0 { 1 } else { 49_152 };
            let parts: Vec<Vec<Choice>> = (0..5)
                .map(|_| {
                    (0..rng.random_range(1..5))
                        .map(|_| Choice { price: unit * rng.random_range(0..12), cost: rng.random_range(0.0..1.0) })
                        .collect()
                })
                .collect();
            let budget = unit * rng.random_range(0..40);
            let exact = brute_force(&parts, budget);
            let picks = choose(&parts, budget);
            assert_eq!(picks.is_some(), exact.is_some(), "{parts:?} within {budget}");
            if let (Some(picks), Some(exact)) = (picks, exact) {
                let taken: Vec<Choice> = picks.iter().zip(&parts).map(|(&pick, part)| part[pick]).collect();
                assert!(taken.iter().map(|choice| choice.price).sum::<u64>() <= budget);
                assert!((taken.iter().map(|choice| choice.cost).sum::<f64>() - exact).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn prices_without_a_common_unit_never_exceed_the_budget() {
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..50 {
            let parts: Vec<Vec<Choice>> = (0..6)
                .map(|_| {
                    (1..10u64)
                        .map(|k| Choice {
                            price: k * 1_000_003 + rng.random_range(0..1_000_003),
                            cost: 1.0 / k as f64 + rng.random_range(0.0..0.01),
                        })
                        .collect()
                })
                .collect();
            let budget = 30_000_000;
            let picks = choose(&parts, budget).unwrap();
            let price: u64 = picks.iter().zip(&parts).map(|(&pick, part)| part[pick].price).sum();
            let cost: f64 = picks.iter().zip(&parts).map(|(&pick, part)| part[pick].cost).sum();
            assert!(price <= budget);
            // At most one step per part is lost to rounding.
            let exact = brute_force(&parts, budget - 6 * budget.div_ceil(MAX_STEPS)).unwrap();
            assert!(cost <= exact + 1e-12, "{cost} against {exact}");
        }
    }

    fn ranking(steps: &[f64]) -> Ranking {
        let mut cost = vec![0.0];
        cost.extend(steps.iter().scan(0.0, |sum, step| {
            *sum += step;
            Some(*sum)
        }));
        Ranking { order: (0..steps.len()).collect(), cost }
    }

    #[test]
    fn the_cheapest_division_is_found_and_keeps_a_panel_everywhere() {
        let cheap = ranking(&[0.1, 0.1, 0.2, 0.2, 0.3, 0.3]);
        let dear = ranking(&[1.0; 6]);
        let middle = ranking(&[0.1, 0.1, 5.0, 5.0, 5.0, 5.0]);
        let layers = [(8, &cheap), (8, &dear), (8, &middle)];
        // 24 units in panels of 2; 8 of 12 panels stay: 6 units from the first layer, 2 from the third.
        assert_eq!(allocate(&layers, 2, 8), Some(vec![2, 8, 6]));
        assert_eq!(allocate(&layers, 2, 12), Some(vec![8, 8, 8]));
        assert_eq!(allocate(&layers, 2, 3), Some(vec![2, 2, 2]));
        assert_eq!(allocate(&layers, 2, 2), None);
    }

    #[test]
    fn widths_that_are_no_multiple_of_the_panel_lose_their_last_panel_first() {
        let flat = ranking(&[1.0; 60]);
        assert_eq!(allocate(&[(100, &flat)], 64, 2), Some(vec![100]));
        assert_eq!(allocate(&[(100, &flat)], 64, 1), Some(vec![64]));
    }

    #[test]
    fn what_is_removed_first_is_what_goes() {
        let ranking = Ranking { order: vec![3, 0, 4], cost: vec![0.0, 1.0, 2.0, 3.0] };
        assert_eq!(ranking.keep(6, 2), [1, 2, 4, 5]);
    }
}
