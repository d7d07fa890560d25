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
    /// Maximum number of tokens of a sample; the rest is cut off.
    pub max_length: u32,
    /// Whether a sample from which nothing can be learned is an error; otherwise it is dropped and
    /// counted.
    pub strict: bool,
    /// Bytes of memory that the samples of the file may take.
    pub memory: u64,
}
