//! The header of one safetensors file: scanned strictly here, then validated by the safetensors
//! crate.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::fmt;

use safetensors::tensor::{Metadata, TensorInfo as CrateInfo};
use safetensors::{Dtype, SafeTensorError};
use serde::de::value::StrDeserializer;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor};

use super::json::Object;
use super::limits::MAX_TENSORS;
use crate::format::FloatType;

/// Bytes of the length field that every safetensors file starts with.
pub const LENGTH_FIELD: u64 = 8;
/// Bytes that a header may have: the cap of the safetensors crate.
pub const MAX_HEADER_LEN: u64 = 100_000_000;
/// Bytes of a tensor's name; a pack would take more.
pub const MAX_NAME_LEN: usize = 1 << 10;
/// Dimensions of a tensor, as in a pack.
pub const MAX_RANK: usize = 4;

/// How a Git LFS pointer starts; as a length it would be over any limit.
const LFS_START: &[u8; 8] = b"version ";

/// Key under which writers keep their own strings.
const METADATA_KEY: &str = "__metadata__";

/// What is wrong with the header of a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Shorter than the length field.
    #[error("the file has {found} bytes, a safetensors file has at least 8")]
    TooShort {
        /// Bytes of the file.
        found: u64,
    },
    /// The text file that stands for a large file in a repository cloned without Git LFS.
    #[error("this is a Git LFS pointer, not the file that it stands for")]
    LfsPointer,
    /// The header is larger than any real one.
    #[error("the header claims {found} bytes, at most {limit} are accepted")]
    TooLarge {
        /// Bytes accepted.
        limit: u64,
        /// Bytes claimed.
        found: u64,
    },
    /// The header runs past the end of the file.
    #[error("the header claims {expected} bytes, the file has {found} after the length field: it is truncated")]
    Truncated {
        /// Bytes claimed.
        expected: u64,
        /// Bytes present.
        found: u64,
    },
    /// Not the JSON of a safetensors header.
    #[error("the header is not the JSON of a safetensors header")]
    Json {
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key stands twice; other programs would keep either.
    #[error("key {key:?} stands twice in the header")]
    DuplicateKey {
        /// The key, a tensor's name as a rule.
        key: String,
    },
    /// A key stands twice in one entry of the header.
    #[error("{entry:?} has the key {key:?} twice in the header")]
    DuplicateField {
        /// The tensor, or `__metadata__`.
        entry: String,
        /// The repeated key.
        key: String,
    },
    /// A key is missing in the entry of a tensor.
    #[error("tensor {tensor:?} has no {field:?} in the header")]
    MissingField {
        /// The tensor.
        tensor: String,
        /// The missing key.
        field: &'static str,
    },
    /// More tensors than are accepted.
    #[error("the header lists more than {limit} tensors")]
    TooManyTensors {
        /// Tensors accepted.
        limit: usize,
    },
    /// A name that a pack cannot hold.
    #[error("a tensor's name has {found} bytes, at most {limit} are accepted")]
    NameTooLong {
        /// Bytes accepted.
        limit: usize,
        /// Bytes found.
        found: usize,
    },
    /// An element type that safetensors does not have, so that the length of the tensor is unknown.
    #[error("tensor {tensor:?} has the type {found:?}, which is none of safetensors")]
    UnknownType {
        /// The tensor.
        tensor: String,
        /// The type in the header.
        found: String,
    },
    /// Shape and offsets contradict each other.
    #[error("tensor {tensor:?}: its shape and type need {expected} bytes, its offsets span {found}")]
    TensorLength {
        /// The tensor.
        tensor: String,
        /// Bytes by shape and type.
        expected: u64,
        /// Bytes by offsets.
        found: u64,
    },
    /// A shape whose byte count no u64 holds, or offsets that run backwards.
    #[error("tensor {tensor:?}: shape {shape:?} with offsets {offsets:?} is impossible")]
    Impossible {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its begin and end in the data.
        offsets: (u64, u64),
    },
    /// Holes or overlaps between tensors.
    #[error("the tensors do not lie one after another without holes")]
    Layout {
        /// What the safetensors crate says.
        source: SafeTensorError,
    },
    /// Truncated, or with bytes after the last tensor.
    #[error("the file should have {expected} bytes by its header, it has {found}: it is truncated or has trailing bytes")]
    FileLength {
        /// Bytes by the header.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
}

/// Why a pack cannot hold a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unstorable {
    /// An element type that a pack does not have.
    #[error("its type is {found}; F32, F16 and BF16 can be stored")]
    Type {
        /// The type in the header.
        found: String,
    },
    /// No dimension, or too many.
    #[error("it has {found} dimensions; 1 to {MAX_RANK} can be stored")]
    Rank {
        /// Number of dimensions.
        found: u64,
    },
    /// No name.
    #[error("it has no name")]
    Name,
    /// A tensor without elements.
    #[error("it has no elements: its shape is {shape:?}")]
    Empty {
        /// Its shape.
        shape: Vec<u64>,
    },
}

impl Unstorable {
    /// The type, if that is the reason; "" otherwise.
    pub(super) fn type_name(&self) -> &str {
        match self {
            Self::Type { found } => found,
            Self::Rank { .. } | Self::Name | Self::Empty { .. } => "",
        }
    }

    /// In a few words, for a list.
    pub(crate) fn in_short(&self) -> String {
        match self {
            Self::Type { found } => found.clone(),
            Self::Name => "no name".to_owned(),
            Self::Rank { found: 0 } => "no dimension".to_owned(),
            Self::Rank { found } => format!("{found} dimensions"),
            Self::Empty { .. } => "no elements".to_owned(),
        }
    }
}

/// A tensor that a pack cannot hold. As long as it is no part of the model, the checkpoint can be
/// converted without it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnstorableTensor {
    /// Its name, unique in the checkpoint.
    pub name: String,
    /// Why it cannot be stored.
    pub why: Unstorable,
    /// Index into [`Checkpoint::files`](super::Checkpoint::files).
    pub file: usize,
    /// Where its bytes start in that file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// One tensor of a checkpoint: little-endian elements in row-major order, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, unique in the checkpoint.
    pub name: String,
    /// Type of its elements.
    pub float_type: FloatType,
    /// Its dimensions, 1 to 4 of them, none 0.
    pub shape: Vec<u64>,
    /// Index into [`Checkpoint::files`](super::Checkpoint::files).
    pub file: usize,
    /// Where its bytes start in that file.
    pub offset: u64,
    /// Its bytes: the product of the shape times the size of an element.
    pub length: u64,
}

/// A valid header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Where the data starts in the file, in bytes: the length field and the header.
    pub data_start: u64,
    /// The tensors in the order of their offsets. [`TensorInfo::file`] is 0.
    pub tensors: Vec<TensorInfo>,
    /// Those that a pack cannot hold, in the same order.
    pub unstorable: Vec<UnstorableTensor>,
}

/// Bytes from the file's start to its data, by its length field and checked against the file's
/// length.
///
/// # Errors
///
/// [`HeaderError::TooShort`], [`HeaderError::LfsPointer`], [`HeaderError::TooLarge`] or
/// [`HeaderError::Truncated`].
pub fn data_start(first: &[u8], file_len: u64) -> Result<u64, HeaderError> {
    let field = first.first_chunk().filter(|_| file_len >= LENGTH_FIELD).ok_or(HeaderError::TooShort { found: file_len })?;
    if field == LFS_START {
        return Err(HeaderError::LfsPointer);
    }
    let claimed = u64::from_le_bytes(*field);
    if claimed > MAX_HEADER_LEN {
        return Err(HeaderError::TooLarge { limit: MAX_HEADER_LEN, found: claimed });
    }
    if claimed > file_len - LENGTH_FIELD {
        return Err(HeaderError::Truncated { expected: claimed, found: file_len - LENGTH_FIELD });
    }
    Ok(LENGTH_FIELD + claimed)
}

/// Parses the header of a safetensors file of `file_len` bytes; `bytes` starts with the file's
/// first byte and reaches at least to the end of the header. It reads nothing else and never
/// panics, whatever the bytes: it is a fuzz target.
///
/// # Errors
///
/// A [`HeaderError`]; nothing is guessed or repaired.
pub fn parse_header(bytes: &[u8], file_len: u64) -> Result<Header, HeaderError> {
    let data_start = data_start(bytes, file_len)?;
    let json = usize::try_from(data_start).ok().and_then(|end| bytes.get(8..end)).ok_or(HeaderError::Truncated {
        expected: data_start - LENGTH_FIELD,
        found: (bytes.len() as u64).saturating_sub(LENGTH_FIELD),
    })?;
    let entries = scan(json)?;
    let entries = entries.into_iter().map(|(name, entry)| entry.check(name, data_start));
    let mut entries = entries.collect::<Result<Vec<Checked>, _>>()?;
    entries.sort_by_key(|entry| (entry.offset, entry.length));
    let end = validate(&entries, data_start)?;
    if end != file_len {
        return Err(HeaderError::FileLength { expected: end, found: file_len });
    }
    let (mut tensors, mut unstorable) = (Vec::with_capacity(entries.len()), Vec::new());
    for entry in entries {
        match entry.storable() {
            Ok(tensor) => tensors.push(tensor),
            Err(tensor) => unstorable.push(tensor),
        }
    }
    Ok(Header { data_start, tensors, unstorable })
}

/// Lets the safetensors crate look for holes and overlaps; gives the end of the data in the file.
fn validate(entries: &[Checked], data_start: u64) -> Result<u64, HeaderError> {
    let infos = entries.iter().map(|entry| crate_info(entry, data_start)).collect::<Result<Vec<_>, _>>();
    let metadata = infos.and_then(|infos| Metadata::new(None, infos)).map_err(|source| HeaderError::Layout { source })?;
    Ok(data_start.saturating_add(metadata.data_len() as u64))
}

/// A tensor as the safetensors crate describes it; of its shape only the number of elements matters
/// there.
fn crate_info(entry: &Checked, data_start: u64) -> Result<(String, CrateInfo), SafeTensorError> {
    let size = |n: u64| usize::try_from(n).map_err(|_| SafeTensorError::ValidationOverflow);
    let begin = size(entry.offset - data_start)?;
    let end = begin.checked_add(size(entry.length)?).ok_or(SafeTensorError::ValidationOverflow)?;
    let info = CrateInfo { dtype: entry.dtype, shape: vec![size(entry.elements)?], data_offsets: (begin, end) };
    Ok((entry.name.clone(), info))
}

/// Reads the JSON into one entry a tensor, and refuses what a map would hide.
fn scan(json: &[u8]) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let mut refused = None;
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let entries = Scan { refused: &mut refused }.deserialize(&mut deserializer);
    let entries = entries.and_then(|entries| deserializer.end().map(|()| entries));
    entries.map_err(|source| refused.unwrap_or(HeaderError::Json { source }))
}

/// Visits the header's top level. A refusal is left in `refused`, since a serde error holds no more
/// than a message.
struct Scan<'a> {
    refused: &'a mut Option<HeaderError>,
}

impl Scan<'_> {
    fn refuse<T, E: serde::de::Error>(&mut self, error: HeaderError) -> Result<T, E> {
        *self.refused = Some(error);
        Err(E::custom("refused"))
    }

    fn metadata<'de, A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<(), A::Error> {
        match map.next_value::<Option<Object<String>>>()?.and_then(|object| object.repeated) {
            Some(key) => self.refuse(HeaderError::DuplicateField { entry: METADATA_KEY.to_owned(), key }),
            None => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Scan<'_> {
    type Value = BTreeMap<String, Entry>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Scan<'_> {
    type Value = BTreeMap<String, Entry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = BTreeMap::new();
        let mut metadata_seen = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                if metadata_seen {
                    return self.refuse(HeaderError::DuplicateKey { key: name });
                }
                metadata_seen = true;
                self.metadata(&mut map)?;
                continue;
            }
            if name.len() > MAX_NAME_LEN {
                return self.refuse(HeaderError::NameTooLong { limit: MAX_NAME_LEN, found: name.len() });
            }
            if entries.len() == MAX_TENSORS {
                return self.refuse(HeaderError::TooManyTensors { limit: MAX_TENSORS });
            }
            match entries.entry(name) {
                Slot::Occupied(slot) => return self.refuse(HeaderError::DuplicateKey { key: slot.key().clone() }),
                Slot::Vacant(slot) => {
                    let entry: Entry = map.next_value()?;
                    if let Some(key) = entry.repeated {
                        return self.refuse(HeaderError::DuplicateField { entry: slot.key().clone(), key: key.to_owned() });
                    }
                    slot.insert(entry);
                }
            }
        }
        Ok(entries)
    }
}

/// One tensor's entry as it stands in the header, nothing checked but its types.
#[derive(Default)]
struct Entry {
    dtype: Option<String>,
    shape: Option<Dimensions>,
    offsets: Option<(u64, u64)>,
    repeated: Option<&'static str>,
}

impl Entry {
    /// The tensor that the entry describes, with its offset counted from the start of the file.
    fn check(self, name: String, data_start: u64) -> Result<Checked, HeaderError> {
        let missing = |field| HeaderError::MissingField { tensor: name.clone(), field };
        let found = self.dtype.ok_or_else(|| missing("dtype"))?;
        let Dimensions { dims: shape, rank, elements } = self.shape.ok_or_else(|| missing("shape"))?;
        let offsets = self.offsets.ok_or_else(|| missing("data_offsets"))?;
        let name_of_type: StrDeserializer<'_, serde::de::value::Error> = found.as_str().into_deserializer();
        let Ok(dtype) = Dtype::deserialize(name_of_type) else {
            return Err(HeaderError::UnknownType { tensor: name, found });
        };
        // A length that is no whole number of bytes fits no offsets, and the crate refuses it.
        let expected = elements.and_then(|n| n.checked_mul(dtype.bitsize() as u64)).map(|bits| bits.div_ceil(8));
        let length = offsets.1.checked_sub(offsets.0);
        let offset = data_start.checked_add(offsets.0);
        let (Some(elements), Some(expected), Some(length), Some(offset)) = (elements, expected, length, offset) else {
            return Err(HeaderError::Impossible { tensor: name, shape, offsets });
        };
        if expected != length {
            return Err(HeaderError::TensorLength { tensor: name, expected, found: length });
        }
        Ok(Checked { name, dtype, shape, rank, elements, offset, length })
    }
}

/// An entry that agrees with itself.
struct Checked {
    name: String,
    dtype: Dtype,
    /// Its first [`MAX_RANK`] dimensions.
    shape: Vec<u64>,
    rank: u64,
    elements: u64,
    offset: u64,
    length: u64,
}

impl Checked {
    /// The tensor, or why a pack cannot hold it.
    fn storable(self) -> Result<TensorInfo, UnstorableTensor> {
        let Self { name, dtype, shape, rank, offset, length, .. } = self;
        let float_type = match dtype {
            Dtype::F32 => Ok(FloatType::F32),
            Dtype::F16 => Ok(FloatType::F16),
            Dtype::BF16 => Ok(FloatType::Bf16),
            other => Err(Unstorable::Type { found: format!("{other:?}") }),
        };
        let why = match float_type {
            Ok(_) if name.is_empty() => Unstorable::Name,
            Ok(_) if rank == 0 || rank > MAX_RANK as u64 => Unstorable::Rank { found: rank },
            Ok(_) if shape.contains(&0) => Unstorable::Empty { shape },
            Ok(float_type) => return Ok(TensorInfo { name, float_type, shape, file: 0, offset, length }),
            Err(why) => why,
        };
        Err(UnstorableTensor { name, why, file: 0, offset, length })
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let mut entry = Entry::default();
        while let Some(key) = map.next_key::<String>()? {
            let repeated = match key.as_str() {
                "dtype" => entry.dtype.replace(map.next_value()?).map(|_| "dtype"),
                "shape" => entry.shape.replace(map.next_value()?).map(|_| "shape"),
                "data_offsets" => entry.offsets.replace(map.next_value()?).map(|_| "data_offsets"),
                _ => map.next_value::<IgnoredAny>().map(|_| None)?,
            };
            entry.repeated = entry.repeated.or(repeated);
        }
        Ok(entry)
    }
}

/// A shape. Only the first [`MAX_RANK`] dimensions are kept, so that a long one costs no memory.
struct Dimensions {
    dims: Vec<u64>,
    rank: u64,
    /// The product of all dimensions, where a u64 holds it.
    elements: Option<u64>,
}

impl<'de> Deserialize<'de> for Dimensions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(DimensionsVisitor)
    }
}

struct DimensionsVisitor;

impl<'de> Visitor<'de> for DimensionsVisitor {
    type Value = Dimensions;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dimensions, A::Error> {
        let mut shape = Dimensions { dims: Vec::with_capacity(MAX_RANK), rank: 0, elements: Some(1) };
        while let Some(dim) = seq.next_element::<u64>()? {
            if shape.dims.len() < MAX_RANK {
                shape.dims.push(dim);
            }
            shape.rank += 1;
            shape.elements = shape.elements.and_then(|n| n.checked_mul(dim));
        }
        Ok(shape)
    }
}
