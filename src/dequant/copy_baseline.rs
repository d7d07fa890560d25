//! A copy at the speed of memory, which dequantisation is measured against.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// A kernel that copies.
#[derive(Debug, Clone)]
pub struct CopyKernel {
    gpu: Gpu,
    kernel: Kernel,
}

/// What a workgroup of the shader copies: 256 threads, 16 bytes each.
const BYTES_PER_GROUP: u64 = 16 * 256;

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
        // SAFETY: `record` binds as many vec4s as it passes in `count`; there are no loops and no workgroup memory.
        let shader = unsafe { Shader::trusted("copy", include_str!("../../shaders/copy.wgsl")) };
        let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants: Vec::new() })?;
        Ok(Self { gpu: gpu.clone(), kernel })
    }

    /// Records the copy of `from` to `to`: as many whole 16 bytes as both have, in pieces that can be bound.
    pub fn record(&self, commands: &mut Commands, from: &BufferRange, to: &BufferRange) {
        let total = from.size.min(to.size) / 16 * 16;
        let piece = self.gpu.limits().max_storage_buffer_binding_size.min(1 << 34) / 256 * 256;
        let mut at = 0;
        while at < total && piece > 0 {
            let size = piece.min(total - at);
            let params = Params { count: (size / 16) as u32, pad: [0; 3] };
            let groups = self.gpu.grid(size.div_ceil(BYTES_PER_GROUP));
            let bindings = [from.slice(at, size), to.slice(at, size)];
            commands.dispatch(&self.kernel, &bindings, bytemuck::bytes_of(&params), groups, 2 * size);
            at += size;
        }
    }
}
