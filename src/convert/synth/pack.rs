//! Packs of random codes in the shape of a real model: for benchmarks of what reads packs, where no
//! weight need mean anything.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::{CHUNK_LEN, ELEMENT_LEN, STEP, Shape, mix};
use crate::arch;
use crate::convert::parts;
use crate::convert::report::Progress;
use crate::convert::source::TensorInfo;
use crate::format::nf4::{DEFAULT_BLOCK_SIZE, ScaleType};
use crate::format::{Entry, FloatType, Layout, PieceCrc, Provenance, Section, SectionKind, Storage, crc32};
use crate::io::{AlignedBuf, write_all_at};

/// How projections are stored: the converter's default.
const STORAGE: Storage = Storage::Nf4 { scale_type: ScaleType::Bf16, block_size: DEFAULT_BLOCK_SIZE };

/// Writes a pack with the layers of `shape` to `path`, which must not exist: random codes under
/// bfloat16 scales, block size 64. What belongs to no layer (the embedding, the last norm) is left
/// out. Gives the length of the file. Each section is of its own random numbers, so that threads
/// (all of rayon's) change nothing; the file is synced at the end, as in [`super::write`].
///
/// # Errors
/// `Interrupted` where `progress` says so; `InvalidInput` where `shape` is none of a model, or a
/// projection ends within a block; otherwise what the operating system says.
pub fn write_pack(path: &Path, shape: &Shape, seed: u64, progress: &impl Progress) -> io::Result<u64> {
    write_entries(path, entries(shape)?, shape.layers as u32, seed, progress)
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
        role: crate::format::Role::DownProj,
        layer: Some(layer),
        expert: None,
        shape,
        storage: STORAGE,
    };
    write_entries(path, (0..layers).map(entry).collect(), layers, seed, progress)
}

fn write_entries(path: &Path, entries: Vec<Entry>, layers: u32, seed: u64, progress: &impl Progress) -> io::Result<u64> {
    let layout = Layout::new(entries, layers, metadata()?.len() as u64).map_err(io::Error::other)?;
    let (file, done) = (File::create_new(path)?, AtomicU64::new(0));
    progress.advance(0, layout.file_len());
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
    let front = layout.front(&crcs, 0, &metadata()?).map_err(io::Error::other)?;
    write_all_at(&file, &front, 0)?;
    file.sync_data()?;
    Ok(layout.file_len())
}

/// The tensors of the layers, each with its role.
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
    model.tensors.iter().filter(|placed| placed.layer.is_some()).map(entry).collect()
}

fn metadata() -> io::Result<String> {
    let provenance = Provenance {
        tool: concat!("nf4pack ", env!("CARGO_PKG_VERSION")).to_owned(),
        model_type: "qwen3".to_owned(),
        tied_embeddings: true,
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
