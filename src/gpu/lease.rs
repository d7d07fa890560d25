//! Buffers with contents that are replaced at run time, and leases that permit the use of the
//! present contents.

use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// A buffer of the device. If its contents are replaced at run time, as in a slot of the layer
/// stream, its owner returns it with a [`Lease`]. Work with that buffer can be submitted until the
/// lease ends.
#[derive(Debug, Clone)]
pub struct Buffer {
    buffer: wgpu::Buffer,
    lease: Option<Lease>,
}

impl Buffer {
    /// The same buffer under `lease`.
    #[must_use]
    pub fn leased(&self, lease: &Lease) -> Self {
        Self { buffer: self.buffer.clone(), lease: Some(lease.clone()) }
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }
}

impl From<wgpu::Buffer> for Buffer {
    fn from(buffer: wgpu::Buffer) -> Self {
        Self { buffer, lease: None }
    }
}

impl Deref for Buffer {
    type Target = wgpu::Buffer;

    fn deref(&self) -> &wgpu::Buffer {
        &self.buffer
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
