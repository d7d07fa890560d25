//! A Hugging Face checkpoint, converted once into one 4-bit file that any program can memory-map.
//!
//! - [`format`](mod@format): the bytes of a pack, validated once, then views that cannot fail.
//! - `MappedPack` (feature `mmap`): a pack as a file that is mapped or read.
//! - [`dequant`]: codes and scales to floats on the CPU.
//! - `train` (feature `train`): LoRA adapters on a pack, on any GPU.
//! - `convert`, `verify`, `export` (feature `convert`): from a checkpoint and back, and the checks of a pack.

#[cfg(any(feature = "convert", feature = "train"))]
pub mod arch;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "convert")]
pub mod convert;
#[cfg(feature = "train")]
pub mod data;
pub mod dequant;
#[cfg(feature = "convert")]
pub mod export;
pub mod format;
#[cfg(feature = "gpu")]
pub mod gpu;
#[cfg(any(feature = "convert", feature = "gpu"))]
mod io;
#[cfg(feature = "train")]
pub mod lora;
#[cfg(all(feature = "convert", feature = "train"))]
pub mod merge;
#[cfg(feature = "mmap")]
mod mmap;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod ops;
#[cfg(feature = "train")]
pub mod random;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "convert")]
pub mod verify;

#[cfg(feature = "mmap")]
pub use mmap::{LayerError, MappedPack, OpenError};

/// The README's examples, compiled.
#[cfg(all(doctest, feature = "mmap"))]
#[doc = include_str!("../README.md")]
struct Readme;
