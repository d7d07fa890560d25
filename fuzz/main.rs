//! All fuzz targets in one program, which takes one link, or the one that `NF4PACK_FUZZ_ONLY` names
//! when it is built. `NF4PACK_FUZZ_TARGET` names the target; the rest is libFuzzer's.
#![forbid(unsafe_code)]
#![no_main]

mod checks;

use std::sync::OnceLock;

static CHECK: OnceLock<fn(&[u8])> = OnceLock::new();

/// Finds the target's check; without one, the program ends and lists the targets.
fn choose() {
    let name = std::env::var("NF4PACK_FUZZ_TARGET").unwrap_or_default();
    let Some(check) = checks::find(&name) else {
        let names = checks::NAMES.join(" ");
        eprintln!("NF4PACK_FUZZ_TARGET is {name:?}; targets are {names}, unless this program was built for one");
        std::process::exit(2);
    };
    let _ = CHECK.set(check);
    // libfuzzer-sys aborts at every panic. What the library catches is no crash: a panic counts
    // where it leaves the check.
    let _ = std::panic::take_hook();
}

fn run(bytes: &[u8]) {
    if let Some(check) = CHECK.get() {
        check(bytes);
    }
}

libfuzzer_sys::fuzz_target!(init: choose(), |bytes: &[u8]| run(bytes));
