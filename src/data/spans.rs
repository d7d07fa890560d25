//! Where in a text stands what is to be learned.

use std::ops::Range;

use super::formats::Chat;
use super::jinja::Value;
use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use super::{DataError, TrainOn};

/// A text, and its bytes that are to be learned: ranges in order.
#[derive(Debug, PartialEq)]
pub(super) struct Marked {
    pub(super) text: String,
    pub(super) trained: Vec<Range<usize>>,
}

impl Marked {
    /// All that follows the first `start` bytes.
    pub(super) fn from_byte(text: String, start: usize) -> Self {
        let trained = std::iter::once(start..text.len()).collect();
        Self { text, trained }
    }

    /// Whether a token that stands for these bytes is to be learned: some of them are. A token's spaces may not count as its
    /// own, so that nothing but its end is certain.
    pub(super) fn is_trained(&self, token: &Range<usize>) -> bool {
        let start = token.start.min(token.end.saturating_sub(1));
        self.trained.iter().any(|span| token.end > span.start && start < span.end)
    }
}

/// A conversation as the chat template writes it, with what the assistant says marked, up to the token that ends its turn.
///
/// Most templates do not tell which words are the assistant's. Where a turn starts is known from the conversation before it,
/// rendered with the generation prompt; where it ends, from the conversation up to it. Where all is learned, none of this matters.
pub(super) fn conversation(tokenizer: &Tokenizer, line: u64, chat: &Chat, train_on: TrainOn) -> Result<Marked, DataError> {
    let Chat { messages, tools, unlearned } = chat;
    let template = tokenizer.template(tools).map_err(|error| error.of_line(line))?;
    let rendering = Rendering { template, line, messages, tools };
    let text = rendering.first(messages.len(), false)?;
    if train_on == TrainOn::All {
        if !unlearned.is_empty() {
            return Err(DataError::Unlearned { line });
        }
        return Ok(Marked::from_byte(text, 0));
    }
    let mut trained = Vec::new();
    let learned = |i: &usize| messages.get(*i).is_some_and(is_assistant) && !unlearned.contains(i);
    for message in (0..messages.len()).filter(learned) {
        let span = rendering.turn(&text, message)?.ok_or(DataError::Spans { line, message })?;
        trained.push(span);
    }
    Ok(Marked { text, trained })
}

fn is_assistant(message: &Value) -> bool {
    message.get("role").as_str() == Some("assistant")
}

struct Rendering<'a> {
    template: &'a ChatTemplate,
    line: u64,
    messages: &'a [Value],
    tools: &'a Value,
}

impl Rendering<'_> {
    /// The first `count` messages.
    fn first(&self, count: usize, add_generation_prompt: bool) -> Result<String, DataError> {
        self.render(self.messages.get(..count).unwrap_or_default(), add_generation_prompt)
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String, DataError> {
        let rendered = self.template.render(messages, self.tools, add_generation_prompt);
        rendered.map_err(|source| DataError::Render { line: self.line, source })
    }

    /// The bytes of `text`, all of the conversation, that are message `turn` of the assistant without its header.
    fn turn(&self, text: &str, turn: usize) -> Result<Option<Range<usize>>, DataError> {
        let Some(start) = self.start(text, turn)? else { return Ok(None) };
        let until = self.first(turn + 1, false)?;
        let words = last_line(self.messages.get(turn));
        let end = if text.starts_with(&until) { Some(until.len()) } else { end_as_in(&until, text, start, &words) };
        Ok(end.map(|end| start..end_of_turn(text, start, end.max(start), &words)))
    }

    fn start(&self, text: &str, turn: usize) -> Result<Option<usize>, DataError> {
        if turn == 0 {
            return self.start_of_first(text).map(Some);
        }
        let prompt = self.first(turn, true)?;
        if text.starts_with(&prompt) {
            return Ok(Some(prompt.len()));
        }
        // Some generation prompts start a thought that past turns do not have.
        let before = self.first(turn, false)?;
        Ok(text.starts_with(&before).then(|| common_prefix(text, &prompt)).filter(|&start| start >= before.len()))
    }

    /// Where the words of the first message begin, which many templates cannot render anything before: where the conversation
    /// becomes another one if that message says something else. Of two other words, one at least begins with another letter.
    fn start_of_first(&self, text: &str) -> Result<usize, DataError> {
        let Some((first, rest)) = self.messages.split_first() else { return Ok(0) };
        let same = |words| {
            let messages: Vec<Value> = [&[saying(first, words)], rest].concat();
            Ok(common_prefix(text, &self.render(&messages, false)?))
        };
        Ok(same("a")?.min(same("b")?))
    }
}

/// The message with other words.
fn saying(message: &Value, words: &str) -> Value {
    let mut message = message.as_dict().cloned().unwrap_or_default();
    message.insert("content".into(), words.into());
    message.into()
}

/// The last line of what a message says, which every template keeps.
fn last_line(message: Option<&Value>) -> String {
    let content = message.map(|message| message.get("content")).unwrap_or_default();
    let parts = content.as_list().unwrap_or_default();
    let text = match content.as_str() {
        Some(text) => text.to_owned(),
        None => parts.iter().filter_map(|part| Some(part.get("text").as_str()?.to_owned())).collect(),
    };
    text.trim().lines().last().unwrap_or_default().trim().to_owned()
}

/// The end of a turn in `text`, which has it in another form than `until`, where it is the last one: both end in `words` and
/// in what the template writes after them, or in the same line where nothing is said.
fn end_as_in(until: &str, text: &str, start: usize, words: &str) -> Option<usize> {
    let last_line = || until.trim_end().rfind('\n').map_or(0, |end| end + 1);
    let last = until.rfind(words).filter(|_| !words.is_empty()).unwrap_or_else(last_line);
    let ending = until.get(last..)?;
    let found = text.get(start..)?.find(ending)?;
    Some(start + found + ending.len())
}

/// Leaves out the blanks that separate a turn from the next one, if something else ends it.
fn end_of_turn(text: &str, start: usize, end: usize, words: &str) -> usize {
    let turn = text.get(start..end).unwrap_or_default();
    let trimmed = turn.trim_end();
    let said = turn.rfind(words).filter(|_| !words.is_empty()).map_or(0, |at| at + words.len());
    let ended = trimmed.len() > said;
    if ended { start + trimmed.len() } else { end }
}

fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(x, y)| x == y);
    same.map(|(c, _)| c.len_utf8()).sum()
}
