//! The choice of tokens on the device: logits, and memory for the choices.

use crate::arch::config::ModelConfig;
use crate::gpu::{BufferRange, Commands, Gpu, PendingRead};
use crate::model::generate::sampling::Sampler;
use crate::ops::{Choice, Mat, OpError, Sample, SampleRules, mat_bytes};

/// Chooses tokens on the device.
#[derive(Debug)]
pub(super) struct Chooser {
    sample: Sample,
    /// The logits of the last two passes: a choice that is not certain is made again after the next
    /// pass was submitted.
    logits: [Mat; 2],
    choice: BufferRange,
    /// The chosen token, the input of the next pass.
    token: BufferRange,
}

/// A submitted choice.
#[derive(Debug)]
pub(super) struct Pending {
    pub read: PendingRead,
    pub logits: Mat,
    /// The random number of the choice.
    pub draw: f32,
    /// The sampler before that number.
    pub before: Sampler,
    /// Tokens of the pass.
    pub inputs: usize,
    /// Tokens of the text.
    pub length: u32,
}

impl Chooser {
    /// Memory for the vocabulary of a model.
    pub fn new(gpu: &Gpu, model: &ModelConfig) -> Result<Self, OpError> {
        let logits = || Mat::new(gpu, "logits of the next token", 1, model.vocab);
        let range = |label, size| Ok::<_, OpError>(BufferRange::whole(gpu.storage(label, size)?).slice(0, size));
        Ok(Self {
            sample: Sample::new(gpu, model.vocab)?,
            logits: [logits()?, logits()?],
            choice: range("choice", Choice::BYTES)?,
            token: range("token", 4)?,
        })
    }

    /// GPU memory in bytes.
    pub fn bytes(model: &ModelConfig) -> u64 {
        mat_bytes(1, model.vocab).saturating_mul(2).saturating_add(Sample::scratch_bytes())
    }

    /// The id of the chosen token.
    pub fn token(&self) -> &BufferRange {
        &self.token
    }

    /// Replaces the chosen token.
    pub fn set_token(&self, gpu: &Gpu, token: u32) -> Result<(), OpError> {
        let source = BufferRange { buffer: gpu.storage_with("token", &token.to_le_bytes())?, offset: 0, size: 4 };
        let mut commands = gpu.commands("token");
        commands.copy(&source, &self.token);
        commands.submit()?;
        Ok(())
    }

    /// The logits of the next pass. Those of the pass before it stay.
    pub fn next_logits(&mut self) -> Mat {
        self.logits.swap(0, 1);
        let [next, _] = &self.logits;
        next.clone()
    }

    /// Submits a pass and the choice from its logits.
    pub fn submit(&self, mut commands: Commands, logits: &Mat, rules: &SampleRules) -> Result<PendingRead, OpError> {
        self.sample.record(&mut commands, logits, rules, &self.choice, &self.token)?;
        Ok(commands.submit_reading(&self.choice)?)
    }

    /// Waits for a choice.
    pub fn finish(read: PendingRead) -> Result<Choice, OpError> {
        let mut bytes = [0; Choice::BYTES as usize];
        read.finish(&mut bytes)?;
        Ok(Choice::of(&bytes))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::*;
    use crate::model::generate::sampling::SamplerOptions;
    use crate::ops::testing::{assert_untouched, gpu, mat, poisoned, random};

    /// The choice of the device; the token that the next pass reads is the same.
    fn chosen(gpu: &Gpu, sample: &Sample, logits: &[f32], rules: &SampleRules) -> Choice {
        let logits = mat(gpu, 1, logits.len() as u32, logits);
        let (choice, token) = (poisoned(gpu, 1, 4), poisoned(gpu, 1, 1));
        let mut commands = gpu.commands("test");
        sample.record(&mut commands, &logits, rules, &choice.range, &token.range).unwrap();
        let found = Chooser::finish(commands.submit_reading(&choice.range).unwrap()).unwrap();
        [&logits, &choice, &token].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        assert_eq!(gpu.read(&token.range).unwrap(), found.token.to_le_bytes());
        assert!(found.token < logits.cols);
        found
    }

    /// Logits with a few likely tokens, as of a language model.
    fn peaked(seed: u64, vocab: usize) -> Vec<f32> {
        random(seed, vocab).into_iter().map(|x| 6.0 * x + if x > 0.99 { 900.0 * (x - 0.99) } else { 0.0 }).collect()
    }

    /// Temperature, top-k, top-p and min-p.
    const OPTIONS: [(f64, u32, f64, f64); 16] = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (0.8, 20, 1.0, 0.0),
        (1.0, 50, 0.95, 0.0),
        (0.6, 20, 0.95, 0.0),
        (1.0, 0, 0.9, 0.0),
        (0.7, 0, 0.5, 0.0),
        (2.0, 1000, 0.99, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, 0, 1.0, 0.05),
        (3.0, 0, 1.0, 0.2),
        (1.5, 40, 0.9, 0.1),
        (1.0, 0, 0.9, 1.0),
        (0.7, 5, 1.0, 0.02),
    ];

    #[test]
    fn certain_choices_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        let (mut all, mut all_certain) = (0, 0);
        for vocab in [1, 257, 1025, 32_003, 300_001] {
            let sample = Sample::new(&gpu, vocab as u32).unwrap();
            for (i, (temperature, top_k, top_p, min_p)) in OPTIONS.into_iter().enumerate() {
                let options = SamplerOptions { temperature, top_k, top_p, min_p, seed: i as u64 };
                let mut sampler = Sampler::new(options).unwrap();
                let mut certain = 0;
                // A CPU sorts a large vocabulary slowly.
                let runs = if vocab > 10_000 { 1 } else { 4 };
                for seed in 0..runs {
                    let (logits, draw) = (peaked(seed + 1, vocab), sampler.draw());
                    let found = chosen(&gpu, &sample, &logits, &sampler.rules(draw));
                    if found.certain {
                        assert_eq!(found.token, sampler.choose(&logits, draw).unwrap(), "{vocab} {options:?} {draw}");
                        certain += 1;
                    }
                }
                assert!(certain == runs || temperature > 0.0, "{vocab} {options:?}: {certain} are certain");
                (all, all_certain) = (all + runs, all_certain + certain);
            }
        }
        // Few tokens are likely, so most choices are certain.
        assert!(4 * all_certain >= 3 * all, "{all_certain} of {all}");
    }

    #[test]
    fn of_equal_tokens_the_first_is_the_likeliest_and_all_may_be_drawn() {
        let Some(gpu) = gpu() else { return };
        let sample = Sample::new(&gpu, 3000).unwrap();
        let mut logits = vec![-3.0; 3000];
        [700, 701, 2900].into_iter().for_each(|token: usize| logits[token] = 0.0);
        logits[701] = -0.0;
        let rules = |temperature, top_k, draw| SampleRules { temperature, top_k, top_p: 1.0, min_p: 0.0, draw };
        let token = |rules| {
            let choice = chosen(&gpu, &sample, &logits, &rules);
            choice.certain.then_some(choice.token)
        };
        assert_eq!(token(rules(0.0, 0, 0.0)), Some(700));
        for top_k in [1, 2] {
            // Tokens equal to the kth are kept.
            assert_eq!([0.1, 0.5, 0.9].map(|draw| token(rules(1.0, top_k, draw))), [Some(700), Some(701), Some(2900)]);
            // On the border of two tokens.
            assert_eq!(token(rules(1.0, top_k, 1.0 / 3.0)), None);
        }
        // Too many equal tokens to sort.
        logits.fill(1.0);
        assert_eq!(chosen(&gpu, &sample, &logits, &rules(0.0, 0, 0.0)), Choice { token: 0, certain: true });
        assert!(!chosen(&gpu, &sample, &logits, &rules(1.0, 2, 0.5)).certain);
        let of_all = chosen(&gpu, &sample, &logits, &rules(1.0, 0, 0.5001));
        assert_eq!(of_all, Choice { token: 1500, certain: true });
    }

    #[test]
    fn logits_that_are_not_finite_are_never_certain() {
        let Some(gpu) = gpu() else { return };
        let sample = Sample::new(&gpu, 1000).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            for at in [0, 500, 999] {
                let mut logits = peaked(3, 1000);
                logits[at] = bad;
                for (temperature, top_k) in [(0.0, 0), (1.0, 0), (1.0, 4)] {
                    let rules = SampleRules { temperature, top_k, top_p: 1.0, min_p: 0.0, draw: 0.3 };
                    assert!(!chosen(&gpu, &sample, &logits, &rules).certain, "{bad} at {at}");
                }
            }
        }
        let logits = [f32::MAX, f32::MIN].repeat(500);
        let rules = SampleRules { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, draw: 0.0005 };
        assert_eq!(chosen(&gpu, &sample, &logits, &rules), Choice { token: 0, certain: true });
    }

    #[test]
    fn extreme_temperatures_are_left_to_the_cpu() {
        let Some(gpu) = gpu() else { return };
        let sample = Sample::new(&gpu, 1000).unwrap();
        for temperature in [1e-300, 1e-21, 1e21, 1e300] {
            for (top_k, top_p) in [(0, 1.0), (9, 0.9)] {
                let rules = SampleRules { temperature, top_k, top_p, min_p: 0.0, draw: 0.3 };
                assert!(!chosen(&gpu, &sample, &peaked(1, 1000), &rules).certain, "{temperature}");
            }
        }
    }

    #[test]
    fn min_p_drops_whole_groups_of_equal_tokens() {
        let Some(gpu) = gpu() else { return };
        let sample = Sample::new(&gpu, 3000).unwrap();
        let mut logits: Vec<f32> = random(5, 3000).into_iter().map(|x| x - 10.0).collect();
        [(70, 0.0), (900, -1.0), (901, -1.0), (2900, -2.0)].into_iter().for_each(|(token, x): (usize, _)| logits[token] = x);
        let token = |min_p, draw| {
            let choice =
                chosen(&gpu, &sample, &logits, &SampleRules { temperature: 1.0, top_k: 0, top_p: 1.0, min_p, draw });
            choice.certain.then_some(choice.token)
        };
        // Weights 1, 0.368, 0.368 and 0.135.
        assert_eq!([0.1, 0.6, 0.9].map(|draw| token(0.2, draw)), [Some(70), Some(900), Some(901)]);
        assert_eq!([0.1, 0.99].map(|draw| token(0.4, draw)), [Some(70), Some(70)]);
        assert_eq!(token(0.1, 0.99), Some(2900));
        // On the border of a weight, and below what the device compares.
        assert_eq!(token(f64::from((-1.0_f32).exp()), 0.1), None);
        assert_eq!(token(1e-30, 0.1), None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let Some(gpu) = gpu() else { return };
        let sample = Sample::new(&gpu, 10).unwrap();
        let [four, one] = [4, 1].map(|words| poisoned(&gpu, 1, words).range);
        let rules = SampleRules { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, draw: 0.0 };
        for (vocab, choice, token) in [(9, &four, &one), (11, &four, &one), (10, &one, &one), (10, &four, &one.slice(0, 0))]
        {
            let refused = sample.record(&mut gpu.commands("test"), &poisoned(&gpu, 1, vocab), &rules, choice, token);
            assert!(matches!(refused, Err(OpError::Shape { .. })));
        }
    }
}
