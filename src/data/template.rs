//! Chat templates: Jinja, rendered as transformers does.

use std::sync::{Arc, OnceLock};

use super::jinja::{Dict, ErrorKind, Rendered, Template, TemplateError, Value};
use super::literals::Literals;
use super::style::Style;

/// Strings of a template: a probe looks for each in each message.
const MAX_STRINGS: usize = 4000;

/// A compiled chat template with the special tokens that it may name.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    template: Arc<Template>,
    /// Special tokens by their names, and further variables of a conversation.
    variables: Arc<[(String, Value)]>,
    literals: Arc<Literals>,
    /// Found at the first conversation.
    style: OnceLock<Style>,
    /// Whether it has `{% generation %}`.
    marks_generation: bool,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are its variables `bos_token`, `eos_token` and so on;
    /// `now`, in seconds since the Unix epoch, is what `strftime_now` says (in UTC).
    ///
    /// # Errors
    /// Where the template is broken.
    pub(super) fn new(source: &str, special_tokens: Arc<[(String, Value)]>, now: i64) -> Result<Self, TemplateError> {
        let (template, literals) = (Template::new(source, now)?.into(), Arc::new(Literals::new(source)));
        if literals.count() > MAX_STRINGS {
            return Err(TemplateError { kind: ErrorKind::Limit("has more than 4000 strings"), line: 1 });
        }
        let marks_generation = literals.names_tag("generation");
        Ok(Self { template, variables: special_tokens, literals, style: OnceLock::new(), marks_generation })
    }

    /// The same template with further variables.
    pub(super) fn with(&self, variables: &Dict) -> Self {
        let own = variables.entries().iter().map(|(name, value)| (name.to_string(), value.clone()));
        Self {
            template: self.template.clone(),
            variables: self.variables.iter().cloned().chain(own).collect(),
            literals: self.literals.clone(),
            style: OnceLock::new(),
            marks_generation: self.marks_generation,
        }
    }

    /// Whether its source has a word.
    pub(super) fn mentions(&self, word: &str) -> bool {
        self.literals.mentions(word)
    }

    /// The strings that it may look for.
    pub(super) fn literals(&self) -> &Literals {
        &self.literals
    }

    /// How it begins and ends the turns of an assistant.
    pub(super) fn style(&self) -> &Style {
        self.style.get_or_init(|| Style::new(|messages, tools, prompt| self.render(messages, tools, prompt).ok()))
    }

    /// Whether it says itself what is the assistant's.
    pub(super) fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// What the template says: many refuse orders of roles.
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.rendered(messages, tools, add_generation_prompt).map(|rendered| rendered.text)
    }

    /// The text of a conversation, and what `{% generation %}` marks of it.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub(super) fn rendered(
        &self,
        messages: &[Value],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<Rendered, TemplateError> {
        let variables = [
            ("messages", Value::from(messages.to_vec())),
            ("tools", tools.clone()),
            ("documents", Value::None),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let further = self.variables.iter().map(|(name, value)| (name.as_str(), value.clone()));
        self.template.render(variables.into_iter().chain(further))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-07-26 12:34:56 UTC.
    const NOW: i64 = 1_721_997_296;

    fn render(template: &str, messages: &str) -> Result<String, TemplateError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.into()));
        let messages: Vec<Value> = serde_json::from_str(messages).unwrap();
        ChatTemplate::new(template, tokens.into(), NOW)?.render(&messages, &Value::None, true)
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
            ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
            ("{%- generation -%} x {%- endgeneration -%}", "x"),
            ("{% generation %}\nx{% endgeneration %}\n", "x"),
        ];
        for (template, expected) in cases {
            assert_eq!(render(template, ONE).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn strings_may_continue_in_the_next_line() {
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
        let error = render("\n{{ raise_exception('roles must alternate') }}", ONE).unwrap_err();
        assert_eq!(error.to_string(), "roles must alternate (line 2 of the template)");
        render("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", ONE).unwrap_err();
        render("{{ 'x' * 1000000000 }}", ONE).unwrap_err();
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ONE).unwrap_err();
        for broken in ["{% if %}", "{% include 'file' %}", "{{ 1 | nothing }}", "{{"] {
            render(broken, ONE).unwrap_err();
        }
        let nested =
            "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
        render(nested, ONE).unwrap_err();
        render(&nested.replace("[ns.x]", "[ns.x, ns.x]"), ONE).unwrap_err();
        render(&nested.replace("[ns.x] %}{% endfor", "ns.x + ns.x + [1] %}{% endfor"), ONE).unwrap_err();
        render("{{ 10 ** 38 | round(-38) }}{{ -(2 ** 126) * 2 | abs }}{{ range(10 ** 38, -(10 ** 38), -1) }}", ONE)
            .unwrap_err();
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
        render(&deep, ONE).unwrap_err();
        render(&format!("{{{{ 1{} }}}}", " + 1".repeat(100_000)), ONE).unwrap_err();
        render(&format!("{{{{ x{} }}}}", ".a".repeat(100_000)), ONE).unwrap_err();
    }

    #[test]
    fn what_generation_marks_is_known() {
        let source = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}";
        let template = ChatTemplate::new(source, Arc::default(), NOW).unwrap();
        let messages: Vec<Value> = serde_json::from_str(r#"[{"content": "é"}, {"content": ""}, {"content": "b"}]"#).unwrap();
        let Rendered { text, generations } = template.rendered(&messages, &Value::None, false).unwrap();
        assert_eq!((text.as_str(), generations), ("[é][][b]", vec![1..3, 5..5, 7..8]));
    }
}
