//! Lists the GPUs and selects one.

use std::fmt;
use std::sync::OnceLock;

use super::error::GpuError;

/// A GPU driver is a dynamic library. A statically linked program cannot load one, and glibc
/// crashes if it tries.
const IS_STATIC: bool = cfg!(all(target_os = "linux", target_feature = "crt-static"));

/// How to get a driver, for [`GpuError::NoAdapter`].
pub const DRIVER_HINT: &str = if IS_STATIC {
    "this program is linked statically, and drivers are libraries: build it without crt-static"
} else if cfg!(any(target_os = "macos", target_os = "ios")) {
    "Metal comes with the system: is this a virtual machine without a GPU?"
} else if cfg!(windows) {
    "install the graphics driver of the GPU's maker, which brings Direct3D 12 and Vulkan"
} else {
    "install a Vulkan driver. Debian, Ubuntu: mesa-vulkan-drivers libvulkan1; Fedora: mesa-vulkan-drivers vulkan-loader; \
     Arch: vulkan-icd-loader and vulkan-radeon, vulkan-intel or vulkan-swrast; NVIDIA: the driver's GL package, which has \
     nvidia_icd.json (libnvidia-gl-VERSION, nvidia-utils; in containers NVIDIA_DRIVER_CAPABILITIES=all). Mesa's drivers \
     include a software one, which needs no GPU"
};

/// wgpu refuses an allocation above this percentage of the memory budget that the system reports.
/// Above it, a driver swaps.
pub(super) const MEMORY_PERCENT: u8 = 95;

/// Kinds of adapters, best first.
const KINDS: [&str; 5] = ["discrete", "integrated", "virtual", "other", "software"];
/// Backends, best first. Two of them may list the same GPU.
const BACKENDS: [&str; 3] = ["vulkan", "metal", "dx12"];

/// What a user sees of an adapter and selects it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSummary {
    /// Index in [`adapters`], as `--gpu` takes it.
    pub index: usize,
    /// The name that the driver reports.
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

/// Every adapter, best first: discrete, integrated, virtual, software.
pub fn adapters() -> Vec<AdapterSummary> {
    ranked().iter().map(|(summary, _)| summary.clone()).collect()
}

/// The adapter that [`Options::adapter`](super::Options::adapter) selects.
///
/// # Errors
/// [`GpuError::NoAdapter`], [`GpuError::NoSuchAdapter`].
pub fn adapter(requested: Option<&str>) -> Result<AdapterSummary, GpuError> {
    find(requested).map(|(summary, _)| summary)
}

/// The adapter that matches `requested`, or the best adapter.
pub(super) fn find(requested: Option<&str>) -> Result<(AdapterSummary, wgpu::Adapter), GpuError> {
    let chosen = choose(&adapters(), requested)?.index;
    ranked().get(chosen).cloned().ok_or(GpuError::NoAdapter)
}

/// The summary that matches `requested`: an index, or a substring of the name in any case. Returns
/// the best one if several match or if `requested` is `None`. A number of one or two digits is an
/// index only: it could be part of any version in a name.
fn choose<'a>(ranked: &'a [AdapterSummary], requested: Option<&str>) -> Result<&'a AdapterSummary, GpuError> {
    let best = ranked.first().ok_or(GpuError::NoAdapter)?;
    let Some(requested) = requested else { return Ok(best) };
    let by_index = requested.trim().parse().ok().and_then(|index: usize| ranked.get(index));
    let part = requested.trim().to_lowercase();
    let only_index = part.len() <= 2 && part.parse::<usize>().is_ok();
    let by_name = || ranked.iter().find(|s| !only_index && s.name.to_lowercase().contains(&part));
    by_index.or_else(by_name).ok_or_else(|| GpuError::NoSuchAdapter {
        requested: requested.to_owned(),
        present: ranked.iter().map(|s| format!("{} {}", s.index, s.name)).collect(),
    })
}

/// The search runs once. Each search loads all drivers, and some drivers write to stderr each time.
fn ranked() -> &'static [(AdapterSummary, wgpu::Adapter)] {
    static FOUND: OnceLock<Vec<(AdapterSummary, wgpu::Adapter)>> = OnceLock::new();
    FOUND.get_or_init(search)
}

fn search() -> Vec<(AdapterSummary, wgpu::Adapter)> {
    if IS_STATIC {
        return Vec::new();
    }
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let memory_budget_thresholds =
        wgpu::MemoryBudgetThresholds { for_resource_creation: Some(MEMORY_PERCENT), for_device_loss: None };
    // Adapters and devices keep the instance alive.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        memory_budget_thresholds,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = pollster::block_on(instance.enumerate_adapters(backends));
    let mut found: Vec<_> = adapters.into_iter().map(|adapter| (summary(&adapter.get_info()), adapter)).collect();
    found.sort_by_key(|(summary, _)| rank(summary));
    for (index, (summary, _)) in found.iter_mut().enumerate() {
        summary.index = index;
    }
    found
}

/// Smaller is better. Equal ranks keep the driver's order.
fn rank(summary: &AdapterSummary) -> (usize, usize) {
    let place = |list: &[&str], name: &str| list.iter().position(|&n| n == name).unwrap_or(list.len());
    (place(&KINDS, summary.kind), place(&BACKENDS, &summary.backend))
}

fn summary(info: &wgpu::AdapterInfo) -> AdapterSummary {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    let driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
    AdapterSummary { index: 0, name: info.name.clone(), kind, backend: info.backend.to_string(), driver }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(adapters: &[(&str, &'static str, &str)]) -> Vec<AdapterSummary> {
        let summary = |&(name, kind, backend): &(&str, &'static str, &str)| AdapterSummary {
            index: 0,
            name: name.to_owned(),
            kind,
            backend: backend.to_owned(),
            driver: String::new(),
        };
        let mut found: Vec<_> = adapters.iter().map(summary).collect();
        found.sort_by_key(rank);
        found.iter_mut().enumerate().for_each(|(index, summary)| summary.index = index);
        found
    }

    fn three() -> Vec<AdapterSummary> {
        list(&[
            ("llvmpipe (LLVM 15)", "software", "vulkan"),
            ("Intel UHD", "integrated", "dx12"),
            ("Intel UHD", "integrated", "vulkan"),
            ("GeForce RTX 4090", "discrete", "dx12"),
            ("GeForce RTX 3060", "discrete", "vulkan"),
            ("Virtio", "virtual", "vulkan"),
            ("GeForce RTX 4090", "discrete", "vulkan"),
        ])
    }

    #[test]
    fn the_best_kind_comes_first_then_the_best_backend_then_the_drivers_order() {
        let found = three();
        let names: Vec<_> = found.iter().map(|s| (s.name.as_str(), s.backend.as_str())).collect();
        let wanted = [
            ("GeForce RTX 3060", "vulkan"),
            ("GeForce RTX 4090", "vulkan"),
            ("GeForce RTX 4090", "dx12"),
            ("Intel UHD", "vulkan"),
            ("Intel UHD", "dx12"),
            ("Virtio", "vulkan"),
            ("llvmpipe (LLVM 15)", "vulkan"),
        ];
        assert_eq!(names, wanted);
        assert_eq!(choose(&found, None).unwrap().index, 0);
    }

    #[test]
    fn an_adapter_is_found_by_index_or_part_of_its_name() {
        let found = three();
        let index = |requested| choose(&found, Some(requested)).map(|s| s.index).ok();
        assert_eq!(index("6"), Some(6));
        assert_eq!(index("LLVMpipe"), Some(6));
        assert_eq!(index("geforce"), Some(0), "the best of several matches");
        assert_eq!(index("4090"), Some(1), "a number past the last index is a substring of a name");
        assert_eq!(index("uhd"), Some(3), "the better of two backends that list the GPU");
        assert_eq!(index("radeon"), None);
        assert_eq!(index("7"), None);
        assert_eq!(index("15"), None, "a part of a version");
    }

    #[test]
    fn errors_say_what_is_there() {
        let found = list(&[("Intel UHD", "integrated", "vulkan"), ("llvmpipe", "software", "vulkan")]);
        let text = choose(&found, Some("9")).unwrap_err().to_string();
        assert_eq!(text, r#"no GPU "9"; there are: 0 Intel UHD, 1 llvmpipe"#);
        assert!(matches!(choose(&[], Some("0")), Err(GpuError::NoAdapter)));
        assert!(matches!(choose(&[], None), Err(GpuError::NoAdapter)));
    }
}
