//! The fixed header (spec section 2): encode, decode, and the checks within the header.

use super::checksum::crc32;
use super::error::{Field, FormatError, Part};
use super::layout::{
    self, GROUP_ALIGN, HEADER_LEN, Limits, NAME_END_LEN, RECORD_LEN, SECTION_ALIGN, align_up, header as at,
};

/// The header's fields, apart from the magic, the reserved bytes and its own checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Minor version of the file; the major version is [`layout::MAJOR_VERSION`].
    pub minor_version: u16,
    /// Bits that a reader must understand.
    pub required_features: u64,
    /// Bits that a reader may ignore.
    pub optional_features: u64,
    /// Length of the whole file in bytes.
    pub file_len: u64,
    /// Length of the index in bytes; it starts right behind the header.
    pub index_len: u64,
    /// Number of section records in the index.
    pub section_count: u64,
    /// Number of names in the index.
    pub name_count: u64,
    /// Where the metadata starts.
    pub metadata_offset: u64,
    /// Length of the metadata in bytes.
    pub metadata_len: u64,
    /// CRC-32 of the index.
    pub index_crc: u32,
    /// CRC-32 of the metadata.
    pub metadata_crc: u32,
    /// Number of layers of the model.
    pub layer_count: u32,
}

/// Reads the two bytes at `offset`; 0 past the end (callers have checked the length).
pub(super) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes.get(offset..offset + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

/// Reads the four bytes at `offset`; 0 past the end.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Reads the eight bytes at `offset`; 0 past the end.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Fails on the first byte of `range` (of `bytes`, which starts at `base` in the file) that is not
/// zero.
pub(super) fn check_reserved(bytes: &[u8], range: std::ops::Range<usize>, base: u64) -> Result<(), FormatError> {
    let start = range.start;
    match bytes.get(range).unwrap_or_default().iter().position(|&b| b != 0) {
        None => Ok(()),
        Some(i) => Err(FormatError::Reserved { offset: base + (start + i) as u64, found: bytes[start + i] }),
    }
}

impl Header {
    /// Encodes the header, checksum included.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        let mut put = |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(at::MAGIC, &layout::MAGIC);
        put(at::MAJOR, &layout::MAJOR_VERSION.to_le_bytes());
        put(at::MINOR, &self.minor_version.to_le_bytes());
        put(at::REQUIRED, &self.required_features.to_le_bytes());
        put(at::OPTIONAL, &self.optional_features.to_le_bytes());
        put(at::FILE_LEN, &self.file_len.to_le_bytes());
        put(at::INDEX_OFFSET, &(HEADER_LEN as u64).to_le_bytes());
        put(at::INDEX_LEN, &self.index_len.to_le_bytes());
        put(at::SECTION_COUNT, &self.section_count.to_le_bytes());
        put(at::NAME_COUNT, &self.name_count.to_le_bytes());
        put(at::METADATA_OFFSET, &self.metadata_offset.to_le_bytes());
        put(at::METADATA_LEN, &self.metadata_len.to_le_bytes());
        put(at::INDEX_CRC, &self.index_crc.to_le_bytes());
        put(at::METADATA_CRC, &self.metadata_crc.to_le_bytes());
        put(at::LAYER_COUNT, &self.layer_count.to_le_bytes());
        let crc = crc32(&out[..at::CRC]);
        out[at::CRC..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Decodes and checks the header at the start of `bytes`, for a file of `file_len` bytes.
    ///
    /// # Errors
    /// Every fault within the header: magic, version, features, checksum, lengths, limits.
    pub fn decode(bytes: &[u8], file_len: u64, limits: &Limits) -> Result<Self, FormatError> {
        let Some(bytes) = bytes.get(..HEADER_LEN) else {
            return Err(too_short(bytes));
        };
        Self::check_identity(bytes)?;
        let header = Self {
            minor_version: u16_at(bytes, at::MINOR),
            required_features: u64_at(bytes, at::REQUIRED),
            optional_features: u64_at(bytes, at::OPTIONAL),
            file_len: u64_at(bytes, at::FILE_LEN),
            index_len: u64_at(bytes, at::INDEX_LEN),
            section_count: u64_at(bytes, at::SECTION_COUNT),
            name_count: u64_at(bytes, at::NAME_COUNT),
            metadata_offset: u64_at(bytes, at::METADATA_OFFSET),
            metadata_len: u64_at(bytes, at::METADATA_LEN),
            index_crc: u32_at(bytes, at::INDEX_CRC),
            metadata_crc: u32_at(bytes, at::METADATA_CRC),
            layer_count: u32_at(bytes, at::LAYER_COUNT),
        };
        let unknown = header.required_features & !layout::KNOWN_FEATURES;
        if unknown != 0 {
            return Err(FormatError::UnknownFeatures { bits: unknown });
        }
        check_reserved(bytes, at::RESERVED_A..at::REQUIRED, 0)?;
        check_reserved(bytes, at::RESERVED_B..at::CRC, 0)?;
        if header.file_len != file_len {
            return Err(FormatError::FileLength { expected: header.file_len, found: file_len });
        }
        header.check_limits(limits)?;
        header.check_positions(u64_at(bytes, at::INDEX_OFFSET))?;
        Ok(header)
    }

    /// Magic, then version, then checksum: a later version may have another header.
    fn check_identity(bytes: &[u8]) -> Result<(), FormatError> {
        let magic: [u8; 8] = bytes.get(..8).and_then(|b| b.try_into().ok()).unwrap_or_default();
        if magic != layout::MAGIC {
            return Err(FormatError::BadMagic { found: magic });
        }
        let (major, minor) = (u16_at(bytes, at::MAJOR), u16_at(bytes, at::MINOR));
        if major != layout::MAJOR_VERSION {
            return Err(FormatError::UnsupportedVersion { major, minor });
        }
        let (expected, found) = (u32_at(bytes, at::CRC), crc32(&bytes[..at::CRC]));
        if expected != found {
            return Err(FormatError::Checksum { part: Part::Header, offset: 0, expected, found });
        }
        Ok(())
    }

    fn check_limits(&self, limits: &Limits) -> Result<(), FormatError> {
        for (field, at, limit, found) in [
            (Field::SectionCount, at::SECTION_COUNT, limits.sections, self.section_count),
            (Field::NameCount, at::NAME_COUNT, limits.sections, self.name_count),
            (Field::IndexLength, at::INDEX_LEN, limits.index_len, self.index_len),
            (Field::MetadataLength, at::METADATA_LEN, limits.metadata_len, self.metadata_len),
            (Field::LayerCount, at::LAYER_COUNT, limits.layers.into(), self.layer_count.into()),
        ] {
            if found > limit {
                return Err(FormatError::Limit { field, offset: at as u64, limit, found });
            }
        }
        Ok(())
    }

    /// Index and metadata are at their offsets and inside the file.
    fn check_positions(&self, index_offset: u64) -> Result<(), FormatError> {
        let header_field =
            |field, at: usize, expected, found| FormatError::Header { field, offset: at as u64, expected, found };
        if index_offset != HEADER_LEN as u64 {
            return Err(header_field(Field::IndexOffset, at::INDEX_OFFSET, HEADER_LEN as u64, index_offset));
        }
        // Saturating, since a caller's limits may allow any count: `tables` then exceeds any index.
        let records = self.section_count.saturating_mul(RECORD_LEN as u64);
        let tables = records.saturating_add(self.name_count.saturating_mul(NAME_END_LEN as u64));
        if self.index_len < tables {
            return Err(header_field(Field::IndexLength, at::INDEX_LEN, tables, self.index_len));
        }
        let index_end = (HEADER_LEN as u64).saturating_add(self.index_len);
        let metadata_offset = align_up(index_end, SECTION_ALIGN).unwrap_or(u64::MAX);
        if self.metadata_offset != metadata_offset {
            return Err(header_field(Field::MetadataOffset, at::METADATA_OFFSET, metadata_offset, self.metadata_offset));
        }
        for (part, end) in [(Part::Index, index_end), (Part::Metadata, self.front_len())] {
            if end > self.file_len {
                return Err(FormatError::TooShort { part, expected: end, found: self.file_len });
            }
        }
        Ok(())
    }

    /// Bytes from the start of the file to the end of the metadata: what must be read to open it.
    pub fn front_len(&self) -> u64 {
        self.metadata_offset.saturating_add(self.metadata_len)
    }

    /// Where the first section must start.
    pub(super) fn first_section_offset(&self) -> u64 {
        align_up(self.front_len(), GROUP_ALIGN).unwrap_or(u64::MAX)
    }

    /// Whether scales may be negative.
    pub fn signed_scales(&self) -> bool {
        self.required_features & layout::FEATURE_SIGNED_SCALES != 0
    }
}

/// The error for a file shorter than a header: "not a pack" if the magic differs, too.
fn too_short(bytes: &[u8]) -> FormatError {
    match bytes.get(..8).and_then(|b| <[u8; 8]>::try_from(b).ok()) {
        Some(found) if found != layout::MAGIC => FormatError::BadMagic { found },
        _ => FormatError::TooShort { part: Part::Header, expected: HEADER_LEN as u64, found: bytes.len() as u64 },
    }
}
