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
        } else if comment_mark(&path).is_some() {
            found.push(path);
        }
    }
}

/// What a comment of such a file starts with.
fn comment_mark(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_str()? {
        "rs" | "wgsl" => Some("//"),
        "sh" | "py" | "toml" => Some("#"),
        _ => None,
    }
}

#[test]
fn comments_fit_into_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in ["src", "shaders", "tests", "examples", "benches", "fuzz", "scripts"] {
        files(&root.join(folder), &mut found);
    }
    assert!(found.len() >= 200, "only {} files found", found.len());
    let in_scripts = |file: &&PathBuf| comment_mark(file) == Some("#");
    assert!(found.iter().filter(in_scripts).count() >= 10, "scripts are not found");
    let mut long = Vec::new();
    for file in found {
        let mark = comment_mark(&file).unwrap();
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            if line.trim_start().starts_with(mark) && line.chars().count() > COLUMNS {
                long.push(format!("{}:{}", file.strip_prefix(root).unwrap().display(), number + 1));
            }
        }
    }
    assert!(long.is_empty(), "comments above {COLUMNS} columns: {long:#?}");
}
