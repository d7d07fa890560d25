//! Nested ("double") quantisation of scales, as bitsandbytes does it on the CPU: 8 bits a scale into a fixed map, one float32
//! for [`SUPER_BLOCK`] scales, one offset for the tensor.

use super::Encoder;
use crate::format::nf4::{SUPER_BLOCK, Scales};

/// bitsandbytes' `create_dynamic_map(signed=True, total_bits=8)`, in ascending order: seven decades, each cut linearly, the
/// largest into 64, so that a value's relative precision falls slowly with its size.
///
/// torch computes it in float32 with `linspace`, whose products and sums are fused; in float64, rounded once, they come out the same.
pub const DYNAMIC_MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    // Index 127 is 0.0, index 255 is 1.0; decade `d` has 2^d values on either side, the smallest next to zero.
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
/// Scales that a search has chosen are rarely near zero, so the dynamic map would spend half of its entries where there are none.
/// Measured on two models with blocks of 64: 0.2 % more squared error than float32 scales have, instead of 0.5 %.
pub const LINEAR_MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        map[i] = (2 * i as i32 - 255) as f32 / 255.0;
        i += 1;
    }
    map
};

/// The payload of a `dq8` scales section ([`Scales::Dq8`]) for finite `scales`, one per block, as
/// [`choose_scales`](super::choose_scales) gives them: little-endian offset, map, super-scales, then one byte a scale.
/// Every scale that it decodes to is finite.
///
/// The scales of [`Encoder::Absmax`] get what bitsandbytes gives them: their mean as offset (its sum may differ in the last bit) and
/// [`DYNAMIC_MAP`]. Those of [`Encoder::Mse`] have both signs and a mean near zero: they get offset 0 and [`LINEAR_MAP`].
pub fn nest(scales: &[f32], encoder: Encoder) -> Vec<u8> {
    let (offset, map) = match encoder {
        Encoder::Absmax => (mean(scales), &DYNAMIC_MAP),
        Encoder::Mse => (0.0, &LINEAR_MAP),
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
            nearest(map, if encoder == Encoder::Absmax { to_grid(unit) } else { unit })
        }));
        // Adding the offset back may round past the largest float32, by half of its last place.
        let finite = (largest + offset).is_finite();
        payload.extend(if finite { largest } else { largest.next_down() }.to_le_bytes());
    }
    payload.extend(codes);
    payload
}

fn mean(scales: &[f32]) -> f32 {
    let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
    (sum / scales.len().max(1) as f64) as f32
}

/// `value / largest`, by a reciprocal where there is one, as bitsandbytes does it; -1 (index 0) where every value is zero.
fn to_unit(value: f32, largest: f32) -> f32 {
    if largest == 0.0 {
        -1.0
    } else if largest < f32::MIN_POSITIVE {
        value / largest
    } else {
        value * (1.0 / largest)
    }
}

/// bitsandbytes rounds to 65536 steps before it looks for the nearest entry, so that it does not always find the nearest one to the
/// value itself: 0.15 % of scales differ by an index, and the seven indices around zero never occur.
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
        ) {
            let scales: Vec<f32> = scales.iter().map(|s| (s * power).clamp(f32::MIN, f32::MAX)).collect();
            let scales: Vec<f32> = if signed { scales } else { scales.iter().map(|s| s.abs()).collect() };
            let encoder = if signed { Encoder::Mse } else { Encoder::Absmax };
            let payload = nest(&scales, encoder);
            let largest = scales.iter().fold(0.0_f32, |largest, s| largest.max(s.abs()));
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
            assert!(read(&nest(&scales, Encoder::Absmax), 3).iter().all(|scale| scale.is_finite()), "{small}");
        }
    }

    #[test]
    fn no_scales_are_an_empty_table() {
        for encoder in [Encoder::Absmax, Encoder::Mse] {
            assert_eq!(nest(&[], encoder).len(), Scales::DQ8_FIXED_LEN);
        }
    }
}
