//! From a Hugging Face checkpoint to a pack.
pub mod arch;
pub mod notice;
pub mod source;
pub mod synth;
