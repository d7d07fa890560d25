//! The forms of a line of JSON Lines.

/// The forms, by the keys that they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `text`.
    Text,
    /// `prompt`, `completion`, and perhaps `system`. Both are strings, or both are lists of
    /// messages, which may have `tools`, too.
    Completion,
    /// `messages`, each with `role` and `content`, and perhaps `system`, `tools`.
    Messages,
    /// `instruction`, `output`, and perhaps `input`, `system`, `history`, `tools`.
    Instruction,
    /// `conversations`, each with `from` and `value`, and perhaps `system`, `tools`.
    ShareGpt,
}

impl Form {
    pub(super) const ALL: [Self; 5] = [Self::Messages, Self::ShareGpt, Self::Completion, Self::Instruction, Self::Text];

    /// The keys that a record of this form must have.
    pub fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text"],
            Self::Completion => &["prompt", "completion"],
            Self::Messages => &["messages"],
            Self::Instruction => &["instruction", "output"],
            Self::ShareGpt => &["conversations"],
        }
    }
}
