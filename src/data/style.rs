//! How a chat template begins and ends the turns of an assistant, independent of their words.

use super::jinja::Value;
use super::seam::{common_prefix, common_suffix, first_mark};

/// How a template begins and ends the turns of an assistant.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Style {
    /// The text that a generation prompt adds.
    pub(super) prompt: String,
    /// The text before an answer, without a thought that the template begins.
    pub(super) header: String,
    /// The generation prompt at the end of every rendering, also without `add_generation_prompt`.
    pub(super) always: String,
}

impl Style {
    /// The style of a template, found by rendering a question and an answer. If the template
    /// refuses them, the style is empty. `render` gets messages, tools and `add_generation_prompt`.
    pub(super) fn new(render: impl Fn(&[Value], &Value, bool) -> Option<String>) -> Self {
        let function = Value::from_pairs([("name", "f"), ("description", "f")]);
        let tools = Value::from(vec![Value::from_pairs([("type", Value::from("function")), ("function", function)])]);
        let parts = |text: &str| Value::from(vec![Value::from_pairs([("type", "text"), ("text", text)])]);
        // Some templates need tools, and some read nothing but lists of parts.
        let text = |text: &str| Value::from(text);
        let none = Value::None;
        let with = |tools: &Value, content: &dyn Fn(&str) -> Value| {
            Self::of(|messages, prompt| render(messages, tools, prompt), content)
        };
        let found = with(&none, &text).or_else(|| with(&tools, &text));
        let found = found.or_else(|| with(&none, &parts)).or_else(|| with(&tools, &parts));
        found.unwrap_or_default()
    }

    /// The style for one form of content; `None` if the template does not write it.
    fn of(render: impl Fn(&[Value], bool) -> Option<String>, content: &dyn Fn(&str) -> Value) -> Option<Self> {
        let (question, answer) = ("\u{20000}", "\u{20001}");
        let message = |role: &str, text| Value::from_pairs([("role", Value::from(role)), ("content", content(text))]);
        let (user, assistant) = (message("user", question), message("assistant", answer));
        let after = |text: &str, words: &str| text.rsplit_once(words).map(|(_, tail)| tail.to_owned());
        let tail = |prompt| after(&render(std::slice::from_ref(&user), prompt)?, question);
        let (prompted, silent) = (tail(true)?, tail(false)?);
        let prompt = prompted.get(common_prefix(&prompted, &silent)..).unwrap_or_default();
        let answered = render(&[user.clone(), assistant], false)?;
        let (before, closing) = answered.split_once(answer)?;
        let before = after(before, question)?;
        let written = before.get(common_prefix(&before, &silent)..).unwrap_or_default();
        // An answer may begin with more than the prompt.
        let is_always = prompted == silent && before.starts_with(&silent);
        let always = if is_always { always(&silent, closing, &render(&[], true).unwrap_or_default()) } else { "" };
        let header = match (prompt, always) {
            ("", "") => written,
            ("", _) => always,
            _ => written.get(..common_prefix(written, prompt)).unwrap_or_default(),
        };
        Some(Self { prompt: prompt.to_owned(), header: header.to_owned(), always: always.to_owned() })
    }
}

/// The generation prompt that is at the end of the text `before` an answer and at the end of the
/// text `closing` after it. The rendering of an `empty` conversation may be this prompt alone.
fn always<'a>(before: &str, closing: &'a str, empty: &str) -> &'a str {
    let common = common_suffix(before, closing);
    let alone = Some(common_suffix(empty, closing)).filter(|&alone| alone > 0).map_or(common, |alone| alone.min(common));
    let always = closing.get(closing.len() - alone..).unwrap_or_default();
    // The first mark after an answer is what ends it.
    let always = if alone == closing.len() { always.get(first_mark(always)..).unwrap_or_default() } else { always };
    if always.trim().is_empty() { "" } else { always }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::template::ChatTemplate;

    fn style(source: &str) -> [String; 3] {
        let Style { prompt, header, always } = {
            let template = ChatTemplate::new(source, [("eos_token".to_owned(), "</s>".into())].into(), 0).unwrap();
            Style::new(|messages, tools, prompt| template.render(messages, tools, prompt).ok())
        };
        [prompt, header, always]
    }

    const TURNS: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}";

    #[test]
    fn prompts_and_headers_are_known() {
        let prompted = |prompt: &str| format!("{TURNS}{{% if add_generation_prompt %}}{prompt}{{% endif %}}");
        assert_eq!(style(&prompted("<|assistant|>")), ["<|assistant|>", "<|assistant|>", ""]);
        assert_eq!(style(&prompted("<|assistant|><think>")), ["<|assistant|><think>", "<|assistant|>", ""]);
        let ended =
            format!("{TURNS}{{% if add_generation_prompt %}}<|assistant|>{{% else %}}{{{{ eos_token }}}}{{% endif %}}");
        assert_eq!(style(&ended), ["<|assistant|>", "<|assistant|>", ""]);
        assert_eq!(style(TURNS), ["", "<|assistant|>", ""]);
        assert_eq!(style("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"), ["", "", ""]);
        assert_eq!(style("{{ raise_exception('no') }}"), ["", "", ""]);
        let picky = "{% if tools is none %}{{ raise_exception('no tools') }}{% endif %}";
        assert_eq!(style(&format!("{picky}{TURNS}")), ["", "<|assistant|>", ""]);
        let parts = TURNS.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}");
        assert_eq!(style(&format!("{picky}{parts}")), ["", "<|assistant|>", ""]);
    }

    #[test]
    fn a_prompt_that_is_always_there_is_known() {
        let always = format!("{TURNS}<|assistant|>");
        assert_eq!(style(&always), ["", "<|assistant|>", "<|assistant|>"]);
        // An empty conversation has more than the prompt, or is refused.
        for first in ["<|system|>Be kind.<|end|>", "{% if not messages %}{{ raise_exception('empty') }}{% endif %}"] {
            assert_eq!(style(&format!("{first}{always}")), ["", "<|assistant|>", "<|assistant|>"], "{first}");
        }
    }
}
