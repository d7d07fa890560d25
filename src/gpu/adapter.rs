//! Which GPUs there are, and which one is used.

use std::fmt;

use super::error::GpuError;

/// An adapter, as people choose it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSummary {
    /// Its place in [`adapters`], which `--adapter` takes.
    pub index: usize,
    /// The driver's name of it.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// Driver and its version.
    pub driver: String,
}

impl fmt::Display for AdapterSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}, {})", self.name, self.kind, self.backend, self.driver)
    }
}

/// Every adapter, best first: discrete, then integrated, virtual, software.
pub fn adapters() -> Vec<AdapterSummary> {
    ranked().iter().enumerate().map(|(index, adapter)| summary(index, &adapter.get_info())).collect()
}

/// Adapters of [`adapters`], in that order.
fn ranked() -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let descriptor = wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
    adapters
}

fn rank(kind: wgpu::DeviceType) -> u8 {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

fn summary(index: usize, info: &wgpu::AdapterInfo) -> AdapterSummary {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    let driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
    AdapterSummary { index, name: info.name.clone(), kind, backend: info.backend.to_string(), driver }
}

/// The adapter that `asked` names (by index, or by a part of its name in any case), or the best one.
pub(super) fn choose(asked: Option<&str>) -> Result<(AdapterSummary, wgpu::Adapter), GpuError> {
    let adapters = ranked();
    let summaries: Vec<_> = adapters.iter().enumerate().map(|(i, a)| summary(i, &a.get_info())).collect();
    let chosen = match asked {
        None => summaries.first(),
        Some(asked) => match asked.parse::<usize>() {
            Ok(index) => summaries.get(index),
            Err(_) => summaries.iter().find(|s| s.name.to_lowercase().contains(&asked.to_lowercase())),
        },
    };
    match (chosen, asked) {
        (Some(chosen), _) => Ok((chosen.clone(), adapters[chosen.index].clone())),
        (None, Some(asked)) if !summaries.is_empty() => {
            let present = summaries.iter().map(|s| format!("{} {}", s.index, s.name)).collect();
            Err(GpuError::NoSuchAdapter { asked: asked.to_owned(), present })
        }
        _ => Err(GpuError::NoAdapter),
    }
}
