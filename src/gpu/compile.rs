//! Compiles kernels, each once per device.

use std::borrow::Cow;

use super::device::Gpu;
use super::error::GpuError;
use super::needs::{BUFFERS_GROUP, Needs, PARAMS_GROUP};
use super::pipeline::{Compiled, Kernel};
use super::shader::KernelSpec;

impl Gpu {
    /// Compiles a kernel, or returns the kernel that was compiled before.
    ///
    /// # Errors
    /// [`GpuError::KernelLimit`], [`GpuError::Invalid`].
    pub fn kernel(&self, spec: &KernelSpec) -> Result<Kernel, GpuError> {
        self.0.registry.get_or_compile(spec, |cache| {
            let name = format!("{}:{}", spec.shader.name, spec.entry);
            let needs = Needs::of(&name, spec)?;
            needs.check(&name, self.limits())?;
            self.compile(name, needs, spec, cache)
        })
    }

    fn compile(
        &self,
        name: String,
        needs: Needs,
        spec: &KernelSpec,
        cache: Option<&wgpu::PipelineCache>,
    ) -> Result<Compiled, GpuError> {
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&name),
            source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(&spec.shader.source)),
        };
        let unchecked = spec.shader.trusted && !self.0.checked;
        let what = format!("kernel {name}");
        let (pipeline, buffers, params) = self.guarded(&what, |device| {
            let module = if unchecked {
                // SAFETY: the shader was made by `Shader::trusted`, whose caller has proven its
                // accesses.
                unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
            } else {
                device.create_shader_module(descriptor)
            };
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&name),
                layout: None,
                module: &module,
                entry_point: Some(spec.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &spec.constants,
                    zero_initialize_workgroup_memory: !unchecked,
                },
                cache,
            });
            let layout = |used: bool, group| used.then(|| pipeline.get_bind_group_layout(group));
            let buffers = layout(!needs.buffers.is_empty(), BUFFERS_GROUP);
            let params = layout(needs.params.is_some(), PARAMS_GROUP);
            (pipeline, buffers, params)
        })?;
        Ok(Compiled { name, pipeline, needs, buffers, params })
    }
}
