//! Tests kernels against the CPU before their first use on a device, as `dequant::selftest` does
//! for the decoders. Here no second kernel can replace a failed one, so a failure is an error.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use crate::format::FloatType;
use crate::gpu::{Gpu, Kernel, KernelSpec};
use crate::ops::OpError;

/// Minimum binding limit for a kernel test. WebGPU guarantees 128 MiB, so a lower limit was set by
/// a test.
pub(super) const ROOM: u64 = 1 << 20;

/// Kernels of a device, which are compiled and tested on first use. The results are stored between
/// runs.
#[derive(Debug)]
pub(super) struct Tried<K> {
    gpu: Gpu,
    kernels: Mutex<HashMap<K, Kernel>>,
    /// A text replacement in every shader, for tests.
    #[cfg(test)]
    patch: Option<[&'static str; 2]>,
}

impl<K: Copy + Eq + Hash> Tried<K> {
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            kernels: Mutex::default(),
            #[cfg(test)]
            patch: None,
        }
    }

    /// Broken kernels for tests: in every shader, the second text replaces the first. They run with
    /// runtime checks.
    #[cfg(test)]
    pub fn patched(gpu: &Gpu, patch: [&'static str; 2]) -> Self {
        Self { patch: Some(patch), ..Self::new(gpu) }
    }

    /// The kernel for `key`, compiled from `spec`. Before its first use on this device and driver,
    /// `trial` compares it with the CPU.
    ///
    /// # Errors
    /// [`OpError::Unfit`] if the values differ; [`OpError::Gpu`] if it does not compile.
    pub fn get(
        &self,
        key: K,
        spec: impl FnOnce() -> KernelSpec,
        trial: impl FnOnce(&Kernel) -> Result<Option<String>, OpError>,
    ) -> Result<Kernel, OpError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        let spec = self.spec(spec);
        let kernel = self.gpu.kernel(&spec)?;
        if self.gpu.limits().max_storage_buffer_binding_size >= ROOM {
            let find = || trial(&kernel)?.map_or(Ok(()), |reason| Err(self.unfit(&spec, &kernel, reason)));
            self.gpu.recall_or_find(&spec, |record| (record == PASSED).then_some(()), |()| PASSED.to_vec(), find)?;
        }
        kernels.insert(key, kernel.clone());
        Ok(kernel)
    }

    /// The kernels that were used.
    #[cfg(test)]
    pub fn used(&self) -> Vec<K> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// What [`Tried::get`] compiles.
    pub fn spec(&self, spec: impl FnOnce() -> KernelSpec) -> KernelSpec {
        let spec = spec();
        #[cfg(test)]
        let spec = self.patch.iter().fold(spec, |spec, [from, to]| spec.patched(from, to));
        spec
    }

    fn unfit(&self, spec: &KernelSpec, kernel: &Kernel, reason: String) -> OpError {
        let constants: Vec<String> = spec.constants.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let with = if constants.is_empty() { String::new() } else { format!(" with {}", constants.join(", ")) };
        OpError::Unfit { kernel: format!("{}{with}", kernel.name()), device: self.gpu.adapter().to_string(), reason }
    }
}

/// The record of a kernel that passed.
pub(super) const PASSED: &[u8] = b"passed";

/// Describes the first element that differs from the expected value by more than its tolerance. NaN
/// equals only NaN.
pub(super) fn difference(found: &[f32], expected: impl Iterator<Item = (f64, f64)>) -> Option<String> {
    let wrong = |&(_, (&found, (expected, tolerance))): &(usize, (&f32, (f64, f64)))| match expected.is_nan() {
        true => !found.is_nan(),
        false => {
            let error = (f64::from(found) - expected).abs();
            error > tolerance || error.is_nan()
        }
    };
    let mut all = found.iter().zip(expected).enumerate().filter(wrong);
    let (i, (found, (expected, _))) = all.next()?;
    Some(format!("element {i} is {found} instead of {expected}, and {} more are wrong", all.count()))
}

/// Random floats of similar magnitude, as stored in each type and as float32.
pub(super) fn stored(float_type: FloatType, values: &[f32]) -> (Vec<u8>, Cow<'_, [f32]>) {
    match float_type {
        FloatType::F32 => (values.iter().flat_map(|x| x.to_le_bytes()).collect(), values.into()),
        FloatType::F16 => {
            let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            let bytes = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
            (bytes, halves.into_iter().map(f16::to_f32).collect())
        }
        FloatType::Bf16 => {
            let halves: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            let bytes = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
            (bytes, halves.into_iter().map(bf16::to_f32).collect())
        }
    }
}

/// The sum of the products, in order. A loop over indices, here and in [`add`]: without
/// optimisation iterators take several times as long.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (mut sum, mut i) = (0.0, 0);
    while i < a.len().min(b.len()) {
        sum += a[i] * b[i];
        i += 1;
    }
    sum
}

/// Adds `factor` times `from`.
pub(crate) fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    let mut i = 0;
    while i < to.len().min(from.len()) {
        to[i] += factor * from[i];
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Options, Shader};
    use crate::ops::testing::{gpu, gpu_with};

    #[test]
    fn differences_are_found_and_nan_is_one() {
        let expected = [1.0, 2.0, f64::NAN, 4.0];
        let of = |found: [f32; 4]| difference(&found, expected.into_iter().map(|x| (x, 0.5)));
        assert_eq!(of([1.25, 1.5, f32::NAN, 4.0]), None);
        let reason = of([1.0, f32::NAN, 3.0, 9.0]).unwrap();
        assert_eq!(reason, "element 1 is NaN instead of 2, and 2 more are wrong");
    }

    fn spec() -> KernelSpec {
        let source = "@compute @workgroup_size(1) fn main() {}";
        KernelSpec { shader: Shader::checked("nothing", source), entry: "main", constants: Vec::new() }
    }

    #[test]
    fn a_kernel_that_fails_is_an_error_each_time_and_one_that_passes_is_tried_once_on_a_device() {
        let folder = tempfile::tempdir().unwrap();
        let cached = |options: &mut Options| options.cache = Some(folder.path().to_owned());
        let Some(gpu) = gpu_with(cached) else { return };
        let kernels = Tried::new(&gpu);
        for _ in 0..2 {
            let failed = kernels.get((), spec, |_| Ok(Some("it is wrong".to_owned()))).unwrap_err();
            let OpError::Unfit { kernel, device, reason } = failed else { panic!("{failed}") };
            assert_eq!((kernel.as_str(), reason.as_str()), ("nothing:main", "it is wrong"));
            assert_eq!(device, gpu.adapter().to_string());
        }
        let mut trials = 0;
        let mut get = |gpu: &Gpu| {
            let pass = |_: &Kernel| {
                trials += 1;
                Ok(None)
            };
            Tried::new(gpu).get((), spec, pass).unwrap();
            trials
        };
        // First from the device, then from its folder of records.
        assert_eq!([get(&gpu), get(&gpu), get(&gpu_with(cached).unwrap())], [1, 1, 1]);
    }

    #[test]
    fn without_a_folder_a_device_remembers() {
        let Some(gpu) = gpu() else { return };
        let mut trials = 0;
        for _ in 0..2 {
            Tried::new(&gpu)
                .get((), spec, |_| {
                    trials += 1;
                    Ok(None)
                })
                .unwrap();
        }
        assert_eq!(trials, 1);
    }
}
