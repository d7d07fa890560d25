//! Test results of kernels on a device. They are cached while the device is open, and between runs
//! if there is a folder for records.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::device::Gpu;

/// Raised when the tests of kernels find more errors: earlier results are then of no use.
const REVISION: u32 = 1;

impl Gpu {
    /// The record that [`Gpu::cache_record`] stored under `name` in an earlier run on the same
    /// adapter, driver and version of this crate. `name` has letters, digits, `-` and `_`.
    pub fn cached_record(&self, name: &str) -> Option<Vec<u8>> {
        self.0.cache.load(name)
    }

    /// Stores a small record for later runs, if [`Options::cache`](super::Options::cache) is a
    /// writable folder.
    pub fn cache_record(&self, name: &str, bytes: &[u8]) {
        self.0.cache.store(name, bytes);
    }

    /// The cached result for `kernels` on this adapter and driver, or the result of `find`.
    /// `kernels` must include everything that the result depends on. `write` converts a result to a
    /// record, and `read` converts it back.
    ///
    /// # Errors
    /// The error of `find`; nothing is then stored.
    pub(crate) fn recall_or_find<T, E>(
        &self,
        kernels: impl Hash,
        read: impl FnOnce(&[u8]) -> Option<T>,
        write: impl FnOnce(&T) -> Vec<u8>,
        find: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let name = self.record_name("self-test", kernels);
        if let Some(found) = self.recall(&name).as_deref().and_then(read) {
            return Ok(found);
        }
        let found = find()?;
        self.keep(name, write(&found));
        Ok(found)
    }

    fn record_name(&self, what: &str, kernels: impl Hash) -> String {
        let mut hasher = DefaultHasher::new();
        (REVISION, kernels, self.is_checked()).hash(&mut hasher);
        format!("{what}-{:016x}", hasher.finish())
    }

    fn recall(&self, name: &str) -> Option<Vec<u8>> {
        self.cached_record(name).or_else(|| self.0.known.get(name))
    }

    fn keep(&self, name: String, record: Vec<u8>) {
        self.cache_record(&name, &record);
        self.0.known.insert(name, record);
    }
}

/// Verdicts about several kernels together.
#[cfg(feature = "train")]
impl Gpu {
    /// The forms of a kept verdict.
    const PASSED: &str = "passed";
    const FAILED: &str = "failed: ";

    /// The verdict that [`Gpu::keep_verdict`] kept about all of these kernels. The error is the
    /// reason against them.
    pub(crate) fn kept_verdict(&self, kernels: impl Hash) -> Option<Result<(), String>> {
        let record = String::from_utf8(self.recall(&self.record_name("verdict", kernels))?).ok()?;
        match record.strip_prefix(Self::FAILED) {
            Some(reason) => Some(Err(reason.to_owned())),
            None => (record == Self::PASSED).then_some(Ok(())),
        }
    }

    /// Keeps a verdict about all of these kernels for this run and later ones on the same driver.
    pub(crate) fn keep_verdict(&self, kernels: impl Hash, verdict: &Result<(), String>) {
        let record = verdict.as_ref().map_or_else(|reason| [Self::FAILED, reason].concat(), |()| Self::PASSED.to_owned());
        self.keep(self.record_name("verdict", kernels), record.into_bytes());
    }
}
