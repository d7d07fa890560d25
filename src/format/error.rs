//! What can be wrong with a pack. Every error is the file's fault, and says where, what was expected and what was found.

use super::layout::{MAJOR_VERSION, MAX_RANK};
use super::nf4::{BLOCK_SIZES, ScaleType};
use super::section::{ElementType, Kind};

/// Why bytes are not a pack that this crate reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shorter than a header.
    #[error("file too short for a pack: expected at least {expected} bytes, found {found}")]
    TooShort {
        /// Bytes of a header.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// Not a pack at all.
    #[error("not an nf4pack file: expected the magic bytes 89 4E 46 34 0D 0A 1A 0A at offset 0, found {found:02X?}")]
    Magic {
        /// The file's first eight bytes.
        found: [u8; 8],
    },
    /// Written by a later, incompatible version.
    #[error("format version {found}.x is not supported (this program reads {MAJOR_VERSION}.x): use a newer nf4pack")]
    MajorVersion {
        /// The file's major version.
        found: u16,
    },
    /// The header was damaged.
    #[error("header damaged: CRC at offset 124 expected {expected:08x}, found {found:08x}")]
    HeaderCrc {
        /// CRC computed from the header's bytes.
        expected: u32,
        /// CRC that the header holds.
        found: u32,
    },
    /// A header field has a value that version 1 does not allow.
    #[error("header field {field} at offset {offset}: expected {expected}, found {found}")]
    HeaderField {
        /// The field's name in the specification.
        field: &'static str,
        /// The field's offset in the file.
        offset: u64,
        /// The one value that fits.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// The file needs features that this crate does not have.
    #[error("required feature bits {found:#x} are not known (known: {known:#x}): use a newer nf4pack")]
    RequiredFeatures {
        /// The unknown bits.
        found: u64,
        /// All bits that this crate knows.
        known: u64,
    },
    /// Truncated, or with bytes after its end.
    #[error("file is {found} bytes long, its header says {expected}: it is truncated or has trailing bytes")]
    FileLength {
        /// Length in the header.
        expected: u64,
        /// Length of the file.
        found: u64,
    },
    /// More of something than a reader accepts.
    #[error("too many {what}: {found}, at most {limit} are accepted")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much is accepted.
        limit: u64,
        /// How much the file claims.
        found: u64,
    },
    /// The index was damaged.
    #[error("index damaged: CRC expected {expected:08x}, found {found:08x}")]
    IndexCrc {
        /// CRC in the header.
        expected: u32,
        /// CRC of the bytes.
        found: u32,
    },
    /// The metadata was damaged.
    #[error("metadata damaged: CRC expected {expected:08x}, found {found:08x}")]
    MetadataCrc {
        /// CRC in the header.
        expected: u32,
        /// CRC of the bytes.
        found: u32,
    },
    /// The metadata is not the JSON object that the specification asks for.
    #[error("metadata at offset {offset} is not valid: {reason}")]
    Metadata {
        /// Where the metadata starts.
        offset: u64,
        /// What the JSON parser said, with its line and column.
        reason: String,
    },
    /// One section's record does not fit.
    #[error("section {index} ({name:?}): {fault}")]
    Section {
        /// The section's place in the index, from 0.
        index: u64,
        /// The section's name, as far as it could be read.
        name: String,
        /// What is wrong with it.
        fault: SectionFault,
    },
}

impl Error {
    pub(crate) fn section(index: u64, name: &str, fault: SectionFault) -> Self {
        Self::Section { index, name: name.to_owned(), fault }
    }
}

/// What is wrong with a section's record or with its place among the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each field is named in its variant's message")]
pub enum SectionFault {
    /// A kind that may not be skipped.
    #[error("unknown section kind {found}, not marked as optional: use a newer nf4pack")]
    UnknownKind { found: u16 },
    /// Flag or reserved bits that version 1 leaves at zero.
    #[error("reserved bits are set: flags {flags:#x}, reserved {reserved:#x}, expected 0")]
    Reserved { flags: u16, reserved: u32 },
    /// A role that this crate does not know.
    #[error("unknown role {found}")]
    UnknownRole { found: u16 },
    /// An element type that this crate does not know.
    #[error("unknown element type {found}")]
    UnknownElement { found: u16 },
    /// A scale type that this crate does not know.
    #[error("unknown scale type {found}")]
    UnknownScaleType { found: u16 },
    /// An element type that does not go with the kind or the scale type.
    #[error("element type: expected {}, found {}", expected.name(), found.name())]
    Element { expected: ElementType, found: ElementType },
    /// A raw tensor that is not made of floats.
    #[error("element type of a raw tensor: expected F32, F16 or BF16, found {}", found.name())]
    RawElement { found: ElementType },
    /// Scales where the kind has none, or none where it has.
    #[error("scale type {found:?} does not go with kind {kind:?}")]
    ScaleTypeForKind { kind: Kind, found: Option<ScaleType> },
    /// A block size outside the list, or one where there are no blocks.
    #[error("block size {found}: expected one of {BLOCK_SIZES:?} for quantised tensors, 0 for others")]
    BlockSize { found: u32 },
    /// A rank outside 1..=4 (files: not 1).
    #[error("rank {found}: expected 1 to {MAX_RANK}, 1 for a file")]
    Rank { found: u16 },
    /// Dimensions past the rank that are not zero, or a product past 2^63.
    #[error("shape {found:?} of rank {rank}: unused dimensions must be 0 and the product at most 2^63")]
    Shape { found: [u64; MAX_RANK], rank: u16 },
    /// A tensor without elements.
    #[error("tensor has no elements")]
    Empty,
    /// A file that claims to belong to a layer.
    #[error("a file must not belong to a layer, found layer {found}")]
    FileInLayer { found: u32 },
    /// A payload length that the shape does not give.
    #[error("payload length: expected {expected:?} bytes for its shape, found {found}")]
    Length { expected: Option<u64>, found: u64 },
    /// A name that does not start where the one before ended.
    #[error("name offset: expected {expected}, found {found}")]
    NameOffset { expected: u64, found: u64 },
    /// A name without a character, or a longer one than accepted.
    #[error("name length {found}: expected 1 to {limit} bytes")]
    NameLength { limit: u64, found: u64 },
    /// A name that is not UTF-8, or that runs past the name table.
    #[error("name at {offset} of the name table is cut off or not UTF-8")]
    NameBytes { offset: u64 },
    /// A name that another section has.
    #[error("name is used twice")]
    DuplicateName,
    /// A role, layer and expert that another tensor has.
    #[error("a second tensor has the same layer, role and expert")]
    DuplicateRole,
    /// A section that should stand earlier.
    #[error("sections are out of order: this one belongs before section {}", .index - 1)]
    Order { index: u64 },
    /// A layer that was left out, or layers past the header's count.
    #[error("layer: expected {expected}, found {found} (the header says {count} layers)")]
    Layer { expected: u64, found: u64, count: u64 },
    /// Codes without a scale table behind them.
    #[error("codes are not followed by their scales")]
    ScalesMissing,
    /// Scales that do not belong to the codes before them.
    #[error("scales do not follow codes of the same layer, role, expert, shape, block size, scale type and name")]
    ScalesMismatch,
    /// A payload that starts inside the one before.
    #[error("payload overlaps what lies before it: expected offset {expected}, found {found}")]
    Overlap { expected: u64, found: u64 },
    /// A payload that starts at an offset that its alignment forbids.
    #[error("payload is misaligned: expected offset {expected}, found {found}")]
    Misaligned { expected: u64, found: u64 },
    /// A payload that leaves a gap larger than alignment needs.
    #[error("hole before the payload: expected offset {expected}, found {found}")]
    Hole { expected: u64, found: u64 },
    /// A payload that ends past the file's end.
    #[error("payload ends past the file: offset {offset}, length {len}, file {file_len} bytes")]
    PastEnd { offset: u64, len: u64, file_len: u64 },
}

/// Damage in a section's payload, found by reading it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each field is named in its variant's message")]
pub enum PayloadFault {
    /// Bytes changed since the pack was written.
    #[error("payload CRC: expected {expected:08x}, found {found:08x}")]
    Crc { expected: u32, found: u32 },
    /// A scale that is NaN or infinite.
    #[error("scale {index} is {found}, not a finite number")]
    NonFiniteScale { index: u64, found: f32 },
    /// A negative scale in a pack whose header says that it has none.
    #[error("scale {index} is {found}, negative, and the header's negative-scales bit is not set")]
    NegativeScale { index: u64, found: f32 },
    /// Codes after the last weight that are not the zero code.
    #[error("padding code {index} is {found}, expected 7")]
    CodePadding { index: u64, found: u8 },
    /// Bytes between sections that are not zero.
    #[error("padding byte at offset {offset} is {found:#04x}, expected 0")]
    Padding { offset: u64, found: u8 },
}
