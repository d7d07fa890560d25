//! The checks of the fuzz targets, over the committed seeds and over everything that a target has
//! ever failed on, on any toolchain. The other checks are in `src/fuzzing/regressions.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/convert_header.rs"]
mod convert_header;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/convert_header_edits.rs"]
mod convert_header_edits;
#[path = "../../fuzz/checks/dequant.rs"]
mod dequant;
#[path = "../../fuzz/checks/parse.rs"]
mod parse;
#[path = "../../fuzz/checks/parse_edits.rs"]
mod parse_edits;
#[path = "../../fuzz/checks/roundtrip.rs"]
mod roundtrip;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/verify.rs"]
mod verify;

use crate::common::replay::{draw, replay};
use crate::common::seal;

#[test]
fn parse() {
    assert!(replay("parse", parse::run) >= 5);
}

#[test]
fn roundtrip() {
    assert!(replay("roundtrip", roundtrip::run) >= 3);
}

#[test]
fn parse_edits() {
    assert!(replay("parse_edits", parse_edits::run) >= 3);
    draw(2000, parse_edits::run);
}

#[test]
fn dequant() {
    assert!(replay("dequant", dequant::run) >= 3);
    draw(500, dequant::run);
}

#[cfg(feature = "convert")]
#[test]
fn verify() {
    assert!(replay("verify", verify::run) >= 3);
    draw(500, verify::run);
}

#[cfg(feature = "convert")]
#[test]
fn convert_header() {
    assert!(replay("convert_header", convert_header::run) >= 3);
}

#[cfg(feature = "convert")]
#[test]
fn convert_header_edits() {
    assert!(replay("convert_header_edits", convert_header_edits::run) >= 3);
    draw(2000, convert_header_edits::run);
}
