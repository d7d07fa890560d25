//! Comments fit into 100 columns, which rustfmt leaves alone on the stable toolchain.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

const COLUMNS: usize = 100;

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs" || e == "wgsl") {
            found.push(path);
        }
    }
}

#[test]
fn comments_fit_into_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in ["src", "shaders", "tests", "examples", "benches", "fuzz"] {
        files(&root.join(folder), &mut found);
    }
    assert!(found.len() >= 200, "only {} files found", found.len());
    let mut long = Vec::new();
    for file in found {
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            if line.trim_start().starts_with("//") && line.chars().count() > COLUMNS {
                long.push(format!("{}:{}", file.strip_prefix(root).unwrap().display(), number + 1));
            }
        }
    }
    assert!(long.is_empty(), "comments above {COLUMNS} columns: {long:#?}");
}
