//! Hints about a checkpoint that is converted: its files, its config.json and the plan of its pack.

use std::io::ErrorKind;
use std::path::Path;

use crate::arch::names::is_part;
use crate::arch::{ArchError, ConfigError};
use crate::convert::plan::PlanError;
use crate::convert::source::{CONFIG, HeaderError, INDEX, SourceError, Unstorable};
use crate::format::Role;

pub(super) fn of_source(error: &SourceError) -> Option<String> {
    let hint = match error {
        SourceError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            "a checkpoint is a folder with model.safetensors or its shards, or one .safetensors file; `hf download REPO` \
             prints the folder of a model of the hub"
        }
        SourceError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => "you need permission to read it",
        SourceError::NotACheckpoint { .. } => {
            "nf4pack reads only .safetensors: convert .bin or .gguf weights with other tools first"
        }
        SourceError::NoWeights { folder, found } => return Some(no_weights(folder, found)),
        SourceError::HubCache { snapshot, .. } => return Some(format!("name the snapshot: {}", snapshot.display())),
        SourceError::TooManyFiles { .. } => "name a copy of the checkpoint without that folder",
        SourceError::LfsPointer { .. } => LFS_PULL,
        SourceError::ShardName { .. } => {
            "write plain file names into its weight_map: shards stand in the folder of their index"
        }
        SourceError::EmptyIndex { .. } => "download the index again, or remove it if all shards are there",
        SourceError::NoConfig { .. } => "download config.json from the model's page, or name one with --config FILE",
        SourceError::LinkLeavesFolder { .. } => "copy the file into the folder, or name the folder that really contains it",
        SourceError::MissingShard { .. } => "`hf download REPO` fetches the missing files and keeps the others",
        SourceError::Header { source: HeaderError::FileLength { expected, found }, .. } if found > expected => {
            "the file is damaged: remove it and download it again"
        }
        SourceError::Header { source: HeaderError::FileLength { .. } | HeaderError::Truncated { .. }, .. } => {
            "the download is incomplete: remove the file and download it again"
        }
        SourceError::Header { source: HeaderError::LfsPointer, .. } => LFS_PULL,
        SourceError::Header { source: HeaderError::NameTooLong { .. }, .. } => {
            "save the model again without that tensor, in Python, by save_pretrained()"
        }
        SourceError::Header { source: HeaderError::TooShort { .. } | HeaderError::TooLarge { .. }, .. } => {
            "this is not a safetensors file, or it is damaged: download it again; other formats are not read"
        }
        SourceError::Unstorable { source: Unstorable::Type { .. }, .. } => {
            "convert a copy in another type, made in Python by \
             AutoModelForCausalLM.from_pretrained(SRC, dtype=\"bfloat16\").save_pretrained(COPY) and \
             AutoTokenizer.from_pretrained(SRC).save_pretrained(COPY)"
        }
        SourceError::Unmerged { .. } => {
            "convert the base model, and give the adapter to train, eval, generate or merge (--adapter); or merge first, in \
             Python, with PEFT's merge_and_unload() and save_pretrained()"
        }
        SourceError::Unstorable { .. } => "the checkpoint is damaged, or config.json belongs to another model",
        SourceError::NotInShard { .. } => {
            "the download is incomplete, or index and shards are of different revisions: `hf download REPO` fetches the \
             missing files"
        }
        SourceError::Quantised { .. } => {
            "convert the original checkpoint, which the model card names as base_model: quantising twice loses quality"
        }
        SourceError::DuplicateTensor { .. } => {
            "the shards are of different revisions: download them again into an empty folder"
        }
        SourceError::Json { path, .. } if !path.ends_with(CONFIG) => {
            "download the file again, or remove it if it is not needed"
        }
        SourceError::DuplicateKey { path, .. } if !path.ends_with(INDEX) => {
            "remove one of the two in a copy of the file, and name the copy with --config FILE"
        }
        SourceError::DuplicateKey { .. } => "download the index again, or remove it if all shards are there",
        SourceError::Json { .. } => {
            "the file must be one JSON object, in UTF-8 without a byte order mark: download it again, or name a corrected copy \
             with --config FILE"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// What to do about the text that stands for a large file.
const LFS_PULL: &str = "`git lfs pull` in that folder fetches the file itself";

/// What a folder without a checkpoint has instead.
fn no_weights(folder: &Path, found: &[String]) -> String {
    let has = |end: &str| found.iter().any(|name| name.ends_with(end));
    match found {
        found if found.iter().any(|name| name == "adapter_model.safetensors") => {
            "this is an adapter: convert the model that it is for, and `nf4pack merge` adds the adapter".to_owned()
        }
        [only] if has(".safetensors") => format!("a file can be named, too: {}", folder.join(only).display()),
        found if has(".bin") && !has(".safetensors") => format!(
            "only .safetensors are read, and there is {}: make a copy in Python, by \
             AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(COPY) and \
             AutoTokenizer.from_pretrained(SRC).save_pretrained(COPY)",
            found.join(", ")
        ),
        found if !found.is_empty() && !has(".safetensors") => {
            format!("only .safetensors are read, and there is {}: convert it with other tools first", found.join(", "))
        }
        found if found.iter().any(|name| name.starts_with("model-")) => {
            "shards are missing, and so is the index: `hf download REPO` fetches what is missing".to_owned()
        }
        _ => "a checkpoint is a folder with config.json and model.safetensors, or the shards and their index".to_owned(),
    }
}

pub(super) fn of_arch(error: &ArchError) -> Option<String> {
    let hint = match error {
        ArchError::Config(e) => return of_config(e),
        ArchError::MissingTensor { similar: Some(_), .. } => {
            "the checkpoint has several models, or names that begin in several ways: save the model alone, in Python, by \
             save_pretrained()"
        }
        ArchError::MissingTensor { tensor, .. } if is_part(tensor, Role::LmHead) => {
            "the checkpoint was saved without its output projection (AutoModel or a classifier instead of \
             AutoModelForCausalLM); if the embedding replaces it, set tie_word_embeddings to true in a copy of config.json and \
             name it with --config FILE"
        }
        ArchError::MissingTensor { .. } => "the checkpoint is incomplete, or config.json belongs to another model",
        ArchError::Shape { tensor, .. } if is_part(tensor, Role::Embedding) || is_part(tensor, Role::LmHead) => {
            "config.json belongs to another model, or the vocabulary was resized without it: name the right one, or a copy with \
             the right vocab_size, with --config FILE"
        }
        ArchError::Shape { .. } => "config.json belongs to another model: name the right one with --config FILE",
    };
    Some(hint.to_owned())
}

pub(super) fn of_config(error: &ConfigError) -> Option<String> {
    let hint = match error {
        ConfigError::ModelType { .. } => {
            "if the model has one of these architectures under another name, copy config.json, set that model_type, and \
             pass it with --config FILE"
        }
        ConfigError::BadValue { file, .. } | ConfigError::Json { file, .. } if *file != CONFIG => {
            "correct or remove generation_config.json in the checkpoint's folder, and convert again"
        }
        ConfigError::BadValue { .. } => {
            "where config.json is wrong, a corrected copy can be given when converting: --config FILE; otherwise such a model \
             is not supported"
        }
        ConfigError::MissingKey { .. } | ConfigError::Indivisible { .. } => {
            "download config.json again, or give a corrected copy when converting: --config FILE"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

pub(super) fn of_plan(error: &PlanError) -> Option<String> {
    let hint = match error {
        PlanError::NoMatch { .. } => {
            "the expression is matched against names such as model.layers.0.mlp.down_proj.weight, model.embed_tokens.weight or \
             lm_head.weight; of a tied model only one of the last two is stored; tensors that are not projections are kept \
             without --keep"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}
