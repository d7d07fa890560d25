//! The names of the public API outside of `format`, `convert`, `dequant` and `gpu`. A new name is a
//! promise to users of the library: the list below changes with it. The lint `unnameable_types`
//! makes sure that no public item needs a type that is not public.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

/// The modules, and what each re-exports besides errors.
const NAMES: [(&str, &[&str]); 5] = [
    ("arch", &["ModelConfig", "Obstacle"]),
    ("data", &["DataFile", "Message", "TokenStream", "Tokenizer", "TrainOn"]),
    ("lora", &["Adapter"]),
    (
        "model",
        &[
            "Ending",
            "Event",
            "Generated",
            "KeepActivations",
            "MemoryPlan",
            "MicroBatch",
            "MixedKernels",
            "MixedTest",
            "OffloadActivations",
            "OffloadVocabulary",
            "Sampler",
            "SamplerOptions",
            "Session",
            "Slower",
            "TextGenerator",
        ],
    ),
    ("train", &["End", "EvalRecord", "Event", "Prepared", "Run", "Settings", "Shape", "StepRecord", "Task", "Warmup"]),
];

/// The types of fields of errors.
const PARTS_OF_ERRORS: [&str; 7] =
    ["Change", "Difference", "Leftover", "NonFiniteAt", "Remedy", "SpanFlaw", "TemplateErrorKind"];

/// The names that a file re-exports, sorted.
fn re_exports(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for statement in text.split("\npub use ").skip(1) {
        let statement = statement.split(';').next().unwrap();
        let list = statement.rsplit_once("::{").map_or_else(
            || statement.rsplit("::").next().unwrap().to_owned(),
            |(_, list)| list.trim_end_matches(['}', '\n', ' ']).to_owned(),
        );
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            names.push(name.rsplit(" as ").next().unwrap().to_owned());
        }
    }
    names.sort();
    names
}

#[test]
fn the_public_names_are_those_of_the_list() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (module, expected) in NAMES {
        let text = fs::read_to_string(src.join(module).join("mod.rs")).unwrap();
        assert!(!text.contains("\npub mod ") && !text.contains("\npub fn "), "{module} has only re-exports");
        let is_of_error = |name: &String| name.ends_with("Error") || PARTS_OF_ERRORS.contains(&name.as_str());
        let found: Vec<String> = re_exports(&text).into_iter().filter(|name| !is_of_error(name)).collect();
        assert_eq!(found, expected, "the public names of {module}");
    }
    let root = fs::read_to_string(src.join("lib.rs")).unwrap();
    assert_eq!(re_exports(&root), ["FileError", "LayerError", "MappedPack", "OpenError", "PackSource", "ReadError"]);
}

#[test]
fn re_exports_are_read_in_every_form() {
    let text = "//! x\n\npub use a::B;\npub(crate) use a::C;\n#[cfg(x)]\npub use a::b::{D,\n    E as F};\nuse a::G;\n";
    assert_eq!(re_exports(text), ["B", "D", "F"]);
}
