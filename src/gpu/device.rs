//! An open device: limits, errors and waiting.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::adapter::{self, AdapterSummary};
use super::bind_groups::BindGroups;
use super::cache::{self, Cache, Known};
use super::error::GpuError;
use super::matrix_units::{self, MatrixUnits, UseMatrixUnits};
use super::params::Params;
use super::pipeline::Registry;
use super::profile::Profiler;
use crate::panics::caught;

/// Duration of one poll. wgpu holds a lock during a poll, and other threads may need that lock.
const STEP: Duration = Duration::from_millis(200);
/// Time after which a submission counts as hung. It covers all submissions in flight, each of one
/// layer, or of few tokens in all layers.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);
/// The start of a panic of wgpu-core 30.0.2: another thread saw the end of the last submission
/// after a poll had asked for it (mended by <https://github.com/gfx-rs/wgpu/pull/9958>). The device
/// works, and the next poll asks again.
const RACE: &str = "If the queue is empty, the current submission index";
/// Submissions in flight at a time. This keeps a device busy, and a wait for the last submission
/// stays short compared to a training step.
const UNDER_WAY: usize = 16;
/// Bytes of the driver's blocks that buffers share. A larger buffer has a block of its own. With
/// the default of 128 to 256 MiB, activations of a long batch fill only nine tenths of their
/// blocks.
const BLOCKS: std::ops::Range<u64> = 8 << 20..16 << 20;

/// Options for opening a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Index of the adapter, or a substring of its name. `None` selects the best adapter.
    pub adapter: Option<String>,
    /// Also compile trusted kernels with the runtime checks of wgpu.
    pub checked: bool,
    /// Measure the time of every kernel.
    pub profile: bool,
    /// Maximum bytes of a binding, if below the device limit. Tests use it to imitate small
    /// devices.
    pub max_binding: Option<u64>,
    /// Maximum bytes of a buffer, if below the device limit.
    pub max_buffer: Option<u64>,
    /// Maximum workgroups of a dispatch in one dimension, if below the device limit.
    pub max_groups: Option<u32>,
    /// The use of matrix units.
    pub matrix_units: UseMatrixUnits,
    /// Folder for compiled kernels and other records between runs. `None` stores nothing.
    pub cache: Option<PathBuf>,
}

impl Options {
    /// Reads the options from the environment: `NF4PACK_ADAPTER`, `NF4PACK_CHECKED=1`,
    /// `NF4PACK_PROFILE=1`, `NF4PACK_MATRIX_UNITS` (`off`, `loops`; else where the device has them)
    /// and `NF4PACK_CACHE_DIR` (empty: no cache; unset: the user's cache folder).
    pub fn from_env() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|v| v == "1");
        Self {
            adapter: std::env::var("NF4PACK_ADAPTER").ok().filter(|v| !v.is_empty()),
            checked: set("NF4PACK_CHECKED"),
            profile: set("NF4PACK_PROFILE"),
            matrix_units: match std::env::var("NF4PACK_MATRIX_UNITS").as_deref() {
                Ok("off") => UseMatrixUnits::Off,
                Ok("loops") => UseMatrixUnits::Loops,
                _ => UseMatrixUnits::Auto,
            },
            cache: cache::default_folder(),
            ..Self::default()
        }
    }
}

/// An open device with its queue. Clones share the device.
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
    pub(super) matrix_units: Result<MatrixUnits, String>,
    pub(super) cache: Cache,
    pub(super) known: Known,
    pub(super) registry: Registry,
    pub(super) bind_groups: Arc<BindGroups>,
    pub(super) params: Params,
    pub(super) profiler: Option<Profiler>,
    fault: Arc<Mutex<Option<GpuError>>>,
    under_way: Mutex<VecDeque<wgpu::SubmissionIndex>>,
}

/// Submitted work.
#[derive(Debug, Clone)]
pub struct Submission(pub(super) wgpu::SubmissionIndex);

impl Gpu {
    /// Opens the adapter that `options` selects, with the limits of that adapter.
    ///
    /// # Errors
    /// [`GpuError::NoAdapter`], [`GpuError::NoSuchAdapter`], [`GpuError::NoDevice`];
    /// [`GpuError::NoFeature`] if kernels should be timed on a device without timestamps.
    pub fn open(options: &Options) -> Result<Self, GpuError> {
        Self::open_with(options, |adapter| matrix_units::decide(options.matrix_units, adapter))
    }

    /// As [`Gpu::open`], without the use of matrix units. [`Gpu::matrix_units`] returns `reason`.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open_without_matrix_units(options: &Options, reason: &str) -> Result<Self, GpuError> {
        Self::open_with(options, |_| Err(reason.to_owned()))
    }

    fn open_with(
        options: &Options,
        decide: impl FnOnce(&wgpu::Adapter) -> Result<MatrixUnits, String>,
    ) -> Result<Self, GpuError> {
        let (summary, adapter) = adapter::find(options.adapter.as_deref())?;
        let mut limits = adapter.limits();
        limits.max_storage_buffer_binding_size =
            limits.max_storage_buffer_binding_size.min(options.max_binding.unwrap_or(u64::MAX));
        limits.max_buffer_size = limits.max_buffer_size.min(options.max_buffer.unwrap_or(u64::MAX));
        limits.max_compute_workgroups_per_dimension =
            limits.max_compute_workgroups_per_dimension.min(options.max_groups.unwrap_or(u32::MAX));
        let matrix_units = decide(&adapter);
        let mut wanted = wanted_features();
        if matrix_units == Ok(MatrixUnits::Hardware) {
            wanted |= matrix_units::features();
        }
        let features = adapter.features() & wanted;
        if options.profile && !features.contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Err(GpuError::NoFeature { what: "timing kernels", feature: "TIMESTAMP_QUERY" });
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("nf4pack"),
            required_features: features,
            required_limits: limits,
            experimental_features: matrix_units::experimental(features),
            memory_hints: wgpu::MemoryHints::Manual { suballocated_device_memory_block_size: BLOCKS },
            ..Default::default()
        };
        let opened = pollster::block_on(adapter.request_device(&descriptor));
        let (device, queue) =
            opened.map_err(|e| GpuError::NoDevice { adapter: summary.to_string(), reason: e.to_string() })?;
        let fault = Arc::new(Mutex::new(None));
        catch_faults(&device, &fault);
        let info = adapter.get_info();
        let cache = Cache::new(options.cache.as_deref(), &info);
        Ok(Self(Arc::new(Inner {
            limits: device.limits(),
            registry: Registry::new(&device, &cache),
            bind_groups: Arc::default(),
            params: Params::new(&device),
            adapter: summary,
            info,
            checked: options.checked,
            matrix_units,
            profiler: options.profile.then(Profiler::default),
            under_way: Mutex::default(),
            known: Known::default(),
            cache,
            device,
            queue,
            fault,
        })))
    }

    /// The adapter.
    pub fn adapter(&self) -> &AdapterSummary {
        &self.0.adapter
    }

    /// Limits of the device.
    pub fn limits(&self) -> &wgpu::Limits {
        &self.0.limits
    }

    /// Enabled features.
    pub fn features(&self) -> wgpu::Features {
        self.0.device.features()
    }

    /// Names of the enabled features in wgpu.
    pub fn feature_names(&self) -> Vec<&'static str> {
        self.features().iter_names().map(|(name, _)| name).collect()
    }

    /// Minimum and maximum subgroup size of a kernel.
    pub fn subgroup_sizes(&self) -> (u32, u32) {
        (self.0.info.subgroup_min_size, self.0.info.subgroup_max_size)
    }

    /// How kernels for matrix units run on this device, or the reason why they do not.
    ///
    /// # Errors
    /// The reason.
    pub fn matrix_units(&self) -> Result<MatrixUnits, &str> {
        self.0.matrix_units.as_ref().copied().map_err(String::as_str)
    }

    /// Whether trusted kernels also run with the runtime checks of wgpu.
    pub fn is_checked(&self) -> bool {
        self.0.checked
    }

    /// Bytes of memory in the live buffers of this device and of wgpu itself. `None` if the backend
    /// does not report it.
    pub fn bytes_in_use(&self) -> Option<u64> {
        self.0.device.generate_allocator_report().map(|report| report.total_allocated_bytes)
    }

    /// The wgpu device, for programs with kernels of their own.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// The device's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }

    /// Waits for all submitted work.
    ///
    /// # Errors
    /// Any device error since the last call.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.wait_until(None)
    }

    /// Waits for a submission.
    ///
    /// # Errors
    /// Any device error.
    pub fn wait_for(&self, submission: &Submission) -> Result<(), GpuError> {
        self.wait_until(Some(&submission.0))
    }

    /// Waits for a submission, or for all of them.
    fn wait_until(&self, submission: Option<&wgpu::SubmissionIndex>) -> Result<(), GpuError> {
        self.fault()?;
        self.poll_until(submission)?;
        self.fault()
    }

    /// Registers a submission as in flight. Waits for the oldest one if the limit is reached.
    pub(super) fn pace(&self, submission: &wgpu::SubmissionIndex) -> Result<(), GpuError> {
        let oldest = {
            let mut under_way = self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            under_way.push_back(submission.clone());
            if under_way.len() > UNDER_WAY { under_way.pop_front() } else { None }
        };
        oldest.map_or(Ok(()), |oldest| self.poll_until(Some(&oldest)))
    }

    fn poll_until(&self, submission: Option<&wgpu::SubmissionIndex>) -> Result<(), GpuError> {
        let started = Instant::now();
        loop {
            // Never poll a lost device: wgpu panics if a wait fails.
            self.lost()?;
            let wait = wgpu::PollType::Wait { submission_index: submission.cloned(), timeout: Some(STEP) };
            let polled = caught(|| self.0.device.poll(wait));
            self.lost()?;
            if polled.as_ref().is_err_and(|reason| reason.starts_with(RACE)) && started.elapsed() < PATIENCE {
                continue;
            }
            match polled.map_err(|reason| GpuError::DeviceLost { reason })? {
                Ok(_) => return Ok(()),
                Err(wgpu::PollError::Timeout) if started.elapsed() < PATIENCE => {}
                Err(wgpu::PollError::Timeout) => return Err(GpuError::Timeout { seconds: PATIENCE.as_secs() }),
                Err(e @ wgpu::PollError::WrongSubmissionIndex(..)) => {
                    return Err(self.lost_or(GpuError::invalid("waiting", e.to_string())));
                }
            }
        }
    }

    /// Returns the loss of the device in place of `error`, if the device is lost. wgpu reports the
    /// loss only once the queue is empty.
    pub(super) fn lost_or(&self, error: GpuError) -> GpuError {
        self.loss().unwrap_or(error)
    }

    /// The loss of the device, if it is lost. Waits for all submitted work.
    pub(super) fn loss(&self) -> Option<GpuError> {
        self.poll_until(None).err().filter(|error| matches!(error, GpuError::DeviceLost { .. }))
    }

    /// Returns an error that no call has returned: an error of the driver, or the loss of the
    /// device. A loss is returned each time.
    ///
    /// # Errors
    /// That error.
    pub fn fault(&self) -> Result<(), GpuError> {
        self.lost()?;
        self.fault_slot().take().map_or(Ok(()), Err)
    }

    fn lost(&self) -> Result<(), GpuError> {
        match &*self.fault_slot() {
            Some(lost @ GpuError::DeviceLost { .. }) => Err(lost.clone()),
            _ => Ok(()),
        }
    }

    fn fault_slot(&self) -> std::sync::MutexGuard<'_, Option<GpuError>> {
        self.0.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` and converts errors and panics of wgpu to [`GpuError`].
    pub(super) fn guarded<T>(&self, what: &str, work: impl FnOnce(&wgpu::Device) -> T) -> Result<T, GpuError> {
        self.guarded_taking(0, what, work)
    }

    /// As [`Gpu::guarded`], for work that allocates `bytes` of device memory.
    pub(super) fn guarded_taking<T>(
        &self,
        bytes: u64,
        what: &str,
        work: impl FnOnce(&wgpu::Device) -> T,
    ) -> Result<T, GpuError> {
        self.lost()?;
        let device = &self.0.device;
        // An error scope belongs to a thread, and wgpu reports an error on the thread that caused
        // it. So errors of other threads stay out of these scopes.
        let invalid = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        // wgpu panics if a wait fails, and its shader writers panic on WGSL that they do not
        // support. `work` holds no lock of this crate.
        let result = caught(|| work(device));
        let errors = [memory.pop(), internal.pop(), invalid.pop()].map(pollster::block_on);
        // wgpu reports the loss of a device by a callback alone. A poll runs that callback.
        let _ = caught(|| device.poll(wgpu::PollType::Poll));
        self.lost()?;
        let error = match errors.into_iter().flatten().next() {
            Some(e) => from_wgpu(what, bytes, || self.bytes_in_use(), &e),
            None => match result {
                Ok(result) => return Ok(result),
                Err(reason) => GpuError::invalid(what, reason),
            },
        };
        Err(self.lost_or(error))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let lost = matches!(&*self.fault.lock().unwrap_or_else(PoisonError::into_inner), Some(GpuError::DeviceLost { .. }));
        if !lost {
            self.registry.save(&self.cache);
        }
    }
}

fn from_wgpu(what: &str, bytes: u64, in_use: impl FnOnce() -> Option<u64>, error: &wgpu::Error) -> GpuError {
    match error {
        wgpu::Error::OutOfMemory { .. } => {
            GpuError::OutOfMemory { what: what.to_owned(), requested: bytes, in_use: in_use() }
        }
        other => GpuError::invalid(what, other.to_string()),
    }
}

/// Features that are enabled if the adapter has them.
fn wanted_features() -> wgpu::Features {
    wgpu::Features::MAPPABLE_PRIMARY_BUFFERS
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::PIPELINE_CACHE
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SHADER_F16
}

/// Stores errors outside of any scope in `fault` instead of panicking. The first error stays until
/// it is read. A loss stays forever.
fn catch_faults(device: &wgpu::Device, fault: &Arc<Mutex<Option<GpuError>>>) {
    let keep = |fault: &Mutex<Option<GpuError>>, error: GpuError| {
        let mut fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.is_none() || matches!(error, GpuError::DeviceLost { .. }) {
            *fault = Some(error);
        }
    };
    let (uncaptured, lost) = (fault.clone(), fault.clone());
    device.on_uncaptured_error(Arc::new(move |e| keep(&uncaptured, from_wgpu("GPU work", 0, || None, &e))));
    device.set_device_lost_callback(move |reason, message| {
        let reason = format!("{reason:?} {message}").trim_end().to_lowercase();
        keep(&lost, GpuError::DeviceLost { reason });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_wgpu_keep_what_was_asked_and_why() {
        let source = || Box::new(std::fmt::Error);
        let error = from_wgpu("weights", 64, || Some(7), &wgpu::Error::OutOfMemory { source: source() });
        assert_eq!(error.to_string(), "out of GPU memory: weights takes 64 bytes, with 7 bytes in use");
        let error = from_wgpu("weights", 64, || None, &wgpu::Error::OutOfMemory { source: source() });
        assert_eq!(error.to_string(), "out of GPU memory: weights takes 64 bytes");
        let error = from_wgpu("commands", 0, || None, &wgpu::Error::OutOfMemory { source: source() });
        assert_eq!(error.to_string(), "out of GPU memory: commands");
        let invalid = wgpu::Error::Validation { source: source(), description: "too odd".to_owned() };
        assert_eq!(from_wgpu("weights", 64, || None, &invalid).to_string(), "weights: too odd");
        let internal = wgpu::Error::Internal { source: source(), description: "too new".to_owned() };
        assert_eq!(from_wgpu("weights", 64, || None, &internal).to_string(), "weights: too new");
    }
}
