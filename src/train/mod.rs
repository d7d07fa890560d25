//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub mod adapter;
pub mod config;
mod error;
mod folder;
pub mod lora;
pub mod ops;
pub mod random;

pub use error::TrainError;
