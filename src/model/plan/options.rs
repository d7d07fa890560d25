//! What a plan may choose, or is asked for.

use crate::dequant::stream::Globals;

/// Rows of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MicroBatch {
    /// The rows that are estimated to be fastest, of those that fit in GPU memory.
    #[default]
    Auto,
    /// This number.
    Rows(u32),
}

/// Layers that keep their activations from the forward to the backward pass, the last ones first.
/// The backward pass computes the other layers again. In mixed precision, activations are kept in
/// f16. The results are the same bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeepActivations {
    /// As many as fit in GPU memory in which all layers stay, else none.
    #[default]
    Auto,
    /// None of them.
    None,
    /// All of them.
    All,
    /// This number, at most all.
    Layers(u32),
}

/// Whether residual streams are in host memory between the forward and the backward pass. The
/// results are the same bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OffloadActivations {
    /// If they do not fit next to the layers in GPU memory, and to copy them takes fewer bytes than
    /// to stream the layers.
    #[default]
    Auto,
    /// No.
    Off,
    /// Yes, except the last streams.
    On,
}

/// The tensors of the vocabulary that are not in GPU memory. The results are the same bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OffloadVocabulary {
    /// Those that do not fit next to the layers.
    #[default]
    Auto,
    /// None.
    Off,
    /// The embedding table, if it is not the output projection, too: the host gathers the rows of a
    /// batch.
    Embedding,
    /// The embedding table and the output projection, which passes through GPU memory in parts.
    All,
}

impl OffloadVocabulary {
    /// The global tensors in GPU memory that the plan may choose from, those with the most first. A
    /// part of the output projection has `rows` rows.
    pub(super) fn choices(self, rows: u32) -> Vec<Globals> {
        let parts = Globals::HeadInParts { rows };
        match self {
            Self::Auto => vec![Globals::All, Globals::WithoutEmbedding, parts],
            Self::Off => vec![Globals::All],
            Self::Embedding => vec![Globals::WithoutEmbedding],
            Self::All => vec![parts],
        }
    }
}

impl KeepActivations {
    /// The requested number of layers, of `layers`. `None`: as many as fit.
    pub(super) fn requested(self, layers: u32) -> Option<u32> {
        match self {
            Self::Auto => None,
            Self::None => Some(0),
            Self::All => Some(layers),
            Self::Layers(count) => Some(count.min(layers)),
        }
    }
}

/// A plan that `--micro-batch auto` did not choose, because it is estimated to be slower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slower {
    /// Rows of a forward pass.
    pub micro_batch: u32,
    /// Layers that keep their activations.
    pub kept_layers: u32,
    /// Estimated speed in percent of the chosen plan.
    pub percent: u32,
}

/// What a plan chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    /// The last layers, which keep their activations.
    pub kept: u32,
    /// The first residual streams, which are in host memory.
    pub offloaded: u32,
    /// The global tensors in GPU memory.
    pub globals: Globals,
}
