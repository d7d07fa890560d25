//! Records to samples: tokens and their loss mask.

use std::io::Read;

use rayon::prelude::*;
use serde::Serialize;

use super::checksum::FileChecksum;
use super::error::{Change, DataError};
use super::form::Form;
use super::formats::{Chat, Content, parse};
use super::interruptible::interruptible;
use super::jinja::Value;
use super::keys::KeyCounts;
use super::lines::{Line, Lines, MAX_LINE, without_mark};
use super::memory::{self, Budget};
use super::notice::{Concern, Notice, Notices};
use super::options::{Options, TrainOn};
use super::spans::{Marked, conversation};
use super::survey::{AT_A_TIME, Survey};
use super::tokenizer::{Place, Tokenizer};
use crate::random::{Generator, Stream};

/// The prompt of Stanford's Alpaca, for models without a chat template.
const ALPACA: &str =
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.";

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Its line in the file, from 1.
    pub line: u64,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// One per token: whether its prediction counts in the loss. The first token is never
    /// predicted.
    pub loss_mask: Vec<bool>,
}

impl Sample {
    /// Tokens that count in the loss.
    pub fn loss_tokens(&self) -> u64 {
        self.loss_mask.iter().skip(1).filter(|&&t| t).count() as u64
    }
}

/// What the maximum length cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cut {
    /// Samples that were longer.
    pub samples: u64,
    /// Their tokens that were cut off.
    pub tokens: u64,
}

/// Samples that were dropped: nothing can be learned from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Dropped {
    /// Samples that have no token to be learned.
    pub empty: u64,
    /// Samples that have none within the maximum length.
    pub overlong: u64,
    /// The line of the first one; 0 if there is none.
    pub first_line: u64,
}

/// The samples of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dataset {
    /// The form of the file; `None` for plain text.
    pub form: Option<Form>,
    /// The samples, in the order of the file.
    pub samples: Vec<Sample>,
    /// What the maximum length cut off.
    pub cut: Cut,
    /// Samples that were dropped.
    pub dropped: Dropped,
    /// Keys of lines and messages without a known meaning.
    pub ignored_keys: KeyCounts,
    /// What may be wrong with the samples.
    pub notices: Vec<Notice>,
    /// What was read.
    pub checksum: FileChecksum,
}

impl Dataset {
    /// Reads a JSON Lines file twice, each time from its start as `open` gives it: first to find
    /// broken lines, then to tokenise them. `progress` gets the number of tokenised records and of
    /// all records, the same ones again while it takes long; it stops the work by returning
    /// `false`.
    ///
    /// # Errors
    /// A [`DataError`] with the line; [`DataError::AllDropped`] where nothing can be learned from
    /// any sample, and [`DataError::NothingLearned`] for the first one of these where `options` are
    /// strict; [`DataError::Changed`] where it is another file the second time;
    /// [`DataError::Memory`]; [`DataError::Cancelled`].
    pub fn from_json_lines<R: Read>(
        mut open: impl FnMut() -> Result<R, DataError>,
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self, DataError> {
        let mut lines = Lines::new(open()?);
        let survey = Survey::of(&mut lines, |key| tokenizer.may_read(key), progress)?;
        let first = lines.checksum();
        let mut lines = Lines::new(open()?);
        let (dataset, first_dropped) = Self::tokenised(&mut lines, &survey, tokenizer, options, progress)?;
        let second = lines.checksum();
        if first != second {
            return Err(DataError::Changed(Change::between(first, second)));
        }
        match first_dropped.filter(|_| dataset.samples.is_empty()) {
            Some(first) => Err(DataError::AllDropped { samples: survey.count, first: Box::new(first) }),
            None => Ok(Self { form: Some(survey.form), ignored_keys: survey.ignored, checksum: second, ..dataset }),
        }
    }

    /// The samples of lines that were all read once, and the error of the first dropped one.
    fn tokenised(
        lines: &mut Lines<impl Read>,
        survey: &Survey,
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(Self, Option<DataError>), DataError> {
        let (mut dataset, mut done, mut first_dropped) = (Self::default(), 0, None);
        let (mut notices, mut budget) = (Notices::default(), Budget::new(options.memory));
        while let Some(some) = lines.read(AT_A_TIME).map_err(DataError::of_second_reading)? {
            let count = some.len() as u64;
            let (own, form) = (tokenizer.clone(), survey.form);
            let encode = move |line: Line| {
                let parsed = parse(&line, form).map_err(DataError::of_second_reading)?;
                encode(&own, line.number, parsed.content, options.train_on)
            };
            // One line may take long, and neither it nor the tokenizer can be interrupted.
            let encoded = interruptible(&mut || progress(done, survey.count), move || {
                Ok(some.into_par_iter().map(encode).collect::<Vec<_>>())
            })?;
            for sample in encoded {
                let (sample, concerns) = sample?;
                let line = sample.line;
                match dataset.push(sample, tokenizer, options, &mut budget)? {
                    // A dropped sample does no harm.
                    Some(dropped) => first_dropped = first_dropped.or(Some(dropped)),
                    None => concerns.into_iter().for_each(|concern| notices.add(line, concern)),
                }
            }
            done += count;
            if !progress(done.min(survey.count), survey.count) {
                return Err(DataError::Cancelled);
            }
        }
        dataset.notices = notices.finish();
        Ok((dataset, first_dropped))
    }

    /// Cuts one plain text into samples of the maximum length; every token is learned. Line ends of
    /// DOS count as line ends. A text above 2 MiB is tokenised in pieces of whole lines. `progress`
    /// gets the number of tokenised pieces and of all pieces; it stops the work by returning
    /// `false`.
    ///
    /// # Errors
    /// [`DataError::Utf8`]; [`DataError::Empty`] where there are not two tokens;
    /// [`DataError::Memory`]; [`DataError::Cancelled`].
    pub fn from_text(
        bytes: &[u8],
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self, DataError> {
        let text = std::str::from_utf8(without_mark(bytes)).map_err(|e| DataError::Utf8 { byte: e.valid_up_to() as u64 })?;
        let mut windows = Windows::new(options);
        let doubled_bos = tokenise(text, tokenizer, MAX_LINE, progress, |tokens| windows.extend(tokens))?;
        let samples = windows.finish()?;
        if samples.is_empty() {
            return Err(DataError::Empty);
        }
        let mut notices = Notices::default();
        if doubled_bos {
            notices.add(1, Concern::DoubledBos);
        }
        Ok(Self { samples, notices: notices.finish(), checksum: FileChecksum::of(bytes), ..Self::default() })
    }

    /// Moves a random share of the samples out for evaluation: at least one, and never all of them.
    /// Both parts keep the order of the file.
    ///
    /// # Errors
    /// [`DataError::NothingHeldOut`] where there are not two samples.
    pub fn hold_out(&mut self, share: f64, seed: u64) -> Result<Self, DataError> {
        let count = self.samples.len();
        if count < 2 {
            return Err(DataError::NothingHeldOut);
        }
        let held_out = ((share * count as f64).ceil() as usize).clamp(1, count - 1);
        let mut chosen: Vec<bool> = (0..count).map(|i| i < held_out).collect();
        Generator::new(seed, Stream::Split).shuffle(&mut chosen);
        let mut chosen = chosen.into_iter();
        let samples = self.samples.extract_if(.., |_| chosen.next().unwrap_or(false)).collect();
        Ok(Self { form: self.form, samples, ..Self::default() })
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> u64 {
        self.samples.iter().map(|sample| sample.tokens.len() as u64).sum()
    }

    /// Bytes of memory that all samples take, about.
    pub fn memory(&self) -> u64 {
        self.samples.iter().map(|sample| memory::of_sample(sample.tokens.len())).sum()
    }

    /// Tokens of the longest sample.
    pub fn longest(&self) -> u32 {
        let longest = self.samples.iter().map(|sample| sample.tokens.len()).max().unwrap_or_default();
        u32::try_from(longest).unwrap_or(u32::MAX)
    }

    /// Adds a sample, cut to its maximum length, or leaves it out and says why.
    fn push(
        &mut self,
        mut sample: Sample,
        tokenizer: &Tokenizer,
        options: Options,
        budget: &mut Budget,
    ) -> Result<Option<DataError>, DataError> {
        let (line, length, max_length) = (sample.line, sample.tokens.len() as u64, options.max_length);
        let over = sample.tokens.len().saturating_sub(max_length as usize);
        sample.tokens.truncate(max_length as usize);
        sample.loss_mask.truncate(max_length as usize);
        // A long line does not keep its memory.
        sample.tokens.shrink_to_fit();
        sample.loss_mask.shrink_to_fit();
        if sample.loss_tokens() == 0 {
            let text = tokenizer.decode(&sample.tokens)?;
            let error = DataError::NothingLearned { line, length, max_length, text };
            if options.strict {
                return Err(error);
            }
            let dropped = &mut self.dropped;
            let reason = if over > 0 { &mut dropped.overlong } else { &mut dropped.empty };
            *reason += 1;
            dropped.first_line = if dropped.first_line == 0 { line } else { dropped.first_line };
            return Ok(Some(error));
        }
        budget.add(sample.tokens.len())?;
        self.cut.samples += u64::from(over > 0);
        self.cut.tokens += over as u64;
        self.samples.push(sample);
        Ok(None)
    }
}

/// The windows of a text.
struct Windows {
    length: usize,
    budget: Budget,
    samples: Vec<Sample>,
    /// The start of the next window.
    rest: Vec<u32>,
}

impl Windows {
    fn new(options: Options) -> Self {
        let length = options.max_length.max(1) as usize;
        Self { length, budget: Budget::new(options.memory), samples: Vec::new(), rest: Vec::new() }
    }

    /// Adds the next tokens of the text.
    fn extend(&mut self, tokens: Vec<u32>) -> Result<(), DataError> {
        self.rest.extend(tokens);
        let whole = self.rest.len() - self.rest.len() % self.length;
        let rest = self.rest.split_off(whole);
        let whole = std::mem::replace(&mut self.rest, rest);
        whole.chunks(self.length).try_for_each(|window| self.push(window))
    }

    fn push(&mut self, window: &[u32]) -> Result<(), DataError> {
        // Of one token, nothing is predicted.
        if window.len() > 1 {
            self.budget.add(window.len())?;
            self.samples.push(Sample { line: 1, tokens: window.to_vec(), loss_mask: vec![true; window.len()] });
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Sample>, DataError> {
        let last = std::mem::take(&mut self.rest);
        self.push(&last)?;
        Ok(self.samples)
    }
}

/// Tokenises a text in pieces of at most `limit` bytes; `take` gets the tokens of each. Gives
/// whether the text begins with what the tokenizer puts before every text.
pub(super) fn tokenise(
    text: &str,
    tokenizer: &Tokenizer,
    limit: usize,
    progress: &mut dyn FnMut(u64, u64) -> bool,
    mut take: impl FnMut(Vec<u32>) -> Result<(), DataError>,
) -> Result<bool, DataError> {
    let pieces = pieces(text, limit);
    let (mut doubled_bos, total) = (false, pieces.len() as u64);
    for (done, piece) in (0..).zip(pieces) {
        let (own, piece) = (tokenizer.clone(), piece.replace("\r\n", "\n"));
        let place = Place { first: done == 0, last: done + 1 == total };
        let encoded = interruptible(&mut || progress(done, total), move || own.encode_piece(&piece, place))?;
        doubled_bos |= encoded.doubled_bos;
        take(encoded.tokens)?;
    }
    Ok(doubled_bos)
}

/// A text in pieces of at most `limit` bytes: the tokenizer takes some 200 times the memory of what
/// it gets. A piece ends before a line that does not begin with a blank, where most tokenizers
/// begin a word; where there is no such line, at a character.
fn pieces(text: &str, limit: usize) -> Vec<&str> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while rest.len() > limit {
        let most = rest.get(..rest.floor_char_boundary(limit)).unwrap_or(rest);
        // The two bytes of a line end of DOS stay together.
        let most = most.strip_suffix('\r').unwrap_or(most);
        let starts_line =
            |&(at, _): &(usize, &str)| rest.get(at + 1..).is_some_and(|next| !next.starts_with(char::is_whitespace));
        let end = most.rmatch_indices('\n').find(starts_line).map_or(most.len(), |(at, _)| at + 1);
        let (piece, next) = rest.split_at(end);
        pieces.push(piece);
        rest = next;
    }
    pieces.push(rest);
    pieces
}

/// A record as tokens, and what may be wrong with it.
fn encode(
    tokenizer: &Tokenizer,
    line: u64,
    content: Content,
    train_on: TrainOn,
) -> Result<(Sample, Vec<Concern>), DataError> {
    let (marked, in_template) = match content {
        Content::Text(text) => (Marked::from_byte(text, 0), false),
        Content::Completion { prompt, completion } => {
            (Marked::from_byte(format!("{prompt}{completion}"), prompt.len()), false)
        }
        Content::Chat(chat) => (conversation(tokenizer, line, &chat, train_on)?, true),
        Content::Instruction { system, turns, tools, variables } if tokenizer.has_template() => {
            let messages = instruction_messages(system.as_deref(), &turns);
            let chat = Chat { messages, tools, variables, prompt: 0, unlearned: Vec::new() };
            (conversation(tokenizer, line, &chat, train_on)?, true)
        }
        Content::Instruction { tools, .. } if !tools.is_none() => return Err(DataError::NoTemplate { line }),
        Content::Instruction { system, turns, .. } => (alpaca(tokenizer, system.as_deref(), &turns)?, false),
    };
    // A template writes the special tokens itself.
    let encoded = tokenizer.encode_spans(&marked.text, !in_template).map_err(|error| error.of_line(line))?;
    let mut tokens = encoded.tokens;
    let mut loss_mask: Vec<bool> = encoded.spans.iter().map(|span| marked.is_learned(span)).collect();
    let eos = tokenizer.eos().filter(|eos| !in_template && tokens.last() != Some(eos));
    tokens.extend(eos);
    if !in_template && tokens.last().copied() == tokenizer.eos() {
        // It is learned, whether the text or this function added it: otherwise the model never
        // stops.
        loss_mask.resize(tokens.len(), true);
        loss_mask.last_mut().into_iter().for_each(|last| *last = true);
    }
    if train_on == TrainOn::All {
        loss_mask.fill(true);
    }
    let sample = Sample { line, tokens, loss_mask };
    let no_end = in_template && !learns_an_end(tokenizer, &sample, train_on);
    let of_tokens = [no_end.then_some(Concern::NoEnd), encoded.doubled_bos.then_some(Concern::DoubledBos)];
    let concerns = of_tokens.into_iter().flatten().chain(marked.concerns).collect();
    Ok((sample, concerns))
}

/// Whether something that is learned ends in a token that ends a text; where all is learned,
/// whether there is one.
fn learns_an_end(tokenizer: &Tokenizer, sample: &Sample, train_on: TrainOn) -> bool {
    let next = sample.loss_mask.iter().skip(1).chain([&false]);
    let tokens = sample.tokens.iter().zip(&sample.loss_mask).zip(next).skip(1);
    let ends = |((&token, &learned), &next): ((&u32, &bool), &bool)| {
        learned && (!next || train_on == TrainOn::All) && tokenizer.is_end(token)
    };
    tokens.into_iter().any(ends)
}

fn instruction_messages(system: Option<&str>, turns: &[[String; 2]]) -> Vec<Value> {
    let message = |role: &str, content: &str| Value::from_pairs([("role", role), ("content", content)]);
    let system = system.map(|system| message("system", system));
    let turns = turns.iter().flat_map(|[question, answer]| [message("user", question), message("assistant", answer)]);
    system.into_iter().chain(turns).collect()
}

/// Instructions and answers in the form of Alpaca's prompt. Every answer ends in the token that
/// ends a text; the last one gets it with its tokens.
fn alpaca(tokenizer: &Tokenizer, system: Option<&str>, turns: &[[String; 2]]) -> Result<Marked, DataError> {
    let end = tokenizer.eos().map(|eos| tokenizer.decode(&[eos])).transpose()?.unwrap_or_default();
    let mut text = system.unwrap_or(ALPACA).to_owned();
    let mut learned = Vec::new();
    for (i, [question, answer]) in turns.iter().enumerate() {
        text.push_str(&format!("\n\n### Instruction:\n{question}\n\n### Response:\n"));
        let start = text.len();
        text.push_str(answer);
        if i + 1 < turns.len() {
            text.push_str(&end);
        }
        learned.push(start..text.len());
    }
    Ok(Marked { text, learned, concerns: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_text_are_whole_lines() {
        let cases: [(&str, &[&str]); 8] = [
            ("", &[""]),
            ("a\nb\n", &["a\nb\n"]),
            ("ab\ncd\nef\n", &["ab\ncd\n", "ef\n"]),
            ("ab\n  cd\n\nef", &["ab\n  c", "d\n\nef"]),
            ("abcdefgh", &["abcdef", "gh"]),
            ("ééééé", &["ééé", "éé"]),
            ("abcde\r\nfgh", &["abcde", "\r\nfgh"]),
            ("ab\r\ncdef", &["ab\r\n", "cdef"]),
        ];
        for (text, expected) in cases {
            assert_eq!(pieces(text, 6), expected, "{text:?}");
        }
    }
}
