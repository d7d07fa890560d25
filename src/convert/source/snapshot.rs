//! Which files make up a checkpoint, and which paths they may have.

use std::fs::{self, File, Metadata};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::SourceError;
use crate::io::read_exact_at;

/// The single weights file of a snapshot.
pub(super) const SINGLE: &str = "model.safetensors";
/// The list of shards of a snapshot.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Where the weights are listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Weights {
    /// One file of this name.
    Single(String),
    /// An index with shards.
    Sharded,
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

    /// The regular file `name` of this folder; `None` where there is none. `name` must be a plain file name.
    ///
    /// # Errors
    ///
    /// [`SourceError::LinkLeavesFolder`], [`SourceError::NotAFile`] or [`SourceError::Io`], such as for a dangling link.
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
}

/// The blobs folder of a hub cache, where `root` is `.../models--X--Y/snapshots/REV` without symlinks.
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
        let opened = Self::open_regular(target);
        match opened {
            Ok(Some((file, metadata))) => Ok(Self { path, file, len: metadata.len() }),
            Ok(None) => Err(SourceError::NotAFile { path }),
            Err(source) => Err(SourceError::Io { path, source }),
        }
    }

    /// `None` where `target` is not a regular file: asked before opening too, since opening a pipe waits for its writer.
    fn open_regular(target: &Path) -> std::io::Result<Option<(File, Metadata)>> {
        if !fs::metadata(target)?.is_file() {
            return Ok(None);
        }
        let file = File::open(target)?;
        let metadata = file.metadata()?;
        Ok(metadata.is_file().then_some((file, metadata)))
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
            return Err(SourceError::NoWeights { folder: path.to_owned() });
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

/// Whether the folder has an entry `name`, a dangling link included: what is named there must not be passed over.
pub(super) fn exists(folder: &Folder, name: &str) -> bool {
    fs::symlink_metadata(folder.root.join(name)).is_ok()
}

/// Whether `name` can only be a file directly in a folder, on any platform.
pub(super) fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}
