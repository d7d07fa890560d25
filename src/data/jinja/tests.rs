//! Snippets of templates against what transformers makes of them.

use super::*;
use crate::data::error::DataError;

/// 2024-07-26 12:34:56 UTC, as `tests/interop/templates.py` has it.
const NOW: i64 = 1_721_997_296;

#[derive(serde::Deserialize)]
struct Fixture {
    messages: Value,
    tools: Value,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    template: String,
    text: Option<String>,
    error: Option<String>,
}

fn render(template: &str, messages: &Value, tools: &Value) -> Result<String, TemplateError> {
    let variables = [
        ("messages", messages.clone()),
        ("tools", tools.clone()),
        ("documents", Value::None),
        ("add_generation_prompt", true.into()),
        ("bos_token", "<s>".into()),
        ("eos_token", "</s>".into()),
    ];
    Ok(Template::new(template, NOW)?.render(variables)?.text)
}

/// What differs from Python's answer, if anything does. What prints an address has no answer: it is
/// to be refused.
fn difference(case: &Case, found: Result<String, TemplateError>) -> Option<String> {
    let expected = case.text.as_ref().filter(|text| !text.contains(" at 0x"));
    match (found, expected) {
        (Ok(found), Some(expected)) if found == *expected => None,
        (Err(_), None) => None,
        // What is not supported is said; it is never another text.
        (Err(TemplateError { kind: ErrorKind::Unsupported(_), .. }), Some(_)) => None,
        (found, _) => {
            let found = found.map_err(|error| error.to_string());
            Some(format!("{}\n  found    {found:?}\n  expected {:?}{:?}", case.template, case.text, case.error))
        }
    }
}

#[test]
fn snippets_are_rendered_as_by_transformers() {
    let fixture: Fixture = serde_json::from_slice(&std::fs::read("tests/fixtures/templates.json").unwrap()).unwrap();
    let differences: Vec<String> = fixture
        .cases
        .iter()
        .filter_map(|case| difference(case, render(&case.template, &fixture.messages, &fixture.tools)))
        .collect();
    assert!(differences.is_empty(), "{} of {}:\n{}", differences.len(), fixture.cases.len(), differences.join("\n"));
    let unsupported = fixture.cases.iter().filter(|case| {
        let found = render(&case.template, &fixture.messages, &fixture.tools);
        case.text.is_some() && matches!(found, Err(TemplateError { kind: ErrorKind::Unsupported(_), .. }))
    });
    assert!(unsupported.count() < 40, "most snippets are supported");
}

/// By hand: renderings of real templates that `tests/interop/templates.py --real` wrote, compared.
#[test]
#[ignore = "needs NF4PACK_TEMPLATES, a file of tests/interop/templates.py --real"]
fn real_templates_are_rendered_as_by_transformers() {
    #[derive(serde::Deserialize)]
    struct Rendering {
        name: String,
        template: String,
        messages: Value,
        tools: Value,
        generation_prompt: bool,
        tokens: Value,
        text: Option<String>,
        error: Option<String>,
    }
    let path = std::env::var("NF4PACK_TEMPLATES").unwrap();
    let renderings: Vec<Rendering> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut equal = std::collections::BTreeMap::<String, [u32; 2]>::new();
    for rendering in renderings {
        let tokens = rendering.tokens.as_dict().cloned().unwrap_or_default();
        let tokens = tokens.entries().iter().map(|(name, token)| (name.as_str().unwrap(), token.clone()));
        let variables = [
            ("messages", rendering.messages),
            ("tools", rendering.tools),
            ("documents", Value::None),
            ("add_generation_prompt", rendering.generation_prompt.into()),
        ];
        let found = Template::new(&rendering.template, NOW).and_then(|t| t.render(variables.into_iter().chain(tokens)));
        let same = match (&found, &rendering.text) {
            (Ok(found), Some(expected)) => found.text == *expected,
            (Err(_), None) => true,
            _ => false,
        };
        let count = equal.entry(rendering.name.clone()).or_default();
        count[usize::from(!same)] += 1;
        if !same {
            let found = found.map(|found| found.text).map_err(|error| error.to_string());
            println!("{}\n  found    {found:?}\n  expected {:?} {:?}", rendering.name, rendering.text, rendering.error);
        }
    }
    println!("{equal:?}");
    assert!(equal.values().all(|count| count[1] == 0), "{equal:?}");
}

#[test]
fn work_on_a_large_stack_stays_on_one_thread() {
    let id = || std::thread::current().id();
    let outer = id();
    let (first, second) = with_stack(|| (id(), with_stack(id).unwrap())).unwrap();
    assert!(first != outer && first == second);
    assert_ne!(with_stack(id).unwrap(), outer);
}

#[test]
#[cfg(target_os = "linux")]
fn a_thread_that_does_not_start_is_no_refusal_of_the_template() {
    let source = with_stack_of(1 << 50, || ()).unwrap_err();
    let reason = source.to_string();
    let error = DataError::of_template(no_thread(source), DataError::Chat);
    assert!(matches!(error, DataError::NoThread(_)), "{error}");
    assert!(!reason.is_empty() && error.to_string().contains(&reason), "{error}");
}
