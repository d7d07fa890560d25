//! See `checks/convert_header.rs`; `tests/format/fuzz_regressions.rs` runs the same check over the
//! files kept here.
#![no_main]

#[path = "../checks/convert_header.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::run(bytes));
