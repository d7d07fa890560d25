//! Conversions and exports that are killed at random moments. `NF4PACK_CAMPAIGN=N` kills N of each.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nf4pack::convert::synth::{self, Shape};
use serde_json::Value;

use crate::common::program::{campaign, names};

/// Five windows of 4 MiB: converts in a second or two, unoptimised, with the faster encoder.
const SHAPE: Shape = Shape {
    hidden: 512,
    intermediate: 1536,
    layers: 3,
    heads: 8,
    kv_heads: 4,
    head_dim: 64,
    vocabulary: 256,
    tied: true,
    q_k_norm: true,
};

struct Place {
    folder: tempfile::TempDir,
    random: u64,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap(), random: 0x9e37_79b9_7f4a_7c15 };
        synth::write(&place.path("model"), &SHAPE, 7, Some(4 << 20), &()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        names(self.folder.path())
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("nf4pack"));
        command.current_dir(self.folder.path()).args(arguments.split(' ')).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }

    /// Runs to the end, and returns the time and the JSON.
    fn run(&self, arguments: &str) -> (Duration, Value) {
        let started = Instant::now();
        let output = self.command(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{arguments}: {text}");
        (started.elapsed(), serde_json::from_str(&text).unwrap())
    }

    /// Kills the program at a random moment before `longest`. Whether it had ended.
    fn kill(&mut self, arguments: &str, longest: Duration) -> bool {
        // Xorshift.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let mut child = self.command(arguments).spawn().unwrap();
        std::thread::sleep(longest.mul_f64((self.random >> 11) as f64 / (1_u64 << 53) as f64));
        let ended = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        ended
    }
}

fn same(a: &Path, b: &Path) -> bool {
    fs::read(a).unwrap() == fs::read(b).unwrap()
}

#[test]
fn a_killed_conversion_continues_to_the_same_bytes() {
    let mut place = Place::new();
    let (time, _) = place.run("convert model whole.nf4pack --encoder absmax --json --threads 1");
    let (pack, whole) = (place.path("out.nf4pack"), place.path("whole.nf4pack"));
    let (mut kills, mut continued, mut restarted) = (0, 0, 0);
    while kills < campaign(2) {
        let threads = 1 + kills % 3;
        let arguments = format!("convert model out.nf4pack --encoder absmax --resume --json --threads {threads}");
        if place.kill(&arguments, time) {
            assert!(same(&pack, &whole));
        } else {
            kills += 1;
            if kills % 2 != 0 && !pack.exists() {
                continue;
            }
            if !pack.exists() {
                let (_, report) = place.run(&arguments);
                let kept = report["kept"]["weights"].as_u64().unwrap_or(0) > 0;
                assert_ne!(report["kept"]["damaged"], true);
                *(if kept { &mut continued } else { &mut restarted }) += 1;
            }
            assert!(same(&pack, &whole), "killed {kills} times");
        }
        assert_eq!(place.names(), ["model", "out.nf4pack", "whole.nf4pack"]);
        fs::remove_file(&pack).unwrap();
    }
    println!("{kills} kills, {continued} continued, {restarted} began again");
}

#[cfg(target_os = "linux")]
#[test]
fn a_killed_conversion_leaves_nothing_and_a_killed_export_nothing_after_the_next() {
    let mut place = Place::new();
    let (time, _) = place.run("convert model whole.nf4pack --encoder absmax --json");
    let (pack, whole) = (place.path("out.nf4pack"), place.path("whole.nf4pack"));
    fs::write(&pack, "old").unwrap();
    let (mut kills, mut named, mut left) = (0, 0, 0);
    while kills < campaign(2) {
        kills += u64::from(!place.kill("convert model out.nf4pack --encoder absmax --force --json", time));
        // The moment between a temporary name and the final one.
        named += u64::from(place.names().len() > 3);
        assert!(fs::read(&pack).unwrap() == b"old" || same(&pack, &whole));
    }
    assert!(named <= 1 + kills / 20, "{named} of {kills} left a file");
    let (time, _) = place.run("export whole.nf4pack reference --json");
    let mut kills = 0;
    while kills < campaign(2) {
        let ended = place.kill("export whole.nf4pack snapshot --json", time);
        kills += u64::from(!ended);
        left += u64::from(place.names().iter().any(|name| name.starts_with(".nf4pack-")));
        if place.path("snapshot").exists() {
            assert!(same(&place.path("snapshot/model.safetensors"), &place.path("reference/model.safetensors")));
            fs::remove_dir_all(place.path("snapshot")).unwrap();
        }
    }
    place.run("export whole.nf4pack snapshot --json");
    assert_eq!(place.names(), ["model", "out.nf4pack", "reference", "snapshot", "whole.nf4pack"]);
    println!("{kills} kills of each; {named} conversions and {left} exports left a hidden name, which the next run removed");
}
