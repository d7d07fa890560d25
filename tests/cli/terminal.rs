//! Texts of strangers on the terminal: nothing that a pack, a checkpoint, an adapter, a data file
//! or a file's name says can act on the terminal, hide there, or pass for a line of the program.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::program::{PACK, TINY, command, place};
use crate::common::{self, Item, unpack};

/// A title of the window, reordered text, a colour by a C1 character, a line of its own, invisible
/// characters, a tag, and a separator of lines.
const HOSTILE: &str = "\x1b]0;pwned\x07\u{202e}txt\u{9b}31m\r\nFORGED\t\u{200b}\u{2066}\u{e0041}\u{2028}\x08";
/// What a forged line starts with.
const FORGED: &str = "FORGED";
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");

/// Whether a terminal acts on the character or hides it, by the ranges of Unicode and apart from
/// the program's own list.
fn is_hidden(c: char) -> bool {
    let control = c.is_control() && !matches!(c, '\n' | '\t');
    let format = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    control || format
}

/// What a command printed.
struct Printed {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs a command and checks what it prints on both streams.
#[track_caller]
fn run(folder: &Path, arguments: &[&str]) -> Printed {
    let output = command(folder, arguments).write_stdin("hello\n").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let printed = Printed { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
    for stream in [&printed.stdout, &printed.stderr] {
        let hidden = stream.chars().find(|&c| is_hidden(c));
        assert!(hidden.is_none(), "{arguments:?} prints {hidden:?}: {stream:?}");
        assert!(!stream.lines().any(|line| line.starts_with(FORGED)), "{arguments:?} prints a forged line: {stream}");
    }
    assert!(matches!(printed.code, Some(0..=2)), "{arguments:?}: {:?}: {}", printed.code, printed.stderr);
    printed
}

/// Runs a command that must fail, and name the hostile text.
#[track_caller]
fn fails(folder: &Path, arguments: &[&str]) {
    let printed = run(folder, arguments);
    assert_ne!(printed.code, Some(0), "{arguments:?}");
    assert!(printed.stderr.contains(FORGED), "{arguments:?} does not name the text: {}", printed.stderr);
}

/// Runs a command that must print the hostile text.
#[track_caller]
fn shows(folder: &Path, arguments: &[&str]) {
    let printed = run(folder, arguments);
    let found = [&printed.stdout, &printed.stderr].iter().any(|stream| stream.contains(FORGED));
    assert!(found, "{arguments:?} does not show the text: {}{}", printed.stdout, printed.stderr);
}

/// A folder with the pack of the bundled model, and the items of that pack.
struct Place {
    folder: TempDir,
    items: Vec<Item>,
    layers: u32,
    metadata: String,
}

impl Place {
    fn new() -> Self {
        let folder = place();
        let (items, layers, metadata) = unpack(&fs::read(folder.path().join(PACK)).unwrap());
        Self { folder, items, layers, metadata }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a pack with these items and this metadata.
    fn pack(&self, items: &[Item], metadata: &str) -> &'static str {
        fs::write(self.path().join("hostile.nf4pack"), common::pack(items, self.layers, metadata)).unwrap();
        "hostile.nf4pack"
    }

    /// Writes the pack with a file in place of its own.
    fn with_file(&self, name: &str, contents: &str) -> &'static str {
        let mut items = self.items.clone();
        items.retain(|item| item.entry.name != name);
        items.push(Item::file(name, contents.as_bytes()));
        self.pack(&items, &self.metadata)
    }

    /// Writes the pack with a changed JSON file.
    fn with_json(&self, name: &str, change: impl FnOnce(&mut Value)) -> &'static str {
        let mut file: Value = serde_json::from_slice(self.file(name)).unwrap();
        change(&mut file);
        self.with_file(name, &file.to_string())
    }

    fn file(&self, name: &str) -> &[u8] {
        &self.items.iter().find(|item| item.entry.name == name).unwrap().payloads[0]
    }

    fn write(&self, name: &str, contents: &str) {
        fs::write(self.path().join(name), contents).unwrap();
    }

    /// A copy of the bundled checkpoint.
    fn checkpoint(&self) -> PathBuf {
        let copy = self.path().join("checkpoint");
        let _ = fs::remove_dir_all(&copy);
        copy_folder(Path::new(TINY), &copy);
        copy
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Every string of a JSON value replaced, one at a time: the value, and where.
fn each_string(value: &Value) -> Vec<(String, Value)> {
    let replaced = |at: String, make: &dyn Fn(Value) -> Value, inner: &Value| -> Vec<(String, Value)> {
        each_string(inner).into_iter().map(|(path, inner)| (format!("{at}.{path}"), make(inner))).collect()
    };
    match value {
        Value::String(_) => vec![(String::new(), json!(HOSTILE))],
        Value::Array(list) => (0..list.len().min(1))
            .flat_map(|i| {
                let make = |inner| {
                    let mut list = list.clone();
                    list[i] = inner;
                    json!(list)
                };
                replaced(i.to_string(), &make, &list[i])
            })
            .collect(),
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, inner)| {
                let make = |inner| {
                    let mut map = map.clone();
                    map.insert(key.clone(), inner);
                    json!(map)
                };
                replaced(key.clone(), &make, inner)
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// [escape], [bidi]
#[test]
fn metadata_and_names_of_a_pack_are_escaped() {
    let place = Place::new();
    let sources = json!([{"file": HOSTILE, "bytes": 1, "sha256": HOSTILE}]);
    let metadata = json!({
        "tool": HOSTILE, "model_type": HOSTILE, "tied_embeddings": true, "encoder": HOSTILE, "scales": HOSTILE,
        "block_size": 64, "keep": HOSTILE, "quantize": HOSTILE, "dropped": [HOSTILE], "sources": sources,
    });
    let mut items = place.items.clone();
    items.push(Item::raw(&format!("other{HOSTILE}"), nf4pack::format::FloatType::F32, &[3]));
    let pack = place.pack(&items, &metadata.to_string());
    let folder = place.path();
    shows(folder, &["inspect", pack]);
    shows(folder, &["inspect", pack, "--tensors"]);
    run(folder, &["inspect", pack, "--layer", "0"]);
    run(folder, &["verify", pack]);
    shows(folder, &["verify", pack, "--against", TINY]);
    run(folder, &["export", pack, "exported"]);
    run(folder, &["merge", pack, "--adapter", ADAPTER, "--base", "dequant", "--out", "merged", "--no-compare"]);
    run(folder, &["merge", pack, "--adapter", ADAPTER, "--base", TINY, "--out", "merged", "--no-compare"]);

    // Metadata that is no provenance record.
    run(folder, &["inspect", place.pack(&items, &json!(HOSTILE).to_string())]);
    // A name that no file of a pack may have, in the place of one with as many bytes.
    let mut bytes = fs::read(folder.join(PACK)).unwrap();
    let at = bytes.windows(11).position(|bytes| bytes == b"config.json").unwrap();
    common::put(&mut bytes, at, b"\x1b]0;pwned!\x07");
    common::seal::seal(&mut bytes);
    fs::write(folder.join("named.nf4pack"), bytes).unwrap();
    let named = run(folder, &["inspect", "named.nf4pack"]);
    assert!(named.code == Some(1) && named.stderr.contains("pwned!"), "{}", named.stderr);
    // A damaged tensor, whose name is in the message.
    let mut bytes = fs::read(folder.join(pack)).unwrap();
    let index = nf4pack::format::Index::parse(&bytes, bytes.len() as u64).unwrap();
    let damaged = index.sections().iter().find(|section| index.name(section).starts_with("other")).unwrap();
    bytes[damaged.offset as usize] ^= 1;
    fs::write(folder.join("damaged.nf4pack"), bytes).unwrap();
    fails(folder, &["verify", "damaged.nf4pack"]);
}

#[test]
fn configurations_of_a_pack_are_escaped() {
    let place = Place::new();
    place.write("data.txt", "Once upon a time.");
    let config: Value = serde_json::from_slice(place.file("config.json")).unwrap();
    let mut configs = each_string(&config);
    let key = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        (key.to_owned(), config)
    };
    configs.push(key(HOSTILE, json!(1)));
    configs.push(key("rope_scaling", json!({"rope_type": HOSTILE, "factor": 2.0})));
    configs.push(key("hidden_size", json!(HOSTILE)));
    let mut named = 0;
    for (_, config) in configs {
        let pack = place.with_file("config.json", &config.to_string());
        let printed = run(place.path(), &["train", pack, "--data", "data.txt", "--show-batch"]);
        named += u32::from(printed.stderr.contains(FORGED));
        run(place.path(), &["verify", pack]);
    }
    assert!(named >= 3, "only {named} configurations are named in a message");
}

#[test]
fn templates_and_tokenizers_of_a_pack_are_escaped() {
    let place = Place::new();
    let data = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    place.write("data.jsonl", &data.to_string());
    let train = |pack| ["train", pack, "--data", "data.jsonl", "--show-batch"];
    // [raise]
    let raise = format!("{{{{ raise_exception('{HOSTILE}') }}}}");
    fails(place.path(), &train(place.with_file("chat_template.jinja", &raise)));
    for template in [
        format!("{{{{ '{HOSTILE}'"),
        format!("{{% {HOSTILE} %}}"),
        format!("{{{{ {HOSTILE} }}}}"),
        format!("{{{{ x.{HOSTILE}() }}}}"),
        format!("{{{{ messages['{HOSTILE}'].a }}}}"),
        format!("{{{{ '{HOSTILE}' | nothing }}}}"),
        format!("{{% include '{HOSTILE}' %}}"),
        format!("{{{{ '{HOSTILE}'.format(1) | int + 'x' }}}}"),
        HOSTILE.to_owned(),
    ] {
        run(place.path(), &train(place.with_file("chat_template.jinja", &template)));
        run(place.path(), &["verify", "hostile.nf4pack"]);
    }
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let contents: Value = serde_json::from_slice(place.file(file)).unwrap();
        for (_, contents) in each_string(&contents) {
            let pack = place.with_file(file, &contents.to_string());
            run(place.path(), &train(pack));
        }
        run(place.path(), &train(place.with_file(file, HOSTILE)));
    }
    // A token with the text of the data, which is then shown.
    let pack = place.with_json("tokenizer.json", |tokenizer| {
        tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": 2047, "content": HOSTILE, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false,
        }));
    });
    place.write("data.txt", &format!("a{HOSTILE}b"));
    let printed = run_lines(place.path(), &["train", pack, "--data", "data.txt", "--show-batch"]);
    assert!(printed.contains(r"\u{1b}]0;pwned\u{7}\u{202e}txt\u{9b}31m"), "{printed}");
}

/// Runs a command that shows text of several lines: one may be the hostile text's.
fn run_lines(folder: &Path, arguments: &[&str]) -> String {
    let output = command(folder, arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    let hidden = text.chars().find(|&c| is_hidden(c));
    assert!(hidden.is_none() && output.status.success(), "{hidden:?} in {text:?}");
    text
}

#[test]
fn data_files_are_escaped() {
    let place = Place::new();
    let show = |data: &str| {
        place.write("data.jsonl", data);
        let arguments = ["train", PACK, "--data", "data.jsonl", "--show-batch"];
        run(place.path(), &arguments).stderr.contains(FORGED)
    };
    assert!(show(&json!({"text": "a", HOSTILE: 1}).to_string()), "an unknown key");
    assert!(show(&json!({HOSTILE: 1}).to_string()), "no known key");
    let message = |role: &str, content: Value| json!({"messages": [{"role": role, "content": content}]}).to_string();
    show(&message(HOSTILE, json!("a")));
    show(&message("user", json!([{"type": HOSTILE, "text": "a"}])));
    show(&json!({"messages": [{"role": "user", "content": "a", HOSTILE: 1}]}).to_string());
    show(HOSTILE);
    show(&format!("{{\"text\": \"{HOSTILE}\"}}"));
    show(&json!({"text": 1, "messages": HOSTILE}).to_string());
    show(&json!({"prompt": HOSTILE, "completion": 1}).to_string());
    place.write("data.jsonl", &json!({"text": HOSTILE}).to_string());
    run_lines(place.path(), &["train", PACK, "--data", "data.jsonl", "--show-batch"]);
    place.write("data.jsonl", &json!({"prompt": HOSTILE, "completion": HOSTILE}).to_string());
    run_lines(place.path(), &["train", PACK, "--data", "data.jsonl", "--show-batch"]);
}

#[test]
fn names_of_files_and_arguments_are_escaped() {
    let place = Place::new();
    let folder = place.path();
    for arguments in [
        &["inspect", HOSTILE][..],
        &["verify", HOSTILE],
        &["export", HOSTILE, "out"],
        &["convert", HOSTILE, "out.nf4pack"],
        &["convert", TINY, PACK, "--config", HOSTILE],
        &["merge", HOSTILE, "--adapter", "a", "--base", "dequant", "--out", "merged"],
        &["merge", PACK, "--adapter", HOSTILE, "--base", "dequant", "--out", "merged"],
        &["train", PACK, "--data", HOSTILE, "--out", "out"],
        &["train", PACK, "--data", HOSTILE, "--config", HOSTILE],
        &["eval", PACK, "--data", HOSTILE],
        &["generate", HOSTILE, "--prompt", "a"],
        &["generate", PACK, "--adapter", HOSTILE, "--prompt", "a"],
        &["doctor", "--gpu", HOSTILE],
        &[HOSTILE],
        &["inspect", PACK, HOSTILE],
        &["convert", TINY, "out.nf4pack", "--keep", &format!("({HOSTILE}")],
        &["convert", TINY, "out.nf4pack", "--scales", HOSTILE],
        &["convert", TINY, "out.nf4pack", &format!("--{HOSTILE}")],
    ] {
        fails(folder, arguments);
    }
    fs::rename(folder.join(PACK), folder.join(HOSTILE)).unwrap();
    shows(folder, &["inspect", HOSTILE]);
    shows(folder, &["verify", HOSTILE]);
    shows(folder, &["export", HOSTILE, &format!("out{HOSTILE}")]);
    let merged = format!("merged{HOSTILE}");
    shows(folder, &["merge", HOSTILE, "--adapter", ADAPTER, "--base", "dequant", "--out", &merged, "--no-compare"]);
    shows(folder, &["convert", TINY, HOSTILE, "--force"]);
    shows(folder, &["convert", TINY, HOSTILE, "--dry-run"]);
    // Not UTF-8.
    let name = OsStr::from_bytes(b"\xff\x1b]0;pwned\x07");
    let output = command(folder, &["inspect"]).arg(name).output().unwrap();
    assert!(!output.stderr.contains(&0x1b) && output.status.code() == Some(1));
    // Settings.
    for toml in [format!("\"{HOSTILE}\" = 1"), "lr = \"\x1b]0;\"".to_owned(), format!("x = '{HOSTILE}'")] {
        place.write("settings.toml", &toml);
        run(folder, &["train", HOSTILE, "--data", "d", "--out", "o", "--config", "settings.toml"]);
    }
}

#[test]
fn names_and_configurations_of_adapters_are_escaped() {
    let place = Place::new();
    let adapter = place.path().join("adapter");
    copy_folder(Path::new(ADAPTER), &adapter);
    let config = fs::read(adapter.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let merge = ["merge", PACK, "--adapter", "adapter", "--base", "dequant", "--out", "merged", "--no-compare"];
    let mut configs = each_string(&config);
    configs.push((HOSTILE.to_owned(), json!({"r": HOSTILE})));
    configs.push((HOSTILE.to_owned(), json!({"peft_type": "LORA", "r": 8, HOSTILE: {HOSTILE: HOSTILE}})));
    let mut named = 0;
    for (_, config) in configs {
        fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
        let _ = fs::remove_dir_all(place.path().join("merged"));
        named += u32::from(run(place.path(), &merge).stderr.contains(FORGED));
    }
    assert!(named >= 2, "only {named} configurations are named");
    fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let header = json!({HOSTILE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    fs::write(adapter.join("adapter_model.safetensors"), file).unwrap();
    run(place.path(), &merge);
}

#[test]
fn names_in_checkpoints_are_escaped() {
    let place = Place::new();
    let checkpoint = place.checkpoint();
    let convert = ["convert", "checkpoint", "out.nf4pack", "--force"];
    // A tensor that is no part of the model.
    let weights = fs::read(checkpoint.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&weights[8..8 + length]).unwrap();
    let end = weights.len() - 8 - length;
    header[HOSTILE] = json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
    let write = |header: &Value| {
        let header = header.to_string();
        let parts = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &weights[8 + length..], &[0; 4]];
        fs::write(checkpoint.join("model.safetensors"), parts.concat()).unwrap();
    };
    write(&header);
    shows(place.path(), &convert);
    shows(place.path(), &["inspect", "out.nf4pack", "--tensors"]);
    run(place.path(), &["export", "out.nf4pack", "exported"]);
    header[HOSTILE]["dtype"] = json!("F64");
    write(&header);
    run(place.path(), &convert);
    header[HOSTILE]["dtype"] = json!(HOSTILE);
    write(&header);
    run(place.path(), &convert);
    let tensor = |map: Value| {
        let index = json!({"metadata": {HOSTILE: HOSTILE}, "weight_map": map});
        fs::write(checkpoint.join("model.safetensors.index.json"), index.to_string()).unwrap();
        run(place.path(), &convert);
    };
    tensor(json!({HOSTILE: "model.safetensors"}));
    tensor(json!({"a": HOSTILE}));
    fs::remove_file(checkpoint.join("model.safetensors.index.json")).unwrap();
    fs::rename(checkpoint.join("model.safetensors"), checkpoint.join(format!("{HOSTILE}.safetensors"))).unwrap();
    shows(place.path(), &convert);
    fs::rename(checkpoint.join(format!("{HOSTILE}.safetensors")), checkpoint.join(format!("{HOSTILE}.bin"))).unwrap();
    shows(place.path(), &convert);
}

#[test]
fn generated_text_is_escaped_on_a_terminal_and_raw_in_a_pipe() {
    if common::gpu().is_none() {
        return;
    }
    let place = Place::new();
    // The bundled model repeats `a`, whose number is here that of ESC (in the alphabet of bytes).
    let pack = place.with_json("tokenizer.json", |tokenizer| {
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let [letter, escape] = ["a", "\u{11b}"].map(|token| vocabulary[token].clone());
        vocabulary.insert("a".to_owned(), escape);
        vocabulary.insert("\u{11b}".to_owned(), letter);
    });
    let arguments = ["generate", pack, "--prompt", "\x1b", "--max-tokens", "4"];
    let piped = command(place.path(), &arguments).output().unwrap();
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    assert!(piped.stdout.starts_with(b"\x1b\x1b"), "the model wrote other tokens: {piped:?}");
    // `script` runs the command on a terminal of its own.
    let program = assert_cmd::cargo::cargo_bin!("nf4pack");
    let quoted: Vec<String> = arguments.iter().map(|argument| format!("'{argument}'")).collect();
    let line = format!("{} {}", program.display(), quoted.join(" "));
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).current_dir(place.path()).stdin(std::process::Stdio::null());
    script.env("NF4PACK_CACHE_DIR", common::program::CACHE);
    let Ok(shown) = script.output() else {
        eprintln!("SKIPPED: there is no program `script`");
        return;
    };
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains(r"\u{1b}\u{1b}") && !shown.contains('\x1b'), "{shown:?}");
}

#[test]
fn commands_with_a_gpu_are_escaped() {
    if common::gpu().is_none() {
        return;
    }
    let place = Place::new();
    let folder = place.path();
    let hostile_pack = format!("pack{HOSTILE}");
    fs::rename(folder.join(PACK), folder.join(&hostile_pack)).unwrap();
    let data = format!("data{HOSTILE}.jsonl");
    place.write(&data, &json!({"text": "Once upon a time.", HOSTILE: 1}).to_string());
    let out = format!("out{HOSTILE}");
    let rows = ["--micro-batch", "1", "--max-length", "16"];
    let train = [&["train", &hostile_pack, "--data", &data, "--out", &out, "--steps", "2", "--rank", "2"][..], &rows];
    shows(folder, &train.concat());
    shows(folder, &[&["eval", &hostile_pack, "--data", &data, "--adapter", &out][..], &rows].concat());
    shows(folder, &["doctor", &hostile_pack]);
    let merge = ["merge", &hostile_pack, "--adapter", &out, "--base", "dequant", "--out", "merged"];
    run(folder, &merge);
    // A checkpoint whose state says something else.
    let checkpoint = fs::read_dir(folder.join(&out)).unwrap().map(|entry| entry.unwrap().path());
    let checkpoint = checkpoint.into_iter().find(|path| path.join("trainer_state.json").exists()).unwrap();
    let state: Value = serde_json::from_slice(&fs::read(checkpoint.join("trainer_state.json")).unwrap()).unwrap();
    for (_, state) in each_string(&state).into_iter().take(12) {
        fs::write(checkpoint.join("trainer_state.json"), state.to_string()).unwrap();
        run(folder, &[&train.concat()[..], &["--resume"]].concat());
    }
}
