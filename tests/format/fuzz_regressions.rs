//! The checks of the fuzz targets, over the committed seeds and over everything that a target has
//! ever failed on, on any toolchain.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/convert_header.rs"]
mod convert_header;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/convert_header_edits.rs"]
mod convert_header_edits;
#[path = "../../fuzz/checks/parse.rs"]
mod parse;
#[path = "../../fuzz/checks/parse_edits.rs"]
mod parse_edits;
#[path = "../../fuzz/checks/roundtrip.rs"]
mod roundtrip;

use std::path::Path;

use crate::common::seal;

/// Runs the check over the target's files; gives how many there were.
fn replay(target: &str, check: impl Fn(&[u8])) -> usize {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let folders = [fuzz.join("corpus").join(target), fuzz.join("regressions").join(target)];
    let mut count = 0;
    for entry in folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()) {
        let path = entry.unwrap().path();
        // Shown where the test fails.
        println!("{}", path.display());
        check(&std::fs::read(&path).unwrap());
        count += 1;
    }
    count
}

#[test]
fn parse() {
    assert!(replay("parse", parse::run) >= 5);
}

#[test]
fn roundtrip() {
    assert!(replay("roundtrip", roundtrip::run) >= 3);
}

#[cfg(feature = "convert")]
#[test]
fn convert_header() {
    assert!(replay("convert_header", convert_header::run) >= 3);
}

/// Runs the check on bytes drawn at random: where edits are drawn from them, that reaches as far as
/// fuzzing does at first.
fn draw(check: impl Fn(&[u8])) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    for round in 0..2000_usize {
        let bytes: Vec<u8> = (0..16 + round % 200).map(|_| next()).collect();
        check(&bytes);
    }
}

#[test]
fn parse_edits() {
    assert!(replay("parse_edits", parse_edits::run) >= 3);
    draw(parse_edits::run);
}

#[cfg(feature = "convert")]
#[test]
fn convert_header_edits() {
    assert!(replay("convert_header_edits", convert_header_edits::run) >= 3);
    draw(convert_header_edits::run);
}
