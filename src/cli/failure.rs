//! A failure as one line, and a hint as another.

mod checkpoint;
mod codes;
mod files;
mod runnable;

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
use crate::arch::{ConfigError, Obstacle};
use crate::convert::ConvertError;
use crate::data::DataError;
use crate::dequant::DequantError;
use crate::dequant::stream::StreamError;
use crate::export::ExportError;
use crate::gpu::{self, DRIVER_HINT, GpuError};
use crate::lora::adapter::AdapterError;
use crate::merge::MergeError;
use crate::model::ModelError;
use crate::model::generate::GenerateError;
use crate::model::plan::MemoryError;
use crate::ops::OpError;
use crate::train::checkpoint::{CheckpointError, Difference, OPTIMIZER, STATE};
use crate::train::record::RecordError;
use crate::train::run::{Leftover, RunError};
use crate::verify::VerifyError;
use checkpoint::{of_arch, of_config, of_plan, of_source};
use files::{SYNC, damaged, no_space, of_file, of_foreign, of_io, of_open, of_read, of_target, of_write};
pub use runnable::{bad_files, cannot_load, cannot_run_pack};

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
                BenchCommand::Matmul(_) => smaller(&["--shape", "--tokens"]),
                BenchCommand::Upload(_) => smaller(&["--bytes"]),
                BenchCommand::Stream(_) => Self { budget: Some("--budget"), ..smaller(&["--shape"]) },
                BenchCommand::Train(_) => smaller(&["--shape", "--batch", "--seq"]),
                BenchCommand::Longest(_) => Self { budget: Some("--budget"), ..smaller(&["--shape", "--rank"]) },
                BenchCommand::Generate(_) => smaller(&["--shape", "--prompt", "--answer"]),
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

/// The code of an error.
#[cfg(test)]
pub fn code(error: &anyhow::Error) -> &'static str {
    codes::code(error)
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

fn of_verify(error: &VerifyError) -> Option<String> {
    match error {
        VerifyError::Source(e) => of_source(e),
        VerifyError::Arch(e) => of_arch(e),
        VerifyError::Damaged { path, .. } => Some(damaged(path)),
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
        Obstacle::HeadDim { .. } | Obstacle::Norm { .. } | Obstacle::Part { .. } | Obstacle::FusedRows { .. } => Some(
            "`nf4pack verify` and `nf4pack export` work with this pack; another program can run what export writes".into(),
        ),
        Obstacle::PartTwice { .. } => Some("this is a defect of nf4pack: please report it".into()),
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

fn of_gpu(error: &GpuError, advice: Advice) -> Option<String> {
    let hint = match error {
        GpuError::NoAdapter => DRIVER_HINT,
        GpuError::NoSuchAdapter { .. } => "--gpu and NF4PACK_ADAPTER take a listed number, or a part of a name",
        GpuError::NoDevice { .. } => return Some(no_device()),
        GpuError::NoMatrixUnits { .. } => {
            "--precision f32 needs none, nor does auto; a run that began in mixed precision resumes only on a GPU that has them"
        }
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

/// The hint if kernels compute wrong values.
const UNFIT: &str = "the kernels do not work on this GPU: update its driver, or name another GPU with --gpu; --precision f32 uses no kernels \
                     for matrix units";

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
        MemoryError::Host { available, needed, .. } => Some(format!(
            "free {} of memory on this machine, or use more GPU memory (--vram-budget, --gpu)",
            // A plan takes at most 15/16 of what is free.
            at_least(needed.saturating_sub(*available).saturating_mul(16).div_ceil(15))
        )),
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
        StreamError::NoThread(_) => Some(MORE_THREADS.into()),
        StreamError::Gpu(e) => of_gpu(e, advice),
        StreamError::Budget { needed, .. } => Some(match advice.budget {
            Some(flag) => format!("{flag} {needed} is the minimum"),
            None => format!("take a GPU with {needed} bytes of free memory (--gpu)"),
        }),
        _ => None,
    }
}

/// The hint if a thread cannot be started.
const MORE_THREADS: &str = "raise the limit of processes (ulimit -u) or of memory (ulimit -v)";

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
        DataError::Tokenizer(_) | DataError::TokenizerJson { .. } | DataError::TokenizerFile { .. } => {
            "replace the file in the checkpoint's folder, and convert again"
        }
        DataError::TokenizerRefused(_) => {
            "the tokenizer may be made to do harm; one of a supported model, saved by transformers, is accepted: replace \
             tokenizer.json in the checkpoint's folder, and convert again"
        }
        DataError::NoThread(_) => MORE_THREADS,
        DataError::Panicked => Bug::HINT,
        DataError::NoChatTemplate => "use --prompt, which continues a text without a template",
        DataError::Foreign(foreign) => of_foreign(*foreign),
        DataError::Utf8 { .. } => "save the file as UTF-8 (`iconv -f LATIN1 -t UTF-8`, or -f UTF-16)",
        DataError::Json { .. } | DataError::NotAnObject { .. } => {
            "each line must be one JSON object in UTF-8; plain text needs a file name that ends in .txt"
        }
        DataError::LineBytes { .. } => {
            "split the line into several, or save a plain text under a name that ends in .txt: it is read in pieces"
        }
        DataError::Memory { .. } => {
            "take a part of the file, a smaller --max-length, or a machine with more memory: samples may take half of it"
        }
        DataError::Changed(_) => "wait until nothing writes to the file, then run the command again",
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
