//! `nf4pack bench convert`: measures the whole command and its parts in one run.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{cores, median, temporary_folder, write_checkpoint};
use crate::PackSource;
use crate::cli::args::{BenchConvertArgs, EncoderArg};
use crate::cli::open;
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Meter, Table, Ui};
use crate::convert::encode::{self, Encoder, ScalePrecision, Weights};
use crate::convert::hash::FileHash;
use crate::convert::plan::scale_type_name;
use crate::convert::source::Checkpoint;
use crate::convert::{Options, Report, convert};
use crate::dequant;
use crate::format::nf4::ScaleType;
use crate::format::{FloatType, Pack};
use crate::verify::verify;

/// Weights of the measurements of parts: 64 MiB in float32, more than any cache holds.
const PART_WEIGHTS: usize = 16 << 20;

/// Bytes per write of the baseline.
const WRITE_LEN: usize = 4 << 20;

/// All figures; each is the median of the runs.
#[derive(Serialize)]
struct Bench {
    shape: &'static str,
    dir: String,
    source_bytes: u64,
    scales: &'static str,
    block_size: u32,
    threads: usize,
    runs: u16,
    encoders: Vec<EncoderBench>,
    /// Bytes of float32 that one thread decodes.
    decode_bytes_per_second: f64,
    /// Bytes that one thread copies into the same buffer.
    memcpy_bytes_per_second: f64,
    verify_bytes_per_second: f64,
    /// SHA-256 of one thread, since a conversion hashes its source in order.
    sha256_bytes_per_second: f64,
    /// A file of the pack's length in the same folder, written and synced by one thread.
    write_sync_bytes_per_second: f64,
    /// The peak of this process after the conversions.
    peak_rss_bytes: Option<u64>,
}

#[derive(Serialize)]
struct EncoderBench {
    encoder: &'static str,
    weights: u64,
    pack_bytes: u64,
    relative_error: f64,
    /// Seconds of the whole command, one figure per run.
    seconds: Vec<f64>,
    median_seconds: f64,
    weights_per_second: f64,
    /// The encoder alone, on one thread, in memory.
    encode_weights_per_second: f64,
}

pub fn run(args: &BenchConvertArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let folder = temporary_folder(&dir)?;
    let runner = Runner { args, ui, source: folder.path().join("checkpoint"), pack: folder.path().join("out.nf4pack") };
    let bench = runner.run(&dir)?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

struct Runner<'a> {
    args: &'a BenchConvertArgs,
    ui: Ui,
    source: PathBuf,
    pack: PathBuf,
}

impl Runner<'_> {
    fn run(&self, dir: &Path) -> Result<Bench> {
        let source_bytes = write_checkpoint(&self.source, self.args.shape.name(), self.ui)?;
        let encoders: Vec<Encoder> = match self.args.encoder {
            Some(one) => vec![one.into()],
            None => vec![EncoderArg::Absmax.into(), EncoderArg::Mse.into()],
        };
        let reports = self.conversions(&encoders)?;
        let peak_rss_bytes = peak_rss();
        self.ui.stage("measuring the parts alone");
        let weights = self.sample()?;
        let encoders = encoders.iter().zip(reports).map(|(&encoder, reports)| self.encoder(encoder, &reports, &weights));
        let encoders = encoders.collect::<Result<_>>()?;
        let (decode, memcpy) = self.decode()?;
        Ok(Bench {
            shape: self.args.shape.name(),
            dir: dir.display().to_string(),
            source_bytes,
            scales: scale_type_name(self.args.scales.into()),
            block_size: self.args.block_size,
            threads: self.args.threads.non_zero().map_or_else(cores, |n| n.get()),
            runs: self.args.runs,
            encoders,
            decode_bytes_per_second: decode,
            memcpy_bytes_per_second: memcpy,
            verify_bytes_per_second: self.verify()?,
            sha256_bytes_per_second: self.sha256(&weights)?,
            write_sync_bytes_per_second: self.write_floor(&weights)?,
            peak_rss_bytes,
        })
    }

    /// The reports of every run, by encoder. Encoders alternate, so that a machine that slows down
    /// affects both.
    fn conversions(&self, encoders: &[Encoder]) -> Result<Vec<Vec<Report>>> {
        let mut reports = vec![Vec::new(); encoders.len()];
        for run in 1..=self.args.runs {
            for (&encoder, reports) in encoders.iter().zip(&mut reports) {
                let options = Options {
                    encoder,
                    scale_type: self.args.scales.into(),
                    block_size: self.args.block_size,
                    threads: self.args.threads.non_zero(),
                    ..Options::default()
                };
                if !reports.is_empty() || self.pack.exists() {
                    fs::remove_file(&self.pack).context("cannot remove the pack of the last run")?;
                }
                let report = convert(&self.source, &self.pack, options, &Meter::Silent)?;
                let (time, rate) = (ui::duration(report.seconds), ui::count(report.weights_per_second));
                self.ui.stage(&format!("run {run} of {}, {}: {time}, {rate} weights/s", self.args.runs, encoder.name()));
                reports.push(report);
            }
        }
        Ok(reports)
    }

    /// Weights of the checkpoint's projections, in bfloat16.
    fn sample(&self) -> Result<Vec<u8>> {
        let checkpoint = Checkpoint::open(&self.source, None)?;
        let mut weights = Vec::new();
        for tensor in checkpoint.tensors.iter().filter(|t| t.name.contains("_proj.")) {
            let (from, len) = (weights.len(), tensor.length as usize);
            if from + len > 2 * PART_WEIGHTS && from > 0 {
                break;
            }
            weights.resize(from + len, 0);
            checkpoint.read(tensor, 0, &mut weights[from..])?;
        }
        Ok(weights)
    }

    fn encoder(&self, encoder: Encoder, reports: &[Report], bytes: &[u8]) -> Result<EncoderBench> {
        let weights = Weights { float_type: FloatType::Bf16, bytes };
        let (block, blocks) = (self.args.block_size, weights.len().div_ceil(self.args.block_size as usize));
        let (mut codes, mut scales) = (vec![0; blocks * block as usize / 2], vec![0.0; blocks]);
        let encode_weights_per_second = self.rate(weights.len() as f64, || {
            match self.args.scales.into() {
                ScaleType::Bf16 => {
                    encode::encode(encoder, ScalePrecision::Bf16, block, weights, &mut codes, &mut scales)?;
                }
                ScaleType::F32 => {
                    encode::encode(encoder, ScalePrecision::F32, block, weights, &mut codes, &mut scales)?;
                }
                // Nesting the scales is between the two; it takes little time and does not count.
                ScaleType::Dq8 => {
                    encode::choose_scales(encoder, block, weights, &mut scales)?;
                    encode::encode_with_scales(block, weights, &scales, &mut codes);
                }
            }
            black_box((&codes, &scales));
            Ok(())
        })?;
        let last = reports.last().context("no runs")?;
        let seconds: Vec<f64> = reports.iter().map(|r| r.seconds).collect();
        let median_seconds = median(&seconds);
        Ok(EncoderBench {
            encoder: encoder.name(),
            weights: last.weights,
            pack_bytes: last.pack_bytes,
            relative_error: last.relative_error,
            seconds,
            median_seconds,
            weights_per_second: last.weights as f64 / median_seconds,
            encode_weights_per_second,
        })
    }

    /// Bytes per second of the decoder and of memcpy, both into the same buffer.
    fn decode(&self) -> Result<(f64, f64)> {
        let mapped = open::map(&self.pack)?;
        let weights = mapped.pack().quantized_tensors().map(|p| p.data.elements as usize).sum::<usize>().min(PART_WEIGHTS);
        let (mut out, from) = (vec![0.0_f32; weights], vec![1.0_f32; weights]);
        // Page faults of file and buffer do not count.
        decode_into(mapped.pack(), &mut out)?;
        let bytes = 4.0 * weights as f64;
        let decode = self.rate(bytes, || decode_into(mapped.pack(), &mut out))?;
        let memcpy = self.rate(bytes, || {
            black_box(&mut out).copy_from_slice(black_box(&from));
            Ok(())
        })?;
        Ok((decode, memcpy))
    }

    fn verify(&self) -> Result<f64> {
        let bytes = fs::metadata(&self.pack)?.len() as f64;
        self.rate(bytes, || {
            black_box(verify(&PackSource::open(&self.pack)?, self.args.threads.or_zero(), &Meter::Silent)?);
            Ok(())
        })
    }

    fn sha256(&self, bytes: &[u8]) -> Result<f64> {
        self.rate(bytes.len() as f64, || {
            let mut hash = FileHash::default();
            hash.update(bytes);
            black_box(hash.hex());
            Ok(())
        })
    }

    /// Writes and syncs a file of the pack's length, of bytes that hardly compress.
    fn write_floor(&self, weights: &[u8]) -> Result<f64> {
        let len = fs::metadata(&self.pack)?.len();
        let path = self.pack.with_extension("floor");
        let chunk = weights.get(..WRITE_LEN).unwrap_or(weights);
        self.rate(len as f64, || {
            let mut file = File::create(&path)?;
            let mut left = len;
            while left > 0 {
                ui::not_interrupted()?;
                let n = left.min(chunk.len() as u64) as usize;
                file.write_all(&chunk[..n])?;
                left -= n as u64;
            }
            Ok(file.sync_all()?)
        })
    }

    /// `amount` by the median seconds of `work`.
    fn rate(&self, amount: f64, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut seconds = Vec::new();
        for _ in 0..self.args.runs {
            ui::not_interrupted()?;
            let started = Instant::now();
            work()?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(amount / median(&seconds).max(1e-9))
    }
}

/// Decodes projections until `out` is full.
fn decode_into(pack: Pack<'_>, out: &mut [f32]) -> Result<()> {
    let mut rest = &mut out[..];
    for projection in pack.quantized_tensors() {
        let n = rest.len().min(projection.data.elements as usize);
        let (now, later) = rest.split_at_mut(n);
        dequant::dequantize(&projection.data, 0, now)?;
        rest = later;
    }
    black_box(out);
    Ok(())
}

/// The peak memory of this process, if the system reports it.
fn peak_rss() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kib)
}

impl Bench {
    fn text(&self) -> String {
        let mut table =
            Table::new(&["encoder", ">seconds", ">min", ">max", ">weights/s", ">alone, 1 thread", ">relative error"]);
        for e in &self.encoders {
            let seconds = |s: f64| format!("{s:.3}");
            let [min, max] = [f64::min, f64::max].map(|pick| e.seconds.iter().copied().reduce(pick).unwrap_or(0.0));
            let (rate, alone) = (ui::count(e.weights_per_second), ui::count(e.encode_weights_per_second));
            let error = ui::error_value(e.relative_error);
            table.row([&e.encoder, &seconds(e.median_seconds), &seconds(min), &seconds(max), &rate, &alone, &error]);
        }
        let mut text = format!(
            "\n{} ({}), {} scales, block size {}, {}, median of {}, in {}\n\n{table}\n",
            self.shape,
            ui::bytes(self.source_bytes as f64),
            self.scales,
            self.block_size,
            ui::plural(self.threads as u64, "thread"),
            ui::plural(u64::from(self.runs), "run"),
            self.dir,
        );
        let mut table = Table::new(&["part", ">rate"]);
        let parts = [
            ("decode to f32, 1 thread", self.decode_bytes_per_second),
            ("memcpy to the same buffer", self.memcpy_bytes_per_second),
            ("verify", self.verify_bytes_per_second),
            ("SHA-256, 1 thread", self.sha256_bytes_per_second),
            ("write and fsync of the pack's length", self.write_sync_bytes_per_second),
        ];
        for (part, rate) in parts {
            table.row([&part, &format!("{}/s", ui::bytes(rate))]);
        }
        let _ = write!(text, "{table}");
        if let Some(peak) = self.peak_rss_bytes {
            let _ = writeln!(text, "\npeak memory of the conversions: {}", ui::bytes(peak as f64));
        }
        text
    }
}
