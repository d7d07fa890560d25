//! LoRA adapters: their settings, PEFT's folder, and their place in GPU memory.

pub(crate) mod adapter;
pub(crate) mod config;
pub(crate) mod gpu;

/// What the fuzz targets call below the public API.
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing {
    pub use super::adapter::{CONFIG, WEIGHTS};
    pub use super::config::{AdapterLayout, LoraConfig};
}

pub use adapter::{Adapter, AdapterError, TensorsError};
pub use config::LoraError;
