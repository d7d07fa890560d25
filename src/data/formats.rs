//! JSON Lines: what a line says, in one of the forms that people have.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::DataError;

/// What a record of a file says.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Plain text, all of it to be learned.
    Text(String),
    /// What follows a prompt is to be learned.
    Completion { prompt: String, completion: String },
    /// The answer to an instruction is to be learned.
    Instruction { system: Option<String>, instruction: String, output: String },
    /// What the assistant says is to be learned. Messages are maps with `role` and `content`, and what else a template may
    /// read.
    Chat { messages: Vec<Value>, tools: Value },
}

/// The forms, by the keys that they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `text`.
    Text,
    /// `prompt`, `completion`.
    Completion,
    /// `messages`, each with `role` and `content`, and perhaps `system`, `tools`.
    Messages,
    /// `instruction`, `output`, and perhaps `input`, `system`.
    Instruction,
    /// `conversations`, each with `from` and `value`, and perhaps `system`, `tools`.
    ShareGpt,
}

impl Form {
    const ALL: [Self; 5] = [Self::Messages, Self::ShareGpt, Self::Completion, Self::Instruction, Self::Text];

    /// The keys that a record of this form has at least.
    pub fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text"],
            Self::Completion => &["prompt", "completion"],
            Self::Messages => &["messages"],
            Self::Instruction => &["instruction", "output"],
            Self::ShareGpt => &["conversations"],
        }
    }
}

/// The bytes without the mark of UTF-8 that some programs of Windows put before a text.
pub(super) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// The records of a file with their line numbers, from 1. The first record tells the form of all.
pub(super) fn parse(bytes: &[u8]) -> Result<(Form, Vec<(u64, Content)>), DataError> {
    let bytes = without_mark(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(DataError::Array);
    }
    let mut form = None;
    let mut records = Vec::new();
    for (line, text) in (1..).zip(bytes.split(|&b| b == b'\n')) {
        if text.trim_ascii().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_slice(text).map_err(|source| DataError::Json { line, source })?;
        if value.kind() != ValueKind::Map {
            return Err(DataError::NotAnObject { line });
        }
        let record = Record { line, value: &value };
        let form = match form {
            Some(form) if record.has(form) => form,
            Some(form) => return Err(DataError::OtherForm { line, form }),
            None => *form.insert(record.form()?),
        };
        records.push((line, record.content(form)?));
    }
    form.map(|form| (form, records)).ok_or(DataError::Empty)
}

/// Roles of the chat templates of supported models.
const ROLES: [&str; 8] = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"];
const ROLES_EXPECTED: &str = "one of system, developer, user, assistant, tool, function, ipython, observation";

struct Record<'a> {
    line: u64,
    value: &'a Value,
}

impl Record<'_> {
    fn form(&self) -> Result<Form, DataError> {
        let keys = || self.value.try_iter().into_iter().flatten().map(|key| key.to_string()).collect();
        let form = Form::ALL.into_iter().find(|&form| self.has(form));
        form.ok_or_else(|| DataError::UnknownForm { line: self.line, found: keys() })
    }

    fn has(&self, form: Form) -> bool {
        form.keys().iter().all(|key| given(self.value, key).is_some())
    }

    fn content(&self, form: Form) -> Result<Content, DataError> {
        Ok(match form {
            Form::Text => Content::Text(self.string(self.value, "text")?),
            Form::Completion => Content::Completion {
                prompt: self.string(self.value, "prompt")?,
                completion: self.string(self.value, "completion")?,
            },
            Form::Instruction => {
                let mut instruction = self.string(self.value, "instruction")?;
                let input = self.optional_string("input")?;
                if let Some(input) = input.filter(|input| !input.is_empty()) {
                    instruction = format!("{instruction}\n\n{input}");
                }
                Content::Instruction { system: self.system()?, instruction, output: self.string(self.value, "output")? }
            }
            Form::Messages => self.chat("messages", |message| self.message(message))?,
            Form::ShareGpt => self.chat("conversations", |turn| self.turn(turn))?,
        })
    }

    fn bad(&self, key: &str, expected: &'static str) -> DataError {
        DataError::Value { line: self.line, key: key.to_owned(), expected }
    }

    fn string(&self, of: &Value, key: &str) -> Result<String, DataError> {
        get(of, key).as_str().map(str::to_owned).ok_or_else(|| self.bad(key, "a string"))
    }

    fn optional_string(&self, key: &str) -> Result<Option<String>, DataError> {
        given(self.value, key).map(|_| self.string(self.value, key)).transpose()
    }

    fn chat(&self, key: &'static str, message: impl Fn(Value) -> Result<Value, DataError>) -> Result<Content, DataError> {
        let list = get(self.value, key);
        let bad = || self.bad(key, "a list of messages");
        if list.kind() != ValueKind::Seq {
            return Err(bad());
        }
        let mut messages: Vec<Value> = list.try_iter().map_err(|_| bad())?.map(message).collect::<Result<_, _>>()?;
        let Some(first) = messages.first() else { return Err(bad()) };
        let has_system = get(first, "role").as_str() == Some("system");
        if let Some(system) = self.system()?.filter(|_| !has_system) {
            messages.insert(0, Value::from_pairs([("role", "system"), ("content", &system)]));
        }
        Ok(Content::Chat { messages, tools: self.tools()? })
    }

    /// What stands beside a conversation or an instruction, to be said before it.
    fn system(&self) -> Result<Option<String>, DataError> {
        Ok(self.optional_string("system")?.filter(|system| !system.is_empty()))
    }

    /// The tools that a conversation may call: a list or, where a table has no room for one, its JSON; null where there are none.
    fn tools(&self) -> Result<Value, DataError> {
        let bad = || self.bad("tools", "a list of tools, or its JSON as a string");
        let given = get(self.value, "tools");
        let tools = match given.as_str().map(str::trim) {
            Some("") => Value::from(()),
            Some(json) => serde_json::from_str(json).map_err(|_| bad())?,
            None => given,
        };
        match tools.kind() {
            ValueKind::Seq => Ok(tools),
            ValueKind::None | ValueKind::Undefined => Ok(Value::from(())),
            _ => Err(bad()),
        }
    }

    /// A message as templates read it: all that it has.
    fn message(&self, message: Value) -> Result<Value, DataError> {
        let role = self.string(&message, "role")?;
        // Templates render any role, and what a misspelt one says would be learned by nobody.
        if !ROLES.contains(&role.as_str()) {
            return Err(self.bad("role", ROLES_EXPECTED));
        }
        if given(&message, "content").is_none() && given(&message, "tool_calls").is_none() {
            return Err(self.bad("content", "what the message says"));
        }
        Ok(message)
    }

    /// A message of ShareGPT's form.
    fn turn(&self, turn: Value) -> Result<Value, DataError> {
        if given(&turn, "from").is_none() {
            return self.message(turn);
        }
        let from = self.string(&turn, "from")?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            _ => return Err(self.bad("from", "one of human, user, gpt, assistant, system, tool, observation")),
        };
        Ok(Value::from_pairs([("role", Value::from(role)), ("content", self.string(&turn, "value")?.into())]))
    }
}

/// A key of a map; undefined where there is none.
pub(super) fn get(map: &Value, key: &str) -> Value {
    map.get_attr(key).unwrap_or_default()
}

/// A key of a map that is there and not null: what writes tables as JSON has every column in every line.
fn given(map: &Value, key: &str) -> Option<Value> {
    Some(get(map, key)).filter(|value| !value.is_undefined() && !value.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(text: &str) -> (Form, Vec<(u64, Content)>) {
        parse(text.as_bytes()).unwrap()
    }

    fn roles_and_contents(content: &Content) -> Vec<(String, String)> {
        let Content::Chat { messages, .. } = content else { panic!("{content:?}") };
        messages.iter().map(|m| (get(m, "role").to_string(), get(m, "content").to_string())).collect()
    }

    #[test]
    fn every_form_is_detected() {
        let (form, records) = contents(r#"{"text": "a", "id": 3}"#);
        assert_eq!(form, Form::Text);
        assert!(matches!(&records[..], [(1, Content::Text(t))] if t == "a"));
        let (form, records) = contents(r#"{"prompt": "a", "completion": "b"}"#);
        assert_eq!(form, Form::Completion);
        assert!(matches!(&records[0].1, Content::Completion { prompt, completion } if prompt == "a" && completion == "b"));
        let (form, records) = contents(r#"{"instruction": "a", "input": "b", "output": "c", "text": "all of it"}"#);
        assert_eq!(form, Form::Instruction);
        assert!(
            matches!(&records[0].1, Content::Instruction { system: None, instruction, output } if instruction == "a\n\nb" && output == "c")
        );
        let (form, records) = contents(r#"{"messages": [{"role": "user", "content": "a"}]}"#);
        assert_eq!(form, Form::Messages);
        assert_eq!(roles_and_contents(&records[0].1), [("user".to_owned(), "a".to_owned())]);
        let (form, records) =
            contents(r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#);
        assert_eq!(form, Form::ShareGpt);
        let expected = [("user", "a"), ("assistant", "b")].map(|(r, c)| (r.to_owned(), c.to_owned()));
        assert_eq!(roles_and_contents(&records[0].1), expected);
    }

    #[test]
    fn a_null_is_as_good_as_no_key() {
        let (form, records) = contents(
            "{\"messages\": null, \"conversations\": null, \"text\": \"a\", \"prompt\": null, \"completion\": \"b\"}",
        );
        assert!(matches!((form, &records[0].1), (Form::Text, Content::Text(text)) if text == "a"));
        let turn = r#"{"from": null, "value": null, "role": "user", "content": "a"}"#;
        let (form, records) = contents(&format!(r#"{{"messages": null, "conversations": [{turn}]}}"#));
        assert_eq!(form, Form::ShareGpt);
        assert_eq!(roles_and_contents(&records[0].1), [("user".to_owned(), "a".to_owned())]);
        assert!(matches!(parse(br#"{"text": null}"#), Err(DataError::UnknownForm { line: 1, .. })));
        let later = parse(b"{\"text\": \"a\"}\n{\"text\": null, \"messages\": []}").unwrap_err();
        assert_eq!(later.to_string(), "line 2 has no text: every line has the form of the first one");
    }

    #[test]
    fn what_is_misspelt_is_named() {
        let error = |text: &str| parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error(r#"{"Text": "a", "id": 1}"#).ends_with("; it has Text, id"));
        let messages = |message: &str| error(&format!("{{\"messages\": [{message}]}}"));
        assert!(
            messages(r#"{"role": "asistant", "content": "a"}"#).starts_with("line 1: \"role\" should be one of system, ")
        );
        assert_eq!(messages(r#"{"role": "user", "text": "a"}"#), "line 1: \"content\" should be what the message says");
        assert!(parse(br#"{"messages": [{"role": "assistant", "tool_calls": [], "content": null}]}"#).is_ok());
    }

    #[test]
    fn a_system_prompt_may_stand_beside_a_conversation() {
        let of = |line: &str| roles_and_contents(&contents(line).1[0].1);
        let says =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(r, c)| ((*r).to_owned(), (*c).to_owned())).collect::<Vec<_>>();
        let turns = r#""conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]"#;
        let with = |system: &str| of(&format!(r#"{{{turns}, "system": {system}}}"#));
        assert_eq!(with(r#""Be kind.""#), says(&[("system", "Be kind."), ("user", "a"), ("assistant", "b")]));
        for none in ["null", r#""""#] {
            assert_eq!(with(none), says(&[("user", "a"), ("assistant", "b")]), "{none}");
        }
        let own =
            of(r#"{"conversations": [{"from": "system", "value": "own"}, {"from": "gpt", "value": "b"}], "system": "S"}"#);
        assert_eq!(own, says(&[("system", "own"), ("assistant", "b")]));
        let messages = of(r#"{"system": "S", "messages": [{"role": "user", "content": "a"}]}"#);
        assert_eq!(messages, says(&[("system", "S"), ("user", "a")]));
        let error = parse(format!(r#"{{{turns}, "system": ["S"]}}"#).as_bytes()).unwrap_err();
        assert!(matches!(&error, DataError::Value { line: 1, key, .. } if key == "system"), "{error}");
    }

    #[test]
    fn tools_may_be_json_in_a_string() {
        let line = |tools: &str| format!(r#"{{"conversations": [{{"from": "gpt", "value": "b"}}], "tools": {tools}}}"#);
        let tools = |json: &str| match &contents(&line(json)).1[0].1 {
            Content::Chat { tools, .. } => tools.clone(),
            other => panic!("{other:?}"),
        };
        let list = r#"[{"name": "look", "at": "sky"}]"#;
        assert_eq!(tools(&format!("{list:?}")), tools(list));
        let in_order = "[{'name': 'look', 'at': 'sky'}]";
        assert_eq!(tools(&format!("{list:?}")).to_string(), in_order);
        for none in ["null", r#""""#, r#"" ""#, r#""null""#] {
            assert!(tools(none).is_none(), "{none}");
        }
        for bad in ["3", "{}", r#""look""#, r#""{}""#] {
            let error = parse(line(bad).as_bytes()).unwrap_err();
            assert!(matches!(&error, DataError::Value { line: 1, key, .. } if key == "tools"), "{bad}: {error}");
        }
    }

    #[test]
    fn windows_line_ends_marks_blank_lines_and_unicode() {
        let (_, records) = contents("\u{feff}{\"text\": \"é\u{2028}漢\"}\r\n\r\n  \r\n{\"text\": \"\\ud83e\\udd80\"}");
        let texts: Vec<_> = records.iter().map(|(line, c)| (*line, format!("{c:?}"))).collect();
        assert_eq!(texts, [(1, "Text(\"é\\u{2028}漢\")".to_owned()), (4, "Text(\"🦀\")".to_owned())]);
    }

    #[test]
    fn broken_lines_are_named() {
        let error = |text: &[u8]| parse(text).unwrap_err();
        let good = r#"{"text": "a"}"#;
        let after = |line: &str| error(format!("{good}\n\n{line}\n{good}").as_bytes());
        assert!(matches!(after("{\"text\": \"a\""), DataError::Json { line: 3, .. }));
        assert!(matches!(after("3"), DataError::NotAnObject { line: 3 }));
        assert!(matches!(after("{\"texts\": \"a\"}"), DataError::OtherForm { line: 3, form: Form::Text }));
        assert!(matches!(after("{\"text\": 1}"), DataError::Value { line: 3, .. }));
        assert!(matches!(error(b"{\"text\": \"\xff\"}"), DataError::Json { line: 1, .. }));
        assert!(matches!(error(b"{\"a\": 1}"), DataError::UnknownForm { line: 1, .. }));
        assert!(matches!(error(b""), DataError::Empty));
        assert!(matches!(error(b"\r\n \n"), DataError::Empty));
        assert!(matches!(error(b" [{\"text\": \"a\"}]"), DataError::Array));
        for bad in ["[]", "3", "[{\"content\": \"a\"}]", "[3]"] {
            assert!(
                matches!(error(format!("{{\"messages\": {bad}}}").as_bytes()), DataError::Value { line: 1, .. }),
                "{bad}"
            );
        }
        let turn = br#"{"conversations": [{"from": "alien", "value": "a"}]}"#;
        assert!(matches!(error(turn), DataError::Value { key, .. } if key == "from"));
    }
}
