//! LoRA adapters: their settings, PEFT's folder, and their place in GPU memory.

pub mod adapter;
pub mod config;
pub mod gpu;
