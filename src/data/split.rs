//! The pre-tokenizers of a tokenizer.json, with bounds for patterns that look around.
//!
//! Such a pattern is matched by trial and error. Where it takes too many trials, the library
//! `tokenizers` ends the search, and the rest of the text stays one piece: other tokens, and no
//! error. Here it is an error that names the pattern.

use std::time::{Duration, Instant};

use fancy_regex::Regex;
use serde::de::{Deserialize, Deserializer, Error as _};
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{Offsets, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

use super::components::pattern::looks_around;

/// Time that one pattern may take for one text. A megabyte takes some seconds at most.
const MAX_TIME: Duration = Duration::from_secs(60);

/// The pre-tokenizers, one after the other.
pub(super) struct PreTokenizers(Vec<Step>);

enum Step {
    /// A pattern that looks around.
    Split { pattern: Trials, behavior: SplitDelimiterBehavior, invert: bool },
    /// Any other one.
    Other(PreTokenizerWrapper),
}

impl<'de> Deserialize<'de> for PreTokenizers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut steps = Vec::new();
        let all = PreTokenizerWrapper::deserialize(deserializer)?;
        push_steps(all, &mut steps).map_err(|error| D::Error::custom(error.to_string()))?;
        Ok(Self(steps))
    }
}

fn push_steps(all: PreTokenizerWrapper, steps: &mut Vec<Step>) -> tokenizers::Result<()> {
    match all {
        PreTokenizerWrapper::Sequence(sequence) => sequence.into_iter().try_for_each(|inner| push_steps(inner, steps))?,
        PreTokenizerWrapper::Split(Split { pattern: SplitPattern::Regex(source), behavior, invert, .. })
            if looks_around(&source) =>
        {
            steps.push(Step::Split { pattern: Trials::new(source)?, behavior, invert });
        }
        other => steps.push(Step::Other(other)),
    }
    Ok(())
}

impl PreTokenizer for PreTokenizers {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        self.0.iter().try_for_each(|step| match step {
            Step::Split { pattern, behavior, invert: false } => text.split(|_, piece| piece.split(pattern, *behavior)),
            Step::Split { pattern, behavior, invert: true } => {
                text.split(|_, piece| piece.split(Invert(pattern), *behavior))
            }
            Step::Other(other) => other.pre_tokenize(text),
        })
    }
}

/// A pattern that is matched by trial and error.
struct Trials {
    source: String,
    /// The pattern as the first group, or any character: a search tries the pattern at one place.
    regex: Regex,
}

impl Trials {
    fn new(source: String) -> tokenizers::Result<Self> {
        let regex = Regex::new(&format!("({source})|(?s:.)"))?;
        Ok(Self { source, regex })
    }

    fn takes_long(&self, why: &str, text: &str) -> tokenizers::Error {
        format!("the pattern {:?} takes {why} in a text of {} bytes; shorter texts take less", self.source, text.len())
            .into()
    }
}

impl Pattern for &Trials {
    /// As the library's own, with an error where a search does not end in time.
    fn find_matches(&self, text: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        if text.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let started = Instant::now();
        let (mut parts, mut written, mut from, mut last) = (Vec::new(), 0, 0, None);
        while from <= text.len() {
            if started.elapsed() > MAX_TIME {
                return Err(self.takes_long(&format!("more than {} seconds", MAX_TIME.as_secs()), text));
            }
            let found = self.regex.captures_from_pos(text, from);
            let Some(found) = found.map_err(|error| self.takes_long(&format!("too long ({error})"), text))? else { break };
            let Some(place) = found.get(0) else { break };
            let (start, end) = (place.start(), place.end());
            if found.get(1).is_none() {
                from = end;
                continue;
            }
            if start == end {
                from = end + text.get(end..).and_then(|rest| rest.chars().next()).map_or(1, char::len_utf8);
                // An empty match directly after another match does not count.
                if last == Some(end) {
                    continue;
                }
            } else {
                from = end;
            }
            last = Some(end);
            if written != start {
                parts.push(((written, start), false));
            }
            parts.push(((start, end), true));
            written = end;
        }
        if written != text.len() {
            parts.push(((written, text.len()), false));
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::utils::SysRegex;

    /// Patterns of real tokenizers, and others.
    const PATTERNS: [&str; 7] = [
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"\d{1,3}(?=(\d{3})*\b)",
        r"(?=(\d{3})+(?!\d))",
        r"(?!\S)",
        r"\b",
        r"x(?=y)",
    ];

    #[test]
    fn pieces_are_those_of_the_library() {
        let texts = ["", "a", "Don't  stop 1234567 x9\r\n\n  é漢xy  ", "   ", "1234567890", "xyxyx\u{301}y", "\n\t z"];
        for pattern in PATTERNS {
            let own = Trials::new(pattern.to_owned()).unwrap();
            let library = SysRegex::new(pattern).unwrap();
            for text in texts {
                let expected = (&library).find_matches(text).unwrap();
                assert_eq!((&own).find_matches(text).unwrap(), expected, "{pattern} {text:?}");
            }
        }
    }

    #[test]
    fn a_match_far_away_is_found_and_endless_trials_are_an_error() {
        // The library stops after a million trials: it finds nothing here.
        let text = format!("{}xy", "a".repeat(1_100_000));
        let found = (&Trials::new("x(?=y)".to_owned()).unwrap()).find_matches(&text).unwrap();
        assert_eq!(found, [((0, 1_100_000), false), ((1_100_000, 1_100_001), true), ((1_100_001, 1_100_002), false)]);
        let slow = Trials::new(r"\s+(?=x)".to_owned()).unwrap();
        let error = (&slow).find_matches(&" ".repeat(1_100_000)).unwrap_err().to_string();
        assert!(error.contains(r#"the pattern "\\s+(?=x)" takes too long"#) && error.contains("1100000 bytes"), "{error}");
    }
}
