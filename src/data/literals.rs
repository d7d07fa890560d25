//! The strings in the tags of a chat template: it may look for them in a message.

use std::collections::HashSet;
use std::ops::Range;

/// The strings of a template.
#[derive(Debug)]
pub(super) struct Literals {
    source: String,
    strings: Vec<String>,
    /// The first words of its tags.
    tags: HashSet<String>,
}

impl Literals {
    /// Those of a template's source.
    pub(super) fn new(source: &str) -> Self {
        let counts = |literal: &str| {
            let several = literal.chars().nth(1).is_some();
            !literal.trim().is_empty() && (several || !literal.contains(char::is_alphanumeric))
        };
        let (strings, tags) = strings(source);
        let found: HashSet<String> = strings.into_iter().filter(|literal| counts(literal)).collect();
        Self { source: source.to_owned(), strings: found.into_iter().collect(), tags }
    }

    /// Their number.
    pub(super) fn count(&self) -> usize {
        self.strings.len()
    }

    /// Whether the template has a word anywhere.
    pub(super) fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Whether the template has a tag of that name.
    pub(super) fn names_tag(&self, name: &str) -> bool {
        self.tags.contains(name)
    }

    /// The parts of a text that are in one of them: ranges in order that do not touch. The strings
    /// may overlap in the text.
    pub(super) fn within(&self, text: &str) -> Vec<Range<usize>> {
        let of = |literal: &String| text.match_indices(literal.as_str()).map(|(at, found)| at..at + found.len()).collect();
        let mut found: Vec<Range<usize>> = self.strings.iter().flat_map(|literal| -> Vec<_> { of(literal) }).collect();
        found.sort_unstable_by_key(|range| (range.start, range.end));
        let mut merged: Vec<Range<usize>> = Vec::new();
        for range in found {
            match merged.last_mut().filter(|last| last.end >= range.start) {
                Some(last) => last.end = last.end.max(range.end),
                None => merged.push(range),
            }
        }
        merged
    }
}

/// The strings in the tags of a template, and the names of tags.
fn strings(source: &str) -> (Vec<String>, HashSet<String>) {
    let (mut found, mut tags) = (Vec::new(), HashSet::new());
    let mut rest = source;
    while let Some((at, close)) = opening(rest) {
        rest = rest.get(at + 2..).unwrap_or_default();
        if close == "%}" {
            let name = rest.trim_start_matches(['-', '+']).trim_start();
            let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
            tags.insert(name.get(..end).unwrap_or_default().to_owned());
        }
        rest = match close {
            "#}" => rest.split_once(close).map_or("", |(_, rest)| rest),
            _ => tag(rest, close, &mut found),
        };
    }
    (found, tags)
}

/// The next tag or comment, and what closes it.
fn opening(source: &str) -> Option<(usize, &'static str)> {
    source.match_indices('{').find_map(|(at, _)| match source.as_bytes().get(at + 1)? {
        b'{' => Some((at, "}}")),
        b'%' => Some((at, "%}")),
        b'#' => Some((at, "#}")),
        _ => None,
    })
}

/// Reads a tag to its end; what follows it.
fn tag<'a>(source: &'a str, close: &str, found: &mut Vec<String>) -> &'a str {
    let mut chars = source.char_indices();
    while let Some((at, c)) = chars.next() {
        let rest = source.get(at..).unwrap_or_default();
        if rest.starts_with(close) {
            return rest.get(close.len()..).unwrap_or_default();
        }
        if c == '\'' || c == '"' {
            found.push(string(&mut chars, c));
        }
    }
    ""
}

fn string(chars: &mut std::str::CharIndices<'_>, quote: char) -> String {
    let mut string = String::new();
    while let Some((_, c)) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some((_, 'n')) => string.push('\n'),
                Some((_, 't')) => string.push('\t'),
                Some((_, 'r')) => string.push('\r'),
                Some((_, '\n')) | None => {}
                Some((_, c)) => string.push(c),
            },
            c if c == quote => break,
            c => string.push(c),
        }
    }
    string
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_tags_are_found() {
        let source = "'no'{# 'no' #}{{ 'a\\n' + \"b'}}\" }}{% if x == '\\'%}' %}\"no\"{% endif %}{{ 'open";
        assert_eq!(strings(source).0, ["a\n", "b'}}", "'%}", "open"]);
        let literals = Literals::new("{% if '</think>' in c or c == 'think' or c == 'a' or c == '\\n' or c == '?' %}");
        assert_eq!(literals.within("a</think>\nthink?"), [1..9, 10..16]);
        let overlapping = Literals::new("{{ '\\n</' + '</think>' + 'ab' + 'bc' }}");
        assert_eq!(overlapping.within("So.\n</think> abc"), [3..12, 13..16]);
        let tags = Literals::new("{%- generation -%}{# {% comment %} #}{{ '{% string %}' }}{%+ endgeneration %}{%if x%}");
        assert!(["generation", "endgeneration", "if"].iter().all(|name| tags.names_tag(name)), "{tags:?}");
        assert!(!tags.names_tag("comment") && !tags.names_tag("string"), "{tags:?}");
        assert!(Literals::new("no tags").within("no tags").is_empty());
    }
}
