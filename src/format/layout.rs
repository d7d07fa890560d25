//! The layout of a pack (spec sections 2 to 4): each offset is the previous field's end.

use super::files::{CONFIG, GENERATION_CONFIG};

/// First eight bytes of every pack. The high bit and the line ends reveal a transfer in text mode,
/// as in PNG.
pub const MAGIC: [u8; 8] = [0x89, b'N', b'F', b'4', 0x0d, 0x0a, 0x1a, 0x0a];

/// Major version that this crate reads and writes; any other is refused.
pub const MAJOR_VERSION: u16 = 1;

/// Minor version that this crate writes. It reads higher ones and skips their optional sections.
pub const MINOR_VERSION: u16 = 0;

/// Required-feature bit: scales may be negative.
pub const FEATURE_SIGNED_SCALES: u64 = 1;

/// Required-feature bit: tensors may have a role that joins several projections
/// ([`Role::is_fused`](super::kinds::Role::is_fused)).
pub const FEATURE_FUSED_PROJECTIONS: u64 = 2;

/// Required-feature bit: tensors may be norms of outputs
/// ([`Role::AttentionOutputNorm`](super::kinds::Role::AttentionOutputNorm) and
/// [`Role::FeedForwardOutputNorm`](super::kinds::Role::FeedForwardOutputNorm)).
pub const FEATURE_OUTPUT_NORMS: u64 = 4;

/// The required-feature bits that this crate understands.
pub const KNOWN_FEATURES: u64 = FEATURE_SIGNED_SCALES | FEATURE_FUSED_PROJECTIONS | FEATURE_OUTPUT_NORMS;

/// Section flag: a reader that does not know the section's kind may skip it.
pub const FLAG_OPTIONAL: u16 = 1;

/// Every section starts on a multiple of this, so that it can be bound as a GPU buffer at its
/// offset.
pub const SECTION_ALIGN: u64 = 256;

/// Every group (the files, the global tensors, each layer) starts on a multiple of this: a page.
pub const GROUP_ALIGN: u64 = 4096;

/// Maximum number of dimensions of a shape.
pub const MAX_RANK: usize = 4;

/// In the layer and expert fields: none.
pub const NONE_U32: u32 = u32::MAX;

/// Field offsets inside the header.
pub(super) mod header {
    pub const MAGIC: usize = 0;
    pub const MAJOR: usize = MAGIC + 8;
    pub const MINOR: usize = MAJOR + 2;
    pub const RESERVED_A: usize = MINOR + 2;
    pub const REQUIRED: usize = RESERVED_A + 4;
    pub const OPTIONAL: usize = REQUIRED + 8;
    pub const FILE_LEN: usize = OPTIONAL + 8;
    pub const INDEX_OFFSET: usize = FILE_LEN + 8;
    pub const INDEX_LEN: usize = INDEX_OFFSET + 8;
    pub const SECTION_COUNT: usize = INDEX_LEN + 8;
    pub const NAME_COUNT: usize = SECTION_COUNT + 8;
    pub const METADATA_OFFSET: usize = NAME_COUNT + 8;
    pub const METADATA_LEN: usize = METADATA_OFFSET + 8;
    pub const INDEX_CRC: usize = METADATA_LEN + 8;
    pub const METADATA_CRC: usize = INDEX_CRC + 4;
    pub const LAYER_COUNT: usize = METADATA_CRC + 4;
    pub const RESERVED_B: usize = LAYER_COUNT + 4;
    pub const CRC: usize = RESERVED_B + 24;
    pub const LEN: usize = CRC + 4;
    const _: () = assert!(LEN == 128);
}

/// Field offsets inside a section record.
pub(super) mod record {
    pub const KIND: usize = 0;
    pub const FLAGS: usize = KIND + 2;
    pub const ROLE: usize = FLAGS + 2;
    pub const ELEMENT_TYPE: usize = ROLE + 2;
    pub const SCALE_TYPE: usize = ELEMENT_TYPE + 2;
    pub const RANK: usize = SCALE_TYPE + 2;
    pub const BLOCK_SIZE: usize = RANK + 2;
    pub const LAYER: usize = BLOCK_SIZE + 4;
    pub const EXPERT: usize = LAYER + 4;
    pub const NAME: usize = EXPERT + 4;
    pub const OFFSET: usize = NAME + 8;
    pub const LENGTH: usize = OFFSET + 8;
    pub const SHAPE: usize = LENGTH + 8;
    pub const CRC: usize = SHAPE + 8 * super::MAX_RANK;
    pub const RESERVED: usize = CRC + 4;
    pub const LEN: usize = RESERVED + 12;
    const _: () = assert!(LEN == 96);
}

/// Bytes of the header.
pub const HEADER_LEN: usize = header::LEN;

/// Bytes of a section record.
pub const RECORD_LEN: usize = record::LEN;

/// Bytes of one entry of the table of name ends.
pub const NAME_END_LEN: usize = 8;

/// Maximum bytes of an embedded file.
pub const MAX_FILE_LEN: u64 = 256 << 20;

/// Maximum bytes of an embedded config.json or generation_config.json.
pub const MAX_CONFIG_LEN: u64 = 16 << 20;

/// Rounds up to a multiple of `align` (a power of two). `None` on overflow.
pub(crate) fn align_up(value: u64, align: u64) -> Option<u64> {
    value.checked_add(align - 1).map(|v| v & !(align - 1))
}

/// The limits of a reader. A file over a limit is refused before any allocation of its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Sections in a file.
    pub sections: u64,
    /// Bytes of one name.
    pub name_len: u64,
    /// Bytes of the index.
    pub index_len: u64,
    /// Bytes of the metadata.
    pub metadata_len: u64,
    /// Layers of a model.
    pub layers: u32,
    /// Experts of a layer.
    pub experts: u32,
    /// Bytes of an embedded file.
    pub file_len: u64,
    /// Bytes of an embedded config.json or generation_config.json: it is parsed as a whole, which
    /// takes many times its length.
    pub config_len: u64,
}

impl Limits {
    /// The limit of the embedded file `name`.
    pub fn of_file(&self, name: &str) -> u64 {
        if [CONFIG, GENERATION_CONFIG].contains(&name) { self.config_len } else { self.file_len }
    }
}

impl Default for Limits {
    /// The limits of the specification (section 9).
    fn default() -> Self {
        Self {
            sections: 1 << 22,
            name_len: 1 << 12,
            index_len: 1 << 30,
            metadata_len: 1 << 24,
            layers: 1 << 16,
            experts: 1 << 16,
            file_len: MAX_FILE_LEN,
            config_len: MAX_CONFIG_LEN,
        }
    }
}
