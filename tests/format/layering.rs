//! Holds the sources against the import rules of ARCHITECTURE.md: who may use which module and which crate, and where
//! unsafe code may stand.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Module, and the modules of this crate that it may name besides itself.
const MAY_USE: &[(&str, &[&str])] = &[
    ("format", &[]),
    ("io", &[]),
    ("mmap", &["format"]),
    ("convert", &["arch", "format", "io"]),
    ("gpu", &[]),
    ("dequant", &["format", "gpu", "io", "mmap"]),
    ("random", &[]),
    ("arch", &["format"]),
    ("data", &["arch", "random"]),
    ("ops", &["arch", "format", "dequant", "gpu"]),
    ("lora", &["arch", "format", "gpu", "io", "ops", "random"]),
    ("model", &["arch", "data", "dequant", "format", "gpu", "lora", "ops", "random"]),
    ("train", &["arch", "data", "dequant", "format", "gpu", "io", "lora", "model", "ops", "random"]),
    ("verify", &["arch", "format", "io", "mmap", "convert", "dequant"]),
    ("export", &["format", "io", "mmap", "convert", "dequant", "verify"]),
    ("merge", &["arch", "format", "io", "convert", "data", "dequant", "gpu", "lora", "model", "verify", "export"]),
    (
        "cli",
        &[
            "arch", "format", "io", "mmap", "convert", "data", "dequant", "gpu", "lora", "model", "ops", "random", "train",
            "verify", "export", "merge",
        ],
    ),
    ("main", &["cli"]),
];

/// Crate, and the only modules that may name it. Crates that are not listed may be used anywhere.
const FENCED: &[(&str, &[&str])] = &[
    ("memmap2", &["mmap"]),
    ("safetensors", &["convert", "export", "lora", "train"]),
    ("sha2", &["convert"]),
    ("fs4", &["convert", "export"]),
    ("rayon", &["convert", "data", "dequant", "model", "verify", "export", "merge", "cli"]),
    ("ash", &["gpu"]),
    ("dirs", &["gpu"]),
    ("pollster", &["gpu"]),
    ("wgpu", &["gpu", "dequant", "ops"]),
    ("regex", &["convert", "cli", "data", "lora", "merge", "export", "train"]),
    ("crc32c", &["train"]),
    ("jiff", &["data"]),
    ("minijinja", &["data"]),
    ("minijinja_contrib", &["data"]),
    ("rand_chacha", &["random"]),
    ("tokenizers", &["data"]),
    ("anyhow", &["cli"]),
    ("clap", &["cli"]),
    ("clap_complete", &["cli"]),
    ("ctrlc", &["cli"]),
    ("indicatif", &["cli"]),
    ("toml", &["cli"]),
];

/// What the crate root re-exports, and the module that it is of.
const REEXPORTS: &[(&str, &str)] = &[("MappedPack", "mmap"), ("OpenError", "mmap"), ("LayerError", "mmap")];

/// The only files with unsafe code.
const UNSAFE: &[&str] = &[
    "mmap.rs",
    "convert/encode/avx2.rs",
    "convert/encode/neon.rs",
    "dequant/avx2.rs",
    "dequant/kernel.rs",
    "dequant/neon.rs",
    "dequant/yardstick.rs",
    "gpu/memory.rs",
    "gpu/pipeline.rs",
    "ops/matmul/kernels.rs",
    "ops/attention.rs",
    "ops/cached_attention.rs",
    "ops/rotary.rs",
    "ops/scale.rs",
    "ops/dropout.rs",
    "ops/embedding.rs",
    "ops/finite.rs",
    "ops/loss.rs",
    "ops/optimizer.rs",
    "ops/rms_norm.rs",
    "ops/swiglu.rs",
];

/// A source file without its comments, and its path inside `src`.
struct Source {
    path: String,
    code: String,
}

impl Source {
    /// `convert` for `convert/plan.rs`, `mmap` for `mmap.rs`.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap();
        first.strip_suffix(".rs").unwrap_or(first)
    }
}

fn sources() -> Vec<Source> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let source = |file: PathBuf| {
        let path = file.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
        Source { path, code: without_comments(&fs::read_to_string(&file).unwrap()) }
    };
    files.into_iter().map(source).collect()
}

fn without_comments(text: &str) -> String {
    let code = |line: &str| line.split_once("//").map_or(line, |(code, _)| code).to_owned();
    text.lines().map(code).collect::<Vec<_>>().join("\n")
}

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

/// The names in `use crate::{a, b::c}`, which `after` sees as one empty name.
fn braced(code: &str) -> impl Iterator<Item = &str> {
    code.match_indices("crate::{").flat_map(|(at, prefix)| {
        let rest = &code[at + prefix.len()..];
        let list = rest.split_once(';').map_or(rest, |(list, _)| list);
        let mut depth = 0;
        let top_level = move |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        };
        list.split(top_level).map(|item| item.trim().split("::").next().unwrap().trim_end_matches('}').trim())
    })
}

fn violations(source: &Source) -> Vec<String> {
    let module = source.module();
    if module == "lib" {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_USE.iter().find(|(m, _)| *m == module) else {
        return vec![format!("{}: module {module} has no row in the import rules", source.path)];
    };
    let mut found = Vec::new();
    let named = after(&source.code, "crate::").chain(braced(&source.code)).chain(after(&source.code, "nf4pack::"));
    for name in named.filter(|name| !name.is_empty()) {
        let used = REEXPORTS.iter().find(|(n, _)| *n == name).map_or(name, |(_, m)| m);
        if used != module && !allowed.contains(&used) {
            found.push(format!("{}: {module} may not use {used}", source.path));
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
    let found: Vec<String> = sources.iter().flat_map(violations).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn unsafe_code_stands_only_where_it_may() {
    let uses_unsafe = |s: &&Source| after(&s.code, "unsafe").any(str::is_empty);
    let sources = sources();
    let found: Vec<&str> = sources.iter().filter(uses_unsafe).map(|s| s.path.as_str()).collect();
    let stray: Vec<_> = found.iter().filter(|path| !UNSAFE.contains(path)).collect();
    assert!(stray.is_empty(), "unsafe code in {stray:?}");
    assert!(found.contains(&"mmap.rs"), "the search finds no unsafe code at all");
}

#[test]
fn the_rules_catch_what_they_forbid() {
    let check = |path: &str, code: &str| violations(&Source { path: path.to_owned(), code: without_comments(code) }).len();
    assert_eq!(check("format/x.rs", "use crate::convert::Options;"), 1);
    assert_eq!(check("format/x.rs", "use crate::{format::Role, MappedPack};"), 1);
    assert_eq!(check("dequant/x.rs", "use crate::{convert::{a, b}, format};"), 1);
    assert_eq!(check("dequant/x.rs", "let x = crate::cli::run();"), 1);
    assert_eq!(check("dequant/x.rs", "use safetensors::View;"), 1);
    assert_eq!(check("format/x.rs", "use rayon::prelude::*;"), 1);
    assert_eq!(check("gpu/x.rs", "use crate::format::nf4;"), 1);
    assert_eq!(check("cli/x.rs", "use wgpu::Limits;"), 1);
    assert_eq!(check("novel/x.rs", ""), 1);
    assert_eq!(check("format/x.rs", "// crate::convert\nuse crate::format::nf4;"), 0);
    assert_eq!(check("convert/x.rs", "use safetensors::tensor::Metadata; use crate::{format::nf4, io};"), 0);
}
