//! How tokens are sampled: by the flags, by generation_config.json, or greedily.

use anyhow::Result;
use serde::Deserialize;

use crate::PackSource;
use crate::arch::config::standard_json;
use crate::cli::args::SamplingArgs;
use crate::cli::ui::Ui;
use crate::format::files::GENERATION_CONFIG;
use crate::model::generate::sampling::{Sampler, SamplerOptions};

/// The keys of generation_config.json about sampling. A null is a missing key.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Generation {
    do_sample: Option<bool>,
    temperature: Option<f64>,
    top_k: Option<u32>,
    top_p: Option<f64>,
    min_p: Option<f64>,
}

/// The options of a command, which says so if they are the model's.
///
/// # Errors
/// If the pack cannot be read.
pub fn options(args: &SamplingArgs, pack: &PackSource, ui: Ui) -> Result<SamplerOptions> {
    let model = pack.file(GENERATION_CONFIG)?.and_then(|bytes| of_model(&bytes));
    let options = args.over(model);
    if model.is_some() && args.temperature.is_none() && !args.greedy {
        let SamplerOptions { temperature, top_k, top_p, min_p, .. } = options;
        ui.note(&format!(
            "sampling as generation_config.json says: temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}; \
             --greedy takes the likeliest token"
        ));
    }
    Ok(options)
}

/// The sampling of generation_config.json; `None` if it is greedy, cannot be read or makes no
/// sense. A missing key takes transformers' default.
fn of_model(bytes: &[u8]) -> Option<SamplerOptions> {
    let generation: Generation = serde_json::from_slice(&standard_json(bytes)).ok()?;
    let Generation { do_sample: Some(true), temperature, top_k, top_p, min_p } = generation else { return None };
    let options = SamplerOptions {
        temperature: temperature.unwrap_or(1.0),
        top_k: top_k.unwrap_or(50),
        top_p: top_p.unwrap_or(1.0),
        min_p: min_p.unwrap_or(0.0),
        seed: 0,
    };
    Sampler::new(options).is_ok().then_some(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: SamplingArgs =
        SamplingArgs { greedy: false, temperature: None, top_k: None, top_p: None, min_p: None, seed: None };

    #[test]
    fn a_model_that_samples_says_how() {
        let qwen = br#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}"#;
        let expected = SamplerOptions { temperature: 0.6, top_k: 20, top_p: 0.95, min_p: 0.0, seed: 0 };
        assert_eq!(of_model(qwen), Some(expected));
        let defaults = SamplerOptions { temperature: 1.0, top_k: 50, top_p: 1.0, min_p: 0.0, seed: 0 };
        assert_eq!(of_model(br#"{"do_sample": true, "top_k": null}"#), Some(defaults));
        let others: [&[u8]; 5] = [
            b"{}",
            b"no JSON",
            br#"{"do_sample": false}"#,
            br#"{"temperature": 0.6}"#,
            br#"{"do_sample": true, "top_p": 7}"#,
        ];
        others.into_iter().for_each(|bytes| assert_eq!(of_model(bytes), None));
    }

    #[test]
    fn flags_replace_the_values_of_the_model_one_by_one() {
        let model = SamplerOptions { temperature: 0.6, top_k: 20, top_p: 0.95, min_p: 0.0, seed: 0 };
        assert_eq!(NONE.over(Some(model)), model);
        let flags = SamplingArgs { top_k: Some(5), seed: Some(3), ..NONE };
        assert_eq!(flags.over(Some(model)), SamplerOptions { top_k: 5, seed: 3, ..model });
        assert_eq!(NONE.over(None), SamplerOptions::GREEDY);
        assert_eq!(flags.over(None), SamplerOptions { temperature: 1.0, top_k: 5, seed: 3, ..SamplerOptions::GREEDY });
    }
}
