//! A merged snapshot that is cut at each step of its writing.

use super::*;
use crate::PackSource;
use crate::convert::synth::{self, Shape};
use crate::convert::{Options, convert};
use crate::format::Role;
use crate::lora::config::LoraConfig;

#[test]
fn cut_at_any_step_a_merge_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path, tuned) =
        (folder.path().join("model"), folder.path().join("m.nf4pack"), folder.path().join("adapter"));
    let shape = Shape::from_name("tiny").unwrap();
    let shape = Shape { hidden: 64, intermediate: 64, layers: 1, heads: 1, kv_heads: 1, vocabulary: 64, ..shape };
    synth::write(&source, &shape, 7, None, &()).unwrap();
    convert(&source, &path, Options::default(), &()).unwrap();
    let model = ModelConfig::of_pack(&PackSource::open(&path).unwrap()).unwrap();
    let config = LoraConfig { rank: 1, alpha: 1.0, dropout: 0.0, targets: vec![Role::QProj], rslora: false };
    Adapter::new(config, None, &model, 1).unwrap().write(&tuned, &[]).unwrap();
    let pack = PackSource::open(&path).unwrap();
    let sources = Sources { pack: &pack, adapter: &tuned, base: Base::Dequantised };
    writer::tests::cut(false, |target| drop(merge(&sources, target, 20_000, &()).unwrap()));
}
