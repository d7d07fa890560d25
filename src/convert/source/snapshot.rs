//! Which files make up a checkpoint, and which paths they may have.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::error::SourceError;
use crate::io::read::{self, FileError, Links, RegularFile};
use crate::io::read_exact_at;

/// The single weights file of a snapshot.
pub(super) const SINGLE: &str = "model.safetensors";
/// The list of shards of a snapshot.
pub const INDEX: &str = "model.safetensors.index.json";

/// Where the weights are listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Weights {
    /// One file of this name.
    Single(String),
    /// An index with shards.
    Sharded,
    /// All shards of a set, without an index.
    Shards(Vec<String>),
}

/// A folder whose files may be read, and nothing else.
#[derive(Debug)]
pub(super) struct Folder {
    /// As the user named it, for messages.
    pub(super) shown: PathBuf,
    /// Without symlinks.
    root: PathBuf,
    /// Without symlinks: where the links of a hub cache lead.
    blobs: Option<PathBuf>,
}

impl Folder {
    /// The folder at `path`. The user chose the path, so links in it are followed.
    pub(super) fn open(path: &Path) -> Result<Self, SourceError> {
        let root = fs::canonicalize(path).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
        let blobs = hub_blobs(&root);
        Ok(Self { shown: path.to_owned(), root, blobs })
    }

    /// The path of `name` in this folder, for messages.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.shown.join(name)
    }

    /// The regular file `name` of this folder; `None` where there is none. `name` must be a plain
    /// file name.
    ///
    /// # Errors
    ///
    /// [`SourceError::LinkLeavesFolder`], [`SourceError::NotAFile`] or [`SourceError::Io`], such as
    /// for a dangling link.
    pub(super) fn file(&self, name: &str) -> Result<Option<OpenFile>, SourceError> {
        let path = self.path(name);
        let io = |source| SourceError::Io { path: path.clone(), source };
        let link = self.root.join(name);
        match fs::symlink_metadata(&link) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
            Ok(_) => {}
        }
        let target = fs::canonicalize(&link).map_err(io)?;
        let inside = |folder: &PathBuf| target.starts_with(folder);
        if !inside(&self.root) && !self.blobs.as_ref().is_some_and(inside) {
            return Err(SourceError::LinkLeavesFolder { path, target });
        }
        OpenFile::open(&target, path).map(Some)
    }

    /// The names of what is in the folder `name` of this folder, in order; none where there is no
    /// such folder.
    ///
    /// # Errors
    /// [`SourceError::LinkLeavesFolder`], [`SourceError::TooManyFiles`] or [`SourceError::Io`].
    pub(super) fn names_in(&self, name: &str, limit: usize) -> Result<Vec<String>, SourceError> {
        let path = self.path(name);
        let folder = match fs::canonicalize(self.root.join(name)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            found => found.map_err(|source| SourceError::Io { path: path.clone(), source })?,
        };
        if !folder.starts_with(&self.root) {
            return Err(SourceError::LinkLeavesFolder { path, target: folder });
        }
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let names = names(&folder, limit + 1).map_err(|source| SourceError::Io { path: path.clone(), source })?;
        if names.len() > limit {
            return Err(SourceError::TooManyFiles { path, limit });
        }
        Ok(names)
    }
}

/// The names of at most `limit` files in a folder, in order. Names that are not UTF-8 are skipped:
/// no file of a checkpoint has one.
fn names(folder: &Path, limit: usize) -> std::io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.take(limit);
    let mut names: Vec<String> =
        entries.filter_map(|e| e.map(|e| e.file_name().into_string().ok()).transpose()).collect::<Result<_, _>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Entries of a folder that are read to find why it is no checkpoint.
const MAX_ENTRIES: usize = 10_000;

/// The weights of a folder that has neither the usual file nor an index: a whole set of shards, or
/// the reason why not.
fn without_index(folder: &Folder) -> Result<Weights, SourceError> {
    let shown = &folder.shown;
    let names = names(&folder.root, MAX_ENTRIES).map_err(|source| SourceError::Io { path: shown.clone(), source })?;
    if let Some(snapshot) = cached_snapshot(&folder.root) {
        return Err(SourceError::HubCache { folder: shown.clone(), snapshot: shown.join(snapshot) });
    }
    let shards: Vec<String> = names.iter().filter(|name| shard_number(name).is_some()).cloned().collect();
    let count = shards.len() as u64;
    let whole = shards.iter().zip(1_u64..).all(|(name, number)| shard_number(name) == Some((number, count)));
    if whole && count > 0 {
        return Ok(Weights::Shards(shards));
    }
    let is_weights =
        |name: &String| [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"].iter().any(|end| name.ends_with(end));
    Err(SourceError::NoWeights { folder: shown.clone(), found: names.into_iter().filter(is_weights).collect() })
}

/// Number and count in the name of a shard, `model-00001-of-00002.safetensors`.
fn shard_number(name: &str) -> Option<(u64, u64)> {
    let (number, count) = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    let parse = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
    Some((parse(number)?, parse(count)?))
}

/// Bytes of a file with the name of a revision.
const MAX_REF_LEN: u64 = 1 << 12;

/// The snapshot in the cache of a model: the one of its main branch, or the only one.
fn cached_snapshot(root: &Path) -> Option<PathBuf> {
    let snapshots = root.join("snapshots");
    let main = read::read(&root.join("refs").join("main"), Links::Follow, MAX_REF_LEN);
    let main = main.ok().and_then(|bytes| Some(str::from_utf8(&bytes).ok()?.trim().to_owned()));
    let main = main.filter(|name| is_plain_name(name) && snapshots.join(name).is_dir());
    let only = || names(&snapshots, 2).ok().and_then(|names| <[String; 1]>::try_from(names).ok()).map(|[name]| name);
    let name = main.or_else(only)?;
    Some(Path::new("snapshots").join(name))
}

/// The blobs folder of a hub cache, where `root` is `.../models--X--Y/snapshots/REV` without
/// symlinks.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent().filter(|p| p.file_name().is_some_and(|name| name == "snapshots"))?;
    let model = snapshots.parent()?;
    model.file_name()?.to_str().filter(|name| name.starts_with("models--"))?;
    // A blobs folder that is itself a link could lead anywhere.
    let blobs = fs::canonicalize(model.join("blobs")).ok()?;
    (blobs.parent() == Some(model)).then_some(blobs)
}

/// A regular file that is open for reading.
#[derive(Debug)]
pub(super) struct OpenFile {
    /// As the user would name it.
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Bytes.
    pub(super) len: u64,
}

impl OpenFile {
    /// Opens `target`, which is called `path` in messages.
    pub(super) fn open(target: &Path, path: PathBuf) -> Result<Self, SourceError> {
        match RegularFile::open(target, Links::Follow) {
            Ok(RegularFile { file, len, .. }) => Ok(Self { path, file, len }),
            Err(FileError::Io { source, .. }) => Err(SourceError::Io { path, source }),
            Err(_) => Err(SourceError::NotAFile { path }),
        }
    }

    /// The file's bytes, at most `limit` of them.
    pub(super) fn read(&self, limit: u64) -> Result<Vec<u8>, SourceError> {
        let too_large = || SourceError::TooLarge { path: self.path.clone(), limit, found: self.len };
        let len = usize::try_from(self.len).ok().filter(|_| self.len <= limit).ok_or_else(too_large)?;
        self.read_first(len)
    }

    /// The first `len` bytes.
    pub(super) fn read_first(&self, len: usize) -> Result<Vec<u8>, SourceError> {
        let mut bytes = vec![0; len];
        read_exact_at(&self.file, &mut bytes, 0).map_err(|source| SourceError::Io { path: self.path.clone(), source })?;
        Ok(bytes)
    }
}

/// What `path` points at: a snapshot folder, or one weights file and its folder.
pub(super) fn locate(path: &Path) -> Result<(Folder, Weights), SourceError> {
    let metadata = fs::metadata(path).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
    if metadata.is_dir() {
        let folder = Folder::open(path)?;
        // A folder that may not be searched would look empty.
        fs::metadata(folder.root.join(".")).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
        let weights = if exists(&folder, SINGLE) {
            Weights::Single(SINGLE.to_owned())
        } else if exists(&folder, INDEX) {
            Weights::Sharded
        } else {
            without_index(&folder)?
        };
        return Ok((folder, weights));
    }
    let name = path.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".safetensors"));
    let Some(name) = name.filter(|_| metadata.is_file()) else {
        return Err(SourceError::NotACheckpoint { path: path.to_owned() });
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((Folder::open(parent)?, Weights::Single(name.to_owned())))
}

/// Whether the folder has an entry `name`, a dangling link included: what is named there must not
/// be passed over.
pub(super) fn exists(folder: &Folder, name: &str) -> bool {
    fs::symlink_metadata(folder.root.join(name)).is_ok()
}

/// Whether `name` can only be a file directly in a folder, on any platform.
pub(super) fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}
