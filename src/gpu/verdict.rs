//! Test results of kernels on a device. They are cached while the device is open, and between runs
//! if there is a folder for records.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::device::Gpu;

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
        let mut hasher = DefaultHasher::new();
        (kernels, self.is_checked()).hash(&mut hasher);
        let name = format!("self-test-{:016x}", hasher.finish());
        let record = self.cached_record(&name).or_else(|| self.0.known.get(&name));
        if let Some(found) = record.as_deref().and_then(read) {
            return Ok(found);
        }
        let found = find()?;
        let record = write(&found);
        self.cache_record(&name, &record);
        self.0.known.insert(name, record);
        Ok(found)
    }
}
