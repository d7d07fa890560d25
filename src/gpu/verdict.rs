//! Test results of kernels on a device. They are cached while the device is open, and between runs
//! if there is a folder for records.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

use super::device::Gpu;

/// Records by name, as stored in the folder.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<String, Vec<u8>>>);

impl Gpu {
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
        let known = || self.0.known.0.lock().unwrap_or_else(PoisonError::into_inner);
        let record = self.cached_record(&name).or_else(|| known().get(&name).cloned());
        if let Some(found) = record.as_deref().and_then(read) {
            return Ok(found);
        }
        let found = find()?;
        let record = write(&found);
        self.cache_record(&name, &record);
        known().insert(name, record);
        Ok(found)
    }
}
