//! Random numbers that depend on nothing but a seed and on what they are for.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What random numbers are for. Each use has a stream of its own, so that none depends on how many
/// another one drew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The initial A matrix of the `module`th projection of a layer.
    Init {
        /// The layer.
        layer: u32,
        /// Index in [`TARGETS`](crate::lora::config::TARGETS).
        module: u32,
    },
    /// The order of the samples in an epoch.
    Order {
        /// The epoch, from 0.
        epoch: u32,
    },
    /// The choice of samples that are held out.
    Split,
    /// The choice of the next token of a text.
    Sampling,
}

impl Stream {
    fn number(self) -> u64 {
        let number = |kind: u64, high: u32, low: u32| kind << 56 | u64::from(high) << 24 | u64::from(low);
        match self {
            Self::Init { layer, module } => number(1, layer, module),
            Self::Order { epoch } => number(2, epoch, 0),
            Self::Split => number(3, 0, 0),
            Self::Sampling => number(4, 0, 0),
        }
    }
}

/// ChaCha with 8 rounds: its key is the seed, its nonce the stream.
#[derive(Debug, Clone)]
pub struct Generator(ChaCha8Rng);

impl Generator {
    /// The generator of a seed's stream, at its start.
    pub fn new(seed: u64, stream: Stream) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut generator = ChaCha8Rng::from_seed(key);
        generator.set_stream(stream.number());
        Self(generator)
    }

    /// Uniform in [0, 1), a multiple of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1_u32 << 24) as f32
    }

    /// Uniform in [0, `bound`); 0 where `bound` is 0. Its bias is below 2^-32 for fewer than 2^32
    /// choices.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.0.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Brings `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(self.below(last + 1), last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_fixed() {
        let drawn = |seed, stream| {
            let mut generator = Generator::new(seed, stream);
            (generator.uniform() * (1_u32 << 24) as f32, generator.below(1_000_000_000))
        };
        // A value that changes breaks every `--resume` and every published run.
        assert_eq!(drawn(0, Stream::Init { layer: 0, module: 0 }), (8_171_765.0, 941_038_282));
        assert_eq!(drawn(1, Stream::Init { layer: 35, module: 6 }), (4_830_118.0, 360_810_241));
        assert_eq!(drawn(1, Stream::Order { epoch: 0 }), (14_057_490.0, 263_939_494));
        assert_eq!(drawn(u64::MAX, Stream::Order { epoch: 3 }), (7_442_216.0, 816_410_805));
        assert_eq!(drawn(1, Stream::Split), (4_248_537.0, 634_668_210));
        assert_eq!(drawn(1, Stream::Sampling), (16_186_814.0, 658_773_147));
        let mut items = [0, 1, 2, 3, 4, 5, 6, 7];
        Generator::new(1, Stream::Split).shuffle(&mut items);
        assert_eq!(items, [3, 6, 4, 5, 1, 0, 7, 2]);
    }

    #[test]
    fn streams_differ() {
        let first = |seed, stream| Generator::new(seed, stream).uniform();
        let init = |layer, module| Stream::Init { layer, module };
        let mut seen: Vec<f32> = Vec::new();
        for layer in 0..4 {
            seen.extend((0..7).map(|module| first(1, init(layer, module))));
        }
        seen.extend([first(2, init(0, 0)), first(1, Stream::Order { epoch: 0 }), first(1, Stream::Order { epoch: 1 })]);
        seen.extend([first(1, Stream::Split), first(1, Stream::Sampling)]);
        seen.sort_by(f32::total_cmp);
        seen.dedup();
        assert_eq!(seen.len(), 33);
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval() {
        let mut generator = Generator::new(7, Stream::Split);
        let drawn: Vec<f32> = std::iter::repeat_with(|| generator.uniform()).take(10_000).collect();
        assert!(drawn.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = drawn.iter().sum::<f32>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.015, "{mean}");
    }

    #[test]
    fn a_shuffle_is_a_permutation_and_every_place_is_reached() {
        let mut counts = [[0_u32; 4]; 4];
        for seed in 0..4000 {
            let mut items = [0, 1, 2, 3];
            Generator::new(seed, Stream::Order { epoch: 0 }).shuffle(&mut items);
            items.iter().enumerate().for_each(|(place, &item)| counts[item][place] += 1);
        }
        assert!(counts.iter().flatten().all(|&n| (850..1150).contains(&n)), "{counts:?}");
        Generator::new(0, Stream::Split).shuffle::<u8>(&mut []);
    }
}
