//! A failure as one line, and a hint as another.

mod codes;

use std::fmt::Write;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;

use clap::builder::styling::AnsiColor;
use serde::Serialize;
use serde_json::json;

use super::args::{BenchCommand, Command, Usage};
use super::process::{Bug, NoThreads};
use super::ui;
use crate::arch::names::is_part;
use crate::arch::{ArchError, ConfigError, ModelConfig, Obstacle};
use crate::convert::ConvertError;
use crate::convert::plan::PlanError;
use crate::convert::source::{CONFIG, HeaderError, INDEX, SourceError, Unstorable};
use crate::data::DataError;
use crate::dequant::DequantError;
use crate::dequant::stream::StreamError;
use crate::export::{ExportError, WriteError};
use crate::format::files::GENERATION_CONFIG;
use crate::format::{FormatError, Role};
use crate::gpu::{self, DRIVER_HINT, GpuError};
use crate::lora::adapter::AdapterError;
use crate::merge::MergeError;
use crate::model::ModelError;
use crate::model::decoder::tokenizer_of;
use crate::model::generate::GenerateError;
use crate::model::plan::MemoryError;
use crate::ops::OpError;
use crate::train::checkpoint::{CheckpointError, Difference, OPTIMIZER, STATE};
use crate::train::record::RecordError;
use crate::train::run::{Leftover, RunError};
use crate::verify::VerifyError;
use crate::{FileError, OpenError, PackSource, ReadError};

/// A failure, as stderr and JSON show it.
#[derive(Debug, Serialize)]
pub struct Failure {
    code: &'static str,
    error: String,
    hint: Option<String>,
}

/// The flags of a command that help if a GPU is too small or lost.
#[derive(Debug, Clone, Copy)]
pub struct Advice {
    /// A smaller value of these flags needs smaller buffers.
    smaller: &'static [&'static str],
    /// The flag that limits its GPU memory.
    budget: Option<&'static str>,
    /// What to do when the GPU works again.
    again: &'static str,
}

impl Advice {
    const NONE: Self = Self { smaller: &[], budget: None, again: "try again" };
    /// The advice of `nf4pack doctor`.
    pub const DOCTOR: Self = Self { budget: Some("--budget"), ..Self::NONE };

    fn of(command: &Command) -> Self {
        let smaller = |smaller| Self { smaller, ..Self::NONE };
        let vram = |smaller| Self { smaller, budget: Some("--vram-budget"), ..Self::NONE };
        match command {
            Command::Train(_) => {
                let again = "--resume continues from the newest checkpoint";
                Self { again, ..vram(&["--micro-batch", "--max-length"]) }
            }
            Command::Eval(_) => vram(&["--micro-batch", "--max-length"]),
            Command::Generate(_) => vram(&["--context"]),
            Command::Doctor(_) => Self::DOCTOR,
            Command::Bench(args) => match &args.what {
                BenchCommand::Convert(_) => Self::NONE,
                BenchCommand::Dequant(_) => smaller(&["--shape"]),
                BenchCommand::Upload(_) => smaller(&["--bytes"]),
                BenchCommand::Stream(_) => Self { budget: Some("--budget"), ..smaller(&["--shape"]) },
                BenchCommand::Train(_) => smaller(&["--shape", "--batch", "--seq"]),
            },
            _ => Self::NONE,
        }
    }

    fn too_large(self) -> String {
        match self.smaller {
            [] => "another GPU may have larger limits (--gpu)".to_owned(),
            smaller => format!("take a smaller {}, or another GPU (--gpu)", either(smaller)),
        }
    }

    fn out_of_memory(self) -> String {
        let flags: Vec<&str> = self.smaller.iter().copied().chain(self.budget).collect();
        let smaller = if flags.is_empty() { String::new() } else { format!("take a smaller {}, or ", either(&flags)) };
        format!("close other programs that use the GPU, or {smaller}name another GPU (--gpu)")
    }
}

/// `a`, `a or b`, `a, b or c`.
fn either(flags: &[&str]) -> String {
    match flags {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        flags => flags.concat(),
    }
}

impl Failure {
    /// Describes the error of a command with this advice.
    pub fn new(error: &anyhow::Error, advice: Advice) -> Self {
        Self { code: codes::code(error), error: text(error), hint: hint(error, advice) }
    }

    /// Prints the failure on stdout, if the command prints JSON.
    fn print_json(&self, command: &Command) -> ExitCode {
        if command.json() {
            // If stdout cannot be written, stderr has the error.
            let _ = ui::print_json(&format!("{:#}\n", json!(self)));
        }
        ExitCode::FAILURE
    }

    /// Prints the failure on stderr.
    pub fn print(&self) {
        ui::labelled("error", AnsiColor::Red, &self.error);
        if let Some(hint) = &self.hint {
            ui::labelled("hint", AnsiColor::Cyan, hint);
        }
    }
}

/// Prints the error on stderr, and with `--json` also on stdout, unless the usage was wrong.
pub fn report(error: &anyhow::Error, command: &Command) -> ExitCode {
    let failure = Failure::new(error, Advice::of(command));
    failure.print();
    if error.is::<Usage>() {
        return ExitCode::from(2);
    }
    failure.print_json(command)
}

/// As [`report`], for a panic, whose hook printed it on stderr.
pub fn report_bug(bug: Bug, command: &Command) -> ExitCode {
    Failure::new(&bug.into(), Advice::NONE).print_json(command)
}

/// The error and its causes, without causes that an earlier message contains.
fn text(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            let _ = write!(text, ": {cause}");
        }
        text
    })
}

/// What to do about the error, if anything helps.
fn hint(error: &anyhow::Error, advice: Advice) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(e) = cause.downcast_ref() {
            of_convert(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_verify(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_export(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_merge(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_gpu(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_dequant(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_stream(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_run(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_memory(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_checkpoint(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_difference(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_generate(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_model(e, advice)
        } else if let Some(e) = cause.downcast_ref() {
            of_data(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_adapter(e)
        } else if let Some(e) = cause.downcast_ref() {
            of_read(e)
        } else if cause.is::<NoThreads>() {
            Some(NoThreads::HINT.into())
        } else if cause.is::<Bug>() {
            Some(Bug::HINT.into())
        } else {
            let of_system = || cause.downcast_ref().and_then(of_io);
            cause.downcast_ref().and_then(of_open).or_else(|| cause.downcast_ref().and_then(of_file)).or_else(of_system)
        }
    })
}

/// What to do about an error of the operating system, of any file.
fn of_io(error: &std::io::Error) -> Option<String> {
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

fn of_convert(error: &ConvertError) -> Option<String> {
    match error {
        ConvertError::Source(e) => of_source(e),
        ConvertError::Arch(e) => of_arch(e),
        ConvertError::Plan(e) => of_plan(e),
        ConvertError::NotFinite { .. } => Some(
            "the checkpoint is damaged or diverged: compare the file's SHA-256 with the hub's, and download it again".into(),
        ),
        ConvertError::TargetExists { .. } => Some("--force replaces the file".into()),
        ConvertError::TargetIsSource { .. } => Some("name another OUT".into()),
        ConvertError::TargetNotAFile { .. } => {
            Some("OUT must be a regular file: a pack is written in any order, so it cannot be piped".into())
        }
        ConvertError::NoSpace { needed, available, .. } => Some(no_space(*needed, *available)),
        ConvertError::Target { path, source } => of_target(path, source),
        ConvertError::NotDurable { .. } => Some(SYNC.into()),
        ConvertError::PartialInUse { .. } => Some("wait until it ends, or name another OUT".into()),
        ConvertError::PartialDiffers { path } => Some(format!(
            "give the SRC and the options of the interrupted conversion, or start again with `rm {}`",
            path.display()
        )),
        ConvertError::PartialSource { path, .. } => {
            Some(format!("restore the file, or start again with `rm {}`", path.display()))
        }
        ConvertError::Threads(_) | ConvertError::SyncThread(_) => Some("--threads N starts fewer threads".into()),
        ConvertError::Cancelled => None,
    }
}

fn of_source(error: &SourceError) -> Option<String> {
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

/// What to do about a folder that was not made durable.
const SYNC: &str = "`sync` makes it durable; until then a loss of power may take it away again, or bring back an older one";

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

fn of_arch(error: &ArchError) -> Option<String> {
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

fn of_config(error: &ConfigError) -> Option<String> {
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

fn of_plan(error: &PlanError) -> Option<String> {
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

fn of_target(path: &Path, error: &std::io::Error) -> Option<String> {
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

fn no_space(needed: u64, available: u64) -> String {
    let missing = ui::bytes(needed.saturating_sub(available) as f64);
    format!("free {missing} more, or write to another file system")
}

fn of_open(error: &OpenError) -> Option<String> {
    match error {
        OpenError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            Some("`nf4pack convert SRC OUT.nf4pack` writes a pack".into())
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

fn of_verify(error: &VerifyError) -> Option<String> {
    match error {
        VerifyError::Source(e) => of_source(e),
        VerifyError::Arch(e) => of_arch(e),
        VerifyError::Damaged { path, .. } => {
            Some(format!("`nf4pack verify {}` lists the damaged sections; convert the checkpoint again", path.display()))
        }
        VerifyError::Threads(_) => Some("--threads N starts fewer threads".into()),
        VerifyError::Read(e) => of_read(e),
        VerifyError::Cancelled => None,
    }
}

fn of_export(error: &ExportError) -> Option<String> {
    match error {
        ExportError::Verify(e) => of_verify(e),
        ExportError::Obstacle(e) => of_obstacle(e),
        ExportError::Overflow { .. } => Some("--dtype bf16 or f32 can represent it".into()),
        ExportError::Write(e) => of_write(e),
    }
}

fn of_obstacle(error: &Obstacle) -> Option<String> {
    match error {
        Obstacle::LayerCount { .. } => {
            Some("config.json is of another model: convert the checkpoint again, with the right one (--config FILE)".into())
        }
        _ => None,
    }
}

fn of_merge(error: &MergeError) -> Option<String> {
    match error {
        MergeError::Verify(e) => of_verify(e),
        MergeError::Source(e) => of_source(e),
        MergeError::Write(e) => of_write(e),
        MergeError::Adapter(e) => of_adapter(e),
        MergeError::Model(ModelError::Obstacle(e)) => of_obstacle(e),
        MergeError::Model(ModelError::Stream(StreamError::Read(e))) => of_read(e),
        MergeError::OtherBase { .. } => {
            Some("`nf4pack inspect` shows the SHA-256 of the pack's source files; --base dequant needs none of them".into())
        }
        MergeError::NotFinite { .. } => Some("the adapter diverged, or the base is damaged".into()),
        _ => None,
    }
}

fn of_adapter(error: &AdapterError) -> Option<String> {
    /// PEFT runs every adapter; what it makes of one can be converted.
    const MERGE_IN_PYTHON: &str = "let PEFT merge it, in Python: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), \
                                   ADAPTER).merge_and_unload().save_pretrained(MERGED); with the tokenizer's files of BASE, MERGED \
                                   can be converted";
    let hint = match error {
        AdapterError::Read { source, .. } if source.kind() == ErrorKind::NotFound => {
            "an adapter is a folder with adapter_model.safetensors and adapter_config.json, as `nf4pack train` and PEFT write it"
        }
        AdapterError::MissingTensor { .. } => {
            "the adapter belongs to another model (see its base_model_name_or_path), or its target_modules name more than it has"
        }
        AdapterError::Shape { .. } => {
            "the adapter belongs to another model (see its base_model_name_or_path), or \"r\" in adapter_config.json is not its \
             rank"
        }
        AdapterError::NoMatrices { .. } => {
            "PEFT names matrices base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; adapters of other programs \
             must be converted to PEFT's form with the tools of those programs"
        }
        AdapterError::Unsupported { .. } | AdapterError::SomeLayers { .. } => MERGE_IN_PYTHON,
        AdapterError::Pattern { .. } | AdapterError::SlowPattern { .. } => {
            "write target_modules as a list of names, such as [\"q_proj\", \"v_proj\"]"
        }
        AdapterError::Settings(ConfigError::BadValue { key, .. }) if key == "task_type" => {
            "if the adapter is one of a language model, set task_type to CAUSAL_LM in adapter_config.json"
        }
        AdapterError::Settings(ConfigError::BadValue { key, .. }) if key == "bias" || key == "peft_type" => MERGE_IN_PYTHON,
        AdapterError::Settings(_) | AdapterError::Json(_) | AdapterError::Lora(_) => {
            "correct adapter_config.json, or save the adapter again with PEFT"
        }
        AdapterError::UnexpectedTensor { .. } => {
            "the adapter changes more than its settings say, or belongs to another model: see its base_model_name_or_path"
        }
        AdapterError::Vocabulary { .. } => {
            "PEFT saves the embedding if tokens were added, or if target_modules or modules_to_save name it: if it is \
             unchanged, use save_pretrained(DIR, save_embedding_layers=False); otherwise merge with PEFT \
             (merge_and_unload), unless config.json ties the two, and convert the result"
        }
        AdapterError::Layers { .. } => {
            "the adapter belongs to another model (see its base_model_name_or_path), or its file is incomplete"
        }
        AdapterError::Safetensors(_) => "the file is damaged, or not from PEFT: download the adapter again",
        AdapterError::File(e) => return of_file(e),
        AdapterError::SameMatrix { .. } => "the file has two adapters: save each one to its own folder",
        AdapterError::Write { path, source } => return of_target(path, source),
        _ => return None,
    };
    Some(hint.to_owned())
}

fn of_file(error: &FileError) -> Option<String> {
    match error {
        FileError::Io { .. } => None,
        FileError::NotAFile { .. } => Some("put the file itself there".to_owned()),
        FileError::Link { .. } => Some("put a copy of the file there".to_owned()),
        FileError::TooLarge { .. } => Some("the file is damaged, or another one has its name".to_owned()),
    }
}

fn of_write(error: &WriteError) -> Option<String> {
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

fn of_gpu(error: &GpuError, advice: Advice) -> Option<String> {
    let hint = match error {
        GpuError::NoAdapter => DRIVER_HINT,
        GpuError::NoSuchAdapter { .. } => "--gpu and NF4PACK_ADAPTER take a listed number, or a part of a name",
        GpuError::NoDevice { .. } => return Some(no_device()),
        GpuError::TooLarge { .. } => return Some(advice.too_large()),
        GpuError::OutOfMemory { .. } => return Some(advice.out_of_memory()),
        GpuError::DeviceLost { .. } => {
            return Some(format!("the driver was reset, or the GPU was removed: update the driver; {}", advice.again));
        }
        GpuError::NotMapped { .. } => {
            return Some(format!("other programs may use all memory that host and GPU share: close them; {}", advice.again));
        }
        GpuError::Timeout { .. } => {
            return Some(format!("other programs use the GPU, or its driver hangs: update it; {}", advice.again));
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// Lists the GPUs, since the best one may be the broken one.
fn no_device() -> String {
    let names: Vec<String> = gpu::adapters().iter().map(|a| format!("{} {}", a.index, a.name)).collect();
    if names.len() < 2 {
        "update its driver; no other GPU was found".to_owned()
    } else {
        format!("update its driver, or name another GPU with --gpu: {}", names.join(", "))
    }
}

/// Why the embedded files of a pack are not enough to train, evaluate and generate, one sentence
/// each. `file` returns the bytes of a file.
pub fn bad_files<'a>(file: impl Fn(&str) -> Option<&'a [u8]>) -> Vec<String> {
    Obstacle::check_files(file).iter().map(unusable).collect()
}

/// Why the model of a pack cannot run, one sentence each. Checks the index, the files, and the
/// tokenizer.
///
/// # Errors
/// If a file cannot be read, or is damaged.
pub fn cannot_run_pack(pack: &PackSource) -> Result<Vec<String>, ReadError> {
    let files = pack.files()?;
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let runnable = Obstacle::check_pack(pack.index(), |name| of_name(&files, name));
    let mut found: Vec<String> = runnable.err().iter().map(unusable).collect();
    found.extend(bad_files(|name| of_name(&files, name)));
    Ok(if found.is_empty() { cannot_load(&files).into_iter().collect() } else { found })
}

/// Why the tokenizer of a pack with these files does not load, if nothing else is wrong with them.
pub fn cannot_load(files: &[(&str, &[u8])]) -> Option<String> {
    let generation = of_name(files, GENERATION_CONFIG);
    let config = ModelConfig::parse(of_name(files, CONFIG)?, generation).map_err(ModelError::from);
    let load = |model: ModelConfig| tokenizer_of(files, &model, 0).map(drop);
    config.and_then(load).err().map(|error| unusable(&error))
}

fn of_name<'a>(files: &[(&str, &'a [u8])], name: &str) -> Option<&'a [u8]> {
    files.iter().find(|(found, _)| *found == name).map(|(_, bytes)| *bytes)
}

fn unusable(reason: &impl std::fmt::Display) -> String {
    format!("train, eval and generate cannot use this pack: {reason}")
}

/// The hint if kernels compute wrong values.
const UNFIT: &str = "the kernels do not work on this GPU: update its driver, or name another GPU with --gpu";

fn of_dequant(error: &DequantError, advice: Advice) -> Option<String> {
    match error {
        DequantError::Gpu(e) => of_gpu(e, advice),
        DequantError::Unfit { .. } => Some(UNFIT.into()),
        _ => None,
    }
}

fn of_run(error: &RunError, advice: Advice) -> Option<String> {
    match error {
        RunError::Model(e) => of_model(e, advice),
        RunError::Plan(e) => of_memory(e, advice),
        RunError::Checkpoint(e) => of_checkpoint(e),
        RunError::OtherRun { source, .. } => of_difference(source),
        RunError::Occupied { found: Leftover::Checkpoints, .. } => {
            Some("--resume continues it; a new run needs another --out".into())
        }
        RunError::Occupied { found: Leftover::Foreign, .. } => {
            Some("name another --out, or move the files away: a run would replace them".into())
        }
        RunError::Occupied { .. } => Some("name another --out, or remove the folder".into()),
        RunError::Locked { .. } => Some("wait for its end, or name another --out".into()),
        RunError::Lock { path, source } => of_target(path, source),
        RunError::Elsewhere { .. } => Some("name the folder of the checkpoint with --out".into()),
        RunError::Record(e) => of_record(e),
        RunError::NoCheckpoint { .. } => {
            Some("a run saves one after --save-every steps, an epoch or ten minutes; without --resume it starts from the beginning".into())
        }
        RunError::Diverged { checkpoint: None, .. } => Some("a smaller --lr, or a longer --warmup, often helps".into()),
        RunError::Diverged { .. } => {
            Some("train again with a smaller --lr; the checkpoint itself is a working adapter".into())
        }
        _ => None,
    }
}

fn of_memory(error: &MemoryError, advice: Advice) -> Option<String> {
    match error {
        MemoryError::Budget { remedy: None, needed, .. } => Some(format!(
            "--vram-budget {} or more, if the GPU has it, or a GPU with more memory (--gpu)",
            at_least(*needed)
        )),
        MemoryError::Budget { needed, .. } => {
            Some(format!("--vram-budget {} or more works too, if the GPU has it", at_least(*needed)))
        }
        MemoryError::Matrix { remedy: None, .. } => Some(advice.too_large()),
        MemoryError::Matrix { .. } => Some("another GPU may have larger limits (--gpu)".into()),
        MemoryError::Stream(e) => of_stream(e, advice),
    }
}

/// Bytes as the value of a flag, rounded up.
fn at_least(bytes: u64) -> String {
    format!("{}MB", bytes.div_ceil(1_000_000))
}

fn of_checkpoint(error: &CheckpointError) -> Option<String> {
    let in_checkpoint = |path: &Path| path.file_name().is_some_and(|name| name == STATE || name == OPTIMIZER);
    let hint = match error {
        CheckpointError::Read { path, .. } if !in_checkpoint(path) => {
            "--out must be a folder that you have permission to read"
        }
        CheckpointError::Adapter { source: AdapterError::Write { path, source }, .. } => return of_target(path, source),
        CheckpointError::Read { .. }
        | CheckpointError::File(_)
        | CheckpointError::Adapter { .. }
        | CheckpointError::Json { .. }
        | CheckpointError::Safetensors { .. }
        | CheckpointError::Tensor { .. }
        | CheckpointError::StateChecksum { .. }
        | CheckpointError::Step { .. }
        | CheckpointError::Checksum { .. } => "name another checkpoint with --resume=CHECKPOINT, such as OUT/checkpoint-100",
        CheckpointError::SetAside { .. } | CheckpointError::Remove { .. } => {
            "you need permission to write in the folder of --out"
        }
        CheckpointError::Format { .. } => "use the version of nf4pack that wrote it",
        _ => return None,
    };
    Some(hint.to_owned())
}

fn of_difference(difference: &Difference) -> Option<String> {
    let remedy = match difference.setting.as_str() {
        "PACK" => "name the pack that the run was started with".to_owned(),
        file @ ("--data" | "--eval-data") => format!("the file of {file} must be unchanged"),
        "--steps" => {
            "the learning rate depends on the number of steps, which follows from --epochs or --steps, the data and \
             --max-length: give the same values (a run can be extended only if it was started with --schedule constant \
             and --warmup as a number of steps)"
                .to_owned()
        }
        name => format!("give the same {name} (--config OUT/nf4pack-train.toml has all settings)"),
    };
    Some(format!("{remedy}, or start a new run with another --out"))
}

fn of_record(error: &RecordError) -> Option<String> {
    match error {
        RecordError::Write { source, .. } if source.kind() == ErrorKind::IsADirectory => {
            Some("a folder has the name of the file: move the folder away".to_owned())
        }
        RecordError::Write { path, source } => {
            of_target(path, source).map(|hint| format!("{hint}; --resume then continues from the newest checkpoint"))
        }
        RecordError::Read { .. } | RecordError::File(_) | RecordError::Json { .. } => {
            Some("move the file away: --resume then continues without the earlier records".to_owned())
        }
    }
}

fn of_stream(error: &StreamError, advice: Advice) -> Option<String> {
    match error {
        StreamError::Read(e) => of_read(e),
        StreamError::Gpu(e) => of_gpu(e, advice),
        StreamError::Budget { needed, .. } => Some(match advice.budget {
            Some(flag) => format!("{flag} {needed} is the minimum"),
            None => format!("take a GPU with {needed} bytes of free memory (--gpu)"),
        }),
        _ => None,
    }
}

fn of_read(error: &ReadError) -> Option<String> {
    match error {
        ReadError::Open(e) => of_open(e),
        ReadError::Damaged { path, .. } => {
            Some(format!("`nf4pack verify {}` lists the damaged sections; convert the checkpoint again", path.display()))
        }
        ReadError::Truncated { .. } => Some("copy the file again, and do not change it while nf4pack uses it".into()),
        ReadError::Memory { .. } => Some(MORE_MEMORY.into()),
        ReadError::Io { .. } => None,
    }
}

/// The hint if a tensor does not fit in memory.
const MORE_MEMORY: &str = "a machine with more memory can do it: one tensor at a time must fit";

fn of_generate(error: &GenerateError, advice: Advice) -> Option<String> {
    match error {
        GenerateError::Budget { needed, .. } => {
            Some(format!("--vram-budget {needed} is the minimum; a smaller --context needs less"))
        }
        GenerateError::Memory(e) => of_memory(e, advice),
        GenerateError::NoPrompt => Some("give a --prompt with text: this model has no token that starts a text".into()),
        GenerateError::TooLong { capacity, max_position_embeddings: max, .. } if capacity < max => {
            Some("give a larger --context".into())
        }
        GenerateError::TooLong { max_position_embeddings: max, .. } => {
            Some(format!("give a shorter prompt: the model supports {max} tokens"))
        }
        GenerateError::Model(e) => of_model(e, advice),
        GenerateError::Sampling(_) => None,
    }
}

fn of_model(error: &ModelError, advice: Advice) -> Option<String> {
    match error {
        ModelError::Op(OpError::Gpu(e)) => of_gpu(e, advice),
        ModelError::Op(OpError::Weights(e)) => of_dequant(e, advice),
        ModelError::Op(OpError::Unfit { .. }) => Some(UNFIT.into()),
        ModelError::Stream(e) => of_stream(e, advice),
        ModelError::Data(e) => of_data(e),
        ModelError::Adapter(e) => of_adapter(e),
        ModelError::Config(e) => of_config(e),
        ModelError::Obstacle(e) => of_obstacle(e),
        ModelError::MissingFile { .. } => Some(
            "convert again from a folder that has the file; AutoTokenizer.from_pretrained(SRC).save_pretrained(SRC) in Python \
             makes tokenizer.json of other files of a tokenizer"
                .into(),
        ),
        _ => None,
    }
}

fn of_data(error: &DataError) -> Option<String> {
    let hint = match error {
        DataError::File { source, .. } => return of_data(source),
        DataError::Tokenizer(_) | DataError::TokenizerJson { .. } => {
            "replace the file in the checkpoint's folder, and convert again"
        }
        DataError::TokenizerRefused(_) => {
            "the tokenizer may be made to do harm; one of a supported model, saved by transformers, is accepted: replace \
             tokenizer.json in the checkpoint's folder, and convert again"
        }
        DataError::NoThread(_) => "raise the limit of processes (ulimit -u) or of memory (ulimit -v)",
        DataError::NoChatTemplate => "use --prompt, which continues a text without a template",
        DataError::Utf8 { .. } => "save the file as UTF-8 (from UTF-16: `iconv -f UTF-16 -t UTF-8`)",
        DataError::Json { .. } | DataError::NotAnObject { .. } => {
            "each line must be one JSON object in UTF-8; plain text needs a file name that ends in .txt"
        }
        DataError::LineBytes { .. } => {
            "split the line into several, or save a plain text under a name that ends in .txt: it has no limit"
        }
        DataError::Messages { .. } => "split the conversation into several lines",
        DataError::NoTemplate { .. } => {
            "prompts and completions need no chat template: {\"prompt\": ..., \"completion\": ...}"
        }
        DataError::Spans { .. } => {
            "--train-on all learns every token; \"prompt\" and \"completion\" instead of messages need no template"
        }
        DataError::NothingLearned { length, max_length, .. } if *length > u64::from(*max_length) => {
            return Some(format!("--max-length {length} keeps the whole sample; or remove this line"));
        }
        DataError::AllDropped { first, .. } => return of_data(first),
        DataError::Unlearned { .. } => "remove \"weight\" and \"train\" from the messages, or leave --train-on completions",
        DataError::TokenId { .. } => {
            "resize the embedding (transformers: model.resize_token_embeddings(len(tokenizer))) and convert again, or \
             convert with the tokenizer that the model was trained with"
        }
        DataError::NoDefaultTemplate { .. } => {
            "tokenizer_config.json needs a template of that name; prompts and completions need none"
        }
        DataError::Template(_) => {
            "chat_template.jinja in the checkpoint's folder overrides the template of tokenizer_config.json; prompts and \
             completions need none"
        }
        DataError::NothingLearned { .. } => {
            "remove the line, or learn every token with --train-on all (which does not allow \"weight\": 0 or \"train\": false)"
        }
        DataError::NothingHeldOut => {
            "use --eval-data FILE, or a smaller --max-length, which cuts a plain text into more samples"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests;
