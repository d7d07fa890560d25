//! Kernels: WGSL compiled once per device and kept.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::device::Gpu;
use super::error::GpuError;

/// WGSL, and whether it runs without wgpu's runtime checks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shader {
    name: Cow<'static, str>,
    source: Cow<'static, str>,
    trusted: bool,
}

impl Shader {
    /// A shader with bounds checks on every access.
    pub fn checked(name: impl Into<Cow<'static, str>>, source: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), source: source.into(), trusted: false }
    }

    /// A shader without runtime checks (they are there with `NF4PACK_CHECKED=1`).
    ///
    /// # Safety
    /// For every dispatch, the caller has proven on the host that each access lies within the bound ranges, that all loops end,
    /// and that workgroup memory is written before it is read.
    pub unsafe fn trusted(name: impl Into<Cow<'static, str>>, source: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), source: source.into(), trusted: true }
    }
}

/// What makes a kernel: a shader, its entry point, its constants.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelSpec {
    /// The shader.
    pub shader: Shader,
    /// The entry point.
    pub entry: &'static str,
    /// Values of `override` constants.
    pub constants: Vec<(&'static str, f64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    shader: Shader,
    entry: &'static str,
    constants: Vec<(&'static str, u64)>,
}

/// A compiled kernel. Clones are the same kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub(super) name: String,
    pub(super) pipeline: wgpu::ComputePipeline,
}

/// The kernels that were compiled on a device.
#[derive(Debug, Default)]
pub(super) struct Registry(Mutex<HashMap<Key, Kernel>>);

impl Gpu {
    /// Compiles a kernel, or finds it where it was compiled before.
    ///
    /// # Errors
    /// [`GpuError::KernelLimit`], [`GpuError::Invalid`].
    pub fn kernel(&self, spec: &KernelSpec) -> Result<Kernel, GpuError> {
        let constants = spec.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        let key = Key { shader: spec.shader.clone(), entry: spec.entry, constants };
        let mut kernels = self.0.registry.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        let kernel = self.compile(spec)?;
        kernels.insert(key, kernel.clone());
        Ok(kernel)
    }

    fn compile(&self, spec: &KernelSpec) -> Result<Kernel, GpuError> {
        let name = format!("{}:{}", spec.shader.name, spec.entry);
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&name),
            source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(&spec.shader.source)),
        };
        let unchecked = spec.shader.trusted && !self.0.checked;
        let pipeline = self.guarded(&name, |device| {
            let module = if unchecked {
                // SAFETY: the shader was made by `Shader::trusted`, whose caller has proven its accesses.
                unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
            } else {
                device.create_shader_module(descriptor)
            };
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&name),
                layout: None,
                module: &module,
                entry_point: Some(spec.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &spec.constants,
                    zero_initialize_workgroup_memory: !unchecked,
                },
                cache: None,
            })
        })?;
        Ok(Kernel { name, pipeline })
    }
}
