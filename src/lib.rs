//! A Hugging Face checkpoint, converted once into one 4-bit file that any program can memory-map.

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "convert")]
pub mod convert;
pub mod dequant;
#[cfg(feature = "convert")]
pub mod export;
pub mod format;
#[cfg(feature = "convert")]
mod io;
#[cfg(feature = "mmap")]
mod mmap;
#[cfg(feature = "convert")]
pub mod verify;

#[cfg(feature = "mmap")]
pub use mmap::{LayerError, MappedPack, OpenError};
