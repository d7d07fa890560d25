//! One section: a run of payload bytes and the record that describes it (spec section 3).

use super::error::{Error, SectionFault};
use super::layout::{MAX_RANK, NONE, record};
use super::nf4::{BLOCK_SIZES, ScaleType, block_count, codes_len, scales_len};
use super::role::Role;

/// What a section's payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Packed NF4 codes of a tensor.
    Codes,
    /// The scale table of the codes section just before it.
    Scales,
    /// A tensor as the source stored it.
    Raw,
    /// A file of the checkpoint, byte for byte.
    File,
    /// A kind of a later minor version, marked as one that a reader may skip.
    Unknown(u16),
}

impl Kind {
    /// The number that the file stores.
    pub fn number(self) -> u16 {
        match self {
            Self::Codes => 1,
            Self::Scales => 2,
            Self::Raw => 3,
            Self::File => 4,
            Self::Unknown(number) => number,
        }
    }

    /// Sections of a layer (or of the model) lie in this order first: files, tensors, whatever came later.
    fn class(self) -> u8 {
        match self {
            Self::File => 0,
            Self::Codes | Self::Scales | Self::Raw => 1,
            Self::Unknown(_) => 2,
        }
    }
}

/// Type of the elements of a tensor or of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// IEEE float32.
    F32,
    /// IEEE float16.
    F16,
    /// bfloat16: the upper half of a float32.
    Bf16,
    /// Bytes.
    U8,
    /// 4-bit codes, eight to a u32.
    Nf4,
}

impl ElementType {
    const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::U8, Self::Nf4];

    /// The number that the file stores.
    pub fn number(self) -> u16 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
            Self::U8 => 4,
            Self::Nf4 => 5,
        }
    }

    /// Bytes of one element; `None` for NF4, whose elements share bytes.
    pub fn size(self) -> Option<u64> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::U8 => Some(1),
            Self::Nf4 => None,
        }
    }

    /// The name that safetensors uses, such as `BF16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::U8 => "U8",
            Self::Nf4 => "NF4",
        }
    }
}

impl ScaleType {
    const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Dq8];

    /// The number that the file stores (0 means "no scales").
    pub fn number(self) -> u16 {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Dq8 => 3,
        }
    }

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Dq8 => "dq8",
        }
    }

    /// Element type of a scales section.
    pub fn element(self) -> ElementType {
        match self {
            Self::F32 => ElementType::F32,
            Self::Bf16 => ElementType::Bf16,
            Self::Dq8 => ElementType::U8,
        }
    }
}

/// Dimensions of a tensor, outermost first; one to four of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [u64; MAX_RANK],
    rank: u8,
}

impl Shape {
    /// A shape of `dims`; `None` where there are none, more than four, or their product passes 2^63.
    pub fn new(dims: &[u64]) -> Option<Self> {
        let mut shape = Self { dims: [0; MAX_RANK], rank: u8::try_from(dims.len()).ok()? };
        shape.dims.get_mut(..dims.len())?.copy_from_slice(dims);
        let elements = dims.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim))?;
        (!dims.is_empty() && elements <= 1 << 63).then_some(shape)
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[u64] {
        self.dims.get(..usize::from(self.rank)).unwrap_or(&[])
    }

    /// Product of the dimensions.
    pub fn elements(&self) -> u64 {
        self.dims().iter().product()
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.dims().fmt(f)
    }
}

/// One validated section of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What the payload is.
    pub kind: Kind,
    /// What the tensor is for.
    pub role: Role,
    /// Layer that the section belongs to; `None` for what belongs to the whole model.
    pub layer: Option<u32>,
    /// Which expert, where a model has one tensor per expert; `None` for a dense tensor and for a 3-D stack.
    pub expert: Option<u32>,
    /// Element type of the payload.
    pub element: ElementType,
    /// How the scales are stored, for codes and scales sections.
    pub scale_type: Option<ScaleType>,
    /// Elements per block, for codes and scales sections; 0 otherwise.
    pub block_size: u32,
    /// Shape of the tensor (of the quantised tensor, for scales too); `[len]` for a file.
    pub shape: Shape,
    /// Name of the tensor or file. A scales section has its codes section's name.
    pub name: Box<str>,
    /// Payload's first byte, from the start of the file.
    pub offset: u64,
    /// Payload's bytes.
    pub len: u64,
    /// CRC-32 of the payload.
    pub crc: u32,
}

/// What decides the place of a section among the others; see spec section 4.
pub(crate) type OrderKey<'a> = (u64, u8, u16, u64, &'a str);

/// Layer or expert as the record stores it.
fn or_none(value: Option<u32>) -> u32 {
    value.unwrap_or(NONE)
}

/// 0 for "none", so that what belongs to no layer or expert comes first.
fn none_first(value: Option<u32>) -> u64 {
    value.map_or(0, |v| u64::from(v) + 1)
}

impl Section {
    pub(crate) fn order_key(&self) -> OrderKey<'_> {
        (none_first(self.layer), self.kind.class(), self.role as u16, none_first(self.expert), &self.name)
    }

    /// Payload length that the section's type and shape ask for; `None` on overflow, or for an unknown kind.
    pub(crate) fn expected_len(&self) -> Option<u64> {
        let elements = self.shape.elements();
        match (self.kind, self.scale_type) {
            (Kind::Codes, _) => codes_len(elements, self.block_size),
            (Kind::Scales, Some(scale_type)) => scales_len(block_count(elements, self.block_size), scale_type),
            (Kind::Scales, None) | (Kind::Unknown(_), _) => None,
            (Kind::Raw | Kind::File, _) => elements.checked_mul(self.element.size()?),
        }
    }

    /// Appends the record; `name_offset` counts from the start of the name table.
    pub(crate) fn encode(&self, name_offset: u64, out: &mut Vec<u8>) {
        let start = out.len();
        let flags = u16::from(matches!(self.kind, Kind::Unknown(_)));
        for field in [
            self.kind.number(),
            flags,
            self.role as u16,
            self.element.number(),
            self.scale_type.map_or(0, ScaleType::number),
            u16::from(self.shape.rank),
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        for field in [self.block_size, or_none(self.layer), or_none(self.expert)] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        for field in [name_offset, self.name.len() as u64, self.offset, self.len].iter().chain(&self.shape.dims) {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.crc.to_le_bytes());
        out.extend_from_slice(&0_u32.to_le_bytes());
        debug_assert_eq!(out.len() - start, record::LEN);
    }
}

/// Little-endian reads from one record of known length.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
    }
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

/// Decodes record `index`, checking every field that can be judged without its neighbours; `name` is resolved by the caller.
pub(crate) fn decode(index: u64, name: &str, fields: &Fields<'_>) -> Result<Section, Error> {
    decode_fields(name, fields).map_err(|fault| Error::section(index, name, fault))
}

fn decode_fields(name: &str, fields: &Fields<'_>) -> Result<Section, SectionFault> {
    let some = |value| (value != NONE).then_some(value);
    let len = fields.u64(record::PAYLOAD_LEN);
    // Of an unknown kind only the place is read: what the other fields mean there is not known.
    let mut section = Section {
        kind: decode_kind(fields)?,
        role: Role::Other,
        layer: some(fields.u32(record::LAYER)),
        expert: some(fields.u32(record::EXPERT)),
        element: ElementType::U8,
        scale_type: None,
        block_size: 0,
        shape: Shape { dims: [len, 0, 0, 0], rank: 1 },
        name: name.into(),
        offset: fields.u64(record::OFFSET),
        len,
        crc: fields.u32(record::CRC),
    };
    if !matches!(section.kind, Kind::Unknown(_)) {
        section.role =
            Role::try_from(fields.u16(record::ROLE)).map_err(|found| SectionFault::UnknownRole { found })?;
        section.element = decode_element(fields)?;
        section.scale_type = decode_scale_type(fields)?;
        section.block_size = fields.u32(record::BLOCK_SIZE);
        section.shape = decode_shape(fields)?;
        check_record(&section)?;
    }
    Ok(section)
}

fn decode_kind(fields: &Fields<'_>) -> Result<Kind, SectionFault> {
    const OPTIONAL: u16 = 1;
    let (flags, reserved) = (fields.u16(record::FLAGS), fields.u32(record::RESERVED));
    let kind = match (fields.u16(record::KIND), flags) {
        (1, 0) => Kind::Codes,
        (2, 0) => Kind::Scales,
        (3, 0) => Kind::Raw,
        (4, 0) => Kind::File,
        (1..=4, _) => return Err(SectionFault::Reserved { flags, reserved }),
        (found, OPTIONAL) => Kind::Unknown(found),
        (found, _) => return Err(SectionFault::UnknownKind { found }),
    };
    if reserved == 0 { Ok(kind) } else { Err(SectionFault::Reserved { flags, reserved }) }
}

fn decode_element(fields: &Fields<'_>) -> Result<ElementType, SectionFault> {
    let found = fields.u16(record::ELEMENT);
    ElementType::ALL.into_iter().find(|e| e.number() == found).ok_or(SectionFault::UnknownElement { found })
}

fn decode_scale_type(fields: &Fields<'_>) -> Result<Option<ScaleType>, SectionFault> {
    match fields.u16(record::SCALE) {
        0 => Ok(None),
        found => match ScaleType::ALL.into_iter().find(|s| s.number() == found) {
            Some(scale_type) => Ok(Some(scale_type)),
            None => Err(SectionFault::UnknownScaleType { found }),
        },
    }
}

fn decode_shape(fields: &Fields<'_>) -> Result<Shape, SectionFault> {
    let rank = fields.u16(record::RANK);
    let mut dims = [0; MAX_RANK];
    for (i, dim) in dims.iter_mut().enumerate() {
        *dim = fields.u64(record::SHAPE + 8 * i);
    }
    let (used, unused) =
        dims.split_at_checked(usize::from(rank)).filter(|_| rank > 0).ok_or(SectionFault::Rank { found: rank })?;
    match Shape::new(used) {
        Some(shape) if unused.iter().all(|&dim| dim == 0) => Ok(shape),
        _ => Err(SectionFault::Shape { found: dims, rank }),
    }
}

/// Kind, element type, scale type, block size, shape and length must agree with each other.
fn check_record(section: &Section) -> Result<(), SectionFault> {
    let Section { kind, element, scale_type, block_size, .. } = *section;
    let expected_element = match (kind, scale_type) {
        (Kind::Codes, Some(_)) => ElementType::Nf4,
        (Kind::Scales, Some(scale_type)) => scale_type.element(),
        (Kind::File, None) => ElementType::U8,
        (Kind::Raw, None) if matches!(element, ElementType::F32 | ElementType::F16 | ElementType::Bf16) => element,
        (Kind::Raw, None) => return Err(SectionFault::RawElement { found: element }),
        _ => return Err(SectionFault::ScaleTypeForKind { kind, found: scale_type }),
    };
    if element != expected_element {
        return Err(SectionFault::Element { expected: expected_element, found: element });
    }
    let block_size_fits = match scale_type {
        Some(_) => BLOCK_SIZES.contains(&block_size),
        None => block_size == 0,
    };
    if !block_size_fits {
        return Err(SectionFault::BlockSize { found: block_size });
    }
    if section.shape.elements() == 0 && kind != Kind::File {
        return Err(SectionFault::Empty);
    }
    if kind == Kind::File {
        if section.shape.dims().len() != 1 {
            return Err(SectionFault::Rank { found: section.shape.rank.into() });
        }
        if let Some(found) = section.layer {
            return Err(SectionFault::FileInLayer { found });
        }
    }
    match section.expected_len() {
        Some(expected) if expected == section.len => Ok(()),
        expected => Err(SectionFault::Length { expected, found: section.len }),
    }
}
