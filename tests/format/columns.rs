//! Comments, which rustfmt leaves alone on the stable toolchain, and pages fit into 100 columns.
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

/// The lines of a page that are prose: no table, no code, no link.
fn prose(page: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    page.lines().enumerate().filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        let is_code = fenced || is_fence || line.starts_with("    ");
        !is_code && !line.starts_with('|') && !line.contains("://")
    })
}

#[test]
fn pages_fit_into_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut pages, mut long) = (0, Vec::new());
    for folder in ["", "docs", "spec", "benches"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            pages += 1;
            let text = fs::read_to_string(&path).unwrap();
            let above = prose(&text).filter(|(_, line)| line.chars().count() > COLUMNS);
            long.extend(above.map(|(number, _)| format!("{}:{}", path.strip_prefix(root).unwrap().display(), number + 1)));
        }
    }
    assert!(pages >= 10, "only {pages} pages found");
    assert!(long.is_empty(), "lines above {COLUMNS} columns: {long:#?}");
}

#[test]
fn tables_code_and_links_are_no_prose() {
    let page = "a\n| b |\n```sh\nc\n```\n    d\nhttps://e\n  f";
    assert_eq!(prose(page).collect::<Vec<_>>(), [(0, "a"), (7, "  f")]);
}
