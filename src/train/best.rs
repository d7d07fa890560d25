//! The best adapter of a run with an early stop: a folder `best-STEP-CHECKSUM` of the output
//! folder, which PEFT loads.
//!
//! The output folder itself has a copy. The copy alone does not suffice: a run that resumes from a
//! checkpoint needs the adapter that was the best one at that step, and a process that died later
//! may have replaced the copy. So the folder of an adapter stays as long as a checkpoint needs it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::arch::config::ModelConfig;
use crate::io::read::Links;
use crate::lora::adapter::{Adapter, CONFIG, WEIGHTS};
use crate::train::checkpoint::{
    CheckpointError, adapter_checksum, best_of_all, remove_at_once, rename_aside, step_in_digits,
};

/// The name of a folder before step and checksum.
const PREFIX: &str = "best-";

/// The step of an adapter and the checksum of its matrices.
pub(crate) type Key = (u64, u32);

/// Writes an adapter after `step` into a folder of `out`, and returns its key. The folder appears
/// complete. If it is there already, its files are replaced by the same bytes.
///
/// # Errors
/// [`CheckpointError::Adapter`], [`CheckpointError::SetAside`].
pub(crate) fn write(out: &Path, step: u64, adapter: &Adapter) -> Result<Key, CheckpointError> {
    let key = (step, adapter_checksum(adapter));
    let folder = out.join(name(key));
    // Nothing else has such a name, except by intent.
    if fs::symlink_metadata(&folder).is_ok_and(|there| !there.is_dir()) {
        rename_aside(out, &folder)?;
    }
    adapter.write(&folder, &[]).map_err(|source| CheckpointError::Adapter { path: folder, source })?;
    Ok(key)
}

/// Reads the adapter with this key.
///
/// # Errors
/// [`CheckpointError::Adapter`]; [`CheckpointError::Checksum`] if it is another one.
pub(crate) fn read(out: &Path, key: Key, model: &ModelConfig) -> Result<Adapter, CheckpointError> {
    let path = out.join(name(key));
    let adapter = match Adapter::read_with(&path, model, Links::Refuse) {
        Ok(adapter) => adapter,
        Err(source) => return Err(CheckpointError::Adapter { path, source }),
    };
    let (found, expected) = (adapter_checksum(&adapter), key.1);
    if found == expected { Ok(adapter) } else { Err(CheckpointError::Checksum { path, expected, found }) }
}

/// Whether `out` has a trained best adapter.
pub(crate) fn is_any_trained(out: &Path) -> bool {
    keyed(out).iter().any(|((step, _), path)| *step > 0 && is_adapter_alone(path))
}

/// Removes the best adapters of `out` that no checkpoint needs, and that are not `present`. Each
/// vanishes at once. Nothing is removed while the state of a checkpoint cannot be read.
///
/// Returns what cannot be removed ([`CheckpointError::Read`], [`CheckpointError::Remove`]); a run
/// does not depend on it.
pub(crate) fn prune(out: &Path, present: Option<Key>) -> Vec<CheckpointError> {
    let mut folders = keyed(out);
    // Anything else in it is the user's.
    folders.retain(|(_, path)| is_adapter_alone(path));
    if folders.is_empty() {
        return Vec::new();
    }
    let mut needed: BTreeSet<Key> = match best_of_all(out) {
        Ok(needed) => needed,
        Err(error) => return vec![error],
    };
    needed.extend(present);
    let unneeded = folders.into_iter().filter(|(key, _)| !needed.contains(key));
    unneeded.filter_map(|(_, path)| remove_at_once(out, &path).err()).collect()
}

fn name((step, checksum): Key) -> String {
    format!("{PREFIX}{step}-{checksum:08x}")
}

/// The key in a name, spelled exactly as [`name`] does.
fn key_of(found: &str) -> Option<Key> {
    let (step, checksum) = found.strip_prefix(PREFIX)?.split_once('-')?;
    let key = (step_in_digits(step)?, u32::from_str_radix(checksum, 16).ok()?);
    (name(key) == found).then_some(key)
}

/// The folders of `out` with the name of a best adapter, without links.
pub(crate) fn folders(out: &Path) -> Vec<PathBuf> {
    keyed(out).into_iter().map(|(_, path)| path).collect()
}

/// The same with their keys.
fn keyed(out: &Path) -> Vec<(Key, PathBuf)> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    ours.filter_map(|entry| Some((key_of(entry.file_name().to_str()?)?, entry.path()))).collect()
}

fn is_adapter_alone(folder: &Path) -> bool {
    let mut entries = fs::read_dir(folder).into_iter().flatten();
    entries.all(|entry| entry.is_ok_and(|entry| [WEIGHTS, CONFIG].iter().any(|name| entry.file_name() == *name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::settings::Settings;

    fn model() -> ModelConfig {
        ModelConfig::parse(&fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap(), None).unwrap()
    }

    fn adapter(seed: u64) -> Adapter {
        Adapter::new(Settings { rank: 2, ..Settings::default() }.lora(), None, &model(), seed).unwrap()
    }

    #[test]
    fn an_adapter_is_found_by_its_key_and_no_other() {
        let out = tempfile::tempdir().unwrap();
        let key = write(out.path(), 7, &adapter(1)).unwrap();
        assert_eq!(read(out.path(), key, &model()).unwrap(), adapter(1));
        assert_eq!(write(out.path(), 7, &adapter(1)).unwrap(), key, "again");
        let other = write(out.path(), 7, &adapter(2)).unwrap();
        assert_ne!(other, key);
        assert_eq!(read(out.path(), key, &model()).unwrap(), adapter(1), "the same step has two");
        let [from, to] = [other, key].map(|key| out.path().join(name(key)).join(WEIGHTS));
        fs::copy(from, to).unwrap();
        let error = read(out.path(), key, &model()).unwrap_err();
        assert!(matches!(error, CheckpointError::Checksum { .. }), "{error}");
        assert!(matches!(read(out.path(), (8, 0), &model()).unwrap_err(), CheckpointError::Adapter { .. }));
    }

    #[test]
    fn only_unneeded_adapters_are_removed() {
        let out = tempfile::tempdir().unwrap();
        let keys = [1, 2, 3].map(|step| write(out.path(), step, &adapter(step)).unwrap());
        for other in ["best-1", "best-01-00000000", "best-1-0000000G", "best-1-ABCDEF00", "best-notes"] {
            fs::create_dir(out.path().join(other)).unwrap();
        }
        let (mine, kept) = (out.path().join("best-9-00000000"), out.path().join(name(keys[1])));
        fs::create_dir(&mine).unwrap();
        fs::write(mine.join("notes"), "mine").unwrap();
        assert!(is_any_trained(out.path()));
        assert!(prune(out.path(), Some(keys[1])).is_empty());
        assert_eq!(keys.map(|key| out.path().join(name(key)).exists()), [false, true, false]);
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 7);
        assert!(mine.exists() && kept.exists());
        assert!(prune(out.path(), None).is_empty());
        assert!(!kept.exists() && !is_any_trained(out.path()));
    }
}
