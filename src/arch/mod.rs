//! What a model is: the sizes and settings of its config.json.

pub mod config;
