//! Checks the sources against the import rules of ARCHITECTURE.md: which modules and crates a
//! module may use, and which files may have unsafe code.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use crate::sources::{Segments, Source, circles, sources};

/// A module, and the other modules of this crate that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("format", &[]),
    ("io", &[]),
    ("mmap", &["format"]),
    ("source", &["format", "io", "mmap"]),
    ("convert", &["arch", "format", "io"]),
    ("panics", &[]),
    ("gpu", &["io", "panics"]),
    ("dequant", &["format", "gpu", "io", "mmap", "source"]),
    ("random", &[]),
    ("arch", &["format"]),
    ("data", &["arch", "format", "io", "panics", "random"]),
    ("ops", &["arch", "format", "dequant", "gpu"]),
    ("lora", &["arch", "format", "gpu", "io", "ops", "random"]),
    ("model", &["arch", "data", "dequant", "format", "gpu", "lora", "ops", "random", "source"]),
    ("train", &["arch", "data", "dequant", "format", "gpu", "io", "lora", "model", "ops", "random"]),
    ("verify", &["arch", "format", "io", "source", "convert", "dequant"]),
    ("export", &["arch", "format", "io", "source", "convert", "dequant", "verify"]),
    ("merge", &["arch", "format", "io", "source", "convert", "data", "dequant", "gpu", "lora", "model", "verify", "export"]),
    (
        "cli",
        &[
            "arch", "format", "io", "mmap", "convert", "data", "dequant", "gpu", "lora", "model", "ops", "random", "train",
            "verify", "export", "merge", "panics", "source",
        ],
    ),
    ("tests", &["arch", "format", "mmap", "convert", "data", "dequant", "gpu", "lora", "model", "ops", "train", "export"]),
    ("fuzzing", &["arch", "convert", "data", "lora", "train"]),
    ("main", &["cli"]),
];

/// A crate, and the only modules that may use it. Any module may use the other crates.
const FENCED: &[(&str, &[&str])] = &[
    ("memmap2", &["mmap"]),
    ("safetensors", &["convert", "export", "lora", "tests", "train"]),
    ("sha2", &["convert"]),
    ("fs4", &["convert", "export"]),
    ("rayon", &["convert", "data", "dequant", "model", "source", "verify", "export", "merge", "cli"]),
    ("ash", &["gpu"]),
    ("dirs", &["gpu"]),
    ("pollster", &["gpu"]),
    ("wgpu", &["gpu", "dequant", "ops"]),
    ("regex", &["convert", "cli", "data", "merge", "export", "tests", "train"]),
    ("fancy_regex", &["data", "lora"]),
    ("crc32c", &["train"]),
    ("jiff", &["data"]),
    ("rand_chacha", &["random"]),
    ("tokenizers", &["data"]),
    ("anyhow", &["cli"]),
    ("clap", &["cli"]),
    ("clap_complete", &["cli"]),
    ("ctrlc", &["cli"]),
    ("signal_hook", &["cli"]),
    ("indicatif", &["cli"]),
    ("toml", &["cli"]),
];

/// Files that name each other: a handle and its parts.
const CIRCLES: &[&[&str]] = &[&["lora/adapter.rs", "lora/adapter/peft.rs"]];

/// The only files with unsafe code.
const UNSAFE: &[&str] = &[
    "mmap.rs",
    "cli/open.rs",
    "convert/encode/avx2.rs",
    "convert/encode/neon.rs",
    "dequant/avx2.rs",
    "dequant/kernel.rs",
    "dequant/neon.rs",
    "dequant/copy_baseline.rs",
    "gpu/compile.rs",
    "gpu/matrix_units.rs",
    "gpu/memory.rs",
    "gpu/pipeline.rs",
    "gpu/shader.rs",
    "ops/matmul/kernels.rs",
    "ops/matmul/mixed.rs",
    "ops/matmul/packed/glu.rs",
    "ops/matmul/packed/halves.rs",
    "ops/matmul/packed/norm.rs",
    "ops/matmul/wide.rs",
    "ops/attention/float.rs",
    "ops/attention/mixed.rs",
    "ops/cached_attention.rs",
    "ops/norm_rotary.rs",
    "ops/rotary.rs",
    "ops/sample.rs",
    "ops/scale.rs",
    "ops/split_heads.rs",
    "ops/dropout.rs",
    "ops/embedding.rs",
    "ops/finite.rs",
    "ops/loss.rs",
    "ops/optimizer.rs",
    "ops/rms_norm.rs",
    "ops/glu.rs",
    "ops/glu_halves.rs",
    "ops/halves.rs",
];

/// The identifiers that follow `prefix`, wherever `prefix` is not the end of a longer identifier.
fn after<'a>(code: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(prefix).filter_map(move |(at, _)| {
        let longer = code[..at].chars().next_back().is_some_and(|c| word(c) || c == ':');
        let rest = &code[at + prefix.len()..];
        let end = rest.find(|c| !word(c)).unwrap_or(rest.len());
        (!longer).then_some(&rest[..end])
    })
}

/// Finds what a source names against the rules; `root` is what the crate's root hands on.
fn violations(source: &Source, root: &BTreeMap<String, Segments>) -> Vec<String> {
    let module = source.top();
    if module == "lib" {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_USE.iter().find(|(m, _)| *m == module) else {
        return vec![format!("{}: module {module} has no row in the import rules", source.path)];
    };
    let mut found = Vec::new();
    for name in &source.names {
        let first = root.get(&name.segments[0]).unwrap_or(&name.segments)[0].as_str();
        if first != module && !allowed.contains(&first) {
            found.push(format!("{}: {module} may not use {first} ({})", source.path, name.segments.join("::")));
        }
    }
    for (krate, modules) in FENCED {
        let used = after(&source.code, krate).any(|rest| rest.is_empty() && names_crate(&source.code, krate));
        if used && !modules.contains(&module) {
            found.push(format!("{}: {module} may not use the crate {krate}", source.path));
        }
    }
    found
}

fn names_crate(code: &str, krate: &str) -> bool {
    let path = format!("{krate}::");
    after(code, &path).next().is_some() || code.contains(&format!("use {krate};"))
}

#[test]
fn modules_use_only_what_they_may() {
    let sources = sources();
    assert!(sources.len() >= 30, "only {} source files found", sources.len());
    let root = &sources.iter().find(|s| s.path == "lib.rs").unwrap().imports;
    assert_eq!(root["MappedPack"], ["mmap", "MappedPack"], "what the root hands on is not seen");
    let found: Vec<String> = sources.iter().flat_map(|source| violations(source, root)).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn files_form_no_circles_but_a_handle_and_its_parts() {
    let sources = sources();
    let circles = circles(&sources);
    let listed: Vec<BTreeSet<&str>> = CIRCLES.iter().map(|files| files.iter().copied().collect()).collect();
    let new: Vec<_> = circles.iter().filter(|circle| !listed.contains(circle)).collect();
    assert!(new.is_empty(), "circles of files that are not listed: {new:#?}");
    let gone: Vec<_> = listed.iter().filter(|files| !circles.contains(files)).collect();
    assert!(gone.is_empty(), "listed, but not circles: {gone:#?}");
}

/// A feature only adds code, so tests with all features try the code of each.
#[test]
fn no_code_is_there_for_want_of_a_feature() {
    let without = |s: &&Source| s.code.split_whitespace().collect::<String>().contains("not(feature");
    let sources = sources();
    let found: Vec<&str> = sources.iter().filter(without).map(|s| s.path.as_str()).collect();
    assert!(found.is_empty(), "{found:?}");
}

/// Whether code has the keyword `unsafe`.
fn is_unsafe(source: &Source) -> bool {
    after(&source.code, "unsafe").any(str::is_empty)
}

/// The crate denies unsafe code: the compiler finds it in files without an exception.
#[test]
fn unsafe_code_stands_only_where_it_may() {
    let sources = sources();
    let paths = |has: fn(&Source) -> bool| -> BTreeSet<&str> {
        sources.iter().filter(|s| has(s)).map(|s| s.path.as_str()).collect()
    };
    let listed: BTreeSet<&str> = UNSAFE.iter().copied().collect();
    assert_eq!(paths(is_unsafe), listed, "unsafe code");
    assert_eq!(paths(|s| s.code.contains("allow(unsafe_code")), listed, "exceptions");
    let root = sources.iter().find(|s| s.path == "lib.rs").unwrap();
    assert!(root.code.contains("#![deny(unsafe_code)]"));
}

/// A module without unsafe code forbids it: no file of it can make an exception.
#[test]
fn modules_without_need_forbid_unsafe_code() {
    let sources = sources();
    let root = sources.iter().find(|s| s.path == "lib.rs").unwrap();
    let lines: Vec<&str> = root.code.lines().map(str::trim).collect();
    let mut modules = 0;
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = line.strip_suffix(';').and_then(|line| line.split_once("mod ")).map(|(_, name)| name) else {
            continue;
        };
        modules += 1;
        let forbids = lines[..at]
            .iter()
            .rev()
            .take_while(|line| line.starts_with("#["))
            .any(|line| line.contains("forbid(unsafe_code)"));
        let has_unsafe = sources.iter().any(|s| s.top() == name && is_unsafe(s));
        assert!(forbids != has_unsafe, "{name}: unsafe code {has_unsafe}, forbidden {forbids}");
    }
    assert!(modules > 20, "only {modules} modules found");
}

/// The crate roots that forbid unsafe code: the compiler checks what they name. The tests of packs
/// and of shaders call the unsafe functions of the library.
#[test]
fn roots_without_need_forbid_unsafe_code() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<_> = ["src/main.rs", "tests/format/main.rs", "fuzz/main.rs"].map(|name| root.join(name)).into();
    for folder in ["examples", "benches"] {
        let entries = std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        files.extend(entries.filter(|path| path.extension().is_some_and(|e| e == "rs")));
    }
    let forbids = |path: &std::path::PathBuf| std::fs::read_to_string(path).unwrap().contains("#![forbid(unsafe_code)]");
    let found: Vec<_> = files.iter().filter(|path| !forbids(path)).collect();
    assert!(found.is_empty(), "{found:?}");
}

/// The only file that writes to stdout and stderr: it escapes what a terminal would act on.
const DOOR: &str = "cli/ui/door.rs";

#[test]
fn only_one_file_writes_to_the_terminal() {
    let writes = |code: &str| {
        let ways =
            ["print!", "println!", "eprint!", "eprintln!", "dbg!", "stdout()", "stderr()", "io::stdout", "io::stderr"];
        ways.iter().any(|way| code.contains(way))
    };
    // A file that only tests compile.
    let declared = |s: &Source, name: &str| {
        let before = s.code.split_once(&format!("mod {name};")).map_or("", |(before, _)| before);
        let attributes = before.rsplit(';').next().unwrap_or_default();
        attributes.contains("#[cfg(test)]") || attributes.contains("#[cfg(all(test,")
    };
    let code = |s: &Source| s.code.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
    let sources = sources();
    let in_tests = |s: &Source| s.module.last().is_some_and(|name| sources.iter().any(|parent| declared(parent, name)));
    let found: Vec<&str> = sources.iter().filter(|s| !in_tests(s) && writes(&code(s))).map(|s| s.path.as_str()).collect();
    assert_eq!(found, [DOOR], "text of files reaches the terminal past the escapes of {DOOR}");
}

/// A file that no test binary names would never run, and a fifth binary would be linked and open
/// devices of its own.
#[test]
fn every_file_of_tests_is_in_one_of_four_binaries() {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let names = |folder: &std::path::Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        entries.collect()
    };
    assert!(!names(&tests).iter().any(|name| name.ends_with(".rs")), "files in tests: put them into one of its folders");
    for binary in ["cli", "convert", "format", "gpu"] {
        let main = std::fs::read_to_string(tests.join(binary).join("main.rs")).unwrap();
        for file in names(&tests.join(binary)).iter().filter_map(|name| name.strip_suffix(".rs")) {
            assert!(file == "main" || main.contains(&format!("mod {file};")), "tests/{binary}/main.rs does not name {file}");
        }
    }
}

#[test]
fn the_rules_catch_what_they_forbid() {
    let root = BTreeMap::from([("MappedPack".to_owned(), ["mmap", "MappedPack"].map(str::to_owned).to_vec())]);
    let check = |path: &str, code: &str| violations(&Source::new(path, code), &root).len();
    assert_eq!(check("format/x.rs", "use crate::convert::Options;"), 1);
    assert_eq!(check("format/x.rs", "use crate::{format::Role, MappedPack};"), 1);
    assert_eq!(check("dequant/x.rs", "use crate::{convert::{a, b}, format};"), 2);
    assert_eq!(check("dequant/x.rs", "let x = crate::cli::run();"), 1);
    assert_eq!(check("format/x.rs", "use super::super::convert::Options;"), 1);
    assert_eq!(check("format/mod.rs", "use super::convert::Options;"), 1);
    assert_eq!(check("format/x/y.rs", "let x = super::super::super::convert::run();"), 1);
    assert_eq!(check("format/x.rs", "mod tests { use super::super::super::convert::Options; }"), 1);
    assert_eq!(check("format/x.rs", "mod tests { use super::super::nf4; }\nuse super::nf4;"), 0);
    assert_eq!(check("dequant/x.rs", "use safetensors::View;"), 1);
    assert_eq!(check("format/x.rs", "use rayon::prelude::*;"), 1);
    assert_eq!(check("gpu/x.rs", "use crate::format::nf4;"), 1);
    assert_eq!(check("cli/x.rs", "use wgpu::Limits;"), 1);
    assert_eq!(check("novel/x.rs", ""), 1);
    assert_eq!(check("format/x.rs", "// crate::convert\nuse crate::format::nf4;"), 0);
    assert_eq!(check("format/x.rs", "let a = (\"crate::convert::X\", r#\"crate::cli\"#, '\"', 'x'); /* crate::io::a */"), 0);
    assert_eq!(check("convert/x.rs", "use safetensors::tensor::Metadata; use crate::{format::nf4, io};"), 0);
}

#[test]
fn circles_are_found_past_what_modules_hand_on() {
    let found = |files: &[(&str, &str)]| {
        let sources: Vec<Source> = files.iter().map(|(path, code)| Source::new(path, code)).collect();
        circles(&sources).into_iter().map(|c| c.into_iter().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    // Siblings, by way of the module that hands them on: that module itself uses neither.
    let handle = ("a/mod.rs", "mod b; mod c; pub use b::B; pub use c::C;");
    let sources = [handle, ("a/b.rs", "use super::C;"), ("a/c.rs", "use crate::a::B;")];
    assert_eq!(found(&sources), ["a/b.rs a/c.rs"]);
    assert!(found(&[handle, ("a/b.rs", "use super::C;"), ("a/c.rs", "")]).is_empty());
    // A module that uses its part, which uses the module.
    let sources = [("a.rs", "mod b; fn f(_: b::B) {} struct A;"), ("a/b.rs", "struct B(super::A);")];
    assert_eq!(found(&sources), ["a.rs a/b.rs"]);
    let sources = [("a.rs", "mod b; pub use b::B; fn f(_: B) {} struct A;"), ("a/b.rs", "struct B(super::A);")];
    assert_eq!(found(&sources), ["a.rs a/b.rs"]);
    // A part that takes from the module what that only imports.
    let sources = [("a.rs", "mod b; use crate::c::C; fn f(_: b::B, _: C) {}"), ("a/b.rs", "use super::C;"), ("c.rs", "")];
    assert!(found(&sources).is_empty());
    // Tests may name anything.
    let sources = [("a.rs", "mod b; fn f(_: b::B) {}"), ("a/b.rs", "#[cfg(test)] mod tests { use super::super::*; }")];
    assert!(found(&sources).is_empty());
    // Three in a row.
    let sources = [("a.rs", "use crate::b::B;"), ("b.rs", "use crate::c::C;"), ("c.rs", "use crate::a::A;")];
    assert_eq!(found(&sources), ["a.rs b.rs c.rs"]);
}
