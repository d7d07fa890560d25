//! Trainings that are killed, and trainings into one folder. `NF4PACK_CAMPAIGN=N` kills N times.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "tests fail by panicking, and report counts")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::common;
use crate::common::program::{self, campaign};

/// Of the clock, so that every campaign tries other moments; printed.
fn seed() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64
}

/// The next number of a linear congruential generator, below `limit`.
fn below(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % limit.max(1)
}

fn place() -> tempfile::TempDir {
    let folder = program::place();
    let line = |i: u32| format!("{{\"prompt\": \"Q{i}: \", \"completion\": \"zebra {} quartz {}\"}}\n", i % 3, i % 5);
    fs::write(folder.path().join("chat.jsonl"), (0..12).map(line).collect::<String>()).unwrap();
    folder
}

/// Settings of a short run; the best adapter changes more often than there are checkpoints.
const RUN: &str = "train tiny.nf4pack --data chat.jsonl --rank 2 --targets q_proj,down_proj --micro-batch 1 --steps 7 \
                   --max-length 24 --lr 0.02 --dropout 0.1 --schedule constant --warmup 7 --save-every 3 --keep 1 \
                   --eval-split 0.25 --eval-every 1 --json";
const EARLY: &str = " --early-stop 3";

fn start(folder: &Path, out: &str, more: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nf4pack"));
    command.args(format!("{RUN}{more}").split(' ')).args(["--out", out]).current_dir(folder);
    command.env("NF4PACK_CACHE_DIR", program::CACHE).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The files of a run that are the same in every run, see [`common::run::files`]. The report and
/// some settings differ, too.
fn files(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = common::run::files(out, &["now"]);
    files.remove(Path::new("report.html"));
    if let Some(settings) = files.get_mut(Path::new("nf4pack-train.toml")) {
        let text = String::from_utf8(std::mem::take(settings)).unwrap();
        let same = |line: &&str| !line.starts_with("resume") && !line.starts_with("out");
        *settings = text.split_inclusive('\n').filter(same).collect::<String>().into_bytes();
    }
    files
}

/// Trains to the end in a new folder, and kills it `kills` times on the way, at any moment. Returns
/// how often it resumed from a checkpoint.
fn train_with_kills(folder: &Path, more: &str, kills: u64, random: &mut u64, longest: Duration) -> u64 {
    let out = folder.join("killed");
    let _ = fs::remove_dir_all(&out);
    let mut resumed = 0;
    let mut left = kills;
    loop {
        let has_checkpoint = out.is_dir()
            && fs::read_dir(&out).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().starts_with("checkpoint-"));
        if !has_checkpoint {
            // Nothing was saved: the user starts again.
            let _ = fs::remove_dir_all(&out);
        }
        resumed += u64::from(has_checkpoint);
        let more = if has_checkpoint { format!("{more} --resume") } else { more.to_owned() };
        let mut child = start(folder, "killed", &more);
        if left > 0 {
            left -= 1;
            std::thread::sleep(Duration::from_millis(below(random, longest.as_millis() as u64)));
            // It may have ended already.
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            return resumed;
        }
        assert_eq!(output.status.code(), None, "killed, or else it succeeds: {output:?}");
    }
}

#[test]
fn a_killed_and_resumed_run_leaves_the_files_of_an_uninterrupted_one() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    let folder = place.path();
    let seed = seed();
    let (mut random, mut resumed) = (seed, 0);
    let kills = campaign(2);
    for more in ["", EARLY] {
        let began = Instant::now();
        let output = start(folder, "whole", more).wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let longest = began.elapsed();
        let expected = files(&folder.join("whole"));
        let mut left = kills.div_ceil(2);
        while left > 0 {
            let now = (1 + below(&mut random, 3)).min(left);
            left -= now;
            resumed += train_with_kills(folder, more, now, &mut random, longest);
            let found = files(&folder.join("killed"));
            let [have, should]: [Vec<_>; 2] = [&found, &expected].map(|files| files.keys().collect());
            assert_eq!(have, should, "seed {seed}{more}");
            for (path, bytes) in &expected {
                assert!(found[path] == *bytes, "seed {seed}{more}: {}", path.display());
            }
        }
        fs::remove_dir_all(folder.join("whole")).unwrap();
    }
    eprintln!("seed {seed}: {kills} kills, resumed {resumed} times");
}

#[test]
fn of_two_trainings_into_one_folder_exactly_one_trains() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    for round in 0..campaign(2).min(5) {
        let out = format!("out{round}");
        let both = [(); 2].map(|()| start(place.path(), &out, ""));
        let outputs = both.map(|child| child.wait_with_output().unwrap());
        let (won, lost): (Vec<_>, Vec<_>) = outputs.iter().partition(|output| output.status.success());
        let ([won], [lost]) = (&won[..], &lost[..]) else { panic!("{outputs:?}") };
        assert_eq!(document(won)["steps"], 7);
        assert_eq!((lost.status.code(), &document(lost)["code"]), (Some(1), &"run-locked".into()), "{lost:?}");
        assert!(document(lost)["error"].as_str().unwrap().contains("another nf4pack (process "), "{lost:?}");
        let hidden = fs::read_dir(place.path().join(&out)).unwrap().map(|e| e.unwrap().file_name());
        assert!(hidden.into_iter().all(|name| !name.to_string_lossy().starts_with('.')), "nothing hidden remains");
    }
}
