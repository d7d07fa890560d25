//! The weights that an adapter is added to: a pack's, or its checkpoint's.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;

use super::error::MergeError;
use crate::convert::Progress;
use crate::convert::hash::FileHash;
use crate::convert::source::{Checkpoint, SourceError, SourceFile, TensorInfo};
use crate::dequant;
use crate::export::{WriteError, writer};
use crate::format::nf4::Nf4Tensor;
use crate::format::{FloatType, Provenance, Role, SectionKind};
use crate::io::access::Readers;
use crate::io::{AlignedBuf, read_exact_at};
use crate::lora::adapter;
use crate::lora::config::AdapterLayout;
use crate::source::{PackSource, TensorBuf};
use crate::verify::{Mismatch, widen};

/// Bytes that are hashed at a time.
const HASH_LEN: usize = 1 << 20;

/// The weights that an adapter is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base<'a> {
    /// The pack's own, decoded: what the adapter was trained on.
    Dequantised,
    /// Those of the checkpoint that the pack was made from.
    Checkpoint {
        /// A snapshot folder, or one safetensors file.
        path: &'a Path,
        /// A config.json to use instead of the checkpoint's.
        config: Option<&'a Path>,
    },
}

/// What is merged.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// The pack.
    pub pack: &'a PackSource,
    /// The adapter's folder.
    pub adapter: &'a Path,
    /// What the adapter is added to.
    pub base: Base<'a>,
}

/// A tensor of the base, and its part of the model.
pub(super) struct BaseTensor<'a> {
    pub(super) name: &'a str,
    pub(super) dims: &'a [u64],
    pub(super) role: Role,
    pub(super) layer: Option<u32>,
    weights: Weights<'a>,
}

#[derive(Clone, Copy)]
enum Weights<'a> {
    /// The quantised tensor of a pack whose codes are the section of this number.
    Quantized(&'a PackSource, usize),
    /// The tensor of a pack, of this type, that is the section of this number.
    Raw(&'a PackSource, usize, FloatType),
    File(&'a Checkpoint, &'a TensorInfo),
}

impl BaseTensor<'_> {
    /// Number of weights.
    pub(super) fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// The tensor, ready to be read piece by piece: one of a pack is in `buf`, checked.
    ///
    /// # Errors
    /// If the pack cannot be read, or is damaged.
    pub(super) fn load<'b>(&'b self, buf: &'b mut TensorBuf) -> Result<Loaded<'b>, MergeError> {
        Ok(match self.weights {
            Weights::Quantized(pack, number) => {
                Loaded::Quantized(self.name, pack.quantized(number, buf).map_err(WriteError::from)?)
            }
            Weights::Raw(pack, number, float_type) => {
                Loaded::Raw(float_type, pack.raw(number, buf).map_err(WriteError::from)?)
            }
            Weights::File(checkpoint, tensor) => Loaded::File(checkpoint, tensor),
        })
    }
}

/// A loaded tensor.
pub(super) enum Loaded<'a> {
    Quantized(&'a str, Nf4Tensor<'a>),
    Raw(FloatType, &'a [u8]),
    File(&'a Checkpoint, &'a TensorInfo),
}

impl Loaded<'_> {
    /// The bytes of a tensor that is bfloat16 already.
    pub(super) fn bfloat16(&self) -> Result<Option<Vec<u8>>, MergeError> {
        match self {
            Self::Raw(FloatType::Bf16, bytes) => Ok(Some(bytes.to_vec())),
            Self::File(checkpoint, tensor) if tensor.float_type == FloatType::Bf16 => {
                let mut bytes = writer::zeros(&tensor.name, tensor.length / 2, FloatType::Bf16)?;
                checkpoint.read(tensor, 0, &mut bytes)?;
                Ok(Some(bytes))
            }
            _ => Ok(None),
        }
    }

    /// Weights `first..first + len`, which exist, in float32, exactly.
    pub(super) fn read(&self, first: u64, len: usize) -> Result<Vec<f32>, MergeError> {
        let mut out = Vec::new();
        match self {
            Self::Quantized(name, tensor) => {
                out.resize(len, 0.0);
                // A validated pack always decodes: the only error is a range outside the tensor.
                let no_number = |_| MergeError::NotFinite { tensor: (*name).to_owned(), index: first, value: f64::NAN };
                dequant::dequantize(tensor, first, &mut out).map_err(no_number)?;
            }
            Self::Raw(float_type, bytes) => {
                let size = float_type.size();
                let bytes = bytes.get(first as usize * size..(first as usize + len) * size);
                widen(*float_type, bytes.unwrap_or_default(), &mut out);
            }
            Self::File(checkpoint, tensor) => {
                let size = tensor.float_type.size();
                let mut bytes = vec![0; len * size];
                checkpoint.read(tensor, first * size as u64, &mut bytes)?;
                widen(tensor.float_type, &bytes, &mut out);
            }
        }
        Ok(out)
    }
}

/// All tensors of a pack, the quantised ones first.
fn of_pack(pack: &PackSource) -> impl Iterator<Item = BaseTensor<'_>> {
    let index = pack.index();
    let of_kind = move |kind| index.tensors().filter(move |(_, section)| section.kind == Some(kind));
    let tensors = of_kind(SectionKind::Codes).chain(of_kind(SectionKind::Raw));
    tensors.map(move |(number, section)| BaseTensor {
        name: index.name(section),
        dims: section.shape.dims(),
        role: section.role,
        layer: section.layer,
        weights: match section.element_type.float_type() {
            Some(float_type) => Weights::Raw(pack, number, float_type),
            None => Weights::Quantized(pack, number),
        },
    })
}

/// The tensors of the snapshot: the pack's, or those of its checkpoint if one is given.
pub(super) fn tensors<'a>(pack: &'a PackSource, checkpoint: Option<&'a Checkpoint>) -> Vec<BaseTensor<'a>> {
    let Some(checkpoint) = checkpoint else { return of_pack(pack).collect() };
    let places: HashMap<&str, (Role, Option<u32>)> = of_pack(pack).map(|t| (t.name, (t.role, t.layer))).collect();
    let tensor = |tensor: &'a TensorInfo| {
        let (role, layer) = places.get(tensor.name.as_str()).copied().unwrap_or((Role::Other, None));
        let weights = Weights::File(checkpoint, tensor);
        BaseTensor { name: &tensor.name, dims: &tensor.shape, role, layer, weights }
    };
    checkpoint.tensors.iter().map(tensor).collect()
}

/// Those who may read the pack, the adapter and the checkpoint.
///
/// # Errors
/// [`WriteError::Source`].
pub(super) fn readers(sources: &Sources<'_>, checkpoint: Option<&Checkpoint>) -> Result<Readers, WriteError> {
    let mut readers = writer::readers(sources.pack)?;
    let adapter = [adapter::WEIGHTS, adapter::CONFIG].map(|name| sources.adapter.join(name));
    let base = checkpoint.into_iter().flat_map(|checkpoint| checkpoint.files.iter().map(|file| file.path.clone()));
    for path in adapter.into_iter().chain(base) {
        match path.metadata() {
            Ok(source) => readers.add(&source),
            Err(source) => return Err(WriteError::Source { path, source }),
        }
    }
    Ok(readers)
}

/// Checks that the pack has every projection that an adapter of this layout changes.
///
/// # Errors
/// [`MergeError::NoProjection`].
pub(super) fn check_projections(pack: &PackSource, layout: &AdapterLayout) -> Result<(), MergeError> {
    let found: HashMap<(Option<u32>, Role), &[u64]> = of_pack(pack).map(|t| ((t.layer, t.role), t.dims)).collect();
    for (layer, role, place) in layout.places() {
        let (outputs, inputs) = (place.outputs, place.inputs);
        if found.get(&(Some(layer), role)) != Some(&[u64::from(outputs), u64::from(inputs)].as_slice()) {
            return Err(MergeError::NoProjection { layer, role, outputs, inputs });
        }
    }
    Ok(())
}

/// Opens the checkpoint that `pack` was made from.
///
/// # Errors
/// If it cannot be read, or its tensors differ from the pack's.
pub(super) fn open(path: &Path, config: Option<&Path>, pack: &PackSource) -> Result<Checkpoint, MergeError> {
    let checkpoint = Checkpoint::open(path, config)?;
    match mismatch(&checkpoint, pack) {
        Some(mismatch) => Err(MergeError::OtherBase { path: path.to_owned(), mismatch }),
        None => Ok(checkpoint),
    }
}

/// The first tensor that only one of the two has, or that differs in shape.
fn mismatch(checkpoint: &Checkpoint, pack: &PackSource) -> Option<Mismatch> {
    let mut missing: HashMap<&str, &[u64]> = of_pack(pack).map(|t| (t.name, t.dims)).collect();
    let dropped = Provenance::from_json(pack.index().metadata()).map(|p| p.dropped).unwrap_or_default();
    for TensorInfo { name, shape, .. } in &checkpoint.tensors {
        match missing.remove(name.as_str()) {
            Some(dims) if dims != shape => {
                let (expected, found) = (format!("{shape:?}"), format!("{dims:?}"));
                return Some(Mismatch::Shape { name: name.clone(), expected, found });
            }
            None if !dropped.contains(name) => return Some(Mismatch::NotInPack { name: name.clone() }),
            _ => {}
        }
    }
    // The smallest name, so that the message does not depend on the order of a hash map.
    missing.into_keys().min().map(|name| Mismatch::NotInCheckpoint { name: name.to_owned() })
}

/// The weights files that differ, by length and SHA-256, from the files that the pack was made
/// from. A pack of another program may have no such record; then all files count as different.
///
/// # Errors
/// If a file cannot be read, and [`WriteError::Cancelled`].
pub(super) fn other_files(
    checkpoint: &Checkpoint,
    pack: &PackSource,
    progress: &dyn Progress,
) -> Result<Vec<String>, MergeError> {
    let sources = Provenance::from_json(pack.index().metadata()).map(|p| p.sources).unwrap_or_default();
    let differs = |file: &SourceFile| {
        let same_length = sources.iter().find(|s| s.file == file.name && s.bytes == file.length);
        let Some(source) = same_length else { return Ok(true) };
        Ok::<_, MergeError>(sha256(file, progress)? != source.sha256)
    };
    let results: Vec<bool> = checkpoint.files.par_iter().map(differs).collect::<Result<_, _>>()?;
    let names = checkpoint.files.iter().zip(results).filter(|(_, differs)| *differs);
    Ok(names.map(|(file, _)| file.name.clone()).collect())
}

fn sha256(file: &SourceFile, progress: &dyn Progress) -> Result<String, MergeError> {
    let mut hash = FileHash::default();
    let mut buf = AlignedBuf::new(HASH_LEN);
    let mut from = 0;
    while from < file.length {
        if progress.cancelled() {
            return Err(WriteError::Cancelled.into());
        }
        let len = (file.length - from).min(HASH_LEN as u64);
        let bytes = buf.first_mut(len as usize);
        let error = |source| SourceError::Io { path: file.path.clone(), source };
        read_exact_at(&file.file, bytes, from).map_err(error)?;
        hash.update(bytes);
        from += len;
    }
    Ok(hash.hex())
}
