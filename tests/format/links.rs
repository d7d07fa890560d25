//! The links of the pages: each leads to a file of the repository, and to a heading that exists.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Markdown files of the repository.
fn pages() -> Vec<PathBuf> {
    let folders = ["", "docs", "spec", "benches"].map(|folder| Path::new(ROOT).join(folder));
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// The lines without blocks of code and without code in a line.
fn prose(text: &str) -> String {
    let mut in_code = false;
    let outside = text.lines().filter(|line| {
        let fence = line.starts_with("```");
        in_code ^= fence;
        !fence && !in_code
    });
    let text: Vec<&str> = outside.collect();
    text.join("\n").split('`').step_by(2).collect::<Vec<_>>().join(" ")
}

/// The targets of the links of a page, except those to other sites.
fn targets(text: &str) -> Vec<String> {
    let found = prose(text);
    let targets = found.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()));
    targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:")).collect()
}

/// The anchors of a page's headings.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let text = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        text.chars().filter(|&c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
    };
    headings.map(anchor).collect()
}

/// Whether a link from `page` leads somewhere.
fn leads(page: &Path, target: &str) -> bool {
    let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
    let path = if file.is_empty() { page.to_owned() } else { page.parent().unwrap().join(file) };
    let has = |anchor: &str| anchors(&fs::read_to_string(&path).unwrap()).iter().any(|found| found == anchor);
    path.exists() && (anchor.is_empty() || has(anchor))
}

#[test]
fn no_link_is_dead() {
    let mut dead = Vec::new();
    let mut links = 0;
    for page in pages() {
        for target in targets(&fs::read_to_string(&page).unwrap()) {
            links += 1;
            if !leads(&page, &target) {
                dead.push(format!("{}: {target}", page.strip_prefix(ROOT).unwrap().display()));
            }
        }
    }
    assert!(links >= 15, "only {links} links found");
    assert!(dead.is_empty(), "dead links: {dead:#?}");
}

#[test]
fn the_summary_of_the_book_has_every_page() {
    let folder = Path::new(ROOT).join("docs");
    let mut listed = targets(&fs::read_to_string(folder.join("SUMMARY.md")).unwrap());
    let names = pages().into_iter().filter(|page| page.parent() == Some(&folder));
    let mut pages: Vec<String> = names.map(|page| page.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    pages.retain(|page| page != "SUMMARY.md");
    listed.sort();
    pages.sort();
    assert_eq!(listed, pages);
}

#[test]
fn a_dead_link_is_found() {
    let text = "[a](b.md) `[c](d.md)` [e](https://f)\n```\n[g](h.md)\n```\n[i](#j-k)\n";
    assert_eq!(targets(text), ["b.md", "#j-k"]);
    assert_eq!(anchors("# A b\ntext\n## `c`: D"), ["a-b", "c-d"]);
    let page = Path::new(ROOT).join("README.md");
    assert!(leads(&page, "docs/error-codes.md#any-command"));
    assert!(!leads(&page, "docs/error-codes.md#no-command") && !leads(&page, "docs/none.md"));
}
