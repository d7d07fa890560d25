//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

mod error;
pub mod ops;

pub use error::TrainError;
