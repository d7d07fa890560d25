//! Tokens to text, one whole character at a time.

use super::error::DataError;
use super::tokenizer::Tokenizer;

/// Replaces bytes that are not UTF-8, also those of an incomplete character.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Turns tokens into text, one by one. Text that was shown never changes.
///
/// Tokens are decoded together with those of the text before them, since a decoder may treat the
/// first token of a text differently (a space before it is lost), and since a character may be
/// spread over several tokens.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the text that was shown last, followed by the tokens without shown text.
    tokens: Vec<u32>,
    /// The number of shown tokens.
    shown: usize,
}

impl Tokenizer {
    /// A stream of text that continues `before`, the tokens of a text that is not shown again;
    /// empty at the start of a text.
    pub fn stream(&self, before: &[u32]) -> TokenStream<'_> {
        TokenStream { tokenizer: self, tokens: before.to_vec(), shown: before.len() }
    }
}

impl TokenStream<'_> {
    /// The text that a token adds, without special tokens; nothing where it ends within a
    /// character.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    pub fn push(&mut self, token: u32) -> Result<String, DataError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode_words(&self.tokens)?;
        if text.ends_with(REPLACEMENT) { Ok(String::new()) } else { self.show(&text) }
    }

    /// What is left at the end: a character that never became whole is shown as U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    pub fn finish(&mut self) -> Result<String, DataError> {
        let text = self.tokenizer.decode_words(&self.tokens)?;
        self.show(&text)
    }

    /// What `text`, that of all tokens, has more than that of those that were shown.
    fn show(&mut self, text: &str) -> Result<String, DataError> {
        let shown = self.tokenizer.decode_words(self.tokens.get(..self.shown).unwrap_or_default())?;
        let same = text.chars().zip(shown.chars()).take_while(|(a, b)| a == b);
        let new: String = text.chars().skip(same.count()).collect();
        // A token without text, such as a special one, is no context for the one after it.
        if !new.is_empty() {
            self.tokens.drain(..self.shown);
            self.shown = self.tokens.len();
        }
        Ok(new)
    }
}
