//! Recursive least squares with forgetting: a linear model that is mended by each sample, in the same time and memory
//! however many there were (Ljung, *System Identification*, 2nd ed., 11.2). Pure.
//!
//! Two guards. The part of a residual beyond [`CLIP`] is cut off, so that one odd sample moves little. Where inputs do
//! not vary, forgetting alone would blow up the covariance: it stops while the covariance is large.

/// What is left of a sample's weight after the next one: of each, about the last 50 count.
const KEEP: f64 = 0.98;
/// As targets are logarithms: a sample that is more than three times off counts as three times off.
const CLIP: f64 = 1.1;
/// Sum of the variances of the weights up to which old samples are forgotten.
const MAX_TRACE: f64 = 100.0;
/// Inputs and targets beyond this are cut off.
const MAX_INPUT: f64 = 50.0;

/// A model with `N` inputs.
#[derive(Clone, Debug)]
pub struct LeastSquares<const N: usize> {
    prior: [f64; N],
    weights: [f64; N],
    covariance: [[f64; N]; N],
    samples: u32,
}

impl<const N: usize> LeastSquares<N> {
    /// What is believed before the first sample. The first input is to be 1: its weight is set by the first sample.
    pub fn new(prior: [f64; N]) -> Self {
        let mut covariance = [[0.0; N]; N];
        for (index, row) in covariance.iter_mut().enumerate() {
            row[index] = 1.0;
        }
        Self {
            prior,
            weights: prior,
            covariance,
            samples: 0,
        }
    }

    /// How many samples it has seen.
    pub fn samples(&self) -> u32 {
        self.samples
    }

    /// What the target is expected to be; finite.
    pub fn predict(&self, input: &[f64; N]) -> f64 {
        bounded(dot(&self.weights, &input.map(bounded)))
    }

    /// Takes in that the target was `target`.
    pub fn learn(&mut self, input: &[f64; N], target: f64) {
        let (input, target) = (input.map(bounded), bounded(target));
        let residual = target - dot(&self.weights, &input);
        if self.samples == 0 {
            self.weights[0] += residual;
        } else {
            self.mend(&input, residual.clamp(-CLIP, CLIP));
        }
        self.samples = self.samples.saturating_add(1);
    }

    fn mend(&mut self, input: &[f64; N], residual: f64) {
        let trace: f64 = (0..N).map(|index| self.covariance[index][index]).sum();
        let keep = if trace < MAX_TRACE { KEEP } else { 1.0 };
        let moved = self.covariance.map(|row| dot(&row, input));
        let scale = keep + dot(input, &moved);
        for row in 0..N {
            self.weights[row] += moved[row] / scale * residual;
            for column in row..N {
                let less = moved[row] * moved[column] / scale;
                let value = (self.covariance[row][column] - less) / keep;
                // Rounding must not make it lopsided.
                self.covariance[row][column] = value;
                self.covariance[column][row] = value;
            }
        }
        let is_sound = (0..N).all(|index| {
            self.weights[index].abs() <= MAX_INPUT * MAX_INPUT
                && self.covariance[index][index] >= 0.0
        });
        if !is_sound || scale < keep {
            *self = Self::new(self.prior);
        }
    }
}

fn dot<const N: usize>(a: &[f64; N], b: &[f64; N]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn bounded(value: f64) -> f64 {
    if value.is_nan() {
        0.0
    } else {
        value.clamp(-MAX_INPUT, MAX_INPUT)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn it_learns_a_line_and_then_another_one() {
        let mut model = LeastSquares::new([0.0, 1.0, 0.0]);
        let mut rng = StdRng::seed_from_u64(1);
        for weights in [[3.0, 0.5, -1.0], [4.0, 1.5, 1.0]] {
            for _ in 0..500 {
                let input = [1.0, rng.random_range(0.0..3.0), rng.random_range(0.0..1.0)];
                let noise = rng.random_range(-0.2..0.2);
                model.learn(&input, dot(&weights, &input) + noise);
            }
            for input in [[1.0, 0.0, 0.0], [1.0, 3.0, 1.0]] {
                let off = model.predict(&input) - dot(&weights, &input);
                assert!(off.abs() < 0.2, "{weights:?} {off}");
            }
        }
    }

    #[test]
    fn an_odd_sample_moves_little() {
        let mut model = LeastSquares::new([0.0]);
        (0..100).for_each(|_| model.learn(&[1.0], 4.0));
        model.learn(&[1.0], 40.0);
        assert!(model.predict(&[1.0]) < 4.05);
    }

    #[test]
    fn inputs_that_never_vary_do_no_harm() {
        let mut model = LeastSquares::new([0.0, 0.0, 0.0]);
        (0..100_000).for_each(|_| model.learn(&[1.0, 0.0, 1.0], 5.0));
        let trace: f64 = (0..3).map(|index| model.covariance[index][index]).sum();
        assert!(trace < 2.0 * MAX_TRACE, "{trace}");
        assert!((model.predict(&[1.0, 0.0, 1.0]) - 5.0).abs() < 1e-3);
        assert_eq!(model.samples(), 100_000, "it never began anew");
    }

    proptest! {
        #[test]
        fn whatever_comes_it_says_a_number(
            samples in prop::collection::vec((prop::array::uniform3(any::<f64>()), any::<f64>()), 0..300),
            asked in prop::array::uniform3(any::<f64>()),
        ) {
            let mut model = LeastSquares::new([0.0, 1.0, 0.0]);
            for (input, target) in samples {
                model.learn(&input, target);
                prop_assert!(model.predict(&asked).is_finite());
            }
        }
    }
}
