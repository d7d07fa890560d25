//! See `checks/parse.rs`; `tests/format/fuzz_regressions.rs` runs the same check over the files
//! kept here.
#![no_main]

#[path = "../checks/parse.rs"]
mod check;

#[path = "../../tests/common/seal.rs"]
mod seal;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::run(bytes));
