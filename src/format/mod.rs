//! The `.nf4pack` file format: bytes in, validated views out; a plan in, bytes out. No paths, no threads, no GPU.
#![forbid(unsafe_code)]

mod kinds;
pub mod nf4;

pub use kinds::{ElementType, FloatType, Role, SectionKind};
