//! Adapters that were made to hang or crash their reader, or to fill its memory: each one ends with
//! an error of its own, at once.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;
use crate::lora::config::TARGETS;

/// Far more than any of these adapters takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn model() -> ModelConfig {
    ModelConfig::parse(&fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap(), None).unwrap()
}

/// The name of a matrix of `q_proj`.
fn name(layer: u32, which: &str) -> String {
    format!("base_model.model.model.layers.{layer}.self_attn.q_proj.{which}.weight")
}

/// The header of a good adapter of rank 2 on `q_proj`, and the bytes of its data.
fn good() -> (Value, usize) {
    let (mut header, mut end) = (json!({}), 0);
    for layer in 0..4 {
        for (which, shape) in [("lora_A", [2, 192]), ("lora_B", [256, 2])] {
            let start = end;
            end += 4 * shape[0] * shape[1];
            header[name(layer, which)] = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        }
    }
    (header, end)
}

/// A safetensors file with this header, and a length field that says so.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

/// The weights with a change of their header.
fn header(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (mut header, end) = good();
    change(&mut header);
    file(&header.to_string(), end)
}

fn settings() -> Value {
    json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"] })
}

/// The settings with a change.
fn with(key: &str, value: Value) -> Vec<u8> {
    let mut settings = settings();
    settings[key] = value;
    settings.to_string().into_bytes()
}

fn put(folder: &Path, config: &[u8], weights: &[u8]) {
    fs::write(folder.join(CONFIG), config).unwrap();
    fs::write(folder.join(WEIGHTS), weights).unwrap();
}

/// Reads an adapter, and checks how the error is called and how long it took.
#[track_caller]
fn refused(what: &str, folder: &Path, expected: &str) {
    let began = Instant::now();
    let error = Adapter::read(folder, &model()).unwrap_err();
    assert!(format!("{error:?}").starts_with(expected), "{what}: {error:?}");
    assert!(began.elapsed() < PATIENCE, "{what} took {:?}", began.elapsed());
    assert!(error.to_string().len() < 10_000, "{what}: an error of {} bytes", error.to_string().len());
}

#[test]
fn the_good_adapter_is_read() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), settings().to_string().as_bytes(), &header(|_| {}));
    assert_eq!(Adapter::read(folder.path(), &model()).unwrap().config.targets, [Role::QProj]);
}

#[test]
fn weights_whose_header_lies() {
    let (a, b) = (name(0, "lora_A"), name(0, "lora_B"));
    let (a, b) = (a.as_str(), b.as_str());
    let (good_header, end) = good();
    let text = good_header.to_string();
    let length = |field: u64| [&field.to_le_bytes()[..], text.as_bytes(), &vec![0; end]].concat();
    let offsets = |tensor: &str, offsets: Value| header(|h| h[tensor]["data_offsets"] = offsets);
    let shape = |shape: Value| header(|h| h[a]["shape"] = shape);
    let whole = file(&text, end);
    let twice = text.replacen('{', &format!("{{\"{a}\":{},", good_header[a]), 1);
    let many: Vec<String> =
        (0..50_000).map(|n| format!("\"t{n}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}")).collect();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "Safetensors(Truncated"),
        ("seven bytes", vec![0; 7], "Safetensors(Truncated"),
        ("a length field alone", vec![0; 8], "Safetensors(Json"),
        ("a header of 2^64 - 1 bytes", length(u64::MAX), "Safetensors(HeaderLength"),
        ("a header of 2^63 bytes", length(1 << 63), "Safetensors(HeaderLength"),
        ("a header past the end", length(16 << 20), "Safetensors(Truncated"),
        ("a header cut by its length", length(20), "Safetensors(Json"),
        ("an empty object", file("{}", 0), "NoMatrices"),
        ("a list", file("[]", 0), "Safetensors(Json"),
        ("a number", file("7", 0), "Safetensors(Json"),
        (
            "not UTF-8",
            file("{\"\u{fffd}", 0).into_iter().map(|b| if b == 0xef { 0xff } else { b }).collect(),
            "Safetensors(Json",
        ),
        ("deeply nested", file(&format!("{{\"x\":{}", "[".repeat(1 << 20)), 0), "Safetensors(Json"),
        ("deeply nested metadata", file(&format!("{{\"__metadata__\":{}", "[".repeat(1 << 20)), 0), "Safetensors(Json"),
        ("two of a name", file(&twice, end), "Safetensors(Duplicate"),
        (
            "two of the metadata",
            file(&text.replacen('{', "{\"__metadata__\":{},\"__metadata__\":{},", 1), end),
            "Safetensors(Duplicate",
        ),
        ("an unknown type", header(|h| h[a]["dtype"] = json!("F7")), "Safetensors(Json"),
        ("a type that is no string", header(|h| h[a]["dtype"] = json!(1)), "Safetensors(Json"),
        ("no shape", header(|h| h[a] = json!({ "dtype": "F32", "data_offsets": [0, 1536] })), "Safetensors(Json"),
        ("a negative size", shape(json!([-2, 192])), "Safetensors(Json"),
        ("a fraction as size", shape(json!([2.5, 192])), "Safetensors(Json"),
        ("a product past 2^64", shape(json!([1_u64 << 40, 1_u64 << 40])), "Safetensors(Layout"),
        ("bits past 2^64", shape(json!([1_u64 << 60])), "Safetensors(Layout"),
        ("many sizes", shape(json!(vec![1_u64 << 2; 100_000])), "Safetensors(Layout"),
        ("a shape of other length", shape(json!([3, 192])), "Safetensors(Layout"),
        ("a type of other length", header(|h| h[a]["dtype"] = json!("F16")), "Safetensors(Layout"),
        ("offsets that run backwards", offsets(a, json!([1536, 0])), "Safetensors(Layout"),
        ("offsets past 2^63", offsets(a, json!([0, u64::MAX])), "Safetensors(Layout"),
        ("overlapping tensors", offsets(b, json!([0, 2048])), "Safetensors(Layout"),
        ("a gap", offsets(b, json!([1600, 3648])), "Safetensors(Layout"),
        ("cut off", whole[..whole.len() - 1].to_vec(), "Safetensors(FileLength"),
        ("a byte more", [&whole[..], &[0]].concat(), "Safetensors(FileLength"),
        ("another shape of that length", shape(json!([192, 2])), "Shape"),
        ("one dimension more", shape(json!([2, 192, 1])), "Shape"),
        ("no dimension", shape(json!([])), "Safetensors(Layout"),
        ("integers", header(|h| h[a]["dtype"] = json!("I32")), "Type"),
        ("numbers of eight bits", header(|h| (h[a]["dtype"], h[a]["shape"]) = (json!("U8"), json!([8, 192]))), "Shape"),
        ("50,000 empty tensors", file(&format!("{{{}}}", many.join(",")), 0), "NoMatrices"),
        (
            "fewer tensors than layers",
            file("{\"x.lora_A.weight\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0),
            "Layers",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (what, weights, expected) in &cases {
        put(folder.path(), settings().to_string().as_bytes(), weights);
        refused(what, folder.path(), expected);
    }
    assert!(cases.len() >= 25);
}

#[test]
fn settings_that_ask_for_memory_or_time() {
    let slow = "(?=a*)(?:(?:.*){1,9}){1,9}(?!.*_proj)x";
    let nested = format!("{}q_proj{}", "(?:".repeat(5000), ")".repeat(5000));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("[rank] a rank of 2^24", with("r", json!(1 << 24)), "Lora(TooLarge"),
        ("a rank of 2^32 - 1", with("r", json!(u32::MAX)), "Lora(TooLarge"),
        ("a rank of 2^32", with("r", json!(1_u64 << 32)), "Settings"),
        ("a rank that is not in the file", with("r", json!(4096)), "Shape"),
        ("a slow pattern", with("target_modules", json!(slow)), "SlowPattern"),
        ("a pattern in many brackets", with("target_modules", json!(nested)), "Pattern"),
        ("a pattern with a huge count", with("target_modules", json!("((a{1000}){1000}){1000}")), "Pattern"),
        (
            "100,000 names",
            with("target_modules", json!((0..100_000).map(|n| n.to_string()).collect::<Vec<_>>())),
            "Lora(NoTarget",
        ),
        ("layers up to 100,000", with("layers_to_transform", json!((10..100_000).collect::<Vec<_>>())), "Lora(NoTarget"),
        ("a huge value", with("use_dora", json!("x".repeat(900_000))), "Unsupported"),
        ("many nested lists", "[".repeat(1 << 20).into_bytes(), "Json"),
        ("a megabyte too much", vec![b' '; (1 << 20) + 1], "File(TooLarge"),
        ("no bytes", vec![], "Json"),
        ("an alpha that is infinite", settings().to_string().replace("4", "1e999").into_bytes(), "Json"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (what, config, expected) in &cases {
        put(folder.path(), config, &header(|_| {}));
        refused(what, folder.path(), expected);
    }
}

/// [layers-adapter]
#[test]
fn layers_that_the_file_does_not_have_cost_nothing() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), with("target_modules", json!("all-linear")).as_slice(), &header(|_| {}));
    let model = ModelConfig { layers: u32::MAX, ..model() };
    let error = Adapter::read(folder.path(), &model).unwrap_err();
    assert!(matches!(error, AdapterError::Layers { layers: u32::MAX, found: 8 }), "{error}");
}

/// A config.json that is read, of the largest sizes: no sum or product of sizes overflows.
#[test]
fn sizes_of_a_hostile_model_are_errors() {
    let mut config: Value = serde_json::from_slice(&fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap()).unwrap();
    config["head_dim"] = json!(2);
    for key in ["num_attention_heads", "num_key_value_heads"] {
        config[key] = json!((1_u32 << 31) - 1);
    }
    for key in ["hidden_size", "intermediate_size", "vocab_size"] {
        config[key] = json!(u32::MAX);
    }
    let wide = ModelConfig::parse(config.to_string().as_bytes(), None).unwrap();
    let wide = ModelConfig { layers: u32::MAX, ..wide };
    for rank in [1, 1 << 16, 1 << 24, u32::MAX] {
        let config = LoraConfig { rank, alpha: 1.0, dropout: 0.0, targets: TARGETS.to_vec(), rslora: false };
        let error = AdapterLayout::new(&config, &wide);
        let fits = |layout: &AdapterLayout| layout.parameters() == 4 * u64::from(rank) && layout.len() < usize::MAX / 4;
        assert!(error.as_ref().map_or_else(|e| *e == LoraError::TooLarge { rank }, fits), "{rank}: {error:?}");
    }
}

/// Puts something that is no file in the place of each file of an adapter.
#[cfg(unix)]
#[test]
fn files_that_are_none() {
    use std::os::unix::fs::symlink;
    type Make = fn(&Path);
    let kinds: [(&str, Make, &str); 8] = [
        ("a pipe", |path| rustix::fs::mkfifoat(rustix::fs::CWD, path, 0o600.into()).unwrap(), "File(NotAFile"),
        ("a socket", |path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()), "File(NotAFile"),
        ("a folder", |path| fs::create_dir(path).unwrap(), "File(NotAFile"),
        ("[devzero] a link to /dev/zero", |path| symlink("/dev/zero", path).unwrap(), "File(NotAFile"),
        ("a link to /dev/tty", |path| symlink("/dev/tty", path).unwrap(), "File(NotAFile"),
        ("a link to itself", |path| symlink(path, path).unwrap(), "Read"),
        ("a link to nothing", |path| symlink("nothing", path).unwrap(), "Read"),
        ("a link to a folder", |path| symlink(".", path).unwrap(), "File(NotAFile"),
    ];
    for name in [CONFIG, WEIGHTS] {
        for (what, make, expected) in kinds {
            let folder = tempfile::tempdir().unwrap();
            put(folder.path(), settings().to_string().as_bytes(), &header(|_| {}));
            fs::remove_file(folder.path().join(name)).unwrap();
            make(&folder.path().join(name));
            refused(&format!("{name}: {what}"), folder.path(), expected);
        }
    }
}

/// Files of a terabyte that take no space.
#[test]
fn sparse_files() {
    let sparse = |path: &Path, start: &[u8]| {
        fs::write(path, start).unwrap();
        // Some file systems have no files of that size.
        File::options().write(true).open(path).and_then(|file| file.set_len(1 << 40)).is_ok()
    };
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), settings().to_string().as_bytes(), &header(|_| {}));
    let weights = folder.path().join(WEIGHTS);
    if !sparse(&weights, b"") {
        return;
    }
    refused("zeros", folder.path(), "Safetensors(Json");
    assert!(sparse(&weights, &header(|_| {})));
    refused("a good header", folder.path(), "Safetensors(FileLength");
    // By its header it has all of these bytes; by its settings it is too large for the model.
    let rank = ((1_u64 << 40) - 4096) / (4 * 448 * 4);
    let (mut header, mut end) = (json!({}), 0);
    for layer in 0..4 {
        for (which, shape) in [("lora_A", [rank, 192]), ("lora_B", [256, rank])] {
            let start = end;
            end += 4 * shape[0] * shape[1];
            header[name(layer, which)] = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        }
    }
    let start = file(&header.to_string(), 0);
    assert!(sparse(&weights, &start));
    File::options().write(true).open(&weights).unwrap().set_len(start.len() as u64 + end).unwrap();
    refused("a rank of another size", folder.path(), "Shape");
    fs::write(folder.path().join(CONFIG), with("r", json!(rank))).unwrap();
    refused("a rank of that size", folder.path(), "Lora(TooLarge");
    assert!(sparse(&folder.path().join(CONFIG), b"{}"));
    refused("settings", folder.path(), "File(TooLarge");
}

/// Caches of the hub are folders of links.
#[cfg(unix)]
#[test]
fn links_to_files_are_followed() {
    use std::os::unix::fs::symlink;
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/0123"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    put(&blobs, settings().to_string().as_bytes(), &header(|_| {}));
    for name in [CONFIG, WEIGHTS] {
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    Adapter::read(&snapshot, &model()).unwrap();
    let error = Adapter::read_with(&snapshot, &model(), Links::Refuse).unwrap_err();
    assert!(matches!(error, AdapterError::File(FileError::Link { .. })), "{error}");
}
