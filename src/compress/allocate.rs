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

#[cfg(test)]
mod tests {
    use super::*;

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
