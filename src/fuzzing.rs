//! What the fuzz targets call below the public API; not part of it. Only builds for fuzzing and for
//! tests have this module.

pub use crate::convert::parts::place;
pub use crate::data::fuzzing::{Dataset, Options, TokenizerFiles, file_samples, render, tokenizer};
pub use crate::lora::adapter::{CONFIG as ADAPTER_CONFIG, WEIGHTS as ADAPTER_WEIGHTS};
pub use crate::lora::config::LoraConfig;
pub use crate::train::checkpoint::{Checkpoint, Fingerprint, OPTIMIZER, STATE, State, state_checksum};
pub use crate::train::record::{METRICS, Recorder, read_metrics};

use crate::arch::ModelConfig;
use crate::lora::Adapter;
use crate::lora::config::LoraError;

/// An adapter before training.
///
/// # Errors
/// Settings that cannot be.
pub fn new_adapter(config: LoraConfig, model: &ModelConfig) -> Result<Adapter, LoraError> {
    Adapter::new(config, Some("base".to_owned()), model, 1)
}

/// The floats of an adapter, and those of its layout.
pub fn adapter_lengths(adapter: &Adapter) -> [usize; 2] {
    [adapter.vector.len(), adapter.layout.len()]
}

/// The settings of an adapter.
pub fn adapter_config(adapter: &Adapter) -> &LoraConfig {
    &adapter.config
}

#[cfg(test)]
mod regressions;
