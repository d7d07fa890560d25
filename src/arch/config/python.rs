//! JSON as Python writes and reads it: with NaN and infinities.

use std::borrow::Cow;

/// The words that Python's `json` writes for numbers that JSON does not have.
const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];

/// JSON with null in place of every NaN and infinity. Keys that are read have no such values, but
/// others may.
pub fn standard_json(bytes: &[u8]) -> Cow<'_, [u8]> {
    if !WORDS.iter().any(|word| bytes.windows(word.len()).any(|found| found == *word)) {
        return Cow::Borrowed(bytes);
    }
    let mut out = Vec::with_capacity(bytes.len());
    let (mut rest, mut in_string) = (bytes, false);
    while let Some((&first, after)) = rest.split_first() {
        let word = WORDS.iter().find(|word| !in_string && rest.starts_with(word));
        // An escaped quote does not end the string.
        let escaped = if in_string && first == b'\\' { after.split_first() } else { None };
        match (word, escaped) {
            (Some(word), _) => {
                out.extend(b"null");
                rest = rest.get(word.len()..).unwrap_or_default();
            }
            (None, Some((&next, after))) => {
                out.extend([first, next]);
                rest = after;
            }
            (None, None) => {
                in_string ^= first == b'"';
                out.push(first);
                rest = after;
            }
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_does_not_have_becomes_null() {
        let of = |text: &str| String::from_utf8(standard_json(text.as_bytes()).into_owned()).unwrap();
        assert_eq!(of(r#"{"a": NaN, "b": [Infinity, -Infinity, -1]}"#), r#"{"a": null, "b": [null, null, -1]}"#);
        for same in [r#"{"NaN": "Infinity", "a\"NaN": "\\"}"#, r#"{"a": "x\\\" NaN"}"#, "{}", "\"NaN", "\"\\"] {
            assert_eq!(of(same), same);
        }
    }
}
