//! Floats in, NF4 codes and scales out: the pure arithmetic of a conversion, with no paths and no
//! threads.
//!
//! A tensor is cut into blocks of `block_size` elements in flattened row-major order. A call takes
//! any run of whole blocks, and the tensor's last, partial block only at its end. Every backend
//! gives the bits of the portable reference in `scalar.rs`, so a pack does not depend on the
//! machine that wrote it.

mod avx2;
mod block;
mod kernel;
mod lanes;
mod neon;
pub mod nested;
mod scalar;
mod search;
#[cfg(test)]
mod tests;
mod types;

use crate::format::nf4;
use kernel::{BlockErrors, ChooseScales, Encode, EncodeWithScales, FirstNotFinite};
use lanes::Task;
use nested::Margin;
pub use types::{BlockError, Encoder, NotFinite, ScalePrecision, Stats, Weights};

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
