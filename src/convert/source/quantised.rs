//! How a checkpoint that was quantised before is recognised. Such a checkpoint is never converted: rounding twice costs
//! quality that the original still has.

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
    /// By the tables that bitsandbytes stores beside its 4-bit codes.
    #[error("{tensor:?} belongs to 4-bit weights of bitsandbytes: convert the unquantised original instead")]
    Bitsandbytes {
        /// The tensor.
        tensor: String,
    },
    /// By the names of packed weights.
    #[error(
        "{tensor:?} belongs to packed weights (GPTQ, AWQ, compressed-tensors): convert the unquantised original instead"
    )]
    Packed {
        /// The tensor.
        tensor: String,
    },
    /// By weights of at most 8 bits.
    #[error("the weights {tensor:?} have the type {dtype:?}, of 8 bits or fewer: convert the unquantised original instead")]
    Narrow {
        /// The tensor.
        tensor: String,
        /// Its type in the header.
        dtype: String,
    },
}

impl Quantised {
    /// Looks for a quantisation in config.json.
    pub(super) fn by_config(config: &Map<String, Value>) -> Option<Self> {
        let found = ["quantization_config", "compression_config"].into_iter().find_map(|key| config.get(key))?;
        if found.is_null() {
            return None;
        }
        let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        Some(Self::Config { method })
    }

    /// Looks for a quantisation in (name, type) pairs. Names come first, since they say more than the type does.
    pub(super) fn by_tensors<'a>(tensors: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Option<Self> {
        let named =
            |found: fn(&str) -> bool| tensors.clone().map(|(name, _)| name).find(|name| found(name)).map(str::to_owned);
        if let Some(tensor) = named(|name| name.ends_with(".weight.absmax") || name.contains(".quant_state.")) {
            return Some(Self::Bitsandbytes { tensor });
        }
        if let Some(tensor) = named(|name| [".qweight", ".qzeros", ".weight_packed"].iter().any(|end| name.ends_with(end))) {
            return Some(Self::Packed { tensor });
        }
        let narrow = |dtype: &str| {
            matches!(dtype, "U8" | "I8" | "U4" | "I4" | "F4") || dtype.starts_with("F8_") || dtype.starts_with("F6_")
        };
        let (tensor, dtype) = tensors.clone().find(|(name, dtype)| name.ends_with(".weight") && narrow(dtype))?;
        Some(Self::Narrow { tensor: tensor.to_owned(), dtype: dtype.to_owned() })
    }
}
