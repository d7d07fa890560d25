//! See `checks/convert_header_edits.rs`; `tests/format/fuzz_regressions.rs` runs the same check
//! over the files kept here.
#![no_main]

#[path = "../checks/convert_header_edits.rs"]
mod check;
#[allow(dead_code, reason = "a part of it is used")]
#[path = "../checks/convert_header.rs"]
mod convert_header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::run(bytes));
