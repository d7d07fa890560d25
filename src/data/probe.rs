//! Probes: a conversation whose words are replaced by letters that stand for them.
//!
//! A chat template copies words and writes text of its own between them. To separate the two, the
//! words are replaced letter by letter, and the conversation is rendered again. Replacements are
//! letters of scripts that the conversation does not use. Each value of each message has its own
//! replacements, so a rendering shows the origin of every letter. Blanks and quotes stay, and so do
//! the template's own strings if it looks for them: then it takes the same branches. With the
//! original letters put back, the rendering must equal the text. Otherwise the probe is discarded,
//! and another one is tried. A long conversation has more different letters than there are
//! replacements. Then all letters of a value have the same one.

use std::collections::{HashMap, HashSet};
use std::ops::{Range, RangeInclusive};

use super::jinja::{Dict, Value};
use super::literals::Literals;

/// Letters without upper and lower case, the rare ones first. JSON and Python's `repr` do not
/// escape them.
pub(super) const ALPHABET: [RangeInclusive<char>; 10] = [
    '\u{20000}'..='\u{2a6df}',
    '\u{ac00}'..='\u{d7a3}',
    '\u{3400}'..='\u{4dbf}',
    '\u{2a700}'..='\u{2b738}',
    '\u{2b740}'..='\u{2b81d}',
    '\u{2b820}'..='\u{2cea1}',
    '\u{2ceb0}'..='\u{2ebe0}',
    '\u{30000}'..='\u{3134a}',
    '\u{31350}'..='\u{323af}',
    '\u{4e00}'..='\u{9fff}',
];

/// What stands for words in the shape of a message, and for an added letter.
const WORD: char = '\u{1}';
const ADDED: char = '\u{2}';

/// Keys whose values choose a branch of a template: they are never replaced.
const KEPT_KEYS: [&str; 3] = ["role", "type", "required"];
/// Keys of what an assistant thinks before it answers.
const THOUGHT_KEYS: [&str; 4] = ["reasoning_content", "reasoning", "thinking", "thought"];
/// Keys of what an assistant calls.
const CALL_KEYS: [&str; 2] = ["tool_calls", "function_call"];

/// The key of the name of who speaks, or of the tool that answers.
const NAME_KEY: &str = "name";

/// A part of what a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// `content`.
    Content,
    /// `reasoning_content` and its other names.
    Thought,
    /// `tool_calls`.
    Calls,
    /// `name`.
    Name,
    /// Any other key.
    Other,
}

/// The origin of letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// A message, by its index.
    Message(usize, Part),
    /// The list of tools.
    Tools,
}

/// One string of the conversation; all strings of the tools count as one.
#[derive(Debug)]
pub(super) struct Leaf {
    pub(super) owner: Owner,
    /// The number of its replaced letters.
    pub(super) letters: usize,
    /// The text before the first replaced letter, without blanks at the start.
    pub(super) head: String,
    /// The text after the last replaced letter, without blanks at the end.
    pub(super) tail: String,
    /// Whether it is an added letter.
    pub(super) added: bool,
}

/// What a probe does with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Words {
    /// It stays.
    Kept,
    /// Its letters are replaced.
    Replaced,
    /// They are replaced, and a letter is added to its content, which has none to replace.
    Extended,
    /// The same, and the letter replaces the blanks at the end.
    Trimmed,
}

/// How many replacements a value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Letters {
    /// One for each of its different letters.
    Distinct,
    /// One for all of its letters. A conversation of many messages needs no more replacements than
    /// it has values.
    Shared,
}

/// What is replaced.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// One per message.
    pub(super) messages: Vec<Words>,
    /// Whether the tools are replaced.
    pub(super) tools: bool,
    /// Whether calls of tools are replaced, and keys other than content and thought.
    pub(super) calls: bool,
    /// Whether the strings of the template stay in texts.
    pub(super) keep_literals: bool,
    /// Keys whose values stay.
    pub(super) kept_keys: &'static [&'static str],
    pub(super) letters: Letters,
}

/// The meaning of a replacement.
#[derive(Debug, Clone, Copy)]
struct Letter {
    stands_for: StandsFor,
    leaf: usize,
}

/// What a replacement stands for.
#[derive(Debug, Clone, Copy)]
enum StandsFor {
    /// A letter of its leaf.
    One(char),
    /// Every letter of its leaf.
    All,
    /// No letter: it was added.
    Nothing,
}

/// A conversation with replaced letters.
#[derive(Debug)]
pub(super) struct Probe {
    pub(super) messages: Vec<Value>,
    pub(super) tools: Value,
    pub(super) leaves: Vec<Leaf>,
    /// Whether there were too few replacements: some letters stayed.
    pub(super) exhausted: bool,
    /// The leaves of each message; equal messages may have the same leaves.
    leaves_of: Vec<Range<usize>>,
    letters: HashMap<char, Letter>,
    /// The replacement of each letter of each leaf.
    chosen: HashMap<(usize, char), char>,
}

/// Successive letters of one leaf in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    /// Its bytes in the text; empty for an added letter.
    pub(super) bytes: Range<usize>,
    pub(super) leaf: usize,
    /// Whether the leaf was written before: templates repeat names.
    pub(super) repeated: bool,
}

impl Probe {
    /// Replaces letters of a conversation, whose rendering is `text`.
    pub(super) fn new(messages: &[Value], tools: &Value, plan: &Plan, literals: &Literals, text: &str) -> Self {
        let in_alphabet = |c: &char| ALPHABET.iter().any(|range| range.contains(c));
        let used: HashSet<char> = text.chars().filter(in_alphabet).collect();
        let free = ALPHABET.into_iter().flatten().filter(move |c| !used.contains(c));
        let literals = plan.keep_literals.then_some(literals);
        let mut writer = Writer {
            literals,
            kept_keys: plan.kept_keys,
            shared: plan.letters == Letters::Shared,
            of_leaf: None,
            free: Box::new(free),
            chosen: HashMap::new(),
            letters: HashMap::new(),
            leaves: Vec::new(),
            exhausted: false,
        };
        let mut written: Vec<(Value, Range<usize>)> = Vec::with_capacity(messages.len());
        let mut equal: HashMap<(String, Words), (Value, Range<usize>)> = HashMap::new();
        for (index, (message, &words)) in messages.iter().zip(&plan.messages).enumerate() {
            let mut replace = || {
                let first = writer.leaves.len();
                let message = writer.message(index, message, words, plan.calls);
                (message, first..writer.leaves.len())
            };
            written.push(match words {
                Words::Kept => (message.clone(), 0..0),
                _ if is_assistant(message) => replace(),
                // Some templates compare messages: equal ones stay equal, except answers, which
                // must be distinguished.
                _ => equal.entry((message.to_string(), words)).or_insert_with(replace).clone(),
            });
        }
        let (messages, leaves_of) = written.into_iter().unzip();
        let tools = match plan.tools {
            true => {
                let leaf = writer.leaf(Owner::Tools);
                writer.deep(tools, &mut |_| leaf)
            }
            false => tools.clone(),
        };
        let Writer { letters, leaves, exhausted, chosen, .. } = writer;
        Self { messages, tools, leaves, exhausted, leaves_of, letters, chosen }
    }

    /// The leaves of a message.
    pub(super) fn leaves_of(&self, message: usize) -> Range<usize> {
        self.leaves_of.get(message).cloned().unwrap_or_default()
    }

    /// A message without its words: what a template may look at. Words are one letter, also with
    /// the blanks and quotes between them.
    pub(super) fn shape(&self, message: usize) -> String {
        let mut text = String::new();
        self.messages.get(message).into_iter().for_each(|message| spell(message, &mut text));
        let mut shape = String::new();
        let mut gap = String::new();
        for c in text.chars() {
            let written = match self.letters.get(&c) {
                Some(Letter { stands_for: StandsFor::Nothing, .. }) => ADDED,
                Some(_) => WORD,
                None if stays(c) => {
                    gap.push(c);
                    continue;
                }
                None => c,
            };
            if written == WORD && shape.ends_with(WORD) {
                gap.clear();
                continue;
            }
            shape.push_str(&gap);
            gap.clear();
            shape.push(written);
        }
        shape + &gap
    }

    /// The runs of a rendering in `text`; `None` if the rendering with its letters put back is
    /// another text.
    pub(super) fn runs(&self, rendered: &str, text: &str) -> Option<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut seen = vec![0; self.leaves.len()];
        let mut originals = text.char_indices();
        for c in rendered.chars() {
            let start = text.len() - originals.as_str().len();
            let Some(&Letter { stands_for, leaf }) = self.letters.get(&c) else {
                originals.next().filter(|&(_, original)| original == c)?;
                continue;
            };
            let is_it = |original: char| match stands_for {
                StandsFor::One(letter) => letter == original,
                StandsFor::All | StandsFor::Nothing => self.chosen.get(&(leaf, original)) == Some(&c),
            };
            let end = match stands_for {
                StandsFor::Nothing => start,
                _ => originals.next().filter(|&(_, original)| is_it(original)).map(|(at, c)| at + c.len_utf8())?,
            };
            let (Some(seen), Some(of)) = (seen.get_mut(leaf), self.leaves.get(leaf)) else { continue };
            *seen += 1;
            let repeated = *seen > of.letters;
            // Blanks and quotes of a leaf are between its letters.
            let same = |run: &&mut Run| run.leaf == leaf && run.repeated == repeated;
            match runs
                .last_mut()
                .filter(same)
                .filter(|run| text.get(run.bytes.end..start).is_some_and(|gap| gap.chars().all(stays)))
            {
                Some(run) => run.bytes.end = end,
                None => runs.push(Run { bytes: start..end, leaf, repeated }),
            }
        }
        originals.next().is_none().then_some(runs)
    }

    /// The leaf of a rendering's last letter, and the text after that letter; the whole rendering
    /// if it has no letter.
    pub(super) fn tail<'a>(&self, rendered: &'a str) -> (Option<usize>, &'a str) {
        let last = rendered.char_indices().rev().find_map(|(at, c)| Some((self.letters.get(&c)?.leaf, at + c.len_utf8())));
        match last {
            Some((leaf, end)) => (Some(leaf), rendered.get(end..).unwrap_or_default()),
            None => (None, rendered),
        }
    }

    pub(super) fn owner(&self, leaf: usize) -> Option<Owner> {
        self.leaves.get(leaf).map(|leaf| leaf.owner)
    }
}

/// Replaces letters.
struct Writer<'a> {
    literals: Option<&'a Literals>,
    kept_keys: &'static [&'static str],
    /// Whether all letters of a leaf have one replacement.
    shared: bool,
    /// The replacement of the letters of a leaf that share one.
    of_leaf: Option<(usize, char)>,
    free: Box<dyn Iterator<Item = char>>,
    chosen: HashMap<(usize, char), char>,
    letters: HashMap<char, Letter>,
    leaves: Vec<Leaf>,
    /// Whether it needed a letter when none was free.
    exhausted: bool,
}

impl Writer<'_> {
    fn leaf(&mut self, owner: Owner) -> usize {
        self.leaves.push(Leaf { owner, letters: 0, head: String::new(), tail: String::new(), added: false });
        self.leaves.len() - 1
    }

    fn message(&mut self, index: usize, message: &Value, words: Words, calls: bool) -> Value {
        let content = (words != Words::Replaced).then(|| self.extended(index, &message.get("content"), words));
        let replaced = map_values(message, |key, value| match key {
            "content" => content.clone().unwrap_or_else(|| self.content(index, value)),
            _ if self.keeps(key) => value.clone(),
            _ if THOUGHT_KEYS.contains(&key) => self.values(Owner::Message(index, Part::Thought), value),
            _ if CALL_KEYS.contains(&key) && calls => self.values(Owner::Message(index, Part::Calls), value),
            NAME_KEY if calls => self.values(Owner::Message(index, Part::Name), value),
            _ if calls => self.values(Owner::Message(index, Part::Other), value),
            _ => value.clone(),
        });
        // A message that says nothing may have no key for it.
        match (content, replaced.as_dict()) {
            (Some(content), Some(dict)) if dict.get_str("content").is_none() => {
                let mut dict = dict.clone();
                dict.insert("content".into(), content);
                dict.into()
            }
            _ => replaced,
        }
    }

    /// Whether the value of a key stays.
    fn keeps(&self, key: &str) -> bool {
        KEPT_KEYS.contains(&key) || self.kept_keys.contains(&key)
    }

    fn content(&mut self, index: usize, content: &Value) -> Value {
        let owner = Owner::Message(index, Part::Content);
        let Some(parts) = content.as_list() else { return self.values(owner, content) };
        let mut part = |part: &Value| match part.as_dict() {
            // A part without text is a picture or something else that is not read.
            Some(_) => map_values(part, |key, value| if key == "text" { self.values(owner, value) } else { value.clone() }),
            None => self.values(owner, part),
        };
        parts.iter().map(&mut part).collect::<Vec<_>>().into()
    }

    /// Content with a letter more at the end of its text.
    fn extended(&mut self, index: usize, content: &Value, words: Words) -> Value {
        let replaced = self.content(index, content);
        let Some(added) = self.unused() else { return replaced };
        let leaf = self.leaf(Owner::Message(index, Part::Content));
        self.letters.insert(added, Letter { stands_for: StandsFor::Nothing, leaf });
        if let Some(leaf) = self.leaves.get_mut(leaf) {
            (leaf.letters, leaf.added) = (1, true);
            content.as_str().unwrap_or_default().trim_start().clone_into(&mut leaf.head);
        }
        let with_added = |text: &Value| {
            let text = text.as_str().unwrap_or_default();
            Value::from(format!("{}{added}", if words == Words::Trimmed { text.trim_end() } else { text }))
        };
        let Some(parts) = replaced.as_list() else { return with_added(&replaced) };
        let last = parts.iter().rposition(|part| part.get("text").as_str().is_some());
        let extended = |(at, part): (usize, &Value)| match Some(at) == last {
            true => map_values(part, |key, value| if key == "text" { with_added(value) } else { value.clone() }),
            false => part.clone(),
        };
        parts.iter().enumerate().map(extended).collect::<Vec<_>>().into()
    }

    /// Every string of a value, each a leaf of its own.
    fn values(&mut self, owner: Owner, value: &Value) -> Value {
        self.deep(value, &mut |writer| writer.leaf(owner))
    }

    fn deep(&mut self, value: &Value, leaf: &mut dyn FnMut(&mut Self) -> usize) -> Value {
        if let Some(text) = value.as_str() {
            let leaf = leaf(self);
            return Value::from(self.words(text, leaf));
        }
        if let Some(items) = value.as_list() {
            return items.iter().map(|item| self.deep(item, leaf)).collect::<Vec<_>>().into();
        }
        map_values(value, |key, value| if self.keeps(key) { value.clone() } else { self.deep(value, leaf) })
    }

    fn words(&mut self, text: &str, leaf: usize) -> String {
        let kept = self.literals.map(|literals| literals.within(text)).unwrap_or_default();
        let is_kept =
            |at: usize| kept.get(kept.partition_point(|range| range.end <= at)).is_some_and(|range| range.start <= at);
        let mut written = String::with_capacity(3 * text.len());
        let (mut letters, mut start, mut end) = (0, 0, 0);
        for (at, c) in text.char_indices() {
            match (!stays(c) && !is_kept(at)).then(|| self.letter(c, leaf)).flatten() {
                Some(letter) => {
                    start = if letters == 0 { at } else { start };
                    (letters, end) = (letters + 1, at + c.len_utf8());
                    written.push(letter);
                }
                None => written.push(c),
            }
        }
        if let Some(leaf) = self.leaves.get_mut(leaf) {
            leaf.letters += letters;
            text.get(..start).unwrap_or_default().trim_start().clone_into(&mut leaf.head);
            text.get(end..).unwrap_or_default().trim_end().clone_into(&mut leaf.tail);
        }
        written
    }

    /// A letter that stands for nothing yet.
    fn unused(&mut self) -> Option<char> {
        let unused = self.free.next();
        self.exhausted |= unused.is_none();
        unused
    }

    /// The replacement of a letter; `None` once the alphabet is used up.
    fn letter(&mut self, c: char, leaf: usize) -> Option<char> {
        if let Some(&letter) = self.chosen.get(&(leaf, c)) {
            return Some(letter);
        }
        let known = self.of_leaf.filter(|&(of, _)| self.shared && of == leaf).map(|(_, letter)| letter);
        let letter = known.map_or_else(|| self.unused(), Some)?;
        self.of_leaf = Some((leaf, letter));
        self.chosen.insert((leaf, c), letter);
        let stands_for = if self.shared { StandsFor::All } else { StandsFor::One(c) };
        self.letters.insert(letter, Letter { stands_for, leaf });
        Some(letter)
    }
}

/// Whether a message is the assistant's.
pub(super) fn is_assistant(message: &Value) -> bool {
    message.get("role").as_str() == Some("assistant")
}

/// Whether a character is never replaced: templates trim it, or JSON and Python escape it.
fn stays(c: char) -> bool {
    c.is_whitespace() || c.is_control() || matches!(c, '"' | '\'' | '\\')
}

/// Writes all strings of a value with marks around them.
fn spell(value: &Value, out: &mut String) {
    if let Some(items) = value.as_list() {
        out.push('[');
        items.iter().for_each(|item| spell(item, out));
        out.push(']');
    } else if let Some(dict) = value.as_dict() {
        out.push('{');
        for (key, value) in dict.entries() {
            out.push_str(&key.to_string());
            spell(value, out);
        }
        out.push('}');
    } else {
        out.push_str(&format!("<{value}>"));
    }
}

/// A dict with other values; any other value stays.
fn map_values(map: &Value, mut value: impl FnMut(&str, &Value) -> Value) -> Value {
    let Some(dict) = map.as_dict() else { return map.clone() };
    let pair = |(key, old): &(Value, Value)| (key.clone(), value(key.as_str().unwrap_or_default(), old));
    dict.entries().iter().map(pair).collect::<Dict>().into()
}
