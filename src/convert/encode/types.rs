//! The arguments and results of an encoder.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::format::FloatType;

/// How the scale of a block is chosen. The decoder is the same for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoder {
    /// The largest magnitude in the block, as bitsandbytes does it.
    Absmax,
    /// The scale, of either sign, with the smallest squared error that a search finds; never worse
    /// than [`Encoder::Absmax`].
    Mse,
}

impl Encoder {
    /// The encoder's name on the command line and in a pack's metadata.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absmax => "absmax",
            Self::Mse => "mse",
        }
    }
}

/// How a scale is rounded before the codes of its block are chosen, so that the codes fit the scale
/// that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScalePrecision {
    /// Kept in float32.
    F32,
    /// Rounded to the nearest bfloat16, ties to even; what would round to infinity becomes the
    /// largest finite bfloat16.
    Bf16,
}

impl ScalePrecision {
    /// The finite stored scale nearest to `scale`.
    pub(super) fn round(self, scale: f32) -> f32 {
        let (rounded, largest) = match self {
            Self::F32 => (scale, f32::MAX),
            Self::Bf16 => (bf16::from_f32(scale).to_f32(), bf16::MAX.to_f32()),
        };
        rounded.clamp(-largest, largest)
    }
}

/// A run of weights as a checkpoint holds them: little-endian, at any alignment.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// Type of each element.
    pub float_type: FloatType,
    /// `len() * float_type.size()` bytes; a trailing partial element is ignored.
    pub bytes: &'a [u8],
}

impl Weights<'_> {
    /// Number of elements.
    pub const fn len(&self) -> usize {
        self.bytes.len() / self.float_type.size()
    }

    /// Whether there is no element.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `index` in float32, exactly. Every element type widens without rounding.
    pub(super) fn get(&self, index: usize) -> f32 {
        match self.float_type {
            FloatType::F32 => f32::from_le_bytes(array_at(self.bytes, 4 * index)),
            FloatType::F16 => f16::from_le_bytes(array_at(self.bytes, 2 * index)).to_f32(),
            FloatType::Bf16 => bf16::from_le_bytes(array_at(self.bytes, 2 * index)).to_f32(),
        }
    }
}

/// The `N` bytes of `bytes` from `at` on. Panics past the end.
#[inline(always)]
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// The first weight that has no NF4 code: a NaN or an infinity.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("element {index} is {value}")]
pub struct NotFinite {
    /// Its index among the weights of the call.
    pub index: usize,
    /// The NaN or infinity itself.
    pub value: f32,
}

/// What encoding cost, over the weights of one call or, merged, of many.
///
/// Errors are those of the decoder: `weight - CODEBOOK[code] * scale` in float32. Their squares are
/// summed in float32 within a block (eight lanes, at a power-of-two unit that keeps them from
/// overflow and underflow) and in float64 over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Number of weights.
    pub weights: u64,
    /// Sum of squares of the weights.
    pub sum_sq: f64,
    /// Sum of squares of the errors.
    pub sum_sq_error: f64,
    /// The largest magnitude of an error.
    pub max_abs_error: f32,
    /// The error of the block that lost most of itself.
    pub worst_block: BlockError,
}

/// The error of one block.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BlockError {
    /// Sum of squares of the weights.
    pub sum_sq: f64,
    /// Sum of squares of the errors.
    pub sum_sq_error: f64,
}

/// A block without an error.
impl Default for BlockError {
    fn default() -> Self {
        Self { sum_sq: 1.0, sum_sq_error: 0.0 }
    }
}

impl BlockError {
    /// The error relative to the block: the norm of the errors over the norm of the weights. 1
    /// where all weights were lost.
    pub fn relative(&self) -> f64 {
        if self.sum_sq > 0.0 { (self.sum_sq_error / self.sum_sq).sqrt() } else { 0.0 }
    }

    /// Whether it is larger than `other`, relative to the blocks. No square of float32 overflows
    /// here.
    pub fn exceeds(&self, other: &Self) -> bool {
        self.sum_sq_error * other.sum_sq > other.sum_sq_error * self.sum_sq
    }
}

impl Stats {
    /// Adds the weights that `other` counts. Float64 sums depend on their order: merge in a fixed
    /// one.
    pub fn merge(&mut self, other: &Self) {
        self.weights += other.weights;
        self.sum_sq += other.sum_sq;
        self.sum_sq_error += other.sum_sq_error;
        self.max_abs_error = self.max_abs_error.max(other.max_abs_error);
        if other.worst_block.exceeds(&self.worst_block) {
            self.worst_block = other.worst_block;
        }
    }

    /// Squared error per squared weight, the measure of an encoder's quality; 0 where every weight
    /// is zero.
    pub fn relative_sq_error(&self) -> f64 {
        if self.sum_sq > 0.0 { self.sum_sq_error / self.sum_sq } else { 0.0 }
    }
}
