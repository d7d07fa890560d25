//! From a Hugging Face checkpoint to a pack.

pub mod encode;
