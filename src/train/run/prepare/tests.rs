#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;

use super::*;

#[test]
fn folders_are_recognised_by_their_kind() {
    let folder = tempfile::tempdir().unwrap();
    let config = include_bytes!("../../../../tests/fixtures/tiny-qwen3/config.json");
    let model = ModelConfig::parse(config, None).unwrap();
    let found = |name: &str, resume: Option<&Path>| match check_folder(&folder.path().join(name), resume, &model) {
        Ok(()) => None,
        Err(RunError::Occupied { found, .. }) => Some(found),
        Err(error) => panic!("{error}"),
    };
    let put = |path: &str| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "{}").unwrap();
    };
    assert_eq!(found("none", None), None);
    put("records/metrics.jsonl");
    assert_eq!(found("records", None), Some(Leftover::Records));
    put("settings/adapter_config.json");
    assert_eq!(found("settings", None), Some(Leftover::Adapter));
    let settings = Settings { rank: 2, ..Settings::default() };
    let mut adapter = Adapter::new(settings.lora(), None, &model, 1).unwrap();
    adapter.write(&folder.path().join("untrained"), &[]).unwrap();
    put("untrained/metrics.jsonl");
    assert_eq!(found("untrained", None), None);
    adapter.vector.fill(0.5);
    adapter.write(&folder.path().join("trained"), &[]).unwrap();
    assert_eq!(found("trained", None), Some(Leftover::Adapter));
    put("foreign/checkpoint-500/trainer_state.json");
    put("foreign/checkpoint-last/optimizer.pt");
    assert_eq!(found("foreign", None), Some(Leftover::Foreign));
    assert_eq!(found("foreign", Some(Path::new("foreign/checkpoint-1"))), Some(Leftover::Foreign));
}
