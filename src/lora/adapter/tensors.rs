//! A safetensors file, read header first: nothing is allocated for a tensor before its shape is
//! known to be the expected one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use thiserror::Error;

use crate::io::read::{FileError, Links, RegularFile};

/// Bytes of the length field that starts the file.
const LENGTH_FIELD: u64 = 8;
/// Bytes that a header may have: tens of thousands of tensors.
const MAX_HEADER_LEN: u64 = 16 << 20;
/// The key of the strings that writers add.
const METADATA_KEY: &str = "__metadata__";
/// Bytes that are read at once.
const PIECE: usize = 1 << 18;

/// Why a file is not a safetensors file that can be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TensorsError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It ends within the header.
    #[error("the file has {found} bytes, its header needs {expected}")]
    Truncated {
        /// Bytes of the length field and the header.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// The header is larger than that of any adapter.
    #[error("the header has {found} bytes, at most {limit} are accepted")]
    HeaderLength {
        /// Bytes that are accepted.
        limit: u64,
        /// Bytes of the header.
        found: u64,
    },
    /// The header is not the JSON of a safetensors header.
    #[error("the header is not the JSON of a safetensors header: {0}")]
    Json(serde_json::Error),
    /// Two tensors of one name.
    #[error("the header has {name:?} twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// Tensors overlap, have gaps between them, or have other lengths than their shapes.
    #[error(transparent)]
    Layout(#[from] SafeTensorError),
    /// Cut off, or with bytes after the last tensor.
    #[error("the file has {found} bytes, by its header it should have {expected}")]
    FileLength {
        /// Bytes by the header.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
}

/// A safetensors file whose header is valid.
#[derive(Debug)]
pub(crate) struct TensorFile {
    file: RegularFile,
    data_start: u64,
    /// By name.
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Opens the file and reads its header.
    ///
    /// # Errors
    /// [`TensorsError`].
    pub(crate) fn open(path: &Path, links: Links) -> Result<Self, TensorsError> {
        let file = RegularFile::open(path, links)?;
        let truncated = |expected| TensorsError::Truncated { expected, found: file.len };
        if file.len < LENGTH_FIELD {
            return Err(truncated(LENGTH_FIELD));
        }
        let mut field = [0; LENGTH_FIELD as usize];
        file.read_exact_at(&mut field, 0)?;
        let header = u64::from_le_bytes(field);
        if header > MAX_HEADER_LEN {
            return Err(TensorsError::HeaderLength { limit: MAX_HEADER_LEN, found: header });
        }
        let data_start = LENGTH_FIELD + header;
        if file.len < data_start {
            return Err(truncated(data_start));
        }
        let mut json = vec![0; header as usize];
        file.read_exact_at(&mut json, LENGTH_FIELD)?;
        let (tensors, data) = parse(&json)?;
        match data_start.saturating_add(data) {
            expected if expected == file.len => Ok(Self { file, data_start, tensors }),
            expected => Err(TensorsError::FileLength { expected, found: file.len }),
        }
    }

    /// Reads a tensor into `out`, which has its length.
    ///
    /// # Errors
    /// [`ReadFloats`].
    pub(crate) fn read(&self, tensor: &TensorInfo, out: &mut [f32]) -> Result<(), ReadFloats> {
        let decode: fn(&[u8], &mut [f32]) = match tensor.dtype {
            Dtype::F64 => |bytes, out| decode(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Dtype::F32 => |bytes, out| decode(bytes, out, f32::from_le_bytes),
            Dtype::F16 => |bytes, out| decode(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => |bytes, out| decode(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            found => return Err(ReadFloats::Type(found)),
        };
        let size = tensor.dtype.bitsize() / 8;
        let mut buffer = vec![0; PIECE.min(out.len().saturating_mul(size))];
        let mut offset = self.data_start + tensor.data_offsets.0 as u64;
        for piece in out.chunks_mut(PIECE / size) {
            let bytes = buffer.get_mut(..piece.len() * size).unwrap_or_default();
            self.file.read_exact_at(bytes, offset).map_err(ReadFloats::File)?;
            decode(bytes, piece);
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Why a tensor was not read.
pub(crate) enum ReadFloats {
    /// Its elements are no floats that are read.
    Type(Dtype),
    /// The file cannot be read, or was cut since it was opened.
    File(FileError),
}

fn decode<const N: usize>(bytes: &[u8], out: &mut [f32], float: impl Fn([u8; N]) -> f32) {
    out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, &b)| *x = float(b));
}

/// The tensors of a header, and the bytes of them all.
fn parse(json: &[u8]) -> Result<(BTreeMap<String, TensorInfo>, u64), TensorsError> {
    let Header { tensors, duplicate } = serde_json::from_slice(json).map_err(TensorsError::Json)?;
    if let Some(name) = duplicate {
        return Err(TensorsError::Duplicate { name });
    }
    let mut ordered: Vec<(String, TensorInfo)> = tensors.iter().map(|(name, info)| (name.clone(), info.clone())).collect();
    ordered.sort_by_key(|(_, info)| info.data_offsets);
    let data = Metadata::new(None, ordered)?.data_len() as u64;
    Ok((tensors, data))
}

/// The JSON of a header.
struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    /// A name that it has twice.
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { tensors: BTreeMap::new(), duplicate: None };
                let mut metadata = 0;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        map.next_value::<IgnoredAny>()?;
                        metadata += 1;
                        if metadata > 1 {
                            header.duplicate = Some(name);
                        }
                        continue;
                    }
                    let info = map.next_value()?;
                    match header.tensors.entry(name) {
                        Entry::Vacant(free) => {
                            free.insert(info);
                        }
                        Entry::Occupied(taken) => header.duplicate = Some(taken.key().clone()),
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn entry(dtype: &str, shape: &str, start: u64, end: u64) -> String {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    }

    #[test]
    fn headers_are_checked_before_anything_is_read() {
        let (a, b) = (entry("F32", "[2,2]", 0, 16), entry("BF16", "[4]", 16, 24));
        let (tensors, data) = parse(format!(r#"{{"b":{b},"__metadata__":{{"format":"pt"}},"a":{a}}}"#).as_bytes()).unwrap();
        assert_eq!((tensors.len(), data), (2, 24));
        assert_eq!((tensors["b"].dtype, tensors["b"].shape.as_slice()), (Dtype::BF16, [4].as_slice()));
        let refused = |header: String| parse(header.as_bytes()).unwrap_err();
        for twice in [format!(r#"{{"a":{a},"a":{a}}}"#), r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned()] {
            assert!(matches!(refused(twice), TensorsError::Duplicate { .. }));
        }
        // A hole, an overlap, another length than that of the shape, more elements than numbers.
        for (shape, start, end) in
            [("[4]", 20, 28), ("[4]", 12, 20), ("[5]", 16, 24), ("[4294967296,4294967296,4294967296]", 16, 24)]
        {
            let header = format!(r#"{{"a":{a},"b":{}}}"#, entry("BF16", shape, start, end));
            assert!(matches!(refused(header), TensorsError::Layout(_)), "{shape} {start} {end}");
        }
        for json in ["", "[]", r#"{"a":1}"#, r#"{"a":{}}"#, r#"{"a":{"dtype":"X","shape":[],"data_offsets":[0,0]}}"#] {
            assert!(matches!(refused(json.to_owned()), TensorsError::Json(_)), "{json}");
        }
    }
}
