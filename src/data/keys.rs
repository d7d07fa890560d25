//! Keys of no known meaning: each line of a file may have others, and a warning names some of them.

use std::collections::BTreeMap;

/// Keys that are named.
const MAX_KEYS: usize = 20;
/// Characters of a name.
const MAX_CHARS: usize = 60;

/// Keys, and the number of lines with each. Long keys are shortened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyCounts {
    /// The first keys of the file.
    pub named: BTreeMap<String, u64>,
    /// How often lines have other keys.
    pub others: u64,
}

impl KeyCounts {
    /// Counts a key of a line.
    pub(super) fn add(&mut self, key: &str) {
        let name = shortened(key);
        if let Some(lines) = self.named.get_mut(&name) {
            *lines += 1;
        } else if self.named.len() < MAX_KEYS {
            self.named.insert(name, 1);
        } else {
            self.others += 1;
        }
    }
}

/// The keys that an error names, and the number of others.
pub(super) fn first<'a>(keys: impl Iterator<Item = &'a str>) -> (Vec<String>, usize) {
    let mut keys = keys.map(shortened);
    let named = keys.by_ref().take(MAX_KEYS).collect();
    (named, keys.count())
}

/// The start of a long key.
fn shortened(key: &str) -> String {
    match key.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", key.get(..end).unwrap_or_default()),
        None => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_keys_are_shortened_at_a_character() {
        let (exact, long) = ("é".repeat(MAX_CHARS), "é".repeat(MAX_CHARS + 1));
        assert_eq!(shortened(&exact), exact);
        assert_eq!(shortened(&long), format!("{exact}..."));
    }

    #[test]
    fn only_the_first_keys_are_named() {
        let mut counts = KeyCounts::default();
        for key in (0..1000).chain(0..1000) {
            counts.add(&key.to_string());
        }
        assert!(counts.named.len() == MAX_KEYS && counts.named.values().all(|lines| *lines == 2), "{counts:?}");
        assert_eq!(counts.others, 2 * (1000 - MAX_KEYS as u64));
        let keys: Vec<String> = (0..30).map(|key| key.to_string()).collect();
        let (named, others) = first(keys.iter().map(String::as_str));
        assert_eq!((named.as_slice(), others), (&keys[..MAX_KEYS], 10));
    }
}
