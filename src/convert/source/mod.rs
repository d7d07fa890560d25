//! The only reader of safetensors checkpoints: a snapshot folder (one file, or an index with shards) or a single file.
//!
//! Everything in a checkpoint is taken as hostile: names, offsets, shapes and links are checked before they are used, and
//! nothing is allocated that the file's own length does not bear out. Element bytes stay on disk until
//! [`Checkpoint::read`] asks for them.

mod error;
mod header;
mod json;
mod quantised;
mod snapshot;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use serde_json::{Map, Value};

pub use error::SourceError;
pub use header::{Header, HeaderError, MAX_HEADER_LEN, MAX_NAME_LEN, MAX_RANK, MAX_TENSORS, parse_header};
pub use quantised::Quantised;

use self::json::Object;
use self::snapshot::{Folder, INDEX, OpenFile, SINGLE, Weights};
use super::notice::Notice;
use crate::arch::Naming;
use crate::format::FloatType;
use crate::io::{AlignedBuf, read_exact_at};

/// The configuration file of a checkpoint.
pub const CONFIG: &str = "config.json";
/// The files that are taken from a checkpoint beside its tensors, in the order of [`Checkpoint::side_files`].
pub const SIDE_FILES: [&str; 6] = [
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];
/// Bytes that a side file may have.
pub const MAX_SIDE_FILE_LEN: u64 = 256 << 20;
/// Bytes that config.json may have: it is parsed as a whole, which takes many times its length.
pub const MAX_CONFIG_LEN: u64 = 16 << 20;
/// Bytes that an index may have; [`MAX_TENSORS`] lines of a usual length fit.
pub const MAX_INDEX_LEN: u64 = 128 << 20;

/// Bytes that are compared at a time.
const COMPARE_LEN: usize = 1 << 20;

/// One tensor of a checkpoint: little-endian elements in row-major order, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, unique in the checkpoint.
    pub name: String,
    /// Type of its elements.
    pub float_type: FloatType,
    /// Its dimensions, 1 to 4 of them, none 0.
    pub shape: Vec<u64>,
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Where its bytes start in that file.
    pub offset: u64,
    /// Its bytes: the product of the shape times the size of an element.
    pub length: u64,
}

/// One weights file of a checkpoint, open for reading.
#[derive(Debug)]
pub struct SourceFile {
    /// Its file name.
    pub name: String,
    /// Its path, as the user would write it.
    pub path: PathBuf,
    /// The open file; its cursor is not used.
    pub file: File,
    /// Its bytes.
    pub length: u64,
    /// Where its data starts: the bytes of the length field and the header.
    pub data_start: u64,
    /// Its tensors, in the order of their offsets: a range of [`Checkpoint::tensors`].
    pub tensors: Range<usize>,
}

/// A checkpoint whose headers were read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// The weights files, ordered by name.
    pub files: Vec<SourceFile>,
    /// All tensors, ordered by file and offset.
    pub tensors: Vec<TensorInfo>,
    /// The object in config.json.
    pub config: Map<String, Value>,
    /// Name and bytes of those of [`SIDE_FILES`] that are present, in that order. The first is always config.json.
    pub side_files: Vec<(String, Vec<u8>)>,
    /// Name and bytes of the index of a sharded checkpoint; a pack needs nothing of it but its hash.
    pub index: Option<(String, Vec<u8>)>,
    /// What the user should know.
    pub notices: Vec<Notice>,
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a snapshot folder or one `.safetensors` file with its config.json beside it. Where a
    /// folder has both, `model.safetensors` wins over the index, as in transformers. `config_override` is read in place of
    /// config.json and stored under its name.
    ///
    /// Links inside a folder are followed only where they stay in it, or lead into the blobs of the hub cache that the
    /// folder is a snapshot of.
    ///
    /// # Errors
    ///
    /// A [`SourceError`] that names the file.
    pub fn open(path: &Path, config_override: Option<&Path>) -> Result<Self, SourceError> {
        let (folder, weights) = snapshot::locate(path)?;
        let side_files = read_side_files(&folder, config_override)?;
        let config_path = config_override.map_or_else(|| folder.path(CONFIG), Path::to_owned);
        let config = side_files.first().map_or(&[][..], |(_, bytes)| bytes);
        let config = parse_config(config, &config_path)?;
        if let Some(source) = Quantised::by_config(&config) {
            return Err(SourceError::Quantised { path: config_path, source });
        }
        let mut notices = Vec::new();
        let (index, files, tensors) = match weights {
            Weights::Single(name) => {
                if name == SINGLE && path.is_dir() && snapshot::exists(&folder, INDEX) {
                    notices.push(Notice::IndexIgnored);
                }
                let file = folder.file(&name)?.ok_or_else(|| SourceError::NotACheckpoint { path: path.to_owned() })?;
                let (file, tensors) = read_header(file, name, 0, 0)?;
                (None, vec![file], tensors)
            }
            Weights::Sharded => {
                let (bytes, index) = read_index(&folder)?;
                let (files, tensors) = read_shards(&folder, &index)?;
                (Some((INDEX.to_owned(), bytes)), files, tensors)
            }
        };
        let mut checkpoint = Self { files, tensors, config, side_files, index, notices };
        checkpoint.rename()?;
        Ok(checkpoint)
    }

    /// Gives every tensor the name that transformers would have written: see [`Naming`].
    fn rename(&mut self) -> Result<(), SourceError> {
        let naming = Naming::of(self.tensors.iter().map(|tensor| tensor.name.as_str()));
        if naming.is_plain() {
            return Ok(());
        }
        let mut holders = HashMap::with_capacity(self.tensors.len());
        for tensor in &mut self.tensors {
            tensor.name = naming.stored(&tensor.name);
            if let Some(first) = holders.insert(tensor.name.clone(), tensor.file) {
                let file = |index: usize| self.files.get(index).map(|file| file.name.clone()).unwrap_or_default();
                let (tensor, first, second) = (tensor.name.clone(), file(first), file(tensor.file));
                return Err(SourceError::DuplicateTensor { tensor, first, second });
            }
        }
        self.notices.push(Notice::Renamed { naming });
        Ok(())
    }

    /// Fills `buf` with the bytes of `tensor`, one of [`Checkpoint::tensors`], from byte `from` of the tensor on.
    ///
    /// # Errors
    ///
    /// [`SourceError::Io`] where the file cannot be read or has become shorter since it was opened, and where the range is
    /// not inside the tensor.
    pub fn read(&self, tensor: &TensorInfo, from: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let end = from.checked_add(buf.len() as u64).filter(|&end| end <= tensor.length);
        let file = self.files.get(tensor.file);
        let result = match (file, end) {
            (Some(file), Some(_)) => read_exact_at(&file.file, buf, tensor.offset + from),
            _ => Err(std::io::ErrorKind::InvalidInput.into()),
        };
        result.map_err(|source| SourceError::Io { path: file.map(|file| file.path.clone()).unwrap_or_default(), source })
    }

    /// Whether two tensors have the same shape and, each in float32, the same values. Both are read in pieces, up to
    /// the first difference.
    ///
    /// # Errors
    ///
    /// [`SourceError::Io`].
    pub fn same_values(&self, a: &TensorInfo, b: &TensorInfo) -> Result<bool, SourceError> {
        if a.shape != b.shape {
            return Ok(false);
        }
        let same_type = a.float_type == b.float_type;
        let [left_size, right_size] = [a, b].map(|tensor| tensor.float_type.size());
        let (mut left, mut right) = (AlignedBuf::new(COMPARE_LEN), AlignedBuf::new(COMPARE_LEN));
        let (elements, most) = (a.length / left_size as u64, COMPARE_LEN / left_size.max(right_size));
        let mut from = 0;
        while from < elements {
            let count = usize::try_from(elements - from).unwrap_or(most).min(most);
            let (left, right) = (left.first_mut(count * left_size), right.first_mut(count * right_size));
            self.read(a, from * left_size as u64, left)?;
            self.read(b, from * right_size as u64, right)?;
            let same = if same_type { left == right } else { widened(a, left).eq(widened(b, right)) };
            if !same {
                return Ok(false);
            }
            from += count as u64;
        }
        Ok(true)
    }
}

/// The bits of a tensor's elements in float32, which holds every value of the other types.
fn widened<'a>(tensor: &TensorInfo, bytes: &'a [u8]) -> impl Iterator<Item = u32> + use<'a> {
    let (float_type, size) = (tensor.float_type, tensor.float_type.size());
    bytes.chunks_exact(size).map(move |element| match (float_type, element) {
        (FloatType::F16, &[low, high]) => f16::from_le_bytes([low, high]).to_f32().to_bits(),
        (FloatType::Bf16, &[low, high]) => u32::from(u16::from_le_bytes([low, high])) << 16,
        (_, element) => element.try_into().map_or(0, u32::from_le_bytes),
    })
}

/// The side files that are present, config.json first and required.
fn read_side_files(folder: &Folder, config: Option<&Path>) -> Result<Vec<(String, Vec<u8>)>, SourceError> {
    let mut files = Vec::with_capacity(SIDE_FILES.len());
    for name in SIDE_FILES {
        let (file, limit) = match config {
            _ if name != CONFIG => (folder.file(name)?, MAX_SIDE_FILE_LEN),
            Some(path) => (Some(OpenFile::open(path, path.to_owned())?), MAX_CONFIG_LEN),
            None => (folder.file(name)?, MAX_CONFIG_LEN),
        };
        match file {
            Some(file) => files.push((name.to_owned(), file.read(limit)?)),
            None if name == CONFIG => return Err(SourceError::NoConfig { folder: folder.shown.clone() }),
            None => {}
        }
    }
    Ok(files)
}

/// The object in config.json. Only its top level is searched for repeated keys: what the converter reads stands there.
fn parse_config(bytes: &[u8], path: &Path) -> Result<Map<String, Value>, SourceError> {
    let object: Object<Value> =
        serde_json::from_slice(bytes).map_err(|source| SourceError::Json { path: path.to_owned(), source })?;
    match object.repeated {
        Some(key) => Err(SourceError::DuplicateKey { path: path.to_owned(), key }),
        None => Ok(object.entries.into_iter().collect()),
    }
}

/// Reads the header of one weights file; its tensors will stand from `first` on in the list of all.
fn read_header(
    file: OpenFile,
    name: String,
    index: usize,
    first: usize,
) -> Result<(SourceFile, Vec<TensorInfo>), SourceError> {
    let refuse = |source| match source {
        HeaderError::Quantised { source } => SourceError::Quantised { path: file.path.clone(), source },
        source => SourceError::Header { path: file.path.clone(), source },
    };
    let field = file.read_first(file.len.min(header::LENGTH_FIELD) as usize)?;
    let data_start = header::data_start(&field, file.len).map_err(refuse)?;
    // At most MAX_HEADER_LEN, and no more than the file has.
    let bytes = file.read_first(data_start as usize)?;
    let Header { data_start, mut tensors } = parse_header(&bytes, file.len).map_err(refuse)?;
    for tensor in &mut tensors {
        tensor.file = index;
    }
    let OpenFile { path, file, len: length } = file;
    Ok((SourceFile { name, path, file, length, data_start, tensors: first..first + tensors.len() }, tensors))
}

/// What is used of an index. Serde refuses a second `weight_map` by itself.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: Object<String>,
}

/// The index of a sharded checkpoint: tensor to shard.
fn read_index(folder: &Folder) -> Result<(Vec<u8>, HashMap<String, String>), SourceError> {
    let path = folder.path(INDEX);
    let file = folder.file(INDEX)?.ok_or_else(|| SourceError::NoWeights { folder: folder.shown.clone() })?;
    let bytes = file.read(MAX_INDEX_LEN)?;
    let Index { weight_map } =
        serde_json::from_slice(&bytes).map_err(|source| SourceError::Json { path: path.clone(), source })?;
    if let Some(key) = weight_map.repeated {
        return Err(SourceError::DuplicateKey { path, key });
    }
    if let Some((_, shard)) = weight_map.entries.iter().find(|(_, shard)| !snapshot::is_plain_name(shard)) {
        return Err(SourceError::ShardName { index: path, shard: shard.clone() });
    }
    Ok((bytes, weight_map.entries.into_iter().collect()))
}

/// Reads every shard of the index and checks that the two agree.
fn read_shards(folder: &Folder, index: &HashMap<String, String>) -> Result<(Vec<SourceFile>, Vec<TensorInfo>), SourceError> {
    let shards: BTreeSet<&str> = index.values().map(String::as_str).collect();
    let (mut files, mut tensors) = (Vec::with_capacity(shards.len()), Vec::new());
    for (i, shard) in shards.into_iter().enumerate() {
        let missing = || SourceError::MissingShard { index: folder.path(INDEX), shard: shard.to_owned() };
        let file = folder.file(shard)?.ok_or_else(missing)?;
        let (file, found) = read_header(file, shard.to_owned(), i, tensors.len())?;
        files.push(file);
        tensors.extend(found);
    }
    check_index(index, &files, &tensors)?;
    Ok((files, tensors))
}

/// Checks that the shards hold exactly the tensors that the index lists, each where it says.
fn check_index(index: &HashMap<String, String>, files: &[SourceFile], tensors: &[TensorInfo]) -> Result<(), SourceError> {
    let mut holders: HashMap<&str, &str> = HashMap::with_capacity(tensors.len());
    for file in files {
        for TensorInfo { name, .. } in tensors.get(file.tensors.clone()).unwrap_or_default() {
            let (tensor, shard) = (name.clone(), file.name.clone());
            if let Some(first) = holders.insert(name, &file.name) {
                return Err(SourceError::DuplicateTensor { tensor, first: first.to_owned(), second: shard });
            }
            if !index.contains_key(name) {
                return Err(SourceError::NotInIndex { tensor, shard });
            }
        }
    }
    // The smallest name, so that the message does not depend on the order of a hash map.
    let misplaced = index.iter().filter(|(tensor, shard)| holders.get(tensor.as_str()) != Some(&shard.as_str())).min();
    match misplaced {
        Some((tensor, shard)) => Err(SourceError::NotInShard { tensor: tensor.clone(), shard: shard.clone() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
