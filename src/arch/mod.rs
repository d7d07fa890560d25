//! Families of models. This module has the only description of each, as data: its tensors and their
//! names, the meaning of the keys of config.json, and the properties of its layers. A family is one
//! file of `families` (all of them are in `Family::ALL`). The readers of that data are shared:
//!
//! ```text
//! families/ -> family    one model_type: tensors, keys, defaults
//!              config    config.json -> ModelConfig: sizes, and what each layer does
//!              names     the names of a checkpoint -> the names that transformers writes
//!              place     config.json, names and shapes -> the part that each tensor is
//!              obstacle  why a model that can be packed cannot be run
//! ```

pub(crate) mod config;
pub(crate) mod families;
pub(crate) mod family;
pub(crate) mod names;
pub(crate) mod obstacle;
#[cfg(feature = "convert")]
pub(crate) mod place;

pub use config::{ConfigError, ModelConfig};
pub use obstacle::Obstacle;
#[cfg(feature = "convert")]
pub use place::ArchError;
