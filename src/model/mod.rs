//! A model that runs: the layers of a pack as they are streamed, the head and its loss, and text
//! from it.

pub mod decoder;
pub mod error;
pub mod generate;
mod kv_cache;
mod layer;
mod linear;
pub mod open;
mod pass;
pub mod plan;
pub mod session;
mod weights;
pub mod workspace;

pub use error::{ModelError, NonFiniteAt};
