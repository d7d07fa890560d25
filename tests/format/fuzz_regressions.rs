//! The checks of the fuzz targets, over the committed seeds and over everything that a target has
//! ever failed on, on any toolchain. Those below the public API are in
//! `src/train/fuzz_regressions.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/arch_config.rs"]
mod arch_config;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/convert_header.rs"]
mod convert_header;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/convert_header_edits.rs"]
mod convert_header_edits;
#[path = "../../fuzz/checks/dequant.rs"]
mod dequant;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/index_json.rs"]
mod index_json;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/json.rs"]
mod json;
#[path = "../../fuzz/checks/parse.rs"]
mod parse;
#[path = "../../fuzz/checks/parse_edits.rs"]
mod parse_edits;
#[path = "../../fuzz/checks/roundtrip.rs"]
mod roundtrip;
#[cfg(feature = "convert")]
#[path = "../../fuzz/checks/verify.rs"]
mod verify;

#[cfg(feature = "convert")]
use crate::common::replay::draw_changes;
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

#[cfg(feature = "convert")]
#[test]
fn index_json() {
    assert!(replay("index_json", index_json::run) >= 3);
    draw_changes(300, index_json::run);
}

#[cfg(feature = "convert")]
#[test]
fn arch_config() {
    assert!(replay("arch_config", arch_config::run) >= 3);
    draw_changes(1000, arch_config::run);
}
