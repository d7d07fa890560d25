//! The errors of an invalid pack.

use thiserror::Error;

/// A part of a pack with its own offset and checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// The fixed header.
    Header,
    /// Section records and names.
    Index,
    /// The provenance record.
    Metadata,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Index => "index",
            Self::Metadata => "metadata",
        })
    }
}

/// A field of the header or of a section record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each is the field of the specification with that name")]
pub enum Field {
    IndexOffset,
    IndexLength,
    SectionCount,
    NameCount,
    NameLength,
    MetadataOffset,
    MetadataLength,
    LayerCount,
    Kind,
    Flags,
    Role,
    ElementType,
    ScaleType,
    Rank,
    BlockSize,
    Layer,
    Expert,
    Name,
    Offset,
    Length,
    FileLength,
    Shape,
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::IndexOffset => "index offset",
            Self::IndexLength => "index length",
            Self::SectionCount => "section count",
            Self::NameCount => "name count",
            Self::NameLength => "name length",
            Self::MetadataOffset => "metadata offset",
            Self::MetadataLength => "metadata length",
            Self::LayerCount => "layer count",
            Self::Kind => "kind",
            Self::Flags => "flags",
            Self::Role => "role",
            Self::ElementType => "element type",
            Self::ScaleType => "scale type",
            Self::Rank => "rank",
            Self::BlockSize => "block size",
            Self::Layer => "layer",
            Self::Expert => "expert",
            Self::Name => "name",
            Self::Offset => "offset",
            Self::Length => "length",
            Self::FileLength => "length of an embedded file",
            Self::Shape => "shape",
        })
    }
}

/// Why bytes are not a valid pack. Offsets count from the start of the file; sections count from 0.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file ends inside its header, index or metadata.
    #[error("the file ends inside its {part}: {expected} bytes needed, {found} found")]
    TooShort {
        /// The truncated part.
        part: Part,
        /// The minimum length of the file.
        expected: u64,
        /// The length of the file.
        found: u64,
    },
    /// The first eight bytes are not those of a pack.
    #[error("not a pack: the file starts with \"{}\", not \"{}\"", found.escape_ascii(), super::layout::MAGIC.escape_ascii())]
    BadMagic {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// A major version that this reader does not know.
    #[error("format version {major}.{minor} at offset 8 is not supported (expected {}.x)", super::layout::MAJOR_VERSION)]
    UnsupportedVersion {
        /// Major version of the file.
        major: u16,
        /// Minor version of the file.
        minor: u16,
    },
    /// The file needs features that this reader does not have.
    #[error("required features {bits:#x} at offset 16 are unknown (known: {:#x})", super::layout::KNOWN_FEATURES)]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
    },
    /// The header's file length is not the file's: truncated, or bytes after the end.
    #[error("the file has {found} bytes, its header says {expected}")]
    FileLength {
        /// The length in the header (or the last section's end).
        expected: u64,
        /// The length of the file.
        found: u64,
    },
    /// A checksum of the header, index or metadata does not match.
    #[error("checksum of the {part} at offset {offset}: expected {expected:08x}, found {found:08x}")]
    Checksum {
        /// What is damaged.
        part: Part,
        /// Where it starts.
        offset: u64,
        /// The stored CRC-32.
        expected: u32,
        /// The CRC-32 of the bytes.
        found: u32,
    },
    /// A reserved byte is not zero.
    #[error("reserved byte at offset {offset}: expected 0, found {found}")]
    Reserved {
        /// Where it is.
        offset: u64,
        /// Its value.
        found: u8,
    },
    /// A count or length exceeds a limit of the format.
    #[error("{field} at offset {offset}: expected at most {limit}, found {found}")]
    Limit {
        /// The field.
        field: Field,
        /// The offset of the field.
        offset: u64,
        /// The limit.
        limit: u64,
        /// What the file has.
        found: u64,
    },
    /// A header field contradicts the rest of the file.
    #[error("{field} in the header at offset {offset}: expected {expected}, found {found}")]
    Header {
        /// The field.
        field: Field,
        /// Where the field is.
        offset: u64,
        /// The only valid value.
        expected: u64,
        /// Its value.
        found: u64,
    },
    /// A name's end lies before its start or past the table.
    #[error("end of name {name} at offset {offset}: expected {min} to {max}, found {found}")]
    NameRange {
        /// Number of the name.
        name: u64,
        /// Where its end is given.
        offset: u64,
        /// Smallest valid end.
        min: u64,
        /// Largest valid end.
        max: u64,
        /// The end that the file gives.
        found: u64,
    },
    /// A name is not UTF-8.
    #[error("name {name} is not UTF-8 (offset {offset})")]
    NameNotUtf8 {
        /// Number of the name.
        name: u64,
        /// Where the invalid bytes start.
        offset: u64,
    },
    /// Two names are the same.
    #[error("name {name} (offset {offset}) is the same as name {first}: {text:?}")]
    NameDuplicate {
        /// Number of the second one.
        name: u64,
        /// Where its text is.
        offset: u64,
        /// Number of the first one.
        first: u64,
        /// The name.
        text: String,
    },
    /// An embedded file's name is not a plain file name.
    #[error(
        "section {section} (record field at offset {offset}): file name {text:?}, expected only A-Z a-z 0-9 . _ - and no leading dot"
    )]
    FileName {
        /// Number of the section.
        section: u64,
        /// Where the record's name field is.
        offset: u64,
        /// The name.
        text: String,
    },
    /// A section field has an unknown value.
    #[error("section {section}: {field} at offset {offset}: expected a known value, found {found}")]
    Unknown {
        /// Number of the section.
        section: u64,
        /// The field.
        field: Field,
        /// Where the field is.
        offset: u64,
        /// Its value.
        found: u64,
    },
    /// A dimension (or the length of an optional section) is zero.
    #[error("section {section}: {field} at offset {offset}: expected at least 1, found 0")]
    Zero {
        /// Number of the section.
        section: u64,
        /// The field.
        field: Field,
        /// Where the field is.
        offset: u64,
    },
    /// A section field contradicts the rest of the file.
    #[error("section {section}: {field} at offset {offset}: expected {expected}, found {found}")]
    Mismatch {
        /// Number of the section.
        section: u64,
        /// The field.
        field: Field,
        /// Where the field is.
        offset: u64,
        /// The only valid value.
        expected: u64,
        /// Its value.
        found: u64,
    },
    /// The byte count of a section's shape overflows 64 bits.
    #[error("section {section}: the size of its shape {shape:?} overflows")]
    ShapeOverflow {
        /// Number of the section.
        section: u64,
        /// Its shape.
        shape: [u64; 4],
    },
    /// A section's end is past the largest file offset.
    #[error("section {section}: offset {offset} plus length {length} overflows")]
    OffsetOverflow {
        /// Number of the section.
        section: u64,
        /// Where it starts.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// Sections are not in the order of the specification, or one occurs twice.
    #[error("section {section} is out of order (record at offset {offset})")]
    Order {
        /// Number of the section.
        section: u64,
        /// Where its record is.
        offset: u64,
    },
    /// Codes without a scale table right behind, or a scale table without codes.
    #[error("section {section} (record at offset {offset}): codes and scales are not a pair")]
    Unpaired {
        /// Number of the section.
        section: u64,
        /// Where its record is.
        offset: u64,
    },
    /// A layer below the layer count has no section.
    #[error("layer {layer} has no section (found at the record at offset {offset})")]
    LayerMissing {
        /// The layer.
        layer: u64,
        /// Where the next layer's first record is, or the end of the records.
        offset: u64,
    },
    /// The metadata is not UTF-8.
    #[error("the metadata is not UTF-8 (offset {offset})")]
    MetadataNotUtf8 {
        /// Where the invalid bytes start.
        offset: u64,
    },
    /// A section's payload does not have the checksum of its record.
    #[error(
        "section {section} ({name}, {length} bytes at offset {offset}): checksum expected {expected:08x}, found {found:08x}"
    )]
    PayloadChecksum {
        /// Number of the section.
        section: u64,
        /// Its kind and name.
        name: String,
        /// Where the payload starts.
        offset: u64,
        /// Bytes of the payload.
        length: u64,
        /// The stored CRC-32.
        expected: u32,
        /// The CRC-32 of the payload.
        found: u32,
    },
    /// A scale, as decoded, is a NaN or an infinity.
    #[error("section {section} ({name}, offset {offset}): scale {scale} is {found}, expected a finite number")]
    ScaleNotFinite {
        /// Number of the section.
        section: u64,
        /// Its kind and name.
        name: String,
        /// Where the payload starts.
        offset: u64,
        /// Number of the scale.
        scale: u64,
        /// Its value, as text, since a NaN is not equal to itself.
        found: String,
    },
    /// A scale is negative, but the header does not say that scales may be.
    #[error("section {section} ({name}, offset {offset}): scale {scale} is negative, and feature bit 0 is not set")]
    ScaleNegative {
        /// Number of the section.
        section: u64,
        /// Its kind and name.
        name: String,
        /// Where the payload starts.
        offset: u64,
        /// Number of the scale.
        scale: u64,
    },
    /// The codes that pad the last block are not all 7.
    #[error("section {section} ({name}): padding code of element {element} at offset {offset}: expected 7, found {found}")]
    CodePadding {
        /// Number of the section.
        section: u64,
        /// Its kind and name.
        name: String,
        /// Number of the element past the tensor's end.
        element: u64,
        /// Where its byte is.
        offset: u64,
        /// The code.
        found: u8,
    },
    /// A byte between two sections is not zero.
    #[error("padding byte at offset {offset}: expected 0, found {found}")]
    Padding {
        /// Where it is.
        offset: u64,
        /// Its value.
        found: u8,
    },
}
