//! What a file of samples is, by its name and its first bytes.

use std::ffi::OsStr;
use std::path::Path;

use super::error::Foreign;
use super::lines::{BUFFER, without_mark};

/// Endings of names of JSON Lines, and of plain text.
const JSON_LINES: [&str; 3] = ["jsonl", "json", "ndjson"];
const TEXT: [&str; 2] = ["txt", "md"];
/// Endings of names of tables, whatever they begin with.
const TABLES: [&str; 2] = ["csv", "tsv"];

/// The first bytes of formats that are not read: RFC 1952 (gzip), RFC 8878 (Zstandard), the ZIP
/// application note, the specifications of Parquet and of Arrow's files, and the marks of UTF-16.
const MAGIC: [(&[u8], Foreign); 7] = [
    (b"\x1f\x8b", Foreign::Gzip),
    (b"\x28\xb5\x2f\xfd", Foreign::Zstandard),
    (b"PK\x03\x04", Foreign::Zip),
    (b"PAR1", Foreign::Parquet),
    (b"ARROW1", Foreign::Arrow),
    (b"\xff\xfe", Foreign::Utf16),
    (b"\xfe\xff", Foreign::Utf16),
];

/// What a file of samples is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Each line is a JSON object.
    JsonLines,
    /// All of it is one text.
    Text,
    /// It is not read.
    Foreign(Foreign),
}

impl Kind {
    /// The kind of the file `path`. `first` are its first bytes, and `character` is its first byte
    /// that is not blank, behind the mark of UTF-8. A name without an ending leaves it to them: a
    /// pipe has none.
    pub(super) fn of(path: &Path, first: &[u8], character: Option<u8>) -> Self {
        let ending = path.extension().map(OsStr::to_ascii_lowercase).unwrap_or_default();
        let named = |endings: &[&str]| endings.iter().any(|known| ending == *known);
        if let Some((_, foreign)) = MAGIC.iter().find(|(magic, _)| first.starts_with(magic)) {
            return Self::Foreign(*foreign);
        }
        match character {
            _ if named(&JSON_LINES) => Self::JsonLines,
            _ if named(&TABLES) => Self::Foreign(Foreign::Table),
            _ if first.contains(&0) => Self::Foreign(Foreign::Binary),
            _ if named(&TEXT) => Self::Text,
            None | Some(b'{' | b'[') => Self::JsonLines,
            Some(_) if ending.is_empty() => Self::Text,
            Some(_) => Self::Foreign(Foreign::Unknown),
        }
    }

    /// The kind of a file that is in memory.
    pub(super) fn of_bytes(path: &Path, bytes: &[u8]) -> Self {
        let character = without_mark(bytes).trim_ascii_start().first().copied();
        Self::of(path, bytes.get(..BUFFER).unwrap_or(bytes), character)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_or_the_first_bytes_say_what_a_file_is() {
        let kind = |name: &str, bytes: &[u8]| Kind::of_bytes(Path::new(name), bytes);
        let object = b"{\"text\": \"a\"}";
        for bytes in [&object[..], b"Once", b"\xef\xbb\xbf{", b""] {
            assert!(
                ["a.jsonl", "a.JSON", "b/a.ndjson"].iter().all(|name| kind(name, bytes) == Kind::JsonLines),
                "{bytes:?}"
            );
            assert!(["a.txt", "a.jsonl.md"].iter().all(|name| kind(name, bytes) == Kind::Text), "{bytes:?}");
            assert!(["a.csv", "a.TSV"].iter().all(|name| kind(name, bytes) == Kind::Foreign(Foreign::Table)), "{bytes:?}");
        }
        for name in ["data", "a.yaml", "a.html"] {
            for bytes in [&b"\xef\xbb\xbf {"[..], b"\n[", b"", b"  "] {
                assert_eq!(kind(name, bytes), Kind::JsonLines, "{name} {bytes:?}");
            }
        }
        assert_eq!([kind("data", b"Once"), kind("data", b"\xef\xbb\xbfOnce")], [Kind::Text; 2]);
        assert_eq!(kind("a.yaml", b"a: b"), Kind::Foreign(Foreign::Unknown));
        assert_eq!(kind("a.html", b"<html>"), Kind::Foreign(Foreign::Unknown));
    }

    #[test]
    fn magic_bytes_count_more_than_a_name() {
        for (magic, foreign) in MAGIC {
            let bytes = [magic, b"{\"text\": 1}\0"].concat();
            for name in ["data", "a.txt", "a.jsonl", "a.bin"] {
                assert_eq!(Kind::of_bytes(Path::new(name), &bytes), Kind::Foreign(foreign), "{name}");
            }
        }
        // The bytes of a file's start only.
        let kind = |len| Kind::of_bytes(Path::new("a.txt"), &[&vec![b'a'; len][..], b"\0"].concat());
        assert_eq!([kind(BUFFER - 1), kind(BUFFER)], [Kind::Foreign(Foreign::Binary), Kind::Text]);
    }
}
