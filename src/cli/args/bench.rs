//! `nf4pack bench` as data.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

use super::common::{ComputeArgs, EncoderArg, GpuArg, ScalesArg, ThreadsArg, block_size_parser, parse_size};
use super::generate::SamplingArgs;
use super::train::values::{KeepActivationsArg, OffloadArg, OffloadVocabularyArg};
use crate::convert::synth::Shape;
use crate::format::nf4::DEFAULT_BLOCK_SIZE;

/// Measure this machine
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    Convert(BenchConvertArgs),
    Dequant(BenchDequantArgs),
    Matmul(BenchMatmulArgs),
    Upload(BenchUploadArgs),
    Stream(BenchStreamArgs),
    Train(BenchTrainArgs),
    Longest(BenchLongestArgs),
    Generate(BenchGenerateArgs),
}

const CONVERT_EXAMPLES: &str = "\
Examples:
  nf4pack bench convert
  nf4pack bench convert --shape qwen3-4b --dir /mnt/fast  # needs 14 GB
  nf4pack bench convert --shape tiny --json

Writes a checkpoint of random weights into a temporary folder, and converts it several times, including reading, SHA-256, \
encoding, writing and fsync. In the same run it measures each part alone: the encoder on one thread, the decoder and memcpy, \
verify, SHA-256, and a plain write and fsync of the pack's size, which no converter can beat. All figures are medians. The \
checkpoint is new, so it comes from the page cache if it fits.";

/// Measure conversion and its limits
#[derive(Debug, Args)]
#[command(after_help = CONVERT_EXAMPLES)]
pub struct BenchConvertArgs {
    /// The model whose shapes the random checkpoint has
    #[arg(long, value_enum, default_value_t = ShapeArg::Qwen3_0_6b)]
    pub shape: ShapeArg,

    /// Only this encoder [default: both]
    #[arg(long, value_enum)]
    pub encoder: Option<EncoderArg>,

    /// How scales are stored
    #[arg(long, value_enum, default_value_t = ScalesArg::Bf16)]
    pub scales: ScalesArg,

    /// Weights that share a scale
    #[arg(long, value_name = "N", default_value = "64", value_parser = block_size_parser())]
    pub block_size: u32,

    #[command(flatten)]
    pub threads: ThreadsArg,

    /// Number of measurements
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,

    /// Folder for the temporary files, whose file system is measured [default: the system's
    /// temporary folder]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,

    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,
}

const DEQUANT_EXAMPLES: &str = "\
Examples:
  nf4pack bench dequant
  nf4pack bench dequant --shape 9728x2560     # one projection
  nf4pack bench dequant --shape qwen3-4b      # the seven projections of a layer
  nf4pack bench dequant --gpu llvmpipe --json

Decodes random codes and scales in GPU memory, from every scale type to every float type. Each run submits many calls at once \
and divides the time by their number; the output is the median of the runs. GB/s counts codes and scales once and the output \
once. The baselines alternate with the kernels in the same run: a kernel that only copies, and the driver's own copy (its bytes \
count twice, read and written). A kernel rarely moves bytes faster than a copy, so `of copy` is comparable between devices. If \
a tensor would stay in a cache, several tensors alternate; their calls are independent and may overlap. The last line is the cost \
of a small dispatch: of recording and submitting it, and of running it after the one before it.";

/// Measure the decoding kernels against a copy
#[derive(Debug, Args)]
#[command(after_help = DEQUANT_EXAMPLES)]
pub struct BenchDequantArgs {
    /// A matrix, or the projections of a layer of qwen3-0.6b, qwen3-4b or tiny [default:
    /// 32768x16384, less if the GPU is not discrete]
    #[arg(long, value_name = "MODEL|RxC", value_parser = parse_matrices)]
    pub shape: Option<Matrices>,

    /// Weights that share a scale
    #[arg(long, value_name = "N", default_value = "64", value_parser = block_size_parser())]
    pub block_size: u32,

    #[command(flatten)]
    pub common: GpuBenchArgs,
}

const MATMUL_EXAMPLES: &str = "\
Examples:
  nf4pack bench matmul
  nf4pack bench matmul --shape 9728x2560 --tokens 8192
  NF4PACK_PROFILE=1 nf4pack bench matmul --runs 1     # with the time of every kernel

Multiplies random activations with random NF4 weights of every shape of a layer, forward and backward, in float32 and, where the \
GPU has matrix units, in mixed precision. A product includes everything from float32 activations to float32 results: in mixed \
precision, both operands are first written as f16. Each run submits several calls and divides the time; figures are medians.";

/// Measure the products of activations with frozen weights
#[derive(Debug, Args)]
#[command(after_help = MATMUL_EXAMPLES)]
pub struct BenchMatmulArgs {
    /// A matrix [outputs x inputs], or the projections of a layer of qwen3-0.6b, qwen3-4b or tiny
    /// [default: qwen3-4b, on a software GPU 128x256]
    #[arg(long, value_name = "MODEL|RxC", value_parser = parse_whole_blocks)]
    pub shape: Option<Matrices>,

    /// Tokens of a pass [default: 512, 2048 and 8192, on a software GPU 70]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    pub tokens: Option<u32>,

    #[command(flatten)]
    pub common: GpuBenchArgs,
}

const UPLOAD_EXAMPLES: &str = "\
Examples:
  nf4pack bench upload
  nf4pack bench upload --bytes 4GiB --threads 8
  nf4pack bench upload --shape qwen3-4b       # the size of its layers
  nf4pack bench upload --json

Uploads random bytes as the layers of a pack are uploaded: threads fill mapped staging buffers while the device copies from \
them. The baseline is memcpy with the same threads and the same source: if it is not faster, the machine's memory is the limit. \
All figures are medians.";

/// Measure uploads to the GPU against memcpy
#[derive(Debug, Args)]
#[command(after_help = UPLOAD_EXAMPLES)]
pub struct BenchUploadArgs {
    /// Bytes of a run, such as 512MB or 2GiB [default: 1GiB, on a software GPU 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub bytes: Option<u64>,

    /// The size of all projections of qwen3-0.6b, qwen3-4b or tiny, or of a matrix, instead of
    /// --bytes
    #[arg(long, value_name = "MODEL|RxC", value_parser = parse_matrices, conflicts_with = "bytes")]
    pub shape: Option<Matrices>,

    /// Only this number of threads [default: 1, 2, 4 and 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    #[command(flatten)]
    pub common: GpuBenchArgs,
}

const STREAM_EXAMPLES: &str = "\
Examples:
  nf4pack bench stream                                 # needs 1.9 GB, on a software GPU 1 MB
  nf4pack bench stream --shape qwen3-0.6b --dir /mnt/fast
  nf4pack bench stream --shape qwen3-4b --budget 1GiB
  nf4pack bench stream --shape 9728x2560               # 8 layers of one projection
  nf4pack bench stream --no-mmap --verify-on-load

Writes a pack of random codes with the layers of a model into a temporary folder, then measures two things: the time from opening \
the file to all layers in GPU memory (the device is open already), and a pass over all layers, forward and backward, with a ring of \
two slots. Both are measured with the file mapped and read, with and without checksums; --no-mmap and --verify-on-load select one \
half. The baselines of the same run are an upload from memory without a file, and memcpy, with the same threads: `of upload` shows \
the cost of the file. The file is new, so it comes from the page cache if it fits. All figures are medians.";

/// Measure the speed of loading a pack's layers to the GPU
#[derive(Debug, Args)]
#[command(after_help = STREAM_EXAMPLES)]
pub struct BenchStreamArgs {
    /// The model whose layers the random pack has (qwen3-0.6b, qwen3-4b or tiny), or the one matrix
    /// of each of 8 layers [default: qwen3-4b, on a software GPU tiny]
    #[arg(long, value_name = "MODEL|RxC", value_parser = parse_whole_blocks)]
    pub shape: Option<Matrices>,

    /// GPU memory for the first measurement, such as 8GiB [default: 90 % of the free GPU memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub budget: Option<u64>,

    /// Read the file, do not map it
    #[arg(long)]
    pub no_mmap: bool,

    /// Check the checksum of every payload while loading
    #[arg(long)]
    pub verify_on_load: bool,

    /// Threads that fill staging memory [default: one per core, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Folder for the temporary pack [default: the system's temporary folder]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,

    #[command(flatten)]
    pub common: GpuBenchArgs,
}

const TRAIN_EXAMPLES: &str = "\
Examples:
  nf4pack bench train --shape qwen3-0.6b --batch 4 --seq 512
  nf4pack bench train --shape qwen3-4b --seq 2048 --dir /dev/shm  # needs 2.7 GB there
  NF4PACK_PROFILE=1 nf4pack bench train --runs 1                  # with the time of every kernel

Writes a pack of random weights, and trains an adapter on all seven projections of every layer with random \
tokens, all of them learned: forward, loss, backward, AdamW. The first step warms up and does not \
count. One more step waits for the device after each phase and measures the phases. With NF4PACK_PROFILE=1 every dispatch gets \
its own pass: steps take longer, so only the kernels' shares are meaningful.";

/// Measure training: tokens/s, time per phase, planned and allocated GPU memory
#[derive(Debug, Args)]
#[command(after_help = TRAIN_EXAMPLES)]
pub struct BenchTrainArgs {
    /// The model whose shapes the random weights have [default: qwen3-0.6b, on a software GPU tiny]
    #[arg(long, value_enum)]
    pub shape: Option<ShapeArg>,

    /// Samples of a step, in one forward pass
    #[arg(long, value_name = "B", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub batch: u32,

    /// Tokens of a sample
    #[arg(long, value_name = "S", default_value = "512", value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    pub seq: u32,

    /// Layers that keep their activations, as in `nf4pack train` [default: auto]
    #[arg(long, value_name = "auto|none|all|N")]
    pub keep_activations: Option<KeepActivationsArg>,

    /// Whether activations between layers are in host memory, as in `nf4pack train` [default: auto]
    #[arg(long, value_enum, value_name = "auto|off|on", hide_possible_values = true)]
    pub offload_activations: Option<OffloadArg>,

    /// The tensors of the vocabulary that are not in GPU memory, as in `nf4pack train` [default:
    /// auto]
    #[arg(long, value_enum, value_name = "auto|off|embedding|all", hide_possible_values = true)]
    pub offload_vocabulary: Option<OffloadVocabularyArg>,

    /// GPU memory to plan within, such as 8GiB [default: 90 % of the free GPU memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub vram_budget: Option<u64>,

    /// Rank of the adapter
    #[arg(long, default_value = "16", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub rank: u32,

    /// Folder for the temporary pack [default: the system's temporary folder]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,

    #[command(flatten)]
    pub compute: ComputeArgs,

    #[command(flatten)]
    pub common: GpuBenchArgs,
}

const LONGEST_EXAMPLES: &str = "\
Examples:
  nf4pack bench longest --plan-only                               # needs no GPU
  nf4pack bench longest --budget 8GB --dir /dev/shm               # needs 7 GB there
  nf4pack bench longest --shape qwen3-0.6b --rank 16 --budget 4GB,6GB

Plans the training of one sample, with an adapter on all seven projections of every layer, and finds the longest sample whose plan \
fits in each budget. Then it trains one step with that sample, after a step with a short one that compiles the kernels and does not \
count. With --plan-only it only counts bytes, for a GPU with matrix units and bindings of 2 GiB.";

/// Find the longest sample that trains in some GPU memory
#[derive(Debug, Args)]
#[command(after_help = LONGEST_EXAMPLES)]
pub struct BenchLongestArgs {
    /// The model whose shapes the random weights have
    #[arg(long, value_enum, default_value_t = ShapeArg::Llama3_1_8b)]
    pub shape: ShapeArg,

    /// GPU memory to plan within; several sizes with commas
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "8GB,12GB,16GB,24GB,48GB,80GB",
        value_delimiter = ',',
        value_parser = parse_size
    )]
    pub budget: Vec<u64>,

    /// Tokens of the sample at most: a step takes time with the square of its tokens
    #[arg(long, value_name = "TOKENS", default_value = "4194304", value_parser = clap::value_parser!(u32).range(2..=4194304))]
    pub max_tokens: u32,

    /// Rank of the adapter
    #[arg(long, default_value = "32", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub rank: u32,

    /// Do not train, and use no GPU
    #[arg(long)]
    pub plan_only: bool,

    /// Folder for the temporary pack [default: the system's temporary folder]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,

    #[command(flatten)]
    pub compute: ComputeArgs,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  nf4pack bench generate --shape qwen3-0.6b
  nf4pack bench generate --shape qwen3-4b --dir /dev/shm          # needs 2.7 GB there
  nf4pack bench generate --prompt 16 --answer 64 --top-k 50       # sampled, not greedy
  NF4PACK_PROFILE=1 nf4pack bench generate --runs 1               # with the time of every kernel

Writes a pack of random weights, and generates answers to prompts of random tokens, of each length. The first \
answer to each length warms up and does not count. `limit` is the speed of memory: the bytes that a token reads (weights, keys and \
values) at the speed of a copy, which the same run measures. With NF4PACK_PROFILE=1 every dispatch gets its own pass: tokens take \
longer, so only the kernels' shares are meaningful.";

/// Measure generation: tokens/s of prompts and answers, against the speed of memory
#[derive(Debug, Args)]
#[command(after_help = GENERATE_EXAMPLES)]
pub struct BenchGenerateArgs {
    /// The model whose shapes the random weights have [default: qwen3-0.6b, on a software GPU tiny]
    #[arg(long, value_enum)]
    pub shape: Option<ShapeArg>,

    /// Tokens of a prompt; several lengths with commas
    #[arg(
        long,
        value_name = "N",
        default_value = "16,2048",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=131_072)
    )]
    pub prompt: Vec<u32>,

    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value = "256", value_parser = clap::value_parser!(u32).range(2..=131_072))]
    pub answer: u32,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    #[command(flatten)]
    pub compute: ComputeArgs,

    /// Folder for the temporary checkpoint and pack [default: the system's temporary folder]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,

    #[command(flatten)]
    pub common: GpuBenchArgs,
}

/// The options of all GPU benchmarks.
#[derive(Debug, Args)]
pub struct GpuBenchArgs {
    #[command(flatten)]
    pub gpu: GpuArg,

    /// Number of measurements
    #[arg(long, value_name = "N", default_value = "10", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,

    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,
}

impl BenchCommand {
    /// Whether the caller wants JSON.
    pub fn json(&self) -> bool {
        match self {
            Self::Convert(args) => args.json,
            Self::Dequant(args) => args.common.json,
            Self::Matmul(args) => args.common.json,
            Self::Upload(args) => args.common.json,
            Self::Stream(args) => args.common.json,
            Self::Train(args) => args.common.json,
            Self::Longest(args) => args.json,
            Self::Generate(args) => args.common.json,
        }
    }
}

/// Matrices [rows, columns] to decode in sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrices {
    /// The text of the flag.
    pub name: String,
    /// Rows and columns of each.
    pub shapes: Vec<[u64; 2]>,
}

/// The largest number of weights of a benchmark; more exceed any device's memory.
const MAX_WEIGHTS: u64 = 1 << 36;

/// `9728x2560`, or the name of a model, for its layer.
pub fn parse_matrices(text: &str) -> Result<Matrices, String> {
    let shapes = match Shape::from_name(text) {
        Some(shape) => projections(&shape),
        None => vec![matrix(text).ok_or_else(|| {
            format!("neither rows and columns, such as 9728x2560, nor one of {}", Shape::NAMES.join(", "))
        })?],
    };
    Ok(Matrices { name: text.to_owned(), shapes })
}

/// [`parse_matrices`] for packs of random codes, which have no padding.
fn parse_whole_blocks(text: &str) -> Result<Matrices, String> {
    let block = u64::from(DEFAULT_BLOCK_SIZE);
    let whole = |m: &Matrices| m.shapes.iter().all(|[rows, columns]| (rows * columns).is_multiple_of(block));
    parse_matrices(text).and_then(|m| if whole(&m) { Ok(m) } else { Err(format!("no multiple of {block} weights")) })
}

fn matrix(text: &str) -> Option<[u64; 2]> {
    let (rows, columns) = text.split_once('x')?;
    let (rows, columns) = (rows.parse().ok()?, columns.parse().ok()?);
    u64::checked_mul(rows, columns).filter(|weights| (1..=MAX_WEIGHTS).contains(weights)).map(|_| [rows, columns])
}

/// The projections of one layer.
fn projections(shape: &Shape) -> Vec<[u64; 2]> {
    let of_layer = |name: &str| name.starts_with("model.layers.0.") && name.contains("_proj.");
    let tensors = shape.tensors().into_iter().filter(|(name, _)| of_layer(name));
    tensors.filter_map(|(_, shape)| shape.try_into().ok()).collect()
}

/// The shapes of [`crate::convert::synth`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShapeArg {
    /// 440 million weights in projections; as a checkpoint 1.2 GB
    #[value(name = "qwen3-0.6b")]
    Qwen3_0_6b,
    /// 3.6 billion weights in projections; as a checkpoint 8.0 GB
    #[value(name = "qwen3-4b")]
    Qwen3_4b,
    /// 31 billion weights in projections; as a checkpoint 66 GB
    #[value(name = "qwen3-32b")]
    Qwen3_32b,
    /// 7.0 billion weights in projections; as a checkpoint 16 GB
    #[value(name = "llama-3.1-8b")]
    Llama3_1_8b,
    /// 2 million weights; as a checkpoint 5 MB; for tests, not for speed
    Tiny,
}

impl ShapeArg {
    /// The name for [`crate::convert::synth::Shape::from_name`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen3_0_6b => "qwen3-0.6b",
            Self::Qwen3_4b => "qwen3-4b",
            Self::Qwen3_32b => "qwen3-32b",
            Self::Llama3_1_8b => "llama-3.1-8b",
            Self::Tiny => "tiny",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_matrices_or_layers() {
        assert_eq!(parse_matrices("9728x2560").unwrap().shapes, [[9728, 2560]]);
        let layer = parse_matrices("qwen3-4b").unwrap().shapes;
        assert_eq!((layer.len(), layer.iter().map(|[r, c]| r * c).sum::<u64>()), (7, 100_925_440));
        for wrong in ["", "x", "0x4", "4x", "-1x4", "9999999999x9999999999", "1000000x1000000", "llama", "1x2x3"] {
            assert!(parse_matrices(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shapes_are_those_of_the_library() {
        let shapes: Vec<&str> = ShapeArg::value_variants().iter().map(|shape| shape.name()).collect();
        assert!(shapes.iter().all(|name| Shape::from_name(name).is_some()));
        assert_eq!(shapes.len(), Shape::NAMES.len());
    }
}
