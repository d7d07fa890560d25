//! From a Hugging Face checkpoint to a pack: [`source`] reads the checkpoint, `parts` says what
//! its tensors are, [`plan`] places them in the pack, [`encode`] makes codes of weights, and
//! [`convert`] runs it all in bounded memory.

pub mod encode;
mod error;
pub(crate) mod hash;
mod journal;
mod nesting;
pub mod notice;
mod options;
pub(crate) mod parts;
mod piece;
mod pipeline;
pub mod plan;
mod report;
pub mod source;
pub mod synth;
mod target;
mod walk;

pub use error::ConvertError;
pub use options::Options;
pub use parts::PartsError;
pub use pipeline::{Conversion, convert};
pub use report::{Kept, Progress, Report, RoleReport};
#[cfg(feature = "cli")]
pub(crate) use target::partial_path;
