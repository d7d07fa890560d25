//! Checkpoints that were changed, cut, swapped or replaced: each one ends with an error of its own.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::tests::{checkpoint, model, written};
use super::*;
use crate::lora::adapter::{CONFIG, WEIGHTS};

/// Far more than any of these checkpoints takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Reads the checkpoint, and checks how the error is called and how long it took.
#[track_caller]
fn refused(what: &str, folder: &Path, expected: &str) {
    let began = Instant::now();
    let error = Checkpoint::read(folder, &model()).unwrap_err();
    let debug = format!("{error:?}");
    // An error of the adapter is in the one of the checkpoint.
    let inner = debug.split_once("source: ").map_or("", |(_, inner)| inner);
    assert!(debug.starts_with(expected) || inner.starts_with(expected), "{what}: {debug}");
    assert!(began.elapsed() < PATIENCE, "{what} took {:?}", began.elapsed());
}

/// The state file of a good checkpoint with a change.
#[track_caller]
fn changed(what: &str, expected: &str, change: impl FnOnce(&mut Value)) {
    let (_out, folder) = written();
    let path = folder.join(STATE);
    let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut file);
    fs::write(path, file.to_string()).unwrap();
    refused(what, &folder, expected);
}

/// Another value of the same kind.
fn other(value: &Value) -> Value {
    match value {
        Value::Bool(flag) => json!(!flag),
        Value::Number(number) if number.is_u64() => json!(number.as_u64().unwrap() ^ 1),
        Value::Number(number) if number.is_i64() => json!(number.as_i64().unwrap() + 1),
        Value::Number(number) => json!(number.as_f64().unwrap().next_up()),
        Value::String(text) => json!(format!("{text}0")),
        other => panic!("{other}"),
    }
}

#[test]
fn each_field_of_the_state_is_covered() {
    let state = serde_json::to_value(checkpoint(7).state).unwrap();
    let state = state.as_object().unwrap();
    assert_eq!(state.len(), 14);
    for (key, value) in state {
        match value {
            Value::Object(entries) => {
                for (name, value) in entries {
                    let expected = "StateChecksum";
                    changed(name, expected, |file| file["state"][key][name] = other(value));
                    changed(name, expected, |file| drop(file["state"][key].as_object_mut().unwrap().remove(name)));
                }
            }
            value => changed(key, "StateChecksum", |file| file["state"][key] = other(value)),
        }
        // An absent number that may be null is null.
        let absent = if key.starts_with("best_") && key != "best_step" { "StateChecksum" } else { "Json" };
        changed(key, absent, |file| drop(file["state"].as_object_mut().unwrap().remove(key)));
        changed(key, if absent == "Json" { absent } else { "StateChecksum" }, |file| file["state"][key] = Value::Null);
        changed(key, "Json", |file| file["state"][key] = json!([[]]));
    }
}

#[test]
fn the_fields_around_the_state_are_covered() {
    changed("the checksum of the state", "StateChecksum", |file| file["state_checksum"] = other(&file["state_checksum"]));
    changed("the checksum of the numbers", "Checksum", |file| file["checksum"] = other(&file["checksum"]));
    changed("an older format", "Format", |file| file["format"] = json!(3));
    changed("a newer format", "Format", |file| file["format"] = json!(u32::MAX));
    changed("no format", "Json", |file| drop(file.as_object_mut().unwrap().remove("format")));
    changed("no checksum", "Json", |file| drop(file.as_object_mut().unwrap().remove("state_checksum")));
    changed("an unknown field", "Json", |file| file["more"] = json!(1));
    changed("a list", "Json", |file| *file = json!([file.clone()]));
    let (_out, folder) = written();
    let text = fs::read_to_string(folder.join(STATE)).unwrap();
    let put = |text: &str| fs::write(folder.join(STATE), text).unwrap();
    put(&text.replacen("\"format\": 4", "\"format\": 4, \"format\": 4", 1));
    refused("two formats", &folder, "Json");
    put(&text.replacen("\"epoch\":", "\"epoch\": 1, \"epoch\":", 1));
    refused("two epochs", &folder, "Json");
    put(&"[".repeat(1 << 19));
    refused("deeply nested", &folder, "Json");
    put(&format!("{text}{}", " ".repeat(1 << 20)));
    refused("a megabyte of spaces", &folder, "File(TooLarge");
    put(&format!(" {} ", text.replace('\n', "")));
    assert!(Checkpoint::read(&folder, &model()).is_ok(), "spaces mean nothing");
}

#[test]
fn a_folder_of_another_step() {
    let (out, folder) = written();
    for name in ["checkpoint-8", "checkpoint-70", "aside-1-checkpoint-6", "aside-12-checkpoint-8"] {
        let other = out.path().join(name);
        fs::rename(&folder, &other).unwrap();
        refused(name, &other, "Step");
        refused("by another path", &other.join("..").join(name), "Step");
        fs::rename(&other, &folder).unwrap();
    }
    for name in ["aside-1-checkpoint-7", "mine", "checkpoint-7-copy"] {
        let other = out.path().join(name);
        fs::rename(&folder, &other).unwrap();
        Checkpoint::read(&other, &model()).unwrap();
        fs::rename(&other, &folder).unwrap();
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("checkpoint-7", out.path().join("checkpoint-9")).unwrap();
        Checkpoint::read(&out.path().join("checkpoint-9"), &model()).unwrap();
    }
}

#[test]
fn settings_of_the_adapter_are_covered() {
    let (_out, folder) = written();
    let path = folder.join(CONFIG);
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value, expected) in [
        ("lora_alpha", json!(16), "Checksum"),
        ("lora_dropout", json!(0.5), "Checksum"),
        ("use_rslora", json!(true), "Checksum"),
        ("r", json!(4), "Shape"),
        ("target_modules", json!(["q_proj"]), "UnexpectedTensor"),
        ("base_model_name_or_path", json!("another"), ""),
    ] {
        let mut config = good.clone();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        if expected.is_empty() {
            Checkpoint::read(&folder, &model()).unwrap();
        } else {
            refused(key, &folder, expected);
        }
    }
}

/// The files of two checkpoints of one run, exchanged in every way.
#[test]
fn files_swapped_between_folders() {
    for names in [&[STATE][..], &[OPTIMIZER], &[WEIGHTS], &[WEIGHTS, OPTIMIZER], &[STATE, OPTIMIZER], &[STATE, WEIGHTS]] {
        let (out, folder) = written();
        let other = checkpoint(8).write(out.path()).unwrap();
        for name in names {
            let aside = out.path().join("aside");
            fs::rename(folder.join(name), &aside).unwrap();
            fs::rename(other.join(name), folder.join(name)).unwrap();
            fs::rename(aside, other.join(name)).unwrap();
        }
        let expected = if names.contains(&STATE) { "Step" } else { "Checksum" };
        refused(&format!("{names:?}"), &folder, expected);
        refused(&format!("{names:?}"), &other, expected);
    }
}

#[cfg(unix)]
#[test]
fn links_pipes_and_devices() {
    use std::os::unix::fs::symlink;
    for name in [STATE, OPTIMIZER, WEIGHTS, CONFIG] {
        let (out, folder) = written();
        let path = folder.join(name);
        let elsewhere = out.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        for (what, target) in
            [("the same file", elsewhere.as_path()), ("/dev/zero", Path::new("/dev/zero")), ("nothing", Path::new("-"))]
        {
            symlink(target, &path).unwrap();
            refused(&format!("{name}: a link to {what}"), &folder, "File(Link");
            fs::remove_file(&path).unwrap();
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        refused(&format!("{name}: a pipe"), &folder, "File(NotAFile");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused(&format!("{name}: a folder"), &folder, "File(NotAFile");
    }
}

#[test]
fn sparse_files() {
    for (name, expected) in
        [(STATE, "File(TooLarge"), (OPTIMIZER, "FileLength"), (WEIGHTS, "Safetensors(FileLength"), (CONFIG, "File(TooLarge")]
    {
        let (_out, folder) = written();
        // Some file systems have no files of that size.
        if fs::File::options().write(true).open(folder.join(name)).and_then(|file| file.set_len(1 << 40)).is_ok() {
            refused(name, &folder, expected);
        }
    }
}

#[test]
fn moments_with_a_header_that_lies() {
    let (_out, folder) = written();
    let path = folder.join(OPTIMIZER);
    let good = fs::read(&path).unwrap();
    let put = |header: &str, data: &[u8]| {
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
        fs::write(&path, bytes).unwrap();
    };
    let end = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let (header, data) = (str::from_utf8(&good[8..end]).unwrap().trim_end(), &good[end..]);
    put(header, data);
    Checkpoint::read(&folder, &model()).unwrap();
    let first = header.split('"').find(|text| text.ends_with(".exp_avg")).unwrap();
    let cases = [
        ("no tensor", "{}".to_owned(), "FileLength"),
        (
            "a tensor twice",
            header.replacen('{', &format!("{{\"{first}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}},"), 1),
            "Duplicate",
        ),
        (
            "a tensor more",
            header.replacen('{', "{\"more\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},", 1),
            "Tensor",
        ),
        ("another type", header.replace("F32", "I32"), "Tensor"),
        ("a name changed", header.replacen(first, "x", 1), "Layout(TensorNotFound"),
        ("a name that is a number", header.replacen(&format!("\"{first}\""), "7", 1), "Json"),
    ];
    for (what, header, expected) in cases {
        put(&header, data);
        refused(what, &folder, expected);
    }
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    refused("a huge header", &folder, "HeaderLength");
    fs::write(&path, b"").unwrap();
    refused("empty", &folder, "Truncated");
}
