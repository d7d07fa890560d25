//! The files of training runs, to compare one run with another.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Paths and bytes of all files of a run, without what differs between two runs with the same
/// numbers: seconds, speeds, memory, the checksum of a state with seconds, and TensorBoard's
/// events. `more` are other keys that are left out of records and states.
pub fn files(out: &Path, more: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    let times = [&["seconds", "tokens_per_second", "state_checksum", "gpu_bytes"], more].concat();
    let is_timeless = |key: &&str| !times.iter().any(|time| key.contains(&format!("\"{time}\":")));
    let mut found = BTreeMap::new();
    let mut folders = vec![out.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if !name.starts_with("events.out.tfevents.") {
                let mut bytes = fs::read(&path).unwrap();
                if name == "metrics.jsonl" || name == "trainer_state.json" {
                    let text = String::from_utf8(bytes).unwrap();
                    bytes = text.split_inclusive([',', '\n']).filter(is_timeless).collect::<String>().into_bytes();
                }
                found.insert(path.strip_prefix(out).unwrap().to_owned(), bytes);
            }
        }
    }
    found
}
