//! Chat templates: Jinja, rendered as transformers does.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use regex::Regex;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// The name of the one template; no file is ever read.
const NAME: &str = "chat_template";

/// Steps that a rendering may take: a template of unknown origin shall not run forever.
const FUEL: u64 = 5_000_000;

/// A compiled chat template with the special tokens that it may name.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are its variables `bos_token`, `eos_token` and so on; `now`, in seconds since
    /// the Unix epoch, is what `strftime_now` tells (in UTC).
    ///
    /// # Errors
    /// Where the template is broken.
    pub(super) fn new(source: &str, special_tokens: Vec<(String, String)>, now: i64) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| strftime(now, format));
        environment.add_template_owned(NAME, without_generation_tags(&joined_lines(source)))?;
        Ok(Self { environment, special_tokens })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// What the template says: many refuse orders of roles.
    pub(super) fn render(&self, messages: &[Value], tools: &Value, add_generation_prompt: bool) -> Result<String, Error> {
        let variables = [
            ("messages", Value::from(messages.to_vec())),
            ("tools", tools.clone()),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let tokens = self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        self.environment.get_template(NAME)?.render(Value::from_pairs(variables.into_iter().chain(tokens)))
    }
}

/// The tags that mark the assistant's words for transformers print nothing themselves: they become blocks that are always
/// taken.
fn without_generation_tags(source: &str) -> String {
    let tag = |source: &str, name: &str, instead: &str| match Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}")) {
        Ok(tag) => tag.replace_all(source, format!("{{%$1 {instead} $2%}}")).into_owned(),
        Err(_) => source.to_owned(),
    };
    tag(&tag(source, "generation", "if true"), "endgeneration", "endif")
}

/// Python leaves out a backslash and a line end in the middle of a string; minijinja keeps both.
fn joined_lines(source: &str) -> String {
    enum Inside {
        Text,
        Comment,
        Tag,
        String(char),
    }
    let mut joined = String::with_capacity(source.len());
    let mut inside = Inside::Text;
    let mut chars = source.chars().peekable();
    while let Some(c) = chars.next() {
        let mut pair = true;
        match (&inside, c, chars.peek()) {
            (Inside::Text, '{', Some('{' | '%')) => inside = Inside::Tag,
            (Inside::Text, '{', Some('#')) => inside = Inside::Comment,
            (Inside::Comment, '#', Some('}')) | (Inside::Tag, '}' | '%', Some('}')) => inside = Inside::Text,
            (Inside::String(_), '\\', Some('\n')) => {
                chars.next();
                continue;
            }
            (Inside::String(_), '\\', Some(_)) => {}
            (Inside::Tag, '"' | '\'', _) => (inside, pair) = (Inside::String(c), false),
            (Inside::String(quote), _, _) if *quote == c => (inside, pair) = (Inside::Tag, false),
            _ => pair = false,
        }
        joined.push(c);
        joined.extend(chars.next_if(|_| pair));
    }
    joined
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The time in UTC by a format of C's `strftime`.
fn strftime(now: i64, format: &str) -> Result<String, Error> {
    let error = |e: jiff::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let time = jiff::Timestamp::from_second(now).map_err(error)?;
    jiff::fmt::strtime::format(format, time).map_err(error)
}

/// JSON as Python writes it: no characters escaped for HTML, a space after commas and colons.
fn to_json(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    // The default of transformers' filter, and the only one that templates ask for.
    let _: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
    };
    let text = written.map(|()| String::from_utf8_lossy(&bytes).into_owned());
    text.map(Value::from).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// `[1, 2]`, `{"a": 1, "b": 2}`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-07-26 12:34:56 UTC.
    const NOW: i64 = 1_721_997_296;

    fn render(template: &str, messages: &str) -> Result<String, Error> {
        let tokens = vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
        let messages: Vec<Value> = serde_json::from_str(messages).unwrap();
        ChatTemplate::new(template, tokens, NOW)?.render(&messages, &Value::from(()), true)
    }

    const ONE: &str = r#"[{"role": "user", "content": "  hé <b> "}]"#;

    #[test]
    fn blocks_are_trimmed_and_special_tokens_are_known() {
        let template = "{{ bos_token }}\n  {% for m in messages %}\n{{ m['role'] }}: {{ m.content.strip() }}{{ eos_token }}\n  {% endfor %}\n{% if add_generation_prompt %}\nassistant:{% endif %}\n";
        assert_eq!(render(template, ONE).unwrap(), "<s>\nuser: hé <b></s>\nassistant:");
    }

    #[test]
    fn what_templates_use_of_python() {
        let cases = [
            ("{{ messages[0]['content'].strip().split(' ')[1].startswith('<') }}", "True"),
            ("{{ messages[::-1][0].get('name', 'nobody') }}", "nobody"),
            ("{{ 'a' if tools is none else 'b' }}{{ unknown_variable }}", "a"),
            (
                "{% set ns = namespace(n=0) %}{% for x in [1, 2, 3] %}{% if x == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}",
                "3",
            ),
            ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
            ("{%- generation -%} x {%- endgeneration -%}", "x"),
            ("{% generation %}\nx{% endgeneration %}\n", "x"),
        ];
        for (template, expected) in cases {
            assert_eq!(render(template, ONE).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn strings_may_go_on_in_the_next_line() {
        let template = "a\\\n{# don't #}{{ 'b\\\nc\\n\\\'' + \"\\\n\" }}\\\nd{% if '%}\\\n' %}e{% endif %}";
        assert_eq!(render(template, ONE).unwrap(), "a\\\nbc\n'\\\nde");
    }

    #[test]
    fn json_is_that_of_python() {
        let messages = r#"[{"z": [1, 2.5, null, true], "a": "<é> '", "e": {}}]"#;
        assert_eq!(
            render("{{ messages[0] | tojson }}", messages).unwrap(),
            r#"{"z": [1, 2.5, null, true], "a": "<é> '", "e": {}}"#
        );
        assert_eq!(
            render("{{ messages[0].z | tojson(indent=2) }}", messages).unwrap(),
            "[\n  1,\n  2.5,\n  null,\n  true\n]"
        );
    }

    #[test]
    fn templates_may_refuse_and_must_end() {
        let error = render("{{ raise_exception('roles must alternate') }}", ONE).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
        render("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", ONE).unwrap_err();
        render("{% if %}", ONE).unwrap_err();
        render("{% include 'file' %}", ONE).unwrap_err();
    }
}
