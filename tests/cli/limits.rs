//! Limits of the system: where it gives no more threads, memory or bytes of a file, a command ends
//! with an error, and leaves nothing behind.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::program::{CACHE, PACK, TINY, failure, names, place};

/// Runs a command under a limit of the shell.
fn limited(folder: &Path, limit: &str, arguments: &str) -> Output {
    let program = assert_cmd::cargo::cargo_bin!("nf4pack");
    let line = format!("ulimit -c 0; {limit}; exec {} {arguments}", program.display());
    let mut shell = Command::new("bash");
    shell.args(["-c", &line]).current_dir(folder).env("NF4PACK_CACHE_DIR", CACHE);
    shell.output().unwrap()
}

/// Asserts an error with exit code 1, without a panic and without leftovers next to `expected`.
#[track_caller]
fn assert_error(output: &Output, folder: &Path, expected: &[&str]) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: ") && !stderr.contains("panicked") && !stderr.contains("bug"), "{stderr}");
    assert_eq!(names(folder), expected, "{stderr}");
    stderr
}

/// [fsize]
#[test]
fn a_limit_of_file_sizes_is_an_error() {
    let folder = place();
    let adapter = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");
    for arguments in [
        format!("convert {TINY} out.nf4pack"),
        format!("export {PACK} out"),
        format!("merge {PACK} --adapter {adapter} --base dequant --out out --no-compare"),
    ] {
        let output = limited(folder.path(), "ulimit -f 100", &arguments);
        let stderr = assert_error(&output, folder.path(), &[PACK]);
        assert!(stderr.contains("ulimit -f"), "{arguments}: no hint in {stderr}");
    }
}

/// A user without processes: the limit counts all processes of a user, and not those of root.
#[cfg(target_os = "linux")]
const USER: &str = "47110";

#[cfg(target_os = "linux")]
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// Runs a command with a limit of processes; as another user, where this one is root.
#[cfg(target_os = "linux")]
fn with_processes(folder: &Path, limit: u32, arguments: &str) -> Output {
    let program = assert_cmd::cargo::cargo_bin!("nf4pack");
    let line = format!("ulimit -c 0; ulimit -u {limit}; exec {} {arguments}", program.display());
    let mut shell = if is_root() {
        let mut shell = Command::new("setpriv");
        shell.args(["--reuid", USER, "--regid", USER, "--clear-groups", "bash"]);
        shell
    } else {
        Command::new("bash")
    };
    shell.args(["-c", &line]).current_dir(folder).env("NF4PACK_CACHE_DIR", "").env("RAYON_NUM_THREADS", "1");
    shell.output().unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn a_limit_of_threads_is_an_error() {
    let folder = place();
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chat.jsonl");
    if !with_processes(folder.path(), 64, "--version").status.success() {
        eprintln!("SKIPPED: another user cannot run the program");
        return;
    }
    for arguments in [format!("convert {TINY} out.nf4pack"), format!("verify {PACK}"), format!("export {PACK} out")] {
        assert_error(&with_processes(folder.path(), 1, &arguments), folder.path(), &[PACK]);
    }
    let evaluate = format!("eval {PACK} --data {data} --max-length 64");
    let errors =
        (1..=6).map(|limit| with_processes(folder.path(), limit, &evaluate)).filter(|output| !output.status.success());
    let errors: Vec<String> = errors.map(|output| assert_error(&output, folder.path(), &[PACK])).collect();
    assert!(errors.iter().all(|error| !error.contains("template")), "{errors:?}");
    // Another user may have other processes.
    assert!(!is_root() || errors.iter().any(|error| error.contains("the system starts no thread")), "{errors:?}");
}

/// Lines and conversations have limits, whose errors name them and what to do.
#[test]
fn a_long_line_and_a_long_conversation_are_errors() {
    let folder = place();
    let show = ["train", PACK, "--data", "data.jsonl", "--show-batch"];
    let turn = r#"{"role": "user", "content": "a"}"#;
    for (line, code, numbers, hint) in [
        (format!("{{\"text\": \"{}\"}}", "a".repeat(16 << 20)), "data-line-bytes", ["line 2", "2097152"], ".txt"),
        (
            format!("{{\"text\": \"{}\"}}", "a".repeat((2 << 20) - 11)),
            "data-line-bytes",
            ["line 2", "more than 2097152 bytes"],
            "split",
        ),
        (
            format!("{{\"messages\": [{}]}}", vec![turn; 20_001].join(",")),
            "data-messages",
            ["line 2", "20001 messages; the limit is 20000"],
            "split",
        ),
    ] {
        let first = if code == "data-messages" { format!("{{\"messages\": [{turn}]}}") } else { "{\"text\": \"a\"}".into() };
        fs::write(folder.path().join("data.jsonl"), format!("{first}\n{line}\n")).unwrap();
        failure(folder.path(), &show).assert(code, &numbers, &[hint]);
    }
}

/// Ctrl-C is heard while one line is tokenised.
#[cfg(target_os = "linux")]
#[test]
fn an_interrupt_ends_a_long_line() {
    use std::time::{Duration, Instant};
    let folder = place();
    let line = format!("{{\"text\": \"{}\"}}", "word ".repeat(400_000));
    fs::write(folder.path().join("data.jsonl"), line).unwrap();
    let mut train = Command::new(assert_cmd::cargo::cargo_bin!("nf4pack"));
    train.current_dir(folder.path()).args(["train", PACK, "--data", "data.jsonl", "--show-batch"]);
    let started = Instant::now();
    let mut train = train.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let tasks = format!("/proc/{}/task", train.id());
    let is_tokenising = || {
        let tasks = fs::read_dir(&tasks).into_iter().flatten().flatten();
        tasks.into_iter().any(|task| fs::read(task.path().join("comm")).is_ok_and(|name| name == b"tokens\n"))
    };
    while !is_tokenising() {
        assert!(train.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    let interrupted = Instant::now();
    assert!(Command::new("kill").args(["-INT", &train.id().to_string()]).status().unwrap().success());
    assert_eq!(train.wait().unwrap().code(), Some(1));
    // The line takes seconds, also in an optimised build.
    assert!(interrupted.elapsed() < Duration::from_secs(1), "{:?}", interrupted.elapsed());
}
