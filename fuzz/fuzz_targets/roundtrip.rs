//! See `checks/roundtrip.rs`; `tests/format/fuzz_regressions.rs` runs the same check over the files
//! kept here.
#![no_main]

#[path = "../checks/roundtrip.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::run(bytes));
