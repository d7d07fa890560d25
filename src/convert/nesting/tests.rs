//! Random tensors with outliers: no block next to them is worse than with bitsandbytes' rule.

use proptest::prelude::*;

use super::super::encode::{self, Weights};
use super::*;
use crate::format::FloatType;

const BLOCK: u32 = 64;

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn weights(bytes: &[u8]) -> Weights<'_> {
    Weights { float_type: FloatType::F32, bytes }
}

/// The table that a conversion takes.
fn table(bytes: &[u8], blocks: usize) -> Vec<u8> {
    let (mut scales, mut margins) = (vec![0.0; blocks], vec![Margin::default(); blocks]);
    encode::choose_scales_with_margins(BLOCK, weights(bytes), &mut scales, &mut margins).unwrap();
    let mut wanted = Wanted::default();
    // In parts, as pieces of a file come.
    for (scales, margins) in scales.chunks(100).zip(margins.chunks(100)) {
        wanted.extend(scales, margins);
    }
    wanted.table(Encoder::Mse).unwrap_or_else(|| {
        let mut absmax = vec![0.0; blocks];
        encode::choose_scales(Encoder::Absmax, BLOCK, weights(bytes), &mut absmax).unwrap();
        let candidates = Candidates::new(&wanted.scales, &absmax);
        let mut trial = Trial::new();
        let all = candidates.scales().map(|table| errors(bytes, &table.unwrap()));
        for from in (0..blocks).step_by(100) {
            trial.add(&all.each_ref().map(|errors| errors[from..blocks.min(from + 100)].to_vec()));
        }
        candidates.choose(trial)
    })
}

fn errors(bytes: &[u8], table: &Scales<'_>) -> Vec<BlockError> {
    let mut scales = vec![0.0; table.len()];
    table.read(0, &mut scales);
    let mut errors = vec![BlockError::default(); scales.len()];
    encode::block_errors(BLOCK, weights(bytes), &scales, &mut errors);
    errors
}

/// The errors of all blocks with the table of a conversion, and with bitsandbytes'.
fn compare(values: &[f32]) -> [Vec<BlockError>; 2] {
    let bytes = bytes_of(values);
    let blocks = values.len().div_ceil(BLOCK as usize);
    let mut absmax = vec![0.0; blocks];
    encode::choose_scales(Encoder::Absmax, BLOCK, weights(&bytes), &mut absmax).unwrap();
    [table(&bytes, blocks), nested::nest(&absmax, Nesting::Bitsandbytes)]
        .map(|table| errors(&bytes, &Scales::from_payload(&table, ScaleType::Dq8, blocks).unwrap()))
}

/// Numbers in 0..1, from a fixed generator.
fn uniform(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    }
}

/// `count` weights: nearly normal, uniform, of heavy tails, or of three values.
fn sample(kind: usize, count: usize, seed: u64) -> Vec<f32> {
    let mut next = uniform(seed);
    (0..count)
        .map(|_| match kind {
            0 => 0.1 * (next() + next() + next() + next() - 2.0),
            1 => 0.2 * (next() - 0.5),
            2 => (next() - 0.5).powi(3),
            _ => 0.05 * (3.0 * next()).floor() - 0.05,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 48 }))]

    #[test]
    fn blocks_next_to_outliers_are_no_worse_than_with_bitsandbytes_rule(
        kind in 0..4_usize,
        count in 10_000..40_000_usize,
        seed: u64,
        outliers in prop::collection::vec((any::<prop::sample::Index>(), 0.0..4.0_f32, any::<bool>()), 1..4),
    ) {
        let mut values = sample(kind, count, seed);
        let mut with_outliers = Vec::new();
        for (at, power, negative) in outliers {
            let at = at.index(count);
            // Times the largest of the others: from 1 to 10,000.
            values[at] = 0.125 * 10_f32.powf(power) * if negative { -1.0 } else { 1.0 };
            with_outliers.push(at / BLOCK as usize);
        }
        let [ours, theirs] = compare(&values);
        let others = |errors: &[BlockError]| -> f64 {
            let others = errors.iter().enumerate().filter(|(block, _)| !with_outliers.contains(block));
            others.map(|(_, error)| error.sum_sq_error).sum()
        };
        prop_assert!(others(&ours) <= others(&theirs) * (1.0 + 1e-12), "{} {}", others(&ours), others(&theirs));
    }

    #[test]
    fn no_super_block_of_any_weights_is_worse_than_with_bitsandbytes_rule(
        powers in prop::collection::vec(-6.0..4.0_f32, 300..700),
        kind in 0..4_usize,
        seed: u64,
    ) {
        let mut values = sample(kind, powers.len() * BLOCK as usize, seed);
        for (block, power) in values.chunks_mut(BLOCK as usize).zip(&powers) {
            block.iter_mut().for_each(|w| *w *= 10_f32.powf(*power));
        }
        let [ours, theirs] = compare(&values);
        for (ours, theirs) in ours.chunks(SUPER_BLOCK).zip(theirs.chunks(SUPER_BLOCK)) {
            let plain = |errors: &[BlockError]| -> f64 { errors.iter().map(|error| error.sum_sq_error).sum() };
            let relative = |errors: &[BlockError]| -> f64 { errors.iter().map(|error| error.relative().powi(2)).sum() };
            prop_assert!(plain(ours) <= plain(theirs) * (1.0 + 1e-12), "{} {}", plain(ours), plain(theirs));
            prop_assert!(relative(ours) <= relative(theirs) * (1.0 + 1e-12), "{} {}", relative(ours), relative(theirs));
        }
    }
}

#[test]
fn weights_without_outliers_keep_the_even_map() {
    for kind in 0..3 {
        let bytes = bytes_of(&sample(kind, 64 * 1024, 5));
        let mut map: Vec<u8> = table(&bytes, 1024)[4..1028].to_vec();
        map.truncate(4 * 256);
        let even: Vec<u8> = nested::LINEAR_MAP.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(map, even, "{kind}");
    }
}

#[test]
fn an_outlier_costs_the_other_blocks_little() {
    let plain = sample(0, 64 * 1024, 9);
    let [without, _] = compare(&plain);
    let others = |errors: &[BlockError]| errors[1..].iter().map(|error| error.sum_sq_error).sum::<f64>();
    for outlier in [1.0, 10.0, 100.0, 1_000.0] {
        let mut values = plain.clone();
        values[10] = outlier;
        let [ours, theirs] = compare(&values);
        let [none, ours, theirs] = [without.as_slice(), &ours, &theirs].map(others);
        println!("{outlier}: {:.3} of the error without it; bitsandbytes {:.3}", ours / none, theirs / none);
        assert!(ours <= 1.2 * none && ours <= theirs, "{outlier}: {ours}, {none} without, bitsandbytes {theirs}");
    }
}
