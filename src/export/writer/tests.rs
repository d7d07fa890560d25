//! A snapshot folder that is cut at each step of its writing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;

use crate::PackSource;
use crate::convert::synth::{self, Shape};
use crate::convert::{Options, convert};
use crate::export::export_sharded;
use crate::format::FloatType;
use crate::io::{crash, record};

const SHAPE: Shape = Shape {
    hidden: 48,
    intermediate: 80,
    layers: 1,
    heads: 2,
    kv_heads: 1,
    head_dim: 24,
    vocabulary: 50,
    tied: true,
    q_k_norm: true,
};

/// Checks that each crash of `write` leaves no part of `root/snapshot`, and that `write` then
/// succeeds.
pub(crate) fn cut(empty: bool, write: impl Fn(&Path)) {
    let root = tempfile::tempdir().unwrap();
    let before: crash::Tree = empty.then(|| ("snapshot/".to_owned(), Vec::new())).into_iter().collect();
    crash::put(&before, root.path());
    let recording = record::start(root.path());
    write(&root.path().join("snapshot"));
    let whole = crash::tree(root.path());
    assert!(whole.keys().all(|name| name.starts_with("snapshot/")), "{:?}", whole.keys());
    let visible = |tree: &crash::Tree| -> crash::Tree {
        tree.iter().filter(|(name, _)| !name.starts_with(".nf4pack-")).map(|(n, b)| (n.clone(), b.clone())).collect()
    };
    let counts = crash::every_crash(root.path(), &before, &recording.steps(), |crash| {
        let visible = visible(crash.tree);
        assert!(visible == whole || (!crash.at_end && visible == before), "a part: {:?}", visible.keys());
        if crash.is_new_shape && visible != whole {
            let root = tempfile::tempdir().unwrap();
            crash::put(crash.tree, root.path());
            write(&root.path().join("snapshot"));
            assert!(crash::tree(root.path()) == whole);
        }
    });
    assert!(counts.steps > 15 && counts.states > 15, "{counts:?}");
}

#[test]
fn cut_at_any_step_an_export_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let (source, pack) = (folder.path().join("model"), folder.path().join("m.nf4pack"));
    synth::write(&source, &SHAPE, 7, None, &()).unwrap();
    convert(&source, &pack, Options::default(), &()).unwrap();
    let pack = PackSource::open(&pack).unwrap();
    for empty in [false, true] {
        cut(empty, |target| drop(export_sharded(&pack, target, FloatType::Bf16, 20_000, &()).unwrap()));
    }
}
