//! Files to samples to batches, with the fixture's tokenizer and with templates as models have
//! them.

use std::path::Path;

use super::checksum::FileChecksum;
use super::files::TokenizerFiles;
use super::notice::{Concern, LeftOut, Notice};
use super::options::Options;
use super::pack::{IGNORE_INDEX, batch, epoch_order, rows};
use super::sample::{Cut, Dataset, Dropped, Sample};
use super::show::show_batch;
use super::*;
use crate::arch::config::ModelConfig;
use crate::io::read::FileError;

const FOLDER: &str = "tests/fixtures/tiny-qwen3";

fn read(name: &str) -> Vec<u8> {
    std::fs::read(format!("{FOLDER}/{name}")).unwrap()
}

pub(super) fn model() -> ModelConfig {
    ModelConfig::parse(&read("config.json"), None).unwrap()
}

/// The fixture's tokenizer, with another chat template if one is given.
fn tokenizer(template: Option<&str>) -> Tokenizer {
    let (json, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let files = TokenizerFiles {
        tokenizer: &json,
        config: Some(&config),
        chat_template: template.map(str::as_bytes),
        ..Default::default()
    };
    Tokenizer::new(files, &model(), 0).unwrap()
}

fn without_template() -> Tokenizer {
    let json = read("tokenizer.json");
    Tokenizer::new(TokenizerFiles { tokenizer: &json, ..TokenizerFiles::default() }, &model(), 0).unwrap()
}

const OPTIONS: Options = Options { train_on: TrainOn::Completions, max_length: 1000, strict: true, memory: u64::MAX };

/// Texts are cut into windows of 16 tokens.
const WINDOWS: Options = Options { max_length: 16, ..OPTIONS };

fn load(tokenizer: &Tokenizer, line: &str) -> Result<Dataset, DataError> {
    load_as(tokenizer, line, OPTIONS)
}

fn load_as(tokenizer: &Tokenizer, line: &str, options: Options) -> Result<Dataset, DataError> {
    Dataset::from_json_lines(|| Ok(line.as_bytes()), tokenizer, options, &mut |_, _| true)
}

fn loss_tokens(dataset: &Dataset) -> u64 {
    dataset.samples.iter().map(Sample::loss_tokens).sum()
}

/// The text of a sample, with ⟦ ⟧ around what is learned.
#[track_caller]
fn shown(tokenizer: &Tokenizer, line: &str) -> String {
    let dataset = load(tokenizer, line).unwrap();
    let batch = batch(&dataset.samples, &[vec![0]]);
    let shown = show_batch(&batch, tokenizer).unwrap();
    shown[0].to_string().trim_end_matches('\n').to_owned()
}

const CHAT: &str = r#"{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, friend!"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long."}]}"#;

fn chat() -> String {
    CHAT.replace('\n', " ")
}

#[test]
fn the_assistant_s_words_and_the_end_of_its_turn_are_learned() {
    let expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\
        ⟦Hello, friend!<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦So long.<|im_end|>⟧\n";
    assert_eq!(shown(&tokenizer(None), &chat()), expected.trim_end());
    let dataset = load(&tokenizer(None), &chat()).unwrap();
    let sample = &dataset.samples[0];
    let ends: Vec<_> =
        sample.tokens.iter().zip(&sample.loss_mask).filter(|(token, _)| **token == 2).map(|(_, t)| *t).collect();
    assert_eq!(ends, [false, false, true, false, true], "<|im_end|> of the assistant's turns alone");
}

#[test]
fn everything_is_learned_on_demand() {
    let options = Options { train_on: TrainOn::All, ..OPTIONS };
    let dataset = load_as(&tokenizer(None), &chat(), options).unwrap();
    assert_eq!(loss_tokens(&dataset), dataset.tokens() - 1);
    // Also by a template that does not separate the words of the roles.
    let confusing = tokenizer(Some(CONFUSING));
    assert!(matches!(load(&confusing, &chat()), Err(DataError::Spans { .. })));
    let dataset = load_as(&confusing, &chat(), options).unwrap();
    assert_eq!(loss_tokens(&dataset), dataset.tokens() - 1);
}

/// Writes other words than a message has.
const CONFUSING: &str = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";

#[test]
fn texts_and_completions_end_with_the_end_token() {
    for tokenizer in [tokenizer(None), without_template()] {
        let (eos, end) = (tokenizer.eos().unwrap(), "<|im_end|>");
        assert_eq!(eos, 2);
        let text = shown(&tokenizer, r#"{"text": "Once upon a time"}"#);
        assert!(text.ends_with(&format!("{end}⟧")), "{text}");
        assert_eq!(text.replace(['⟦', '⟧'], ""), format!("Once upon a time{end}"));
        let text = shown(&tokenizer, r#"{"prompt": "Q: 1+1?\nA:", "completion": " two é漢🦀"}"#);
        assert_eq!(text, format!("Q: 1+1?\nA:⟦ two é漢🦀{end}⟧"));
        let dataset = load(&tokenizer, r#"{"text": "already ended<|im_end|>"}"#).unwrap();
        assert_eq!(dataset.samples[0].tokens.iter().filter(|&&token| token == eos).count(), 1);
    }
}

#[test]
fn instructions_use_the_template_or_alpaca_s_prompt() {
    let line = r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#;
    let expected = "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>⟧";
    assert_eq!(shown(&tokenizer(None), line), expected);
    let text = shown(&without_template(), line);
    assert!(text.ends_with("### Instruction:\nAdd.\n\n1 2\n\n### Response:\n⟦3<|im_end|>⟧"), "{text}");
    let line = r#"{"system": "S", "instruction": "I", "output": "O"}"#;
    assert!(shown(&tokenizer(None), line).starts_with("<|im_start|>system\nS<|im_end|>"));
}

#[test]
fn sharegpt_is_a_conversation() {
    let line = r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}"#;
    assert_eq!(shown(&tokenizer(None), line), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Ho<|im_end|>⟧");
    let error = load(&without_template(), line).unwrap_err();
    assert!(matches!(error, DataError::NoTemplate { line: 1 }), "{error}");
}

/// In the manner of Qwen3: the last turn of the assistant begins with a thought, even an empty one;
/// earlier ones lose it.
const THINKING: &str = "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set c = m.content.split('</think>')[-1].lstrip('\\n') %}\
    {{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- c + '<|im_end|>\\n' }}\
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

#[test]
fn turns_that_lose_their_thoughts_are_found() {
    let expected = "<|im_start|>assistant\n⟦Hello, friend!<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n\
        ⟦<think>\n\n</think>\n\nSo long.<|im_end|>⟧";
    let text = shown(&tokenizer(Some(THINKING)), &chat());
    assert!(text.ends_with(expected), "{text}");
    let thought = chat().replace("Hello, friend!", "<think>\\nHm.\\n</think>\\n\\nHello, friend!");
    let text = shown(&tokenizer(Some(THINKING)), &thought);
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn turns_that_call_tools_and_say_nothing_are_found() {
    let template = THINKING.replace("c + '<|im_end|>", "c + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>");
    let line = r#"{"messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "",
        "tool_calls": [{"name": "look", "at": "sky"}]}, {"role": "tool", "content": "no"}, {"role": "assistant", "content": "No."}]}"#;
    let expected = "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n⟦[{\"name\": \"look\", \"at\": \"sky\"}]<|im_end|>⟧\n\
        <|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nNo.<|im_end|>⟧";
    assert_eq!(shown(&tokenizer(Some(&template)), &line.replace('\n', " ")), expected);
}

#[test]
fn a_thought_begun_by_the_generation_prompt_counts_as_said() {
    let template = THINKING
        .replace("{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}");
    let text = shown(&tokenizer(Some(&template)), &chat());
    assert!(text.contains("<|im_start|>assistant\n⟦Hello, friend!<|im_end|>⟧"), "{text}");
    assert!(text.ends_with("<|im_start|>assistant\n<think>\n⟦\n</think>\n\nSo long.<|im_end|>⟧"), "{text}");
}

/// In the manner of Qwen2.5: a conversation without a system prompt gets one.
const INSERTING: &str = "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\
    {%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}{%- for m in messages %}\
    {%- if m.role != 'system' or not loop.first %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}\
    {%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

#[test]
fn what_a_template_puts_before_the_first_words_is_not_learned() {
    let tokenizer = tokenizer(Some(INSERTING));
    for words in ["And so it goes.", "a", "b", "  above <b> all ", ""] {
        let says = |role, content| format!("{{\"role\": \"{role}\", \"content\": \"{content}\"}}");
        let line = |messages: &[String]| format!("{{\"messages\": [{}]}}", messages.join(", "));
        let turns = [says("assistant", words), says("user", "Go on"), says("assistant", "No.")];
        let inserted = "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>assistant\n";
        let first = format!("{inserted}⟦{words}<|im_end|>⟧");
        assert_eq!(shown(&tokenizer, &line(&turns[..1])), first);
        let rest = "\n<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧";
        assert_eq!(shown(&tokenizer, &line(&turns)), format!("{first}{rest}"));
    }
}

#[test]
fn templates_without_a_generation_prompt_work() {
    // In the manner of Mistral.
    let template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}\
        {% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}";
    let text = shown(&tokenizer(Some(template)), &chat());
    assert_eq!(text, "[INST] Hi [/INST]⟦Hello, friend!<|im_end|>⟧[INST] Bye [/INST]⟦So long.<|im_end|>⟧");
}

#[test]
fn a_turn_that_nothing_but_a_line_end_closes_learns_that() {
    let template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
    let line = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}"#;
    assert_eq!(shown(&tokenizer(Some(template)), line), "user: a\nassistant:⟦ b\n⟧user: c", "a token of both is learned");
}

#[test]
fn templates_that_refuse_or_confuse_are_errors_with_the_line() {
    let refuse = "{{ raise_exception('roles must alternate') }}";
    let error = load(&tokenizer(Some(refuse)), &chat()).unwrap_err();
    assert!(matches!(error, DataError::Render { line: 1, .. }));
    assert!(error.to_string().contains("roles must alternate"), "{error}");
    let error = load(&tokenizer(Some(CONFUSING)), &chat()).unwrap_err();
    assert!(matches!(error, DataError::Spans { line: 1, message: 2, flaw: SpanFlaw::Changed }), "{error}");
    let json = read("tokenizer.json");
    let files = TokenizerFiles { tokenizer: &json, chat_template: Some(b"{% if %}"), ..Default::default() };
    let broken = Tokenizer::new(files, &model(), 0).unwrap();
    assert!(matches!(load(&broken, &chat()), Err(DataError::Template(_))));
    assert!(load(&broken, r#"{"text": "no template is used"}"#).is_ok());
}

#[test]
fn templates_may_be_listed_and_tokens_be_objects() {
    let json = read("tokenizer.json");
    let config = br#"{"eos_token": {"content": "<|endoftext|>"}, "chat_template": [{"name": "tool_use", "template": "x"},
        {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"}]}"#;
    let files = TokenizerFiles { tokenizer: &json, config: Some(config), ..Default::default() };
    let tokenizer = Tokenizer::new(files, &model(), 0).unwrap();
    assert_eq!(tokenizer.eos(), Some(0));
    let line = r#"{"messages": [{"role": "assistant", "content": "a"}]}"#;
    assert_eq!(shown(&tokenizer, line), "a⟦<|endoftext|>⟧", "the first token has nothing before it");
}

#[test]
fn what_is_over_the_length_is_cut_and_counted() {
    let tokenizer = tokenizer(None);
    let lines = "{\"text\": \"one two three four five six seven eight nine ten\"}\n{\"text\": \"one\"}\n";
    let whole = load(&tokenizer, lines).unwrap();
    let dataset = load_as(&tokenizer, lines, Options { max_length: 5, ..OPTIONS }).unwrap();
    assert_eq!(dataset.cut, Cut { samples: 1, tokens: whole.samples[0].tokens.len() as u64 - 5 });
    assert_eq!(dataset.samples[0].tokens, whole.samples[0].tokens[..5]);
    assert_eq!(dataset.samples[1], whole.samples[1]);
    assert_eq!(whole.cut, Cut::default());
}

#[test]
fn a_sample_with_nothing_to_learn_is_shown() {
    let tokenizer = tokenizer(None);
    let line = r#"{"messages": [{"role": "user", "content": "only a question"}]}"#;
    let error = load(&tokenizer, &format!("{}\n{line}", chat())).unwrap_err();
    assert!(matches!(&error, DataError::NothingLearned { line: 2, text, .. } if text.contains("only a question")));
    assert!(error.to_string().starts_with("line 2 has no token to be learned:\n<|im_start|>user"), "{error}");

    let options = Options { max_length: 8, ..OPTIONS };
    let error = load_as(&tokenizer, &chat(), options).unwrap_err();
    assert!(error.to_string().contains("within the maximum length of 8: it has"), "{error}");
}

#[test]
fn samples_with_nothing_to_learn_are_left_out_and_counted() {
    let tokenizer = tokenizer(None);
    let options = Options { max_length: 30, strict: false, ..OPTIONS };
    let long = format!(r#"{{"prompt": "{}", "completion": "b"}}"#, "word ".repeat(40));
    let lines = "{\"text\": \"\"}\n{\"text\": \"kept\"}\n{\"text\": \"\"}\n";
    let dataset = load_as(&tokenizer, lines, options).unwrap();
    assert_eq!(dataset.dropped, Dropped { empty: 2, overlong: 0, first_line: 1 });
    assert_eq!(dataset.samples.iter().map(|sample| sample.line).collect::<Vec<_>>(), [2]);
    let lines = format!("{{\"prompt\": \"a\", \"completion\": \"b\"}}\n{long}");
    let dataset = load_as(&tokenizer, &lines, options).unwrap();
    assert_eq!(dataset.dropped, Dropped { empty: 0, overlong: 1, first_line: 2 });
    assert_eq!((dataset.samples.len(), dataset.cut), (1, Cut::default()), "what is left out is not cut");
    assert!(matches!(
        load_as(&tokenizer, &lines, Options { strict: true, ..options }),
        Err(DataError::NothingLearned { line: 2, .. })
    ));
    let error = load_as(&tokenizer, &format!("{long}\n{long}"), options).unwrap_err();
    assert!(
        error.to_string().starts_with("nothing can be learned from any of 2 samples; the first one: line 1 has no token"),
        "{error}"
    );
}

/// The fixture's tokenizer, which puts `<|endoftext|>` before every text and `<|im_end|>` after it.
fn framing_tokenizer() -> Tokenizer {
    let mut json: serde_json::Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
    let special = |id: &str| serde_json::json!({"SpecialToken": {"id": id, "type_id": 0}});
    let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    let token = |id: u32, text: &str| serde_json::json!({"id": text, "ids": [id], "tokens": [text]});
    json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [special("<|endoftext|>"), text, special("<|im_end|>")], "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": token(0, "<|endoftext|>"), "<|im_end|>": token(2, "<|im_end|>")}});
    let (json, config) = (json.to_string(), read("tokenizer_config.json"));
    let files = TokenizerFiles { tokenizer: json.as_bytes(), config: Some(&config), ..Default::default() };
    Tokenizer::new(files, &model(), 0).unwrap()
}

#[test]
fn one_token_begins_a_text_and_one_ends_it() {
    let tokenizer = framing_tokenizer();
    let expected = "<|endoftext|>⟦Hello world<|im_end|>⟧";
    for text in ["Hello world", "<|endoftext|>Hello world", "Hello world<|im_end|>", "<|endoftext|>Hello world<|im_end|>"] {
        assert_eq!(shown(&tokenizer, &format!(r#"{{"text": "{text}"}}"#)), expected, "{text}");
        let encoded = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&encoded).unwrap(), "<|endoftext|>Hello world<|im_end|>", "{text}");
        let dataset = Dataset::from_text(text.as_bytes(), &tokenizer, WINDOWS, &mut |_, _| true).unwrap();
        assert_eq!(dataset.samples[0].tokens, encoded);
    }
    let line = r#"{"prompt": "<|endoftext|>Say hi.", "completion": " Hi.<|im_end|>"}"#;
    assert_eq!(shown(&tokenizer, line), "<|endoftext|>Say hi.⟦ Hi.<|im_end|>⟧");
    // What is doubled in the text itself stays.
    let twice = tokenizer.encode("<|endoftext|><|endoftext|>a", true).unwrap();
    assert_eq!(twice.iter().filter(|&&token| token == 0).count(), 2);
    assert_eq!(tokenizer.encode("", true).unwrap(), [0, 2]);
    // A chat template writes both itself.
    assert!(shown(&tokenizer, &chat()).starts_with("<|im_start|>system"));
}

#[test]
fn tokens_that_the_model_does_not_have_are_refused() {
    let json = read("tokenizer.json");
    let small = ModelConfig { vocab: 300, ..model() };
    let tokenizer = Tokenizer::new(TokenizerFiles { tokenizer: &json, ..TokenizerFiles::default() }, &small, 0).unwrap();
    let error = load(&tokenizer, r#"{"text": "Once upon a time there was a little house"}"#).unwrap_err();
    assert!(matches!(error, DataError::TokenId { vocab: 300, id: 300.., line: Some(1), .. }), "{error}");
    assert!(error.to_string().contains("the model has 300 tokens, from 0 to 299: tokens were added"), "{error}");
}

#[test]
fn plain_text_is_cut_into_windows() {
    let tokenizer = tokenizer(None);
    let text = "It was a dark and stormy night; the rain fell in torrents. ".repeat(9);
    let dataset = Dataset::from_text(text.as_bytes(), &tokenizer, WINDOWS, &mut |_, _| true).unwrap();
    assert!(dataset.samples.iter().rev().skip(1).all(|sample| sample.tokens.len() == 16));
    let all: Vec<u32> = dataset.samples.iter().flat_map(|sample| sample.tokens.clone()).collect();
    assert_eq!(tokenizer.decode(&all).unwrap(), text);
    assert_eq!(loss_tokens(&dataset), dataset.tokens() - dataset.samples.len() as u64);
    let marked = Dataset::from_text(format!("\u{feff}{text}").as_bytes(), &tokenizer, WINDOWS, &mut |_, _| true).unwrap();
    assert_eq!(marked.samples, dataset.samples);
    let [unix, dos] = ["a\nb\n\nc\rd", "a\r\nb\r\n\r\nc\rd"]
        .map(|text| Dataset::from_text(text.as_bytes(), &tokenizer, WINDOWS, &mut |_, _| true).unwrap());
    assert_eq!(unix.samples, dos.samples);
    assert!(matches!(Dataset::from_text(b"", &tokenizer, WINDOWS, &mut |_, _| true), Err(DataError::Empty)));
    assert!(matches!(
        Dataset::from_text(b"ab\xff", &tokenizer, WINDOWS, &mut |_, _| true),
        Err(DataError::Utf8 { byte: 2 })
    ));
}

#[test]
fn the_held_out_part_of_a_text_is_not_learned() {
    let text = &include_bytes!("../../LICENSE-APACHE")[..3000];
    let file = DataFile::new(Path::new("text.txt"), text.to_vec());
    let options = Options { train_on: TrainOn::All, max_length: 32, ..OPTIONS };
    let mut learned = file.samples(&tokenizer(None), options, &mut |_, _| true).unwrap();
    let held_out = learned.hold_out(0.2, 0).unwrap().samples;
    assert!(held_out.len() > 3, "{}", held_out.len());
    assert!(held_out.iter().all(|sample| learned.samples.iter().all(|other| other.tokens != sample.tokens)));
}

#[test]
fn a_share_of_the_samples_can_be_held_out() {
    let tokenizer = tokenizer(None);
    let lines: String = (0..40).map(|i| format!("{{\"text\": \"{i} words\"}}\n")).collect();
    let split = |share, seed| {
        let mut rest = load(&tokenizer, &lines).unwrap();
        let held_out = rest.hold_out(share, seed).unwrap();
        let lines = |dataset: &Dataset| dataset.samples.iter().map(|sample| sample.line).collect::<Vec<_>>();
        (lines(&rest), lines(&held_out))
    };
    let (rest, held_out) = split(0.1, 5);
    assert_eq!((rest.len(), held_out.len()), (36, 4));
    assert!(rest.is_sorted() && held_out.is_sorted());
    let mut all = [rest, held_out.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (1..=40).collect::<Vec<_>>());
    assert_eq!(split(0.1, 5).1, held_out);
    assert_ne!(split(0.1, 6).1, held_out);
    assert_eq!(split(0.001, 5).1.len(), 1, "at least one sample is held out");
    assert_eq!(split(1.0, 5).0.len(), 1, "one sample is left to train on");
    let mut one = load(&tokenizer, lines.lines().next().unwrap()).unwrap();
    assert!(matches!(one.hold_out(0.5, 5), Err(DataError::NothingHeldOut)));
    assert_eq!(one.samples.len(), 1);
}

#[test]
fn files_that_are_no_tokenizer() {
    let json = read("tokenizer.json");
    let new = |files| Tokenizer::new(files, &model(), 0).unwrap_err();
    assert!(matches!(new(TokenizerFiles::default()), DataError::Tokenizer(_)));
    let files = TokenizerFiles { tokenizer: &json, config: Some(b"[]"), ..Default::default() };
    assert!(matches!(new(files), DataError::TokenizerJson { file: "tokenizer_config.json", .. }));
    // Files of any size and with any number of tokens would fill the memory.
    let large = vec![b' '; (16 << 20) + 1];
    let files = TokenizerFiles { tokenizer: &json, special_tokens_map: Some(&large), ..Default::default() };
    assert!(matches!(new(files), DataError::TokenizerFile { what: "bytes", found: 16_777_217, limit: 16_777_216, .. }));
    let tokens = (0..=1 << 17).map(|id| format!("\"t{id}\": {id}")).collect::<Vec<_>>().join(",");
    let added = format!("{{{tokens}}}");
    let files = TokenizerFiles { tokenizer: &json, added_tokens: Some(added.as_bytes()), ..Default::default() };
    assert!(matches!(
        new(files),
        DataError::TokenizerFile { file: "added_tokens.json", what: "tokens", found: 131_073, .. }
    ));
    let config = format!("{{\"extra_special_tokens\": {added}}}");
    let files = TokenizerFiles { tokenizer: &json, config: Some(config.as_bytes()), ..Default::default() };
    assert!(matches!(new(files), DataError::TokenizerFile { file: "tokenizer_config.json", what: "tokens", .. }));
    let files = TokenizerFiles { tokenizer: &json, special_tokens_map: Some(b"3"), ..Default::default() };
    assert!(new(files).to_string().starts_with("special_tokens_map.json is not a JSON object"));
}

#[test]
fn packed_batches_hold_every_sample_once() {
    let tokenizer = tokenizer(None);
    let lines: String = (0..40).map(|i| format!("{{\"text\": \"{}\"}}\n", "word ".repeat(1 + i * 7 % 23))).collect();
    let dataset = load(&tokenizer, &lines).unwrap();
    let rows = rows(&dataset.samples, &epoch_order(40, 1, 0), 64);
    let batch = batch(&dataset.samples, &rows);
    assert_eq!(batch.tokens.len() as u64, dataset.tokens());
    assert_eq!(batch.rows as usize, rows.len());
    assert_eq!(batch.loss_tokens, loss_tokens(&dataset));
    assert_eq!(batch.labels.iter().filter(|&&label| label != IGNORE_INDEX).count() as u64, batch.loss_tokens);
    let mut seen: Vec<usize> = rows.concat();
    seen.sort_unstable();
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    for t in 0..batch.tokens.len() {
        let start = batch.starts[t] as usize;
        assert!(start <= t && t - start < 64 && batch.starts[start] as usize == start, "token {t}");
        if batch.labels[t] != IGNORE_INDEX {
            assert_eq!(batch.labels[t], batch.tokens[t + 1]);
            assert_eq!(batch.starts[t], batch.starts[t + 1]);
        }
    }
}

fn say(role: &'static str, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}

#[test]
fn a_chat_prompt_ends_where_the_answer_starts() {
    let messages = [say("system", "Be kind."), say("user", "Hi"), say("assistant", "Ho"), say("user", "<Bye>")];
    let tokenizer = tokenizer(None);
    let tokens = tokenizer.chat_prompt(&messages).unwrap();
    let expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n\
        <|im_start|>user\n<Bye><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(tokenizer.decode(&tokens).unwrap(), expected);
    // Generation starts where training starts to learn.
    let trained = load(&tokenizer, &chat()).unwrap();
    let asked = tokenizer.chat_prompt(&[say("system", "Be kind."), say("user", "Hi")]).unwrap();
    assert!(trained.samples[0].tokens.starts_with(&asked));
    assert!(trained.samples[0].loss_mask[asked.len()] && !trained.samples[0].loss_mask[asked.len() - 1]);
}

#[test]
fn conversations_may_be_refused() {
    let refused = without_template().chat_prompt(&[say("user", "Hi")]).unwrap_err();
    assert!(matches!(refused, DataError::NoChatTemplate), "{refused}");
    let refused = tokenizer(Some("{{ raise_exception('no') }}")).chat_prompt(&[say("user", "Hi")]).unwrap_err();
    assert!(matches!(refused, DataError::Chat(_)) && refused.to_string().contains("no"), "{refused}");
}

/// The pieces that a stream gives for tokens, without those that are empty.
fn pieces(tokenizer: &Tokenizer, before: &[u32], tokens: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream(before);
    let mut pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

#[test]
fn streamed_text_is_the_text_and_never_a_part_of_a_character() {
    let tokenizer = tokenizer(None);
    for text in ["Once upon a time", "  two é漢🦀 and 👩‍🚀\n\n  end ", "", "a\u{fffd}b", "\u{fffd}"] {
        let tokens = tokenizer.encode(text, false).unwrap();
        let pieces = pieces(&tokenizer, &[], &tokens);
        assert_eq!(pieces.concat(), text);
        assert!(text.contains('\u{fffd}') || pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
    }
    let tokens = tokenizer.encode("🦀", false).unwrap();
    assert!(tokens.len() > 1, "several tokens make this character");
    assert_eq!(pieces(&tokenizer, &[], &tokens), ["🦀"]);
    assert_eq!(pieces(&tokenizer, &[], &tokens[..tokens.len() - 1]), ["\u{fffd}"], "shown at the end");
    let wrong = [&tokens[..tokens.len() - 1], &tokenizer.encode("ok", false).unwrap()].concat();
    assert_eq!(pieces(&tokenizer, &[], &wrong).concat(), "\u{fffd}ok");
}

#[test]
fn streams_leave_special_tokens_out_and_continue_a_prompt() {
    let tokenizer = tokenizer(None);
    let [hi, there] = ["Hi", " there"].map(|text| tokenizer.encode(text, false).unwrap());
    let end = tokenizer.eos().unwrap();
    assert_eq!(pieces(&tokenizer, &hi, &[there.clone(), vec![end]].concat()).concat(), " there");
    assert_eq!(pieces(&tokenizer, &[], &[vec![end], hi, vec![end, end], there].concat()).concat(), "Hi there");
    // Tokens that the tokenizer does not know are padding of the model.
    assert!(pieces(&tokenizer, &[], &[100_000]).is_empty());
}

/// As Llama 2 has it: a space is a part of the word after it, lost at the start of a text; bytes
/// are tokens of their own.
#[test]
fn streams_keep_spaces_between_words_and_join_bytes() {
    let json = br#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
            "vocab": {"\u2581one": 0, "\u2581two": 1, "<0xE6>": 2, "<0xBC>": 3, "<0xA2>": 4, "<0x41>": 5}, "merges": []}}"#;
    let tokenizer = Tokenizer::new(TokenizerFiles { tokenizer: json, ..TokenizerFiles::default() }, &model(), 0).unwrap();
    assert_eq!(pieces(&tokenizer, &[], &[0, 1, 1]), ["one", " two", " two"]);
    assert_eq!(pieces(&tokenizer, &[0], &[1, 0]), [" two", " one"]);
    assert_eq!(pieces(&tokenizer, &[], &[1, 2, 3, 4, 2, 3, 4, 0]), ["two", "漢", "漢", " one"]);
    assert_eq!(pieces(&tokenizer, &[], &[5, 2, 0]).concat(), "A\u{fffd}\u{fffd} one");
}

/// A file is not taken for text because nothing else is known of it.
#[test]
fn a_file_of_another_kind_is_refused_on_disk_and_in_memory() {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer(None));
    for (name, bytes, foreign) in [
        ("a.parquet", &b"PAR1\0\0\0\0"[..], Foreign::Parquet),
        ("a.jsonl", b"\x1f\x8b\x08", Foreign::Gzip),
        ("a.txt", b"\xff\xfea\0", Foreign::Utf16),
        ("a.csv", b"prompt,completion\n", Foreign::Table),
        ("a.yaml", b"text: a\n", Foreign::Unknown),
        ("a", b"text\0", Foreign::Binary),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        for file in [DataFile::open(&path).unwrap(), DataFile::new(&path, bytes.to_vec())] {
            let error = file.samples(&tokenizer, OPTIONS, &mut |_, _| true).unwrap_err();
            let DataError::File { source, .. } = error else { panic!("{name}: {error}") };
            assert!(matches!(*source, DataError::Foreign(found) if found == foreign), "{name}: {source}");
        }
    }
}

/// Blanks do not decide, however many there are.
#[test]
fn a_long_blank_start_does_not_decide_on_the_form_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    for (text, expected) in [("Once", false), ("{\"text\": \"a\"}", true), ("\u{feff}{}", false)] {
        // A mark counts at the start only, not at the start of a buffer, too.
        for blanks in [128 << 10, 300 << 10] {
            let text = format!("{}{text}", " \n".repeat(blanks));
            std::fs::write(&path, &text).unwrap();
            assert_eq!(DataFile::open(&path).unwrap().is_json_lines(), expected, "{blanks} {text}");
            assert_eq!(DataFile::new(&path, text.into()).is_json_lines(), expected);
        }
    }
}

#[test]
fn errors_of_files_name_them() {
    let tokenizer = tokenizer(None);
    let error = |name: &str, bytes: &[u8]| {
        DataFile::new(Path::new(name), bytes.to_vec())
            .samples(&tokenizer, OPTIONS, &mut |_, _| true)
            .unwrap_err()
            .to_string()
    };
    assert!(error("b/a.jsonl", b"x{\"text\": \"a\"}").starts_with("b/a.jsonl: line 1 is not JSON: "));
    assert_eq!(error("a.txt", b"ab\xff"), "a.txt: the text is not UTF-8 from byte 2 on");
}

/// A file is the same on disk and in memory.
#[test]
fn a_file_on_disk_is_read_as_one_in_memory() {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer(None));
    let lines = "\u{feff}{\"text\": \"word\"}\r\n\n".to_owned();
    let lines = lines + &"{\"text\": \"a word\", \"id\": 1}\n".repeat(20_000);
    for (name, text, is_json_lines) in
        [("data", lines.as_str(), true), ("a.jsonl", lines.as_str(), true), ("a.txt", lines.as_str(), false)]
    {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let [disk, memory] = [DataFile::open(&path).unwrap(), DataFile::new(&path, text.into())];
        assert_eq!([disk.is_json_lines(), memory.is_json_lines()], [is_json_lines; 2]);
        // On disk it can be read again and again.
        let read = |file: &DataFile| file.samples(&tokenizer, OPTIONS, &mut |_, _| true).unwrap();
        let [first, again, expected] = [&disk, &disk, &memory].map(read);
        assert!(first == again && first == expected, "{name}");
        assert_eq!(first.checksum, FileChecksum::of(text.as_bytes()));
        assert_eq!(first.samples.len() == 20_001, is_json_lines);
    }
    let missing = DataFile::open(&folder.path().join("none")).unwrap_err();
    assert!(matches!(missing, FileError::Io { .. }), "{missing}");
}

/// A broken line at the end is reported before any line is tokenised.
#[test]
fn a_broken_line_is_reported_before_lines_are_tokenised() {
    let tokenizer = tokenizer(None);
    let good = "{\"text\": \"word\"}\n".repeat(1500);
    for broken in ["{\"text\": \"word\"", "{\"texts\": 1}", "{\"text\": null}", "{\"text\": \"a\", \"weight\": 0.5}"] {
        let text = format!("{good}{broken}\n{{\n");
        let mut calls = Vec::new();
        let error = Dataset::from_json_lines(|| Ok(text.as_bytes()), &tokenizer, OPTIONS, &mut |done, total| {
            calls.push((done, total));
            true
        });
        assert!(error.unwrap_err().to_string().starts_with("line 1501"), "{broken}");
        assert!(!calls.is_empty() && calls.iter().all(|&(done, total)| done == 0 && total <= 1500), "{calls:?}");
    }
}

/// A file that shrinks to nothing, grows, or says something else when it is read again.
#[test]
fn a_file_that_changes_between_its_two_readings_is_an_error() {
    let tokenizer = tokenizer(None);
    let line = |word: &str| format!("{{\"text\": \"{word}\"}}\n");
    let first = line("word").repeat(3);
    let change = |second: &str| {
        let mut readings = [first.as_str(), second].into_iter();
        let open = || Ok(std::io::Cursor::new(readings.next().unwrap().to_owned()));
        match Dataset::from_json_lines(open, &tokenizer, OPTIONS, &mut |_, _| true) {
            Err(DataError::Changed(change)) => change,
            other => panic!("{second}: {other:?}"),
        }
    };
    for count in [0, 2, 4] {
        let (len, second) = (first.len() as u64, line("word").repeat(count));
        assert_eq!(change(&second), Change::Length { first: len, second: second.len() as u64 });
    }
    // As long as before: only the checksum finds it.
    let second = [line("word"), line("wort"), line("word")].concat();
    let [first_crc, second_crc] = [&first, &second].map(|text| FileChecksum::of(text.as_bytes()).crc32);
    assert_eq!(change(&second), Change::Bytes { first: first_crc, second: second_crc });
    // A line that is broken in the second reading alone is no mistake of its author.
    for broken in ["{\"text\": \"wor", "3", "{\"texts\": 1}", "{\"text\": 1, \"b\": 2}"] {
        assert_eq!(change(&format!("{}{broken}\n", line("word"))), Change::Line { line: 2 }, "{broken}");
    }
}

/// What the system says of a file is compared before the second reading, which takes longer.
#[test]
fn a_file_on_disk_that_is_written_to_while_it_is_read_is_an_error() {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer(None));
    let path = folder.path().join("a.jsonl");
    let line = "{\"text\": \"word\"}\n";
    let read = |change: &dyn Fn(&std::fs::File)| {
        std::fs::write(&path, line.repeat(3)).unwrap();
        let file = DataFile::open(&path).unwrap();
        let mut calls = 0;
        let result = file.samples(&tokenizer, OPTIONS, &mut |done, _| {
            assert_eq!(done, 0, "no line is tokenised");
            if calls == 0 {
                change(&std::fs::File::options().append(true).open(&path).unwrap());
            }
            calls += 1;
            true
        });
        match result.unwrap_err() {
            DataError::File { source, .. } => source.to_string(),
            other => panic!("{other}"),
        }
    };
    let grown = read(&|mut file| std::io::Write::write_all(&mut file, line.as_bytes()).unwrap());
    assert_eq!(grown, "the file changed while it was read: it had 51 bytes, then 68");
    let cut = read(&|file| file.set_len(20).unwrap());
    assert_eq!(cut, "the file changed while it was read: it had 51 bytes, then 20");
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let written = read(&|file| file.set_modified(long_ago).unwrap());
    assert_eq!(written, "the file changed while it was read: it was written to");
}

/// Samples stop at their limit of memory; so do those of a text, while it is tokenised.
#[test]
fn samples_have_a_limit_of_memory() {
    let tokenizer = without_template();
    let lines = "{\"text\": \"word word word\"}\n".repeat(600);
    let memory = load(&tokenizer, &lines).unwrap().memory();
    let limited = |memory: u64| load_as(&tokenizer, &lines, Options { memory, ..OPTIONS });
    assert_eq!(limited(memory).unwrap().samples.len(), 600);
    let error = limited(memory - 1).unwrap_err();
    assert!(matches!(error, DataError::Memory { samples: 599, limit } if limit == memory - 1), "{error}");
    let error = limited(memory / 600 * 2).unwrap_err();
    assert!(matches!(error, DataError::Memory { samples: 2, .. }), "{error}");

    let text = "a word and a word and a word and\n".repeat(20);
    let windows = |memory| Dataset::from_text(text.as_bytes(), &tokenizer, Options { memory, ..WINDOWS }, &mut |_, _| true);
    let all = windows(u64::MAX).unwrap();
    assert_eq!(windows(all.memory()).unwrap(), all);
    let fit = all.samples.len() as u64 - 1;
    assert!(matches!(windows(all.memory() - 1), Err(DataError::Memory { samples, .. }) if samples == fit));
}

/// Keys without end, and a key without end, are not printed in full.
#[test]
fn unknown_keys_are_named_up_to_a_limit() {
    let keys: Vec<String> = (0..50_000).map(|key| format!("\"key {key}\": 1")).collect();
    let long = "k".repeat(1 << 20);
    let many = format!("{{\"text\": \"a\", {}}}\n{{\"text\": \"a\", \"{long}\": 1}}", keys.join(", "));
    let ignored = load(&tokenizer(None), &many).unwrap().ignored_keys;
    assert_eq!((ignored.named.len(), ignored.others), (20, 49_981));
    assert!(ignored.named.keys().all(|key| key.len() < 100));
    let error = load(&tokenizer(None), &many.replacen("\"text\"", "\"texts\"", 1)).unwrap_err();
    assert!(matches!(&error, DataError::UnknownForm { line: 1, found, others: 49_981 } if found.len() == 20), "{error}");
    assert!(error.to_string().len() < 2000 && error.to_string().ends_with(" and 49981 others"), "{error}");
}

#[test]
fn reading_reports_progress_and_can_be_stopped() {
    let tokenizer = tokenizer(None);
    let lines = "{\"text\": \"word\"}\n".repeat(1100);
    let mut calls = Vec::new();
    let file = DataFile::new(Path::new("a.jsonl"), lines.into_bytes());
    let mut listen = |done, total| {
        calls.push((done, total));
        true
    };
    assert_eq!(file.samples(&tokenizer, OPTIONS, &mut listen).unwrap().samples.len(), 1100);
    // It is also called while lines are tokenised: with the numbers before these.
    calls.dedup();
    calls.retain(|&(done, _)| done > 0);
    assert_eq!(calls, [(512, 1100), (1024, 1100), (1100, 1100)]);
    let stopped = file.samples(&tokenizer, OPTIONS, &mut |_, _| false);
    assert!(matches!(stopped, Err(DataError::Cancelled)), "{stopped:?}");
}

#[test]
fn a_shown_batch_has_every_token_in_a_part() {
    let tokenizer = tokenizer(None);
    let dataset = load(&tokenizer, &format!("{}\n{}", chat(), chat())).unwrap();
    let shown = show_batch(&batch(&dataset.samples, &[vec![0, 1]]), &tokenizer).unwrap();
    assert_eq!(shown.len(), 2);
    for (shown, sample) in shown.iter().zip(&dataset.samples) {
        assert_eq!(shown.parts.iter().flat_map(|part| part.tokens.clone()).collect::<Vec<_>>(), sample.tokens);
        assert_eq!((shown.tokens, shown.learned), (sample.tokens.len() as u64, sample.loss_tokens()));
        let learned: usize = shown.parts.iter().filter(|part| part.learned).map(|part| part.tokens.len()).sum();
        assert_eq!(learned as u64, shown.learned);
    }
}

/// The fixture's tokenizer with other files next to it.
fn with_files(files: TokenizerFiles<'_>) -> Tokenizer {
    let json = read("tokenizer.json");
    Tokenizer::new(TokenizerFiles { tokenizer: &json, ..files }, &model(), 0).unwrap()
}

/// What the template of a tokenizer makes of one question.
fn rendered(tokenizer: &Tokenizer) -> String {
    let tokens = tokenizer.chat_prompt(&[say("user", "Hi")]).unwrap();
    tokenizer.decode(&tokens).unwrap()
}

#[test]
fn special_tokens_are_read_from_both_files() {
    let template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token }}|{{ cls_token }}|{{ mask_token }}|{{ unk_token }}|\
        {{ image_token }}|{{ audio_token }}|{{ additional_special_tokens | join(',') }}|{{ add_bos_token is defined }}";
    let config = format!(
        r#"{{"chat_template": {template:?}, "bos_token": {{"content": "<b>"}}, "pad_token": null, "image_token": "<i>", "add_bos_token": true,
            "extra_special_tokens": {{"audio_token": "<a>"}}}}"#
    );
    let map = br#"{"bos_token": "<n>", "eos_token": {"content": "<|endoftext|>", "lstrip": false}, "pad_token": "<p>", "sep_token": "<s>",
        "cls_token": "<c>", "mask_token": "<m>", "additional_special_tokens": ["<x>", {"content": "<y>"}]}"#;
    let files =
        TokenizerFiles { config: Some(config.as_bytes()), special_tokens_map: Some(map), ..TokenizerFiles::default() };
    let tokenizer = with_files(files);
    let after_bos = "<|endoftext|>|<p>|<s>|<c>|<m>||<i>|<a>|<x>,<y>|False";
    assert_eq!(rendered(&tokenizer), format!("<n>|{after_bos}"), "special_tokens_map.json goes first");
    assert_eq!(tokenizer.eos(), Some(0), "the token that ends a text is that of special_tokens_map.json");
    let with_decoder = config.replacen('{', "{\"added_tokens_decoder\": {}, ", 1);
    let tokenizer = with_files(TokenizerFiles { config: Some(with_decoder.as_bytes()), ..files });
    assert_eq!(rendered(&tokenizer), format!("<b>|{after_bos}"), "tokenizer_config.json goes first");
    let without = with_files(TokenizerFiles { config: Some(config.as_bytes()), ..TokenizerFiles::default() });
    assert_eq!(without.eos(), Some(2), "config.json's");
}

/// Tokens that tokenizer.json does not list as added, as transformers 5.24 finds them in a text.
#[test]
fn added_tokens_are_read_from_all_files() {
    let tokens = |files: TokenizerFiles<'_>, text: &str| with_files(files).encode(text, false).unwrap();
    let none = TokenizerFiles::default();
    let token = |name: &str| split_token(&with_files(none), name);
    let (a, space_b) = (token("a"), token(" b"));
    assert_ne!(tokens(none, "atheb"), [a, token("the"), token("b")], "no token by itself");
    let decoder = br#"{"added_tokens_decoder": {"9": {"content": "the", "normalized": false, "special": true}}}"#;
    let expected = [a, token("the"), token("b")];
    assert_eq!(tokens(TokenizerFiles { config: Some(decoder), ..none }, "atheb"), expected);
    let named = br#"{"sep_token": "the"}"#;
    assert_eq!(tokens(TokenizerFiles { config: Some(named), ..none }, "atheb"), expected);
    assert_eq!(tokens(TokenizerFiles { special_tokens_map: Some(named), ..none }, "atheb"), expected);
    let listed = br#"{"additional_special_tokens": ["the"]}"#;
    assert_eq!(tokens(TokenizerFiles { config: Some(listed), ..none }, "atheb"), expected);
    assert_eq!(tokens(TokenizerFiles { added_tokens: Some(br#"{"the": 9}"#), ..none }, "atheb"), expected);
    let stripping = br#"{"added_tokens_decoder": {"2": {"content": "<|im_end|>", "lstrip": true, "special": true}}}"#;
    assert_eq!(tokens(TokenizerFiles { config: Some(stripping), ..none }, "a <|im_end|>"), [a, 2]);
    // A token without a row in the model is an error only if a text has it.
    let new = TokenizerFiles { added_tokens: Some(br#"{"<new>": 2048}"#), ..none };
    assert_eq!(tokens(new, "a b"), [a, space_b]);
    let error = with_files(new).encode("<new>", false).unwrap_err();
    assert!(matches!(error, DataError::TokenId { id: 2048, .. }), "{error}");
    let named = TokenizerFiles { config: Some(br#"{"sep_token": "<new>"}"#), ..none };
    assert_eq!(tokens(named, "<new>"), tokens(none, "<new>"), "a special token without a row is split");
    let split_special = br#"{"split_special_tokens": true}"#;
    assert!(tokens(TokenizerFiles { config: Some(split_special), ..none }, "<|im_end|>").len() > 1);
}

/// The number of a token.
#[track_caller]
fn split_token(tokenizer: &Tokenizer, name: &str) -> u32 {
    let tokens = tokenizer.encode(name, false).unwrap();
    assert_eq!(tokens.len(), 1, "{name}");
    tokens[0]
}

#[test]
fn conversations_with_tools_have_a_template_of_their_own() {
    let config = br#"{"chat_template": [{"name": "default", "template": "plain {{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | length }} tools {{ messages[0].content }}"}, {"name": "rag", "template": "{% broken"}]}"#;
    let tokenizer = with_files(TokenizerFiles { config: Some(config), ..TokenizerFiles::default() });
    let line = |tools: &str| format!(r#"{{"messages": [{{"role": "assistant", "content": "Hi"}}]{tools}}}"#);
    assert_eq!(shown(&tokenizer, &line("")), "plain⟦ Hi⟧");
    assert_eq!(shown(&tokenizer, &line(r#", "tools": null"#)), "plain⟦ Hi⟧");
    assert_eq!(shown(&tokenizer, &line(r#", "tools": [{"name": "look"}]"#)), "1 tools⟦ Hi⟧");
    assert_eq!(shown(&tokenizer, &line(r#", "tools": []"#)), "0 tools⟦ Hi⟧", "as transformers has it");
}

#[test]
fn files_of_templates_go_before_listed_ones() {
    let config = br#"{"chat_template": "config"}"#;
    let processor = br#"{"chat_template": "processor"}"#;
    let files = TokenizerFiles { config: Some(config), processor_template: Some(processor), ..TokenizerFiles::default() };
    assert_eq!(rendered(&with_files(files)), "config");
    assert_eq!(rendered(&with_files(TokenizerFiles { chat_template: Some(b"file"), ..files })), "file");
    assert_eq!(rendered(&with_files(TokenizerFiles { config: None, ..files })), "processor");
    let with_tools = with_files(TokenizerFiles {
        additional_templates: &[("tool_use", b"{{ messages[0].content }} with tools")],
        ..files
    });
    assert_eq!(rendered(&with_tools), "config");
    let line = r#"{"messages": [{"role": "assistant", "content": "Hi"}], "tools": [{"name": "look"}]}"#;
    assert!(shown(&with_tools, line).contains("with tools"));
    let named_default = [("default", &b"additional"[..]), ("tool_use", b"x")];
    let additional = TokenizerFiles { additional_templates: &named_default, chat_template: Some(b"file"), ..files };
    assert_eq!(rendered(&with_files(additional)), "additional");
    let only_tools = with_files(TokenizerFiles { additional_templates: &[("tool_use", b"x")], ..TokenizerFiles::default() });
    let refused = only_tools.chat_prompt(&[say("user", "Hi")]).unwrap_err();
    assert_eq!(refused.to_string(), "the model has the chat templates tool_use, and none that is named default");
}

#[test]
fn messages_may_say_that_they_are_not_learned() {
    let tokenizer = tokenizer(None);
    let expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
        <|im_start|>assistant\n⟦So long.<|im_end|>⟧";
    for not_learned in ["\"weight\": 0", "\"weight\": 0.0", "\"train\": false", "\"training\": false", "\"loss\": false"] {
        let line = format!(
            r#"{{"messages": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Ho", {not_learned}}},
                {{"role": "user", "content": "Bye", "weight": 0}}, {{"role": "assistant", "content": "So long.", "weight": 1, "train": true}}]}}"#
        );
        assert_eq!(shown(&tokenizer, &line.replace('\n', " ")), expected, "{not_learned}");
        let share_gpt = format!(
            r#"{{"conversations": [{{"from": "human", "value": "Hi"}}, {{"from": "gpt", "value": "Ho", {not_learned}}},
                {{"from": "human", "value": "Bye"}}, {{"from": "gpt", "value": "So long."}}]}}"#
        );
        assert_eq!(shown(&tokenizer, &share_gpt.replace('\n', " ")), expected, "{not_learned}");
        let all = load_as(&tokenizer, &line.replace('\n', " "), Options { train_on: TrainOn::All, ..OPTIONS });
        assert!(matches!(all, Err(DataError::Unlearned { line: 1 })), "{all:?}");
    }
    // Before them stands a system prompt that is not one of the messages.
    let line = r#"{"system": "S", "messages": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]}"#;
    assert!(shown(&tokenizer, line).ends_with("assistant\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧"));
}

#[test]
fn what_was_said_before_an_instruction_stands_before_it() {
    let line = r#"{"instruction": "And in winter?", "input": "", "output": "Two.", "history": [["How warm is summer?", "Twenty."]], "system": "S"}"#;
    let expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHow warm is summer?<|im_end|>\n<|im_start|>assistant\n⟦Twenty.<|im_end|>⟧\n\
        <|im_start|>user\nAnd in winter?<|im_end|>\n<|im_start|>assistant\n⟦Two.<|im_end|>⟧";
    assert_eq!(shown(&tokenizer(None), line), expected);
    let expected = "S\n\n### Instruction:\nHow warm is summer?\n\n### Response:\n⟦Twenty.<|im_end|>⟧\n\n### Instruction:\nAnd in winter?\n\n\
        ### Response:\n⟦Two.<|im_end|>⟧";
    assert_eq!(shown(&without_template(), line), expected);
    let line = r#"{"prompt": "Hi", "completion": " Hello.", "system": "Be kind."}"#;
    assert_eq!(shown(&tokenizer(None), line), "Be kind.\n\nHi⟦ Hello.<|im_end|>⟧");
    let tools = r#"{"instruction": "I", "output": "O", "tools": [{"name": "look"}]}"#;
    assert!(matches!(load(&without_template(), tools), Err(DataError::NoTemplate { line: 1 })));
}

#[test]
fn keys_without_a_meaning_are_counted() {
    let lines = "{\"text\": \"a\", \"id\": 1, \"source\": \"x\", \"history\": []}\n{\"text\": \"b\", \"id\": 2}";
    let ignored = load(&tokenizer(None), lines).unwrap().ignored_keys.named;
    let ignored: Vec<_> = ignored.iter().map(|(key, lines)| (key.as_str(), *lines)).collect();
    assert_eq!(ignored, [("history", 1), ("id", 2), ("source", 1)]);
}

/// A conversation as a line.
fn line_of(messages: &[(&str, &str)]) -> String {
    let message = |(role, content): &(&str, &str)| serde_json::json!({"role": role, "content": content});
    serde_json::json!({"messages": messages.iter().map(message).collect::<Vec<_>>()}).to_string()
}

/// What may be wrong with the one sample of a file.
fn concerns(tokenizer: &Tokenizer, line: &str, train_on: TrainOn) -> Vec<Concern> {
    let notices = load_as(tokenizer, line, Options { train_on, ..OPTIONS }).unwrap().notices;
    assert!(notices.iter().all(|notice| (notice.samples, notice.line) == (1, 1)), "{notices:?}");
    notices.into_iter().map(|notice| notice.concern).collect()
}

/// The last turn has a thought that earlier ones have not, and the generation prompt begins one.
const LAST_THINKS: &str = "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>assistant\n{{ m.content | trim }}<|im_end|>\n\
    {% elif m.role == 'assistant' %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n{% else %}\
    <|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";

#[test]
fn of_an_answer_that_says_nothing_the_end_is_learned() {
    let tokenizer = tokenizer(Some(LAST_THINKS));
    for said in ["", " \n"] {
        let line = line_of(&[("user", "One?"), ("assistant", said), ("user", "Two?"), ("assistant", "Second.")]);
        let expected = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nTwo?<|im_end|>\n\
            <|im_start|>assistant\n<think>\n⟦\n</think>\n\nSecond.<|im_end|>⟧";
        assert_eq!(shown(&tokenizer, &line), expected, "{said:?}");
    }
}

#[test]
fn a_text_may_end_otherwise_than_a_turn() {
    let eos = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}";
    let line = line_of(&[("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]);
    let text = shown(&tokenizer(Some(eos)), &line);
    assert!(text.contains("⟦First.<|end|>") && text.ends_with("⟦Second.<|end|>\n<|im_end|>⟧"), "{text}");
    assert!(!text.contains("⟦First.<|end|>\n<|user|>"), "{text}");
    let results = "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n<r>{{ m.content }}\
        {{ '\n</r>' if loop.last else '\n</r>\n' }}<|im_end|>\n\
        {% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let line = line_of(&[("user", "One?"), ("assistant", "Look."), ("tool", "12"), ("assistant", "12.")]);
    let expected = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦Look.<|im_end|>⟧\n<|im_start|>tool\n<r>12\n</r>\n<|im_end|>\n\
        <|im_start|>assistant\n⟦12.<|im_end|>⟧";
    assert_eq!(shown(&tokenizer(Some(results)), &line), expected);
}

/// In the manner of Mistral: the system prompt stands before the last message, if that is the
/// user's.
const DROPS_SYSTEM: &str = "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}\
    {% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}\
    {% if loop.last and sys is defined %}[INST]{{ sys }}\n\n{{ m.content }}[/INST]{% else %}[INST]{{ m.content }}[/INST]{% endif %}\
    {% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";

#[test]
fn what_a_template_leaves_out_is_named() {
    let dropping = tokenizer(Some(DROPS_SYSTEM));
    let line = line_of(&[("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello.")]);
    let system = Concern::LeftOut(LeftOut::Message { role: "system".into() });
    for train_on in [TrainOn::Completions, TrainOn::All] {
        assert_eq!(concerns(&dropping, &line, train_on), std::slice::from_ref(&system));
        assert_eq!(concerns(&tokenizer(None), &line, train_on), []);
    }
    assert_eq!(shown(&dropping, &line), "[INST]Hi[/INST]⟦Hello.<|im_end|>⟧");
    let asked = [say("system", "Be kind."), say("user", "Hi")];
    assert_eq!(dropping.left_out(&asked), [""; 0]);
    let asked = [say("system", "Be kind."), say("user", "Hi"), say("assistant", "Hello.")];
    assert_eq!(dropping.left_out(&asked), ["the system prompt"]);

    let speaks = "{% for m in messages if m.role != 'developer' %}{{ m.role + m.content + eos_token }}{% endfor %}";
    let more = r#"{"messages": [{"role": "developer", "content": "D"}, {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]},
        {"role": "tool", "name": "f", "content": "12"}, {"role": "assistant", "content": "A", "reasoning_content": "R"}],
        "tools": [{"type": "function", "function": {"name": "f"}}]}"#;
    let name = LeftOut::Name { role: "tool".into() };
    let lacks = [LeftOut::Message { role: "developer".into() }, LeftOut::Thought, LeftOut::Calls, LeftOut::Tools, name];
    let found = concerns(&tokenizer(Some(speaks)), &more.replace('\n', " "), TrainOn::Completions);
    assert_eq!(found, lacks.map(Concern::LeftOut));
}

/// OpenAI's interface has arguments of calls as JSON in a string.
#[test]
fn arguments_in_a_string_are_what_the_template_takes() {
    let line = r#"{"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "", "tool_calls":
        [{"type": "function", "function": {"name": "f", "arguments": "{\"a\":  1}"}}]}]}"#;
    let line = line.replace('\n', " ");
    let learned = |call: &str| {
        let calls = format!("{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}");
        let template = chat_ml(&format!("<|im_start|>assistant\n{calls}{{{{ m.content }}}}<|im_end|>\n"), "");
        shown(&tokenizer(Some(&template)), &line).split("assistant\n").nth(1).unwrap().to_owned()
    };
    // An object, for a template that writes it as JSON, or reads its keys.
    assert_eq!(learned("{{ c.function.arguments | tojson }}"), "⟦{\"a\": 1}<|im_end|>⟧");
    assert_eq!(learned("{{ c.function | tojson }}"), "⟦{\"name\": \"f\", \"arguments\": {\"a\": 1}}<|im_end|>⟧");
    assert_eq!(learned("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"), "⟦a=1<|im_end|>⟧");
    // The string as the file has it, for a template that writes strings.
    assert_eq!(learned("{{ c.function.name + c.function.arguments }}"), "⟦f{\"a\":  1}<|im_end|>⟧");
    assert_eq!(learned("{{ c.function.arguments }}"), "⟦{\"a\":  1}<|im_end|>⟧");
}

#[test]
fn answers_without_a_token_that_ends_a_text_are_counted() {
    let endless = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant: {% endif %}";
    let line = line_of(&[("user", "Hi"), ("assistant", "Hello.")]);
    for train_on in [TrainOn::Completions, TrainOn::All] {
        assert_eq!(concerns(&tokenizer(Some(endless)), &line, train_on), [Concern::NoEnd]);
        assert_eq!(concerns(&tokenizer(None), &line, train_on), []);
    }
    let lines = format!("\n{line}\n{line}");
    let notices = load(&tokenizer(Some(endless)), &lines).unwrap().notices;
    assert_eq!(notices, [Notice { concern: Concern::NoEnd, samples: 2, line: 2 }]);
    assert!(notices[0].to_string().contains("(2 samples, the first one in line 2)"), "{}", notices[0]);
}

#[test]
fn what_a_template_marks_itself_is_learned_and_nothing_else() {
    let marking = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
        {% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}";
    let expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Ho<|im_end|>\n⟧<|im_start|>user\nHi<|im_end|>";
    let line = line_of(&[("user", "Hi"), ("assistant", "Ho"), ("user", "Hi")]);
    assert_eq!(shown(&tokenizer(Some(marking)), &line), expected);
}

/// A template that marks its answers, with `answer` for their words.
fn marking(answer: &str) -> String {
    chat_ml(&format!("<|im_start|>assistant\n{{% generation %}}{answer}<|im_end|>{{% endgeneration %}}{{{{ '\\n' }}}}"), "")
}

/// Three answers; the first one is not learned.
fn unlearned_first(content: &str, more: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "{content}", "weight": 0{more}}},
        {{"role": "assistant", "content": "a"}}, {{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "b"}}]}}"#
    )
    .replace('\n', " ")
}

#[test]
fn an_unlearned_answer_between_marks_is_left_out_or_an_error() {
    let tokenizer = |answer: &str| tokenizer(Some(&marking(answer)));
    let ends = "<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧";
    for content in ["Ho", ""] {
        let text = shown(&tokenizer("{{ m.content }}"), &unlearned_first(content, ""));
        assert!(text.ends_with(&format!("<|im_start|>assistant\n{content}{ends}")), "{text}");
    }
    // What is written of it does not show whose it is: changed words, a changed call, no words.
    let changed = "{{ m.content | upper if loop.index == 2 else m.content }}";
    let call = r#", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"q": "sky"}}}]"#;
    let called = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.q | upper }}{% endfor %}";
    let silent = "{{ m.content or 'Nothing.' }}";
    for (answer, content, more) in [(changed, "ho", ""), (called, "", call), (called, "Ho", call), (silent, "", "")] {
        let error = load(&tokenizer(answer), &unlearned_first(content, more)).unwrap_err();
        assert!(matches!(error, DataError::Spans { message: 1, flaw: SpanFlaw::Changed, .. }), "{answer}: {error}");
    }
}

#[test]
fn marks_around_words_of_other_messages_are_an_error() {
    let error = |template: &str, line: &str| load(&tokenizer(Some(template)), line).unwrap_err();
    let all = "{% generation %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% endgeneration %}";
    let found = error(all, &line_of(&[("user", "Hi"), ("assistant", "Ho")]));
    assert!(matches!(found, DataError::Spans { message: 1, flaw: SpanFlaw::Mixed, .. }), "{found}");
    let answers = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{% generation %}\
        {% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}{% endgeneration %}";
    let found = error(answers, &unlearned_first("Ho", ""));
    assert!(matches!(found, DataError::Spans { message: 1, flaw: SpanFlaw::Mixed, .. }), "{found}");
    let line = line_of(&[("user", "Hi"), ("assistant", "Ho"), ("assistant", "Ha")]);
    assert_eq!(shown(&tokenizer(Some(answers)), &line), "Hi⟦Ho<|im_end|>Ha<|im_end|>⟧");
}

#[test]
fn answers_without_marks_are_counted() {
    let last = marking("{{ m.content }}").replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last");
    let tokenizer = tokenizer(Some(&last));
    let line = line_of(&[("user", "Hi"), ("assistant", "Ho"), ("user", "Hi"), ("assistant", "Ha")]);
    assert_eq!(concerns(&tokenizer, &line, TrainOn::Completions), [Concern::Unmarked]);
    assert_eq!(concerns(&tokenizer, &line, TrainOn::All), []);
    let line = line.replace("\"Ho\"", "\"Ho\", \"weight\": 0");
    assert_eq!(concerns(&tokenizer, &line, TrainOn::Completions), []);
}

#[test]
fn a_token_that_begins_every_text_and_this_one_is_put_once_with_a_warning() {
    let tokenizer = framing_tokenizer();
    let expected = [Notice { concern: Concern::DoubledBos, samples: 1, line: 2 }];
    let lines = "{\"text\": \"one<|im_end|>\"}\n{\"text\": \"<|endoftext|>two\"}";
    assert_eq!(load(&tokenizer, lines).unwrap().notices, expected);
    let notices = |text: &str| Dataset::from_text(text.as_bytes(), &tokenizer, WINDOWS, &mut |_, _| true).unwrap().notices;
    assert_eq!(notices("<|endoftext|>two"), [Notice { line: 1, ..expected[0].clone() }]);
    assert_eq!(notices("two<|im_end|>"), []);
}

#[test]
fn names_and_identifiers_that_no_template_writes_are_named() {
    let template = |answer: &str| chat_ml(&format!("{answer}{{{{ m.content }}}}<|im_end|>\n"), "");
    let line = r#"{"messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "tool", "content": "12", "tool_call_id": "c7"},
        {"role": "assistant", "content": "b", "name": "Bob"}]}"#
        .replace('\n', " ");
    let name = |role: &str| Concern::LeftOut(LeftOut::Name { role: role.into() });
    let found = |answer: &str| concerns(&tokenizer(Some(&template(answer))), &line, TrainOn::Completions);
    assert_eq!(found(""), [name("assistant"), name("user")]);
    assert_eq!(found("{{ tools[0].name if tools else '' }}"), [name("assistant"), name("user")]);
    assert_eq!(found("{{ m.name }}: "), [name("user")]);
    let ignored = |answer: &str| load(&tokenizer(Some(&template(answer))), &line).unwrap().ignored_keys.named;
    assert_eq!(ignored("").into_iter().collect::<Vec<_>>(), [("messages[].tool_call_id".to_owned(), 1)]);
    assert!(ignored("{{ m.tool_call_id }}").is_empty());
}

#[test]
fn words_that_a_template_changes_are_an_error_only_if_the_assistant_says_them() {
    let loud = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ m.content | upper if m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}";
    let line = line_of(&[("user", "Hi"), ("assistant", "Ho"), ("user", "Hi"), ("assistant", "Ho")]);
    let expected = "<|im_start|>user\nHI<|im_end|>\n<|im_start|>assistant\n⟦Ho<|im_end|>⟧\n<|im_start|>user\nHI<|im_end|>\n\
        <|im_start|>assistant\n⟦Ho<|im_end|>⟧";
    assert_eq!(shown(&tokenizer(Some(loud)), &line), expected);
    let mixed = "{% for m in messages %}{{ m.content.split(' ')[0] }}{% endfor %}{% for m in messages %}{{ m.content.split(' ')[1] }}{% endfor %}";
    let line = line_of(&[("user", "a b"), ("assistant", "c d")]);
    let error = load(&tokenizer(Some(mixed)), &line).unwrap_err();
    assert!(matches!(error, DataError::Spans { line: 1, message: 1, flaw: SpanFlaw::Mixed }), "{error}");
}

#[test]
fn content_may_be_a_list_of_parts() {
    let parts = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n{% endfor %}";
    let line = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "text"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " text"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}"#;
    let expected =
        "<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n⟦a text<|im_end|>⟧\n<|im_start|>assistant\n⟦<|im_end|>⟧";
    assert_eq!(shown(&tokenizer(Some(parts)), &line.replace('\n', " ")), expected);
}

/// Messages and the generation prompt of ChatML, with `answer` for the turns of the assistant.
fn chat_ml(answer: &str, prompt: &str) -> String {
    format!(
        "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{{% endif %}}\
         {{% endfor %}}{prompt}"
    )
}

#[test]
fn an_answer_may_begin_with_more_than_a_prompt_that_is_always_there() {
    let prompt = "{{ '<|im_start|>assistant\n' }}";
    let template = chat_ml("<|im_start|>assistant\n<|start|>{{ m.content }}<|stop|><|im_end|>\n", prompt);
    let text = shown(&tokenizer(Some(&template)), &chat());
    let expected = "<|im_start|>assistant\n⟦<|start|>Hello, friend!<|stop|><|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n\
        ⟦<|start|>So long.<|stop|><|im_end|>⟧\n<|im_start|>assistant";
    assert!(text.ends_with(expected), "{text}");
}

/// In the manner of Command-R: a result has the number of its call, which is found by identifiers.
#[test]
fn calls_are_found_by_their_identifiers_and_tools_by_their_names() {
    let answer = "<|im_start|>assistant\n{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.q }}){% endfor %}\
        {{ m.content }}<|im_end|>\n";
    let by_id = "{% for o in messages if o.tool_calls %}{% for c in o.tool_calls if c.id == m.tool_call_id %}{{ loop.index }}={% endfor %}{% endfor %}";
    let by_name = "{% for t in tools if t.function.name == m.name %}{{ t.function.name }}={% endfor %}";
    let line = r#"{"messages": [{"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c7", "type": "function", "function": {"name": "look", "arguments": {"q": "sky"}}}]},
        {"role": "tool", "content": "12", "tool_call_id": "c7", "name": "look"}, {"role": "assistant", "content": "12."}],
        "tools": [{"type": "function", "function": {"name": "look"}}]}"#;
    for (found, written) in [(by_id, "1="), (by_name, "look=")] {
        let template = chat_ml(answer, "")
            .replace("{{ m.content }}<|im_end|>\n{% endif", &format!("{found}{{{{ m.content }}}}<|im_end|>\n{{% endif"));
        let text = shown(&tokenizer(Some(&template)), &line.replace('\n', " "));
        let expected = format!(
            "<|im_start|>assistant\n⟦look(sky)<|im_end|>⟧\n<|im_start|>tool\n{written}12<|im_end|>\n<|im_start|>assistant\n⟦12.<|im_end|>⟧"
        );
        assert!(text.ends_with(&expected), "{text}");
    }
    // What is done with a call may not be known.
    let hidden = chat_ml(
        "<|im_start|>assistant\n{% for c in m.tool_calls or [] %}{{ c.function.arguments.q | length }}{{ c.function.arguments.q | upper }}{% endfor %}{{ m.content }}<|im_end|>\n",
        "",
    );
    let error = load(&tokenizer(Some(&hidden)), &line.replace('\n', " ")).unwrap_err();
    assert!(matches!(error, DataError::Spans { message: 1, flaw: SpanFlaw::Changed, .. }), "{error}");
}

/// In the manner of Nemotron 3: two strings that the template looks for overlap in the answer.
#[test]
fn strings_that_a_template_looks_for_may_overlap() {
    let answer = "{% set c = m.content %}{% if '<think>' in c and '</think>' in c and not loop.last %}{% set c = '<think></think>' ~ c.split('</think>')[-1] %}\
        {% endif %}<|im_start|>assistant\n{{ c }}{{ '\n</x>' if false }}<|im_end|>\n";
    let template = chat_ml(answer, "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}");
    let line = chat().replace("Hello, friend!", "<think>\\nHm.\\n</think>\\n\\nHello!");
    let text = shown(&tokenizer(Some(&template)), &line);
    assert!(text.contains("<|im_start|>assistant\n⟦<think></think>\n\nHello!<|im_end|>⟧\n"), "{text}");
}

/// In the manner of Exaone 4: an answer that says nothing has no thought either.
#[test]
fn a_turn_that_says_nothing_may_lack_what_the_prompt_begins() {
    let answer = "<|im_start|>assistant\n{% if m.content %}<think>\n\n</think>\n\n{{ m.content }}{% endif %}<|im_end|>\n";
    let prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}";
    let text = shown(&tokenizer(Some(&chat_ml(answer, prompt))), &chat().replace("Hello, friend!", ""));
    let expected = "<|im_start|>assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\
        ⟦So long.<|im_end|>⟧";
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn a_prompt_of_messages_is_learned_only_if_everything_is() {
    let line = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]}"#;
    let (tokenizer, line) = (tokenizer(None), line.replace('\n', " "));
    let expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n\
        ⟦d<|im_end|>⟧\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n⟦f<|im_end|>⟧";
    assert_eq!(shown(&tokenizer, &line), expected);
    let all = load_as(&tokenizer, &line, Options { train_on: TrainOn::All, ..OPTIONS }).unwrap();
    assert_eq!(loss_tokens(&all), all.tokens() - 1);
}

#[test]
fn a_line_may_have_variables_of_its_template() {
    let prompt =
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if enable_thinking else '<think></think>' }}{% endif %}";
    let answer = "<|im_start|>assistant\n{{ '' if enable_thinking else '<think></think>' }}{{ m.content }}<|im_end|>\n";
    let tokenizer = tokenizer(Some(&chat_ml(answer, prompt)));
    let with = |thinking: &str| {
        let line = chat().replacen('{', &format!("{{\"chat_template_kwargs\": {{\"enable_thinking\": {thinking}}}, "), 1);
        shown(&tokenizer, &line)
    };
    assert!(with("true").ends_with("<|im_start|>assistant\n⟦So long.<|im_end|>⟧"), "{}", with("true"));
    assert!(with("false").ends_with("<|im_start|>assistant\n<think></think>⟦So long.<|im_end|>⟧"), "{}", with("false"));
}

#[test]
fn keys_of_messages_that_no_template_reads_are_counted() {
    let line = r#"{"messages": [{"role": "user", "content": "a", "mood": "sad"}, {"role": "assistant", "content": "b"}]}"#;
    let ignored = |template: Option<&str>| load(&tokenizer(template), line).unwrap().ignored_keys.named;
    assert_eq!(ignored(None).into_iter().collect::<Vec<_>>(), [("messages[].mood".to_owned(), 1)]);
    assert!(ignored(Some(&chat_ml("{{ m.mood }}{{ m.content }}<|im_end|>", ""))).is_empty());
}

/// Piece by piece a text has the tokens that it has at once, where pieces end before words.
#[test]
fn a_long_text_is_tokenised_in_pieces() {
    let text = "Once upon a time\nthere was a text.\n\n  It had lines,\nshort\nand long ones.\n".repeat(20);
    for tokenizer in [without_template(), framing_tokenizer()] {
        let mut calls = Vec::new();
        let mut tokens = |limit: usize| {
            let mut tokens = Vec::new();
            let mut progress = |done, total| {
                calls.extend((limit == 100).then_some((done, total)));
                true
            };
            let take = |piece| {
                tokens.extend::<Vec<u32>>(piece);
                Ok(())
            };
            let doubled_bos = sample::tokenise(&text, &tokenizer, limit, &mut progress, take).unwrap();
            (tokens, doubled_bos)
        };
        assert_eq!(tokens(100), tokens(text.len()));
        assert!(calls.iter().all(|(done, total)| done < total && *total > 14), "{calls:?}");
    }
}

/// Ctrl-C is heard while one line is tokenised.
#[test]
fn a_long_line_can_be_stopped() {
    let line = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(60_000));
    let tokenizer = without_template();
    let mut calls = Vec::new();
    let lines = line.repeat(2);
    let stopped = Dataset::from_json_lines(|| Ok(lines.as_bytes()), &tokenizer, OPTIONS, &mut |done, total| {
        calls.push((done, total));
        // The lines are counted first, in one call or more.
        calls.len() < 20 && calls.iter().filter(|call| **call == (0, 2)).count() < 2
    });
    assert!(matches!(stopped, Err(DataError::Cancelled)));
    assert!(calls.iter().all(|(done, _)| *done == 0), "no line was done: {calls:?}");
}

/// The line is named whose text a pattern cannot split in time.
#[test]
fn a_line_that_a_pattern_cannot_split_is_named() {
    let mut json: serde_json::Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
    json["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": r"\s+(?=x)"}, "behavior": "Isolated",
        "invert": false});
    let json = json.to_string();
    let files = TokenizerFiles { tokenizer: json.as_bytes(), ..Default::default() };
    let tokenizer = Tokenizer::new(files, &model(), 0).unwrap();
    let line = |text: &str| format!("{{\"text\": \"{text}\"}}\n");
    let error = load(&tokenizer, &[line("a x"), line(&" ".repeat(1_100_000))].concat()).unwrap_err();
    assert!(matches!(error, DataError::Encode(_)), "{error}");
    let error = error.to_string();
    assert!(error.starts_with(r#"the pack's tokenizer: line 2: the pattern "\\s+(?=x)" takes too long"#), "{error}");
}
