//! Tests on a GPU, and tests of the shaders.

#[path = "../common/mod.rs"]
mod common;
mod dequant;
mod device;
#[cfg(all(feature = "train", feature = "convert"))]
mod generate;
mod shaders;
#[cfg(feature = "convert")]
mod stream;
#[cfg(all(feature = "train", feature = "convert"))]
mod train_run;
