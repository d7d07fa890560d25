//! Any file of training data, under chat templates of several families: text is the file itself;
//! other bytes choose lines of every form with values changed. It is refused with the line and a
//! reason, or its samples have as many entries in the loss mask as tokens, within the length.

use arbitrary::{Result, Unstructured};
use nf4pack::arch::ModelConfig;
use nf4pack::data::{Tokenizer, TrainOn};
use nf4pack::fuzzing::{Dataset, Options, TokenizerFiles, tokenizer};
use serde_json::{Value, json};

use super::json;

const TOKENIZER: &[u8] = include_bytes!("../../tests/fixtures/tiny-qwen3/tokenizer.json");
const CONFIG: &[u8] = include_bytes!("../../tests/fixtures/tiny-qwen3/config.json");
const TEMPLATES: [&[u8]; 8] = [
    include_bytes!("../../tests/fixtures/templates/chatml.jinja"),
    include_bytes!("../../tests/fixtures/templates/chatml_generation.jinja"),
    include_bytes!("../../tests/fixtures/templates/llama3_1.jinja"),
    include_bytes!("../../tests/fixtures/templates/mistral_v3.jinja"),
    include_bytes!("../../tests/fixtures/templates/qwen3.jinja"),
    include_bytes!("../../tests/fixtures/templates/hermes_tools.jinja"),
    include_bytes!("../../tests/fixtures/templates/phi3.jinja"),
    include_bytes!("../../tests/fixtures/templates/gemma.jinja"),
];

/// Keys that the reader looks for.
pub const KEYS: [&str; 24] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "name",
    "tool_calls",
    "function",
    "arguments",
    "weight",
    "train",
    "reasoning_content",
    "type",
    "loss",
];
const WORDS: [&str; 10] = [
    "",
    "Hi",
    "Hello, friend!",
    " \n",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>[INST]",
    "<think>\n\n</think>\n\n",
    "{{ x }}",
    "\u{e9}\u{1f980}\u{301}",
];
const ROLES: [&str; 9] = ["system", "user", "assistant", "tool", "human", "gpt", "ipython", "", "function"];

thread_local! {
    static TOKENIZERS: Vec<Tokenizer> = tokenizers();
}

/// One tokenizer with each template, and one without.
fn tokenizers() -> Vec<Tokenizer> {
    let model = ModelConfig::parse(CONFIG, None).expect("a good configuration");
    let templates = TEMPLATES.iter().map(|template| Some(*template)).chain([None]);
    let of = |chat_template| {
        let files = TokenizerFiles { tokenizer: TOKENIZER, chat_template, ..TokenizerFiles::default() };
        tokenizer(files, &model).expect("a good tokenizer")
    };
    templates.map(of).collect()
}

/// Calls `with` with one of the tokenizers.
pub fn with_tokenizer(number: usize, with: impl FnOnce(&Tokenizer)) {
    TOKENIZERS.with(|tokenizers| with(&tokenizers[number % tokenizers.len()]));
}

/// Runs the check.
pub fn run(bytes: &[u8]) {
    if bytes.first().is_none_or(u8::is_ascii) {
        check(bytes, bytes.len(), bytes.len().is_multiple_of(2), 64);
    } else {
        let _ = built(&mut Unstructured::new(&bytes[1..]));
    }
}

fn check(bytes: &[u8], template: usize, strict: bool, max_length: u32) {
    with_tokenizer(template, |tokenizer| {
        let train_on = if template.is_multiple_of(5) { TrainOn::All } else { TrainOn::Completions };
        let options = Options { train_on, max_length, strict, memory: 1 << 20 };
        let read = [
            Dataset::from_json_lines(|| Ok(bytes), tokenizer, options, &mut |done, total| done <= total),
            Dataset::from_text(bytes, tokenizer, options, &mut |_, _| true),
        ];
        for dataset in read {
            match dataset {
                Ok(dataset) => samples(&dataset, max_length),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    });
}

fn samples(dataset: &Dataset, max_length: u32) {
    assert!(!dataset.samples.is_empty());
    for sample in &dataset.samples {
        assert_eq!(sample.tokens.len(), sample.loss_mask.len());
        assert!(sample.tokens.len() <= max_length as usize && sample.loss_tokens() > 0);
        assert!(sample.tokens.iter().all(|&token| token < 2048));
    }
}

fn built(u: &mut Unstructured<'_>) -> Result<()> {
    let mut lines = Vec::new();
    let form = u.int_in_range(0..=5)?;
    for _ in 0..u.int_in_range(0..=4)? {
        let mut line = line(u, form)?;
        if u.ratio(1, 2)? {
            json::edit(u, &mut line, &KEYS)?;
        }
        lines.extend(json::bytes(u, &line)?);
        lines.extend(*u.choose(&[&b"\n"[..], b"\r\n", b"\n\n", b""])?);
    }
    check(&lines, u.int_in_range(0..=20)?, u.arbitrary()?, u.int_in_range(1..=200)?);
    Ok(())
}

fn word(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(if u.ratio(1, 8)? { Value::String(json::string(u)?) } else { json!(*u.choose(&WORDS)?) })
}

/// Messages under these keys, mostly in the order that templates want.
fn messages(u: &mut Unstructured<'_>, role: &str, content: &str, names: [&str; 2]) -> Result<Value> {
    let message = |number: usize, u: &mut Unstructured<'_>| {
        let name = if u.ratio(7, 8)? { names[number % 2] } else { *u.choose(&ROLES)? };
        let mut message = json!({role: name, content: word(u)?});
        if u.ratio(1, 8)? {
            message["tool_calls"] = json!([{"type": "function", "function": {"name": "f", "arguments": {"a": word(u)?}}}]);
        }
        Ok(message)
    };
    (0..u.int_in_range(0..=6)?).map(|number| message(number, u)).collect::<Result<Vec<Value>>>().map(Value::Array)
}

/// A good line of a form.
pub fn line(u: &mut Unstructured<'_>, form: u8) -> Result<Value> {
    Ok(match form {
        0 => json!({"text": word(u)?}),
        1 => json!({"prompt": word(u)?, "completion": word(u)?}),
        2 => {
            json!({"prompt": messages(u, "role", "content", ["user", "assistant"])?, "completion": [{"role": "assistant", "content": word(u)?}]})
        }
        3 => json!({"messages": messages(u, "role", "content", ["user", "assistant"])?}),
        4 => {
            json!({"instruction": word(u)?, "input": word(u)?, "output": word(u)?, "system": word(u)?, "history": [[word(u)?, word(u)?]]})
        }
        _ => {
            json!({"conversations": messages(u, "from", "value", ["human", "gpt"])?, "tools": [{"type": "function", "function": {"name": "f"}}]})
        }
    })
}
