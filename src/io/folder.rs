//! Folders whose files appear whole, or not at all.

use std::fs;
use std::io;
use std::path::Path;

use crate::io::{folder_of, publish_folder, sync_dir, temporary_folder, write_synced};

/// Writes `files`, names and bytes, into the folder `target`. All of it is durable under another name before anything under
/// `target` changes: a new folder (missing ones above it are made, too) then appears whole; in one that is there, each file
/// replaces its earlier version, in the order given, and everything else stays.
///
/// # Errors
/// What the operating system says; `target` is then as it was, or has some files replaced.
pub(crate) fn publish(target: &Path, files: &[(&str, &[u8])]) -> io::Result<()> {
    // A folder that is there may be a link or a file system of its own, as a container's volume is: no rename reaches it from beside it.
    let there = fs::symlink_metadata(target).is_ok();
    let place = if there { target } else { folder_of(target) };
    if !there {
        fs::create_dir_all(place)?;
    }
    let temporary = temporary_folder(place)?;
    for (name, bytes) in files {
        write_synced(&temporary.path().join(name), bytes)?;
    }
    sync_dir(temporary.path())?;
    if !there {
        publish_folder(temporary, target)?;
        return sync_dir(place);
    }
    for (name, _) in files {
        fs::rename(temporary.path().join(name), target.join(name))?;
    }
    sync_dir(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// What tells a folder from another one that took its name.
    fn number(path: &Path) -> u64 {
        #[cfg(unix)]
        return std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        #[cfg(not(unix))]
        return path.exists().into();
    }

    #[test]
    fn a_folder_appears_with_those_above_it() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/b/out");
        publish(&target, &[("x", b"1"), ("y", b"2")]).unwrap();
        assert_eq!(names(&target), ["x", "y"]);
        assert_eq!(fs::read(target.join("y")).unwrap(), b"2");
        assert_eq!(names(&root.path().join("a/b")), ["out"], "nothing else is left");
    }

    #[test]
    fn an_earlier_version_is_replaced_and_other_files_stay() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::create_dir(&target).unwrap();
        let before = number(&target);
        publish(&target, &[("x", b"1")]).unwrap();
        assert_eq!(number(&target), before, "the folder may be a file system of its own: it stays what it is");
        fs::write(target.join("notes"), "mine").unwrap();
        publish(&target, &[("x", b"2"), ("y", b"3")]).unwrap();
        assert_eq!(names(&target), ["notes", "x", "y"]);
        assert_eq!(fs::read(target.join("x")).unwrap(), b"2");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn a_file_in_the_way_is_an_error_and_stays() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::write(&target, "precious").unwrap();
        publish(&target, &[("x", b"1")]).unwrap_err();
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_folder_stays_a_link() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.path().join("out")).unwrap();
        publish(&root.path().join("out"), &[("x", b"1")]).unwrap();
        assert_eq!(fs::read(root.path().join("real/x")).unwrap(), b"1");
        assert!(root.path().join("out").is_symlink());
    }
}
