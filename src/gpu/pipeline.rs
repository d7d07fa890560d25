//! Kernels: WGSL compiled once per device and kept.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::Cache;
use super::device::Gpu;
use super::error::GpuError;
use super::needs::{BUFFERS_GROUP, Needs, PARAMS_GROUP};

/// Name of the driver's compiled kernels among the records of a device.
const CACHED: &str = "pipelines";

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

    pub(super) fn source(&self) -> &str {
        &self.source
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

impl std::hash::Hash for KernelSpec {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (&self.shader, self.entry).hash(state);
        self.constants.iter().for_each(|(name, value)| (name, value.to_bits()).hash(state));
    }
}

#[cfg(all(test, feature = "train"))]
impl KernelSpec {
    /// The same with other text in the place of some of its shader's, and runtime checks.
    pub(crate) fn patched(self, from: &str, to: &str) -> Self {
        let source = self.shader.source.replace(from, to);
        Self { shader: Shader::checked(self.shader.name, source), ..self }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    shader: Shader,
    entry: &'static str,
    constants: Vec<(&'static str, u64)>,
}

/// A compiled kernel. Clones are the same kernel.
#[derive(Debug, Clone)]
pub struct Kernel(pub(super) Arc<Compiled>);

#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) name: String,
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) needs: Needs,
    pub(super) buffers: Option<wgpu::BindGroupLayout>,
    pub(super) params: Option<wgpu::BindGroupLayout>,
}

impl Kernel {
    /// `shader:entry`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Threads of a workgroup, in three dimensions.
    pub fn workgroup_size(&self) -> [u32; 3] {
        self.0.needs.workgroup_size
    }
}

/// The kernels that were compiled on a device.
#[derive(Debug)]
pub(super) struct Registry {
    kernels: Mutex<HashMap<Key, Kernel>>,
    cache: Option<wgpu::PipelineCache>,
    /// Kernels were compiled since the cache was read.
    grown: AtomicBool,
}

impl Registry {
    pub(super) fn new(device: &wgpu::Device, cache: &Cache) -> Self {
        let offered = device.features().contains(wgpu::Features::PIPELINE_CACHE);
        let cache = offered.then(|| pipeline_cache(device, cache.load(CACHED).as_deref())).flatten();
        Self { kernels: Mutex::default(), cache, grown: AtomicBool::new(false) }
    }

    /// Keeps what the driver compiled for the next run.
    pub(super) fn save(&self, cache: &Cache) {
        if self.grown.load(Ordering::Relaxed) {
            let compiled = self.cache.as_ref().and_then(wgpu::PipelineCache::get_data);
            let new = compiled.filter(|bytes| cache.load(CACHED).as_ref() != Some(bytes));
            let _ = new.map(|bytes| cache.store(CACHED, &bytes));
        }
    }
}

/// The driver's cache with what an earlier run left in it; where wgpu refuses that, an empty one.
fn pipeline_cache(device: &wgpu::Device, data: Option<&[u8]>) -> Option<wgpu::PipelineCache> {
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("nf4pack"), data, fallback: true };
    let errors = device.push_error_scope(wgpu::ErrorFilter::Validation);
    // SAFETY: `Registry::save` wrote the data from `get_data`, and `Cache` gives it back only under the checksum, adapter and driver
    // it was written with; wgpu holds its header against adapter and driver once more.
    let cache = unsafe { device.create_pipeline_cache(&descriptor) };
    match pollster::block_on(errors.pop()) {
        None => Some(cache),
        Some(_) => data.and_then(|_| pipeline_cache(device, None)),
    }
}

impl Gpu {
    /// Compiles a kernel, or finds it where it was compiled before.
    ///
    /// # Errors
    /// [`GpuError::KernelLimit`], [`GpuError::Invalid`].
    pub fn kernel(&self, spec: &KernelSpec) -> Result<Kernel, GpuError> {
        let constants = spec.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        let key = Key { shader: spec.shader.clone(), entry: spec.entry, constants };
        let mut kernels = self.0.registry.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        let name = format!("{}:{}", spec.shader.name, spec.entry);
        let needs = Needs::of(&name, spec)?;
        needs.check(&name, self.limits())?;
        let kernel = Kernel(Arc::new(self.compile(name, needs, spec)?));
        self.0.registry.grown.store(true, Ordering::Relaxed);
        kernels.insert(key, kernel.clone());
        Ok(kernel)
    }

    fn compile(&self, name: String, needs: Needs, spec: &KernelSpec) -> Result<Compiled, GpuError> {
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&name),
            source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(&spec.shader.source)),
        };
        let unchecked = spec.shader.trusted && !self.0.checked;
        let what = format!("kernel {name}");
        let (pipeline, buffers, params) = self.guarded(&what, |device| {
            let module = if unchecked {
                // SAFETY: the shader was made by `Shader::trusted`, whose caller has proven its accesses.
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
                cache: self.0.registry.cache.as_ref(),
            });
            let layout = |used: bool, group| used.then(|| pipeline.get_bind_group_layout(group));
            let buffers = layout(!needs.buffers.is_empty(), BUFFERS_GROUP);
            let params = layout(needs.params.is_some(), PARAMS_GROUP);
            (pipeline, buffers, params)
        })?;
        Ok(Compiled { name, pipeline, needs, buffers, params })
    }
}
