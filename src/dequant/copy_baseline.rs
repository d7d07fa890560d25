//! A copy by a kernel, at the speed of memory. It stays in the pass of other kernels, which the
//! driver's own copy ends. Dequantisation is measured against it.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// A kernel that copies.
#[derive(Debug, Clone)]
pub struct CopyKernel {
    gpu: Gpu,
    vectors: Kernel,
    words: Kernel,
}

/// Threads of a workgroup, which copy a vector or a word each.
const WORKGROUP: u64 = 256;

/// `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    pad: [u32; 3],
}

impl CopyKernel {
    /// The kernel of `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        let kernel = |entry| {
            // SAFETY: `record` binds as many vectors or words as it passes in `count`; there are no
            // loops and no workgroup memory.
            let shader = unsafe { Shader::trusted("copy", include_str!("../../shaders/copy.wgsl")) };
            gpu.kernel(&KernelSpec { shader, entry, constants: Vec::new() })
        };
        Ok(Self { gpu: gpu.clone(), vectors: kernel("vectors")?, words: kernel("words")? })
    }

    /// Records the copy of `from` to `to`, in pieces that can be bound. Both have the same size, a
    /// multiple of 4, in different buffers.
    ///
    /// # Errors
    /// [`GpuError::Invalid`] for other sizes.
    pub fn record(&self, commands: &mut Commands, from: &BufferRange, to: &BufferRange) -> Result<(), GpuError> {
        let total = from.size;
        if to.size != total || !total.is_multiple_of(4) {
            let reason = format!("a copy of {total} bytes to {}", to.size);
            return Err(GpuError::Invalid { what: "copy".to_owned(), reason });
        }
        let (kernel, unit) = if total.is_multiple_of(16) { (&self.vectors, 16) } else { (&self.words, 4) };
        let piece = self.gpu.limits().max_storage_buffer_binding_size.min(1 << 33) / 256 * 256;
        let mut at = 0;
        while at < total && piece > 0 {
            let size = piece.min(total - at);
            let params = Params { count: (size / unit) as u32, pad: [0; 3] };
            let groups = self.gpu.grid((size / unit).div_ceil(WORKGROUP));
            let [from, to] = [from, to].map(|range| range.slice(at, size));
            let bindings = [from.clone(), to.clone(), from, to];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, 2 * size);
            at += size;
        }
        Ok(())
    }
}
