//! How much memory a device has: what WebGPU does not tell.

use super::device::Gpu;

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of its own memory (of an integrated or software GPU: what it may take of the machine's).
    pub total: u64,
    /// What buffers of this program may still take, as the driver estimates it.
    pub available: Option<u64>,
}

/// Memory that a device's buffers take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocatedMemory {
    /// What buffers use.
    pub used: u64,
    /// What was taken of the driver for them, in larger blocks.
    pub reserved: u64,
}

impl Gpu {
    /// What this program's buffers take now, or `None` where the backend does not tell.
    pub fn allocated(&self) -> Option<AllocatedMemory> {
        let report = self.device().generate_allocator_report()?;
        Some(AllocatedMemory { used: report.total_allocated_bytes, reserved: report.total_reserved_bytes })
    }

    /// The device's own memory, or `None` where the backend does not tell (all but Vulkan).
    pub fn memory(&self) -> Option<DeviceMemory> {
        memory(self.device())
    }
}

/// The largest heap that is the device's own: cards whose memory the CPU sees through a window list that window as a second one.
#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn memory(device: &wgpu::Device) -> Option<DeviceMemory> {
    use ash::vk;

    // SAFETY: nothing that the guard gives is destroyed or kept past this function.
    let device = unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = device.shared_instance();
    // What `vkGetPhysicalDeviceMemoryProperties2` needs, and what fills the structure chained to it.
    if instance.instance_api_version() < vk::API_VERSION_1_1
        || !device.enabled_device_extensions().contains(&ash::ext::memory_budget::NAME)
    {
        // SAFETY: the physical device is the instance's, and both live as long as `device`.
        let plain = unsafe { instance.raw_instance().get_physical_device_memory_properties(device.raw_physical_device()) };
        return largest(&plain).map(|(_, total)| DeviceMemory { total, available: None });
    }
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
    // SAFETY: as above; the instance's version has the function, the device has the extension of the chained structure, and the
    // chain lives in this frame.
    unsafe {
        instance.raw_instance().get_physical_device_memory_properties2(device.raw_physical_device(), &mut properties);
    }
    let (heap, total) = largest(&properties.memory_properties)?;
    let (granted, used) = (budget.heap_budget.get(heap)?, budget.heap_usage.get(heap)?);
    let usable = granted / 100 * u64::from(super::adapter::MEMORY_PERCENT);
    Some(DeviceMemory { total, available: Some(usable.saturating_sub(*used)) })
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
