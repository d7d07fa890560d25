//! The format: golden packs, what is refused, what changed bytes do, round trips, what fuzzing
//! found; and the rules of the sources and of these tests.
#![forbid(unsafe_code)]

mod columns;
#[path = "../common/mod.rs"]
mod common;
mod flip;
mod fuzz_regressions;
mod golden;
mod layering;
mod links;
mod reject;
mod roundtrip;
mod sources;
mod surface;
