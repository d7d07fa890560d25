//! What a crash may leave on a disk: recorded steps are replayed up to each of their ends, with
//! every loss that POSIX allows of what was not synced.
//!
//! The model is that of Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), and of
//! redb's crash tests. Synced bytes and names survive. Of bytes that were not synced, each page of
//! 512 bytes may be there or not, in any order, and a file may have its new length without its
//! bytes. Of changes of names since the last sync of their folder, any subset may be there; only
//! a rename within a folder is atomic, and one between folders never loses the file.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use super::record::Step;

/// Bytes that a disk writes whole.
const PAGE: u64 = 512;

/// Names of up to this many unsynced changes are lost in all combinations.
const MAX_EXHAUSTIVE: usize = 5;

/// The files below a folder, by their relative paths. A folder without files ends with `/`.
pub(crate) type Tree = BTreeMap<String, Vec<u8>>;

/// Reads the files below `root`.
pub(crate) fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    collect(root, "", &mut found);
    found
}

fn collect(folder: &Path, prefix: &str, found: &mut Tree) {
    let entries: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap()).collect();
    if entries.is_empty() && !prefix.is_empty() {
        found.insert(prefix.to_owned(), Vec::new());
    }
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().into_string().unwrap());
        match entry.path().is_dir() {
            true => collect(&entry.path(), &format!("{name}/"), found),
            false => drop(found.insert(name, fs::read(entry.path()).unwrap())),
        }
    }
}

/// Writes the files of `tree` into the folder `root`.
pub(crate) fn put(tree: &Tree, root: &Path) {
    for (name, bytes) in tree {
        let path = root.join(name);
        if name.ends_with('/') {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
}

/// A file or a folder, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    File(usize),
    Folder(usize),
}

/// A change of a file that is not durable yet.
#[derive(Debug, Clone)]
struct Change {
    /// The number of the step.
    step: usize,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Len(u64),
    Bytes(u64, Vec<u8>),
}

#[derive(Debug, Clone, Default)]
struct File {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

/// A change of a folder's names that is not durable yet.
#[derive(Debug, Clone)]
struct Edit {
    names: Vec<(String, Option<Node>)>,
    /// The edit that must be there, too: the other half of a rename between folders.
    after: Option<usize>,
    number: usize,
}

#[derive(Debug, Clone, Default)]
struct Folder {
    durable: BTreeMap<String, Node>,
    now: BTreeMap<String, Node>,
    pending: Vec<Edit>,
}

/// The disk and what the system holds back.
#[derive(Debug, Clone, Default)]
struct Disk {
    root: PathBuf,
    files: Vec<File>,
    folders: Vec<Folder>,
    /// Files by the numbers of the recording.
    open: BTreeMap<usize, usize>,
    edits: usize,
    step: usize,
}

/// What becomes of the bytes that are not durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Loss {
    All,
    None,
    /// Lengths are there, bytes are zero.
    Bytes,
    /// Some pages are there, in no order.
    Torn(u64),
}

const LOSSES: [Loss; 6] = [Loss::All, Loss::None, Loss::Bytes, Loss::Torn(1), Loss::Torn(2), Loss::Torn(3)];

impl Disk {
    /// All files of `before` are durable.
    fn new(root: &Path, before: &Tree) -> Self {
        let mut disk = Self { root: root.to_owned(), folders: vec![Folder::default()], ..Self::default() };
        for (name, bytes) in before {
            let mut folder = 0;
            let (parents, last) = name.rsplit_once('/').map_or((None, name.as_str()), |(p, last)| (Some(p), last));
            for part in parents.into_iter().flat_map(|p| p.split('/')) {
                folder = match disk.folders[folder].now.get(part) {
                    Some(&Node::Folder(number)) => number,
                    _ => {
                        disk.folders.push(Folder::default());
                        let number = disk.folders.len() - 1;
                        disk.folders[folder].now.insert(part.to_owned(), Node::Folder(number));
                        number
                    }
                };
            }
            if !last.is_empty() {
                disk.files.push(File { durable: bytes.clone(), pending: Vec::new() });
                let node = Node::File(disk.files.len() - 1);
                disk.folders[folder].now.insert(last.to_owned(), node);
            }
        }
        disk.folders.iter_mut().for_each(|folder| folder.durable = folder.now.clone());
        disk
    }

    /// The names of `path` below the root.
    fn parts(&self, path: &Path) -> Vec<String> {
        let relative = path.strip_prefix(&self.root).unwrap();
        let name = |part: Component<'_>| part.as_os_str().to_str().unwrap().to_owned();
        relative.components().map(name).collect()
    }

    fn folder(&self, parts: &[String]) -> usize {
        parts.iter().fold(0, |folder, part| match self.folders[folder].now.get(part) {
            Some(&Node::Folder(number)) => number,
            found => panic!("{part} of {parts:?} is {found:?}, not a folder"),
        })
    }

    /// The folder of `path`, and its name there.
    fn place(&self, path: &Path) -> (usize, String) {
        let mut parts = self.parts(path);
        let name = parts.pop().unwrap();
        (self.folder(&parts), name)
    }

    fn edit(&mut self, folder: usize, names: Vec<(String, Option<Node>)>, after: Option<usize>) -> usize {
        self.edits += 1;
        let at = &mut self.folders[folder];
        apply(&mut at.now, &names);
        at.pending.push(Edit { names, after, number: self.edits });
        self.edits
    }

    fn name(&mut self, path: &Path, node: Node) {
        let (folder, name) = self.place(path);
        self.edit(folder, vec![(name, Some(node))], None);
    }

    fn create(&mut self, id: usize) -> Node {
        self.files.push(File::default());
        self.open.insert(id, self.files.len() - 1);
        Node::File(self.files.len() - 1)
    }

    fn change(&mut self, id: usize, what: What) {
        let file = self.open[&id];
        self.files[file].pending.push(Change { step: self.step, what });
    }

    fn apply(&mut self, step: &Step) {
        self.step += 1;
        match step {
            Step::CreateFile { id, path } => {
                let node = self.create(*id);
                self.name(path, node);
            }
            Step::OpenFile { id, path } => {
                let (folder, name) = self.place(path);
                let Some(&Node::File(file)) = self.folders[folder].now.get(&name) else { panic!("{name} is no file") };
                self.open.insert(*id, file);
            }
            Step::CreateUnnamed { id } => drop(self.create(*id)),
            Step::Link { id, path } => self.name(path, Node::File(self.open[id])),
            Step::SetLen { id, len } => self.change(*id, What::Len(*len)),
            Step::Write { id, offset, bytes } => self.change(*id, What::Bytes(*offset, bytes.clone())),
            Step::SyncFile { id, until } => self.sync_file(self.open[id], *until),
            Step::CreateFolder { path } => {
                self.folders.push(Folder::default());
                self.name(path, Node::Folder(self.folders.len() - 1));
            }
            Step::Rename { from, to } => self.rename(from, to),
            Step::Remove { path } => {
                let (folder, name) = self.place(path);
                self.edit(folder, vec![(name, None)], None);
            }
            Step::SyncFolder { path } => {
                let folder = self.folder(&self.parts(path));
                let folder = &mut self.folders[folder];
                folder.durable = folder.now.clone();
                folder.pending.clear();
            }
        }
    }

    fn sync_file(&mut self, file: usize, until: usize) {
        let file = &mut self.files[file];
        let (durable, pending) = file.pending.drain(..).partition(|change| change.step <= until);
        file.pending = pending;
        let durable: Vec<Change> = durable;
        durable.iter().for_each(|change| write(&mut file.durable, &change.what, |_| true));
    }

    fn rename(&mut self, from: &Path, to: &Path) {
        let ((old, old_name), (new, new_name)) = (self.place(from), self.place(to));
        let node = self.folders[old].now[&old_name];
        if old == new {
            self.edit(old, vec![(new_name, Some(node)), (old_name, None)], None);
        } else {
            let added = self.edit(new, vec![(new_name, Some(node))], None);
            self.edit(old, vec![(old_name, None)], Some(added));
        }
    }

    /// The numbers of all edits that are not durable, and those that they need.
    fn pending(&self) -> Vec<(usize, Option<usize>)> {
        let edits = self.folders.iter().flat_map(|folder| &folder.pending);
        let mut edits: Vec<_> = edits.map(|edit| (edit.number, edit.after)).collect();
        edits.sort_unstable();
        edits
    }

    /// What is on the disk if these edits are, and the bytes are lost in this way.
    fn after_crash(&self, edits: &BTreeSet<usize>, loss: Loss) -> Tree {
        let mut found = Tree::new();
        self.show(0, "", edits, loss, &mut found);
        found
    }

    fn show(&self, folder: usize, prefix: &str, edits: &BTreeSet<usize>, loss: Loss, found: &mut Tree) {
        let folder = &self.folders[folder];
        let mut names = folder.durable.clone();
        let there = folder.pending.iter().filter(|edit| edits.contains(&edit.number));
        there.for_each(|edit| apply(&mut names, &edit.names));
        if names.is_empty() && !prefix.is_empty() {
            found.insert(prefix.to_owned(), Vec::new());
        }
        for (name, node) in names {
            match node {
                Node::File(file) => drop(found.insert(format!("{prefix}{name}"), self.files[file].after_crash(loss))),
                Node::Folder(inner) => self.show(inner, &format!("{prefix}{name}/"), edits, loss, found),
            }
        }
    }
}

fn apply(names: &mut BTreeMap<String, Node>, edits: &[(String, Option<Node>)]) {
    for (name, node) in edits {
        match node {
            Some(node) => drop(names.insert(name.clone(), *node)),
            None => drop(names.remove(name)),
        }
    }
}

impl File {
    fn after_crash(&self, loss: Loss) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for change in &self.pending {
            match (loss, &change.what) {
                (Loss::All, _) => {}
                (Loss::None, what) => write(&mut bytes, what, |_| true),
                (Loss::Bytes, What::Len(_)) => write(&mut bytes, &change.what, |_| true),
                (Loss::Bytes, What::Bytes(offset, new)) => {
                    let end = *offset as usize + new.len();
                    bytes.resize(bytes.len().max(end), 0);
                }
                (Loss::Torn(seed), What::Len(_)) => {
                    if coin(seed, change.step as u64) {
                        write(&mut bytes, &change.what, |_| true);
                    }
                }
                (Loss::Torn(seed), what) => write(&mut bytes, what, |page| coin(seed, page ^ (change.step as u64) << 40)),
            }
        }
        bytes
    }
}

/// Applies a change, of bytes only the pages that `is_there` accepts.
fn write(file: &mut Vec<u8>, what: &What, is_there: impl Fn(u64) -> bool) {
    match what {
        What::Len(len) => file.resize(*len as usize, 0),
        What::Bytes(offset, bytes) => {
            let mut at = *offset;
            let end = at + bytes.len() as u64;
            while at < end {
                let next = ((at / PAGE + 1) * PAGE).min(end);
                if is_there(at / PAGE) {
                    let from = (at - offset) as usize..(next - offset) as usize;
                    file.resize(file.len().max(next as usize), 0);
                    file[at as usize..next as usize].copy_from_slice(&bytes[from]);
                }
                at = next;
            }
        }
    }
}

/// A coin that falls the same way each time (SplitMix64).
fn coin(seed: u64, number: u64) -> bool {
    let mut z = (seed << 56 ^ number).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) & 1 == 1
}

/// The subsets of `pending` edits that may be on the disk: all subsets of a few, else those in
/// order, those with one missing or alone, and some at random.
fn subsets(pending: &[(usize, Option<usize>)]) -> BTreeSet<BTreeSet<usize>> {
    let count = pending.len();
    let chosen = |is_there: &dyn Fn(usize) -> bool| -> BTreeSet<usize> {
        pending.iter().enumerate().filter(|(i, _)| is_there(*i)).map(|(_, (number, _))| *number).collect()
    };
    let mut sets = BTreeSet::new();
    if count <= MAX_EXHAUSTIVE {
        sets.extend((0..1_u32 << count).map(|mask| chosen(&|i| mask >> i & 1 == 1)));
    } else {
        for edge in 0..=count {
            sets.extend([chosen(&|i| i < edge), chosen(&|i| i != edge), chosen(&|i| i == edge)]);
        }
        sets.extend((0..16).map(|seed| chosen(&|i| coin(seed, i as u64))));
    }
    let numbers: BTreeSet<usize> = pending.iter().map(|(number, _)| *number).collect();
    let valid = |set: &BTreeSet<usize>| {
        let needed = pending.iter().filter(|(number, _)| set.contains(number)).filter_map(|(_, after)| *after);
        needed.into_iter().all(|after| set.contains(&after) || !numbers.contains(&after))
    };
    sets.retain(valid);
    sets
}

/// What [`every_crash`] looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Steps, each cut once.
    pub(crate) steps: usize,
    /// Ways to lose what was not synced, over all cuts.
    pub(crate) crashes: usize,
    /// Different contents of the disk among them.
    pub(crate) states: usize,
}

/// A state of the disk after a crash.
#[derive(Debug)]
pub(crate) struct Crash<'a> {
    /// All files.
    pub(crate) tree: &'a Tree,
    /// Whether the crash came after the last step: nothing may be lost.
    pub(crate) at_end: bool,
    /// Whether no earlier state had the same names and lengths.
    pub(crate) is_new_shape: bool,
}

/// Calls `check` with every state that a crash may leave of `steps` below `root`, which had the
/// files `before`. Prints and returns how many there were.
pub(crate) fn every_crash(root: &Path, before: &Tree, steps: &[Step], mut check: impl FnMut(&Crash<'_>)) -> Counts {
    let mut disk = Disk::new(root, before);
    // Compared, not hashed: without optimisation hashing is slow.
    let (mut seen, mut shapes) = (BTreeSet::new(), HashSet::new());
    let mut crashes = 0;
    let cuts: Range<usize> = 0..steps.len() + 1;
    for cut in cuts {
        if let Some(step) = cut.checked_sub(1).map(|i| &steps[i]) {
            disk.apply(step);
        }
        for edits in subsets(&disk.pending()) {
            for loss in LOSSES {
                crashes += 1;
                let tree = disk.after_crash(&edits, loss);
                let at_end = cut == steps.len();
                if seen.insert((at_end, tree.clone())) {
                    let shape: Vec<_> = tree.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect();
                    let is_new_shape = shapes.insert(shape);
                    check(&Crash { tree: &tree, at_end, is_new_shape });
                }
            }
        }
    }
    let counts = Counts { steps: steps.len(), crashes, states: seen.len() };
    println!("{counts:?}");
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(before: &[(&str, &str)], steps: &[Step]) -> Vec<Tree> {
        let before = before.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect();
        let mut found = Vec::new();
        every_crash(Path::new("/r"), &before, steps, |crash| found.push(crash.tree.clone()));
        found
    }

    fn path(name: &str) -> PathBuf {
        Path::new("/r").join(name)
    }

    fn replaced(synced: bool) -> Vec<Tree> {
        let mut steps = vec![
            Step::CreateFile { id: 0, path: path("new") },
            Step::Write { id: 0, offset: 0, bytes: vec![7; 2000] },
            Step::Rename { from: path("new"), to: path("x") },
        ];
        if synced {
            steps.insert(2, Step::SyncFile { id: 0, until: 2 });
        }
        states(&[("x", "old")], &steps)
    }

    #[test]
    fn a_rename_before_a_sync_may_leave_an_empty_or_torn_file() {
        let contents: HashSet<Vec<u8>> = replaced(false).into_iter().map(|tree| tree["x"].clone()).collect();
        assert!(contents.contains(b"old".as_slice()) && contents.contains(b"".as_slice()));
        assert!(contents.contains(&vec![7; 2000]) && contents.contains(&vec![0; 2000]));
        assert!(contents.iter().any(|bytes| bytes.contains(&0) && bytes.contains(&7)), "torn");
        let contents: HashSet<Vec<u8>> = replaced(true).into_iter().map(|tree| tree["x"].clone()).collect();
        assert_eq!(contents, HashSet::from([b"old".to_vec(), vec![7; 2000]]));
    }

    #[test]
    fn names_may_be_lost_in_any_combination_until_their_folder_is_synced() {
        let mut steps: Vec<Step> =
            ["a", "b"].iter().enumerate().map(|(id, name)| Step::CreateFile { id, path: path(name) }).collect();
        let found = states(&[], &steps);
        assert!(found.iter().any(|tree| tree.contains_key("b") && !tree.contains_key("a")));
        steps.push(Step::SyncFolder { path: path("") });
        assert_eq!(states(&[], &steps).last().unwrap().len(), 2);
    }

    #[test]
    fn a_rename_between_folders_never_loses_the_file() {
        let steps = [
            Step::CreateFolder { path: path("d") },
            Step::SyncFolder { path: path("") },
            Step::Rename { from: path("x"), to: path("d/x") },
        ];
        let found = states(&[("x", "text")], &steps);
        assert!(found.iter().all(|tree| tree.values().any(|bytes| bytes == b"text")), "{found:?}");
        assert!(found.iter().any(|tree| tree.contains_key("x") && tree.contains_key("d/x")));
    }
}
