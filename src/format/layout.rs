//! Where things lie in a pack (spec sections 2 to 4): magic, record offsets, alignment and limits.

/// First eight bytes of every pack (spec section 2): a byte that no text file has, a name, and both line endings, so that
/// a transfer that rewrites line endings is seen at once.
pub const MAGIC: [u8; 8] = *b"\x89NF4\r\n\x1a\n";

/// Major version that this crate reads and writes; another one is refused.
pub const MAJOR_VERSION: u16 = 1;
/// Minor version that this crate writes; any is read.
pub const MINOR_VERSION: u16 = 0;

/// Required-feature bit 0: scale tables may hold negative scales.
pub const FEATURE_NEGATIVE_SCALES: u64 = 1;
/// Every required-feature bit that this crate knows.
pub const KNOWN_REQUIRED_FEATURES: u64 = FEATURE_NEGATIVE_SCALES;

/// Sections start on a multiple of this many bytes: the strictest storage-buffer offset that WebGPU allows a device to ask for.
pub const SECTION_ALIGN: u64 = 256;
/// The first section of a layer starts on a multiple of this many bytes (a page), so a layer can be read and mapped alone.
pub const LAYER_ALIGN: u64 = 4096;

/// Value of a record's layer or expert field that says "none".
pub const NONE: u32 = u32::MAX;

/// Byte offsets of the header's fields, each derived from the one before (spec section 2).
pub(crate) mod header {
    pub const MAGIC: usize = 0;
    pub const MAJOR: usize = MAGIC + 8;
    pub const MINOR: usize = MAJOR + 2;
    pub const HEADER_LEN: usize = MINOR + 2;
    pub const REQUIRED: usize = HEADER_LEN + 4;
    pub const OPTIONAL: usize = REQUIRED + 8;
    pub const FILE_LEN: usize = OPTIONAL + 8;
    pub const INDEX_OFFSET: usize = FILE_LEN + 8;
    pub const INDEX_LEN: usize = INDEX_OFFSET + 8;
    pub const METADATA_OFFSET: usize = INDEX_LEN + 8;
    pub const METADATA_LEN: usize = METADATA_OFFSET + 8;
    pub const SECTION_COUNT: usize = METADATA_LEN + 8;
    pub const LAYER_COUNT: usize = SECTION_COUNT + 8;
    pub const NAMES_LEN: usize = LAYER_COUNT + 8;
    pub const INDEX_CRC: usize = NAMES_LEN + 8;
    pub const METADATA_CRC: usize = INDEX_CRC + 4;
    pub const RESERVED: usize = METADATA_CRC + 4;
    pub const HEADER_CRC: usize = RESERVED + 20;
    pub const LEN: usize = HEADER_CRC + 4;
    const _: () = assert!(LEN == 128);
}

/// Byte offsets of a section record's fields, each derived from the one before (spec section 3).
pub(crate) mod record {
    pub const KIND: usize = 0;
    pub const FLAGS: usize = KIND + 2;
    pub const ROLE: usize = FLAGS + 2;
    pub const ELEMENT: usize = ROLE + 2;
    pub const SCALE: usize = ELEMENT + 2;
    pub const RANK: usize = SCALE + 2;
    pub const BLOCK_SIZE: usize = RANK + 2;
    pub const LAYER: usize = BLOCK_SIZE + 4;
    pub const EXPERT: usize = LAYER + 4;
    pub const NAME_OFFSET: usize = EXPERT + 4;
    pub const NAME_LEN: usize = NAME_OFFSET + 8;
    pub const OFFSET: usize = NAME_LEN + 8;
    pub const PAYLOAD_LEN: usize = OFFSET + 8;
    pub const SHAPE: usize = PAYLOAD_LEN + 8;
    pub const CRC: usize = SHAPE + 8 * super::MAX_RANK;
    pub const RESERVED: usize = CRC + 4;
    pub const LEN: usize = RESERVED + 4;
    const _: () = assert!(LEN == 96);
}

/// Bytes of the header.
pub const HEADER_LEN: u64 = header::LEN as u64;
/// Bytes of one section record.
pub const RECORD_LEN: u64 = record::LEN as u64;
/// Dimensions that a shape may have.
pub const MAX_RANK: usize = 4;

/// What a reader accepts at most; a pack that claims more is refused before anything is allocated for it (spec section 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sections of a pack.
    pub sections: u64,
    /// Layers of a pack.
    pub layers: u64,
    /// Bytes of one name.
    pub name_len: u64,
    /// Bytes of the metadata.
    pub metadata_len: u64,
}

impl Limits {
    /// The limits of format version 1.
    pub const V1: Self = Self { sections: 1 << 20, layers: 1 << 16, name_len: 1 << 10, metadata_len: 1 << 24 };
}

/// `offset` rounded up to a multiple of `align` (a power of two); `None` on overflow.
pub fn align_up(offset: u64, align: u64) -> Option<u64> {
    offset.checked_add(align - 1).map(|end| end & !(align - 1))
}
