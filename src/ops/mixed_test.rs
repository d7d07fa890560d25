//! The tests of kernels on matrix units, which decide the precision of a model on a device.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::OpError;
use crate::gpu::{Gpu, GpuError, KernelSpec};

/// The comparison of a kernel on matrix units, or of several kernels that work together, with the
/// CPU.
pub struct MixedTest<'a> {
    gpu: &'a Gpu,
    /// The kernel in words.
    pub kernel: String,
    /// What the comparison covers, in words.
    pub covers: String,
    specs: Vec<KernelSpec>,
    test: Box<dyn Fn() -> Result<(), OpError> + 'a>,
}

impl fmt::Debug for MixedTest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MixedTest").field(&self.kernel).finish()
    }
}

impl<'a> MixedTest<'a> {
    /// The kernel and what the comparison covers, in words. `specs`: what the kernels are compiled
    /// from.
    pub(super) fn new(
        gpu: &'a Gpu,
        [kernel, covers]: [String; 2],
        specs: Vec<KernelSpec>,
        test: impl Fn() -> Result<(), OpError> + 'a,
    ) -> Self {
        Self { gpu, kernel, covers, specs, test: Box::new(test) }
    }

    /// The result of the last run on this driver. The error is the reason against the kernel.
    pub fn kept(&self) -> Option<Result<(), String>> {
        self.gpu.kept_verdict(&self.specs)
    }

    /// Compiles the kernels and compares them with the CPU. The result is kept for `gpu`, which may
    /// be the device of the test, or another one that is open on the same adapter.
    ///
    /// # Errors
    /// [`OpError::Unfit`], [`OpError::Gpu`].
    pub fn run(&self, gpu: &Gpu) -> Result<(), OpError> {
        let found = (self.test)();
        let verdict = found.as_ref().map_or_else(|error| reason(error).map(Err), |()| Some(Ok(())));
        if let Some(verdict) = verdict {
            gpu.keep_verdict(&self.specs, &verdict);
        }
        found
    }
}

/// Compiles the kernels of tests, many at a time: a driver takes a second for some of them. A
/// failure is found again by the test of the kernel.
pub fn compile<'a>(tests: impl IntoIterator<Item = &'a MixedTest<'a>>) {
    let specs: Vec<(&Gpu, &KernelSpec)> =
        tests.into_iter().flat_map(|test| test.specs.iter().map(|spec| (test.gpu, spec))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((gpu, spec)) = specs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let _ = gpu.kernel(spec);
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(specs.len());
    thread::scope(|scope| {
        // This thread works, too, also where no other can be started.
        for _ in 1..threads {
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

/// Why a kernel cannot be used, if the error of its test is not one of anything else, such as a
/// lack of memory.
pub fn reason(error: &OpError) -> Option<String> {
    use GpuError::{DeviceLost, Invalid, KernelLimit, Timeout};
    match error {
        OpError::Unfit { kernel, reason, .. } => {
            Some(format!("the kernel {kernel} for matrix units gives wrong values on this driver: {reason}"))
        }
        OpError::Gpu(e @ (Invalid { .. } | KernelLimit { .. } | DeviceLost { .. } | Timeout { .. })) => {
            Some(format!("a kernel for matrix units does not run on this driver: {e}"))
        }
        _ => None,
    }
}
