//! Warnings about the conversations of a file.

use std::collections::BTreeMap;
use std::fmt;

/// A part of a conversation that its rendering lacks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LeftOut {
    /// The content of a message.
    Message {
        /// Its role.
        role: String,
    },
    /// The last message's `reasoning_content`.
    Thought,
    /// A message's `tool_calls`.
    Calls,
    /// The tools that may be called.
    Tools,
    /// The `name` of a message.
    Name {
        /// The message's role.
        role: String,
    },
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message { role } if role == "system" => f.write_str("the system prompt"),
            Self::Message { role } => write!(f, "what {role:?} says"),
            Self::Thought => f.write_str("the last message's reasoning_content"),
            Self::Calls => f.write_str("tool_calls"),
            Self::Tools => f.write_str("the tools"),
            Self::Name { role } => write!(f, "the name of {role:?} messages"),
        }
    }
}

/// A possible mistake in a conversation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Concern {
    /// None of its learned spans ends in a token that ends a text.
    NoEnd,
    /// Words of the assistant are outside the template's `{% generation %}`, and are not learned.
    Unmarked,
    /// It begins with the tokens that the tokenizer puts before every text; they are there once.
    DoubledBos,
    /// Its text lacks something.
    LeftOut(LeftOut),
}

/// A possible mistake in some samples of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The mistake.
    pub concern: Concern,
    /// The number of samples with it.
    pub samples: u64,
    /// The line of the first one.
    pub line: u64,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { concern, samples, line } = self;
        let where_it_is = match samples {
            1 => format!("line {line}"),
            _ => format!("{samples} samples, the first one in line {line}"),
        };
        match concern {
            Concern::NoEnd => write!(
                f,
                "no answer ends in a token that ends a text ({where_it_is}): the model does not learn to stop; the chat template \
                 has to write its eos_token after an answer"
            ),
            Concern::Unmarked => write!(
                f,
                "the chat template's {{% generation %}} does not mark all words of the assistant ({where_it_is}): those outside it \
                 are not learned"
            ),
            Concern::DoubledBos => write!(
                f,
                "the text begins with the token that the tokenizer puts before every text ({where_it_is}): it is put once, not twice"
            ),
            Concern::LeftOut(what) => write!(f, "the chat template leaves out {what} ({where_it_is})"),
        }
    }
}

/// Why the span of an answer in a rendered conversation is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpanFlaw {
    /// The template does not write the message's letters as they are.
    Changed,
    /// The conversation has more texts than there are replacements of letters.
    Letters,
    /// Another message's words stand between those of this one.
    Mixed,
    /// The header of a turn is in it.
    Header,
}

impl fmt::Display for SpanFlaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Changed => "the template does not write its words as they are",
            Self::Letters => "the conversation has too many texts or different letters to find its words",
            Self::Mixed => "the template writes words of other messages between its words",
            Self::Header => "the template writes the header of a turn into it",
        })
    }
}

/// Concerns, counted.
#[derive(Debug, Default)]
pub(super) struct Notices(BTreeMap<Concern, (u64, u64)>);

impl Notices {
    /// Adds that of the sample in a line.
    pub(super) fn add(&mut self, line: u64, concern: Concern) {
        let (samples, first) = self.0.entry(concern).or_insert((0, line));
        *samples += 1;
        *first = line.min(*first);
    }

    /// A notice of each concern.
    pub(super) fn finish(self) -> Vec<Notice> {
        self.0.into_iter().map(|(concern, (samples, line))| Notice { concern, samples, line }).collect()
    }
}
