//! Writes a checkpoint with random weights, of a named shape of Qwen3 or of the model of any family
//! that a config.json describes: `cargo run --release --example synth_checkpoint -- OUT
//! --shape qwen3-0.6b|qwen3-4b|tiny|... | --config FILE [--seed N] [--shard-size BYTES]`
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use nf4pack::convert::synth::{self, Shape};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}\nusage: synth_checkpoint OUT --shape NAME|--config FILE [--seed N] [--shard-size BYTES]");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let (mut out, mut config, mut seed, mut shard_size) = (None, None, 0, None);
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        let flag = arg.to_str().filter(|arg| arg.starts_with("--"));
        let Some(flag) = flag else {
            out = Some(PathBuf::from(arg));
            continue;
        };
        let value = args.next().and_then(|value| value.into_string().ok()).ok_or(format!("{flag} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{flag} {value}: {e}"));
        match flag {
            "--shape" => {
                let unknown = || format!("no shape {value:?}; the shapes are {}", Shape::NAMES.join(", "));
                config = Some(Shape::from_name(&value).ok_or_else(unknown)?.config());
            }
            "--config" => {
                let text = std::fs::read_to_string(&value).map_err(|e| format!("cannot read {value}: {e}"))?;
                config = Some(serde_json::from_str(&text).map_err(|e| format!("{value}: {e}"))?);
            }
            "--seed" => seed = number()?,
            "--shard-size" => shard_size = Some(number()?),
            _ => return Err(format!("unknown option {flag}")),
        }
    }
    let (out, config) = (out.ok_or("OUT is missing")?, config.ok_or("--shape or --config is missing")?);
    let start = Instant::now();
    let bytes = synth::write_model(&out, &config, seed, shard_size, &())
        .map_err(|e| format!("cannot write {}: {e}", out.display()))?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{}: {bytes} bytes in {seconds:.2} s ({:.0} MB/s)", out.display(), bytes as f64 / 1e6 / seconds);
    Ok(())
}
