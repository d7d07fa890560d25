//! The spans of a rendered conversation that are learned.
//!
//! A template with `{% generation %}` marks them itself. Any other template is probed (see
//! [`super::probe`]): then the origin of each letter is known, a message or the template. The text
//! of the template between the words of two messages is a seam. A seam has the end of a turn and
//! the header of the next one. The end also follows the turn if it is the last one. The header is
//! also in the generation prompt.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;

use super::calls;
use super::error::DataError;
use super::formats::Chat;
use super::jinja::{Rendered, Value, check_steps, with_stack};
use super::notice::{Concern, LeftOut, SpanFlaw};
use super::options::TrainOn;
use super::probe::{Leaf, Letters, Owner, Part, Plan, Probe, Run, Words, is_assistant};
use super::rendering::{Discarded, Rendering, one_by_one};
use super::seam::{common_prefix, common_suffix, header_end, last_end};
use super::tokenizer::{Message, Tokenizer, values};

/// A text, and the bytes of it that are learned: ranges in order that do not overlap.
#[derive(Debug, PartialEq)]
pub(super) struct Marked {
    pub(super) text: String,
    pub(super) learned: Vec<Range<usize>>,
    /// What may be wrong with it.
    pub(super) concerns: Vec<Concern>,
}

impl Marked {
    /// A text that is learned from byte `start`.
    pub(super) fn from_byte(text: String, start: usize) -> Self {
        let learned = std::iter::once(start..text.len()).collect();
        Self { text, learned, concerns: Vec::new() }
    }

    /// Whether the token of these bytes is learned: some of the bytes are. A tokenizer may leave a
    /// token's spaces out of its bytes, so only the end is certain.
    pub(super) fn is_learned(&self, token: &Range<usize>) -> bool {
        let start = token.start.min(token.end.saturating_sub(1));
        let next = self.learned.partition_point(|span| span.end <= start);
        self.learned.get(next).is_some_and(|span| span.start < token.end)
    }
}

/// A conversation as the chat template writes it, with the assistant's turns marked, up to the
/// token that ends each.
///
/// # Errors
/// [`DataError::NoTemplate`], [`DataError::Render`], [`DataError::Unlearned`],
/// [`DataError::Spans`].
pub(super) fn conversation(tokenizer: &Tokenizer, line: u64, chat: &Chat, train_on: TrainOn) -> Result<Marked, DataError> {
    // It is rendered many times: on one thread.
    with_stack(|| marked_conversation(tokenizer, line, chat, train_on)).map_err(DataError::NoThread)?
}

fn marked_conversation(tokenizer: &Tokenizer, line: u64, chat: &Chat, train_on: TrainOn) -> Result<Marked, DataError> {
    let Chat { messages, tools, variables, prompt, unlearned } = chat;
    let template = tokenizer.template(tools).map_err(|error| error.of_line(line))?;
    let own = (!variables.entries().is_empty()).then(|| template.with(variables));
    let template = own.as_ref().unwrap_or(template);
    let messages = &*calls::for_template(messages, tools, template);
    let rendering = Rendering { template, messages, tools, add_generation_prompt: false };
    let Rendered { text, generations } =
        template.rendered(messages, tools, false).map_err(|source| DataError::Render { line, source })?;
    let probed = Probed::new(rendering, &text);
    let mut concerns: Vec<Concern> = probed.left_out().into_iter().map(Concern::LeftOut).collect();
    let learned = match train_on {
        TrainOn::All if !unlearned.is_empty() => return Err(DataError::Unlearned { line }),
        TrainOn::All => std::iter::once(0..text.len()).collect(),
        TrainOn::Completions => {
            let probed = probed.with_letters_added();
            let unlearned: HashSet<usize> = (0..*prompt).chain(unlearned.iter().copied()).collect();
            let spans = match template.marks_generation() {
                true => probed.marked(generations, &unlearned).inspect(|spans| {
                    concerns.extend(probed.lacks_marks(spans, &unlearned).then_some(Concern::Unmarked));
                }),
                false => probed.spans(&tokenizer.end_tokens(), &unlearned),
            };
            let spans = spans.map_err(|(message, flaw)| DataError::Spans { line, message, flaw });
            check_steps().map_err(|source| DataError::Render { line, source }).and(spans)?
        }
    };
    Ok(Marked { text, learned, concerns })
}

impl Tokenizer {
    /// The parts of a conversation that [`Tokenizer::chat_prompt`] lacks, in words, such as "the
    /// system prompt".
    pub fn left_out(&self, messages: &[Message]) -> Vec<String> {
        let Ok(template) = self.template(&Value::None) else { return Vec::new() };
        let messages = values(messages);
        let rendering = Rendering { template, messages: &messages, tools: &Value::None, add_generation_prompt: true };
        let lacks = rendering.text().map(|text| Probed::new(rendering, &text).left_out()).unwrap_or_default();
        lacks.iter().map(ToString::to_string).collect()
    }
}

/// A rendered conversation, with the origin of each letter.
struct Probed<'a> {
    rendering: Rendering<'a>,
    text: &'a str,
    plan: Plan,
    probe: Probe,
    runs: Vec<Run>,
    /// The runs of each message's words, by their indices.
    words: Vec<Option<Range<usize>>>,
    /// The leaves that have runs.
    written: HashSet<usize>,
    /// For each message, the last run of the messages before it, by its index.
    before: Vec<Option<usize>>,
    /// The shape of each message.
    shapes: Vec<Rc<str>>,
    /// Whether there were too few replacements for all letters.
    exhausted: bool,
    /// The ends of renderings of the first messages, by the shapes of the last few of these.
    tails: RefCell<HashMap<TailKey, Tail>>,
}

/// Messages whose shapes decide on what a template writes after the last one of them.
const CONTEXT: usize = 3;

/// Whether a rendering has a generation prompt, whether its messages are all of the conversation's
/// first ones, and the shapes of the last ones.
type TailKey = (bool, bool, Vec<Rc<str>>);

/// What a template writes after the last letter, and that letter's leaf, counted from the first
/// leaf of the last message.
#[derive(Debug, Clone)]
struct Tail {
    leaf: usize,
    text: Rc<str>,
}

impl<'a> Probed<'a> {
    fn new(rendering: Rendering<'a>, text: &'a str) -> Self {
        let all = |tools, calls, keep_literals, kept_keys| {
            let messages = vec![Words::Replaced; rendering.messages.len()];
            Plan { messages, tools, calls, keep_literals, kept_keys, letters: Letters::Distinct }
        };
        // Few templates look at words; the second plan keeps the strings that they look for. Others
        // find the call of a result by its identifier, or a tool by its name.
        let plans = [
            all(true, true, false, &[]),
            all(true, true, true, &[]),
            all(true, true, true, &["id", "tool_call_id"]),
            all(true, true, true, &["id", "tool_call_id", "name"]),
            all(false, true, true, &["id", "tool_call_id", "name"]),
            all(false, false, true, &[]),
        ];
        let (mut letters, mut exhausted) = (Letters::Distinct, false);
        for plan in plans {
            let mut plan = Plan { letters, ..plan };
            let mut found = rendering.attempt(&plan, text);
            if letters == Letters::Distinct && matches!(found, Err(Discarded::Exhausted)) {
                letters = Letters::Shared;
                plan.letters = letters;
                found = rendering.attempt(&plan, text);
            }
            match found {
                Ok(found) => return Self::of(rendering, text, plan, found),
                Err(discarded) => exhausted |= discarded == Discarded::Exhausted,
            }
        }
        let (found, plan) = one_by_one(rendering, text, letters);
        Self { exhausted, ..Self::of(rendering, text, plan, found) }
    }

    fn of(rendering: Rendering<'a>, text: &'a str, plan: Plan, (probe, runs): (Probe, Vec<Run>)) -> Self {
        let mut words: Vec<Option<Range<usize>>> = vec![None; rendering.messages.len()];
        for (at, run) in runs.iter().enumerate().filter(|(_, run)| !run.repeated) {
            let Some(words) = said_by(&probe, run).and_then(|message| words.get_mut(message)) else { continue };
            words.get_or_insert(at..at).end = at + 1;
        }
        let written = runs.iter().map(|run| run.leaf).collect();
        let before = last_before(rendering.messages.len(), &probe, &runs);
        let shapes = (0..rendering.messages.len()).map(|message| probe.shape(message).into()).collect();
        let (exhausted, tails) = (false, RefCell::default());
        Self { rendering, text, plan, probe, runs, words, written, before, shapes, exhausted, tails }
    }

    /// Adds a letter to each message without words, if that changes nothing else.
    fn with_letters_added(mut self) -> Self {
        let messages = self.rendering.messages;
        let has_role = |at: &usize| messages.get(*at).is_some_and(|message| !message.get("role").is_undefined());
        for words in [Words::Extended, Words::Trimmed] {
            let silent: Vec<usize> = (0..messages.len()).filter(has_role).filter(|&at| self.is_silent(at)).collect();
            // Most templates allow all at once.
            if silent.is_empty() || self.change(words, silent.iter().copied()).is_ok() {
                continue;
            }
            for at in silent {
                if !self.is_silent(at) {
                    // An equal message before it got the letter for both.
                    continue;
                }
                // Some templates compare messages: equal ones stay equal.
                let message = messages.get(at).filter(|message| !is_assistant(message));
                let is_equal = |other: &usize| *other == at || (message.is_some() && messages.get(*other) == message);
                let equal = (0..messages.len()).filter(is_equal);
                match self.change(words, equal) {
                    // No letters are left for the messages after this one.
                    Err(Discarded::Exhausted) => return Self { exhausted: true, ..self },
                    Err(Discarded::Stopped) => return self,
                    Ok(()) | Err(Discarded::Differs) => {}
                }
            }
        }
        self
    }

    /// Replaces the words of some messages in another way, if the text stays the same.
    fn change(&mut self, words: Words, messages: impl Iterator<Item = usize>) -> Result<(), Discarded> {
        let mut plan = self.plan.clone();
        messages.for_each(|at| plan.messages.get_mut(at).into_iter().for_each(|message| *message = words));
        let found = self.rendering.attempt(&plan, self.text)?;
        *self = Self { exhausted: self.exhausted, ..Self::of(self.rendering, self.text, plan, found) };
        Ok(())
    }

    /// Whether the text has no letter of a message. Equal messages have the same letters.
    fn is_silent(&self, message: usize) -> bool {
        !self.probe.leaves_of(message).any(|leaf| self.written.contains(&leaf))
    }

    /// The indices of the assistant's messages.
    fn turns(&self) -> impl Iterator<Item = usize> + use<'a> {
        let messages = self.rendering.messages;
        (0..messages.len()).filter(|&i| messages.get(i).is_some_and(is_assistant))
    }

    /// The parts of messages that the text lacks.
    fn left_out(&self) -> Vec<LeftOut> {
        let rendered = |leaf: usize| self.written.contains(&leaf);
        let role = |message: usize| self.rendering.messages.get(message).map(|message| message.get("role").to_string());
        let last = self.rendering.messages.len().checked_sub(1);
        let leaves = || self.probe.leaves.iter().enumerate().filter(|(_, leaf)| leaf.letters > 0 && !leaf.added);
        let of_written: HashSet<Owner> = leaves().filter(|&(at, _)| rendered(at)).map(|(_, leaf)| leaf.owner).collect();
        let lost = |(at, leaf): (usize, &Leaf)| match leaf.owner {
            Owner::Message(message, Part::Content) if !rendered(at) => role(message).map(|role| LeftOut::Message { role }),
            // Templates leave out the thoughts of earlier turns. That of the last one is learned.
            Owner::Message(message, Part::Thought) if last == Some(message) && !rendered(at) => Some(LeftOut::Thought),
            Owner::Message(_, Part::Calls) if !of_written.contains(&leaf.owner) => Some(LeftOut::Calls),
            Owner::Message(message, Part::Name) if !rendered(at) => role(message).map(|role| LeftOut::Name { role }),
            Owner::Tools if !rendered(at) => Some(LeftOut::Tools),
            Owner::Message(..) | Owner::Tools => None,
        };
        let mut lost: Vec<LeftOut> = leaves().filter_map(lost).collect();
        lost.sort_unstable();
        lost.dedup();
        lost
    }

    /// The spans that the template marks, without those of some messages; or the message whose
    /// marks are unknown, and why. Some templates mark the header of a turn, too.
    fn marked(
        &self,
        generations: Vec<Range<usize>>,
        unlearned: &HashSet<usize>,
    ) -> Result<Vec<Range<usize>>, (usize, SpanFlaw)> {
        let (mut spans, mut unknown) = (Vec::new(), false);
        let mut any = false;
        for span in generations.into_iter().filter(|span| !span.is_empty()) {
            any = true;
            let turns = self.turns_within(&span)?;
            unknown |= turns.is_empty();
            match turns.iter().find(|turn| unlearned.contains(turn)) {
                None => spans.push(span),
                Some(_) if turns.iter().all(|turn| unlearned.contains(turn)) => {}
                Some(&turn) => return Err((turn, SpanFlaw::Mixed)),
            }
        }
        // A span without known words may be that of an unlearned message without known words.
        let lost = |&turn: &usize| self.is_changed(turn) || (unknown && self.is_silent(turn));
        match self.turns().filter(|turn| unlearned.contains(turn)).find(lost).filter(|_| any) {
            Some(turn) => Err((turn, self.flaw_of_changed())),
            None => Ok(united(spans)),
        }
    }

    /// The assistant's messages that have words in a span; or an error if a part of the span
    /// belongs to another message or the tools.
    fn turns_within(&self, span: &Range<usize>) -> Result<Vec<usize>, (usize, SpanFlaw)> {
        let touches = |run: &&Run| match run.bytes.is_empty() {
            true => span.start <= run.bytes.start && run.bytes.end <= span.end,
            false => run.bytes.start < span.end && run.bytes.end > span.start,
        };
        let (mut turns, mut foreign) = (Vec::new(), None);
        // Runs are in order.
        let first = self.runs.partition_point(|run| run.bytes.end < span.start);
        let near = self.runs.iter().skip(first).take_while(|run| run.bytes.start <= span.end);
        for run in near.filter(touches) {
            match self.probe.owner(run.leaf) {
                Some(Owner::Message(turn, _)) if self.rendering.messages.get(turn).is_some_and(is_assistant) => {
                    turns.push(turn)
                }
                // An added letter at the border of the span is not in it.
                _ if run.bytes.is_empty() => {}
                Some(Owner::Message(message, _)) => foreign = Some(message),
                Some(Owner::Tools) | None => foreign = foreign.or(Some(0)),
            }
        }
        turns.dedup();
        match foreign {
            Some(message) => Err((turns.first().copied().unwrap_or(message), SpanFlaw::Mixed)),
            None => Ok(turns),
        }
    }

    /// Whether words of a learned message are outside the marked spans.
    fn lacks_marks(&self, spans: &[Range<usize>], unlearned: &HashSet<usize>) -> bool {
        let learned =
            |turn: usize| self.rendering.messages.get(turn).is_some_and(is_assistant) && !unlearned.contains(&turn);
        let marked = |run: &Run| {
            let span = spans.get(spans.partition_point(|span| span.end < run.bytes.end));
            span.is_some_and(|span| span.start <= run.bytes.start)
        };
        let words = self.runs.iter().filter(|run| !run.repeated && !run.bytes.is_empty());
        words.filter(|run| said_by(&self.probe, run).is_some_and(learned)).any(|run| !marked(run))
    }

    /// The learned spans, without those of some messages; or the message whose span is unknown, and
    /// why.
    fn spans(&self, ends: &[String], unlearned: &HashSet<usize>) -> Result<Vec<Range<usize>>, (usize, SpanFlaw)> {
        let mut spans = Vec::new();
        for turn in self.turns().filter(|turn| !unlearned.contains(turn)) {
            let flawed = |flaw| (turn, flaw);
            let span = if self.is_changed(turn) { Err(self.flaw_of_changed()) } else { self.turn(turn, ends) };
            spans.extend(span.map_err(flawed)?.map(|span| (turn, span)));
        }
        self.check(&spans)?;
        Ok(spans.into_iter().map(|(_, span)| span).collect())
    }

    /// Whether some words of a message have no replacements.
    fn is_changed(&self, turn: usize) -> bool {
        let is_kept = self.plan.messages.get(turn) == Some(&Words::Kept) || (!self.plan.calls && self.calls(turn));
        is_kept || (self.exhausted && self.words(turn).is_none())
    }

    /// Why.
    fn flaw_of_changed(&self) -> SpanFlaw {
        if self.exhausted { SpanFlaw::Letters } else { SpanFlaw::Changed }
    }

    /// Whether a message calls tools.
    fn calls(&self, turn: usize) -> bool {
        self.rendering.messages.get(turn).is_some_and(|message| message.get("tool_calls").is_true())
    }

    /// The runs of a message's words, by their indices.
    fn words(&self, turn: usize) -> Option<Range<usize>> {
        self.words.get(turn)?.clone()
    }

    fn of_message(&self, run: &Run, turn: usize) -> bool {
        matches!(self.probe.owner(run.leaf), Some(Owner::Message(message, _)) if message == turn)
    }

    /// The span of a turn; `None` if the text has no such turn.
    fn turn(&self, turn: usize, ends: &[String]) -> Result<Option<Range<usize>>, SpanFlaw> {
        let Some(words) = self.words(turn) else { return Ok(self.silent_turn(turn, ends)) };
        let runs = self.runs.get(words.clone()).unwrap_or_default();
        if !runs.iter().all(|run| self.of_message(run, turn)) {
            return Err(SpanFlaw::Mixed);
        }
        let start = self.start(turn, &words);
        let end = self.end(turn, &words, ends);
        Ok(Some(start.min(end)..end))
    }

    /// The start of a turn's span, given its runs: the end of the generation prompt.
    fn start(&self, turn: usize, words: &Range<usize>) -> usize {
        let before = words.start.checked_sub(1).and_then(|before| self.runs.get(before));
        let (leaf, base) = (before.map(|run| run.leaf), before.map_or(0, |run| run.bytes.end));
        let (first, last) = self.bytes(words);
        let head = self.runs.get(words.start).and_then(|run| self.probe.leaves.get(run.leaf)).map(|leaf| leaf.head.as_str());
        let first = first - head.filter(|head| self.slice(base..first).ends_with(head)).map_or(0, str::len);
        let style = self.rendering.template.style();
        let seam = self.slice(base..first);
        if let Some((_, prompt)) = self.prefix(turn, true).filter(|(of, _)| *of == leaf) {
            // The prompt of an empty conversation may differ from the start of one that the
            // assistant begins.
            let prompted = before.is_some() || !prompt.trim().is_empty();
            // It may end within the words, where they begin with its thought.
            if prompted && self.slice(base..last + self.said_after(words)).starts_with(&*prompt) {
                let start = base + prompt.len();
                return header_end(self.slice(start..first), &style.header).map_or(start, |end| start + end);
            }
            // A prompt that begins a thought, and a turn without one.
            if prompted && prompt.starts_with(seam) {
                return first;
            }
        }
        let header = header_end(seam, &style.prompt).or_else(|| header_end(seam, &style.header));
        header.map_or(first, |end| base + end)
    }

    /// The end of a turn's span, given its runs.
    fn end(&self, turn: usize, words: &Range<usize>, ends: &[String]) -> usize {
        let (_, base) = self.bytes(words);
        let leaf = words.end.checked_sub(1).and_then(|last| self.runs.get(last)).map(|run| run.leaf);
        let next = self.runs.get(words.end).map_or(self.text.len(), |run| run.bytes.start);
        let seam = self.slice(base..next);
        base + self.closing(turn, leaf, seam, self.said_after(words), ends)
    }

    /// Bytes of words after the last replaced letter of a turn, given its runs.
    fn said_after(&self, words: &Range<usize>) -> usize {
        let last = words.end.checked_sub(1).and_then(|last| self.runs.get(last));
        let tail = last.and_then(|run| Some((run, self.probe.leaves.get(run.leaf)?.tail.as_str())));
        tail.filter(|(run, tail)| self.slice(run.bytes.end..self.text.len()).starts_with(tail))
            .map_or(0, |(_, tail)| tail.len())
    }

    /// Bytes of a seam that end the turn before it. The first `said` bytes are words.
    fn closing(&self, turn: usize, leaf: Option<usize>, seam: &str, said: usize, ends: &[String]) -> usize {
        let common = self.alone(turn + 1, leaf, seam).max(said);
        let closing = seam.get(said..common).unwrap_or_default();
        // Blanks separate turns and are not learned, unless nothing else separates the turns.
        let closed = match (last_end(closing, ends), closing.trim_end().len()) {
            (Some(end), _) => end,
            (None, 0) => closing.len(),
            (None, trimmed) => trimmed,
        };
        let mut end = said + closed;
        // An end of text may follow the very last turn alone.
        while let Some(found) = seam.get(end..).and_then(|rest| next_end(rest, ends)) {
            end += found;
        }
        end
    }

    /// Bytes of a seam that also end the conversation of the first `count` messages, if the letters
    /// before both are of the same leaf.
    fn alone(&self, count: usize, leaf: Option<usize>, seam: &str) -> usize {
        let Some((_, tail)) = self.prefix(count, false).filter(|(of, _)| *of == leaf) else { return 0 };
        let always = common_suffix(&tail, &self.rendering.template.style().always);
        common_prefix(seam, tail.get(..tail.len() - always).unwrap_or_default())
    }

    /// The span of a turn without words that the template writes in another way than a turn with
    /// words.
    fn silent_turn(&self, turn: usize, ends: &[String]) -> Option<Range<usize>> {
        let before = self.before.get(turn).copied().flatten();
        let run = before.and_then(|before| self.runs.get(before));
        let (leaf, base) = (run.map(|run| run.leaf), run.map_or(0, |run| run.bytes.end));
        let next = self.runs.get(before.map_or(0, |before| before + 1)).map_or(self.text.len(), |run| run.bytes.start);
        let seam = self.slice(base..next);
        let end = self.closing(turn, leaf, seam, 0, ends);
        // A prompt of its own shows that there is such a turn.
        let prompt = self.prefix(turn, true).filter(|(of, _)| *of == leaf).map_or_else(Rc::default, |(_, prompt)| prompt);
        let prompted =
            !self.rendering.template.style().prompt.is_empty() && !prompt.is_empty() && seam.starts_with(&*prompt);
        if prompted && end > prompt.len() {
            return Some(base + prompt.len()..base + end);
        }
        // So does another end of a turn than that of the message before it.
        let closed = seam.get(..end)?;
        let mark = ends.iter().filter(|mark| !mark.is_empty() && closed.ends_with(mark.as_str())).map(String::len).max()?;
        (end - mark >= self.alone(turn, leaf, seam)).then(|| base + end - mark..base + end)
    }

    /// The rendering of the first `count` messages: the leaf of its last letter, and the text after
    /// that letter.
    fn prefix(&self, count: usize, add_generation_prompt: bool) -> Option<(Option<usize>, Rc<str>)> {
        let messages = self.probe.messages.get(..count)?;
        if count == self.probe.messages.len() && add_generation_prompt == self.rendering.add_generation_prompt {
            let last = self.runs.last();
            let tail = self.text.get(last.map_or(0, |run| run.bytes.end)..)?;
            return Some((last.map(|run| run.leaf), tail.into()));
        }
        // A long conversation repeats few shapes. Rendering each prefix takes time that grows with
        // the square of the turns.
        let key = self.tail_key(count, add_generation_prompt);
        let own = self.probe.leaves_of(count.saturating_sub(1));
        if let Some(Tail { leaf, text }) = self.tails.borrow().get(&key) {
            return Some((Some(own.start + leaf), text.clone()));
        }
        check_steps().ok()?;
        let rendered = self.rendering.template.render(messages, &self.probe.tools, add_generation_prompt).ok()?;
        let (leaf, tail) = self.probe.tail(&rendered);
        let tail: Rc<str> = tail.into();
        if let Some(leaf) = leaf.filter(|leaf| own.contains(leaf)) {
            self.tails.borrow_mut().insert(key, Tail { leaf: leaf - own.start, text: tail.clone() });
        }
        Some((leaf, tail))
    }

    fn tail_key(&self, count: usize, add_generation_prompt: bool) -> TailKey {
        let first = count.saturating_sub(CONTEXT);
        (add_generation_prompt, first == 0, self.shapes.get(first..count).unwrap_or_default().to_vec())
    }

    /// First and last byte of some runs.
    fn bytes(&self, runs: &Range<usize>) -> (usize, usize) {
        let runs = self.runs.get(runs.clone()).unwrap_or_default();
        (runs.first().map_or(0, |run| run.bytes.start), runs.last().map_or(0, |run| run.bytes.end))
    }

    fn slice(&self, bytes: Range<usize>) -> &'a str {
        self.text.get(bytes).unwrap_or_default()
    }

    /// Checks the spans: each has all words of its message, no words of another one, and no header.
    fn check(&self, spans: &[(usize, Range<usize>)]) -> Result<(), (usize, SpanFlaw)> {
        let style = self.rendering.template.style();
        let header = Some(style.header.trim()).filter(|header| !header.is_empty());
        let mut before = 0;
        for &(turn, ref span) in spans {
            // Runs are in order.
            let inside = self.runs.partition_point(|run| run.bytes.end <= span.start);
            let mut inside = self.runs.iter().skip(inside).take_while(|run| run.bytes.start < span.end);
            let foreign = inside.any(|run| !self.of_message(run, turn));
            let (first, last) = self.words(turn).map_or((span.end, span.end), |words| self.bytes(&words));
            if span.start < before || foreign || last > span.end {
                return Err((turn, SpanFlaw::Mixed));
            }
            before = span.end;
            let written = [self.slice(span.start..first), self.slice(last..span.end)];
            if header.is_some_and(|header| written.iter().any(|text| text.contains(header))) {
                return Err((turn, SpanFlaw::Header));
            }
        }
        Ok(())
    }
}

/// The message whose words a run is; names are not words.
fn said_by(probe: &Probe, run: &Run) -> Option<usize> {
    match probe.owner(run.leaf)? {
        Owner::Message(message, Part::Content | Part::Thought | Part::Calls) => Some(message),
        _ => None,
    }
}

/// For each of `count` messages, the last run of the messages before it, by its index.
fn last_before(count: usize, probe: &Probe, runs: &[Run]) -> Vec<Option<usize>> {
    let mut last = vec![None; count];
    for (at, run) in runs.iter().enumerate() {
        let Some(Owner::Message(message, _)) = probe.owner(run.leaf) else { continue };
        last.get_mut(message).into_iter().for_each(|last| *last = Some(at));
    }
    let mut latest = None;
    last.iter_mut().for_each(|own| latest = latest.max(std::mem::replace(own, latest)));
    last
}

/// Ranges in order that do not overlap: a mark may be within another one.
fn united(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let mut united: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match united.last_mut().filter(|last| range.start < last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => united.push(range),
        }
    }
    united
}

/// Bytes up to the end of an end token, if a text begins with one after blanks.
fn next_end(text: &str, ends: &[String]) -> Option<usize> {
    let rest = text.trim_start();
    let end = ends.iter().filter(|end| !end.is_empty() && rest.starts_with(end.as_str())).map(String::len).max()?;
    Some(text.len() - rest.len() + end)
}

#[cfg(test)]
mod tests;
