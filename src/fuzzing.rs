//! What the fuzz targets call below the public API; not part of it. Only builds for fuzzing and for
//! tests have this module.

pub use crate::convert::parts::place;
pub use crate::data::fuzzing::{Dataset, Options, TokenizerFiles, render, tokenizer};
pub use crate::lora::adapter::{CONFIG as ADAPTER_CONFIG, WEIGHTS as ADAPTER_WEIGHTS};
pub use crate::lora::config::LoraConfig;
pub use crate::train::checkpoint::{Checkpoint, Fingerprint, OPTIMIZER, STATE, State};
pub use crate::train::record::{METRICS, Recorder};

#[cfg(test)]
mod regressions;
