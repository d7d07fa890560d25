//! The only reader of safetensors checkpoints: a snapshot folder (one file, or an index with
//! shards) or a single file.
//!
//! Everything in a checkpoint is taken as hostile: names, offsets, shapes and links are checked
//! before they are used, and nothing is allocated that the file's own length does not bear out.
//! Element bytes stay on disk until [`Checkpoint::read`] asks for them.

mod error;
mod header;
mod json;
mod limits;
mod quantised;
mod side;
mod snapshot;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use serde_json::{Map, Value};

pub use error::SourceError;
pub use header::{
    Header, HeaderError, MAX_HEADER_LEN, MAX_NAME_LEN, MAX_RANK, TensorInfo, Unstorable, UnstorableTensor, parse_header,
};
pub use limits::{MAX_CONFIG_LEN, MAX_INDEX_LEN, MAX_SIDE_FILE_LEN, MAX_TENSORS};
pub use quantised::Quantised;

use self::json::Object;
pub(super) use self::side::{no_tokenizer, tokens_without_rows};
pub use self::snapshot::INDEX;
use self::snapshot::{Folder, OpenFile, SINGLE, Weights};
use super::notice::Notice;
use crate::arch::config::standard_json;
use crate::arch::names::Naming;
use crate::format::FloatType;
pub use crate::format::files::CONFIG;
use crate::io::{AlignedBuf, read_exact_at};

/// Bytes that are compared at a time.
const COMPARE_LEN: usize = 1 << 20;

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
    /// All tensors that a pack can hold, ordered by file and offset.
    pub tensors: Vec<TensorInfo>,
    /// Those that it cannot hold, in the same order.
    pub unstorable: Vec<UnstorableTensor>,
    /// Tensors that the index lists and no shard has, each with the shard that should, ordered by
    /// name.
    pub absent: Vec<(String, String)>,
    /// The quantisation that config.json speaks of. The tensors show none, or the checkpoint would
    /// have been refused.
    pub claimed_quantisation: Option<Quantised>,
    /// Where config.json is, as the user would write it.
    pub config_path: PathBuf,
    /// The object in config.json.
    pub config: Map<String, Value>,
    /// Name in a pack and bytes of those of
    /// [`SNAPSHOT_FILES`](crate::format::files::SNAPSHOT_FILES) that are present, in that order,
    /// and of further chat templates. The first is always config.json.
    pub side_files: Vec<(String, Vec<u8>)>,
    /// Name and bytes of the index of a sharded checkpoint; a pack needs nothing of it but its
    /// hash.
    pub index: Option<(String, Vec<u8>)>,
    /// What the user should know.
    pub notices: Vec<Notice>,
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a snapshot folder or one `.safetensors` file with its
    /// config.json next to it. Where a folder has both, `model.safetensors` wins over the index, as
    /// in transformers. `config_override` is read in place of config.json and stored under its
    /// name.
    ///
    /// Links inside a folder are followed only where they stay in it, or lead into the blobs of the
    /// hub cache that the folder is a snapshot of.
    ///
    /// # Errors
    ///
    /// A [`SourceError`] that names the file.
    pub fn open(path: &Path, config_override: Option<&Path>) -> Result<Self, SourceError> {
        let (folder, weights) = snapshot::locate(path)?;
        let (side_files, mut notices) = side::read(&folder, config_override)?;
        let config_path = config_override.map_or_else(|| folder.path(CONFIG), Path::to_owned);
        let config = side_files.first().map_or(&[][..], |(_, bytes)| bytes);
        let config = parse_config(config, &config_path)?;
        let (mut index, mut absent) = (None, Vec::new());
        let Contents { files, tensors, unstorable } = match weights {
            Weights::Single(name) => {
                if name == SINGLE && path.is_dir() && snapshot::exists(&folder, INDEX) {
                    notices.push(Notice::IndexIgnored);
                }
                let missing = |_: &str| SourceError::NotACheckpoint { path: path.to_owned() };
                Contents::read(&folder, [name.as_str()], missing)?
            }
            Weights::Shards(names) => {
                notices.push(Notice::NoIndex { shards: names.len() });
                let missing = |_: &str| SourceError::NotACheckpoint { path: path.to_owned() };
                Contents::read(&folder, names.iter().map(String::as_str), missing)?
            }
            Weights::Sharded => {
                let (bytes, weight_map) = read_index(&folder)?;
                let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
                let missing = |shard: &str| SourceError::MissingShard { index: folder.path(INDEX), shard: shard.to_owned() };
                let contents = Contents::read(&folder, shards, missing)?;
                absent = contents.compare_with(&weight_map, &mut notices);
                index = Some((INDEX.to_owned(), bytes));
                contents
            }
        };
        let claimed_quantisation = Quantised::by_config(&config);
        let mut checkpoint = Self {
            files,
            tensors,
            unstorable,
            absent,
            claimed_quantisation,
            config_path,
            config,
            side_files,
            index,
            notices,
        };
        checkpoint.rename();
        checkpoint.drop_copies()?;
        Ok(checkpoint)
    }

    /// Gives every tensor the name that transformers would have written: see [`Naming`].
    fn rename(&mut self) {
        let naming = Naming::of(self.tensors.iter().map(|tensor| tensor.name.as_str()));
        if naming == Naming::default() {
            return;
        }
        self.tensors.iter_mut().for_each(|tensor| tensor.name = naming.stored(&tensor.name));
        self.unstorable.iter_mut().for_each(|tensor| tensor.name = naming.stored(&tensor.name));
        self.absent.iter_mut().for_each(|(tensor, _)| *tensor = naming.stored(tensor));
        self.notices.push(Notice::renamed(&naming));
    }

    /// Names are unique in a checkpoint: of tensors with one name and the same values the first one
    /// stays. What cannot be stored may be in every shard: nothing is taken from it.
    fn drop_copies(&mut self) -> Result<(), SourceError> {
        let mut holders: HashMap<&str, &TensorInfo> = HashMap::with_capacity(self.tensors.len());
        let mut copies = HashSet::new();
        for (i, tensor) in self.tensors.iter().enumerate() {
            match holders.entry(&tensor.name) {
                Entry::Vacant(place) => drop(place.insert(tensor)),
                Entry::Occupied(first) if self.same_values(first.get(), tensor)? => drop(copies.insert(i)),
                Entry::Occupied(first) => {
                    let file = |index: usize| self.files.get(index).map(|file| file.name.clone()).unwrap_or_default();
                    let (first, second) = (file(first.get().file), file(tensor.file));
                    return Err(SourceError::DuplicateTensor { tensor: tensor.name.clone(), first, second });
                }
            }
        }
        let name = |&i: &usize| self.tensors.get(i).map_or_else(String::new, |tensor| tensor.name.clone());
        let mut names: Vec<String> = copies.iter().map(name).collect();
        if names.is_empty() {
            return Ok(());
        }
        names.sort_unstable();
        names.dedup();
        let mut i = 0..;
        self.tensors.retain(|_| i.next().is_none_or(|i| !copies.contains(&i)));
        let mut start = 0;
        for (number, file) in self.files.iter_mut().enumerate() {
            let end = start + self.tensors.iter().filter(|tensor| tensor.file == number).count();
            file.tensors = start..end;
            start = end;
        }
        self.notices.push(Notice::Copies { tensors: names });
        Ok(())
    }

    /// Fills `buf` with the bytes of `tensor`, one of [`Checkpoint::tensors`], from byte `from` of
    /// the tensor on.
    ///
    /// # Errors
    ///
    /// [`SourceError::Io`] where the file cannot be read or has become shorter since it was opened,
    /// and where the range is not inside the tensor.
    pub fn read(&self, tensor: &TensorInfo, from: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let end = from.checked_add(buf.len() as u64).filter(|&end| end <= tensor.length);
        let file = self.files.get(tensor.file);
        let result = match (file, end) {
            (Some(file), Some(_)) => read_exact_at(&file.file, buf, tensor.offset + from),
            _ => Err(std::io::ErrorKind::InvalidInput.into()),
        };
        result.map_err(|source| SourceError::Io { path: file.map(|file| file.path.clone()).unwrap_or_default(), source })
    }

    /// Whether two tensors have the same shape and, each in float32, the same values. Both are read
    /// in pieces, up to the first difference.
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

impl Checkpoint {
    /// Whether `wide` is of float64 and has the values of `tensor`. Both are read in pieces, up to
    /// the first difference.
    ///
    /// # Errors
    ///
    /// [`SourceError::Io`].
    pub fn same_values_in_f64(&self, tensor: &TensorInfo, wide: &UnstorableTensor) -> Result<bool, SourceError> {
        const SIZE: u64 = size_of::<f64>() as u64;
        let size = tensor.float_type.size() as u64;
        let elements = tensor.length / size;
        if wide.why.type_name() != "F64" || wide.length != elements * SIZE {
            return Ok(false);
        }
        // Read as a tensor of twice as many elements of half the size.
        let wide = TensorInfo {
            name: wide.name.clone(),
            float_type: FloatType::F32,
            shape: vec![2 * elements],
            file: wide.file,
            offset: wide.offset,
            length: wide.length,
        };
        let (mut narrow_buf, mut wide_buf) = (AlignedBuf::new(COMPARE_LEN), AlignedBuf::new(COMPARE_LEN));
        let mut from = 0;
        while from < elements {
            let count = (elements - from).min(COMPARE_LEN as u64 / SIZE);
            let (left, right) = (narrow_buf.first_mut((count * size) as usize), wide_buf.first_mut((count * SIZE) as usize));
            self.read(tensor, from * size, left)?;
            self.read(&wide, from * SIZE, right)?;
            let values = right.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes).to_bits());
            if !widened(tensor, left).map(|bits| f64::from(f32::from_bits(bits)).to_bits()).eq(values) {
                return Ok(false);
            }
            from += count;
        }
        Ok(true)
    }
}

/// A type as safetensors names it.
fn type_name(float_type: FloatType) -> &'static str {
    match float_type {
        FloatType::F32 => "F32",
        FloatType::F16 => "F16",
        FloatType::Bf16 => "BF16",
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

/// The object in config.json. Only its top level is searched for repeated keys: what the converter
/// reads stands there.
fn parse_config(bytes: &[u8], path: &Path) -> Result<Map<String, Value>, SourceError> {
    let object: Object<Value> = serde_json::from_slice(&standard_json(bytes))
        .map_err(|source| SourceError::Json { path: path.to_owned(), source })?;
    match object.repeated {
        Some(key) => Err(SourceError::DuplicateKey { path: path.to_owned(), key }),
        None => Ok(object.entries.into_iter().collect()),
    }
}

/// The weights files of a checkpoint and what is in them.
#[derive(Default)]
struct Contents {
    files: Vec<SourceFile>,
    tensors: Vec<TensorInfo>,
    unstorable: Vec<UnstorableTensor>,
}

impl Contents {
    /// Reads the headers of these files, in their order.
    fn read<'a>(
        folder: &Folder,
        names: impl IntoIterator<Item = &'a str>,
        missing: impl Fn(&str) -> SourceError,
    ) -> Result<Self, SourceError> {
        let mut contents = Self::default();
        for name in names {
            let file = folder.file(name)?.ok_or_else(|| missing(name))?;
            contents.add(file, name)?;
        }
        contents.check_quantised()?;
        Ok(contents)
    }

    /// Reads the header of one weights file.
    fn add(&mut self, file: OpenFile, name: &str) -> Result<(), SourceError> {
        let refuse = |source| SourceError::Header { path: file.path.clone(), source };
        let field = file.read_first(file.len.min(header::LENGTH_FIELD) as usize)?;
        let data_start = header::data_start(&field, file.len).map_err(refuse)?;
        // At most MAX_HEADER_LEN, and no more than the file has.
        let bytes = file.read_first(data_start as usize)?;
        let Header { data_start, mut tensors, mut unstorable } = parse_header(&bytes, file.len).map_err(refuse)?;
        let (number, first) = (self.files.len(), self.tensors.len());
        tensors.iter_mut().for_each(|tensor| tensor.file = number);
        unstorable.iter_mut().for_each(|tensor| tensor.file = number);
        let OpenFile { path, file, len: length } = file;
        let tensors_of_file = first..first + tensors.len();
        self.files.push(SourceFile { name: name.to_owned(), path, file, length, data_start, tensors: tensors_of_file });
        self.tensors.extend(tensors);
        self.unstorable.extend(unstorable);
        Ok(())
    }

    fn file_name(&self, file: usize) -> &str {
        self.files.get(file).map_or("", |file| file.name.as_str())
    }

    /// The tensors must not show that the checkpoint was quantised before.
    fn check_quantised(&self) -> Result<(), SourceError> {
        let stored = self.tensors.iter().map(|t| (t.name.as_str(), type_name(t.float_type)));
        let others = self.unstorable.iter().map(|t| (t.name.as_str(), t.why.type_name()));
        let Some(source) = Quantised::by_tensors(stored.chain(others)) else { return Ok(()) };
        let shown_by = |name: &str| source.tensor() == Some(name);
        let stored = self.tensors.iter().find(|t| shown_by(&t.name)).map(|t| t.file);
        let file = stored.or_else(|| self.unstorable.iter().find(|t| shown_by(&t.name)).map(|t| t.file));
        let path = file.and_then(|file| self.files.get(file)).map(|file| file.path.clone()).unwrap_or_default();
        Err(SourceError::Quantised { path, source })
    }

    /// Adds a notice if the index and the shards differ in their tensors, or in the shard of one.
    /// The shards decide, as in transformers. Returns the tensors that the index lists and no shard
    /// has, each with its shard by the index, ordered by name.
    fn compare_with(&self, index: &HashMap<String, String>, notices: &mut Vec<Notice>) -> Vec<(String, String)> {
        let held = self.tensors.iter().map(|t| (t.name.as_str(), t.file));
        let held = held.chain(self.unstorable.iter().map(|t| (t.name.as_str(), t.file)));
        let mut holders: HashMap<&str, Vec<&str>> = HashMap::with_capacity(self.tensors.len());
        let (mut unlisted, mut elsewhere, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        for (name, file) in held {
            holders.entry(name).or_default().push(self.file_name(file));
            if !index.contains_key(name) {
                unlisted.push(name.to_owned());
            }
        }
        for (tensor, shard) in index {
            match holders.get(tensor.as_str()) {
                None => absent.push((tensor.clone(), shard.clone())),
                Some(shards) if !shards.contains(&shard.as_str()) => elsewhere.push(tensor.clone()),
                Some(_) => {}
            }
        }
        // The order of a hash map is no order.
        [&mut unlisted, &mut elsewhere].into_iter().for_each(|names| names.sort_unstable());
        absent.sort_unstable();
        if !absent.is_empty() || !unlisted.is_empty() || !elsewhere.is_empty() {
            let absent = absent.iter().map(|(tensor, _)| tensor.clone()).collect();
            notices.push(Notice::IndexDiffers { absent, unlisted, elsewhere });
        }
        absent
    }
}

/// What is used of an index. Serde refuses a second `weight_map` by itself.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: Object<String>,
}

/// The index of a sharded checkpoint: tensor to shard.
fn read_index(folder: &Folder) -> Result<(Vec<u8>, HashMap<String, String>), SourceError> {
    let path = folder.path(INDEX);
    let file =
        folder.file(INDEX)?.ok_or_else(|| SourceError::NoWeights { folder: folder.shown.clone(), found: Vec::new() })?;
    let bytes = side::read_one(&file, MAX_INDEX_LEN)?;
    let Index { weight_map } =
        serde_json::from_slice(&bytes).map_err(|source| SourceError::Json { path: path.clone(), source })?;
    if let Some(key) = weight_map.repeated {
        return Err(SourceError::DuplicateKey { path, key });
    }
    if weight_map.entries.is_empty() {
        return Err(SourceError::EmptyIndex { path });
    }
    if let Some((_, shard)) = weight_map.entries.iter().find(|(_, shard)| !snapshot::is_plain_name(shard)) {
        return Err(SourceError::ShardName { index: path, shard: shard.clone() });
    }
    Ok((bytes, weight_map.entries.into_iter().collect()))
}

#[cfg(test)]
mod tests;
