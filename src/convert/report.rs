//! What a conversion reports to its caller: its progress, and its result.

use serde::{Deserialize, Serialize};

use super::encode::Stats;
use super::notice::{LeftOut, Notice};
use super::source::TensorInfo;
use crate::format::Role;

/// What a caller wants to know while it waits, and a way to stop the work. Calls come from any
/// thread.
pub trait Progress: Sync {
    /// `done` of `total` units (weights, or bytes where a command says so) are finished.
    fn advance(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// Whether to stop: looked at many times a second.
    fn cancelled(&self) -> bool {
        false
    }
}

/// No progress, no stopping.
impl Progress for () {}

/// The quantised tensors of one role.
#[derive(Debug, Clone, Serialize)]
pub struct RoleReport {
    /// The role's name.
    pub role: &'static str,
    /// Tensors of this role.
    pub tensors: u64,
    /// Their weights.
    pub weights: u64,
    /// Bytes of their codes and scales.
    pub bytes: u64,
    /// Stored bits per weight.
    pub bits_per_weight: f64,
    /// Sum of squared errors over sum of squared weights.
    pub relative_error: f64,
    /// Largest absolute error of a weight.
    pub max_abs_error: f32,
    /// The block that lost most of itself: norm of its errors over norm of its weights.
    pub max_block_error: f64,
    /// The tensor of that block; none where no block has an error.
    pub max_block_error_tensor: Option<String>,
}

/// What a conversion did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Bytes of the weights files read.
    pub source_bytes: u64,
    /// Bytes of the pack.
    pub pack_bytes: u64,
    /// Layers of the model.
    pub layers: u32,
    /// Weights that were quantised.
    pub weights: u64,
    /// Tensors that were stored in their own type.
    pub raw_tensors: u64,
    /// Their bytes.
    pub raw_bytes: u64,
    /// Wall-clock seconds, from opening the checkpoint to the pack's final name.
    pub seconds: f64,
    /// `weights / seconds`.
    pub weights_per_second: f64,
    /// Sum of squared errors over sum of squared weights, of all that was quantised.
    pub relative_error: f64,
    /// The block that lost most of itself: norm of its errors over norm of its weights.
    pub max_block_error: f64,
    /// The tensor of that block; none where no block has an error.
    pub max_block_error_tensor: Option<String>,
    /// One entry per role that was quantised, in the order of a layer.
    pub roles: Vec<RoleReport>,
    /// Tensors that the pack does not hold, since they are no part of the model.
    pub left_out: Vec<LeftOut>,
    /// Tensors that the pack holds although the model does not use them.
    pub kept_unused: Vec<String>,
    /// What the user should know.
    pub notices: Vec<String>,
    /// What an interrupted run had kept ([`Options::resume`](super::Options::resume)); `None` if
    /// nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
}

/// What an interrupted conversion had kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Quantised weights that were not encoded again.
    pub weights: u64,
    /// Whether the file was damaged, so that the conversion began again.
    pub damaged: bool,
}

/// Sums per role while a conversion runs.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(super) struct RoleSums {
    pub tensors: u64,
    pub bytes: u64,
    pub stats: Stats,
    /// The tensor, by number in the checkpoint, that has `stats.worst_block`.
    pub worst_tensor: Option<usize>,
}

impl RoleSums {
    /// Adds the statistics of a part of `tensor`.
    pub(super) fn merge(&mut self, stats: &Stats, tensor: Option<usize>) {
        if stats.worst_block.exceeds(&self.stats.worst_block) {
            self.worst_tensor = tensor;
        }
        self.stats.merge(stats);
    }

    pub(super) fn report(&self, role: Role, tensors: &[TensorInfo]) -> RoleReport {
        let weights = self.stats.weights;
        RoleReport {
            role: role.name(),
            tensors: self.tensors,
            weights,
            bytes: self.bytes,
            bits_per_weight: 8.0 * self.bytes as f64 / weights.max(1) as f64,
            relative_error: self.stats.relative_sq_error(),
            max_abs_error: self.stats.max_abs_error,
            max_block_error: self.stats.worst_block.relative(),
            max_block_error_tensor: name_of(self.worst_tensor, tensors),
        }
    }
}

/// The name of tensor `number`.
pub(super) fn name_of(number: Option<usize>, tensors: &[TensorInfo]) -> Option<String> {
    number.and_then(|number| tensors.get(number)).map(|tensor| tensor.name.clone())
}

pub(super) fn notice_texts(notices: &[Notice]) -> Vec<String> {
    notices.iter().map(Notice::to_string).collect()
}
