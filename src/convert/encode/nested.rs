//! Nested ("double") quantisation of scales, as bitsandbytes does it on the CPU: 8 bits a scale
//! into a fixed map, one float32 for [`SUPER_BLOCK`] scales, one offset for the tensor.

use crate::format::nf4::{SUPER_BLOCK, Scales};

/// bitsandbytes' `create_dynamic_map(signed=True, total_bits=8)`, in ascending order: seven
/// decades, each cut linearly, the largest into 64, so that a value's relative precision falls
/// slowly with its size.
///
/// torch computes it in float32 with `linspace`, whose products and sums are fused; in float64,
/// rounded once, they come out the same.
pub const DYNAMIC_MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    // Index 127 is 0.0, index 255 is 1.0; decade `d` has 2^d values on either side, the smallest
    // next to zero.
    map[255] = 1.0;
    let powers = [1e-6_f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let (mut decade, mut next) = (0, 1);
    while decade < 7 {
        let steps = 1 << decade;
        let mut i = 0;
        while i < steps {
            let mean = (linspace(i, steps) + linspace(i + 1, steps)) / 2.0;
            map[127 + next] = powers[decade] * mean;
            map[127 - next] = -map[127 + next];
            next += 1;
            i += 1;
        }
        decade += 1;
    }
    map
};

/// Point `i` of the `steps + 1` that cut 0.1..=1 evenly, from the nearer end as torch does it.
const fn linspace(i: usize, steps: usize) -> f32 {
    let step = (1.0 - 0.1_f32) / steps as f32;
    if i < steps.div_ceil(2) {
        (0.1_f32 as f64 + step as f64 * i as f64) as f32
    } else {
        (1.0 - step as f64 * (steps - i) as f64) as f32
    }
}

/// The map for scales of both signs: 256 even steps from -1 to 1.
///
/// Scales that a search has chosen are rarely near zero, so the dynamic map would spend half of its
/// entries where there are none. Measured on two models with blocks of 64: 0.2 % more squared error
/// than float32 scales have, instead of 0.5 %.
pub const LINEAR_MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        map[i] = (2 * i as i32 - 255) as f32 / 255.0;
        i += 1;
    }
    map
};

/// The steps of the maps for scales that differ much: near the largest scale they are as even as
/// [`LINEAR_MAP`] (by [`EVEN_STEP`]), below that each entry is the one above it divided by the
/// ratio. A larger ratio reaches further down: from a 28th of the largest scale to an 87,000th.
const RATIOS: [f64; 6] = [1.03, 1.05, 1.07, 1.10, 1.13, 1.16];

/// The distance of two entries near the largest scale: no more than the dynamic map has there.
const EVEN_STEP: f64 = 0.0135;

/// One of the maps for scales that differ much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grade(usize);

impl Grade {
    /// The grade that costs `scales` the least precision, counted relative to each of them.
    pub fn of(scales: &[f32]) -> Self {
        let cost = |grade: &Self| -> f64 {
            let map = grade.map();
            scales.chunks(SUPER_BLOCK).map(|block| relative_cost(block, &map)).sum()
        };
        let costs = (0..RATIOS.len()).map(|grade| (cost(&Self(grade)), grade));
        // The first of equal ones.
        let best = costs.reduce(|best, next| if next.0 < best.0 { next } else { best });
        Self(best.map_or(0, |(_, grade)| grade))
    }

    /// Its entries; symmetric, without a zero.
    fn map(self) -> [f32; 256] {
        let ratio = RATIOS[self.0.min(RATIOS.len() - 1)];
        let (mut map, mut value) = ([0.0; 256], 1.0_f64);
        for i in 0..128 {
            map[255 - i] = value as f32;
            map[i] = -(value as f32);
            value = (value - EVEN_STEP).max(value / ratio);
        }
        map
    }
}

/// The sum of squared errors of scales of one super-block, each relative to the scale, and none
/// above 1.
fn relative_cost(scales: &[f32], map: &[f32; 256]) -> f64 {
    let largest = largest_magnitude(scales);
    let cost = |&scale: &f32| {
        let stored = map[usize::from(nearest(map, to_unit(scale, largest)))] * largest;
        let error = f64::from(stored - scale) / f64::from(scale);
        (error * error).min(1.0)
    };
    scales.iter().filter(|&&scale| scale != 0.0).map(cost).sum()
}

fn largest_magnitude(scales: &[f32]) -> f32 {
    scales.iter().fold(0.0, |largest, scale| scale.abs().max(largest))
}

/// How a table of scales becomes 8 bits a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nesting {
    /// As bitsandbytes does it: the mean as offset (its sum may differ in the last bit),
    /// [`DYNAMIC_MAP`].
    Bitsandbytes,
    /// Offset 0 and [`LINEAR_MAP`]: for scales of both signs and similar magnitude.
    Linear,
    /// Offset 0 and a map for scales of both signs that differ much, as they do next to an outlier.
    Graded(Grade),
}

/// The payload of a `dq8` scales section ([`Scales::Dq8`]) for finite `scales`, one per block, as
/// [`choose_scales`](super::choose_scales) gives them: little-endian offset, map, super-scales,
/// then one byte a scale. Every scale that it decodes to is finite.
pub fn nest(scales: &[f32], nesting: Nesting) -> Vec<u8> {
    let (offset, map) = match nesting {
        Nesting::Bitsandbytes => (mean(scales), DYNAMIC_MAP),
        Nesting::Linear => (0.0, LINEAR_MAP),
        Nesting::Graded(grade) => (0.0, grade.map()),
    };
    let super_blocks = scales.len().div_ceil(SUPER_BLOCK);
    let mut payload = Vec::with_capacity(Scales::DQ8_FIXED_LEN + 4 * super_blocks + scales.len());
    payload.extend(offset.to_le_bytes());
    payload.extend(map.iter().flat_map(|value| value.to_le_bytes()));
    let mut codes = Vec::with_capacity(scales.len());
    for block in scales.chunks(SUPER_BLOCK) {
        let largest = block.iter().fold(0.0_f32, |largest, scale| largest.max((scale - offset).abs()));
        codes.extend(block.iter().map(|scale| {
            let unit = to_unit(scale - offset, largest);
            nearest(&map, if nesting == Nesting::Bitsandbytes { to_grid(unit) } else { unit })
        }));
        // Adding the offset back may round past the largest float32, by half of its last place.
        let finite = (largest + offset).is_finite();
        payload.extend(if finite { largest } else { largest.next_down() }.to_le_bytes());
    }
    payload.extend(codes);
    payload
}

/// What a block has to spare: how much better its scale of [`Encoder::Mse`](super::Encoder::Mse) is
/// than absmax.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Margin {
    /// The sum of the squares of its weights.
    pub sum_sq: f32,
    /// The squared error that absmax would add to the error of the chosen scale, per squared
    /// weight.
    pub gain: f32,
}

/// How many times the estimated cost of rounding the margins must cover: it is an estimate, and
/// bitsandbytes may be lucky.
const SAFETY: f64 = 2.0;

/// Whether [`LINEAR_MAP`] costs the blocks of a super-block less than they have to spare against
/// absmax, so that they stay better than with bitsandbytes' rule. It must hold for the sum of all
/// squared errors, and for the sum of those relative to each block, and without the gains of the
/// [`OUTLIERS`] blocks that gain most: so no block can hide its neighbours.
///
/// A scale that is off by d adds about (d / scale)^2 of the block's squared weights to its error.
pub fn linear_suffices(scales: &[f32], margins: &[Margin]) -> bool {
    let largest = largest_magnitude(scales);
    if largest == 0.0 {
        return true;
    }
    let (mut cost, mut weighted_cost, mut gain, mut weighted_gain) = (0.0_f64, 0.0_f64, Gain::default(), Gain::default());
    for (&scale, margin) in scales.iter().zip(margins) {
        let place = (scale / largest + 1.0) * 127.5;
        let error = (place - (place + 0.5).trunc()) * (largest / 127.5);
        let relative = if scale == 0.0 { 0.0 } else { f64::from(error / scale) };
        let sum_sq = f64::from(margin.sum_sq);
        cost += relative * relative;
        weighted_cost += relative * relative * sum_sq;
        gain.add(f64::from(margin.gain));
        weighted_gain.add(f64::from(margin.gain) * sum_sq);
    }
    // Sums that overflow decide nothing.
    let covered = |cost: f64, gain: f64| gain.is_finite() && SAFETY * cost <= gain;
    covered(cost, gain.without_largest()) && covered(weighted_cost, weighted_gain.without_largest())
}

/// Blocks of a super-block whose gains do not count: outliers gain more than their neighbours can
/// lose.
pub const OUTLIERS: usize = 4;

/// A sum, and the largest of what was added.
#[derive(Default)]
struct Gain {
    sum: f64,
    /// In descending order.
    largest: [f64; OUTLIERS],
}

impl Gain {
    fn add(&mut self, gain: f64) {
        self.sum += gain;
        let mut next = gain;
        for slot in &mut self.largest {
            if next > *slot {
                std::mem::swap(slot, &mut next);
            }
        }
    }

    fn without_largest(&self) -> f64 {
        self.sum - self.largest.iter().sum::<f64>()
    }
}

fn mean(scales: &[f32]) -> f32 {
    let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
    (sum / scales.len().max(1) as f64) as f32
}

/// `value / largest`, by a reciprocal where there is one, as bitsandbytes does it; -1 (index 0)
/// where every value is zero.
fn to_unit(value: f32, largest: f32) -> f32 {
    if largest == 0.0 {
        -1.0
    } else if largest < f32::MIN_POSITIVE {
        value / largest
    } else {
        value * (1.0 / largest)
    }
}

/// bitsandbytes rounds to 65536 steps before it looks for the nearest entry, so that it does not
/// always find the nearest one to the value itself: 0.15 % of scales differ by an index, and the
/// seven indices around zero never occur.
fn to_grid(unit: f32) -> f32 {
    let step = ((unit + 1.0) * 32767.5 + 0.5).trunc();
    step / 32767.5 - 1.0
}

/// The index of the entry nearest to `value`; the lower of two.
fn nearest(map: &[f32; 256], value: f32) -> u8 {
    let above = map.partition_point(|&entry| entry < value).min(255);
    let below = above.saturating_sub(1);
    let index = if value - map[below] <= map[above] - value { below } else { above };
    index as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::nf4::ScaleType;
    use proptest::prelude::*;

    fn read(payload: &[u8], scales: usize) -> Vec<f32> {
        let table = Scales::from_payload(payload, ScaleType::Dq8, scales).unwrap();
        (0..scales).map(|i| table.get(i)).collect()
    }

    proptest! {
        #[test]
        fn nested_scales_are_finite_and_near(
            scales in prop::collection::vec(prop_oneof![0.01_f32..0.1, -0.1_f32..-0.01], 0..600),
            power in prop_oneof![Just(1.0_f32), Just(3e38_f32), Just(1e-36), Just(1e-42), Just(0.0)],
            signed in any::<bool>(),
            graded in any::<bool>(),
        ) {
            let scales: Vec<f32> = scales.iter().map(|s| (s * power).clamp(f32::MIN, f32::MAX)).collect();
            let scales: Vec<f32> = if signed { scales } else { scales.iter().map(|s| s.abs()).collect() };
            let nesting = match signed {
                true if graded => Nesting::Graded(Grade::of(&scales)),
                true => Nesting::Linear,
                false => Nesting::Bitsandbytes,
            };
            let payload = nest(&scales, nesting);
            let largest = largest_magnitude(&scales);
            for (nested, scale) in read(&payload, scales.len()).into_iter().zip(&scales) {
                prop_assert!(nested.is_finite());
                prop_assert!((nested - scale).abs() <= 0.008 * largest + 1e-44, "{} for {}", nested, scale);
            }
        }
    }

    #[test]
    fn the_offset_does_not_push_the_largest_scale_to_infinity() {
        for small in [0.0, 1e30, 3e37, f32::MAX / 3.0, f32::MAX.next_down(), f32::MAX] {
            let scales = [f32::MAX, small, small];
            assert!(read(&nest(&scales, Nesting::Bitsandbytes), 3).iter().all(|scale| scale.is_finite()), "{small}");
        }
    }

    #[test]
    fn no_scales_are_an_empty_table() {
        for nesting in [Nesting::Bitsandbytes, Nesting::Linear, Nesting::Graded(Grade::of(&[]))] {
            assert_eq!(nest(&[], nesting).len(), Scales::DQ8_FIXED_LEN);
        }
    }

    #[test]
    fn graded_maps_are_ascending_and_no_coarser_than_the_dynamic_one() {
        let widest = |map: &[f32]| map.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
        for grade in 0..RATIOS.len() {
            let map = Grade(grade).map();
            assert!(map.is_sorted() && map.windows(2).all(|pair| pair[0] < pair[1]), "{map:?}");
            assert!(map.iter().zip(map.iter().rev()).all(|(a, b)| a == &-b), "{map:?}");
            // Around zero there is no entry: weights of such a block have code 7 at any scale.
            assert!(widest(&map[..128]) <= widest(&DYNAMIC_MAP), "{grade}");
            assert_eq!(map[255], 1.0);
        }
    }

    #[test]
    fn the_grade_fits_the_range_of_the_scales() {
        // 255 similar scales, and one that is larger by this factor.
        let grade = |outlier: f32| {
            let scales: Vec<f32> = (0..255).map(|i| 0.8 + i as f32 * 0.001).chain([outlier]).collect();
            let cost = relative_cost(&scales, &Grade::of(&scales).map()) / 255.0;
            (Grade::of(&scales).0, cost)
        };
        let found = [1.0, 20.0, 100.0, 400.0, 2_000.0, 12_000.0, 60_000.0].map(grade);
        assert!(found.is_sorted_by_key(|(grade, _)| *grade), "{found:?}");
        assert!(found.iter().all(|&(_, cost)| cost < 0.0025), "{found:?}");
        // Of the 0.0015 that the search gains on normal weights, the first outliers take a third at
        // most.
        assert!(found[..4].iter().all(|&(_, cost)| cost < 0.0005), "{found:?}");
    }

    #[test]
    fn the_linear_map_suffices_until_an_outlier_takes_what_blocks_have_to_spare() {
        let normal = Margin { sum_sq: 64.0, gain: 0.0015 };
        let with = |outlier: f32, margin: Margin| {
            let scales: Vec<f32> = (0..255).map(|i| 0.8 + i as f32 * 0.001).chain([outlier]).collect();
            let margins = [[normal; 255].as_slice(), &[margin]].concat();
            linear_suffices(&scales, &margins)
        };
        let large = |outlier: f32| Margin { sum_sq: outlier * outlier, gain: 0.0 };
        assert!(with(1.0, normal) && with(4.0, large(4.0)));
        for outlier in [50.0, 1e3, 1e5] {
            assert!(!with(outlier, large(outlier)), "{outlier}");
            // A block of large weights with much to spare hides nothing.
            assert!(!with(outlier, Margin { sum_sq: outlier * outlier, gain: 0.01 }), "{outlier}");
        }
        assert!(linear_suffices(&[0.0; 3], &[Margin::default(); 3]));
        let infinite = Margin { sum_sq: f32::INFINITY, gain: 0.1 };
        assert!(!linear_suffices(&[1.0, 0.7], &[infinite; 2]));
    }
}
