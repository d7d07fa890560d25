//! The checks of the fuzz targets that reach below the public API, over the committed seeds and
//! over everything that a target has ever failed on. The others are in
//! `tests/format/fuzz_regressions.rs`.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "../../fuzz/checks/adapter.rs"]
mod adapter;
#[path = "../../fuzz/checks/arch_config.rs"]
mod arch_config;
#[path = "../../fuzz/checks/checkpoint.rs"]
mod checkpoint;
#[path = "../../fuzz/checks/index_json.rs"]
mod index_json;
#[path = "../../fuzz/checks/json.rs"]
mod json;
#[path = "../../fuzz/checks/jsonl.rs"]
mod jsonl;
#[path = "../../fuzz/checks/jsonl_stream.rs"]
mod jsonl_stream;
#[path = "../../tests/common/replay.rs"]
mod replay;
#[path = "../../fuzz/checks/template.rs"]
mod template;
#[path = "../../fuzz/checks/tokenizer.rs"]
mod tokenizer;

use replay::{draw_changes, replay};

#[test]
fn adapter() {
    assert!(replay("adapter", adapter::run) >= 3);
    draw_changes(300, adapter::run);
}

#[test]
fn arch_config() {
    assert!(replay("arch_config", arch_config::run) >= 3);
    draw_changes(1000, arch_config::run);
}

#[test]
fn checkpoint() {
    assert!(replay("checkpoint", checkpoint::run) >= 3);
    draw_changes(300, checkpoint::run);
}

#[test]
fn index_json() {
    assert!(replay("index_json", index_json::run) >= 3);
    draw_changes(300, index_json::run);
}

#[test]
fn jsonl() {
    assert!(replay("jsonl", jsonl::run) >= 3);
    draw_changes(200, jsonl::run);
}

#[test]
fn jsonl_stream() {
    assert!(replay("jsonl_stream", jsonl_stream::run) >= 3);
    draw_changes(200, jsonl_stream::run);
}

#[test]
fn template() {
    assert!(replay("template", template::run) >= 3);
    draw_changes(300, template::run);
}

#[test]
fn tokenizer() {
    assert!(replay("tokenizer", tokenizer::run) >= 3);
    draw_changes(200, tokenizer::run);
}
