//! Packs of random codes in the shape of a real model: for benchmarks of what reads packs, where no
//! weight need mean anything.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::{CHUNK_LEN, ELEMENT_LEN, STEP, Shape, fill, mix, pretty, quantiles};
use crate::arch;
use crate::convert::parts;
use crate::convert::report::Progress;
use crate::convert::source::TensorInfo;
#[cfg(feature = "cli")]
use crate::format::Index;
use crate::format::nf4::{DEFAULT_BLOCK_SIZE, ScaleType};
use crate::format::{Entry, FloatType, Layout, PieceCrc, Provenance, Role, Section, SectionKind, Storage, crc32};
use crate::io::{AlignedBuf, write_all_at};

/// How projections are stored: the converter's default.
const STORAGE: Storage = Storage::Nf4 { scale_type: ScaleType::Bf16, block_size: DEFAULT_BLOCK_SIZE };

/// Writes a pack with the layers of `shape` to `path`, which must not exist: random codes under
/// bfloat16 scales, block size 64, and norms around 1. What belongs to no layer (the embedding, the
/// last norm) is left out. Gives the length of the file. Each section is of its own random numbers,
/// so that threads (all of rayon's) change nothing; the file is synced at the end, as in
/// [`super::write`].
///
/// # Errors
/// `Interrupted` where `progress` says so; `InvalidInput` where `shape` is none of a model, or a
/// projection ends within a block; otherwise what the operating system says.
pub fn write_pack(path: &Path, shape: &Shape, seed: u64, progress: &impl Progress) -> io::Result<u64> {
    let mut entries = entries(shape)?;
    entries.retain(|entry| entry.layer.is_some());
    Pack { entries, layers: shape.layers as u32, metadata: metadata(shape.model_type(), shape.tied)?, config: Vec::new() }
        .write(path, seed, progress)
}

/// As [`write_pack`], with what belongs to no layer, and with a config.json: a model that runs.
///
/// # Errors
/// Those of [`write_pack`].
pub fn write_model_pack(path: &Path, shape: &Shape, seed: u64, progress: &impl Progress) -> io::Result<u64> {
    Pack::of_model(shape)?.write(path, seed, progress)
}

/// The index of the pack that [`write_model_pack`] writes.
///
/// # Errors
/// As [`write_model_pack`], except those of writing.
#[cfg(feature = "cli")]
pub(crate) fn model_index(shape: &Shape) -> io::Result<Index> {
    let pack = Pack::of_model(shape)?;
    let layout = pack.layout()?;
    let crcs = vec![0; layout.sections().len()];
    let front = layout.front(&crcs, 0, &pack.metadata).map_err(io::Error::other)?;
    Index::parse(&front, layout.file_len()).map_err(io::Error::other)
}

/// [`write_pack`] with one projection of `rows` times `columns` in each of `layers` layers.
#[cfg(feature = "cli")]
pub(crate) fn write_matrices(
    path: &Path,
    [rows, columns]: [u64; 2],
    layers: u32,
    seed: u64,
    progress: &impl Progress,
) -> io::Result<u64> {
    let whole_blocks = rows.checked_mul(columns).is_some_and(|n| n.is_multiple_of(DEFAULT_BLOCK_SIZE.into()));
    let shape = crate::format::Shape::new(&[rows, columns]).filter(|_| whole_blocks);
    let shape = shape.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the matrix has no whole blocks"))?;
    let entry = |layer| Entry {
        name: format!("model.layers.{layer}.mlp.down_proj.weight"),
        role: Role::DownProj,
        layer: Some(layer),
        expert: None,
        shape,
        storage: STORAGE,
    };
    let entries = (0..layers).map(entry).collect();
    Pack { entries, layers, metadata: metadata("qwen3", true)?, config: Vec::new() }.write(path, seed, progress)
}

/// The contents of a pack.
struct Pack {
    entries: Vec<Entry>,
    layers: u32,
    metadata: String,
    /// The only file, if there is an entry for it.
    config: Vec<u8>,
}

impl Pack {
    fn of_model(shape: &Shape) -> io::Result<Self> {
        let (mut entries, config) = (entries(shape)?, pretty(&shape.config())?.into_bytes());
        let length = crate::format::Shape::new(&[config.len() as u64]);
        entries.push(Entry {
            name: "config.json".to_owned(),
            role: Role::Other,
            layer: None,
            expert: None,
            shape: length.ok_or_else(|| io::Error::other("no configuration"))?,
            storage: Storage::File,
        });
        Ok(Self { entries, layers: shape.layers as u32, metadata: metadata(shape.model_type(), shape.tied)?, config })
    }

    fn layout(&self) -> io::Result<Layout> {
        Layout::new(self.entries.clone(), self.layers, self.metadata.len() as u64).map_err(io::Error::other)
    }

    fn write(&self, path: &Path, seed: u64, progress: &impl Progress) -> io::Result<u64> {
        let layout = self.layout()?;
        let (file, done) = (File::create_new(path)?, AtomicU64::new(0));
        progress.advance(0, layout.file_len());
        let values = [quantiles(0.0), quantiles(1.0)];
        let write = |(i, section): (usize, &Section)| {
            let mut state = mix(mix(seed) ^ i as u64);
            let (mut buf, mut crc, mut at) = (AlignedBuf::new(CHUNK_LEN), PieceCrc::default(), 0);
            while at < section.length {
                if progress.cancelled() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let chunk = buf.first_mut((section.length - at).min(CHUNK_LEN as u64) as usize);
                state = match section.kind {
                    Some(SectionKind::Codes) => random_bytes(chunk, state),
                    Some(SectionKind::Raw) => fill(chunk, state, &values[usize::from(section.shape.dims().len() == 1)]),
                    Some(SectionKind::File) => copy(chunk, &self.config, at, state),
                    _ => random_scales(chunk, state),
                };
                write_all_at(&file, chunk, section.offset + at)?;
                let len = chunk.len() as u64;
                crc.push(crc32(chunk), len);
                at += len;
                progress.advance(done.fetch_add(len, Ordering::Relaxed) + len, layout.file_len());
            }
            Ok(crc.value())
        };
        let crcs = layout.sections().par_iter().enumerate().map(write).collect::<io::Result<Vec<u32>>>()?;
        let front = layout.front(&crcs, 0, &self.metadata).map_err(io::Error::other)?;
        write_all_at(&file, &front, 0)?;
        file.sync_data()?;
        Ok(layout.file_len())
    }
}

/// Fills `chunk` with the bytes of `file` from `at` on.
fn copy(chunk: &mut [u8], file: &[u8], at: u64, state: u64) -> u64 {
    chunk.iter_mut().zip(file.iter().skip(at as usize)).for_each(|(to, from)| *to = *from);
    state
}

/// The tensors, each with its role.
fn entries(shape: &Shape) -> io::Result<Vec<Entry>> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let tensor = |(name, shape): (String, Vec<u64>)| {
        let length = ELEMENT_LEN * shape.iter().product::<u64>();
        TensorInfo { name, float_type: FloatType::Bf16, shape, file: 0, offset: 0, length }
    };
    let tensors: Vec<TensorInfo> = shape.tensors().into_iter().map(tensor).collect();
    let config = shape.config();
    let config = config.as_object().ok_or_else(|| invalid("no configuration".to_owned()))?;
    let shapes: Vec<_> = tensors.iter().map(parts::shape).collect();
    let model = arch::place::place(config, &shapes).map_err(|e| invalid(e.to_string()))?;
    let entry = |placed: &arch::place::Placed| {
        let tensor = &tensors[placed.tensor];
        let whole_blocks = tensor.shape.iter().product::<u64>().is_multiple_of(DEFAULT_BLOCK_SIZE.into());
        let shape = crate::format::Shape::new(&tensor.shape).filter(|_| whole_blocks || !placed.quantise);
        Ok(Entry {
            name: tensor.name.clone(),
            role: placed.role,
            layer: placed.layer,
            expert: placed.expert,
            shape: shape.ok_or_else(|| invalid(format!("{} has no whole blocks", tensor.name)))?,
            storage: if placed.quantise { STORAGE } else { Storage::Raw(FloatType::Bf16) },
        })
    };
    model.tensors.iter().map(entry).collect()
}

fn metadata(model_type: &str, tied_embeddings: bool) -> io::Result<String> {
    let provenance = Provenance {
        tool: concat!("nf4pack ", env!("CARGO_PKG_VERSION")).to_owned(),
        model_type: model_type.to_owned(),
        tied_embeddings,
        encoder: "random".to_owned(),
        scales: "bf16".to_owned(),
        block_size: DEFAULT_BLOCK_SIZE,
        keep: None,
        quantize: None,
        dropped: Vec::new(),
        sources: Vec::new(),
    };
    Ok(provenance.to_json()?)
}

/// Fills `bytes` with random bytes: any codes. Returns the state for the next call.
pub(crate) fn random_bytes(bytes: &mut [u8], state: u64) -> u64 {
    masked(bytes, state, u64::MAX, 0)
}

/// Fills `bytes` with positive numbers near 1/64, whether they are taken for bfloat16 or for
/// float32.
pub(crate) fn random_scales(bytes: &mut [u8], state: u64) -> u64 {
    masked(bytes, state, 0x007f_007f_007f_007f, 0x3c80_3c80_3c80_3c80)
}

fn masked(bytes: &mut [u8], mut state: u64, mask: u64, set: u64) -> u64 {
    for group in bytes.chunks_mut(8) {
        state = state.wrapping_add(STEP);
        let random = (mix(state) & mask | set).to_le_bytes();
        group.copy_from_slice(&random[..group.len()]);
    }
    state
}
