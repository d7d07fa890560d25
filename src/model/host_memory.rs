//! The memory of the host.

use sysinfo::{MemoryRefreshKind, Process, ProcessRefreshKind, ProcessesToUpdate, System};

/// The part of the available memory, one of this many, that stays for the rest of the machine.
const RESERVE: u64 = 16;

/// Bytes that the buffers of a run may take in host memory. `None` if the system does not say.
pub fn available_host_memory() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let own = sysinfo::get_current_pid().ok()?;
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), true, ProcessRefreshKind::nothing());
    // A group counts the pages of files that it has read, which leave when memory is needed.
    let group = system.process(own).and_then(Process::cgroup_limits);
    let of_group = group.map(|group| group.total_memory.saturating_sub(group.rss));
    without_reserve(system.available_memory(), of_group)
}

/// `of_machine` is 0 if it is unknown. A process may be in a group with a limit of its own.
fn without_reserve(of_machine: u64, of_group: Option<u64>) -> Option<u64> {
    let available = of_machine.min(of_group.unwrap_or(u64::MAX));
    (of_machine > 0).then_some(available - available / RESERVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_limit_counts_and_a_part_is_left() {
        assert_eq!(without_reserve(1600, None), Some(1500));
        assert_eq!(without_reserve(1600, Some(160)), Some(150));
        assert_eq!(without_reserve(1600, Some(0)), Some(0));
        assert_eq!(without_reserve(0, Some(160)), None);
    }

    #[test]
    #[cfg(any(target_os = "linux", target_os = "macos", windows))]
    fn this_machine_has_memory() {
        assert!(available_host_memory().is_some_and(|bytes| bytes > 1 << 20 && bytes < 1 << 50));
    }
}
