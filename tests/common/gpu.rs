//! The device that GPU tests run on.

use std::sync::OnceLock;

use nf4pack::gpu::{DRIVER_HINT, Gpu, GpuError, Options};

/// The device that GPU tests run on, or `None` where there is none: a loud skip, and under
/// `NF4PACK_REQUIRE_GPU=1` a failure. All tests of a binary share it: software drivers take seconds
/// to compile a model's kernels.
pub fn gpu() -> Option<Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(own_gpu).clone()
}

/// A device of the test's own, for a test that loses it, leaves a fault in it or counts its memory.
pub fn own_gpu() -> Option<Gpu> {
    gpu_with(|_| {})
}

/// A device of the test's own with other options. `NF4PACK_ADAPTER` and `NF4PACK_CHECKED` apply;
/// nothing is kept between runs.
pub fn gpu_with(change: impl FnOnce(&mut Options)) -> Option<Gpu> {
    let mut options = Options { cache: None, ..Options::from_env() };
    change(&mut options);
    match Gpu::open(&options) {
        Ok(gpu) => Some(gpu),
        Err(GpuError::NoAdapter) if std::env::var_os("NF4PACK_REQUIRE_GPU").is_none_or(|v| v != "1") => {
            eprintln!("SKIPPED: no GPU, not even a software one ({DRIVER_HINT})");
            None
        }
        Err(e) => panic!("{e}"),
    }
}
