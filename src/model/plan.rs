//! The GPU memory of a run, computed before any of it is allocated.

mod choice;
mod options;

use std::fmt;

use thiserror::Error;

use crate::arch::config::{ModelConfig, RopeScaling};
use crate::dequant::stream::{Globals, HeadParts, PackSource, StreamError, StreamOptions, StreamPlan};
use crate::format::Index;
use crate::gpu::{Gpu, MatrixUnits};
use crate::model::constants::Constants;
use crate::model::decoder::Model;
use crate::model::error::ModelError;
use crate::model::host_embedding::HostEmbedding;
use crate::model::kv_cache::attention_heads;
use crate::model::pass::Angles;
use crate::model::workspace::{Memory, Sizes, WINDOW, WorkspaceBytes, chunk, product_shapes};
use crate::ops::matmul::Matmul;
use crate::ops::{Attention, mat_bytes};

pub use options::{KeepActivations, MicroBatch, OffloadActivations, OffloadVocabulary, Slower};

use options::Choice;

/// Maximum rows of `--micro-batch auto`. With more rows per step, an epoch has too few steps.
pub const MAX_AUTO_ROWS: u32 = 8;

/// The reason why a run does not fit.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The run needs more memory than the budget.
    #[error("the run takes {needed} bytes of GPU memory, and {budget} are there{}", remedy.map(|r| format!("; {r} would fit")).unwrap_or_default())]
    Budget {
        /// Maximum bytes.
        budget: u64,
        /// Bytes of the smallest plan with these settings.
        needed: u64,
        /// A change that makes it fit.
        remedy: Option<Remedy>,
    },
    /// A matrix that is too large for one buffer, or for one binding of a kernel.
    #[error("the run has a matrix of {needed} bytes, and the GPU takes at most {limit} at once{}", remedy.map(|r| format!("; {r} would fit")).unwrap_or_default())]
    Matrix {
        /// Maximum bytes of a buffer and of a binding.
        limit: u64,
        /// Bytes of the largest matrix with these settings.
        needed: u64,
        /// A change that makes it fit.
        remedy: Option<Remedy>,
    },
    /// The residual streams that do not fit in GPU memory need more host memory than there is.
    #[error("the run takes {needed} bytes of host memory for activations that do not fit in GPU memory, and {available} are available{}", remedy.map(|r| format!("; {r} would fit")).unwrap_or_default())]
    Host {
        /// Maximum bytes of host memory.
        available: u64,
        /// Bytes of the plan with these settings.
        needed: u64,
        /// A change that makes it fit.
        remedy: Option<Remedy>,
    },
    /// The layers of the pack do not fit on this device.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// A change that makes a run fit. As a text, it has the flags of `nf4pack train`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Fewer layers that keep their activations.
    Keep(u32),
    /// This number of rows per pass.
    Rows(u32),
    /// Rows of this number of tokens, with the requested rows per pass.
    Length(u32),
    /// Rows of this number of tokens, one per pass.
    LengthAndOneRow(u32),
    /// An adapter of this rank.
    Rank(u32),
}

impl Remedy {
    /// The flags of a command. `rows_flag` sets the rows per pass, `length_flag` their length.
    pub fn in_flags(self, rows_flag: &str, length_flag: &str) -> String {
        match self {
            Self::Keep(0) => "--keep-activations none".to_owned(),
            Self::Keep(layers) => format!("--keep-activations {layers}"),
            Self::Rows(rows) => format!("{rows_flag} {rows}"),
            Self::Length(length) => format!("{length_flag} {length}"),
            Self::LengthAndOneRow(length) => format!("{length_flag} {length} {rows_flag} 1"),
            Self::Rank(rank) => format!("--rank {rank}"),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.in_flags("--micro-batch", "--max-length"))
    }
}

/// The input of a plan.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    /// The pack's index.
    pub index: &'a Index,
    /// The model of the pack.
    pub model: &'a ModelConfig,
    /// The device's largest buffer.
    pub max_buffer: u64,
    /// Bytes of the largest binding of a kernel.
    pub max_binding: u64,
    /// Maximum bytes. `None`: unknown.
    pub budget: Option<u64>,
    /// Floats of the adapter. 0: no adapter.
    pub adapter: u64,
    /// Rank of the adapter. 0: no adapter.
    pub rank: u32,
    /// Whether adapters have dropout.
    pub dropout: bool,
    /// Whether gradients are computed.
    pub training: bool,
    /// Layers that keep their activations for their gradients.
    pub keep_activations: KeepActivations,
    /// Whether residual streams are in host memory between the forward and the backward pass.
    pub offload_activations: OffloadActivations,
    /// The tensors of the vocabulary that are not in GPU memory.
    pub offload_vocabulary: OffloadVocabulary,
    /// Whether the device has buffers in host memory.
    pub host_buffers: bool,
    /// Maximum bytes of these buffers. `None`: unknown.
    pub host_memory: Option<u64>,
    /// Tokens of a row.
    pub length: u32,
    /// Tokens of the longest text: of a sample in a row, or of a text that passes through the model
    /// in pieces.
    pub positions: u32,
    /// Rows of the data. A pass has at most this number.
    pub rows: u64,
    /// Bytes in use for other purposes.
    pub reserved: u64,
    /// The matrix units that run the products. `None`: float32.
    pub units: Option<MatrixUnits>,
}

/// The memory of a run, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The plan of the layer stream.
    pub stream: StreamPlan,
    /// Rows of a forward pass.
    pub micro_batch: u32,
    /// The plan with the maximum number of rows, if fewer rows are estimated to be faster.
    pub slower: Option<Slower>,
    /// Tokens of a row.
    pub length: u32,
    /// Tokens of the longest text.
    pub positions: u32,
    /// The global tensors in GPU memory.
    pub(crate) globals: Globals,
    /// Bytes of the vocabulary's tensors that a pass copies to the device, forward and backward.
    pub(crate) copied_vocabulary: u64,
    /// The sizes of the workspace.
    pub(crate) sizes: Sizes,
    /// Bytes of the workspace: activations and logits.
    pub(crate) workspace: WorkspaceBytes,
    /// Parameters of the adapter.
    pub adapter: u64,
    /// Gradient and moments.
    pub optimizer: u64,
    /// Sums of products, operands of attention on matrix units, angles of the rotary embedding,
    /// norms and biases in float32, and bytes in use for other purposes.
    pub scratch: u64,
    /// Maximum bytes. `None`: unknown.
    pub budget: Option<u64>,
    /// The matrix units that run the products. `None`: float32.
    pub(crate) units: Option<MatrixUnits>,
}

impl MemoryPlan {
    /// The plan of `rows` rows with this choice.
    fn of(demand: &Demand<'_>, rows: u32, choice: Choice) -> Result<Self, MemoryError> {
        let Demand { model, budget, length, training, .. } = *demand;
        let globals = choice.globals;
        let sizes = Sizes::of(demand, rows, choice);
        let Sizes { tokens, window, .. } = sizes;
        let workspace = WorkspaceBytes::of(model, sizes);
        let (at_once, heads) = ([tokens.min(window), tokens], attention_heads(model, 0));
        let (attention, binding) = match demand.units {
            None => (0, 0),
            Some(_) => {
                let bytes = Attention::scratch_bytes(demand.units, at_once, &heads, training);
                (bytes, Attention::scratch_binding(at_once, &heads, training))
            }
        };
        let largest = workspace.largest.max(binding);
        for (needed, limit) in [(largest, demand.max_binding), (largest.max(attention), demand.max_buffer)] {
            if needed > limit {
                return Err(MemoryError::Matrix { limit, needed, remedy: None });
            }
        }
        let adapter = demand.adapter.saturating_mul(4);
        let optimizer = if training { adapter.saturating_mul(3) } else { 0 };
        let angles = rotary_bytes(model, demand.positions, tokens);
        let products = Matmul::scratch_bytes(demand.units, tokens.min(window), &product_shapes(model, tokens), demand.rank);
        let staging = if globals == Globals::All { 0 } else { HostEmbedding::staging_bytes() };
        let scratch = sum([products, attention, angles, Constants::bytes(model), staging, demand.reserved]);
        let fixed = sum([workspace.total(), adapter, optimizer, scratch]);
        let left = budget.map(|budget| budget.saturating_sub(fixed));
        let stream = match StreamPlan::new(demand.index, demand.max_buffer, left, globals) {
            Err(StreamError::Budget { needed, .. }) => {
                let budget = budget.unwrap_or(u64::MAX);
                return Err(MemoryError::Budget { budget, needed: needed.saturating_add(fixed), remedy: None });
            }
            result => result?,
        };
        let positions = demand.positions;
        let units = demand.units;
        // Each window of tokens needs all parts, once.
        let passes = u64::from(tokens.div_ceil(window));
        let of_head = stream.head().map_or(0, HeadParts::pass_bytes).saturating_mul(passes);
        let of_embedding = if stream.embedding_on_host { mat_bytes(tokens, model.hidden) } else { 0 };
        Ok(Self {
            copied_vocabulary: of_head.saturating_add(of_embedding),
            globals,
            stream,
            micro_batch: rows,
            slower: None,
            length,
            positions,
            sizes,
            workspace,
            adapter,
            optimizer,
            scratch,
            budget,
            units,
        })
    }

    /// Opens the model and reserves the workspace.
    ///
    /// # Errors
    /// As [`Model::new`] and [`Memory::new`].
    pub(crate) fn reserve(&self, gpu: &Gpu, pack: PackSource) -> Result<(Model, Memory), ModelError> {
        let (budget, globals) = (Some(self.stream.needed_bytes), self.globals);
        let stream = StreamOptions { budget, globals, ..StreamOptions::default() };
        let model = Model::new(gpu, pack, self.positions, &stream)?;
        let memory = Memory::new(gpu, model.config(), self.sizes)?;
        let Sizes { tokens, window, rank, training, .. } = self.sizes;
        model.reserve_products(tokens.min(window), rank)?;
        model.reserve_attention(tokens.min(window), tokens, training)?;
        Ok((model, memory))
    }

    /// Layers, the last ones, that keep their activations for their gradients.
    pub fn kept_layers(&self) -> u32 {
        self.sizes.kept
    }

    /// Residual streams that are in host memory between the forward and the backward pass, and
    /// their bytes.
    pub fn offloaded(&self) -> (u32, u64) {
        (self.sizes.offloaded, self.workspace.host)
    }

    /// Whether the embedding table is not in GPU memory, and the number of parts in which the
    /// output projection passes through it. 0: the output projection is in GPU memory.
    pub fn offloaded_vocabulary(&self) -> (bool, u32) {
        (self.stream.embedding_on_host, self.stream.head().map_or(0, HeadParts::count))
    }

    /// All bytes of GPU memory.
    pub fn total(&self) -> u64 {
        sum([self.stream.needed_bytes, self.workspace.total(), self.adapter, self.optimizer, self.scratch])
    }

    /// The bytes of each part, with a name for users.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        let vocabulary = self.stream.globals_bytes + self.stream.head_bytes;
        let weights = self.stream.needed_bytes - self.stream.staging_bytes - vocabulary;
        [
            ("weights of layers", weights),
            ("embedding and head", vocabulary),
            ("staging", self.stream.staging_bytes),
            ("residual streams", self.workspace.saved_activations),
            ("activations kept", self.workspace.kept_activations),
            ("activations of a layer", self.workspace.layer),
            ("logits", self.workspace.loss),
            ("adapter, gradient, moments", self.adapter.saturating_add(self.optimizer)),
            ("scratch", self.scratch),
        ]
    }
}

/// A sum of sizes. It saturates: no device has that much memory.
fn sum<const N: usize>(sizes: [u64; N]) -> u64 {
    sizes.into_iter().fold(0, u64::saturating_add)
}

/// Bytes of the angles of the rotary embedding: the shared table for texts of `length` tokens, and
/// the own table of a batch of `tokens` tokens.
fn rotary_bytes(model: &ModelConfig, length: u32, tokens: u32) -> u64 {
    let own = if matches!(model.rope.scaling, RopeScaling::Dynamic { .. }) { tokens } else { 0 };
    (u64::from(length) + u64::from(own)).saturating_mul(Angles::bytes(model))
}

impl MemoryError {
    /// A change that makes it fit.
    pub fn remedy(&self) -> Option<Remedy> {
        match *self {
            Self::Budget { remedy, .. } | Self::Matrix { remedy, .. } | Self::Host { remedy, .. } => remedy,
            Self::Stream(_) => None,
        }
    }

    /// The same error with this remedy.
    #[must_use]
    pub(crate) fn with(self, remedy: Option<Remedy>) -> Self {
        match self {
            Self::Budget { budget, needed, .. } => Self::Budget { budget, needed, remedy },
            Self::Matrix { limit, needed, .. } => Self::Matrix { limit, needed, remedy },
            Self::Host { available, needed, .. } => Self::Host { available, needed, remedy },
            error => error,
        }
    }
}

impl Sizes {
    /// The sizes of `rows` rows with this choice.
    fn of(demand: &Demand<'_>, rows: u32, choice: Choice) -> Self {
        let Demand { model, rank, dropout, training, .. } = *demand;
        let Choice { kept, offloaded, .. } = choice;
        let tokens = rows.saturating_mul(demand.length);
        let (window, chunk, halves) = (WINDOW, chunk(model, tokens), training && demand.units.is_some());
        let sizes = Self { tokens, rank, dropout, training, kept, offloaded, halves, window, chunk };
        Self { offloaded: sizes.streams(model.layers).offloaded, ..sizes }
    }
}

impl Demand<'_> {
    /// A change that makes `rows` rows fit: fewer layers that keep their activations, else fewer
    /// rows, else shorter rows, else a lower rank.
    fn remedy(&self, rows: u32) -> Option<Remedy> {
        let fewer_kept = self.fewer_kept(rows).map(Remedy::Keep);
        fewer_kept.or_else(|| self.fewer_rows(rows)).or_else(|| self.shorter_rows(rows)).or_else(|| self.lower_rank(rows))
    }

    fn fits(&self, rows: u32) -> bool {
        MemoryPlan::of_rows(self, rows).is_ok()
    }

    /// The maximum rows that fit, fewer than `rows` and at most the rows of the data.
    fn fewer_rows(&self, rows: u32) -> Option<Remedy> {
        let (mut fewer, mut too_many) = (0, rows.min(u32::try_from(self.rows).unwrap_or(u32::MAX).saturating_add(1)));
        while too_many - fewer > 1 {
            let middle = fewer + (too_many - fewer) / 2;
            if self.fits(middle) { fewer = middle } else { too_many = middle }
        }
        (fewer > 0).then_some(Remedy::Rows(fewer))
    }

    fn shorter_rows(&self, rows: u32) -> Option<Remedy> {
        let shorter = halves(self.length).filter(|&length| length > 1);
        let fits = |&length: &u32| Self { length, positions: self.positions.min(length), ..*self }.fits(1);
        { shorter }.find(fits).map(if rows > 1 { Remedy::LengthAndOneRow } else { Remedy::Length })
    }

    fn lower_rank(&self, rows: u32) -> Option<Remedy> {
        // The adapter's matrices have `rank` rows or columns each.
        let of_rank = u64::from(self.rank).max(1);
        let fits = |&rank: &u32| Self { rank, adapter: self.adapter / of_rank * u64::from(rank), ..*self }.fits(rows);
        halves(self.rank).find(fits).map(Remedy::Rank)
    }
}

/// n / 2, n / 4, .., down to 1.
fn halves(n: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(n / 2), |n| Some(n / 2)).take_while(|&n| n > 0)
}

#[cfg(test)]
mod tests;
