//! The package's sources, as far as the rules of `layering` look at them: the paths that each file
//! names, made absolute.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A path of modules and a name: `["convert", "plan", "Plan"]` for `crate::convert::plan::Plan`.
pub type Segments = Vec<String>;

/// A source file.
pub struct Source {
    /// Inside `src`, with slashes.
    pub path: String,
    /// Its text, without comments and without what strings say.
    pub code: String,
    /// Its own modules: `["convert", "plan"]` for `convert/plan.rs`, nothing for `lib.rs`.
    pub module: Segments,
    /// What it names of this crate, outside of tests and in them.
    pub names: Vec<Name>,
    /// What a `use` of its brings into its module, and where that is.
    pub imports: BTreeMap<String, Segments>,
}

/// A path that a file names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    pub segments: Segments,
    pub in_tests: bool,
    /// Whether the file does nothing with it but hand it on (`pub use`).
    pub handed_on: bool,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let code = without_comments_and_strings(text);
        let stem = path.strip_suffix(".rs").unwrap();
        let mut module: Segments = stem.split('/').map(str::to_owned).collect();
        if matches!(module.last().unwrap().as_str(), "mod" | "lib") {
            module.pop();
        }
        let in_tests = matches!(module.last().map(String::as_str), Some("tests" | "testing"));
        let tokens = tokens(&code);
        let mut reader = Reader { tokens: &tokens, at: 0, module: module.clone(), in_tests, found: Vec::new() };
        reader.read();
        let (mut names, mut imports) = (Vec::new(), BTreeMap::new());
        for Found { mut name, alias, import } in reader.found {
            if import && !name.in_tests {
                imports.insert(alias.clone(), name.segments.clone());
            }
            name.handed_on = name.handed_on && tokens.iter().filter(|&&token| token == alias).count() == 1;
            names.push(name);
        }
        Self { path: path.to_owned(), code, module, names, imports }
    }

    /// The module right under the crate's root: `convert` for `convert/plan.rs`, `mmap` for
    /// `mmap.rs`.
    pub fn top(&self) -> &str {
        self.module.first().map_or("lib", String::as_str)
    }
}

/// All files of `src`.
pub fn sources() -> Vec<Source> {
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
    files.sort();
    let source = |file: PathBuf| {
        let path = file.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
        Source::new(&path, &fs::read_to_string(&file).unwrap())
    };
    files.into_iter().map(source).collect()
}

/// The text with comments left out and with strings and characters emptied.
fn without_comments_and_strings(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    while let Some(&byte) = bytes.get(at) {
        let rest = &bytes[at..];
        let behind_word = out.last().is_some_and(|&b| word(b));
        let raw = rest.strip_prefix(b"r").filter(|_| !behind_word || out.ends_with(b"b"));
        let hashes = raw.map(|r| r.iter().take_while(|&&b| b == b'#').count());
        let skipped = if rest.starts_with(b"//") {
            rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment(rest)
        } else if let Some(hashes) = hashes.filter(|&n| raw.is_some_and(|r| r.get(n) == Some(&b'"'))) {
            out.extend(b"\"\"");
            let end = [&b"\""[..], &b"#".repeat(hashes)].concat();
            let start = 2 + hashes;
            rest[start..].windows(end.len()).position(|w| w == end).map_or(rest.len(), |n| start + n + end.len())
        } else if byte == b'"' {
            out.extend(b"\"\"");
            quoted(rest, b'"')
        } else if byte == b'\'' && (rest.get(1) == Some(&b'\\') || is_character(rest)) {
            out.extend(b"' '");
            quoted(rest, b'\'')
        } else {
            0
        };
        if skipped == 0 {
            out.push(byte);
            at += 1;
        } else {
            at += skipped;
        }
    }
    String::from_utf8(out).unwrap()
}

/// Bytes of the comment that `rest` begins with; they nest.
fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Whether a quote begins a character, and no lifetime.
fn is_character(rest: &[u8]) -> bool {
    let end = rest.iter().skip(2).take(4).position(|&b| b == b'\'');
    // One character, of one byte or several.
    end.is_some_and(|n| std::str::from_utf8(&rest[1..2 + n]).is_ok_and(|text| text.chars().count() == 1))
}

/// Bytes of the text between quotes that `rest` begins with.
fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

/// Words, `::`, and single characters.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let len = match first {
            c if word(c) => rest.find(|c| !word(c)).unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            c => c.len_utf8(),
        };
        tokens.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    tokens
}

/// Walks over a file's tokens and collects the paths of this crate.
struct Reader<'a> {
    tokens: &'a [&'a str],
    at: usize,
    module: Segments,
    in_tests: bool,
    found: Vec<Found>,
}

/// A path, and the name that it has in the file.
struct Found {
    name: Name,
    alias: String,
    import: bool,
}

impl<'a> Reader<'a> {
    fn peek(&self, ahead: usize) -> &'a str {
        self.tokens.get(self.at + ahead).copied().unwrap_or("")
    }

    /// Up to the brace that closes this module.
    fn read(&mut self) {
        let mut depth = 0_u32;
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "{" => depth += 1,
                "}" if depth == 0 => return,
                "}" => depth -= 1,
                "mod" if self.peek(2) == "{" => {
                    self.inline_module();
                    continue;
                }
                // `use<'a>` of a type is another thing.
                "use" if self.peek(1) != "<" => {
                    let handed_on = self.at > 0 && matches!(self.tokens[self.at - 1], "pub" | ")");
                    self.at += 1;
                    self.tree(&Vec::new(), handed_on);
                    continue;
                }
                token if self.peek(1) == "::" && is_word(token) && (self.at == 0 || self.tokens[self.at - 1] != "::") => {
                    self.path();
                    continue;
                }
                _ => {}
            }
            self.at += 1;
        }
    }

    fn inline_module(&mut self) {
        let tests = self.peek(1) == "tests" || self.tokens[..self.at].ends_with(&["#", "[", "cfg", "(", "test", ")", "]"]);
        let before = self.in_tests;
        self.module.push(self.peek(1).to_owned());
        self.in_tests |= tests;
        self.at += 3;
        self.read();
        self.at += 1;
        self.module.pop();
        self.in_tests = before;
    }

    /// A path within code.
    fn path(&mut self) {
        let mut segments = vec![self.peek(0).to_owned()];
        self.at += 1;
        while self.peek(0) == "::" && is_word(self.peek(1)) {
            segments.push(self.peek(1).to_owned());
            self.at += 2;
        }
        self.add(&segments, None, false, false);
    }

    /// A tree of a `use`, up to its `;`, or within braces up to `,` or `}`.
    fn tree(&mut self, prefix: &Segments, handed_on: bool) {
        let mut segments = prefix.clone();
        loop {
            match self.peek(0) {
                "{" => {
                    self.at += 1;
                    while !matches!(self.peek(0), "}" | "") {
                        self.tree(&segments, handed_on);
                        if !matches!(self.peek(0), "}" | "") {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    return;
                }
                "::" => self.at += 1,
                "as" => {
                    self.add(&segments, Some(self.peek(1)), true, handed_on);
                    self.at += 2;
                    return;
                }
                ";" | "," | "}" | "" => {
                    self.add(&segments, None, true, handed_on);
                    return;
                }
                // `self` in braces is the path before them.
                "self" if !segments.is_empty() => self.at += 1,
                token => {
                    segments.push(token.to_owned());
                    self.at += 1;
                }
            }
        }
    }

    /// Makes the path absolute. One without a prefix leads into a module below this one or into
    /// another crate: `Files` decides.
    fn add(&mut self, segments: &[String], alias: Option<&str>, import: bool, handed_on: bool) {
        let Some(first) = segments.first() else { return };
        let mut base = if matches!(first.as_str(), "crate" | "nf4pack") { Vec::new() } else { self.module.clone() };
        let mut rest = &segments[usize::from(matches!(first.as_str(), "crate" | "nf4pack" | "self"))..];
        while let Some((_, after)) = rest.split_first().filter(|(first, _)| *first == "super") {
            base.pop();
            rest = after;
        }
        let absolute = [&base[..], rest].concat();
        let Some(last) = absolute.last() else { return };
        let alias = alias.unwrap_or(last).to_owned();
        self.found.push(Found { alias, import, name: Name { segments: absolute, in_tests: self.in_tests, handed_on } });
    }
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Which file a path leads to.
pub struct Files<'a> {
    by_module: BTreeMap<&'a [String], &'a Source>,
}

impl<'a> Files<'a> {
    pub fn new(sources: &'a [Source]) -> Self {
        Self { by_module: sources.iter().filter(|s| s.path != "main.rs").map(|s| (&s.module[..], s)).collect() }
    }

    /// The file that defines what the path names, past what other files hand on.
    pub fn file(&self, segments: &[String]) -> Option<&'a Source> {
        self.follow(segments, 0)
    }

    fn follow(&self, segments: &[String], hops: u32) -> Option<&'a Source> {
        let len = (0..=segments.len()).rev().find(|&n| self.by_module.contains_key(&segments[..n]))?;
        let source = self.by_module[&segments[..len]];
        match segments.get(len).and_then(|name| source.imports.get(name)) {
            Some(target) if hops < 8 && target[..] != segments[..=len] => {
                self.follow(&[target, &segments[len + 1..]].concat(), hops + 1)
            }
            _ => Some(source),
        }
    }
}

/// The files that name each other in a circle, outside of tests: each set of them, by their paths.
pub fn circles(sources: &[Source]) -> BTreeSet<BTreeSet<&str>> {
    let files = Files::new(sources);
    let mut edges: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for source in sources.iter().filter(|s| s.path != "lib.rs") {
        // What a file hands on, and does nothing else with, it does not use.
        for name in source.names.iter().filter(|name| !name.in_tests && !name.handed_on) {
            let target = files.file(&name.segments).map(|s| s.path.as_str()).filter(|&p| p != source.path && p != "lib.rs");
            edges.entry(&source.path).or_default().extend(target);
        }
    }
    let reach: BTreeMap<&str, BTreeSet<&str>> = edges.keys().map(|&file| (file, reached(&edges, file))).collect();
    let both = |a: &str, b: &str| reach[a].contains(b) && reach.get(b).is_some_and(|r| r.contains(a));
    let circle = |file: &str| -> BTreeSet<&str> { reach[file].iter().copied().filter(|other| both(file, other)).collect() };
    edges.keys().map(|file| circle(file)).filter(|circle| circle.len() > 1).collect()
}

/// What leads from a file, over any number of edges.
fn reached<'a>(edges: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &'a str) -> BTreeSet<&'a str> {
    let (mut seen, mut stack) = (BTreeSet::new(), vec![from]);
    while let Some(file) = stack.pop() {
        stack.extend(edges.get(file).into_iter().flatten().copied().filter(|&next| seen.insert(next)));
    }
    seen
}
