//! What several commands share: options, and the values of flags.

use std::num::NonZeroUsize;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::convert::encode::Encoder;
use crate::format::nf4::ScaleType;
use crate::gpu::{self, UseMatrixUnits};

/// Wrong usage that shows only in the combination of options, or in a file of options. The exit
/// code is clap's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Usage(pub String);

#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,

    /// Print only errors (and the JSON document)
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct ThreadsArg {
    /// Worker threads; the result does not depend on it [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl ThreadsArg {
    /// The value for [`Options::threads`](crate::convert::Options::threads).
    pub fn non_zero(&self) -> Option<NonZeroUsize> {
        self.threads.and_then(|n| NonZeroUsize::new(usize::from(n)))
    }

    /// The value for verify: 0 is one per core.
    pub fn or_zero(&self) -> usize {
        self.threads.map_or(0, usize::from)
    }
}

/// How a pack is opened by a command that cannot map it. The flag is there so that one command line
/// works with all commands.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct ReadArgs {
    /// Read the pack, never map it: always so in this command
    #[arg(long)]
    pub no_mmap: bool,
}

/// How a pack is opened whose weights are written out.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct WeightsArgs {
    #[command(flatten)]
    pub read: ReadArgs,

    /// Do not compare checksums: damaged weights are used as they are. Saves one read of the
    /// whole file
    #[arg(long)]
    pub no_verify: bool,
}

/// How a pack is opened whose layers are loaded into GPU memory.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct LoadArgs {
    /// Map the pack into memory: a ring of layers runs up to a quarter faster, but the program dies
    /// if the file shrinks meanwhile
    #[arg(long, conflicts_with = "no_mmap")]
    pub mmap: bool,

    /// Read the pack, never map it [default]
    #[arg(long)]
    pub no_mmap: bool,

    /// Do not compare checksums in the first load of each layer: damaged weights are used as they
    /// are. Saves some 30 ms of a core for each GB
    #[arg(long)]
    pub no_verify: bool,
}

#[derive(Debug, Args)]
pub struct GpuArg {
    /// The GPU: its number in `nf4pack doctor`, or a part of its name [default: NF4PACK_ADAPTER, or
    /// the best]
    #[arg(long, value_name = "NUMBER|NAME")]
    pub gpu: Option<String>,
}

impl GpuArg {
    /// The options of [`gpu::Gpu::open`]; the environment supplies what the flags do not set.
    pub fn options(&self) -> gpu::Options {
        let env = gpu::Options::from_env();
        gpu::Options { adapter: self.gpu.clone().or(env.adapter), ..env }
    }
}

/// The arithmetic of the layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionArg {
    /// Mixed where the GPU has matrix units, else f32
    #[default]
    Auto,
    /// float32 everywhere: the reference
    F32,
    /// Products of f16 on matrix units; sums, norms, losses and the adapter in float32
    Mixed,
}

impl PrecisionArg {
    /// `auto` is the precision of the run that is resumed, if there is one.
    pub fn on_resume(self, resumed: Option<&str>) -> Self {
        match (self, resumed) {
            (Self::Auto, Some("mixed")) => Self::Mixed,
            (Self::Auto, Some(_)) => Self::F32,
            (requested, _) => requested,
        }
    }

    /// The use of matrix units; the environment decides it for `auto` and for tests.
    pub fn matrix_units(self, env: UseMatrixUnits) -> UseMatrixUnits {
        match (self, env) {
            (Self::F32, _) => UseMatrixUnits::Off,
            (Self::Mixed, UseMatrixUnits::Off) => UseMatrixUnits::Auto,
            (_, env) => env,
        }
    }
}

/// The precision of a command that runs a model.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct ComputeArgs {
    /// The arithmetic of the layers: f32, or mixed (products of f16 on matrix units; sums, norms,
    /// losses and the adapter in float32), or auto: mixed where the GPU has matrix units
    /// [default: auto]
    #[arg(long, value_enum, value_name = "auto|f32|mixed", hide_possible_values = true)]
    pub precision: Option<PrecisionArg>,
}

/// Units of [`parse_size`]; a unit comes before its own suffixes.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// `8GiB`, `1.5 GB`, `4096`: a number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let with_unit = |(unit, bytes): &(&str, u64)| Some((lower.strip_suffix(&unit.to_lowercase())?, *bytes));
    let (number, unit) = SIZE_UNITS.iter().find_map(with_unit).unwrap_or((&lower, 1));
    let bytes = number.trim().parse::<f64>().map(|number| number * unit as f64);
    match bytes {
        Ok(bytes) if (1.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err("a size is a number of bytes with or without a unit: 8GiB, 500MB, 4096".to_owned()),
    }
}

/// [`Encoder`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EncoderArg {
    /// The scale with the least squared error: 18.5 % less than absmax at the same size (trained
    /// weights, block 64)
    Mse,
    /// The largest magnitude of the block, as in bitsandbytes: faster to encode
    Absmax,
}

impl From<EncoderArg> for Encoder {
    fn from(arg: EncoderArg) -> Self {
        match arg {
            EncoderArg::Mse => Self::Mse,
            EncoderArg::Absmax => Self::Absmax,
        }
    }
}

/// [`ScaleType`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScalesArg {
    /// bfloat16: 4.25 bits per weight
    Bf16,
    /// float32: 4.5 bits per weight
    F32,
    /// 8-bit with nested float32 scales, as bitsandbytes' double quantisation: 4.13 bits per weight
    Dq8,
}

impl From<ScalesArg> for ScaleType {
    fn from(arg: ScalesArg) -> Self {
        match arg {
            ScalesArg::Bf16 => Self::Bf16,
            ScalesArg::F32 => Self::F32,
            ScalesArg::Dq8 => Self::Dq8,
        }
    }
}

/// The values of [`crate::format::nf4::BLOCK_SIZES`]; clap wants them as text.
const BLOCK_SIZE_NAMES: [&str; 8] = ["32", "64", "128", "256", "512", "1024", "2048", "4096"];

pub fn block_size_parser() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(BLOCK_SIZE_NAMES).try_map(|name| name.parse::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::nf4::BLOCK_SIZES;

    #[test]
    fn block_sizes_are_those_of_the_library() {
        assert_eq!(BLOCK_SIZE_NAMES.map(|name| name.parse::<u32>().unwrap()), BLOCK_SIZES);
    }

    #[test]
    fn a_precision_decides_the_use_of_matrix_units() {
        use UseMatrixUnits::{Auto, Loops, Off};
        let all = |precision: PrecisionArg| [Auto, Off, Loops].map(|env| precision.matrix_units(env));
        assert_eq!(all(PrecisionArg::Auto), [Auto, Off, Loops]);
        assert_eq!(all(PrecisionArg::F32), [Off; 3]);
        assert_eq!(all(PrecisionArg::Mixed), [Auto, Auto, Loops]);
    }

    #[test]
    fn auto_is_the_precision_of_the_resumed_run() {
        use PrecisionArg::{Auto, F32, Mixed};
        assert_eq!([None, Some("f32"), Some("mixed")].map(|run| Auto.on_resume(run)), [Auto, F32, Mixed]);
        for requested in [F32, Mixed] {
            assert_eq!([None, Some("f32"), Some("mixed")].map(|run| requested.on_resume(run)), [requested; 3]);
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("8GiB", 8 << 30), ("1.5 gb", 1_500_000_000), ("4096", 4096), ("7B", 7), ("2kib", 2048)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "GiB", "8 apples", "-1", "0", "nan", "inf", "1e30", "8GiBB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
