//! Decodes codes and scales to floats on the GPU, with kernels that were compared with the CPU.

use std::ops::Range;

use super::error::DequantError;
use super::kernel::{Kernels, Path, Setup};
use super::output::Output;
use super::selftest::{self, Verdicts};
use super::weights::GpuWeights;
use crate::format::nf4::{CODES_PER_WORD, ScaleType};
use crate::gpu::{BufferRange, Commands, Gpu};

/// The kernel for an output type and a scale type, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelChoice {
    /// Output type.
    pub output: Output,
    /// Scale type.
    pub scale_type: ScaleType,
    /// Whether the fast kernel is used.
    pub fast: bool,
    /// Why the fast kernel is not used.
    pub reason: Option<String>,
}

/// The dequantisation kernels of a device.
#[derive(Debug, Clone)]
pub struct Dequantizer {
    kernels: Kernels,
    verdicts: Verdicts,
}

impl Dequantizer {
    /// Compiles the kernels of `gpu` and tests each one against the CPU. If a fast kernel fails,
    /// the plain kernel replaces it. The results are stored for later runs on the same adapter and
    /// driver ([`Options::cache`](crate::gpu::Options::cache)).
    ///
    /// # Errors
    /// [`DequantError::Unfit`] if the plain kernel also fails; [`DequantError::Binding`],
    /// [`DequantError::Gpu`].
    pub fn new(gpu: &Gpu) -> Result<Self, DequantError> {
        Self::with(gpu, Setup::default())
    }

    /// As [`Dequantizer::new`], with other settings.
    #[doc(hidden)]
    pub fn with(gpu: &Gpu, setup: Setup) -> Result<Self, DequantError> {
        let kernels = Kernels::new(gpu, setup)?;
        let verdicts = selftest::recall_or_run(&kernels)?;
        Ok(Self { kernels, verdicts })
    }

    /// The kernel for each output type and scale type, and the reason.
    pub fn choices(&self) -> Vec<KernelChoice> {
        let choice = |(output, scale_type)| {
            let reason = self.verdicts.refusal(output, scale_type).map(str::to_owned);
            KernelChoice { output, scale_type, fast: reason.is_none(), reason }
        };
        selftest::every_kernel().map(choice).collect()
    }

    /// Records the dequantisation of the elements in `range` into `out`. The start of `range` is a
    /// multiple of 8. `out` holds at least [`Output::bytes`] of the length of `range`, in another
    /// buffer than the weights. The rest of `out` is unchanged.
    ///
    /// # Errors
    /// [`DequantError::Weights`], [`DequantError::Range`], [`DequantError::OutputRange`]; nothing
    /// is then recorded. [`DequantError::Gpu`] if the kernel does not compile.
    pub fn record(
        &self,
        commands: &mut Commands,
        weights: &GpuWeights,
        range: Range<u64>,
        output: Output,
        out: &BufferRange,
    ) -> Result<(), DequantError> {
        let refused = self.verdicts.refusal(output, weights.codec.scale_type()).is_some();
        let path = if refused { Path::Plain } else { Path::Fast };
        self.kernels.record(path, commands, weights, range, output, out)
    }

    /// Decodes the elements in `range`, waits, and returns them as little-endian bytes. The start
    /// of `range` is a multiple of 8. For tests and small programs.
    ///
    /// # Errors
    /// As [`Dequantizer::record`]; any device error.
    pub fn read(&self, weights: &GpuWeights, range: Range<u64>, output: Output) -> Result<Vec<u8>, DequantError> {
        let gpu = self.kernels.gpu();
        let per_buffer = gpu.limits().max_buffer_size / output.word_bytes() * CODES_PER_WORD as u64;
        let mut bytes = Vec::new();
        let mut at = range.start;
        loop {
            let end = range.end.min(at.saturating_add(per_buffer.max(1)));
            let count = end.saturating_sub(at);
            let out = BufferRange::whole(gpu.storage("floats", output.bytes(count))?);
            let mut commands = gpu.commands("dequantise");
            self.record(&mut commands, weights, at..end, output, &out)?;
            commands.submit()?;
            let found = gpu.read(&out)?;
            let wanted = (count * output.element_bytes()) as usize;
            bytes.extend_from_slice(found.get(..wanted).unwrap_or(&found));
            at = end;
            if at >= range.end {
                return Ok(bytes);
            }
        }
    }
}
