//! A Hugging Face checkpoint, converted once into one file of 4-bit weights that any program can
//! map into memory; a loader that streams it to a GPU; and a LoRA trainer on top of that.
//!
//! # Convert a checkpoint
//!
//! Feature `convert`. The source is a folder as Hugging Face writes it, or one safetensors file.
//!
//! ```
//! # #[cfg(feature = "convert")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nf4pack::convert::{Options, convert};
//!
//! # let folder = tempfile::tempdir()?;
//! # let pack = folder.path().join("tiny-qwen3.nf4pack");
//! let source = "tests/fixtures/tiny-qwen3".as_ref();
//! let report = convert(source, &pack, Options::default(), &())?;
//! assert!(report.relative_error < 0.01);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "convert"))]
//! # fn main() {}
//! ```
//!
//! # Open a pack and decode weights
//!
//! Feature `mmap`. `MappedPack::read` reads the file; `MappedPack::open` maps it, and is `unsafe`,
//! because no other program may change a mapped file.
//!
//! ```
//! # #[cfg(feature = "mmap")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nf4pack::MappedPack;
//! use nf4pack::dequant::dequantize;
//!
//! let pack = MappedPack::read("tests/fixtures/golden/v1.0-full.nf4pack")?;
//! for tensor in pack.pack().quantized_tensors() {
//!     let mut weights = vec![0.0_f32; tensor.data.elements as usize];
//!     dequantize(&tensor.data, 0, &mut weights)?;
//!     println!("{} {}: {:?}", tensor.name, tensor.shape, weights.first());
//! }
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "mmap"))]
//! # fn main() {}
//! ```
//!
//! # Stream the layers to a GPU
//!
//! Feature `gpu`. While the GPU works on one layer, the next one is loaded.
//!
//! ```
//! # #[cfg(feature = "gpu")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nf4pack::dequant::stream::{Direction, LayerStream, StreamOptions};
//! use nf4pack::dequant::{Dequantizer, Output};
//! use nf4pack::gpu::{Gpu, Options};
//!
//! # if nf4pack::gpu::adapters().is_empty() { return Ok(()) }
//! let gpu = Gpu::open(&Options::from_env())?;
//! let kernels = Dequantizer::new(&gpu)?;
//! let pack = "tests/fixtures/golden/v1.0-full.nf4pack";
//! let mut stream = LayerStream::open(&gpu, pack, &StreamOptions::default())?;
//! for number in 0..stream.layer_count() {
//!     let layer = stream.layer(number, Direction::Forward)?;
//!     let Some(tensor) = layer.quantized_tensors.first() else { continue };
//!     let first_weights = kernels.read(&tensor.weights, 0..8, Output::F32)?;
//!     println!("{} {first_weights:?}", tensor.name);
//! }
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "gpu"))]
//! # fn main() {}
//! ```
//!
//! # Train an adapter
//!
//! Feature `train`. The folder `out` then holds an adapter that PEFT loads, checkpoints that a run
//! resumes from bit for bit, and records of the run.
//!
//! ```
//! # #[cfg(all(feature = "train", feature = "convert"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nf4pack::data::DataFile;
//! use nf4pack::dequant::stream::PackSource;
//! use nf4pack::gpu::{Gpu, Options};
//! use nf4pack::train::{End, Prepared, Run, Settings, Task};
//!
//! # if nf4pack::gpu::adapters().is_empty() { return Ok(()) }
//! # let folder = tempfile::tempdir()?;
//! # let (pack, out) = (folder.path().join("tiny.nf4pack"), folder.path().join("out"));
//! # let source = "tests/fixtures/tiny-qwen3".as_ref();
//! # nf4pack::convert::convert(source, &pack, Default::default(), &())?;
//! let path = "tests/fixtures/chat.jsonl".as_ref();
//! let data = DataFile::open(path)?;
//! let settings = Settings { steps: Some(1), max_length: 64, ..Settings::default() };
//! let task = Task {
//!     settings: &settings,
//!     data: &data,
//!     eval_data: None,
//!     out: &out,
//!     base: None,
//!     files: &[],
//!     now: 0,
//! };
//! let prepared = Prepared::new(PackSource::open(&pack)?, &task, None, &mut |_, _| true)?;
//! let gpu = Gpu::open(&Options::from_env())?;
//! let plan = prepared.plan(&gpu, &settings)?;
//! let mut run = Run::start(&gpu, prepared, &task, plan)?;
//! assert_eq!(run.train(|_event| true)?, End::Complete);
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "train", feature = "convert")))]
//! # fn main() {}
//! ```
//!
//! # Generate text
//!
//! Feature `train`.
//!
//! ```
//! # #[cfg(all(feature = "train", feature = "convert"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::ops::ControlFlow;
//!
//! use nf4pack::arch::ModelConfig;
//! use nf4pack::data::Tokenizer;
//! use nf4pack::dequant::stream::PackSource;
//! use nf4pack::gpu::{Gpu, Options};
//! use nf4pack::model::text::{Sampler, SamplerOptions};
//! use nf4pack::model::{GenerateError, TextGenerator};
//!
//! # if nf4pack::gpu::adapters().is_empty() { return Ok(()) }
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("tiny.nf4pack");
//! # let source = "tests/fixtures/tiny-qwen3".as_ref();
//! # nf4pack::convert::convert(source, &path, Default::default(), &())?;
//! let pack = PackSource::open(&path)?;
//! let tokenizer = Tokenizer::of_pack(&pack, &ModelConfig::of_pack(&pack)?, 0)?;
//! let prompt = tokenizer.encode("The compiler", true)?;
//! let gpu = Gpu::open(&Options::from_env())?;
//! let mut generator = TextGenerator::open(&gpu, pack, None, tokenizer.eos(), 64, None)?;
//! let mut sampler = Sampler::new(SamplerOptions::GREEDY)?;
//! let keep_going = |_event| Ok::<_, GenerateError>(ControlFlow::Continue(()));
//! let answer = generator.answer(&prompt, 8, &mut sampler, keep_going)?;
//! println!("{}", tokenizer.decode(&answer.tokens)?);
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "train", feature = "convert")))]
//! # fn main() {}
//! ```
//!
//! # Why it is built this way
//!
//! Quantising takes as long as reading the checkpoint, and its result never changes. So it is done
//! once, and the result is a file whose layers are contiguous, aligned ranges: one sequential read
//! and one copy bring a layer to a GPU. Data flows one way,
//! `checkpoint -> convert -> format -> dequant / gpu -> model -> train`:
//!
//! - [`format`](mod@format) turns bytes into views. A pack is validated once; after that, no
//!   accessor can fail. It knows no paths, threads or GPU, and has no unsafe code.
//! - `MappedPack` has the bytes of a whole pack, mapped or read, and gives views into them.
//!   `PackSource` keeps a file open, reads a payload when it is needed, and compares its checksum:
//!   streams, training, `verify`, `export` and `merge` take it.
//! - `convert` writes packs in bounded memory. `verify`, `export` and `merge` join a pack with its
//!   source again.
//! - [`dequant`] decodes, on the CPU and in WGSL kernels, bit for bit the same. `gpu` is the device
//!   layer below, which is independent of 4-bit weights.
//! - `arch` describes each family of models as data; `data` turns files into batches; `lora` holds
//!   adapters; `model` runs a model; `train` trains an adapter on it.
//!
//! `convert` and [`dequant`] do not import each other. Both take the meaning of a code from
//! [`format::nf4`], so that a mistake in one cannot hide in the other.

#![deny(unsafe_code)]
// Other builds have the lint: here, `fuzzing` hands on what is not public.
#![cfg_attr(any(fuzzing, test), allow(unnameable_types))]

/// The checks of the fuzz targets name the library from outside, in unit tests, too.
#[cfg(test)]
extern crate self as nf4pack;

#[cfg(any(feature = "convert", feature = "train"))]
#[forbid(unsafe_code)]
pub mod arch;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "convert")]
pub mod convert;
#[cfg(feature = "train")]
#[forbid(unsafe_code)]
pub mod data;
pub mod dequant;
#[cfg(feature = "convert")]
#[forbid(unsafe_code)]
pub mod export;
#[forbid(unsafe_code)]
pub mod format;
#[cfg(all(any(fuzzing, test), feature = "convert", feature = "train"))]
#[doc(hidden)]
#[forbid(unsafe_code)]
pub mod fuzzing;
#[cfg(feature = "gpu")]
pub mod gpu;
#[cfg(any(feature = "convert", feature = "gpu"))]
#[forbid(unsafe_code)]
mod io;
#[cfg(feature = "train")]
#[forbid(unsafe_code)]
pub mod lora;
#[cfg(all(feature = "convert", feature = "train"))]
#[forbid(unsafe_code)]
pub mod merge;
#[cfg(feature = "mmap")]
mod mmap;
#[cfg(feature = "train")]
#[forbid(unsafe_code)]
pub mod model;
#[cfg(feature = "train")]
pub(crate) mod ops;
#[cfg(feature = "gpu")]
#[forbid(unsafe_code)]
mod panics;
#[cfg(feature = "train")]
#[forbid(unsafe_code)]
mod random;
#[cfg(any(feature = "convert", feature = "gpu"))]
#[forbid(unsafe_code)]
mod source;
#[cfg(all(test, feature = "train", feature = "convert"))]
#[forbid(unsafe_code)]
mod tests;
#[cfg(feature = "train")]
#[forbid(unsafe_code)]
pub mod train;
#[cfg(feature = "convert")]
#[forbid(unsafe_code)]
pub mod verify;

#[cfg(any(feature = "convert", feature = "gpu"))]
pub use io::read::FileError;
#[cfg(feature = "mmap")]
pub use mmap::{LayerError, MappedPack, OpenError};
#[cfg(any(feature = "convert", feature = "gpu"))]
pub use source::{PackSource, ReadError};

/// The README's examples, compiled.
#[cfg(all(doctest, feature = "mmap"))]
#[doc = include_str!("../README.md")]
struct Readme;
