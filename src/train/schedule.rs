//! The learning rate over the steps, by the formulas of transformers' `get_*_schedule_with_warmup`.

use std::f64::consts::PI;

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The peak until the end.
    Constant,
    /// Linear from the peak to zero.
    Linear,
    /// Half a cosine wave from the peak to zero.
    Cosine,
}

/// The length of the warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps, rounded up, but not all of them: the learning rate of the first step
    /// is zero.
    Fraction(f64),
}

/// A learning rate that rises from zero to its peak, then follows a shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    shape: Shape,
    peak: f64,
    warmup: u64,
    steps: u64,
}

impl Schedule {
    /// The schedule of a training of `steps` steps.
    pub fn new(shape: Shape, peak: f64, warmup: Warmup, steps: u64) -> Self {
        let warmup = match warmup {
            Warmup::Steps(warmup) => warmup,
            Warmup::Fraction(share) => ((share * steps as f64).ceil() as u64).min(steps.saturating_sub(1)),
        };
        Self { shape, peak, warmup, steps }
    }

    /// The learning rate of a step, from 0 on. With a warm-up, that of step 0 is zero, as in
    /// transformers.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let length = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / length).min(1.0);
        self.peak
            * match self.shape {
                Shape::Constant => 1.0,
                Shape::Linear => 1.0 - progress,
                Shape::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_rates(shape: Shape, expected: &[(u64, f64)]) {
        let schedule = Schedule::new(shape, 2.0, Warmup::Steps(4), 12);
        for &(step, rate) in expected {
            let found = schedule.learning_rate(step);
            assert!((found - rate).abs() < 1e-12, "step {step}: {found}, expected {rate}");
        }
    }

    #[test]
    fn every_shape_rises_first() {
        for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
            assert_rates(shape, &[(0, 0.0), (1, 0.5), (3, 1.5), (4, 2.0)]);
        }
    }

    #[test]
    fn then_it_follows_its_shape() {
        assert_rates(Shape::Constant, &[(5, 2.0), (11, 2.0), (99, 2.0)]);
        assert_rates(Shape::Linear, &[(5, 1.75), (8, 1.0), (11, 0.25), (12, 0.0), (99, 0.0)]);
        let half = 0.5_f64.sqrt();
        assert_rates(Shape::Cosine, &[(6, 1.0 + half), (8, 1.0), (10, 1.0 - half), (12, 0.0), (99, 0.0)]);
    }

    #[test]
    fn a_share_is_rounded_up() {
        let warmup = |share, steps| Schedule::new(Shape::Cosine, 1.0, Warmup::Fraction(share), steps).warmup;
        assert_eq!(warmup(0.03, 100), 3);
        assert_eq!(warmup(0.03, 101), 4);
        assert_eq!(warmup(0.0, 100), 0);
        assert_eq!([0, 1, 2, 3].map(|steps| warmup(0.03, steps)), [0, 0, 1, 1]);
        assert_eq!(warmup(0.99, 2), 1);
        assert_eq!(Schedule::new(Shape::Cosine, 3.0, Warmup::Fraction(0.03), 1).learning_rate(0), 3.0, "it learns");
    }

    #[test]
    fn without_a_warm_up_it_starts_at_the_peak() {
        let schedule = Schedule::new(Shape::Linear, 3.0, Warmup::Steps(0), 3);
        assert_eq!([0, 1, 2].map(|step| schedule.learning_rate(step)), [3.0, 2.0, 3.0 * (1.0 - 2.0 / 3.0)]);
        assert_eq!(Schedule::new(Shape::Cosine, 3.0, Warmup::Steps(0), 0).learning_rate(0), 3.0);
    }
}
