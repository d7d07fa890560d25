//! Who may read a file that is made from other files.

use std::fs::{Metadata, Permissions};
#[cfg(unix)]
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// The permissions of the files that an output is made from, and of the file that it replaces. The
/// output is no wider readable than each of them. Systems other than Unix have no such permissions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Readers {
    #[cfg(unix)]
    sources: std::collections::BTreeSet<Mode>,
    #[cfg(unix)]
    replaced: Option<Mode>,
}

/// Permission bits, and the group that they are for.
#[cfg(unix)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Mode {
    bits: u32,
    group: u32,
}

#[cfg(unix)]
impl Mode {
    fn of(metadata: &Metadata) -> Self {
        Self { bits: metadata.mode() & 0o777, group: metadata.gid() }
    }
}

/// The bits of the group, and of all others.
#[cfg(unix)]
const GROUP: u32 = 0o070;
#[cfg(unix)]
const OTHERS: u32 = 0o007;
/// The bits of reading.
#[cfg(unix)]
const READ: u32 = 0o444;

impl Readers {
    /// Adds a source.
    #[cfg(feature = "convert")]
    pub(crate) fn add(&mut self, source: &Metadata) {
        #[cfg(unix)]
        self.sources.insert(Mode::of(source));
        #[cfg(not(unix))]
        let _ = source;
    }

    /// The file that the output replaces: the output keeps its permissions.
    #[cfg(feature = "convert")]
    pub(crate) fn replace(&mut self, old: &Metadata) {
        #[cfg(unix)]
        {
            self.replaced = Some(Mode::of(old));
        }
        #[cfg(not(unix))]
        let _ = old;
    }

    /// The permissions of an output that was created with those of `new`; `None` if they stay.
    #[cfg(unix)]
    pub(crate) fn permissions(&self, new: &Metadata) -> Option<Permissions> {
        let new = Mode::of(new);
        let bits = self.mode(new);
        (bits != new.bits).then(|| Permissions::from_mode(bits))
    }

    /// The permissions of an output that was created with those of `new`; `None` if they stay.
    #[cfg(not(unix))]
    pub(crate) fn permissions(&self, new: &Metadata) -> Option<Permissions> {
        let _ = new;
        None
    }

    #[cfg(unix)]
    fn mode(&self, new: Mode) -> u32 {
        let start = self.replaced.map_or(new.bits, |old| old.bits);
        self.sources.iter().chain(&self.replaced).fold(start, |bits, source| {
            let reads = |class: u32| source.bits & class & READ != 0;
            let same = source.group == new.group;
            // A member of another group is one of the source's others, or in its group, too.
            let group = reads(GROUP) && (same || reads(OTHERS));
            let others = reads(OTHERS) && (same || reads(GROUP));
            bits & !(if group { 0 } else { GROUP }) & !(if others { 0 } else { OTHERS })
        })
    }
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::*;

    fn mode(new: (u32, u32), sources: &[(u32, u32)], replaced: Option<(u32, u32)>) -> u32 {
        let of = |(bits, group)| Mode { bits, group };
        let readers = Readers { sources: sources.iter().copied().map(of).collect(), replaced: replaced.map(of) };
        readers.mode(of(new))
    }

    #[test]
    fn the_narrowest_source_decides() {
        assert_eq!(mode((0o644, 1), &[], None), 0o644);
        assert_eq!(mode((0o644, 1), &[(0o644, 1), (0o444, 1)], None), 0o644);
        assert_eq!(mode((0o644, 1), &[(0o644, 1), (0o600, 1)], None), 0o600);
        assert_eq!(mode((0o664, 1), &[(0o640, 1)], None), 0o660, "others");
        assert_eq!(mode((0o755, 1), &[(0o640, 1)], None), 0o750, "a folder");
        assert_eq!(mode((0o644, 1), &[(0o604, 1)], None), 0o604, "not the group");
    }

    #[test]
    fn another_group_counts_as_others() {
        assert_eq!(mode((0o644, 1), &[(0o640, 2)], None), 0o600);
        assert_eq!(mode((0o644, 1), &[(0o644, 2)], None), 0o644);
        assert_eq!(mode((0o644, 1), &[(0o604, 2)], None), 0o600, "others may be in the group without access");
    }

    #[test]
    fn a_replaced_file_gives_its_mode() {
        assert_eq!(mode((0o644, 1), &[(0o644, 1)], Some((0o600, 1))), 0o600);
        assert_eq!(mode((0o600, 1), &[(0o644, 1)], Some((0o664, 1))), 0o664);
        assert_eq!(mode((0o644, 1), &[(0o600, 1)], Some((0o664, 1))), 0o600, "the source is narrower");
        assert_eq!(mode((0o644, 1), &[(0o644, 1)], Some((0o640, 2))), 0o600, "for another group");
    }
}
