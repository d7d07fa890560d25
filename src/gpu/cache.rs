//! Small files that persist between runs: compiled kernels and test results of a device. A lost
//! file costs only time, so no function here returns an error.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::io::read::{self, Links};

/// Bytes of a file; the compiled kernels of a driver take some megabytes.
const MAX_LEN: u64 = 1 << 30;

/// The folder for one adapter, driver and version of this crate, if caching is on.
#[derive(Debug)]
pub(super) struct Cache(Option<PathBuf>);

/// `NF4PACK_CACHE_DIR` (empty: no cache), or `nf4pack` in the user's cache folder.
pub(super) fn default_folder() -> Option<PathBuf> {
    match std::env::var_os("NF4PACK_CACHE_DIR") {
        Some(folder) if folder.is_empty() => None,
        Some(folder) => Some(folder.into()),
        None => dirs::cache_dir().map(|caches| caches.join("nf4pack")),
    }
}

impl Cache {
    pub(super) fn new(root: Option<&Path>, info: &wgpu::AdapterInfo) -> Self {
        Self(root.map(|root| root.join(key(info))))
    }

    /// The bytes that were last stored under `name`, or `None` if the file is absent or its
    /// checksum differs.
    pub(super) fn load(&self, name: &str) -> Option<Vec<u8>> {
        let mut file = read::read(&self.path(name)?, Links::Follow, MAX_LEN).ok()?;
        let (bytes, checksum) = file.split_last_chunk()?;
        (crc32fast::hash(bytes) == u32::from_le_bytes(*checksum)).then_some(())?;
        file.truncate(file.len() - size_of::<u32>());
        Some(file)
    }

    /// Stores `bytes` under `name`, if the folder is writable.
    pub(super) fn store(&self, name: &str, bytes: &[u8]) {
        let _ = self.path(name).map(|path| write(&path, bytes));
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        self.0.as_ref().filter(|_| plain && !name.is_empty()).map(|folder| folder.join(name))
    }
}

/// The payload, then its CRC-32. With concurrent writers, a reader gets a whole payload or none.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.write_all(&crc32fast::hash(bytes).to_le_bytes())?;
    file.persist(path)?;
    Ok(())
}

fn key(info: &wgpu::AdapterInfo) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let all = format!("{}\n{}\n{}\n{version}", info.name, info.driver, info.driver_info);
    format!("{}-{:x}-{:x}-{:08x}", info.backend, info.vendor, info.device, crc32fast::hash(all.as_bytes()))
}

/// Records in memory, by name, while the device is open.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<String, Vec<u8>>>);

impl Known {
    pub(super) fn get(&self, name: &str) -> Option<Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    pub(super) fn insert(&self, name: String, record: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name, record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache(Some(folder.path().join("made/when/needed")));
        assert_eq!(cache.load("verdict"), None);
        cache.store("verdict", b"old");
        cache.store("verdict", b"passed");
        assert_eq!(cache.load("verdict").as_deref(), Some(&b"passed"[..]));
        let path = cache.path("verdict").unwrap();
        for garbage in [&b""[..], b"abc", b"passed????", b"PASSED\x00\x00\x00\x00"] {
            fs::write(&path, garbage).unwrap();
            assert_eq!(cache.load("verdict"), None, "{garbage:?}");
        }
    }

    #[test]
    fn nothing_is_written_outside_the_folder_or_without_one() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache(Some(folder.path().join("inner")));
        for name in ["", "../x", "a/b", "a\\b", ".."] {
            cache.store(name, b"x");
            assert_eq!(cache.load(name), None, "{name:?}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        Cache(None).store("x", b"x");
        assert_eq!(Cache(None).load("x"), None);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache(Some(file.path().join("below-a-file")));
        cache.store("x", b"x");
        assert_eq!(cache.load("x"), None);
    }
}
