//! Stop strings: where a generated text ends before its end token.

/// Looks for stop strings in a text that comes in pieces.
#[derive(Debug)]
pub struct Stop<'a> {
    strings: &'a [String],
    /// The end of the text so far that may be the start of a stop string.
    held: String,
    found: bool,
}

impl<'a> Stop<'a> {
    /// Empty strings stop nothing.
    pub fn new(strings: &'a [String]) -> Self {
        Self { strings, held: String::new(), found: false }
    }

    /// The next piece of the text: returns what may be shown of it, never a part of a stop string.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(piece);
        let strings = || self.strings.iter().filter(|string| !string.is_empty());
        if let Some(at) = strings().filter_map(|string| self.held.find(string.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let is_start = |&at: &usize| strings().any(|string| self.held.get(at..).is_some_and(|end| string.starts_with(end)));
        let at = self.held.char_indices().map(|(at, _)| at).find(is_start).unwrap_or(self.held.len());
        let kept = self.held.split_off(at);
        std::mem::replace(&mut self.held, kept)
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn found(&self) -> bool {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shown text, and whether a stop string was found.
    fn shown(strings: &[&str], pieces: &[&str]) -> (String, bool) {
        let strings: Vec<String> = strings.iter().map(|&string| string.to_owned()).collect();
        let mut stop = Stop::new(&strings);
        let mut text: String = pieces.iter().map(|piece| stop.push(piece)).collect();
        text += &stop.finish();
        (text, stop.found())
    }

    #[test]
    fn a_text_ends_before_the_first_stop_string() {
        assert_eq!(shown(&["\n\n"], &["a\nb", "\n", "\nc", "d"]), ("a\nb".to_owned(), true));
        assert_eq!(shown(&["END", "ND"], &["x E", "N", "D y"]), ("x ".to_owned(), true));
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b"]), ("a".to_owned(), true));
        assert_eq!(shown(&["é!"], &["caf", "é", "!"]), ("caf".to_owned(), true));
    }

    #[test]
    fn a_text_without_a_stop_string_is_whole() {
        assert_eq!(shown(&["END"], &["E", "N", "d E", "N"]), ("ENd EN".to_owned(), false));
        assert_eq!(shown(&[], &["a", "b"]), ("ab".to_owned(), false));
        assert_eq!(shown(&[""], &["a", "b"]), ("ab".to_owned(), false));
    }

    #[test]
    fn no_more_is_held_back_than_the_start_of_a_stop_string() {
        let strings = ["stop".to_owned()];
        let mut stop = Stop::new(&strings);
        assert_eq!(stop.push("a st"), "a ");
        assert_eq!(stop.push("ar"), "star");
    }
}
