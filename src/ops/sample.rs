//! The choice of the next token on the device, by the rules of `model::generate::sampling`.
//!
//! The device sums weights in float32, the CPU in float64. So a choice has a margin: if the draw,
//! or the end of the likeliest tokens with a share of top-p, is closer than [`MARGIN`] to the
//! border between two tokens, or if too many tokens may be chosen, the choice is not certain. The
//! caller then reads the logits and chooses on the CPU. A certain choice is the choice of the CPU.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::{Mat, OpError};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup. As in the shader.
const WORKGROUP: u32 = 256;
/// Maximum chunks of the vocabulary, and maximum tokens that are sorted. As in the shader.
const CANDIDATES: u32 = 1024;
/// Chunks that give candidates for top-p.
const TOP_CHUNKS: u32 = 256;
/// Maximum error of a sum of weights, relative to the total. An exponential in WGSL has an error of
/// (3 + 2 |x|) units in the last place; weighted by itself, it stays below 5e-6.
const MARGIN: f32 = 2e-5;
/// Temperatures that the device divides by. Others are left to the CPU.
const TEMPERATURES: std::ops::RangeInclusive<f64> = 1e-20..=1e20;

/// The smallest min-p above 0 that the device compares weights with: the relative error of such a
/// weight is below [`MARGIN`]. Smaller ones are left to the CPU.
const SMALLEST_MIN_P: f64 = 1e-20;

/// The rules of one choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRules {
    /// The divisor of the logits. 0: the likeliest token.
    pub temperature: f64,
    /// Keeps the tokens with a logit of at least the `top_k`th largest. 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest of the likeliest tokens with at least this share of the weights.
    pub top_p: f64,
    /// Keeps the tokens with at least this share of the weight of the likeliest token. 0 keeps all.
    pub min_p: f64,
    /// Uniform in [0, 1). Unused at temperature 0.
    pub draw: f32,
}

/// A choice that was read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The token. It is below the vocabulary, even if it is not certain.
    pub token: u32,
    /// Whether the CPU would choose the same token.
    pub certain: bool,
}

impl Choice {
    /// Bytes of a choice in memory.
    pub const BYTES: u64 = 16;

    /// The choice in these bytes.
    pub fn of(bytes: &[u8; Self::BYTES as usize]) -> Self {
        let [token, certain, ..]: [u32; 4] = bytemuck::pod_read_unaligned(bytes);
        Self { token, certain: certain == 1 }
    }
}

/// Chooses tokens of a vocabulary.
#[derive(Debug)]
pub struct Sample {
    gpu: Gpu,
    scan: Kernel,
    choose: Kernel,
    vocab: u32,
    parts: BufferRange,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    vocab: u32,
    chunk: u32,
    chunks: u32,
    mode: u32,
    top_k: u32,
    top_chunks: u32,
    top_p: f32,
    draw: f32,
    temperature: f32,
    margin: f32,
    min_p: f32,
    pad: u32,
}

impl Sample {
    /// Compiles the kernels for a vocabulary of `vocab` tokens, at least one.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`], [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu, vocab: u32) -> Result<Self, GpuError> {
        // SAFETY: `record` binds `vocab` logits, at least one, `chunks` parts, 4 words of a choice
        // and one of a token; tokens are compared with `vocab`, chunks with `chunks`, and indices
        // of workgroup memory stay below CANDIDATES; loops end at those counts, halve or double;
        // workgroup memory is written, with a barrier after it, before it is read.
        let shader = unsafe { Shader::trusted("sample", include_str!("../../shaders/sample.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        let parts = BufferRange::whole(gpu.storage("parts of a choice", Self::scratch_bytes())?);
        Ok(Self { gpu: gpu.clone(), scan: kernel("scan")?, choose: kernel("choose")?, vocab: vocab.max(1), parts })
    }

    /// GPU memory of the operation in bytes.
    pub fn scratch_bytes() -> u64 {
        u64::from(CANDIDATES) * 16
    }

    /// Records the choice of a token from `logits` [1, vocab]. The choice goes to `choice`, of
    /// [`Choice::BYTES`] bytes, and its token to `token`, of 4 bytes.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn record(
        &self,
        commands: &mut Commands,
        logits: &Mat,
        rules: &SampleRules,
        choice: &BufferRange,
        token: &BufferRange,
    ) -> Result<(), OpError> {
        logits.check("sampling", 1, self.vocab)?;
        for (what, range, expected) in
            [("the size of the choice", choice, Choice::BYTES), ("the size of the token", token, 4)]
        {
            if range.size < expected {
                return Err(OpError::Shape { operation: "sampling", what, expected, found: range.size });
            }
        }
        let params = self.params(rules);
        let bindings = [logits.range.clone(), self.parts.clone(), choice.clone(), token.clone()];
        let bytes = bytemuck::bytes_of(&params);
        commands.dispatch(&self.scan, &bindings, bytes, self.gpu.grid(params.chunks.into()), logits.range.size);
        commands.dispatch(&self.choose, &bindings, bytes, [1, 1, 1], u64::from(params.chunks) * 16);
        Ok(())
    }

    fn params(&self, rules: &SampleRules) -> Params {
        let &SampleRules { temperature, top_k, top_p, min_p, draw } = rules;
        let vocab = self.vocab;
        let chunk = vocab.div_ceil(CANDIDATES).next_multiple_of(WORKGROUP);
        let chunks = vocab.div_ceil(chunk);
        let top_k = if top_k < vocab { top_k } else { 0 };
        let mode = match (temperature == 0.0, top_k == 0 && top_p == 1.0 && min_p == 0.0) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        };
        let top_chunks = match top_k {
            // All tokens are sorted.
            _ if vocab <= CANDIDATES => chunks,
            0 => (chunks / 2).clamp(1, TOP_CHUNKS),
            top_k => top_k,
        };
        let is_exact = TEMPERATURES.contains(&temperature) && (min_p == 0.0 || min_p >= SMALLEST_MIN_P);
        let margin = if is_exact { MARGIN } else { f32::MAX };
        let temperature = if is_exact { temperature as f32 } else { 1.0 };
        let [top_p, min_p] = [top_p, min_p].map(|share| share as f32);
        Params { vocab, chunk, chunks, mode, top_k, top_chunks, top_p, draw, temperature, margin, min_p, pad: 0 }
    }
}
