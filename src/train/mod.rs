//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub mod adapter;
pub mod config;
pub mod data;
mod error;
mod folder;
pub mod lora;
pub mod ops;
pub mod random;
pub mod sampling;
pub mod schedule;

pub use error::TrainError;
