//! Buffers whose contents are replaced while a program runs, and the right to use what they hold now.

use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// A buffer of the device. The owner of one whose contents are replaced, such as a slot of the layer stream, hands it out
/// with a [`Lease`]: work that uses it can be submitted until the lease ends.
#[derive(Debug, Clone)]
pub struct Buffer {
    buffer: wgpu::Buffer,
    lease: Option<Lease>,
}

impl Buffer {
    /// The same buffer, to be used under `lease`.
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

/// The right to use what some buffers hold now. Its owner ends it before the contents are replaced; after that,
/// [`Commands::submit`](super::Commands::submit) refuses work that uses one of the buffers, whenever it was recorded.
#[derive(Debug, Clone)]
pub struct Lease(Arc<RwLock<bool>>);

impl Default for Lease {
    fn default() -> Self {
        Self(Arc::new(RwLock::new(true)))
    }
}

impl Lease {
    /// Ends the lease, after the submission that is being made under it, if there is one. What was submitted before reads
    /// the old contents, because there is one queue.
    pub fn end(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Keeps the lease from ending; `None` where it has ended.
    pub(super) fn hold(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner)).filter(|valid| **valid)
    }

    /// Tells leases apart, and orders them.
    pub(super) fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}
