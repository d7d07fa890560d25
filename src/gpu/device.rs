//! An open device: limits, errors, waiting.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::adapter::{self, AdapterSummary};
use super::cache::{self, Cache};
use super::error::GpuError;
use super::pipeline::Registry;
use super::timing::Profiler;
use super::verdict::Known;

/// A wait polls this long at a time: wgpu holds a lock that others may need as long as it waits.
const STEP: Duration = Duration::from_millis(200);
/// Submissions that take longer have hung: as many as may be under way, each of a layer at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);
/// Submissions under way at a time: enough to keep a device busy, and so few that waiting for the last of them is not waiting for a
/// whole training step of minutes.
const UNDER_WAY: usize = 16;

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
    /// Workgroups that a dispatch may have in one dimension, likewise.
    pub max_groups: Option<u32>,
    /// Folder where compiled kernels and other records are kept between runs; `None` keeps nothing.
    pub cache: Option<PathBuf>,
}

impl Options {
    /// What the environment asks for: `NF4PACK_ADAPTER`, `NF4PACK_CHECKED=1`, `NF4PACK_PROFILE=1`, `NF4PACK_CACHE_DIR` (empty:
    /// no cache; unset: the user's folder for caches).
    pub fn from_env() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|v| v == "1");
        Self {
            adapter: std::env::var("NF4PACK_ADAPTER").ok().filter(|v| !v.is_empty()),
            checked: set("NF4PACK_CHECKED"),
            profile: set("NF4PACK_PROFILE"),
            cache: cache::default_folder(),
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
    pub(super) cache: Cache,
    pub(super) known: Known,
    pub(super) registry: Registry,
    pub(super) profiler: Option<Profiler>,
    fault: Arc<Mutex<Option<GpuError>>>,
    under_way: Mutex<VecDeque<wgpu::SubmissionIndex>>,
}

impl Gpu {
    /// Opens the adapter that `options` names, with the adapter's own limits.
    ///
    /// # Errors
    /// [`GpuError::NoAdapter`], [`GpuError::NoSuchAdapter`], [`GpuError::NoDevice`]; [`GpuError::NoFeature`] where kernels are to be
    /// timed on a device without timestamps.
    pub fn open(options: &Options) -> Result<Self, GpuError> {
        let (summary, adapter) = adapter::find(options.adapter.as_deref())?;
        let mut limits = adapter.limits();
        limits.max_storage_buffer_binding_size =
            limits.max_storage_buffer_binding_size.min(options.max_binding.unwrap_or(u64::MAX));
        limits.max_buffer_size = limits.max_buffer_size.min(options.max_buffer.unwrap_or(u64::MAX));
        limits.max_compute_workgroups_per_dimension =
            limits.max_compute_workgroups_per_dimension.min(options.max_groups.unwrap_or(u32::MAX));
        let features = adapter.features() & wanted_features();
        if options.profile && !features.contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Err(GpuError::NoFeature { what: "timing kernels", feature: "TIMESTAMP_QUERY" });
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("nf4pack"),
            required_features: features,
            required_limits: limits,
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
            adapter: summary,
            info,
            checked: options.checked,
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

    /// What the device allows.
    pub fn limits(&self) -> &wgpu::Limits {
        &self.0.limits
    }

    /// Features in use.
    pub fn features(&self) -> wgpu::Features {
        self.0.device.features()
    }

    /// Names of the features in use, as wgpu has them.
    pub fn feature_names(&self) -> Vec<&'static str> {
        self.features().iter_names().map(|(name, _)| name).collect()
    }

    /// Smallest and largest subgroup that a kernel may be run with.
    pub fn subgroup_sizes(&self) -> (u32, u32) {
        (self.0.info.subgroup_min_size, self.0.info.subgroup_max_size)
    }

    /// Whether trusted kernels, too, run with wgpu's runtime checks.
    pub fn is_checked(&self) -> bool {
        self.0.checked
    }

    /// Bytes of memory that live buffers of this device (and wgpu's own) take, where the backend tells.
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

    /// Waits until everything that was submitted is done.
    ///
    /// # Errors
    /// What went wrong on the device since the last call.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.wait_until(None)
    }

    /// Waits for a submission, or for all of them.
    pub(super) fn wait_until(&self, submission: Option<&wgpu::SubmissionIndex>) -> Result<(), GpuError> {
        self.fault()?;
        self.poll_until(submission)?;
        self.fault()
    }

    /// Counts a submission as under way; where there are many, waits for the oldest.
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
            // A lost device is not polled: wgpu panics where a wait fails.
            self.lost()?;
            let wait = wgpu::PollType::Wait { submission_index: submission.cloned(), timeout: Some(STEP) };
            let polled = caught(|| self.0.device.poll(wait));
            self.lost()?;
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

    /// The loss of the device, if that is what is behind `error`. It is told only once the queue has run dry.
    pub(super) fn lost_or(&self, error: GpuError) -> GpuError {
        match self.poll_until(None) {
            Err(lost @ GpuError::DeviceLost { .. }) => lost,
            _ => error,
        }
    }

    /// An error that no call returned: one of the driver's, or the loss of the device (which stays).
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

    /// Runs `work` and turns wgpu's errors and panics in it into ours.
    pub(super) fn guarded<T>(&self, what: &str, work: impl FnOnce(&wgpu::Device) -> T) -> Result<T, GpuError> {
        self.guarded_taking(0, what, work)
    }

    /// [`Gpu::guarded`] for work that takes `bytes` of the device's memory.
    pub(super) fn guarded_taking<T>(
        &self,
        bytes: u64,
        what: &str,
        work: impl FnOnce(&wgpu::Device) -> T,
    ) -> Result<T, GpuError> {
        self.lost()?;
        let device = &self.0.device;
        // Scopes are per thread, and wgpu calls back on the thread that erred: what other threads do stays out of these.
        let invalid = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let result = caught(|| work(device));
        let errors = [memory.pop(), internal.pop(), invalid.pop()].map(pollster::block_on);
        // The loss of a device is told by a callback only, which a poll runs.
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

/// Runs `work`; the message of a panic is the error. wgpu's only way to say that a wait failed is to panic, and its shader writers
/// do so on WGSL that they do not handle. It takes no lock of ours along.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let message = |panic: Box<dyn Any + Send>| match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic.downcast_ref::<&str>().copied().unwrap_or("a panic without a message").to_owned(),
    };
    catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

fn from_wgpu(what: &str, bytes: u64, in_use: impl FnOnce() -> Option<u64>, error: &wgpu::Error) -> GpuError {
    match error {
        wgpu::Error::OutOfMemory { .. } => GpuError::OutOfMemory { what: what.to_owned(), asked: bytes, in_use: in_use() },
        other => GpuError::invalid(what, other.to_string()),
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
        assert_eq!(error.to_string(), "out of GPU memory: weights takes 64 bytes, beside 7 bytes in use");
        let error = from_wgpu("weights", 64, || None, &wgpu::Error::OutOfMemory { source: source() });
        assert_eq!(error.to_string(), "out of GPU memory: weights takes 64 bytes");
        let error = from_wgpu("commands", 0, || None, &wgpu::Error::OutOfMemory { source: source() });
        assert_eq!(error.to_string(), "out of GPU memory: commands");
        let invalid = wgpu::Error::Validation { source: source(), description: "too odd".to_owned() };
        assert_eq!(from_wgpu("weights", 64, || None, &invalid).to_string(), "weights: too odd");
        let internal = wgpu::Error::Internal { source: source(), description: "too new".to_owned() };
        assert_eq!(from_wgpu("weights", 64, || None, &internal).to_string(), "weights: too new");
    }

    #[test]
    fn panics_become_errors() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| -> u8 { panic!("a literal") }), Err("a literal".to_owned()));
        let number = 8;
        assert_eq!(caught(|| -> u8 { panic!("number {number}") }), Err("number 8".to_owned()));
    }
}
