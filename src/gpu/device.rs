//! An open device: limits, errors, waiting.

use std::sync::{Arc, Mutex, PoisonError};

use super::adapter::{self, AdapterSummary};
use super::error::GpuError;
use super::pipeline::Registry;

/// How a device is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Index or part of the name of the adapter; `None` takes the best one.
    pub adapter: Option<String>,
    /// Compile trusted kernels with wgpu's runtime checks, too.
    pub checked: bool,
    /// Time every kernel.
    pub profile: bool,
    /// Bytes that one binding may have, where less than the device allows (to try the paths of small devices).
    pub max_binding: Option<u64>,
    /// Bytes that one buffer may have, likewise.
    pub max_buffer: Option<u64>,
}

impl Options {
    /// What the environment asks for: `NF4PACK_ADAPTER`, `NF4PACK_CHECKED=1`, `NF4PACK_PROFILE=1`.
    pub fn from_env() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|v| v == "1");
        Self {
            adapter: std::env::var("NF4PACK_ADAPTER").ok().filter(|v| !v.is_empty()),
            checked: set("NF4PACK_CHECKED"),
            profile: set("NF4PACK_PROFILE"),
            ..Self::default()
        }
    }
}

/// An open device with its queue. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Gpu(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) adapter: AdapterSummary,
    pub(super) info: wgpu::AdapterInfo,
    pub(super) limits: wgpu::Limits,
    pub(super) checked: bool,
    pub(super) registry: Registry,
    fault: Arc<Mutex<Option<GpuError>>>,
}

impl Gpu {
    /// Opens the adapter that `options` names, with the adapter's own limits.
    ///
    /// # Errors
    /// [`GpuError::NoAdapter`], [`GpuError::NoSuchAdapter`], [`GpuError::NoDevice`].
    pub fn open(options: &Options) -> Result<Self, GpuError> {
        let (summary, adapter) = adapter::choose(options.adapter.as_deref())?;
        let mut limits = adapter.limits();
        limits.max_storage_buffer_binding_size =
            limits.max_storage_buffer_binding_size.min(options.max_binding.unwrap_or(u64::MAX));
        limits.max_buffer_size = limits.max_buffer_size.min(options.max_buffer.unwrap_or(u64::MAX));
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("nf4pack"),
            required_features: adapter.features() & wanted_features(),
            required_limits: limits,
            ..Default::default()
        };
        let opened = pollster::block_on(adapter.request_device(&descriptor));
        let (device, queue) =
            opened.map_err(|e| GpuError::NoDevice { adapter: summary.to_string(), reason: e.to_string() })?;
        let fault = Arc::new(Mutex::new(None));
        catch_faults(&device, &fault);
        Ok(Self(Arc::new(Inner {
            limits: device.limits(),
            registry: Registry::default(),
            adapter: summary,
            info: adapter.get_info(),
            checked: options.checked,
            device,
            queue,
            fault,
        })))
    }

    /// The adapter.
    pub fn adapter(&self) -> &AdapterSummary {
        &self.0.adapter
    }

    /// What the device allows.
    pub fn limits(&self) -> &wgpu::Limits {
        &self.0.limits
    }

    /// Features in use.
    pub fn features(&self) -> wgpu::Features {
        self.0.device.features()
    }

    /// Smallest and largest subgroup that a kernel may be run with.
    pub fn subgroup_sizes(&self) -> (u32, u32) {
        (self.0.info.subgroup_min_size, self.0.info.subgroup_max_size)
    }

    /// The wgpu device, for programs with kernels of their own.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// The device's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }

    /// Waits until everything that was submitted is done.
    ///
    /// # Errors
    /// What went wrong on the device since the last call.
    pub fn wait(&self) -> Result<(), GpuError> {
        let polled = self.0.device.poll(wgpu::PollType::wait_indefinitely());
        self.fault()?;
        polled.map(drop).map_err(|e| GpuError::DeviceLost { reason: e.to_string() })
    }

    /// An error that no call returned: one of the driver's, or the loss of the device (which stays).
    ///
    /// # Errors
    /// That error.
    pub fn fault(&self) -> Result<(), GpuError> {
        let mut fault = self.0.fault.lock().unwrap_or_else(PoisonError::into_inner);
        match fault.as_ref() {
            None => Ok(()),
            Some(lost @ GpuError::DeviceLost { .. }) => Err(lost.clone()),
            Some(_) => fault.take().map_or(Ok(()), Err),
        }
    }

    /// Runs `work` and turns wgpu's errors in it into ours.
    pub(super) fn guarded<T>(&self, what: &str, work: impl FnOnce(&wgpu::Device) -> T) -> Result<T, GpuError> {
        let device = &self.0.device;
        let invalid = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let result = work(device);
        let errors = [memory.pop(), internal.pop(), invalid.pop()].map(pollster::block_on);
        self.fault()?;
        match errors.into_iter().flatten().next() {
            None => Ok(result),
            Some(e) => Err(from_wgpu(what, &e)),
        }
    }
}

fn from_wgpu(what: &str, error: &wgpu::Error) -> GpuError {
    match error {
        wgpu::Error::OutOfMemory { .. } => GpuError::OutOfMemory { what: what.to_owned(), asked: 0, in_use: 0 },
        other => GpuError::Invalid { what: what.to_owned(), reason: other.to_string() },
    }
}

/// What is used where it is offered.
fn wanted_features() -> wgpu::Features {
    wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE | wgpu::Features::SUBGROUP | wgpu::Features::SHADER_F16
}

/// Sends errors that no scope catches into `fault` in place of a panic; the first one stays until it is seen, a loss for good.
fn catch_faults(device: &wgpu::Device, fault: &Arc<Mutex<Option<GpuError>>>) {
    let keep = |fault: &Mutex<Option<GpuError>>, error: GpuError| {
        let mut fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.is_none() || matches!(error, GpuError::DeviceLost { .. }) {
            *fault = Some(error);
        }
    };
    let (uncaptured, lost) = (fault.clone(), fault.clone());
    device.on_uncaptured_error(Arc::new(move |e| keep(&uncaptured, from_wgpu("GPU work", &e))));
    device.set_device_lost_callback(move |reason, message| {
        keep(&lost, GpuError::DeviceLost { reason: format!("{reason:?}: {message}") });
    });
}
