//! Families of models. The description of a model is here, once, as data: its tensors and their
//! names, the meaning of the keys of config.json, and what its layers do. A family is one file of
//! [`families`](Family::ALL); the readers of that data are shared:
//!
//! ```text
//! families/ -> family    one model_type: tensors, keys, defaults
//!              config    config.json -> ModelConfig: the sizes of one model, and what each of its layers does
//!              names     the names of a checkpoint -> the names that transformers writes
//!              place     config.json, names and shapes -> the part of the model that each tensor is
//!              obstacle  why a model that can be packed cannot be run
//! ```

pub(crate) mod config;
mod families;
pub(crate) mod family;
mod names;
mod obstacle;
mod place;

pub use config::{ConfigError, LayerAttention, MAX_LAYERS, ModelConfig, Rope, RopeScaling};
pub use families::model_types;
pub use family::{Family, PROJECTIONS};
pub use names::{Naming, Prefix};
pub use obstacle::{MAX_HEAD_DIM, Obstacle, check_files_runnable, check_pack_runnable};
pub use place::{ArchError, Model, Placed, Stray, StrayKind, TensorShape, place};
