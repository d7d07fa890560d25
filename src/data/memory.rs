//! The memory of samples: without a limit, the system would end the process.

use std::fs;
use std::path::Path;

use super::error::DataError;

/// The limit where it is unknown how much memory there is.
const UNKNOWN: u64 = 4 << 30;
/// Bytes of a token: its number, and its entry in the loss mask.
const TOKEN: u64 = 5;
/// Bytes of a sample besides its tokens: its record, which a growing list has twice for a moment,
/// its two allocations, and its place in the order of an epoch.
const SAMPLE: u64 = 256;

/// Bytes that samples may take, all files of a run together: half of what the process may use.
/// Where that is unknown, as on other systems than Linux, it is 4 GiB.
pub(crate) fn limit() -> u64 {
    usable(Path::new("/")).map_or(UNKNOWN, |bytes| bytes / 2)
}

/// Bytes that the process may use: the machine's memory, or the limit of a control group that the
/// process is in, in Linux's files below `root`.
fn usable(root: &Path) -> Option<u64> {
    let machine = total(&fs::read_to_string(root.join("proc/meminfo")).ok()?)?;
    let of_process = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let groups = of_process.lines().filter_map(group).flat_map(|(mount, file, group)| {
        let folders = Path::new(group).ancestors().map(move |folder| mount.join(folder.strip_prefix("/").unwrap_or(folder)));
        folders.map(move |folder| folder.join(file)).collect::<Vec<_>>()
    });
    // A container sees its own group as the root.
    groups.filter_map(|file| fs::read_to_string(root.join(file)).ok()?.trim().parse().ok()).chain([machine]).min()
}

/// The machine's memory, as /proc/meminfo says it.
fn total(meminfo: &str) -> Option<u64> {
    let kilobytes = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    kilobytes.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Where the groups of a line of /proc/self/cgroup are, their file with the limit, and the group of
/// the process: of the second version, or the first one's for memory.
fn group(line: &str) -> Option<(&'static Path, &'static str, &str)> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, group) = (parts.next()?, parts.next()?);
    if controllers.is_empty() {
        return Some((Path::new("sys/fs/cgroup"), "memory.max", group));
    }
    let memory = controllers.split(',').any(|controller| controller == "memory");
    memory.then_some((Path::new("sys/fs/cgroup/memory"), "memory.limit_in_bytes", group))
}

/// What the samples of a file take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    limit: u64,
    used: u64,
    samples: u64,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, used: 0, samples: 0 }
    }

    /// Adds a sample of so many tokens.
    ///
    /// # Errors
    /// [`DataError::Memory`].
    pub(super) fn add(&mut self, tokens: usize) -> Result<(), DataError> {
        let Self { limit, used, samples } = *self;
        let used = used.saturating_add(of_sample(tokens));
        if used > limit {
            return Err(DataError::Memory { samples, limit });
        }
        *self = Self { limit, used, samples: samples + 1 };
        Ok(())
    }
}

/// Bytes of a sample of so many tokens.
pub(super) fn of_sample(tokens: usize) -> u64 {
    (tokens as u64).saturating_mul(TOKEN).saturating_add(SAMPLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root folder with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn the_smallest_limit_of_machine_and_groups_counts() {
        let machine = ("proc/meminfo", "MemTotal:       16000000 kB\nMemFree:         1000 kB\n");
        let usable = |files: &[(&str, &str)]| usable(root(&[&[machine], files].concat()).path());
        assert_eq!(usable(&[]), Some(16_384_000_000));
        // The second version: a group, and the groups that it is in.
        let second = ("proc/self/cgroup", "0::/user/job\n");
        assert_eq!(usable(&[second, ("sys/fs/cgroup/user/job/memory.max", "max\n")]), Some(16_384_000_000));
        assert_eq!(usable(&[second, ("sys/fs/cgroup/user/job/memory.max", "3000000\n")]), Some(3_000_000));
        let nested = [("sys/fs/cgroup/user/job/memory.max", "3000000"), ("sys/fs/cgroup/user/memory.max", "2000000")];
        assert_eq!(usable(&[&[second], &nested[..]].concat()), Some(2_000_000));
        // A container: its group is the root.
        assert_eq!(usable(&[("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "1000000\n")]), Some(1_000_000));
        // The first version, whose largest number is no limit.
        let first = ("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n");
        let limit = |text| usable(&[first, ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", text)]);
        assert_eq!([limit("4000000\n"), limit("9223372036854771712\n")], [Some(4_000_000), Some(16_384_000_000)]);
        assert_eq!(super::usable(root(&[("proc/meminfo", "MemTotal: many\n")]).path()), None);
        assert_eq!(super::usable(root(&[]).path()), None);
    }

    #[test]
    fn there_is_a_limit() {
        assert!((64 << 20..1 << 60).contains(&limit()), "{}", limit());
    }

    #[test]
    fn samples_are_counted_up_to_the_limit() {
        let mut budget = Budget::new(3 * of_sample(100));
        for _ in 0..3 {
            assert!(budget.add(100).is_ok());
        }
        let limit = 3 * of_sample(100);
        assert!(matches!(budget.add(0), Err(DataError::Memory { samples: 3, limit: found }) if found == limit));
        assert!(matches!(Budget::new(u64::MAX).add(usize::MAX), Ok(()) | Err(DataError::Memory { .. })));
    }
}
