//! Compiled kernels, and their registry on a device.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::Cache;
use super::needs::Needs;
use super::shader::{KernelSpec, Shader};

/// Record name of the compiled kernels of the driver.
const CACHED: &str = "pipelines";

/// Identifies a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    shader: Shader,
    entry: &'static str,
    constants: Vec<(&'static str, u64)>,
}

impl Key {
    fn of(spec: &KernelSpec) -> Self {
        let constants = spec.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        Self { shader: spec.shader.clone(), entry: spec.entry, constants }
    }
}

/// A compiled kernel. Clones share it.
#[derive(Debug, Clone)]
pub struct Kernel(pub(super) Arc<Compiled>);

#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) name: String,
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) needs: Needs,
    /// The layout of the bind group of its buffers, if it has some.
    pub(super) buffers: Option<wgpu::BindGroupLayout>,
    /// Whether it runs without runtime checks.
    pub(super) unchecked: bool,
}

impl Kernel {
    /// `shader:entry`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Threads of a workgroup in three dimensions.
    pub fn workgroup_size(&self) -> [u32; 3] {
        self.0.needs.workgroup_size
    }
}

/// The compiled kernels of a device.
#[derive(Debug)]
pub(super) struct Registry {
    kernels: Mutex<HashMap<Key, Kernel>>,
    cache: Option<wgpu::PipelineCache>,
    /// Whether kernels were compiled since the cache was read.
    grown: AtomicBool,
}

impl Registry {
    pub(super) fn new(device: &wgpu::Device, cache: &Cache) -> Self {
        let offered = device.features().contains(wgpu::Features::PIPELINE_CACHE);
        let cache = offered.then(|| pipeline_cache(device, cache.load(CACHED).as_deref())).flatten();
        Self { kernels: Mutex::default(), cache, grown: AtomicBool::new(false) }
    }

    /// The kernel that was compiled before, or the result of `compile`, which gets the cache of the
    /// driver. Threads compile at the same time.
    pub(super) fn get_or_compile<E>(
        &self,
        spec: &KernelSpec,
        compile: impl FnOnce(Option<&wgpu::PipelineCache>) -> Result<Compiled, E>,
    ) -> Result<Kernel, E> {
        let key = Key::of(spec);
        let lock = || self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = lock().get(&key) {
            return Ok(kernel.clone());
        }
        let kernel = Kernel(Arc::new(compile(self.cache.as_ref())?));
        self.grown.store(true, Ordering::Relaxed);
        // Another thread may have compiled it meanwhile.
        Ok(lock().entry(key).or_insert(kernel).clone())
    }

    /// Stores the compiled kernels of the driver for the next run.
    pub(super) fn save(&self, cache: &Cache) {
        if self.grown.load(Ordering::Relaxed) {
            let compiled = self.cache.as_ref().and_then(wgpu::PipelineCache::get_data);
            let new = compiled.filter(|bytes| cache.load(CACHED).as_ref() != Some(bytes));
            let _ = new.map(|bytes| cache.store(CACHED, &bytes));
        }
    }
}

/// The driver cache with the data of an earlier run. Empty if wgpu refuses that data.
fn pipeline_cache(device: &wgpu::Device, data: Option<&[u8]>) -> Option<wgpu::PipelineCache> {
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("nf4pack"), data, fallback: true };
    let errors = device.push_error_scope(wgpu::ErrorFilter::Validation);
    // SAFETY: `Registry::save` wrote the data from `get_data`, and `Cache` gives it back only under
    // the checksum, adapter and driver it was written with; wgpu checks its header against adapter
    // and driver again.
    let cache = unsafe { device.create_pipeline_cache(&descriptor) };
    match pollster::block_on(errors.pop()) {
        None => Some(cache),
        Some(_) => data.and_then(|_| pipeline_cache(device, None)),
    }
}
