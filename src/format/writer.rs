//! From a list of tensors to the place of every byte (spec sections 3 to 5), and to the front of
//! the file once the checksums are known. Writing the payloads is the caller's: each has its
//! offset, so they may be written in any order.

use super::checksum::crc32;
use super::error::{Field, FormatError};
use super::header::Header;
use super::index::Index;
use super::kinds::{ElementType, Role, SectionKind};
use super::layout::{
    FEATURE_SIGNED_SCALES, GROUP_ALIGN, HEADER_LEN, KNOWN_FEATURES, Limits, MINOR_VERSION, NAME_END_LEN, NONE_U32,
    RECORD_LEN, SECTION_ALIGN, align_up, header as at, record,
};
use super::nf4::ScaleType;
use super::section::{self, Section, Shape, group};

/// How a tensor (or file) is to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As codes and a scale table: two sections.
    Nf4 {
        /// How the scales are stored.
        scale_type: ScaleType,
        /// Weights per block.
        block_size: u32,
    },
    /// Byte for byte, in this float type.
    Raw(super::FloatType),
    /// A file, byte for byte; the shape is its length.
    File,
}

/// One tensor or file that a pack shall hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name; unique in the pack.
    pub name: String,
    /// What it is for; [`Role::Other`] for files.
    pub role: Role,
    /// Its layer, if any.
    pub layer: Option<u32>,
    /// Its expert, if any.
    pub expert: Option<u32>,
    /// Its shape.
    pub shape: Shape,
    /// How it is stored.
    pub storage: Storage,
}

/// The place of every section of a pack that is still to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<Entry>,
    sections: Vec<Section>,
    metadata_len: u64,
    layer_count: u32,
    file_len: u64,
}

impl Layout {
    /// Sorts `entries` into the order of the specification and gives each section its place. The
    /// metadata (see [`super::Provenance`]) must have its final length already.
    ///
    /// # Errors
    /// Whatever a reader would refuse: metadata over the limit, two entries of one name or place, a
    /// layer without sections, sizes that overflow.
    pub fn new(mut entries: Vec<Entry>, layer_count: u32, metadata_len: u64) -> Result<Self, FormatError> {
        let limits = Limits::default();
        if metadata_len > limits.metadata_len {
            let (field, limit) = (Field::MetadataLength, limits.metadata_len);
            return Err(FormatError::Limit { field, offset: at::METADATA_LEN as u64, limit, found: metadata_len });
        }
        entries.sort_by(|a, b| entry_key(a).cmp(&entry_key(b)));
        let mut layout = Self { entries, sections: Vec::new(), metadata_len, layer_count, file_len: 0 };
        layout.sections = layout.place()?;
        layout.file_len = layout.sections.last().map_or(layout.front_len(), Section::end);
        // The reader's rules are the only ones: a layout that a reader would refuse is not made.
        let metadata = " ".repeat(metadata_len as usize);
        let crcs = vec![0; layout.sections.len()];
        Index::parse(&layout.front(&crcs, 0, &metadata)?, layout.file_len)?;
        Ok(layout)
    }

    fn section_count(&self) -> u64 {
        let sections = |e: &Entry| if matches!(e.storage, Storage::Nf4 { .. }) { 2 } else { 1 };
        self.entries.iter().map(sections).sum()
    }

    fn index_len(&self) -> u64 {
        let names: u64 = self.entries.iter().map(|e| (NAME_END_LEN + e.name.len()) as u64).sum();
        self.section_count() * RECORD_LEN as u64 + names
    }

    fn metadata_offset(&self) -> u64 {
        (HEADER_LEN as u64 + self.index_len()).next_multiple_of(SECTION_ALIGN)
    }

    fn front_len(&self) -> u64 {
        self.metadata_offset().saturating_add(self.metadata_len)
    }

    fn place(&self) -> Result<Vec<Section>, FormatError> {
        let mut sections: Vec<Section> = Vec::with_capacity(self.section_count() as usize);
        let mut end = self.front_len();
        let mut last_group = None;
        for (name, entry) in self.entries.iter().enumerate() {
            for &(kind, element_type) in kinds_of(entry.storage) {
                let mut section = new_section(entry, name as u64, kind, element_type);
                let number = sections.len() as u64;
                let group = group(section.kind, section.layer);
                let align = if last_group == Some(group) { SECTION_ALIGN } else { GROUP_ALIGN };
                last_group = Some(group);
                section.length = section.expected_length().ok_or_else(|| section.shape_overflow(number))?;
                let length = section.length;
                let overflow = |offset| FormatError::OffsetOverflow { section: number, offset, length };
                section.offset = align_up(end, align).ok_or_else(|| overflow(end))?;
                end = section.offset.checked_add(length).ok_or_else(|| overflow(section.offset))?;
                sections.push(section);
            }
        }
        Ok(sections)
    }

    /// The entries in file order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The sections in file order, without checksums; [`Section::name`] is the number of the entry.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Length of the whole file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Header, index and metadata: the first bytes of the file, up to the padding before the first
    /// section.
    ///
    /// `crcs` has the CRC-32 of each section's payload; `required_features` is 0 or
    /// [`super::layout::FEATURE_SIGNED_SCALES`]. The features that the roles require are added.
    ///
    /// # Errors
    /// [`FormatError::Header`] where `metadata` or `crcs` do not have the planned length,
    /// [`FormatError::UnknownFeatures`].
    pub fn front(&self, crcs: &[u32], required_features: u64, metadata: &str) -> Result<Vec<u8>, FormatError> {
        let (section_count, metadata_len) = (crcs.len() as u64, metadata.len() as u64);
        planned(Field::SectionCount, at::SECTION_COUNT, self.sections.len() as u64, section_count)?;
        planned(Field::MetadataLength, at::METADATA_LEN, self.metadata_len, metadata_len)?;
        let unknown = required_features & !KNOWN_FEATURES;
        if unknown != 0 {
            return Err(FormatError::UnknownFeatures { bits: unknown });
        }
        let of_roles = self.entries.iter().map(|entry| entry.role.required_feature());
        let required_features = of_roles.fold(required_features, |all, feature| all | feature);
        let mut out = vec![0; HEADER_LEN];
        for (section, &crc) in self.sections.iter().zip(crcs) {
            out.extend_from_slice(&Section { crc, ..section.clone() }.encode());
        }
        let mut end = 0;
        for entry in &self.entries {
            end += entry.name.len() as u64;
            out.extend_from_slice(&end.to_le_bytes());
        }
        self.entries.iter().for_each(|entry| out.extend_from_slice(entry.name.as_bytes()));
        let header = Header {
            minor_version: MINOR_VERSION,
            required_features,
            optional_features: 0,
            file_len: self.file_len,
            index_len: self.index_len(),
            section_count: self.sections.len() as u64,
            name_count: self.entries.len() as u64,
            metadata_offset: self.metadata_offset(),
            metadata_len: self.metadata_len,
            index_crc: crc32(&out[HEADER_LEN..]),
            metadata_crc: crc32(metadata.as_bytes()),
            layer_count: self.layer_count,
        };
        out[..HEADER_LEN].copy_from_slice(&header.encode());
        out.resize(self.metadata_offset() as usize, 0);
        out.extend_from_slice(metadata.as_bytes());
        Ok(out)
    }

    /// A whole pack in memory, from the payload of each section: for small packs, tests and
    /// examples.
    ///
    /// # Errors
    /// As [`Layout::front`]; [`FormatError::Mismatch`] where a payload does not have its section's
    /// length.
    pub fn assemble(&self, payloads: &[&[u8]], metadata: &str) -> Result<Vec<u8>, FormatError> {
        let crcs: Vec<u32> = payloads.iter().map(|p| crc32(p)).collect();
        let signed = self.sections.iter().zip(payloads).any(|(s, p)| super::check::has_negative_scale(s, p));
        let mut out = self.front(&crcs, if signed { FEATURE_SIGNED_SCALES } else { 0 }, metadata)?;
        for (number, (section, payload)) in self.sections.iter().zip(payloads).enumerate() {
            let (expected, found) = (section.length, payload.len() as u64);
            if expected != found {
                return Err(section::mismatch(number as u64, Field::Length, record::LENGTH, expected, found));
            }
            out.resize(section.offset as usize, 0);
            out.extend_from_slice(payload);
        }
        Ok(out)
    }
}

/// What the caller hands in has the length that the layout was made for.
fn planned(field: Field, at: usize, expected: u64, found: u64) -> Result<(), FormatError> {
    if expected == found { Ok(()) } else { Err(FormatError::Header { field, offset: at as u64, expected, found }) }
}

/// The order of entries: group, role, expert, and for tensors with the same role, the bytes of the
/// name.
fn entry_key(entry: &Entry) -> (u32, u16, u32, &str) {
    let kind = matches!(entry.storage, Storage::File).then_some(SectionKind::File);
    (group(kind, entry.layer), entry.role.number(), entry.expert.unwrap_or(NONE_U32), &entry.name)
}

fn kinds_of(storage: Storage) -> &'static [(SectionKind, ElementType)] {
    use super::FloatType;
    match storage {
        Storage::Nf4 { .. } => &[(SectionKind::Codes, ElementType::Nf4), (SectionKind::Scales, ElementType::ScaleTable)],
        Storage::Raw(FloatType::F32) => &[(SectionKind::Raw, ElementType::F32)],
        Storage::Raw(FloatType::F16) => &[(SectionKind::Raw, ElementType::F16)],
        Storage::Raw(FloatType::Bf16) => &[(SectionKind::Raw, ElementType::Bf16)],
        Storage::File => &[(SectionKind::File, ElementType::U8)],
    }
}

fn new_section(entry: &Entry, name: u64, kind: SectionKind, element_type: ElementType) -> Section {
    let (scale_type, block_size) = match entry.storage {
        Storage::Nf4 { scale_type, block_size } => (Some(scale_type), block_size),
        Storage::Raw(_) | Storage::File => (None, 0),
    };
    Section {
        kind: Some(kind),
        role: entry.role,
        layer: entry.layer,
        expert: entry.expert,
        element_type,
        scale_type,
        block_size,
        shape: entry.shape,
        name,
        offset: 0,
        length: 0,
        crc: 0,
    }
}
