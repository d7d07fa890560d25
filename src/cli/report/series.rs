//! Columns of numbers: gaps, moving means, scales, and thinning that keeps the shape.

/// Maximum number of points of a curve.
pub(super) const MAX_POINTS: usize = 1000;

/// Whether a number can be drawn: finite, and within f32, so that differences and ratios are
/// finite, too.
pub(super) fn drawable(x: f64) -> bool {
    (x as f32).is_finite()
}

/// Indices of at most [`MAX_POINTS`] values, in order: all of them, or the minimum and the maximum
/// of equal stretches. Spikes remain, and so do the first and the last value.
pub(super) fn thin_out(values: &[f64]) -> Vec<usize> {
    if values.len() <= MAX_POINTS {
        return (0..values.len()).collect();
    }
    let stretches = MAX_POINTS / 2 - 1;
    let mut kept = vec![0, values.len() - 1];
    for n in 0..stretches {
        let range = n * values.len() / stretches..(n + 1) * values.len() / stretches;
        let drawn = || range.clone().zip(values.get(range.clone()).unwrap_or_default()).filter(|(_, x)| drawable(**x));
        kept.extend(drawn().min_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i));
        kept.extend(drawn().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i));
    }
    kept.sort_unstable();
    kept.dedup();
    kept
}

/// Length of the moving mean for a curve of `len` values: odd, about a twenty-fifth of them; 1 for
/// short curves.
pub(super) fn window(len: usize) -> usize {
    if len < 20 { 1 } else { (len / 50).clamp(2, 500) * 2 + 1 }
}

/// For each value the mean of the drawable values in a window around it; NaN if there are none. At
/// the start the window is narrower and stays symmetric, so that the mean starts at the first
/// value.
pub(super) fn smooth(values: &[f64], window: usize) -> Vec<f64> {
    let mut sums = vec![(0.0, 0_u32)];
    let (mut sum, mut count) = (0.0, 0);
    for &x in values.iter() {
        if drawable(x) {
            (sum, count) = (sum + x, count + 1);
        }
        sums.push((sum, count));
    }
    let until = |i: usize| sums.get(i.min(values.len())).copied().unwrap_or_default();
    let mean = |i: usize| {
        let half = (window / 2).min(i);
        let ((before, skipped), (sum, count)) = (until(i - half), until(i + half + 1));
        (sum - before) / f64::from(count - skipped)
    };
    (0..values.len()).map(mean).collect()
}

/// The mean of the last `window` drawable values.
pub(super) fn last_mean(values: &[f64], window: usize) -> Option<f64> {
    let last: Vec<f64> = values.iter().rev().copied().filter(|x| drawable(*x)).take(window).collect();
    (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64)
}

/// The median of the finite values; `None` if there are none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|x| x.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (lower, upper) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
    Some(f64::midpoint(*sorted.get(lower)?, *sorted.get(upper)?))
}

/// The scale of an axis: its range and its labelled values.
#[derive(Debug)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    /// Whether equal ratios, not equal differences, have equal lengths.
    pub(super) logarithmic: bool,
    /// Values with a label, rising, within the scale.
    pub(super) ticks: Vec<f64>,
}

impl Scale {
    /// A scale around the drawable values, between round numbers; `from_zero` includes 0. Positive
    /// values that are far apart get a logarithmic scale.
    pub(super) fn around(values: impl Iterator<Item = f64>, from_zero: bool) -> Self {
        let empty = (f64::INFINITY, f64::NEG_INFINITY);
        let (low, high) = values.filter(|x| drawable(*x)).fold(empty, |(l, h), x| (l.min(x), h.max(x)));
        if low > high {
            return Self::linear(0.0, 1.0, 4.0);
        }
        if low > f64::from(f32::MIN_POSITIVE) && high / low > 50.0 {
            return Self::decades(low, high);
        }
        let (low, high) = if from_zero { (low.min(0.0), high.max(0.0)) } else { (low, high) };
        let size = high.abs().max(low.abs());
        let pad = match high - low {
            // A single value has no extent.
            extent if extent <= 1e-9 * size => 0.1 * size,
            _ => 0.0,
        };
        let pad = if size == 0.0 { 1.0 } else { pad };
        let low = if from_zero && low == 0.0 { low } else { low - pad };
        Self::linear(low, high + pad, 5.0)
    }

    /// A scale of steps, exactly from the first to the last.
    pub(super) fn steps(first: u64, last: u64) -> Self {
        let (low, high) = (first as f64, last as f64);
        if low >= high {
            let pad = (1e-9 * low).max(1.0);
            return Self { low: low - pad, high: low + pad, logarithmic: false, ticks: vec![low] };
        }
        let step = nice((high - low) / 5.0).max(1.0);
        let count = ((high / step).floor() - (low / step).ceil()) as u32;
        let from = (low / step).ceil();
        let ticks = (0..=count).map(|i| (from + f64::from(i)) * step).filter(|x| *x <= high).collect();
        Self { low, high, logarithmic: false, ticks }
    }

    fn linear(low: f64, high: f64, intervals: f64) -> Self {
        let step = nice((high - low) / intervals);
        let (from, to) = ((low / step).floor(), (high / step).ceil());
        let ticks = (0..=(to - from) as u32).map(|i| (from + f64::from(i)) * step).collect();
        Self { low: from * step, high: to * step, logarithmic: false, ticks }
    }

    fn decades(low: f64, high: f64) -> Self {
        let (from, to) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let stride = ((to - from) as u32).div_ceil(5) as usize;
        let ticks = (from..=to).step_by(stride).map(|e| 10_f64.powi(e)).collect();
        Self { low: f64::from(from), high: f64::from(to), logarithmic: true, ticks }
    }

    /// Whether a value lies on the scale.
    pub(super) fn covers(&self, x: f64) -> bool {
        let x = if self.logarithmic { x.log10() } else { x };
        (self.low..=self.high).contains(&x)
    }

    /// The position of a value: 0 at the low end, 1 at the high end, never outside.
    pub(super) fn place(&self, x: f64) -> f64 {
        let x = if self.logarithmic { x.log10() } else { x };
        ((x - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `x`.
fn nice(x: f64) -> f64 {
    let power = 10_f64.powi(x.log10().floor() as i32);
    let round = [1.0, 2.0, 2.5, 5.0].into_iter().find(|m| m * power >= x * (1.0 - 1e-9));
    round.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_values_all_stay() {
        assert_eq!(thin_out(&[]), Vec::<usize>::new());
        assert_eq!(thin_out(&[f64::NAN, 1.0]), [0, 1]);
        assert_eq!(thin_out(&[1.0; MAX_POINTS]).len(), MAX_POINTS);
    }

    #[test]
    fn of_many_the_ends_and_the_spikes_stay() {
        for len in [MAX_POINTS + 1, 1_777, 100_000] {
            let mut values: Vec<f64> = (0..len).map(|i| (i as f64 * 0.37).sin()).collect();
            (values[501], values[700], values[900]) = (9.0, -9.0, f64::NAN);
            let kept = thin_out(&values);
            assert!(kept.len() <= MAX_POINTS && kept.len() > MAX_POINTS / 2, "{len}: {}", kept.len());
            assert!(kept.is_sorted_by(|a, b| a < b));
            assert!([0, 501, 700, len - 1].iter().all(|i| kept.contains(i)), "{len}");
        }
        assert_eq!(thin_out(&vec![f64::NAN; 5_000]), [0, 4_999]);
    }

    #[test]
    fn means_are_of_the_values_around() {
        assert_eq!(smooth(&[4.0, 1.0, 1.0, 4.0, 4.0], 3), [4.0, 2.0, 2.0, 3.0, 4.0]);
        assert_eq!(smooth(&[f64::NAN, 1.0, f64::INFINITY, 5.0], 3)[1..], [1.0, 3.0, 5.0]);
        assert!(smooth(&[f64::NAN, 1.0], 3)[0].is_nan());
        assert_eq!(last_mean(&[9.0, 1.0, f64::NAN, 3.0], 2), Some(2.0));
        assert_eq!((last_mean(&[f64::NAN], 2), median(&[])), (None, None));
        assert_eq!(median(&[5.0, f64::NAN, 1.0, 2.0]), Some(2.0));
        assert_eq!((median(&[4.0, 1.0, 2.0, 3.0]), median(&[7.0])), (Some(2.5), Some(7.0)));
        assert!([0, 19, 20, 1_000, 1_000_000].iter().all(|&n| window(n) % 2 == 1 && window(n) <= 1001));
    }

    #[track_caller]
    fn assert_scale(values: &[f64], from_zero: bool, ticks: &[f64], logarithmic: bool) {
        let scale = Scale::around(values.iter().copied(), from_zero);
        assert_eq!(scale.logarithmic, logarithmic);
        let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-9 * b.abs().max(1e-300);
        assert!(scale.ticks.len() == ticks.len() && scale.ticks.iter().zip(ticks).all(close), "{scale:?}");
        let places: Vec<f64> = values.iter().filter(|x| drawable(**x)).map(|&x| scale.place(x)).collect();
        assert!(places.iter().all(|p| (0.0..=1.0).contains(p)), "{places:?}");
    }

    #[test]
    fn ticks_are_round_and_around_the_values() {
        assert_scale(&[1.03, 2.4], false, &[1.0, 1.5, 2.0, 2.5], false);
        assert_scale(&[3.0, 97.0], true, &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0], false);
        assert_scale(&[0.0, 2e-4], true, &[0.0, 5e-5, 1e-4, 1.5e-4, 2e-4], false);
        assert_scale(&[0.02, 30.0, f64::NAN], false, &[0.01, 0.1, 1.0, 10.0, 100.0], true);
        assert_scale(&[f64::INFINITY, f64::NAN], false, &[0.0, 0.25, 0.5, 0.75, 1.0], false);
        assert_scale(&[2.0], false, &[1.8, 1.9, 2.0, 2.1, 2.2], false);
    }

    #[test]
    fn extremes_have_scales_too() {
        for values in [[0.0, 0.0], [-3.4e38, 3.4e38], [1e-38, 3.4e38], [1e-45, 1e38], [1e-300, 2e-300], [1e38, 1e38]] {
            for from_zero in [false, true] {
                let scale = Scale::around(values.into_iter(), from_zero);
                assert!((2..=12).contains(&scale.ticks.len()), "{values:?}: {scale:?}");
                assert!(values.iter().all(|&x| (0.0..=1.0).contains(&scale.place(x))), "{values:?}: {scale:?}");
            }
        }
        for (first, last) in [(0, 0), (1, 1), (1, 2), (1, 100_000), (99_999, 100_001), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            let scale = Scale::steps(first, last);
            assert!((1..=7).contains(&scale.ticks.len()), "{first} {last}: {scale:?}");
            assert!(scale.ticks.iter().all(|x| x.fract() == 0.0));
        }
    }
}
