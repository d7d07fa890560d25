//! The keys of config.json about the weights: the dtype, in which transformers 5 loads all of them,
//! and whether the output projection is tied to the embedding.

use regex::bytes::Regex;
use serde_json::{Map, Value};

use crate::arch::config::standard_json;
use crate::format::FloatType;

/// The keys of the dtype: transformers 5 reads `dtype`, otherwise the older `torch_dtype`. The
/// prefix of the pattern excludes strings that look like a key.
const KEYS: &str = r#"([{,]\s*"(?:torch_)?dtype"\s*:\s*)"[^"\\]*""#;

/// Whether the output projection is tied to the embedding.
const TIED: &str = r#"([{,]\s*"tie_word_embeddings"\s*:\s*)(?:true|false)"#;

/// The smallest type that holds all values of all `types`: f16 lacks the range of bf16, and bf16
/// the precision of f16.
pub(super) fn common(types: impl IntoIterator<Item = FloatType>) -> Option<FloatType> {
    types.into_iter().reduce(|a, b| if a == b { a } else { FloatType::F32 })
}

/// The keys for quantisation settings of a checkpoint. A snapshot has none.
const QUANTISATION: [&str; 2] = ["quantization_config", "compression_config"];

/// The config.json of a snapshot whose tensors have `float_type`, `tied` or not: see [`with_type`]
/// and [`with_tied`]. Quantisation settings are removed, otherwise transformers looks for codes.
pub(super) fn of_snapshot(config: &[u8], float_type: Option<FloatType>, tied: bool) -> Vec<u8> {
    let plain = without_quantisation(config);
    let config = with_tied(plain.as_deref().unwrap_or(config), tied);
    float_type.map_or_else(|| config.clone(), |float_type| with_type(&config, float_type))
}

/// `None` if there is nothing to remove; only then every byte stays.
fn without_quantisation(config: &[u8]) -> Option<Vec<u8>> {
    let mut object: Map<String, Value> = serde_json::from_slice(&standard_json(config)).ok()?;
    let mut found = false;
    for key in QUANTISATION {
        found |= object.remove(key).is_some();
        let text = object.get_mut("text_config").and_then(Value::as_object_mut);
        found |= text.is_some_and(|text| text.remove(key).is_some());
    }
    found.then(|| format!("{:#}\n", Value::Object(object)).into_bytes())
}

/// The config.json with `float_type` as every dtype, otherwise byte for byte the same. Without a
/// dtype, transformers uses that of the weights.
pub(super) fn with_type(config: &[u8], float_type: FloatType) -> Vec<u8> {
    let name = match float_type {
        FloatType::F32 => "float32",
        FloatType::F16 => "float16",
        FloatType::Bf16 => "bfloat16",
    };
    replace(config, KEYS, &format!("\"{name}\""))
}

/// The config.json with `tied` as every `tie_word_embeddings`, otherwise byte for byte the same.
pub(super) fn with_tied(config: &[u8], tied: bool) -> Vec<u8> {
    replace(config, TIED, if tied { "true" } else { "false" })
}

/// Replaces the text after the first group of `pattern` by `value`.
fn replace(config: &[u8], pattern: &str, value: &str) -> Vec<u8> {
    match Regex::new(pattern) {
        Ok(keys) => keys.replace_all(config, format!("${{1}}{value}").as_bytes()).into_owned(),
        Err(_) => config.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_type_holds_all() {
        use FloatType::{Bf16, F16, F32};
        assert_eq!(common([]), None);
        for (types, expected) in [([Bf16, Bf16], Bf16), ([F16, F16], F16), ([F16, Bf16], F32), ([Bf16, F32], F32)] {
            assert_eq!(common(types), Some(expected), "{types:?}");
        }
    }

    #[test]
    fn a_quantisation_is_left_out() {
        let config = br#"{"dtype": "float16", "quantization_config": {"bits": 4}, "text_config": {"compression_config": {}, "a": 1e-06}}"#;
        let found: Value = serde_json::from_slice(&of_snapshot(config, Some(FloatType::Bf16), true)).unwrap();
        assert_eq!(found, serde_json::json!({"dtype": "bfloat16", "text_config": {"a": 1e-6}}));
        for same in [&br#"{ "a" : 1 }"#[..], b"not JSON"] {
            assert_eq!(of_snapshot(same, Some(FloatType::Bf16), true), same);
        }
    }

    #[test]
    fn nothing_but_the_tie_changes() {
        let of = |config: &str, tied| String::from_utf8(with_tied(config.as_bytes(), tied)).unwrap();
        let config =
            r#"{"a": "tie_word_embeddings: true", "tie_word_embeddings" : true, "t": {"tie_word_embeddings":true}}"#;
        assert_eq!(of(config, true), config);
        let untied =
            r#"{"a": "tie_word_embeddings: true", "tie_word_embeddings" : false, "t": {"tie_word_embeddings":false}}"#;
        assert_eq!(of(config, false), untied);
        assert_eq!(of(untied, true), config);
        assert_eq!(of("{}", false), "{}");
    }

    #[test]
    fn nothing_but_the_type_changes() {
        let of = |config: &str| String::from_utf8(with_type(config.as_bytes(), FloatType::Bf16)).unwrap();
        let old = "{\n  \"z\": 1.0,\n  \"torch_dtype\": \"float16\",\n  \"a\": [\"dtype\", 1e-06]\n}\n";
        assert_eq!(of(old), old.replace("float16", "bfloat16"));
        assert_eq!(
            of(r#"{"dtype":"float32","torch_dtype" : "float32"}"#),
            r#"{"dtype":"bfloat16","torch_dtype" : "bfloat16"}"#
        );
        for same in [
            r#"{"a": 1}"#,
            r#"{"dtype": null}"#,
            r#"{"compute_dtype": "float16", "dtypes": "float16"}"#,
            r#"{"a": "{\"dtype\": \"float16\"}", "b": ",\"dtype\":\"float16\""}"#,
            "not JSON",
        ] {
            assert_eq!(of(same), same);
        }
    }
}
