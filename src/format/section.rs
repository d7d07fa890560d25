//! One section record of the index (spec section 4): encode, decode, and the checks that need
//! nothing but the record.

use super::error::{Field, FormatError};
use super::header::{check_reserved, u16_at, u32_at, u64_at};
use super::kinds::{ElementType, Role, SectionKind};
use super::layout::{FLAG_OPTIONAL, HEADER_LEN, Limits, MAX_RANK, NONE_U32, RECORD_LEN, record as at};
use super::nf4::{self, ScaleType};

/// Dimensions of a tensor: one to four, each at least 1, so that the product is the number of
/// elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [u64; MAX_RANK],
    rank: u8,
}

impl Shape {
    /// A shape of one to four dimensions, none of them zero, whose product fits 64 bits; `None`
    /// otherwise.
    pub fn new(dims: &[u64]) -> Option<Self> {
        let mut shape = Self { dims: [0; MAX_RANK], rank: u8::try_from(dims.len()).ok()? };
        shape.dims.get_mut(..dims.len())?.copy_from_slice(dims);
        let product = dims.iter().try_fold(1_u64, |n, &d| n.checked_mul(d))?;
        (product > 0 && !dims.is_empty()).then_some(shape)
    }

    /// The dimensions, slowest first.
    pub fn dims(&self) -> &[u64] {
        self.dims.get(..usize::from(self.rank)).unwrap_or_default()
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        // `new` and `decode` have checked the product.
        self.dims().iter().product()
    }
}

impl std::fmt::Display for Shape {
    /// `[rows, columns]`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dims: Vec<String> = self.dims().iter().map(u64::to_string).collect();
        f.pad(&format!("[{}]", dims.join(", ")))
    }
}

/// A validated section record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its content; `None` for an optional kind from a later minor version, which this program only
    /// knows the place of.
    pub kind: Option<SectionKind>,
    /// What the tensor is for.
    pub role: Role,
    /// The layer that it belongs to; `None` for files and global tensors.
    pub layer: Option<u32>,
    /// The expert that it belongs to; `None` where the layer has no experts, and for a stack of all
    /// of them.
    pub expert: Option<u32>,
    /// Element type of the payload.
    pub element_type: ElementType,
    /// How the scales of a quantised tensor are stored (codes and scales sections).
    pub scale_type: Option<ScaleType>,
    /// Weights per block (codes and scales sections), else 0.
    pub block_size: u32,
    /// Shape of the tensor: of the weights, for codes as well as for their scale table.
    pub shape: Shape,
    /// Number of its name.
    pub name: u64,
    /// Where the payload starts in the file.
    pub offset: u64,
    /// Length of the payload in bytes.
    pub length: u64,
    /// CRC-32 of the payload.
    pub crc: u32,
}

/// What the order of tensors follows (spec section 5): group, role, expert.
pub(super) type SortKey = (u32, u16, u32);

fn scale_type_number(scale_type: Option<ScaleType>) -> u16 {
    match scale_type {
        None => 0,
        Some(ScaleType::F32) => 1,
        Some(ScaleType::Bf16) => 2,
        Some(ScaleType::Dq8) => 3,
    }
}

/// The group of a section: 0 files, 1 global tensors, 2 + i layer i.
pub(super) fn group(kind: Option<SectionKind>, layer: Option<u32>) -> u32 {
    match layer {
        Some(layer) => layer.saturating_add(2),
        None => u32::from(kind != Some(SectionKind::File)),
    }
}

impl Section {
    /// The key that tensors are sorted by; only those of [`Role::Other`] may share one.
    pub(super) fn sort_key(&self) -> SortKey {
        (group(self.kind, self.layer), self.role.number(), self.expert.unwrap_or(NONE_U32))
    }

    /// Bytes that the payload must have by its shape and types; `None` on overflow.
    pub(super) fn expected_length(&self) -> Option<u64> {
        let elements = self.shape.elements();
        match self.element_type {
            ElementType::Nf4 => nf4::codes_len(elements, self.block_size),
            ElementType::ScaleTable => nf4::scales_len(nf4::block_count(elements, self.block_size), self.scale_type?),
            ElementType::U8 => Some(elements),
            ElementType::F32 => elements.checked_mul(4),
            ElementType::F16 | ElementType::Bf16 => elements.checked_mul(2),
        }
    }

    /// Where the payload ends; cannot overflow in a validated section.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether `other` describes the same tensor in everything that a pair of codes and scales
    /// shares.
    pub(super) fn same_tensor(&self, other: &Self) -> bool {
        let key = |s: &Self| (s.name, s.role, s.layer, s.expert, s.shape, s.block_size, s.scale_type);
        key(self) == key(other)
    }

    /// The error of a section whose [`Section::expected_length`] is `None`.
    pub(super) fn shape_overflow(&self, section: u64) -> FormatError {
        FormatError::ShapeOverflow { section, shape: self.shape.dims }
    }

    /// Encodes the record of a section of a known kind.
    pub fn encode(&self) -> [u8; RECORD_LEN] {
        let mut out = [0; RECORD_LEN];
        let mut put = |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(at::KIND, &self.kind.map_or(0, SectionKind::number).to_le_bytes());
        put(at::ROLE, &self.role.number().to_le_bytes());
        put(at::ELEMENT_TYPE, &self.element_type.number().to_le_bytes());
        put(at::SCALE_TYPE, &scale_type_number(self.scale_type).to_le_bytes());
        put(at::RANK, &u16::from(self.shape.rank).to_le_bytes());
        put(at::BLOCK_SIZE, &self.block_size.to_le_bytes());
        put(at::LAYER, &self.layer.unwrap_or(NONE_U32).to_le_bytes());
        put(at::EXPERT, &self.expert.unwrap_or(NONE_U32).to_le_bytes());
        put(at::NAME, &self.name.to_le_bytes());
        put(at::OFFSET, &self.offset.to_le_bytes());
        put(at::LENGTH, &self.length.to_le_bytes());
        for (i, dim) in self.shape.dims.iter().enumerate() {
            put(at::SHAPE + 8 * i, &dim.to_le_bytes());
        }
        put(at::CRC, &self.crc.to_le_bytes());
        out
    }
}

/// Decodes record number `section`; what it says about its neighbours is checked by the reader.
pub(super) fn decode(bytes: &[u8; RECORD_LEN], section: u64, limits: &Limits) -> Result<Section, FormatError> {
    RecordReader { bytes, section, limits }.decode()
}

/// Where record number `section` starts in the file.
pub(super) fn record_offset(section: u64) -> u64 {
    HEADER_LEN as u64 + section * RECORD_LEN as u64
}

/// The error for a role that needs a feature which the file lacks: readers without that feature do
/// not know the role.
pub(super) fn unknown_role(section: u64, role: Role) -> FormatError {
    let offset = record_offset(section) + at::ROLE as u64;
    FormatError::Unknown { section, field: Field::Role, offset, found: role.number().into() }
}

/// Field `field` (at byte `at`) of record `section` does not say what the rest of the file demands.
pub(super) fn mismatch(section: u64, field: Field, at: usize, expected: u64, found: u64) -> FormatError {
    FormatError::Mismatch { section, field, offset: record_offset(section) + at as u64, expected, found }
}

struct RecordReader<'a> {
    bytes: &'a [u8; RECORD_LEN],
    section: u64,
    limits: &'a Limits,
}

impl RecordReader<'_> {
    fn field_offset(&self, at: usize) -> u64 {
        record_offset(self.section) + at as u64
    }

    fn unknown(&self, field: Field, at: usize, found: impl Into<u64>) -> FormatError {
        FormatError::Unknown { section: self.section, field, offset: self.field_offset(at), found: found.into() }
    }

    fn zero(&self, field: Field, at: usize) -> FormatError {
        FormatError::Zero { section: self.section, field, offset: self.field_offset(at) }
    }

    /// A number from 0 is too high for `count` of its kind; the limit that the error names is the
    /// highest valid number.
    fn over(&self, field: Field, at: usize, count: u32, found: u32) -> FormatError {
        let limit = count.saturating_sub(1).into();
        FormatError::Limit { field, offset: self.field_offset(at), limit, found: found.into() }
    }

    fn expect(&self, field: Field, at: usize, expected: u64, found: u64) -> Result<(), FormatError> {
        if expected == found {
            return Ok(());
        }
        Err(mismatch(self.section, field, at, expected, found))
    }

    fn decode(&self) -> Result<Section, FormatError> {
        check_reserved(self.bytes, at::RESERVED..RECORD_LEN, record_offset(self.section))?;
        let kind = self.kind()?;
        let section = match kind {
            Some(kind) => self.known(kind)?,
            None => self.skipped()?,
        };
        if section.offset.checked_add(section.length).is_none() {
            let (offset, length) = (section.offset, section.length);
            return Err(FormatError::OffsetOverflow { section: self.section, offset, length });
        }
        Ok(section)
    }

    /// The kind; `None` for one that is unknown and may be skipped.
    fn kind(&self) -> Result<Option<SectionKind>, FormatError> {
        let (number, flags) = (u16_at(self.bytes, at::KIND), u16_at(self.bytes, at::FLAGS));
        match SectionKind::from_number(number) {
            Some(kind) => {
                self.expect(Field::Flags, at::FLAGS, 0, flags.into())?;
                Ok(Some(kind))
            }
            None if flags == FLAG_OPTIONAL => Ok(None),
            None => Err(self.unknown(Field::Kind, at::KIND, number)),
        }
    }

    /// A section of an unknown optional kind: only its place, its layer and its checksum mean
    /// something.
    fn skipped(&self) -> Result<Section, FormatError> {
        let length = u64_at(self.bytes, at::LENGTH);
        Ok(Section {
            kind: None,
            role: Role::Other,
            layer: self.layer()?,
            expert: None,
            element_type: ElementType::U8,
            scale_type: None,
            block_size: 0,
            shape: Shape::new(&[length]).ok_or_else(|| self.zero(Field::Length, at::LENGTH))?,
            name: u64_at(self.bytes, at::NAME),
            offset: u64_at(self.bytes, at::OFFSET),
            length,
            crc: u32_at(self.bytes, at::CRC),
        })
    }

    fn known(&self, kind: SectionKind) -> Result<Section, FormatError> {
        let role = u16_at(self.bytes, at::ROLE);
        let section = Section {
            kind: Some(kind),
            role: Role::from_number(role).ok_or_else(|| self.unknown(Field::Role, at::ROLE, role))?,
            layer: self.layer()?,
            expert: self.expert()?,
            element_type: self.element_type(kind)?,
            scale_type: self.scale_type(kind)?,
            block_size: self.block_size(kind)?,
            shape: self.shape()?,
            name: u64_at(self.bytes, at::NAME),
            offset: u64_at(self.bytes, at::OFFSET),
            length: u64_at(self.bytes, at::LENGTH),
            crc: u32_at(self.bytes, at::CRC),
        };
        if kind == SectionKind::File {
            self.expect(Field::Role, at::ROLE, Role::Other.number().into(), role.into())?;
            self.expect(Field::Layer, at::LAYER, NONE_U32.into(), section.layer.unwrap_or(NONE_U32).into())?;
            self.expect(Field::Rank, at::RANK, 1, section.shape.dims().len() as u64)?;
        }
        if section.layer.is_none() {
            self.expect(Field::Expert, at::EXPERT, NONE_U32.into(), section.expert.unwrap_or(NONE_U32).into())?;
        }
        let Some(expected) = section.expected_length() else {
            return Err(section.shape_overflow(self.section));
        };
        self.expect(Field::Length, at::LENGTH, expected, section.length)?;
        Ok(section)
    }

    fn layer(&self) -> Result<Option<u32>, FormatError> {
        let layer = u32_at(self.bytes, at::LAYER);
        match layer {
            NONE_U32 => Ok(None),
            _ if layer < self.limits.layers => Ok(Some(layer)),
            _ => Err(self.over(Field::Layer, at::LAYER, self.limits.layers, layer)),
        }
    }

    fn expert(&self) -> Result<Option<u32>, FormatError> {
        let expert = u32_at(self.bytes, at::EXPERT);
        match expert {
            NONE_U32 => Ok(None),
            _ if expert < self.limits.experts => Ok(Some(expert)),
            _ => Err(self.over(Field::Expert, at::EXPERT, self.limits.experts, expert)),
        }
    }

    fn element_type(&self, kind: SectionKind) -> Result<ElementType, FormatError> {
        let number = u16_at(self.bytes, at::ELEMENT_TYPE);
        let found = ElementType::from_number(number);
        let fits = match (kind, found) {
            (SectionKind::Codes, Some(ElementType::Nf4))
            | (SectionKind::Scales, Some(ElementType::ScaleTable))
            | (SectionKind::File, Some(ElementType::U8)) => true,
            (SectionKind::Raw, Some(element_type)) => element_type.float_type().is_some(),
            _ => false,
        };
        found.filter(|_| fits).ok_or_else(|| self.unknown(Field::ElementType, at::ELEMENT_TYPE, number))
    }

    fn scale_type(&self, kind: SectionKind) -> Result<Option<ScaleType>, FormatError> {
        let number = u16_at(self.bytes, at::SCALE_TYPE);
        match (kind, number) {
            (SectionKind::Raw | SectionKind::File, _) => {
                self.expect(Field::ScaleType, at::SCALE_TYPE, 0, number.into())?;
                Ok(None)
            }
            (_, 1) => Ok(Some(ScaleType::F32)),
            (_, 2) => Ok(Some(ScaleType::Bf16)),
            (_, 3) => Ok(Some(ScaleType::Dq8)),
            _ => Err(self.unknown(Field::ScaleType, at::SCALE_TYPE, number)),
        }
    }

    fn block_size(&self, kind: SectionKind) -> Result<u32, FormatError> {
        let size = u32_at(self.bytes, at::BLOCK_SIZE);
        match kind {
            SectionKind::Raw | SectionKind::File => self.expect(Field::BlockSize, at::BLOCK_SIZE, 0, size.into())?,
            _ if nf4::BLOCK_SIZES.contains(&size) => {}
            _ => return Err(self.unknown(Field::BlockSize, at::BLOCK_SIZE, size)),
        }
        Ok(size)
    }

    fn shape(&self) -> Result<Shape, FormatError> {
        let rank = u16_at(self.bytes, at::RANK);
        let mut dims = [0; MAX_RANK];
        for (i, dim) in dims.iter_mut().enumerate() {
            *dim = u64_at(self.bytes, at::SHAPE + 8 * i);
        }
        if rank == 0 || usize::from(rank) > MAX_RANK {
            return Err(self.unknown(Field::Rank, at::RANK, rank));
        }
        let (used, unused) = dims.split_at(rank.into());
        if let Some(i) = used.iter().position(|&d| d == 0) {
            return Err(self.zero(Field::Shape, at::SHAPE + 8 * i));
        }
        for (i, &dim) in unused.iter().enumerate() {
            self.expect(Field::Shape, at::SHAPE + 8 * (usize::from(rank) + i), 0, dim)?;
        }
        Shape::new(used).ok_or(FormatError::ShapeOverflow { section: self.section, shape: dims })
    }
}
