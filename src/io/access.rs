//! Who may read and write a file that is made from other files.

use std::fs::{Metadata, Permissions};
#[cfg(unix)]
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// The permissions of the files that an output is made from, and of the file that it replaces. The
/// output is no wider readable than each of them, and no wider writable than each source or, if it
/// replaces a file, than that. Systems other than Unix have no such permissions.
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

    /// The classes of an output of this group, [`GROUP`] and [`OTHERS`], whose members have a right
    /// to this file.
    fn classes(self, right: u32, group: u32) -> u32 {
        let has = |class| self.bits & class & right != 0;
        // A member of another group is one of this file's others, or in its group, too.
        let has_all = has(GROUP) && has(OTHERS);
        let class = |class| if has_all || (self.group == group && has(class)) { class } else { 0 };
        class(GROUP) | class(OTHERS)
    }
}

/// The bits of the owner, of the group, and of all others.
#[cfg(unix)]
const OWNER: u32 = 0o700;
#[cfg(unix)]
const GROUP: u32 = 0o070;
#[cfg(unix)]
const OTHERS: u32 = 0o007;
/// The bits of reading and of writing.
#[cfg(unix)]
const READ: u32 = 0o444;
#[cfg(unix)]
const WRITE: u32 = 0o222;

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
        let readable = |bits, source: &Mode| bits & (OWNER | source.classes(READ, new.group));
        let writable = |bits, source: &Mode| bits & (!WRITE | OWNER | source.classes(WRITE, new.group));
        match self.replaced {
            Some(old) => self.sources.iter().chain(&self.replaced).fold(old.bits, readable),
            None => self.sources.iter().fold(self.sources.iter().fold(new.bits, readable), writable),
        }
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
        assert_eq!(mode((0o664, 1), &[(0o640, 1)], None), 0o640, "others");
        assert_eq!(mode((0o666, 1), &[(0o664, 1), (0o666, 1)], None), 0o664, "others may not write");
        assert_eq!(mode((0o666, 1), &[(0o664, 2)], None), 0o644, "another group");
        assert_eq!(mode((0o777, 1), &[(0o640, 1)], None), 0o750, "a folder that its group may not write");
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
