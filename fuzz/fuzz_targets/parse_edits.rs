//! See `checks/parse_edits.rs`; `tests/format/fuzz_regressions.rs` runs the same check over the
//! files kept here.
#![no_main]

#[path = "../checks/parse_edits.rs"]
mod check;
#[allow(dead_code, reason = "a part of it is used")]
#[path = "../checks/parse.rs"]
mod parse;

#[path = "../../tests/common/seal.rs"]
mod seal;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::run(bytes));
