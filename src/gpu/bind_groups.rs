//! Bind groups, kept between lists of commands: the driver takes longer to create one than to run a
//! small kernel.
//!
//! A bind group keeps its buffers alive. So a buffer that is dropped takes its bind groups with it:
//! [`BindGroups::forget`]. The number of kept bind groups is limited.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Maximum bind groups of a generation. A training step of a model with 64 layers has 8,000.
const GENERATION: usize = 16_384;

/// The kernel, then identity, offset and size of each range.
type Key = Arc<[u64]>;

/// The bind groups of a device, in two generations. A use moves a bind group to the young
/// generation. When that is full, it becomes the old one, and the unused rest of the old one is
/// dropped.
#[derive(Debug)]
pub(super) struct BindGroups<G = wgpu::BindGroup> {
    generation: usize,
    kept: Mutex<Kept<G>>,
}

#[derive(Debug)]
struct Kept<G> {
    young: HashMap<Key, G>,
    old: HashMap<Key, G>,
    /// The keys of each buffer. Some of them may have gone.
    users: HashMap<u64, Vec<Key>>,
    /// Bind groups that entered the young generation.
    entered: usize,
}

impl<G> Default for Kept<G> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), users: HashMap::new(), entered: 0 }
    }
}

impl<G> Default for BindGroups<G> {
    fn default() -> Self {
        Self { generation: GENERATION, kept: Mutex::default() }
    }
}

impl<G: Clone> BindGroups<G> {
    /// The bind group of `key`: the kernel, then identity, offset and size of each range. `make`
    /// creates it if it is not kept; no lock is held meanwhile.
    pub(super) fn get_or_make(&self, key: &[u64], make: impl FnOnce() -> G) -> G {
        if let Some(group) = self.lock().find(key, self.generation) {
            return group;
        }
        let group = make();
        self.lock().insert(key.into(), group.clone(), self.generation);
        group
    }

    /// Drops the bind groups of a buffer.
    pub(super) fn forget(&self, buffer: u64) {
        // They are dropped after the lock: the driver may take a while.
        let _dropped = self.lock().remove(buffer);
    }

    /// Drops all bind groups.
    pub(super) fn clear(&self) {
        let _dropped = mem::take(&mut *self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Kept<G>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<G: Clone> Kept<G> {
    fn find(&mut self, key: &[u64], generation: usize) -> Option<G> {
        if let Some(group) = self.young.get(key) {
            return Some(group.clone());
        }
        let (key, group) = self.old.remove_entry(key)?;
        self.enter(key, group.clone(), generation);
        Some(group)
    }

    fn insert(&mut self, key: Key, group: G, generation: usize) {
        self.add_users(&key);
        self.enter(key, group, generation);
    }

    fn enter(&mut self, key: Key, group: G, generation: usize) {
        self.young.insert(key, group);
        self.entered += 1;
        if self.entered >= generation {
            self.entered = 0;
            self.old = mem::take(&mut self.young);
            self.users.clear();
            let keys: Vec<Key> = self.old.keys().cloned().collect();
            keys.iter().for_each(|key| self.add_users(key));
        }
    }

    fn add_users(&mut self, key: &Key) {
        let mut buffers: Vec<u64> = key.iter().skip(1).step_by(3).copied().collect();
        buffers.sort_unstable();
        buffers.dedup();
        buffers.into_iter().for_each(|buffer| self.users.entry(buffer).or_default().push(key.clone()));
    }

    fn remove(&mut self, buffer: u64) -> Vec<G> {
        let keys = self.users.remove(&buffer).unwrap_or_default();
        keys.iter().filter_map(|key| self.young.remove(key).or_else(|| self.old.remove(key))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(generation: usize) -> BindGroups<Arc<u64>> {
        BindGroups { generation, kept: Mutex::default() }
    }

    /// The bind group of two ranges of two buffers. `made` counts the calls of `make`.
    fn get(groups: &BindGroups<Arc<u64>>, key: [u64; 7], made: &mut u64) -> u64 {
        let make = || {
            *made += 1;
            Arc::new(*made)
        };
        *groups.get_or_make(&key, make)
    }

    #[test]
    fn equal_ranges_of_a_kernel_have_one_bind_group() {
        let (groups, mut made) = (groups(100), 0);
        let keys = [[1, 5, 0, 16, 6, 0, 16], [2, 5, 0, 16, 6, 0, 16], [1, 5, 256, 16, 6, 0, 16], [1, 5, 0, 32, 6, 0, 16]];
        for _ in 0..3 {
            for (key, expected) in keys.into_iter().zip(1..) {
                assert_eq!(get(&groups, key, &mut made), expected);
            }
        }
        assert_eq!(made, 4);
    }

    #[test]
    fn a_dropped_buffer_takes_its_bind_groups_with_it() {
        let (groups, mut made) = (groups(3), 0);
        let key = |a, b| [1, a, 0, 16, b, 0, 16];
        let kept = Arc::new(7);
        assert_eq!(*groups.get_or_make(&key(5, 6), || kept.clone()), 7);
        get(&groups, key(7, 7), &mut made);
        groups.forget(8);
        assert_eq!(Arc::strong_count(&kept), 2);
        // In the old generation.
        get(&groups, key(7, 8), &mut made);
        groups.forget(6);
        assert_eq!(Arc::strong_count(&kept), 1);
        // The other buffer has no bind group left, and the rest is still there.
        groups.forget(5);
        assert_eq!((get(&groups, key(7, 7), &mut made), get(&groups, key(7, 8), &mut made), made), (1, 2, 2));
        groups.forget(7);
        assert_eq!(get(&groups, key(7, 7), &mut made), 3);
        groups.clear();
        assert_eq!(get(&groups, key(7, 7), &mut made), 4);
    }

    #[test]
    fn only_the_bind_groups_in_use_stay() {
        let (groups, mut made) = (groups(10), 0);
        let key = |a| [1, a, 0, 16, 1000, 0, 16];
        for round in 0..20 {
            for a in 0..5 {
                assert_eq!(
                    get(&groups, key(a), &mut made),
                    if round == 0 { a + 1 } else { get(&groups, key(a), &mut made) }
                );
            }
            // Short-lived buffers.
            get(&groups, key(100 + round), &mut made);
        }
        assert_eq!(made, 25);
        let kept = groups.lock();
        assert!(kept.young.len() + kept.old.len() <= 20);
        assert!(kept.users.values().map(Vec::len).sum::<usize>() <= 2 * 30, "{:?}", kept.users);
    }
}
