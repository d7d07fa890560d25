//! The amount of device memory, which WebGPU does not report.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use super::device::Gpu;

/// Memory of a device in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Total memory of the device. For an integrated or software GPU, its share of the system
    /// memory.
    pub total: u64,
    /// Memory still available to this program, as the driver estimates it.
    pub available: Option<u64>,
    /// Memory that this program uses, as the driver counts it: buffers and its own needs, without
    /// buffers in host memory.
    pub used: Option<u64>,
}

/// Memory in use by the buffers of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocatedMemory {
    /// Bytes in buffers.
    pub used: u64,
    /// Bytes of the driver blocks that contain the buffers.
    pub reserved: u64,
}

impl Gpu {
    /// Memory in use by this program. `None` if the backend does not report it.
    pub fn allocated(&self) -> Option<AllocatedMemory> {
        let report = self.device().generate_allocator_report()?;
        Some(AllocatedMemory { used: report.total_allocated_bytes, reserved: report.total_reserved_bytes })
    }

    /// Memory of the device. `None` if the backend does not report it (only Vulkan does).
    pub fn memory(&self) -> Option<DeviceMemory> {
        memory(self.device())
    }
}

/// The largest device-local heap. Some cards list the part of their memory that the CPU can map as
/// a second heap.
#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn memory(device: &wgpu::Device) -> Option<DeviceMemory> {
    use ash::vk;

    // SAFETY: this function neither destroys nor keeps any object from the guard.
    let device = unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = device.shared_instance();
    // `vkGetPhysicalDeviceMemoryProperties2` needs the first; the extension fills the chained
    // structure.
    if instance.instance_api_version() < vk::API_VERSION_1_1
        || !device.enabled_device_extensions().contains(&ash::ext::memory_budget::NAME)
    {
        // SAFETY: the physical device is the instance's, and both live as long as `device`.
        let plain = unsafe { instance.raw_instance().get_physical_device_memory_properties(device.raw_physical_device()) };
        return largest(&plain).map(|(_, total)| DeviceMemory { total, available: None, used: None });
    }
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
    // SAFETY: as above; the instance's version has the function, the device has the extension of
    // the chained structure, and the chain lives in this frame.
    unsafe {
        instance.raw_instance().get_physical_device_memory_properties2(device.raw_physical_device(), &mut properties);
    }
    let (heap, total) = largest(&properties.memory_properties)?;
    let (granted, used) = (budget.heap_budget.get(heap)?, budget.heap_usage.get(heap)?);
    let usable = granted / 100 * u64::from(super::adapter::MEMORY_PERCENT);
    Some(DeviceMemory { total, available: Some(usable.saturating_sub(*used)), used: Some(*used) })
}

#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn largest(properties: &ash::vk::PhysicalDeviceMemoryProperties) -> Option<(usize, u64)> {
    let heaps = properties.memory_heaps_as_slice().iter().enumerate();
    let own = heaps.filter(|(_, heap)| heap.flags.contains(ash::vk::MemoryHeapFlags::DEVICE_LOCAL));
    own.map(|(i, heap)| (i, heap.size)).max_by_key(|&(_, size)| size)
}

#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
fn memory(_: &wgpu::Device) -> Option<DeviceMemory> {
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::super::{Gpu, Options};

    /// The sizes of activations of 8,192 tokens: few fill a block of 128 or 256 MiB.
    #[test]
    fn large_buffers_fill_the_blocks_of_the_driver() {
        let Ok(gpu) = Gpu::open(&Options { cache: None, ..Options::from_env() }) else {
            assert!(std::env::var_os("NF4PACK_REQUIRE_GPU").is_none(), "NF4PACK_REQUIRE_GPU is set, but no GPU opens");
            return;
        };
        let before = gpu.allocated();
        let buffers: Vec<_> =
            [135 << 20, 84 << 20, 17 << 20, 135 << 20].map(|size| gpu.storage("large", size).unwrap()).into();
        let Some((before, after)) = before.zip(gpu.allocated()) else { return };
        let used: u64 = buffers.iter().map(|buffer| buffer.size()).sum();
        // The 17 MiB may be a block of its own, and a block for small buffers is nearly empty.
        let slack = 32 << 20;
        assert!(after.reserved - after.used <= before.reserved - before.used + slack, "{used}: {before:?}, {after:?}");
    }
}
