//! Pure: which tensor becomes which sections, and how long the pack will be, to the byte. Nothing
//! is read or written here.

use thiserror::Error;

use super::options::Options;
use super::source::{Checkpoint, TensorInfo};
use crate::arch::place::{Model, Placed};
use crate::format::nf4::{BLOCK_SIZES, ScaleType};
use crate::format::{Entry, FormatError, Layout, Provenance, Role, SectionKind, Shape, SourceRecord, Storage};

/// What becomes of one source tensor; the numbers are those of sections of the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Encoded into two sections.
    Quantise {
        /// The section of its codes; its scales are the next one.
        codes: usize,
    },
    /// Copied byte for byte.
    Copy {
        /// Its section.
        section: usize,
    },
    /// Left out: it repeats another tensor.
    Drop,
}

/// Everything about a pack but its payloads and their checksums.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The place of every section.
    pub layout: Layout,
    /// What becomes of each of [`Checkpoint::tensors`].
    pub actions: Vec<Action>,
    /// The metadata, still without the hashes of the weights files.
    pub provenance: Provenance,
    /// Weights that are quantised.
    pub weights: u64,
}

/// Why a checkpoint cannot be converted as asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Not one of the block sizes of the format.
    #[error("block size {found} is not one of {BLOCK_SIZES:?}")]
    BlockSize {
        /// The size asked for.
        found: u32,
    },
    /// A pattern that matches nothing is most likely a mistake.
    #[error("{option} {pattern:?} matches no {what}")]
    NoMatch {
        /// `--keep` or `--quantize`.
        option: &'static str,
        /// The pattern.
        pattern: String,
        /// What it was compared with.
        what: &'static str,
    },
    /// The pack would break the format's own rules.
    #[error("this checkpoint does not fit the format")]
    Format(#[from] FormatError),
    /// The provenance record cannot be written as JSON.
    #[error("the provenance record cannot be written")]
    Provenance(#[from] serde_json::Error),
}

/// A SHA-256 that is not known yet; the final one has the same length, so that the plan's lengths
/// are final.
const PENDING_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";

impl Plan {
    /// Plans the pack of a checkpoint whose tensors have been placed by `model`.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub(crate) fn new(checkpoint: &Checkpoint, model: &Model, options: &Options) -> Result<Self, PlanError> {
        if !BLOCK_SIZES.contains(&options.block_size) {
            return Err(PlanError::BlockSize { found: options.block_size });
        }
        check_patterns(checkpoint, model, options)?;
        let mut entries = files(checkpoint)?;
        for placed in &model.tensors {
            entries.push(entry(&checkpoint.tensors[placed.tensor], placed, options)?);
        }
        let provenance = provenance(checkpoint, model, options);
        let layout = Layout::new(entries, model.config.layers, provenance.to_json()?.len() as u64)?;
        let actions = actions(checkpoint, &layout);
        let quantised = layout.sections().iter().filter(|s| s.kind == Some(SectionKind::Codes));
        let weights = quantised.map(|s| s.shape.elements()).sum();
        Ok(Self { layout, actions, provenance, weights })
    }
}

/// Norms and biases are never quantised.
fn is_matrix(tensor: &TensorInfo) -> bool {
    tensor.shape.len() >= 2
}

/// Whether a tensor is quantised: a projection unless kept, or anything that `--quantize` names.
fn is_quantised(tensor: &TensorInfo, placed: &Placed, options: &Options) -> bool {
    let matches = |pattern: &Option<regex::Regex>| pattern.as_ref().is_some_and(|p| p.is_match(&tensor.name));
    (placed.quantise || (is_matrix(tensor) && matches(&options.quantize))) && !matches(&options.keep)
}

fn check_patterns(checkpoint: &Checkpoint, model: &Model, options: &Options) -> Result<(), PlanError> {
    let names = |projections: bool| {
        let placed = model.tensors.iter().filter(move |p| !projections || p.quantise);
        placed.map(|p| &checkpoint.tensors[p.tensor]).filter(|t| is_matrix(t)).map(|t| t.name.as_str())
    };
    let keepable = options.quantize.is_none();
    let any = |pattern: &regex::Regex, projections| names(projections).any(|name| pattern.is_match(name));
    let unmatched = |option, pattern: &regex::Regex, what| {
        Err(PlanError::NoMatch { option, pattern: pattern.as_str().to_owned(), what })
    };
    match (&options.keep, &options.quantize) {
        (Some(keep), _) if !any(keep, keepable) => unmatched("--keep", keep, "projection"),
        (_, Some(quantize)) if !any(quantize, false) => {
            unmatched("--quantize", quantize, "tensor of two or more dimensions")
        }
        _ => Ok(()),
    }
}

fn files(checkpoint: &Checkpoint) -> Result<Vec<Entry>, PlanError> {
    let entry = |(name, bytes): &(String, Vec<u8>)| {
        let shape = shape_of(&[bytes.len() as u64])?;
        Ok(Entry { name: name.clone(), role: Role::Other, layer: None, expert: None, shape, storage: Storage::File })
    };
    checkpoint.side_files.iter().map(entry).collect()
}

fn shape_of(dims: &[u64]) -> Result<Shape, FormatError> {
    let mut padded = [0; 4];
    padded.iter_mut().zip(dims).for_each(|(to, from)| *to = *from);
    Shape::new(dims).ok_or(FormatError::ShapeOverflow { section: 0, shape: padded })
}

fn entry(tensor: &TensorInfo, placed: &Placed, options: &Options) -> Result<Entry, PlanError> {
    let storage = if is_quantised(tensor, placed, options) {
        Storage::Nf4 { scale_type: options.scale_type, block_size: options.block_size }
    } else {
        Storage::Raw(tensor.float_type)
    };
    Ok(Entry {
        name: tensor.name.clone(),
        role: placed.role,
        layer: placed.layer,
        expert: placed.expert,
        shape: shape_of(&tensor.shape)?,
        storage,
    })
}

fn provenance(checkpoint: &Checkpoint, model: &Model, options: &Options) -> Provenance {
    let placed: std::collections::HashSet<usize> = model.tensors.iter().map(|p| p.tensor).collect();
    let dropped = checkpoint.tensors.iter().enumerate().filter(|(i, _)| !placed.contains(i));
    let weights = checkpoint.files.iter().map(|f| SourceRecord {
        file: f.name.clone(),
        bytes: f.length,
        sha256: PENDING_HASH.to_owned(),
    });
    let small_files = checkpoint.index.iter().chain(&checkpoint.side_files).map(|(name, bytes)| SourceRecord {
        file: name.clone(),
        bytes: bytes.len() as u64,
        sha256: super::hash::sha256_hex(bytes),
    });
    Provenance {
        tool: concat!("nf4pack ", env!("CARGO_PKG_VERSION")).to_owned(),
        model_type: model.config.family.model_type.to_owned(),
        tied_embeddings: model.config.tied,
        encoder: options.encoder.name().to_owned(),
        scales: scale_type_name(options.scale_type).to_owned(),
        block_size: options.block_size,
        keep: options.keep.as_ref().map(|p| p.as_str().to_owned()),
        quantize: options.quantize.as_ref().map(|p| p.as_str().to_owned()),
        dropped: dropped.map(|(_, t)| &t.name).chain(checkpoint.unstorable.iter().map(|t| &t.name)).cloned().collect(),
        sources: weights.chain(small_files).collect(),
    }
}

/// The name of a scale type in the metadata and on the command line.
pub const fn scale_type_name(scale_type: ScaleType) -> &'static str {
    match scale_type {
        ScaleType::F32 => "f32",
        ScaleType::Bf16 => "bf16",
        ScaleType::Dq8 => "dq8",
    }
}

/// The action of each tensor, found by name: names are unique in a checkpoint and in a layout.
fn actions(checkpoint: &Checkpoint, layout: &Layout) -> Vec<Action> {
    let sections = layout.sections().iter().enumerate();
    let by_name: std::collections::HashMap<&str, Action> = sections
        .filter_map(|(number, section)| {
            let action = match section.kind? {
                SectionKind::Codes => Action::Quantise { codes: number },
                SectionKind::Raw => Action::Copy { section: number },
                SectionKind::Scales | SectionKind::File => return None,
            };
            Some((layout.entries()[section.name as usize].name.as_str(), action))
        })
        .collect();
    let action = |t: &TensorInfo| by_name.get(t.name.as_str()).copied().unwrap_or(Action::Drop);
    checkpoint.tensors.iter().map(action).collect()
}
