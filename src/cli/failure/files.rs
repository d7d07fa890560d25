//! Hints about files: packs that are read, and outputs that are written.

use std::io::ErrorKind;
use std::path::Path;

use super::super::ui;
use crate::data::Foreign;
use crate::export::WriteError;
use crate::format::FormatError;
use crate::{FileError, OpenError, ReadError};

/// What to do about an error of the operating system, of any file.
pub(super) fn of_io(error: &std::io::Error) -> Option<String> {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(FULL.into()),
        ErrorKind::FileTooLarge => Some(FILE_SIZE.into()),
        _ => None,
    }
}

/// What to do about a full file system.
const FULL: &str = "free some space, or write to another file system";

/// What to do about a limit of the size of files.
const FILE_SIZE: &str = "the file system or `ulimit -f` does not allow a file of this size";

/// What to do about a folder that was not made durable.
pub(super) const SYNC: &str =
    "`sync` makes it durable; until then a loss of power may take it away again, or bring back an older one";

pub(super) fn of_target(path: &Path, error: &std::io::Error) -> Option<String> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some(match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            format!("create the folder {} first", folder.display())
        }
        ErrorKind::PermissionDenied => format!("you need permission to write to the folder {}", folder.display()),
        ErrorKind::ReadOnlyFilesystem => "name a path on a writable file system".to_owned(),
        ErrorKind::IsADirectory => format!("OUT must be a file, such as {}", path.join("model.nf4pack").display()),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FULL.to_owned(),
        ErrorKind::FileTooLarge => FILE_SIZE.to_owned(),
        _ => return None,
    })
}

pub(super) fn no_space(needed: u64, available: u64) -> String {
    let missing = ui::bytes(needed.saturating_sub(available) as f64);
    format!("free {missing} more, or write to another file system")
}

pub(super) fn of_open(error: &OpenError) -> Option<String> {
    match error {
        OpenError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            Some("`nf4pack convert SRC OUT.nf4pack` writes a pack".into())
        }
        OpenError::Io { path, .. } if path.join("config.json").is_file() => {
            let folder = path.display().to_string();
            let folder = folder.trim_end_matches('/');
            Some(format!("this is a checkpoint: `nf4pack convert {folder} {folder}.nf4pack` makes a pack of it, once"))
        }
        OpenError::Io { source, .. } if source.kind() == ErrorKind::InvalidInput => {
            Some("FILE must be an .nf4pack file".into())
        }
        OpenError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            Some("you need permission to read it".into())
        }
        OpenError::Io { .. } => None,
        OpenError::Format { source, .. } => of_format(source).map(str::to_owned),
    }
}

fn of_format(error: &FormatError) -> Option<&'static str> {
    Some(match error {
        FormatError::BadMagic { .. } => "FILE must be a pack that `nf4pack convert SRC OUT.nf4pack` wrote",
        FormatError::UnsupportedVersion { .. } | FormatError::UnknownFeatures { .. } => {
            "update nf4pack: a newer version reads this file"
        }
        FormatError::TooShort { .. } | FormatError::FileLength { .. } => "the file was cut or extended: copy it again",
        _ => "the file is damaged: copy it again, or convert the checkpoint again",
    })
}

pub(super) fn of_read(error: &ReadError) -> Option<String> {
    match error {
        ReadError::Open(e) => of_open(e),
        ReadError::Damaged { path, .. } => Some(damaged(path)),
        ReadError::Truncated { .. } => Some("copy the file again, and do not change it while nf4pack uses it".into()),
        ReadError::Memory { .. } => Some(MORE_MEMORY.into()),
        ReadError::Io { .. } => None,
    }
}

/// What to do about a damaged pack.
pub(super) fn damaged(path: &Path) -> String {
    format!("`nf4pack verify {}` lists the damaged sections; convert the checkpoint again", path.display())
}

pub(super) fn of_file(error: &FileError) -> Option<String> {
    match error {
        FileError::Io { .. } => None,
        FileError::NotAFile { .. } => Some("put the file itself there".to_owned()),
        FileError::Link { .. } => Some("put a copy of the file there".to_owned()),
        FileError::TooLarge { .. } => Some("the file is damaged, or another one has its name".to_owned()),
    }
}

pub(super) fn of_write(error: &WriteError) -> Option<String> {
    match error {
        WriteError::TargetExists { .. } => Some("name a new folder, or empty this folder".into()),
        WriteError::NoSpace { needed, available, .. } => Some(no_space(*needed, *available)),
        WriteError::Target { path, source } => of_target(path, source),
        WriteError::NotDurable { .. } => Some(SYNC.into()),
        WriteError::Pack(e) => of_read(e),
        WriteError::Memory { .. } => Some(MORE_MEMORY.into()),
        WriteError::Source { .. }
        | WriteError::TensorName { .. }
        | WriteError::Safetensors { .. }
        | WriteError::Cancelled => None,
    }
}

/// The hint if a tensor does not fit in memory.
const MORE_MEMORY: &str = "a machine with more memory can do it: one tensor at a time must fit";

/// How samples are got out of a file that is not read.
pub(super) fn of_foreign(foreign: Foreign) -> &'static str {
    match foreign {
        Foreign::Gzip => "unpack it: `gzip -dc FILE > samples.jsonl`",
        Foreign::Zstandard => "unpack it: `zstd -dc FILE > samples.jsonl`",
        Foreign::Zip => "unpack it: `unzip FILE`",
        Foreign::Parquet => {
            "write it as JSON Lines: `python -c \"import pandas; pandas.read_parquet('FILE').to_json('samples.jsonl', \
             orient='records', lines=True)\"`"
        }
        Foreign::Arrow => {
            "write it as JSON Lines: `python -c \"import pandas; pandas.read_feather('FILE').to_json('samples.jsonl', \
             orient='records', lines=True)\"`"
        }
        Foreign::Utf16 => "save it as UTF-8: `iconv -f UTF-16 -t UTF-8 FILE > samples.jsonl`",
        Foreign::Table => {
            "write it as JSON Lines: `python -c \"import pandas; pandas.read_csv('FILE', sep=None, engine='python')\
             .to_json('samples.jsonl', orient='records', lines=True)\"`; its columns need the names of a known form, such as \
             prompt and completion"
        }
        Foreign::Binary => "samples are JSON Lines or plain text in UTF-8",
        _ => "to train on it as plain text, give it a name that ends in .txt",
    }
}
