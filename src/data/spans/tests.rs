//! Spans of random conversations in the shapes of templates that models have, against spans that
//! are put together here by hand.

use super::*;
use crate::data::template::ChatTemplate;

const FOLDER: &str = "tests/fixtures/templates";

/// A message of a random conversation.
#[derive(Debug, Clone, PartialEq)]
struct Say {
    role: &'static str,
    content: String,
    /// Names and arguments of calls.
    calls: Vec<(String, String)>,
}

impl Say {
    /// The message as a template reads it, its keys in order.
    fn value(&self, string_arguments: bool) -> Value {
        let call = |(name, argument): &(String, String)| {
            let arguments = json_text(argument);
            let arguments = if string_arguments { quoted(&arguments) } else { arguments };
            let function = format!("{{\"name\": {}, \"arguments\": {arguments}}}", quoted(name));
            format!("{{\"type\": \"function\", \"id\": \"abcdefghi\", \"function\": {function}}}")
        };
        let calls: Vec<String> = self.calls.iter().map(call).collect();
        let calls = if calls.is_empty() { String::new() } else { format!(", \"tool_calls\": [{}]", calls.join(", ")) };
        let id = if self.role == "tool" { ", \"tool_call_id\": \"abcdefghi\"" } else { "" };
        let json = format!("{{\"role\": \"{}\", \"content\": {}{calls}{id}}}", self.role, quoted(&self.content));
        serde_json::from_str(&json).unwrap()
    }
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}

/// The arguments of a call as JSON with Python's spaces.
fn json_text(argument: &str) -> String {
    format!("{{\"q\": {}}}", quoted(argument))
}

fn tools() -> Value {
    serde_json::from_str(&format!("[{TOOL}]")).unwrap()
}

const TOOL: &str = r#"{"type": "function", "function": {"name": "look", "description": "Looks."}}"#;

/// A piece of the expected text, and whether it is learned.
type Piece = (String, bool);

fn written(text: impl Into<String>) -> Piece {
    (text.into(), false)
}

fn learned(text: impl Into<String>) -> Piece {
    (text.into(), true)
}

fn joined(pieces: Vec<Piece>) -> (String, Vec<Range<usize>>) {
    let (mut text, mut spans) = (String::new(), Vec::<Range<usize>>::new());
    for (piece, is_learned) in pieces.into_iter().filter(|(piece, _)| !piece.is_empty()) {
        let start = text.len();
        text.push_str(&piece);
        match spans.last_mut().filter(|span| span.end == start) {
            Some(span) if is_learned => span.end = text.len(),
            _ if is_learned => spans.push(start..text.len()),
            _ => {}
        }
    }
    (text, spans)
}

/// The shape of a template.
struct Shape {
    name: &'static str,
    ends: &'static [&'static str],
    /// Questions and answers take turns, and a question is first.
    strict: bool,
    system: bool,
    /// Calls of tools and their results.
    calls: bool,
    string_arguments: bool,
    /// Thoughts within the content.
    thoughts: bool,
    /// The expected pieces of a conversation.
    pieces: fn(&[Say]) -> Vec<Piece>,
}

const PLAIN: Shape = Shape {
    name: "",
    ends: &["<|im_end|>"],
    strict: false,
    system: true,
    calls: false,
    string_arguments: false,
    thoughts: false,
    pieces: |_| Vec::new(),
};
const STRICT: Shape = Shape { strict: true, ends: &["</s>"], ..PLAIN };

const SHAPES: [Shape; 19] = [
    Shape { name: "chatml", pieces: chatml, ..PLAIN },
    Shape { name: "chatml_no_prompt", pieces: chatml, ..PLAIN },
    Shape { name: "chatml_generation", pieces: chatml, ..PLAIN },
    Shape { name: "qwen2_5", calls: true, pieces: qwen2_5, ..PLAIN },
    Shape { name: "qwen3", calls: true, thoughts: true, pieces: qwen3, ..PLAIN },
    Shape { name: "qwq", thoughts: true, pieces: qwq, ..PLAIN },
    Shape { name: "llama2", pieces: llama2, ..STRICT },
    Shape { name: "llama3", ends: &["<|eot_id|>"], pieces: llama3, ..PLAIN },
    Shape { name: "llama3_1", ends: &["<|eot_id|>"], pieces: llama3_1, ..PLAIN },
    Shape { name: "mistral_v1", system: false, pieces: mistral_v1, ..STRICT },
    Shape { name: "mistral_v3", ends: &["</s>"], calls: true, pieces: mistral_v3, ..PLAIN },
    Shape { name: "mistral_nemo", pieces: mistral_nemo, ..STRICT },
    Shape { name: "gemma", ends: &["<end_of_turn>"], pieces: gemma, ..STRICT },
    Shape { name: "phi3", ends: &["<|endoftext|>"], pieces: phi3, ..PLAIN },
    Shape {
        name: "deepseek_r1",
        ends: &["<｜end▁of▁sentence｜>"],
        calls: true,
        string_arguments: true,
        thoughts: true,
        pieces: deepseek_r1,
        ..PLAIN
    },
    Shape { name: "hermes_tools", calls: true, pieces: hermes_tools, ..PLAIN },
    Shape { name: "granite", ends: &["<|end_of_text|>"], pieces: granite, ..PLAIN },
    Shape { name: "zephyr", ends: &["</s>"], pieces: zephyr, ..PLAIN },
    Shape { name: "vicuna", ends: &["</s>"], pieces: vicuna, ..PLAIN },
];

fn template(shape: &Shape) -> ChatTemplate {
    let source = std::fs::read_to_string(format!("{FOLDER}/{}.jinja", shape.name)).unwrap();
    let eos = shape.ends.first().unwrap();
    let tokens = [("bos_token", "<s>"), ("eos_token", eos)].map(|(name, token)| (name.to_owned(), token.into()));
    ChatTemplate::new(&source, tokens.into(), 0).unwrap()
}

/// A text with ⟦ ⟧ around some of its bytes.
fn shown(text: &str, spans: &[Range<usize>]) -> String {
    let mut shown = text.to_owned();
    for span in spans.iter().rev() {
        shown.insert(span.end, '⟧');
        shown.insert(span.start, '⟦');
    }
    shown
}

fn found(template: &ChatTemplate, messages: &[Value], tools: &Value, ends: &[&str]) -> (String, Vec<Range<usize>>) {
    let rendering = Rendering { template, messages, tools, add_generation_prompt: false };
    let Rendered { text, generations } = template.rendered(messages, tools, false).unwrap();
    let ends: Vec<String> = ends.iter().map(|&end| end.to_owned()).collect();
    let probed = Probed::new(rendering, &text).with_letters_added();
    let spans = match template.marks_generation() {
        true => probed.marked(generations, &HashSet::new()).unwrap_or_else(|flaw| panic!("{flaw:?} in {text}")),
        false => probed.spans(&ends, &HashSet::new()).unwrap_or_else(|flaw| panic!("{flaw:?} in {text}")),
    };
    // Two answers in a row may touch.
    let pieces = spans.iter().map(|span| span.start).zip(std::iter::once(0).chain(spans.iter().map(|span| span.end)));
    let parted = |(start, before): (usize, usize)| written(&text[before..start]);
    let pieces = pieces.map(parted).zip(spans.iter().map(|span| learned(&text[span.clone()]))).flat_map(|(a, b)| [a, b]);
    (text.clone(), joined(pieces.collect()).1)
}

/// A seeded generator of random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.below(all.len())]
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What is hard to find in a text.
const WORDS: [&str; 34] = [
    "",
    "",
    " ",
    " \n",
    "\n\n",
    "Hello.",
    "Hello. More",
    "Hello.\nHello.",
    "Hello",
    "H",
    "<",
    "<t",
    "<think",
    "<b>bold</b>",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>user\n",
    "</s>",
    "[/INST]",
    "assistant",
    "assistant\n",
    "user",
    "system",
    "Yes\n",
    "  lead and trail \n\n",
    "\n\nlead",
    "\"quoted\"",
    "'",
    "\\n",
    "{\"a\": [1, 2]}",
    "été 漢字 🦀",
    "1",
    "line\nline\n",
    "<|eot_id|>",
    ".",
];

impl Random {
    fn words(&mut self) -> String {
        let first = self.of(&WORDS).to_owned();
        if self.one_in(3) { first + self.of(&WORDS) } else { first }
    }

    fn answer(&mut self, shape: &Shape) -> String {
        match shape.thoughts && self.one_in(2) {
            true => format!("<think>\n{}\n</think>\n\n{}", self.of(&["", "Hm.", "So\n\nthen", "<"]), self.words()),
            false => self.words(),
        }
    }

    fn conversation(&mut self, shape: &Shape) -> Vec<Say> {
        let say = |role, content| Say { role, content, calls: Vec::new() };
        let mut messages = Vec::new();
        if shape.system && self.one_in(2) {
            messages.push(say("system", format!("{}Be kind.", self.of(&["", "\"", "<"]))));
        }
        for turn in 0..1 + self.below(4) {
            let begins_with_answer = !shape.strict && !shape.calls && turn == 0 && self.one_in(8);
            if !begins_with_answer && (shape.strict || turn == 0 || !self.one_in(8)) {
                messages.push(say("user", self.words()));
            }
            for _ in 0..if shape.calls && self.one_in(3) { 1 + self.below(2) } else { 0 } {
                let calls =
                    (0..1 + self.below(2)).map(|_| (self.of(&["look", "go"]).to_owned(), self.words())).collect::<Vec<_>>();
                let results: Vec<Say> = calls.iter().map(|_| say("tool", format!("{}12", self.words()))).collect();
                messages.push(Say { role: "assistant", content: String::new(), calls });
                messages.extend(results);
            }
            messages.push(say("assistant", self.answer(shape)));
        }
        if self.one_in(4) {
            messages.push(say("user", self.words()));
        }
        messages
    }
}

#[test]
fn spans_of_random_conversations_are_those_of_the_pieces() {
    let mut wrong = Vec::new();
    for shape in &SHAPES {
        let template = template(shape);
        let mut random = Random(7);
        let tools = if shape.calls { tools() } else { Value::None };
        for round in 0..60 {
            let says = random.conversation(shape);
            let messages: Vec<Value> = says.iter().map(|say| say.value(shape.string_arguments)).collect();
            let expected = joined((shape.pieces)(&says));
            let found = found(&template, &messages, &tools, shape.ends);
            if found != expected {
                let [found, expected] = [found, expected].map(|(text, spans)| shown(&text, &spans));
                wrong.push(format!("{}, round {round}:\n{found:?}\nexpected\n{expected:?}", shape.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n\n"));
}

/// Texts, assistant masks and ends of prompts, as transformers has them
/// (tests/interop/chat_templates.py).
#[test]
fn spans_and_texts_are_those_of_transformers() {
    let cases = std::fs::read_to_string(format!("{FOLDER}/expected.jsonl")).unwrap();
    let (mut masks, mut prompts) = (0, 0);
    for (line, case) in (1..).zip(cases.lines()) {
        let case: Value = serde_json::from_str(case).unwrap();
        let of = |key: &str| case.get(key);
        let name = of("template").to_string();
        let shape = SHAPES.iter().find(|shape| shape.name == name).unwrap();
        let messages: Vec<Value> = of("messages").as_list().unwrap().to_vec();
        let (text, spans) = found(&template(shape), &messages, &of("tools"), shape.ends);
        assert_eq!(text, of("text").as_str().unwrap(), "{name}, line {line}");
        if let Some(mask) = of("mask").as_str() {
            let learned = |at| spans.iter().any(|span| span.contains(&at));
            let found: String = text.char_indices().map(|(at, _)| if learned(at) { '1' } else { '0' }).collect();
            assert_eq!(found, mask, "{name}, line {line}: {text}");
            masks += 1;
        }
        if let Value::Int(prompt) = of("prompt") {
            let characters = text[..spans.last().unwrap().start].chars().count() as i128;
            assert_eq!(characters, prompt, "{name}, line {line}: {}", shown(&text, &spans));
            prompts += 1;
        }
    }
    assert!(masks >= 5 && prompts >= 60, "{masks} masks, {prompts} prompts");
}

fn turn(header: String, words: impl Into<String>, is_learned: bool) -> [Piece; 3] {
    [written(header), (format!("{}<|im_end|>", words.into()), is_learned), written("\n")]
}

fn chatml(says: &[Say]) -> Vec<Piece> {
    let pieces = |say: &Say| turn(format!("<|im_start|>{}\n", say.role), &say.content, say.role == "assistant");
    says.iter().flat_map(pieces).collect()
}

/// The calls of a message, each in a line of its own.
fn hermes_calls(say: &Say) -> String {
    let call = |(name, argument): &(String, String)| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {}}}\n</tool_call>", json_text(argument))
    };
    say.calls.iter().map(call).collect::<Vec<_>>().join("\n")
}

/// The results of tools as a turn of the user.
fn tool_result(says: &[Say], at: usize) -> Vec<Piece> {
    let is_tool = |at: usize| says.get(at).is_some_and(|say| say.role == "tool");
    let open = if at > 0 && is_tool(at - 1) { "" } else { "<|im_start|>user" };
    let close = if is_tool(at + 1) { "" } else { "<|im_end|>\n" };
    vec![written(format!("{open}\n<tool_response>\n{}\n</tool_response>{close}", says[at].content))]
}

fn qwen2_5(says: &[Say]) -> Vec<Piece> {
    let default = "You are Q, made by A. You are a helpful assistant.";
    let system = if says[0].role == "system" { says[0].content.as_str() } else { default };
    let mut pieces =
        vec![written(format!("<|im_start|>system\n{system}\n\n# Tools\n\n<tools>\n{TOOL}\n</tools><|im_end|>\n"))];
    for (at, say) in says.iter().enumerate() {
        match say.role {
            "system" => {}
            "tool" => pieces.extend(tool_result(says, at)),
            "assistant" if !say.calls.is_empty() => {
                pieces.extend(turn("<|im_start|>assistant\n".to_owned(), hermes_calls(say), true));
            }
            role => pieces.extend(turn(format!("<|im_start|>{role}\n"), &say.content, role == "assistant")),
        }
    }
    pieces
}

/// Content as thought and answer, where it has a thought.
fn parted(content: &str) -> (String, String) {
    let Some((thought, _)) = content.split_once("</think>") else { return (String::new(), content.to_owned()) };
    let answer = content.rsplit("</think>").next().unwrap().trim_start_matches('\n');
    let thought = thought.trim_end_matches('\n').rsplit("<think>").next().unwrap().trim_start_matches('\n');
    (thought.to_owned(), answer.to_owned())
}

fn qwen3(says: &[Say]) -> Vec<Piece> {
    let last_query = says.iter().rposition(|say| say.role == "user").unwrap_or(says.len() - 1);
    let mut pieces = Vec::new();
    for (at, say) in says.iter().enumerate() {
        let header = format!("<|im_start|>{}\n", say.role);
        if say.role == "tool" {
            pieces.extend(tool_result(says, at));
        } else if say.role == "assistant" {
            let (thought, answer) = parted(&say.content);
            let is_last = at == says.len() - 1;
            let said = match at > last_query && (is_last || !thought.is_empty()) {
                true => format!("<think>\n{}\n</think>\n\n{}", thought.trim_matches('\n'), answer.trim_start_matches('\n')),
                false => answer.clone(),
            };
            let line_end = if !answer.is_empty() && !say.calls.is_empty() { "\n" } else { "" };
            pieces.extend(turn(header, format!("{said}{line_end}{}", hermes_calls(say)), true));
        } else {
            pieces.extend(turn(header, &say.content, false));
        }
    }
    pieces
}

fn qwq(says: &[Say]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (at, say) in says.iter().enumerate() {
        let header = format!("<|im_start|>{}\n", say.role);
        let is_assistant = say.role == "assistant";
        let answer = say.content.rsplit("</think>").next().unwrap().trim_start_matches('\n');
        // The prompt has the first line of a thought.
        match (at == says.len() - 1, say.content.strip_prefix("<think>\n")) {
            (true, Some(rest)) if is_assistant => pieces.extend(turn(format!("{header}<think>\n"), rest, true)),
            (false, _) if is_assistant => pieces.extend(turn(header, answer, true)),
            _ => pieces.extend(turn(header, &say.content, is_assistant)),
        }
    }
    pieces
}

/// The system prompt, and the rest of a conversation.
fn system_first(says: &[Say]) -> (Option<&str>, &[Say]) {
    match says.split_first() {
        Some((first, rest)) if first.role == "system" => (Some(&first.content), rest),
        _ => (None, says),
    }
}

fn llama2(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let piece = |(at, say): (usize, &Say)| {
        let system = system.filter(|_| at == 0).map(|system| format!("<<SYS>>\n{system}\n<</SYS>>\n\n")).unwrap_or_default();
        match say.role {
            "user" => written(format!("<s>[INST] {} [/INST]", format!("{system}{}", say.content).trim())),
            _ => learned(format!(" {} </s>", say.content.trim())),
        }
    };
    says.iter().enumerate().map(piece).collect()
}

fn eot(say: &Say) -> [Piece; 2] {
    let header = format!("<|start_header_id|>{}<|end_header_id|>\n\n", say.role);
    [written(header), (format!("{}<|eot_id|>", say.content.trim()), say.role == "assistant")]
}

fn llama3(says: &[Say]) -> Vec<Piece> {
    let end = written("<|start_header_id|>assistant<|end_header_id|>\n\n");
    [written("<s>")].into_iter().chain(says.iter().flat_map(eot)).chain([end]).collect()
}

fn llama3_1(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let system = format!(
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>",
        system.unwrap_or_default().trim()
    );
    [written(system)].into_iter().chain(says.iter().flat_map(eot)).collect()
}

fn mistral_v1(says: &[Say]) -> Vec<Piece> {
    let piece = |say: &Say| match say.role {
        "user" => written(format!("[INST] {} [/INST]", say.content)),
        _ => learned(format!("{}</s>", say.content)),
    };
    [written("<s>")].into_iter().chain(says.iter().map(piece)).collect()
}

fn mistral_v3(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let last_user = says.iter().rfind(|say| say.role == "user");
    let call = |(name, argument): &(String, String)| {
        format!("{{\"name\": \"{name}\", \"arguments\": {}, \"id\": \"abcdefghi\"}}", json_text(argument))
    };
    let piece = |(at, say): (usize, &Say)| match say.role {
        "user" => {
            let tools =
                if Some(say) == last_user { format!("[AVAILABLE_TOOLS] [{TOOL}][/AVAILABLE_TOOLS]") } else { String::new() };
            let system = system.filter(|_| at == says.len() - 1).map(|system| format!("{system}\n\n")).unwrap_or_default();
            written(format!("{tools}[INST] {system}{}[/INST]", say.content))
        }
        "tool" => {
            written(format!("[TOOL_RESULTS] {{\"content\": {}, \"call_id\": \"abcdefghi\"}}[/TOOL_RESULTS]", say.content))
        }
        _ if say.calls.is_empty() => learned(format!(" {}</s>", say.content.trim())),
        _ => learned(format!("[TOOL_CALLS] [{}]</s>", say.calls.iter().map(call).collect::<Vec<_>>().join(", "))),
    };
    [written("<s>")].into_iter().chain(says.iter().enumerate().map(piece)).collect()
}

fn mistral_nemo(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let piece = |(at, say): (usize, &Say)| {
        let system = system.filter(|_| at == says.len() - 1).map(|system| format!("{system}\n\n")).unwrap_or_default();
        match say.role {
            "user" => written(format!("[INST]{system}{}[/INST]", say.content)),
            _ => learned(format!("{}</s>", say.content)),
        }
    };
    [written("<s>")].into_iter().chain(says.iter().enumerate().map(piece)).collect()
}

fn gemma(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let pieces = |(at, say): (usize, &Say)| {
        let system = system.filter(|_| at == 0).map(|system| format!("{system}\n\n")).unwrap_or_default();
        let role = if say.role == "assistant" { "model" } else { "user" };
        let words = (format!("{}<end_of_turn>", say.content.trim()), say.role == "assistant");
        [written(format!("<start_of_turn>{role}\n{system}")), words, written("\n")]
    };
    [written("<s>")].into_iter().chain(says.iter().enumerate().flat_map(pieces)).collect()
}

fn phi3(says: &[Say]) -> Vec<Piece> {
    let pieces = |say: &Say| {
        let words = (format!("{}<|end|>", say.content), say.role == "assistant");
        [written(format!("<|{}|>\n", say.role)), words, written("\n")]
    };
    let mut pieces: Vec<Piece> = says.iter().flat_map(pieces).collect();
    let answered = says.last().is_some_and(|say| say.role == "assistant");
    // The token that ends the text belongs to the last answer, and so does what stands before it.
    pieces.last_mut().unwrap().1 = answered;
    pieces.push(("<|endoftext|>".to_owned(), answered));
    pieces
}

fn deepseek_r1(says: &[Say]) -> Vec<Piece> {
    let end = "<｜end▁of▁sentence｜>";
    let call = |(name, argument): &(String, String)| {
        format!(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{}\n```<｜tool▁call▁end｜>",
            json_text(argument)
        )
    };
    let system: String = says.iter().filter(|say| say.role == "system").map(|say| say.content.clone()).collect();
    let mut pieces = vec![written(format!("<s>{system}"))];
    let mut in_tool = false;
    for say in says {
        match say.role {
            "user" => pieces.push(written(format!("<｜User｜>{}", say.content))),
            "assistant" if !say.calls.is_empty() => {
                let calls = say.calls.iter().map(call).collect::<Vec<_>>().join("\n");
                pieces.push(written("<｜Assistant｜>"));
                pieces.push(learned(format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>{end}")));
            }
            "assistant" => {
                let (header, words) = match in_tool {
                    true => ("<｜tool▁outputs▁end｜>", say.content.as_str()),
                    false => ("<｜Assistant｜>", say.content.rsplit("</think>").next().unwrap()),
                };
                pieces.extend([written(header), learned(format!("{words}{end}"))]);
            }
            "tool" => {
                let before = if in_tool { "\n" } else { "<｜tool▁outputs▁begin｜>" };
                pieces.push(written(format!("{before}<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>", say.content)));
            }
            _ => {}
        }
        in_tool = say.role == "tool" || (in_tool && say.role == "system");
    }
    pieces
}

fn hermes_tools(says: &[Say]) -> Vec<Piece> {
    let is_tool = |at: usize| says.get(at).is_some_and(|say| say.role == "tool");
    let system = format!("<s><|im_start|>system\nYou may call functions:<tools> {TOOL} </tools><|im_end|>\n");
    let mut pieces = vec![written(system)];
    for (at, say) in says.iter().enumerate() {
        match say.role {
            "tool" => {
                let open = if is_tool(at - 1) { "" } else { "<|im_start|>tool\n" };
                let line_end = if at == says.len() - 1 { "" } else { "\n" };
                let close = if is_tool(at + 1) { "" } else { "<|im_end|>" };
                let words = &say.content;
                pieces.push(written(format!("{open}<tool_response>\n{words}\n</tool_response>{line_end}{close}")));
            }
            _ if !say.calls.is_empty() => {
                pieces.extend(turn("<|im_start|>assistant\n".to_owned(), hermes_calls(say), true));
            }
            role => pieces.extend(turn(format!("<|im_start|>{role}\n"), &say.content, role == "assistant")),
        }
    }
    pieces
}

fn granite(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let default = "Knowledge Cutoff Date: April 2024.\nToday's Date: January 01, 1970.\nYou are G, an assistant.";
    let system = format!("<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n", system.unwrap_or(default));
    let pieces = |say: &Say| {
        let words = (format!("{}<|end_of_text|>", say.content), say.role == "assistant");
        [written(format!("<|start_of_role|>{}<|end_of_role|>", say.role)), words, written("\n")]
    };
    [written(system)].into_iter().chain(says.iter().flat_map(pieces)).collect()
}

fn zephyr(says: &[Say]) -> Vec<Piece> {
    let pieces = |say: &Say| {
        let words = (format!("{}</s>", say.content), say.role == "assistant");
        [written(format!("<|{}|>\n", say.role)), words, written("\n")]
    };
    says.iter().flat_map(pieces).collect()
}

fn vicuna(says: &[Say]) -> Vec<Piece> {
    let (system, says) = system_first(says);
    let mut pieces = vec![written(system.map(|system| format!("{system}\n\n")).unwrap_or_default())];
    for (at, say) in says.iter().enumerate() {
        match say.role {
            "user" => pieces.push(written(format!("USER: {}\n", say.content))),
            _ if at == says.len() - 1 => pieces.extend([written("ASSISTANT:"), learned(format!(" {}</s>", say.content))]),
            _ => pieces.extend([written("ASSISTANT:"), learned(format!(" {}", say.content)), written("\n")]),
        }
    }
    pieces
}

/// Rendering every prefix would take time that grows with the square of the turns.
#[test]
fn a_long_conversation_needs_few_renderings() {
    let shape = SHAPES.iter().find(|shape| shape.name == "qwen3").unwrap();
    let template = template(shape);
    let say = |role, content| Say { role, content, calls: Vec::new() };
    let answer = |i: usize| format!("Answer {i}:\n{} \"{}\"", "word ".repeat(i % 7), "é".repeat(i % 5));
    let turns = (0..300).flat_map(|i| [say("user", format!("Question {}?", i * i)), say("assistant", answer(i))]);
    let messages: Vec<Value> = turns.map(|say| say.value(false)).collect();
    let text = template.render(&messages, &Value::None, false).unwrap();
    let rendering =
        Rendering { template: &template, messages: &messages, tools: &Value::None, add_generation_prompt: false };
    let probed = Probed::new(rendering, &text).with_letters_added();
    let spans = probed.spans(&["<|im_end|>".to_owned()], &HashSet::new()).unwrap();
    let learned: Vec<&str> = spans.iter().map(|span| &text[span.clone()]).collect();
    let last = format!("<think>\n\n</think>\n\n{}<|im_end|>", answer(299));
    let expected: Vec<String> = (0..299).map(|i| format!("{}<|im_end|>", answer(i))).chain([last]).collect();
    assert_eq!(learned, expected);
    let renderings = probed.tails.borrow().len();
    assert!(renderings < 30, "{renderings}");
}

/// The learned texts of a conversation, in one budget of steps.
fn answers(template: &ChatTemplate, messages: &[Value], end: &str) -> Result<Vec<String>, (usize, SpanFlaw)> {
    let text = template.render(messages, &Value::None, false).unwrap();
    let rendering = Rendering { template, messages, tools: &Value::None, add_generation_prompt: false };
    // The renderings of one thread share a budget.
    with_stack(|| {
        let probed = Probed::new(rendering, &text).with_letters_added();
        let spans = probed.spans(&[end.to_owned()], &HashSet::new());
        check_steps().unwrap();
        spans.map(|spans| spans.into_iter().map(|span| text[span].to_owned()).collect())
    })
    .unwrap()
}

/// Each answer has each letter of its plane once: one has enough replacements of its own, and two
/// have not.
#[test]
fn the_letters_of_a_text_share_a_replacement_where_there_are_too_few() {
    let template = template(&SHAPES[0]);
    let plane = |first: u32| (first..first + 0xfffe).filter_map(char::from_u32).collect::<String>();
    let say = |role: &str, content: &str| Value::from_pairs([("role", role), ("content", content)]);
    let said = [plane(0xf_0000), plane(0x10_0000)];
    let messages = [say("user", "Hi"), say("assistant", &said[0]), say("assistant", &said[1])];
    let learned = said.map(|said| format!("{said}<|im_end|>"));
    assert_eq!(answers(&template, &messages[..2], "<|im_end|>").unwrap(), learned[..1]);
    assert_eq!(answers(&template, &messages, "<|im_end|>").unwrap(), learned);
}

/// A conversation that has all replacements itself.
#[test]
fn a_conversation_without_free_letters_is_an_error() {
    let all: String = crate::data::probe::ALPHABET.into_iter().flatten().collect();
    let say = |role: &str, content: &str| Value::from_pairs([("role", role), ("content", content)]);
    let messages = [say("user", &all), say("assistant", "Hi")];
    assert_eq!(answers(&template(&SHAPES[0]), &messages, "<|im_end|>"), Err((1, SpanFlaw::Letters)));
}

/// Many different messages: together they have more different letters than there are replacements.
#[test]
fn a_long_conversation_of_different_messages_has_all_its_answers() {
    for (name, end) in [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")] {
        let template = template(SHAPES.iter().find(|shape| shape.name == name).unwrap());
        // Letters that no message has twice, in another order in each message.
        let letters: Vec<char> = ('\u{100}'..'\u{180}').collect();
        let content = |i: usize| {
            let (end, start) = letters.split_at(i % letters.len());
            format!("{i} {}", [start, end].concat().into_iter().collect::<String>())
        };
        let turn = |i: usize| Value::from_pairs([("role", ["user", "assistant"][i % 2]), ("content", &content(i))]);
        let messages: Vec<Value> = (0..1_000).map(turn).collect();
        let expected: Vec<String> = (0..500).map(|i| content(2 * i + 1) + end).collect();
        assert_eq!(answers(&template, &messages, end).unwrap(), expected, "{name}");
    }
}

/// Messages that a template changes stay, wherever they are, and the others are replaced.
#[test]
fn only_messages_that_the_template_changes_stay() {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content | upper if m.content.startswith('LOUD') else m.content }};{% endfor %}";
    let template = ChatTemplate::new(source, [].into(), 0).unwrap();
    let content = |i: usize| if [3, 4, 11].contains(&i) { "LOUD: Hello" } else { "hello" };
    let turn = |i: usize| Value::from_pairs([("role", "assistant"), ("content", content(i))]);
    let messages: Vec<Value> = (0..13).map(turn).collect();
    let text = template.render(&messages, &Value::None, false).unwrap();
    let rendering =
        Rendering { template: &template, messages: &messages, tools: &Value::None, add_generation_prompt: false };
    let (_, plan) = one_by_one(rendering, &text, Letters::Distinct);
    let kept: Vec<usize> = (0..13).filter(|&at| plan.messages[at] == Words::Kept).collect();
    assert_eq!(kept, [3, 4, 11]);
}

/// A rendering for each message would take more steps than a conversation may.
#[test]
fn letters_are_added_to_all_messages_at_once() {
    // The template looks for the text of all messages, and writes it unchanged.
    let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if 'xy' in m.content else 'other' }};{% endfor %}";
    let template = ChatTemplate::new(source, [].into(), 0).unwrap();
    let turn = |i: usize| Value::from_pairs([("role", ["user", "assistant"][i % 2]), ("content", "xy")]);
    let messages: Vec<Value> = (0..2_000).map(turn).collect();
    let text = template.render(&messages, &Value::None, false).unwrap();
    let rendering =
        Rendering { template: &template, messages: &messages, tools: &Value::None, add_generation_prompt: false };
    with_stack(|| {
        let probed = Probed::new(rendering, &text);
        assert!((0..2_000).all(|at| probed.is_silent(at)));
        let probed = probed.with_letters_added();
        assert!((0..2_000).all(|at| !probed.is_silent(at) && probed.plan.messages[at] == Words::Extended));
        check_steps().unwrap();
    })
    .unwrap();
}
