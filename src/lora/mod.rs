//! LoRA adapters: their settings, PEFT's folder, and their place in GPU memory.

pub(crate) mod adapter;
pub(crate) mod config;
pub(crate) mod gpu;

pub use adapter::{Adapter, AdapterError, TensorsError};
pub use config::LoraError;
