//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub mod checkpoint;
pub mod record;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod step;
pub mod trainer;
