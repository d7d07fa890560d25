//! How a checkpoint that was quantised before is recognised. Such a checkpoint is never converted:
//! rounding twice costs quality that the original still has.

use serde_json::{Map, Value};

/// How a checkpoint was quantised, and what shows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Quantised {
    /// By config.json.
    #[error("config.json has a quantization_config of the method {method:?}: convert the unquantised original instead")]
    Config {
        /// Its `quant_method`; "unknown" where there is none.
        method: String,
    },
    /// By the tables that bitsandbytes stores next to its 4-bit codes.
    #[error("{tensor:?} belongs to 4-bit weights of bitsandbytes: convert the unquantised original instead")]
    Bitsandbytes {
        /// The tensor.
        tensor: String,
    },
    /// By the names of packed weights.
    #[error(
        "{tensor:?} belongs to packed weights (GPTQ, AWQ, compressed-tensors or others): convert the unquantised original instead"
    )]
    Packed {
        /// The tensor.
        tensor: String,
    },
    /// By scales of weights.
    #[error(
        "{tensor:?} is a scale of quantised weights (FP8, compressed-tensors): convert the unquantised original instead"
    )]
    Scaled {
        /// The tensor.
        tensor: String,
    },
    /// By weights that are whole numbers, or have at most 8 bits.
    #[error("the weights {tensor:?} have the type {dtype:?}, as quantised ones: convert the unquantised original instead")]
    Narrow {
        /// The tensor.
        tensor: String,
        /// Its type in the header.
        dtype: String,
    },
}

impl Quantised {
    /// What config.json says about a quantisation. It is often wrong: merging an adapter, or
    /// decoding the weights, leaves it behind. So the tensors decide.
    pub(super) fn by_config(config: &Map<String, Value>) -> Option<Self> {
        let text = config.get("text_config").and_then(Value::as_object);
        let entry = |key| config.get(key).or_else(|| text?.get(key)).filter(|found| !found.is_null());
        let found = ["quantization_config", "compression_config"].into_iter().find_map(entry)?;
        let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        Some(Self::Config { method })
    }

    /// Looks for a quantisation in (name, type) pairs. Names come first, since they say more than
    /// the type does.
    pub(super) fn by_tensors<'a>(tensors: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Option<Self> {
        let named = |ends: &[&str]| {
            let mut names = tensors.clone().map(|(name, _)| name);
            names.find(|name| ends.iter().any(|end| name.ends_with(end))).map(str::to_owned)
        };
        let state = || tensors.clone().map(|(name, _)| name).find(|name| name.contains(".quant_state.")).map(str::to_owned);
        if let Some(tensor) = named(&BITSANDBYTES).or_else(state) {
            return Some(Self::Bitsandbytes { tensor });
        }
        if let Some(tensor) = named(&PACKED) {
            return Some(Self::Packed { tensor });
        }
        if let Some(tensor) = named(&SCALED) {
            return Some(Self::Scaled { tensor });
        }
        let narrow = |dtype: &str| {
            matches!(dtype, "U8" | "I8" | "U16" | "I16" | "U32" | "I32" | "U4" | "I4" | "F4")
                || dtype.starts_with("F8_")
                || dtype.starts_with("F6_")
        };
        let (tensor, dtype) = tensors.clone().find(|(name, dtype)| name.ends_with(".weight") && narrow(dtype))?;
        Some(Self::Narrow { tensor: tensor.to_owned(), dtype: dtype.to_owned() })
    }
}

/// Tables of bitsandbytes, of 4 and of 8 bits.
const BITSANDBYTES: [&str; 5] =
    [".weight.absmax", ".weight.nested_absmax", ".weight.quant_map", ".weight.nested_quant_map", ".SCB"];

/// Packed weights of GPTQ, AWQ, compressed-tensors, HQQ, AQLM, QuIP# and EXL3.
const PACKED: [&str; 8] =
    [".qweight", ".qzeros", ".weight_packed", ".W_q", ".codebooks", ".Qidxs", ".trellis", "_proj_blocks"];

/// Scales of weights of 8 bits or fewer.
const SCALED: [&str; 4] = [".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point"];
