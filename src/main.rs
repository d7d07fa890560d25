//! The `nf4pack` program.
fn main() {}
