//! What can be wrong with a checkpoint's files.

use std::path::PathBuf;

use super::header::{HeaderError, Unstorable};
use super::quantised::Quantised;

/// Why a checkpoint cannot be read. Every message names the file; an underlying error is the
/// `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The operating system refused to read.
    #[error("cannot read {path}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Neither a snapshot folder nor a safetensors file.
    #[error("{path} is neither a folder nor a .safetensors file")]
    NotACheckpoint {
        /// The path given.
        path: PathBuf,
    },
    /// A folder without weights.
    #[error("{folder} has neither model.safetensors nor model.safetensors.index.json")]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The files in it that look like weights.
        found: Vec<String>,
    },
    /// The hub's cache of a model, which holds its snapshots.
    #[error("{folder} is the cache of a model, not one of the snapshots in it")]
    HubCache {
        /// The folder.
        folder: PathBuf,
        /// A snapshot in it.
        snapshot: PathBuf,
    },
    /// No config.json next to the weights.
    #[error("{folder} has no config.json: put it there, or name one with --config FILE")]
    NoConfig {
        /// The folder of the weights.
        folder: PathBuf,
    },
    /// A folder, pipe or device where a file should be.
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A symlink out of the checkpoint's folder that is not one of a hub cache.
    #[error("{path} is a link to {target}, outside of its folder: only the links of a hub cache are followed")]
    LinkLeavesFolder {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// The index names a shard by a path.
    #[error("{index} names the shard {shard:?}, which is not a plain file name")]
    ShardName {
        /// The index.
        index: PathBuf,
        /// The name in it.
        shard: String,
    },
    /// The index lists nothing.
    #[error("{path} lists no tensor")]
    EmptyIndex {
        /// The index.
        path: PathBuf,
    },
    /// A shard of the index is not there.
    #[error("the shard {shard:?} of {index} is missing: the download is incomplete")]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
    },
    /// A folder with more files than any real one of its kind.
    #[error("{path} has more than {limit} files")]
    TooManyFiles {
        /// The folder.
        path: PathBuf,
        /// Files accepted.
        limit: usize,
    },
    /// The text file that stands for a large file in a repository cloned without Git LFS.
    #[error("{path} is a Git LFS pointer, not the file that it stands for")]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A file that is larger than any real one of its kind.
    #[error("{path} has {found} bytes, at most {limit} are accepted")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes accepted.
        limit: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// A file is not the JSON object that it should be.
    #[error("{path} is not valid JSON of its kind")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key stands twice; other programs would keep either.
    #[error("{path} has the key {key:?} twice")]
    DuplicateKey {
        /// The file.
        path: PathBuf,
        /// The repeated key.
        key: String,
    },
    /// A weights file has a header that is not accepted.
    #[error("{path} is not a safetensors file that can be converted")]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// The checkpoint was quantised before.
    #[error("{path} is part of a quantised checkpoint")]
    Quantised {
        /// The file that shows it.
        path: PathBuf,
        /// How.
        source: Quantised,
    },
    /// A part of the model that no shard has, although the index lists it.
    #[error("tensor {tensor:?} is missing: the index places it in {shard:?}, which does not have it")]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The shard of the index.
        shard: String,
    },
    /// A part of the model that a pack cannot hold.
    #[error("tensor {tensor:?} of {path} is a part of the model, and cannot be stored")]
    Unstorable {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// Why.
        source: Unstorable,
    },
    /// The checkpoint is of a model with an adapter that was not merged.
    #[error("{tensor:?} are weights below an adapter: the checkpoint is of a model with an adapter that was not merged")]
    Unmerged {
        /// The tensor.
        tensor: String,
    },
    /// Two shards hold different tensors of the same name.
    #[error("tensor {tensor:?} is in both {first:?} and {second:?}, with different values")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// The shard that comes first.
        first: String,
        /// The other shard.
        second: String,
    },
}
