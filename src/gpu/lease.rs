//! Buffers with contents that are replaced at run time, and leases that permit the use of the
//! present contents.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak};

use super::bind_groups::BindGroups;

/// A buffer of the device. If its contents are replaced at run time, as in a slot of the layer
/// stream, its owner returns it with a [`Lease`]. Work with that buffer can be submitted until the
/// lease ends.
#[derive(Debug, Clone)]
pub struct Buffer {
    owned: Arc<Owned>,
    lease: Option<Lease>,
}

/// A buffer, shared by its clones.
#[derive(Debug)]
struct Owned {
    buffer: wgpu::Buffer,
    id: u64,
    /// The bind groups that may contain it. They go when it goes.
    groups: OnceLock<Weak<BindGroups>>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(groups) = self.groups.get().and_then(Weak::upgrade) {
            groups.forget(self.id);
        }
    }
}

impl Buffer {
    /// The same buffer under `lease`.
    #[must_use]
    pub fn leased(&self, lease: &Lease) -> Self {
        Self { owned: self.owned.clone(), lease: Some(lease.clone()) }
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }

    /// Identifies the buffer among all buffers of the process.
    pub(super) fn id(&self) -> u64 {
        self.owned.id
    }

    /// Notes that bind groups of `groups` contain it.
    pub(super) fn bound_in(&self, groups: &Arc<BindGroups>) {
        self.owned.groups.get_or_init(|| Arc::downgrade(groups));
    }
}

impl From<wgpu::Buffer> for Buffer {
    fn from(buffer: wgpu::Buffer) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { owned: Arc::new(Owned { buffer, id, groups: OnceLock::new() }), lease: None }
    }
}

impl Deref for Buffer {
    type Target = wgpu::Buffer;

    fn deref(&self) -> &wgpu::Buffer {
        &self.owned.buffer
    }
}

/// Permission to use the present contents of some buffers. The owner ends the lease before it
/// replaces the contents. After that, [`Commands::submit`](super::Commands::submit) refuses work
/// with these buffers, even if it was recorded before.
#[derive(Debug, Clone)]
pub struct Lease(Arc<RwLock<bool>>);

impl Default for Lease {
    fn default() -> Self {
        Self(Arc::new(RwLock::new(true)))
    }
}

impl Lease {
    /// Ends the lease. Waits for a submission in progress under this lease. Work that was submitted
    /// before reads the old contents, because the device has one queue.
    pub fn end(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Prevents the lease from ending while the guard lives. `None` if it has ended.
    pub(super) fn hold(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner)).filter(|valid| **valid)
    }

    /// Identifies and orders leases.
    pub(super) fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}
