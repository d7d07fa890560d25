//! Compiles kernels, each once per device.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::borrow::Cow;
use std::num::NonZeroU64;

use super::device::Gpu;
use super::error::GpuError;
use super::needs::{Bound, Needs};
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
        let (pipeline, buffers) = self.guarded(&what, |device| {
            let module = if unchecked {
                // SAFETY: the shader was made by `Shader::trusted`, whose caller has proven its
                // accesses.
                unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
            } else {
                device.create_shader_module(descriptor)
            };
            let (buffers, layout) = self.layouts(&name, &needs);
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&name),
                layout: Some(&layout),
                module: &module,
                entry_point: Some(spec.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &spec.constants,
                    zero_initialize_workgroup_memory: !unchecked,
                },
                cache,
            });
            (pipeline, buffers)
        })?;
        Ok(Compiled { name, pipeline, needs, buffers, unchecked })
    }

    /// The layout of the bind group of the buffers, and the layout of the kernel. Parameters have a
    /// dynamic offset.
    fn layouts(&self, name: &str, needs: &Needs) -> (Option<wgpu::BindGroupLayout>, wgpu::PipelineLayout) {
        let entry = |bound: &Bound| wgpu::BindGroupLayoutEntry {
            binding: bound.binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match bound.uniform {
                    true => wgpu::BufferBindingType::Uniform,
                    false => wgpu::BufferBindingType::Storage { read_only: !bound.writable },
                },
                has_dynamic_offset: false,
                min_binding_size: NonZeroU64::new(bound.min_size),
            },
            count: None,
        };
        let device = self.device();
        let buffers = (!needs.buffers.is_empty()).then(|| {
            let entries: Vec<_> = needs.buffers.iter().map(entry).collect();
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries })
        });
        let groups = [buffers.as_ref(), needs.params.as_ref().map(|_| self.0.params.layout())];
        let used = groups.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: groups.get(..used).unwrap_or_default(),
            immediate_size: 0,
        });
        (buffers, layout)
    }
}
