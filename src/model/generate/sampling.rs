//! Chooses the next token from the model's logits, by the rules of transformers' logits processors.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use thiserror::Error;

use crate::ops::SampleRules;
use crate::random::{Generator, Stream};

/// The reason why no token can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// The temperature is negative or not finite.
    #[error("the temperature must be 0 (always the likeliest token) or a number above 0, and is {found}")]
    Temperature {
        /// Requested value.
        found: f64,
    },
    /// Top-p is outside 0..=1.
    #[error("top-p must be a number from 0 to 1, and is {found}")]
    TopP {
        /// Requested value.
        found: f64,
    },
    /// Min-p is outside 0..=1.
    #[error("min-p must be a number from 0 to 1, and is {found}")]
    MinP {
        /// Requested value.
        found: f64,
    },
    /// A logit is infinite or NaN.
    #[error("the model gave token {token} the score {found}: the weights or the adapter are damaged")]
    Logit {
        /// The token.
        token: u32,
        /// Its logit.
        found: f32,
    },
    /// All logits are negative infinity.
    #[error("the model gave no token a chance")]
    NoToken,
}

/// Options of the choice. The order is that of transformers: temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerOptions {
    /// The divisor of the logits. At 0, the likeliest token is always chosen and the other options
    /// are ignored.
    pub temperature: f64,
    /// Keeps the tokens with a logit of at least the `top_k`th largest. 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of the likeliest tokens with at least this total probability, at
    /// least one token. 1 keeps all.
    pub top_p: f64,
    /// Keeps the tokens with at least this share of the probability of the likeliest token. 0 keeps
    /// all.
    pub min_p: f64,
    /// The seed of the draws.
    pub seed: u64,
}

impl SamplerOptions {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 };
}

/// Chooses tokens. Among equally likely tokens, the lowest id comes first.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    generator: Generator,
}

/// A token that may be chosen. The maximum is the likeliest.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Finite.
    logit: f32,
    token: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // Zeros of either sign are equally likely.
        let by_logit = self.logit.partial_cmp(&other.logit).unwrap_or(Ordering::Equal);
        by_logit.then_with(|| Reverse(self.token).cmp(&Reverse(other.token)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl Sampler {
    /// A sampler at the start of the random stream of its seed.
    ///
    /// # Errors
    /// [`SamplingError::Temperature`], [`SamplingError::TopP`], [`SamplingError::MinP`].
    pub fn new(options: SamplerOptions) -> Result<Self, SamplingError> {
        let SamplerOptions { temperature, top_p, min_p, seed, .. } = options;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(SamplingError::Temperature { found: temperature });
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(SamplingError::TopP { found: top_p });
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(SamplingError::MinP { found: min_p });
        }
        Ok(Self { options, generator: Generator::new(seed, Stream::Sampling) })
    }

    /// Chooses the next token. `logits[i]` is the logit of token `i`. Negative infinity excludes a
    /// token.
    ///
    /// # Errors
    /// [`SamplingError::Logit`], [`SamplingError::NoToken`].
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SamplingError> {
        // A choice that fails takes no random number.
        let before = self.clone();
        let draw = self.draw();
        self.choose(logits, draw).inspect_err(|_| *self = before)
    }

    /// The random number of the next choice, uniform in [0, 1). Greedy choices take none.
    pub(super) fn draw(&mut self) -> f32 {
        if self.options.temperature == 0.0 { 0.0 } else { self.generator.uniform() }
    }

    /// The rules of a choice with this random number, for the device.
    pub(super) fn rules(&self, draw: f32) -> SampleRules {
        let SamplerOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        SampleRules { temperature, top_k, top_p, min_p, draw }
    }

    /// Chooses the next token with the random number `draw`.
    pub(super) fn choose(&self, logits: &[f32], draw: f32) -> Result<u32, SamplingError> {
        let candidates = candidates(logits)?;
        let likeliest = *candidates.iter().max().ok_or(SamplingError::NoToken)?;
        if self.options.temperature == 0.0 {
            return Ok(likeliest.token);
        }
        let left = self.filtered(candidates, likeliest);
        let weight = |candidate: &Candidate| self.weight(*candidate, likeliest);
        let mut rest = f64::from(draw) * left.iter().map(weight).sum::<f64>();
        let chosen = left.iter().find(|candidate| {
            rest -= weight(candidate);
            rest < 0.0
        });
        // Rounding may leave a positive rest after the last candidate.
        Ok(chosen.or(left.last()).map_or(likeliest.token, |chosen| chosen.token))
    }

    /// The probability of a token divided by the probability of the likeliest token.
    fn weight(&self, candidate: Candidate, likeliest: Candidate) -> f64 {
        ((f64::from(candidate.logit) - f64::from(likeliest.logit)) / self.options.temperature).exp()
    }

    /// The candidates after top-k, top-p and min-p, at least one.
    fn filtered(&self, candidates: Vec<Candidate>, likeliest: Candidate) -> Vec<Candidate> {
        let SamplerOptions { top_k, top_p, min_p, .. } = self.options;
        let top_k = if top_k == 0 { usize::MAX } else { top_k as usize };
        if top_k >= candidates.len() && top_p == 1.0 && min_p == 0.0 {
            return candidates;
        }
        let mut heap = BinaryHeap::from(candidates);
        let mut left = Vec::new();
        if top_k < heap.len() {
            // Tokens equal to the `top_k`th are kept, as TopKLogitsWarper keeps them.
            while let Some(next) = heap.pop() {
                if left.len() >= top_k && left.last().is_some_and(|last: &Candidate| next.logit < last.logit) {
                    break;
                }
                left.push(next);
            }
            heap = BinaryHeap::from(left);
        }
        let total: f64 = heap.iter().map(|&candidate| self.weight(candidate, likeliest)).sum();
        // TopPLogitsWarper drops the least likely tokens while their total is at most 1 - top_p. So
        // it keeps the smallest set of the likeliest tokens with a total of at least top_p.
        let mut share = 0.0;
        let mut left = Vec::new();
        while let Some(next) = heap.pop().filter(|_| left.is_empty() || top_p == 1.0 || share < top_p * total) {
            let weight = self.weight(next, likeliest);
            // MinPLogitsWarper compares probabilities, which have the same ratio.
            if weight < min_p {
                break;
            }
            share += weight;
            left.push(next);
        }
        left
    }
}

/// The tokens that are not excluded.
fn candidates(logits: &[f32]) -> Result<Vec<Candidate>, SamplingError> {
    let mut candidates = Vec::with_capacity(logits.len());
    for (token, &logit) in (0_u32..).zip(logits) {
        if logit.is_finite() {
            candidates.push(Candidate { logit, token });
        } else if logit != f32::NEG_INFINITY {
            return Err(SamplingError::Logit { token, found: logit });
        }
    }
    Ok(candidates)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::*;

    const PLAIN: SamplerOptions = SamplerOptions { temperature: 1.0, ..SamplerOptions::GREEDY };

    /// The tokens that can be chosen, in order.
    fn left(options: SamplerOptions, logits: &[f32]) -> Vec<u32> {
        let sampler = Sampler::new(options).unwrap();
        let candidates = candidates(logits).unwrap();
        let likeliest = *candidates.iter().max().unwrap();
        let mut left: Vec<u32> = sampler.filtered(candidates, likeliest).iter().map(|c| c.token).collect();
        left.sort_unstable();
        left
    }

    /// Counts of each token in `draws` choices.
    fn counts(options: SamplerOptions, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits).unwrap() as usize] += 1;
        }
        counts
    }

    /// Five standard deviations of a binomial distribution.
    #[track_caller]
    fn assert_frequencies(counts: &[usize], probabilities: &[f64]) {
        let draws = counts.iter().sum::<usize>() as f64;
        for (token, (&count, p)) in counts.iter().zip(probabilities).enumerate() {
            let bound = 5.0 * (draws * p * (1.0 - p)).sqrt();
            assert!((count as f64 - draws * p).abs() <= bound, "token {token}: {count} of {draws}, expected a share of {p}");
        }
    }

    #[test]
    fn without_a_temperature_it_is_the_likeliest_and_of_equals_the_first() {
        let mut sampler = Sampler::new(SamplerOptions { top_k: 3, top_p: 0.1, ..SamplerOptions::GREEDY }).unwrap();
        assert_eq!(sampler.sample(&[1.0, 3.0, 2.0]), Ok(1));
        assert_eq!(sampler.sample(&[-1.0, 3.0, 3.0, 0.0]), Ok(1));
        assert_eq!(sampler.sample(&[-0.0, 0.0]), Ok(0));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -1e30]), Ok(1));
    }

    #[test]
    fn frequencies_are_the_softmax_at_the_temperature() {
        let logits = [0.5_f32, -1.0, 2.0, f32::NEG_INFINITY, 0.0];
        for temperature in [0.5, 1.0, 3.0] {
            let weights: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let counts = counts(SamplerOptions { temperature, ..PLAIN }, &logits, 20_000);
            assert_eq!(counts[3], 0);
            assert_frequencies(&counts, &weights.iter().map(|w| w / total).collect::<Vec<_>>());
        }
    }

    /// The examples of probabilities in TopKLogitsWarper and TopPLogitsWarper: what is dropped is
    /// scores below the kth, and the run of the least likely with a share of at most 1 - p.
    #[test]
    fn top_k_keeps_the_equals_of_the_last() {
        let logits = [1.0, 3.0, 2.0, 2.0, 0.0];
        let top = |top_k| left(SamplerOptions { top_k, ..PLAIN }, &logits);
        assert_eq!(top(1), [1]);
        assert_eq!(top(2), [1, 2, 3]);
        assert_eq!(top(3), [1, 2, 3]);
        assert_eq!(top(4), [0, 1, 2, 3]);
        for all in [0, 5, 6, u32::MAX] {
            assert_eq!(top(all), [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_the_share() {
        let logits = [0.125_f32, 0.5, 0.25, 0.125].map(f32::ln);
        let top = |top_p| left(SamplerOptions { top_p, ..PLAIN }, &logits);
        assert_eq!(top(0.0), [1]);
        assert_eq!(top(0.49), [1]);
        assert_eq!(top(0.51), [1, 2]);
        assert_eq!(top(0.74), [1, 2]);
        // The first of equal tokens.
        assert_eq!(top(0.76), [0, 1, 2]);
        assert_eq!(top(0.88), [0, 1, 2, 3]);
        assert_eq!(top(1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn the_temperature_comes_first_and_top_p_counts_what_top_k_left() {
        let logits = [0.4_f32, 0.3, 0.2, 0.1].map(f32::ln);
        // Of the first two, the first has 4 sevenths.
        assert_eq!(left(SamplerOptions { top_k: 2, top_p: 0.55, ..PLAIN }, &logits), [0]);
        assert_eq!(left(SamplerOptions { top_k: 2, top_p: 0.6, ..PLAIN }, &logits), [0, 1]);
        assert_eq!(left(SamplerOptions { top_p: 0.55, ..PLAIN }, &logits), [0, 1]);
        // Squared: 16, 9, 4, 1 of 30.
        assert_eq!(left(SamplerOptions { temperature: 0.5, top_p: 0.52, ..PLAIN }, &logits), [0]);
        let options = SamplerOptions { temperature: 0.5, top_k: 3, top_p: 0.9, ..PLAIN };
        assert_frequencies(&counts(options, &logits, 20_000), &[16.0 / 29.0, 9.0 / 29.0, 4.0 / 29.0, 0.0]);
    }

    #[test]
    fn min_p_keeps_a_share_of_the_likeliest() {
        let logits = [0.1_f32, 0.4, 0.2, 0.2, 0.1].map(f32::ln);
        let min = |min_p| left(SamplerOptions { min_p, ..PLAIN }, &logits);
        assert_eq!(min(0.0), [0, 1, 2, 3, 4]);
        assert_eq!(min(0.24), [0, 1, 2, 3, 4]);
        // Equal tokens are kept or dropped together.
        assert_eq!(min(0.26), [1, 2, 3]);
        assert_eq!(min(0.49), [1, 2, 3]);
        assert_eq!(min(0.51), [1]);
        assert_eq!(min(1.0), [1]);
        assert_eq!(left(SamplerOptions { min_p: 1.0, ..PLAIN }, &[2.0, 0.0, 2.0]), [0, 2]);
        // At half the temperature: 1, 16, 4, 4, 1.
        assert_eq!(left(SamplerOptions { temperature: 0.5, min_p: 0.26, ..PLAIN }, &logits), [1]);
        // Top-p counts the tokens that min-p drops: 0.4 is less than half of all.
        assert_eq!(left(SamplerOptions { top_p: 0.5, min_p: 0.3, ..PLAIN }, &logits), [1, 2]);
        assert_eq!(left(SamplerOptions { top_p: 0.9, min_p: 0.6, ..PLAIN }, &logits), [1]);
        assert_eq!(left(SamplerOptions { top_k: 2, min_p: 0.2, ..PLAIN }, &logits), [1, 2, 3]);
        assert_frequencies(&counts(SamplerOptions { min_p: 0.3, ..PLAIN }, &logits, 20_000), &[0.0, 0.5, 0.25, 0.25, 0.0]);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let drawn = |seed| {
            let mut sampler = Sampler::new(SamplerOptions { seed, ..PLAIN }).unwrap();
            (0..40).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(drawn(3), drawn(3));
        assert_ne!(drawn(3), drawn(4));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for temperature in [-0.1, f64::NAN, f64::INFINITY] {
            let refused = Sampler::new(SamplerOptions { temperature, ..PLAIN }).unwrap_err();
            assert!(matches!(refused, SamplingError::Temperature { .. }), "{temperature}");
        }
        for top_p in [-0.1, 1.1, f64::NAN] {
            let refused = Sampler::new(SamplerOptions { top_p, ..PLAIN }).unwrap_err();
            assert!(matches!(refused, SamplingError::TopP { .. }), "{top_p}");
        }
        for min_p in [-0.1, 1.1, f64::NAN] {
            let refused = Sampler::new(SamplerOptions { min_p, ..PLAIN }).unwrap_err();
            assert!(matches!(refused, SamplingError::MinP { .. }), "{min_p}");
        }
        let mut sampler = Sampler::new(PLAIN).unwrap();
        assert_eq!(sampler.sample(&[]), Err(SamplingError::NoToken));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY]), Err(SamplingError::NoToken));
        assert!(matches!(sampler.sample(&[0.0, f32::NAN]), Err(SamplingError::Logit { token: 1, .. })));
        assert!(matches!(sampler.sample(&[f32::INFINITY]), Err(SamplingError::Logit { token: 0, .. })));
    }
}
