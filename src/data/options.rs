//! How samples are made.

/// What is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// Completions and the words of the assistant; all of a plain text.
    #[default]
    Completions,
    /// Every token.
    All,
}

/// How samples are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What is learned.
    pub train_on: TrainOn,
    /// Tokens of a sample at most; what is over is cut at the end.
    pub max_length: u32,
    /// Whether a sample from which nothing can be learned is an error; otherwise it is left out and
    /// counted.
    pub strict: bool,
}
