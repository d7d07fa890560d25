//! `nf4pack generate` as its user meets it: on the bundled model, few tokens at a time.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program;

use std::fs;
use std::path::Path;

use crate::common::program::{PACK, TINY, command, failure, place};
use assert_cmd::assert::Assert;
use predicates::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

/// One that does something.
const TRAINED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");
const PROMPT: &str = "Once upon a ti";

fn json(folder: &Path, arguments: &[&str]) -> Value {
    program::json(folder, &[&["generate", PACK], arguments].concat())
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn contains(text: &str) -> impl Predicate<str> {
    predicate::str::contains(text)
}

#[test]
fn a_text_is_the_same_again_and_as_json() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let line = ["--prompt", PROMPT, "--max-tokens", "8"];
    let document = json(place.path(), &line);
    assert_eq!(document["tokens"].as_array().unwrap().len(), 8);
    assert_eq!((&document["ending"], &document["prompt_tokens"]), (&"max tokens".into(), &7.into()));
    let positive = |name: &str| document[name].as_f64().is_some_and(|x| x > 0.0);
    assert!(
        ["prompt_seconds", "seconds", "prompt_tokens_per_second", "tokens_per_second"].iter().all(|name| positive(name))
    );
    // Seven tokens went through the model after the first one was chosen.
    let rate = 7.0 / document["seconds"].as_f64().unwrap();
    assert!((document["tokens_per_second"].as_f64().unwrap() / rate - 1.0).abs() < 1e-9, "{document}");

    let shown = command(place.path(), &[&["generate", PACK], &line[..]].concat()).assert().success();
    assert_eq!(stdout(&shown), format!("{}\n", document["text"].as_str().unwrap()));
    let note = predicate::str::is_match(r"8 tokens .*, [0-9.]+ tokens/s.*; 7 tokens .*, [0-9.]+ tokens/s");
    shown.stderr(note.unwrap());
    let tuned = json(place.path(), &[&line[..], &["--adapter", TRAINED]].concat());
    assert_ne!(tuned["text"], document["text"], "the adapter does something");
}

#[test]
fn a_seed_is_a_text() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let text = |seed| json(place.path(), &["--prompt", PROMPT, "--max-tokens", "6", "--seed", seed])["tokens"].clone();
    let first = text("3");
    assert_eq!(first, text("3"));
    assert_ne!(first, text("4"));
}

#[test]
fn an_end_token_ends_a_text() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let line = ["--prompt", PROMPT, "--max-tokens", "6"];
    let all: Vec<u64> = serde_json::from_value(json(place.path(), &line)["tokens"].clone()).unwrap();
    // The same model with another end token.
    let copy = place.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(TINY).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    fs::write(copy.join("generation_config.json"), format!("{{\"eos_token_id\": {}}}", all[3])).unwrap();
    command(place.path(), &["convert", "copy", PACK, "--force"]).assert().success();
    let ended = json(place.path(), &line);
    let before: Vec<u64> = all.iter().copied().take_while(|&token| token != all[3]).collect();
    assert_eq!((&ended["ending"], &ended["tokens"]), (&"end".into(), &serde_json::to_value(before).unwrap()));
}

#[test]
fn a_chat_answers_line_by_line() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let ask = |more: &[&str], lines: &str| {
        let chat = ["generate", PACK, "--chat", "--max-tokens", "4", "--adapter", TRAINED];
        stdout(&command(place.path(), &[&chat, more].concat()).write_stdin(lines).assert().success())
    };
    let two = ask(&[], "Tell me a story.\n\nWho is it about?");
    assert!(two.ends_with('\n') && two.lines().count() >= 2, "{two:?}");
    let one = ask(&[], "Tell me a story.\n");
    assert!(two.starts_with(&one) && two.len() > one.len(), "{one:?} {two:?}");
    assert_ne!(ask(&["--system", "You are a pirate. Answer with numbers."], "Tell me a story.\n"), one);
}

#[test]
fn a_chat_has_commands_and_lines_of_json() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let chat = ["generate", PACK, "--chat", "--json", "--max-tokens", "4", "--adapter", TRAINED];
    let lines = "Tell me a story.\n/save chats.jsonl\n/clear\nTell me a story.\n/help\n";
    let assert = command(place.path(), &chat).env_remove("XDG_RUNTIME_DIR").write_stdin(lines).assert().success();
    let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("/system TEXT") && !stderr.contains("XDG_RUNTIME_DIR"), "{stderr}");
    let answers: Vec<Value> = stdout(&assert).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 2);
    // After /clear, the same question has the same answer.
    assert_eq!(answers[0]["tokens"], answers[1]["tokens"]);
    let saved: Value = serde_json::from_str(&fs::read_to_string(place.path().join("chats.jsonl")).unwrap()).unwrap();
    assert_eq!(saved["messages"][0]["content"], "Tell me a story.");
    assert_eq!(saved["messages"][1]["content"], answers[0]["text"]);
}

#[test]
fn a_stop_string_ends_a_text_before_itself() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let whole = json(place.path(), &["--prompt", PROMPT, "--max-tokens", "12"]);
    let text = whole["text"].as_str().unwrap();
    let stop: String = text.chars().skip(4).take(2).collect();
    let cut = json(place.path(), &["--prompt", PROMPT, "--max-tokens", "12", "--stop", &stop]);
    assert_eq!((cut["text"].as_str(), cut["ending"].as_str()), (text.split(&stop).next(), Some("stop string")));
}

#[test]
fn a_checkpoint_in_place_of_a_pack_is_told_how_to_convert() {
    let place = place();
    failure(place.path(), &["generate", TINY, "--prompt", "Once"]).assert(
        "pack-unreadable",
        &[],
        &["nf4pack convert", TINY],
    );
}

#[test]
fn a_chat_that_is_full_drops_its_oldest_turns_and_continues() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let long = "word ".repeat(60);
    let lines = format!("one\ntwo\nthree\nfour\n{long}\nfive\n");
    let chat = ["generate", PACK, "--chat", "--max-tokens", "4", "--context", "48"];
    let assert = command(place.path(), &chat).write_stdin(lines).assert().code(1);
    let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    let lines = |label: &str, number: &str| stderr.lines().filter(|l| l.starts_with(label) && l.contains(number)).count();
    assert!(lines("note: ", " 1 turn ") > 0, "{stderr}");
    assert_eq!(lines("warning: ", " 48 "), 1, "the long question: {stderr}");
    assert_eq!(lines("", "tokens/s"), 5, "all others were answered: {stderr}");
}

#[test]
fn a_hint_names_what_helps() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let ask = |prompt: &str, context: &[&str]| {
        failure(place.path(), &[&["generate", PACK, "--max-tokens", "1", "--prompt", prompt], context].concat())
    };
    ask("one two three four five", &["--context", "4"]).assert("prompt-too-long", &["4"], &["--context"]);
    let too_long = ask(&"one two three ".repeat(600), &[]);
    too_long.assert("prompt-too-long", &["1024"], &["1024"]);
    assert!(!too_long.hint.contains("--context"), "{too_long:?}");
}

/// Writes the trained adapter, with every B zero, into the folder `untrained`.
fn write_untrained(folder: &Path) {
    let out = folder.join("untrained");
    fs::create_dir(&out).unwrap();
    fs::copy(Path::new(TRAINED).join("adapter_config.json"), out.join("adapter_config.json")).unwrap();
    let bytes = fs::read(Path::new(TRAINED).join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let zeros = vec![0; bytes.len()];
    let tensors = file.iter().map(|(name, tensor)| {
        let data = if name.contains("lora_B") { &zeros[..tensor.data().len()] } else { tensor.data() };
        (name, TensorView::new(tensor.dtype(), tensor.shape().to_vec(), data).unwrap())
    });
    fs::write(out.join("adapter_model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn an_adapter_that_was_not_trained_is_warned_about() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    write_untrained(place.path());
    fs::write(place.path().join("text.txt"), "Once upon a time there was a bear.").unwrap();
    let commands: [&[&str]; 2] =
        [&["generate", PACK, "--prompt", PROMPT, "--max-tokens", "1"], &["eval", PACK, "--data", "text.txt"]];
    for arguments in commands {
        let run = |adapter| command(place.path(), &[arguments, &["--adapter", adapter]].concat()).assert().success();
        run("untrained").stderr(predicate::str::is_match("warning: the adapter").unwrap());
        run(TRAINED).stderr(contains("warning").not());
    }
}

/// What needs a process that lives on while it is looked at.
#[cfg(unix)]
mod alive {
    use std::io::Read;
    use std::process::{Child, Command, Output, Stdio};

    use super::*;

    /// More than any of these tests waits for.
    const MANY: &str = "900";

    fn start(folder: &Path, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nf4pack"));
        command.current_dir(folder).env("NF4PACK_CACHE_DIR", program::CACHE).env_remove("NF4PACK_PROFILE").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn interrupt(child: &Child) {
        let status = Command::new("sh").arg("-c").arg(format!("kill -INT {}", child.id())).status().unwrap();
        assert!(status.success());
    }

    /// The first bytes of its text: it comes before the end does.
    fn first_bytes(child: &mut Child) -> [u8; 3] {
        let mut bytes = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it still works");
        bytes
    }

    /// The number of tokens by the note at the end, which says that the user stopped it.
    fn tokens(output: &Output) -> u32 {
        let stderr = String::from_utf8(output.stderr.clone()).unwrap();
        let note = stderr.lines().find(|line| line.contains("(stopped)")).unwrap_or_else(|| panic!("{stderr}"));
        note.split(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn a_closed_pipe_ends_the_work() {
        let Some(_) = common::gpu() else { return };
        let place = place();
        let mut child = start(place.path(), &["generate", PACK, "--prompt", PROMPT, "--max-tokens", MANY]);
        first_bytes(&mut child);
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(tokens(&output) < 500, "{}", tokens(&output));
    }

    #[test]
    fn ctrl_c_ends_a_text_where_it_is() {
        let Some(_) = common::gpu() else { return };
        let place = place();
        let ask: [&[&str]; 2] = [&["--prompt", PROMPT], &["--chat"]];
        for what in ask {
            let mut child =
                start(place.path(), &[&["generate", PACK, "--max-tokens", MANY, "--adapter", TRAINED], what].concat());
            let mut stdin = child.stdin.take().unwrap();
            std::io::Write::write_all(&mut stdin, b"Tell me a long story of a bear.\nAnd another.\n").unwrap();
            drop(stdin);
            let first = first_bytes(&mut child);
            interrupt(&child);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{what:?}");
            assert!(tokens(&output) < 500 && !first.is_empty() && output.stdout.ends_with(b"\n"), "what came is shown");
        }
    }

    #[test]
    fn a_second_ctrl_c_ends_the_program_at_once() {
        let place = place();
        assert!(Command::new("mkfifo").arg(place.path().join("data")).status().unwrap().success());
        let mut child = start(place.path(), &["eval", PACK, "--data", "data"]);
        // It opens when the other side does: from then on it waits for bytes that never come.
        let data = fs::File::options().write(true).open(place.path().join("data")).unwrap();
        interrupt(&child);
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none(), "the first one asks");
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        drop(data);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8(output.stderr).unwrap().contains("temporary files"));
    }
}
