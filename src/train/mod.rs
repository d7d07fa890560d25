//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub mod adapter;
pub mod checkpoint;
pub mod config;
pub mod data;
mod error;
mod folder;
pub mod generate;
pub mod gpu_adapter;
mod kv_cache;
mod layer;
mod linear;
pub mod lora;
pub mod model;
pub mod open;
pub mod ops;
pub mod plan;
pub mod random;
pub mod record;
pub mod run;
pub mod sampling;
pub mod schedule;
pub mod session;
pub mod settings;
pub mod step;
pub mod trainer;
pub mod workspace;

pub use error::{NonFiniteAt, TrainError};
