//! The 128-byte header (spec section 2).

use super::error::Error;
use super::layout::*;
use super::section::Fields;

/// Version, features and the place of everything else in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Minor version that wrote the file; its major version is always 1.
    pub minor: u16,
    /// Bits that a reader must know, or refuse the file.
    pub required_features: u64,
    /// Bits that a reader may ignore.
    pub optional_features: u64,
    /// Bytes of the whole file.
    pub file_len: u64,
    /// Bytes of the index: section records, then names.
    pub index_len: u64,
    /// First byte of the metadata, right behind the index.
    pub metadata_offset: u64,
    /// Bytes of the metadata.
    pub metadata_len: u64,
    /// Sections of the pack.
    pub section_count: u64,
    /// Layers of the pack.
    pub layer_count: u64,
    /// Bytes of the name table at the end of the index.
    pub names_len: u64,
    /// CRC-32 of the index.
    pub index_crc: u32,
    /// CRC-32 of the metadata.
    pub metadata_crc: u32,
}

impl Header {
    /// Whether scale tables may hold negative scales.
    pub fn negative_scales(&self) -> bool {
        self.required_features & FEATURE_NEGATIVE_SCALES != 0
    }

    /// Reads and checks the header of a file of `found_len` bytes that starts with `bytes`.
    pub(crate) fn decode(bytes: &[u8], found_len: u64, limits: &Limits) -> Result<Self, Error> {
        let too_short = Error::TooShort { expected: HEADER_LEN, found: bytes.len() as u64 };
        let bytes = bytes.get(..header::LEN).ok_or(too_short)?;
        let fields = Fields(bytes);
        let magic = fields.u64(header::MAGIC).to_le_bytes();
        if magic != MAGIC {
            return Err(Error::Magic { found: magic });
        }
        let major = fields.u16(header::MAJOR);
        if major != MAJOR_VERSION {
            return Err(Error::MajorVersion { found: major });
        }
        let crc = crc32fast::hash(bytes.get(..header::HEADER_CRC).unwrap_or(bytes));
        let found = fields.u32(header::HEADER_CRC);
        if crc != found {
            return Err(Error::HeaderCrc { expected: crc, found });
        }
        let header = Self {
            minor: fields.u16(header::MINOR),
            required_features: fields.u64(header::REQUIRED),
            optional_features: fields.u64(header::OPTIONAL),
            file_len: fields.u64(header::FILE_LEN),
            index_len: fields.u64(header::INDEX_LEN),
            metadata_offset: fields.u64(header::METADATA_OFFSET),
            metadata_len: fields.u64(header::METADATA_LEN),
            section_count: fields.u64(header::SECTION_COUNT),
            layer_count: fields.u64(header::LAYER_COUNT),
            names_len: fields.u64(header::NAMES_LEN),
            index_crc: fields.u32(header::INDEX_CRC),
            metadata_crc: fields.u32(header::METADATA_CRC),
        };
        header.check(&fields, limits)?;
        if header.file_len != found_len {
            return Err(Error::FileLength { expected: header.file_len, found: found_len });
        }
        Ok(header)
    }

    /// Everything that is judged from the header alone. The limits come first, so the sums after them cannot overflow.
    fn check(&self, fields: &Fields<'_>, limits: &Limits) -> Result<(), Error> {
        let unknown = self.required_features & !KNOWN_REQUIRED_FEATURES;
        if unknown != 0 {
            return Err(Error::RequiredFeatures { found: unknown, known: KNOWN_REQUIRED_FEATURES });
        }
        let names_limit = limits.sections * limits.name_len;
        for (what, limit, found) in [
            ("sections", limits.sections, self.section_count),
            ("layers", limits.layers, self.layer_count),
            ("name bytes", names_limit, self.names_len),
            ("metadata bytes", limits.metadata_len, self.metadata_len),
        ] {
            if found > limit {
                return Err(Error::TooMany { what, limit, found });
            }
        }
        let index_len = self.section_count * RECORD_LEN + self.names_len;
        let reserved = header::RESERVED..header::HEADER_CRC;
        let reserved_sum = fields.0.get(reserved).map_or(0, |bytes| bytes.iter().map(|&b| u64::from(b)).sum());
        for (field, offset, expected, found) in [
            ("header_len", header::HEADER_LEN, HEADER_LEN, u64::from(fields.u32(header::HEADER_LEN))),
            ("index_offset", header::INDEX_OFFSET, HEADER_LEN, fields.u64(header::INDEX_OFFSET)),
            ("index_len", header::INDEX_LEN, index_len, self.index_len),
            ("metadata_offset", header::METADATA_OFFSET, HEADER_LEN + index_len, self.metadata_offset),
            ("reserved", header::RESERVED, 0, reserved_sum),
        ] {
            if expected != found {
                return Err(Error::HeaderField { field, offset: offset as u64, expected, found });
            }
        }
        Ok(())
    }

    /// The header's bytes, its own CRC included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(header::LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&MAJOR_VERSION.to_le_bytes());
        out.extend_from_slice(&self.minor.to_le_bytes());
        out.extend_from_slice(&(header::LEN as u32).to_le_bytes());
        for field in [
            self.required_features,
            self.optional_features,
            self.file_len,
            HEADER_LEN,
            self.index_len,
            self.metadata_offset,
            self.metadata_len,
            self.section_count,
            self.layer_count,
            self.names_len,
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.index_crc.to_le_bytes());
        out.extend_from_slice(&self.metadata_crc.to_le_bytes());
        out.resize(header::HEADER_CRC, 0);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }
}
