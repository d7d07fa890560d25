//! Hostile templates: each ends soon, in an error that names its limit, or as Python would.

use super::*;
use crate::random::{Generator, Stream};

const NOW: i64 = 1_721_997_296;

fn render(source: &str) -> Result<String, TemplateError> {
    let message = Value::from_pairs([("role", "user"), ("content", "hello")]);
    let variables = [("messages", Value::from(vec![message])), ("tools", Value::None), ("eos_token", "</s>".into())];
    Ok(Template::new(source, NOW)?.render(variables)?.text)
}

/// Renders with fewer steps.
fn render_within(limit: u64, source: &str) -> Result<String, TemplateError> {
    let work = || {
        steps::leave(limit);
        render(source)
    };
    with_stack(work).unwrap()
}

/// A statement within a loop of 100,000 rounds.
fn often(body: &str) -> String {
    format!("{{% for i in range(100000) %}}{body}{{% endfor %}}")
}

/// A text of 8 MiB, a list of 10,000 items and a namespace, then a body.
fn large(body: &str) -> String {
    format!("{{% set big = 'x' * (8 * 1024 * 1024) %}}{{% set list = [1] * 10000 %}}{{% set ns = namespace(a=0) %}}{body}")
}

#[test]
fn templates_of_the_first_examination_end_in_errors() {
    let cases = [
        // [deep], [cyclic], [indent], [format] and [lists].
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(30000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "too large",
        ),
        ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", "the text of a object"),
        ("{{ messages | tojson(indent=1000000000000) }}", "more than 1000 characters"),
        ("{{ '{:1000000000000}'.format(1) }}", "the width of a format is too large"),
        (
            "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | list | length }}",
            "too l",
        ),
    ];
    for (source, expected) in cases {
        let error = render(source).unwrap_err().to_string();
        assert!(error.contains(expected), "{source}: {error}");
    }
    // [minus]
    let minus = render(&format!("{{{{ {}1 }}}}", "-".repeat(40_000))).unwrap_err().to_string();
    assert!(minus.contains("nested too deep"), "{minus}");
}

#[test]
fn templates_that_grow_or_run_end_in_errors() {
    let steps = "more than 5,000,000 steps";
    let long = "a text that is too long";
    let nested = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(30_000), close.repeat(30_000));
    let cases = [
        // Nesting.
        (nested("[", "]"), "too deep"),
        (nested("{1:", "}"), "too deep"),
        (nested("not ", ""), "too deep"),
        (nested("+", ""), "too deep"),
        (format!("{}x{}", "{% if 1 %}".repeat(5000), "{% endif %}".repeat(5000)), "too deep"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".to_owned(), "too deep"),
        ("{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}".to_owned(), "a value that is too large"),
        (
            format!(
                "{{% macro f() %}}{}{{{{ f() }}}}{}{{% endmacro %}}{{{{ f() }}}}",
                "{% if 1 %}".repeat(50),
                "{% endif %}".repeat(50)
            ),
            "too deep",
        ),
        ("{% for a in [1] recursive %}{{ loop([a]) }}{% endfor %}".to_owned(), "too deep"),
        ("{{ 'a' | map(*(['map'] * 2000)) | list }}".to_owned(), "too deep"),
        (format!("{{{{ {}x{} }}}}", "(".repeat(60), format!("{})", "|e".repeat(99)).repeat(60)), "too deep"),
        // Texts.
        ("{{ (['x' * 16000000] * 100000) | join }}".to_owned(), long),
        ("{{ ','.join(['x' * 16000000] * 100000) }}".to_owned(), long),
        ("{{ [1, 2] | join('x' * 16000000) }}".to_owned(), long),
        ("{{ (['x' * 16000000] * 100000) | tojson }}".to_owned(), long),
        ("{{ ['x' * 16000000] * 100000 }}".to_owned(), long),
        ("{{ [[[['x' * 1000] * 1000] * 1000] * 1000] | string | length }}".to_owned(), long),
        ("{{ ('{0:9999}' * 100000).format(1) }}".to_owned(), long),
        ("{{ ('%9999s' * 100000) % (([1] * 100000) | list) }}".to_owned(), "not enough arguments"),
        ("{{ ('%(a)9999s' * 100000) | format(a=1) }}".to_owned(), long),
        ("{{ '%.70000f' % 1.5 }}".to_owned(), "the width of a format is too large"),
        ("{{ '{:.70000f}'.format(1.5) }}".to_owned(), "the width of a format is too large"),
        ("{{ '%*d' % (1000000000000, 1) }}".to_owned(), "the width of a format is too large"),
        ("{{ ('\\t' * 10000000).expandtabs(1000000) }}".to_owned(), steps),
        ("{{ 'a' | indent(1000000000) }}".to_owned(), "more than 1000 characters"),
        ("{{ ('\\n' * 2000) | indent('x' * 10000, first=true, blank=true) }}".to_owned(), long),
        ("{{ ('a' * 16000000) ~ ('a' * 16000000) }}".to_owned(), long),
        ("{{ ('a' * 16000000) | replace('a', 'b' * 1000) }}".to_owned(), long),
        ("{{ 'a'.replace('', 'b' * 16000000) }}".to_owned(), long),
        ("{{ ('&' * 16000000) | escape | length }}".to_owned(), long),
        ("{{ ('/ ' * 8000000) | urlencode }}".to_owned(), long),
        ("{{ {'a': 'x' * 16000000, 'b': 'x' * 16000000} | xmlattr }}".to_owned(), long),
        (often("{{ 'x' * 1000 }}"), long),
        // Items.
        ("{{ [1] | batch(1000000000000, 0) | list }}".to_owned(), steps),
        ("{{ [1] | slice(1000000000000) | list }}".to_owned(), steps),
        ("{{ ('x' * 16000000) | list | length }}".to_owned(), steps),
        ("{{ [1] * 1000000000 }}".to_owned(), "repeats a value too often"),
        (often("{% set ns = range(100000) | list %}"), steps),
        (often("{% set x = dict(range(100000) | batch(2)) %}"), steps),
        // Time.
        (large(&often("{{ big.find('y') }}")), steps),
        (large(&often("{{ big | length }}")), steps),
        (large(&often("{{ big[i] }}")), steps),
        (large(&often("{{ 'y' in big }}")), steps),
        (large(&often("{% if big == big ~ '' %}{% endif %}")), steps),
        (large(&often("{% if list == list %}{% endif %}")), steps),
        (large(&often("{% if 2 in list %}{% endif %}")), steps),
        (large(&often("{{ list.count(2) }}")), steps),
        (large(&often("{% set x = list %}")), steps),
        (large(&often("{% set x = big | upper %}")), steps),
        (large(&often("{% if big is upper %}{% endif %}")), steps),
        ("{{ range(100000) | list | unique | list | length }}".to_owned(), steps),
        (
            "{% if [[[[1] * 1000] * 1000] * 1000] == [[[[1] * 1000] * 1000] * 1000] %}{% endif %}".to_owned(),
            "1,000,000 values",
        ),
        ("{{ messages | map(attribute='a' * 16000000) | list }}".to_owned(), steps),
        // Sources.
        (format!("{{{{ x is {}a }}}}", "a.".repeat(400_000)), "there is no test"),
        ("x".repeat(2 << 20), "more than 1 MiB"),
        ((0..2000).map(|i| format!("{{% block b{i} %}}{{% endblock %}}")).collect(), "more than 1000 blocks"),
    ];
    let mut failed = Vec::new();
    for (source, expected) in cases {
        // One case spends all steps. The others spend a tenth: the time of a step is the same.
        let tenth = expected == steps && !source.contains("range(100000) | list %}");
        let started = std::time::Instant::now();
        let found = if tenth { render_within(500_000, &source) } else { render(&source) };
        let taken = started.elapsed();
        let shown: String = source.chars().take(160).collect();
        match found {
            Ok(text) => failed.push(format!("{shown}: {} bytes", text.len())),
            Err(error) if !error.to_string().contains(expected) => failed.push(format!("{shown}: {error}")),
            Err(_) => {}
        }
        // An unoptimised build is some ten times as slow.
        let patience = if tenth { 6 } else { 60 };
        if taken.as_secs() >= patience {
            failed.push(format!("{shown}: {taken:?}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn values_that_nest_without_end_are_errors() {
    let grows = |body: &str| {
        format!(
            "{{% set box = namespace(v=namespace(a=1)) %}}{{% for i in range(1000) %}}{body}{{% endfor %}}{{{{ box.v }}}}"
        )
    };
    let parameters: String = (1..1000).map(|i| format!(", p{i}=[p{}]", i - 1)).collect();
    for source in [
        grows("{% set box.v = namespace(a=[box.v.a]) %}"),
        grows("{% set box.v = namespace({'a': {'b': box.v.a}}) %}"),
        grows("{% set box.v = namespace(a={'b': box.v.a}.items) %}"),
        grows("{% set box.v = namespace(a={'b': box.v.a}.values()) %}"),
        grows("{% set box.v = cycler((box.v.current, 1)) %}"),
        format!("{{% set box = namespace(v=[1]) %}}{}", "{% set box.v = box.v | list | batch(1) %}".repeat(1000)),
        format!("{{% macro f(p0=[1]{parameters}) %}}{{% endmacro %}}{{{{ f() }}}}"),
        "{% macro f(x, n) %}{% if n %}{{ f([[[[x]]]], n - 1) }}{% endif %}{% endmacro %}{{ f(1, 100) }}".to_owned(),
    ] {
        let error = render(&source).unwrap_err().to_string();
        assert!(error.contains("a value that is too large"), "{source}: {error}");
    }
}

/// A template that needs more stack ends the process.
#[test]
fn the_deepest_nesting_takes_less_than_half_of_the_stack() {
    let f = |body: &str| format!("{{% macro f(x) %}}{body}{{% endmacro %}}{{{{ f(1) }}}}");
    let within = |open: &str, close: &str| f(&format!("{}{{{{ f(x) }}}}{}", open.repeat(20), close.repeat(20)));
    let caller = "{% if 0 %}{{ caller() }}{% endif %}{% call f(x) %}x{% endcall %}";
    for source in [
        f("{{ f(x) }}"),
        within("{% if x %}", "{% endif %}"),
        within("{% set y %}", "{% endset %}"),
        within("{% filter upper %}", "{% endfilter %}"),
        within("{% with y = x %}", "{% endwith %}"),
        within("{% for y in [x] if f %}", "{% endfor %}"),
        f(&format!("{{{{ {}f(x){} }}}}", "[".repeat(40), "]".repeat(40))),
        f(&format!("{{{{ {}f(x){} }}}}", "{1: ".repeat(40), "}".repeat(40))),
        f(&format!("{{{{ {}f(x){} }}}}", "f(".repeat(40), ")".repeat(40))),
        f("{{ x | d | d | d | d | d(f(x)) }}"),
        format!("{{% macro f(x) %}}{caller}{{% endmacro %}}{{% call f(1) %}}x{{% endcall %}}"),
        "{% for a in [1] recursive %}{{ loop([a]) }}{% endfor %}".to_owned(),
        "{% for a in [1] if a recursive %}{% if a %}{{ loop([a]) }}{% endif %}{% endfor %}".to_owned(),
        "{{ 'a' | map(*(['map'] * 2000)) | list }}".to_owned(),
    ] {
        let error = with_stack_of(STACK / 2, || render(&source)).unwrap().unwrap_err().to_string();
        assert!(error.contains("nested too deep"), "{source}: {error}");
    }
}

#[test]
fn large_tools_and_long_conversations_are_rendered() {
    let tool = Value::from_pairs([("name", Value::from("look")), ("description", "x".repeat(1000).into())]);
    let message = |i: usize| Value::from_pairs([("role", "user"), ("content", if i == 0 { "a b\n" } else { "c" })]);
    let variables = || {
        [("tools", Value::from(vec![tool.clone(); 200])), ("messages", (0..10_000).map(message).collect::<Vec<_>>().into())]
    };
    let source = "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{{ tools | tojson }}{% set ns = namespace(last=-1) %}\
        {% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<') %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
        {% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{ '<|' + m.role + '|>\\n' + m.content.strip() }}\
        {% elif '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{% if loop.last or ns.last > loop.index0 %}{{ '</s>' }}{% endif %}{% endfor %}";
    let text = Template::new(source, NOW).unwrap().render(variables()).unwrap().text;
    assert!(text.len() > 500_000, "{}", text.len());
}

/// Writes templates at random by a grammar.
struct Writer {
    random: Generator,
}

impl Writer {
    fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.random.below(choices.len())]
    }

    fn expression(&mut self, depth: u32) -> String {
        if depth == 0 {
            return self.of(ATOMS).to_owned();
        }
        let (a, b, c) = (self.expression(depth - 1), self.expression(depth / 2), self.expression(0));
        let form = self.of(&[
            "(A O B)",
            "(A O B)",
            "[A, B]",
            "[A] * C",
            "A[C]",
            "A[C:B]",
            "{'k': A, C: B}",
            "(A if B else C)",
            "(A | F)",
            "(A | F)",
            "(A | F(B))",
            "(A | F(C, B))",
            "(A is T)",
            "A.M()",
            "A.M(C)",
            "A.M(C, B)",
            "not A",
            "-A",
            "range(C) | map('F') | list",
            "dict(a=A).a",
            "f(A)",
            "(A | tojson(indent=C))",
            "('%5s%s' % (A, C))",
            "'{}{:>9}'.format(A, C)",
            "A ~ B",
        ]);
        let form = form.replace("M(", &format!("{}(", self.of(METHODS)));
        let form = form.replace('F', self.of(&super::filters::FILTERS)).replace('T', self.of(&super::select::TESTS));
        let form = form.replace('O', self.of(OPERATORS));
        form.replace('A', &a).replace('B', &b).replace('C', &c)
    }

    fn statements(&mut self, depth: u32) -> String {
        let count = 1 + self.random.below(3);
        (0..count).map(|_| self.statement(depth)).collect()
    }

    fn statement(&mut self, depth: u32) -> String {
        let expression = self.expression(3);
        if depth == 0 {
            return format!("{{{{ {expression} }}}}");
        }
        let body = self.statements(depth - 1);
        let form = self.of(&[
            "{{ E }}",
            "{% for x in E %}B{% endfor %}",
            "{% for i in range(9) %}B{% endfor %}",
            "{% if E %}B{% else %}B{% endif %}",
            "{% set x = E %}B",
            "{% set ns.v = E %}{{ ns.v }}",
            "{% macro f(x) %}B{% endmacro %}B",
            "{% set x %}B{% endset %}",
            "{% filter upper %}B{% endfilter %}",
            "{% with x = E %}B{% endwith %}",
            "{% set ns.v = [ns.v, ns.v] %}B",
        ]);
        form.replace('E', &expression).replace('B', &body)
    }
}

const ATOMS: &[&str] = &[
    "0",
    "1",
    "-7",
    "1.5",
    "''",
    "'é<x>'",
    "'a,b c\\n'",
    "none",
    "true",
    "x",
    "ns",
    "ns.v",
    "messages",
    "messages[0]",
    "unknown",
    "range(5)",
    "[]",
    "{}",
    "()",
    "10 ** 30",
    "'x' * 5000",
    "9999999999",
    "[[1, 2], [3]]",
    "namespace(a=1)",
    "loop",
    "'{0!r:>9}%s'",
];
const OPERATORS: &[&str] =
    &["+", "-", "*", "/", "//", "%", "**", "==", "!=", "<", ">=", "in", "not in", "and", "or", "~", "is sameas"];
const METHODS: &[&str] = &[
    "strip",
    "split",
    "splitlines",
    "replace",
    "join",
    "format",
    "items",
    "keys",
    "values",
    "get",
    "count",
    "index",
    "upper",
    "title",
    "center",
    "zfill",
    "expandtabs",
    "startswith",
    "find",
    "rsplit",
    "partition",
    "isdigit",
    "casefold",
    "copy",
    "rjust",
];

#[test]
fn random_templates_end_without_a_panic() {
    let mut rendered = [0_u32; 2];
    for seed in 0..200 {
        let mut writer = Writer { random: Generator::new(seed, Stream::Split) };
        let source = format!(
            "{{% macro f(x) %}}{{{{ x }}}}{{% endmacro %}}{{% set ns = namespace(v=1) %}}{}",
            writer.statements((seed % 4) as u32)
        );
        let outcome = std::panic::catch_unwind(|| render(&source).is_ok());
        rendered[usize::from(outcome.unwrap_or_else(|_| panic!("seed {seed}: {source}")))] += 1;
    }
    assert!(rendered[1] > 0, "{rendered:?} of errors and texts");
}
