//! The names of the public API outside of `format`, `convert`, `dequant` and `gpu`. A new name is a
//! promise to users of the library: the list below changes with it. The lint `unnameable_types`
//! makes sure that no public item needs a type that is not public.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

/// The modules, and what each re-exports besides errors and [`NESTED`].
const NAMES: [(&str, &[&str]); 5] = [
    ("arch", &["ModelConfig", "Obstacle"]),
    ("data", &["DataFile", "Message", "TokenStream", "Tokenizer", "TrainOn"]),
    ("lora", &["Adapter"]),
    ("model", &["MemoryPlan", "Session", "TextGenerator"]),
    ("train", &["End", "Prepared", "Run", "Settings", "Task"]),
];

/// The types of parameters, fields and results of those names, in modules of their own.
const NESTED: [(&str, &str, &[&str]); 5] = [
    ("model", "kernels", &["MixedKernels", "MixedTest"]),
    ("model", "memory", &["KeepActivations", "MicroBatch", "OffloadActivations", "OffloadVocabulary", "Slower"]),
    ("model", "text", &["Ending", "Event", "Generated", "Sampler", "SamplerOptions"]),
    ("train", "events", &["EvalRecord", "Event", "StepRecord"]),
    ("train", "learning_rate", &["Shape", "Warmup"]),
];

/// The types of fields of errors.
const PARTS_OF_ERRORS: [&str; 8] =
    ["Change", "Difference", "Foreign", "Leftover", "NonFiniteAt", "Remedy", "SpanFlaw", "TemplateErrorKind"];

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

/// The public modules in a file, with their texts, and the rest of the file.
fn nested(text: &str) -> (Vec<(String, String)>, String) {
    let mut parts = text.split("\npub mod ");
    let (mut rest, mut modules) = (parts.next().unwrap().to_owned(), Vec::new());
    for part in parts {
        let (module, after) = part.split_once("\n}").unwrap();
        let (name, body) = module.split_once(" {").expect("a public module has its re-exports in the same file");
        modules.push((name.to_owned(), body.replace("\n    ", "\n")));
        rest.push_str(after);
    }
    (modules, rest)
}

#[test]
fn the_public_names_are_those_of_the_list() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules = Vec::new();
    for (module, expected) in NAMES {
        let text = fs::read_to_string(src.join(module).join("mod.rs")).unwrap();
        assert!(!text.contains("\npub fn "), "{module} has only re-exports");
        let (nested, text) = nested(&text);
        let is_of_error = |name: &String| name.ends_with("Error") || PARTS_OF_ERRORS.contains(&name.as_str());
        let found: Vec<String> = re_exports(&text).into_iter().filter(|name| !is_of_error(name)).collect();
        assert_eq!(found, expected, "the public names of {module}");
        modules.extend(nested.into_iter().map(|(name, text)| (module, name, re_exports(&text))));
    }
    modules.sort();
    let listed =
        NESTED.map(|(module, name, names)| (module, name.to_owned(), names.iter().map(|&name| name.to_owned()).collect()));
    assert_eq!(modules, listed);
    let root = fs::read_to_string(src.join("lib.rs")).unwrap();
    assert_eq!(re_exports(&root), ["FileError", "LayerError", "MappedPack", "OpenError", "PackSource", "ReadError"]);
}

#[test]
fn re_exports_are_read_in_every_form() {
    let text = "//! x\n\npub use a::B;\npub(crate) use a::C;\n#[cfg(x)]\npub use a::b::{D,\n    E as F};\nuse a::G;\n";
    assert_eq!(re_exports(text), ["B", "D", "F"]);
    let (modules, rest) = nested("\npub use a::B;\n/// x\npub mod c {\n    pub use d::{E, F};\n}\npub use g::H;\n");
    assert_eq!(re_exports(&rest), ["B", "H"]);
    let [(name, text)] = &modules[..] else { panic!("{modules:?}") };
    assert_eq!((name.as_str(), re_exports(text)), ("c", vec!["E".to_owned(), "F".to_owned()]));
}
