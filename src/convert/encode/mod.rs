//! Floats in, NF4 codes and scales out: the pure arithmetic of a conversion, with no paths and no
//! threads.
//!
//! A tensor is cut into blocks of `block_size` elements in flattened row-major order. A call takes
//! any run of whole blocks, and the tensor's last, partial block only at its end. Every backend
//! gives the bits of the portable reference in `scalar.rs`, so a pack does not depend on the
//! machine that wrote it.

mod avx2;
mod kernel;
mod neon;
pub mod nested;
mod scalar;
mod search;
#[cfg(test)]
mod tests;

use crate::format::{FloatType, nf4};
use half::{bf16, f16};
use kernel::{BlockErrors, ChooseScales, Encode, EncodeWithScales, FirstNotFinite, Lanes};
use nested::Margin;

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
    fn round(self, scale: f32) -> f32 {
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
    fn get(&self, index: usize) -> f32 {
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
#[derive(Debug, Clone, Copy, PartialEq, Default)]
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
#[derive(Debug, Clone, Copy, PartialEq)]
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

/// Encodes `weights`: one scale per block, already rounded to `precision`, and the packed codes.
///
/// Codes are packed as the file holds them ([`nf4::CODES_PER_WORD`]); the padding of a partial last
/// block gets [`nf4::ZERO_CODE`]. A block of zeros gets scale 1.0. With [`Encoder::Absmax`] and
/// [`ScalePrecision::F32`] codes and scales are those of bitsandbytes 0.50.2 in every bit, except
/// for that 1.0 (0.0 or 1e-38 there). That includes its weak point: a block is divided by
/// `max(absmax, 1e-38)`, so a full block below 1e-38 keeps almost nothing. ([`Encoder::Mse`] has no
/// such limit.) A scale that rounds to zero gets codes 7.
///
/// # Errors
/// The first NaN or infinity; `codes` and `scales` then hold nothing of use.
///
/// # Panics
/// Where `block_size` is not one of [`nf4::BLOCK_SIZES`], or with
/// `blocks = ceil(weights.len() / block_size)`, where `scales` has not `blocks` elements or `codes`
/// not `blocks * block_size / 2` bytes.
pub fn encode(
    encoder: Encoder,
    precision: ScalePrecision,
    block_size: u32,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [f32],
) -> Result<Stats, NotFinite> {
    let block = checked_block(block_size, weights, scales.len(), Some(codes.len()));
    match encoder {
        Encoder::Absmax => run(Encode::<false> { precision, block, weights, codes, scales }),
        Encoder::Mse => run(Encode::<true> { precision, block, weights, codes, scales }),
    }
}

/// Chooses a float32 scale per block and no codes: the first of the two passes of a nested (`dq8`)
/// scale table.
///
/// The scales are those of [`encode`] with [`ScalePrecision::F32`], except that a block of zeros
/// gets 0.0, as in bitsandbytes: any scale decodes it, and a 1.0 among small scales would cost its
/// 255 neighbours their precision.
///
/// # Errors
/// The first NaN or infinity.
///
/// # Panics
/// Where `block_size` is not one of [`nf4::BLOCK_SIZES`], or `scales` has not
/// `ceil(weights.len() / block_size)` elements.
pub fn choose_scales(encoder: Encoder, block_size: u32, weights: Weights<'_>, scales: &mut [f32]) -> Result<(), NotFinite> {
    let block = checked_block(block_size, weights, scales.len(), None);
    run(ChooseScales { encoder, block, weights, scales, margins: &mut [] })
}

/// [`choose_scales`] with [`Encoder::Mse`], and what each block has to spare against absmax.
///
/// # Errors
/// The first NaN or infinity.
///
/// # Panics
/// As [`choose_scales`] does, and where `margins` has not as many elements as `scales`.
pub fn choose_scales_with_margins(
    block_size: u32,
    weights: Weights<'_>,
    scales: &mut [f32],
    margins: &mut [Margin],
) -> Result<(), NotFinite> {
    let block = checked_block(block_size, weights, scales.len(), None);
    assert_eq!(margins.len(), scales.len(), "one margin a scale");
    run(ChooseScales { encoder: Encoder::Mse, block, weights, scales, margins })
}

/// The error of each block that [`encode_with_scales`] would leave with these scales.
///
/// # Panics
/// As [`encode_with_scales`] does, and where `errors` has not as many elements as `scales`.
pub fn block_errors(block_size: u32, weights: Weights<'_>, scales: &[f32], errors: &mut [BlockError]) {
    let block = checked_block(block_size, weights, scales.len(), None);
    assert_eq!(errors.len(), scales.len(), "one error a scale");
    run(BlockErrors { block, weights, scales, errors });
}

/// Encodes finite `weights` with the scales that the reader will see, of either sign or zero: the
/// second pass of a nested (`dq8`) scale table. A zero scale gets codes 7.
///
/// # Panics
/// As [`encode`] does. Where a weight or a scale is not finite, the codes and the statistics mean
/// nothing.
pub fn encode_with_scales(block_size: u32, weights: Weights<'_>, scales: &[f32], codes: &mut [u8]) -> Stats {
    let block = checked_block(block_size, weights, scales.len(), Some(codes.len()));
    run(EncodeWithScales { block, weights, scales, codes })
}

/// The first NaN or infinity among `weights`, if any; for tensors that are stored as they are.
pub fn first_not_finite(weights: Weights<'_>) -> Option<NotFinite> {
    run(FirstNotFinite { weights })
}

/// The block size as an index, once the lengths of a call agree. Panics as the public functions
/// document.
fn checked_block(block_size: u32, weights: Weights<'_>, scales: usize, codes: Option<usize>) -> usize {
    assert!(nf4::BLOCK_SIZES.contains(&block_size), "block size {block_size} is none of {:?}", nf4::BLOCK_SIZES);
    let block = block_size as usize;
    let blocks = weights.len().div_ceil(block);
    assert_eq!(scales, blocks, "scales for {blocks} blocks");
    if let Some(codes) = codes {
        assert_eq!(codes, blocks * block / 2, "bytes of codes for {blocks} blocks of {block}");
    }
    block
}

/// Work that can run on any backend.
trait Task {
    type Output;

    /// Does the work with the vector operations of `lanes`. Implementations are
    /// `#[inline(always)]`, so that they are compiled with the target features of the backend's
    /// entry point.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy)]
enum Backend {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

impl Backend {
    /// The fastest one. The standard library caches what it finds out about the processor.
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = avx2::Avx2::detect() {
            return Self::Avx2(avx2);
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(neon) = neon::Neon::detect() {
            return Self::Neon(neon);
        }
        Self::Scalar
    }

    fn run<T: Task>(self, task: T) -> T::Output {
        match self {
            Self::Scalar => task.run(scalar::Scalar),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(task),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.run(task),
        }
    }
}

fn run<T: Task>(task: T) -> T::Output {
    Backend::best().run(task)
}
