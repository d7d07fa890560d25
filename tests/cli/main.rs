//! The program as its users start it, and what only it puts together.

mod adapters;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod damage;
mod generate;
mod golden;
mod gpu;
mod kills;
mod limits;
mod merge;
mod runs;
mod sparse;
mod terminal;
mod train;
mod train_flags;
