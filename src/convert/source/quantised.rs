//! How a checkpoint that was quantised before is recognised. Such a checkpoint is never converted:
//! rounding twice costs quality that the original still has.

use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::arch::family::Family;

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
    /// The tensor that shows it.
    pub(super) fn tensor(&self) -> Option<&str> {
        match self {
            Self::Config { .. } => None,
            Self::Bitsandbytes { tensor }
            | Self::Packed { tensor }
            | Self::Scaled { tensor }
            | Self::Narrow { tensor, .. } => Some(tensor),
        }
    }

    /// What config.json says about a quantisation. It is often wrong: merging an adapter, or
    /// decoding the weights, leaves it behind. So the tensors decide.
    pub(super) fn by_config(config: &Map<String, Value>) -> Option<Self> {
        let text = config.get("text_config").and_then(Value::as_object);
        let entry = |key| config.get(key).or_else(|| text?.get(key)).filter(|found| !found.is_null());
        let found = ["quantization_config", "compression_config"].into_iter().find_map(entry)?;
        let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        Some(Self::Config { method })
    }

    /// Looks for a quantisation in (name, type) pairs, those of all of a checkpoint. Names come
    /// first, since they say more than the type does. Tables and scales of weights that are there
    /// as floats are left over, as [`Self::by_config`] may be.
    pub(super) fn by_tensors<'a>(tensors: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Option<Self> {
        let floats: HashSet<&str> =
            tensors.clone().filter(|(_, dtype)| FLOATS.contains(dtype)).map(|(name, _)| name).collect();
        let is_left_over = |stem: &str| floats.contains(format!("{stem}.weight").as_str());
        let named = |ends: &[&str]| {
            let shows = |name: &&str| ends.iter().any(|end| name.strip_suffix(end).is_some_and(|stem| !is_left_over(stem)));
            tensors.clone().map(|(name, _)| name).find(shows).map(str::to_owned)
        };
        let is_state = |name: &&str| name.split_once(".quant_state.").is_some_and(|(weight, _)| !floats.contains(weight));
        let state = || tensors.clone().map(|(name, _)| name).find(is_state).map(str::to_owned);
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
        let (tensor, dtype) = tensors.clone().find(|(name, dtype)| narrow(dtype) && is_weight(name))?;
        Some(Self::Narrow { tensor: tensor.to_owned(), dtype: dtype.to_owned() })
    }
}

/// The types of weights that are not quantised.
const FLOATS: [&str; 4] = ["F64", "F32", "F16", "BF16"];

/// Whether a name is one of weights that a model may have, with any prefix. Tensors that
/// are no part of a model may have any type.
fn is_weight(name: &str) -> bool {
    let mut parts = Family::ALL.iter().flat_map(|family| family.parts);
    parts.any(|part| name.strip_suffix(part.name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
}

/// Tables of bitsandbytes, of 4 and of 8 bits.
const BITSANDBYTES: [&str; 5] =
    [".weight.absmax", ".weight.nested_absmax", ".weight.quant_map", ".weight.nested_quant_map", ".SCB"];

/// Packed weights of GPTQ, AWQ, compressed-tensors, HQQ, AQLM, QuIP# and EXL3.
const PACKED: [&str; 8] =
    [".qweight", ".qzeros", ".weight_packed", ".W_q", ".codebooks", ".Qidxs", ".trellis", "_proj_blocks"];

/// Scales of weights of 8 bits or fewer.
const SCALED: [&str; 4] = [".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point"];
