//! Any chat template: text is the template itself; from other bytes one is built of the statements,
//! expressions, filters and methods that templates have, with numbers that ask for too much. It is
//! refused with a reason, or writes a text: without a panic, in bounded time and memory.

use std::fmt::Write as _;

use arbitrary::{Result, Unstructured};
use nf4pack::fuzzing::render;

use super::json;

const MESSAGES: &str = r#"[{"role": "system", "content": "Be kind.", "n": 3, "f": 0.5, "list": [1, "a", null, {"k": [2]}]},
    {"role": "user", "content": " Hi <b> 'you' \u00e9\ud83e\udd80\n", "none": null, "map": {"a": 1, "b": "x"}},
    {"role": "assistant", "content": "Hm.", "tool_calls": [{"function": {"name": "look", "arguments": {"q": 1.0}}}]}]"#;

/// Nesting of what is built from bytes; longer chains come from [`long`].
const MAX_DEPTH: u32 = 5;

const NAMES: [&str; 12] = [
    "messages",
    "message",
    "m",
    "x",
    "ns",
    "loop",
    "bos_token",
    "tools",
    "add_generation_prompt",
    "caller",
    "varargs",
    "nope",
];
const ATTRIBUTES: [&str; 14] = [
    "content",
    "role",
    "n",
    "f",
    "list",
    "map",
    "index",
    "last",
    "length",
    "items",
    "nextitem",
    "previtem",
    "name",
    "__class__",
];
const FILTERS: [&str; 46] = [
    "upper",
    "trim",
    "length",
    "tojson",
    "list",
    "items",
    "first",
    "last",
    "reverse",
    "join",
    "pprint",
    "batch(2)",
    "slice(3)",
    "sum",
    "sort",
    "unique",
    "min",
    "max",
    "dictsort",
    "map('upper')",
    "map(attribute='role')",
    "select('string')",
    "rejectattr('role', 'eq', 'user')",
    "filesizeformat",
    "xmlattr",
    "groupby('role')",
    "int",
    "float",
    "round(2)",
    "abs",
    "default('d', true)",
    "string",
    "safe",
    "escape",
    "title",
    "capitalize",
    "center(20)",
    "replace('a', 'aaaa')",
    "indent(3, true)",
    "truncate(5)",
    "wordcount",
    "urlencode",
    "format(1, 'b')",
    "batch(999999999, 0)",
    "center(99999999)",
    "indent(999999999)",
];
const METHODS: [&str; 34] = [
    "upper()",
    "strip()",
    "split()",
    "split('a', 1)",
    "rsplit('i')",
    "splitlines()",
    "partition(' ')",
    "replace('', 'xxxxxxxx')",
    "find('i')",
    "count('')",
    "startswith('H')",
    "endswith(('a', 'n'))",
    "join(messages)",
    "ljust(9)",
    "zfill(99999999)",
    "center(99999999, '*')",
    "expandtabs(9999999)",
    "format(1, x=2)",
    "isdigit()",
    "istitle()",
    "keys()",
    "values()",
    "items()",
    "get('role', 1)",
    "index(1)",
    "append(x)",
    "pop()",
    "title()",
    "removeprefix('H')",
    "copy()",
    "update(a=1)",
    "encode()",
    "casefold()",
    "strip('aH')",
];
const TESTS: [&str; 14] = [
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "odd",
    "divisibleby(3)",
    "in(messages)",
    "sameas(none)",
    "callable",
    "eq(1)",
];
const OPERATORS: [&str; 20] =
    ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "and", "or", "in", "not in", "is", "|", ".", "if"];
const LITERALS: [&str; 26] = [
    "0",
    "1",
    "-1",
    "3",
    "99999999",
    "9223372036854775808",
    "170141183460469231731687303715884105727",
    "1e308",
    "0.1",
    "''",
    "'a'",
    "'%s %d %5.2f'",
    "'%99999999d'",
    "'{} {x:>9}'",
    "'{:>99999999}'",
    "'a\\nb'",
    "[]",
    "{}",
    "()",
    "none",
    "true",
    "[1, 2, 'a']",
    "{'a': 1, 'b': [x]}",
    "range(3)",
    "range(99999999)",
    "namespace(x=1, y=[])",
];

/// Runs the check.
pub fn run(bytes: &[u8]) {
    if bytes.first().is_none_or(u8::is_ascii) {
        // Templates that are no UTF-8 are read like this, too.
        check(&String::from_utf8_lossy(bytes));
    } else {
        let _ = built(&mut Unstructured::new(&bytes[1..])).map(|source| check(&source));
    }
}

fn check(source: &str) {
    match render(source, MESSAGES) {
        Ok(text) => drop(std::hint::black_box(text)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn built(u: &mut Unstructured<'_>) -> Result<String> {
    let mut out = String::new();
    for _ in 0..u.int_in_range(1..=5)? {
        statement(u, &mut out, 0)?;
    }
    Ok(out)
}

/// Any number of statements of one kind inside each other, or behind one another.
fn long(u: &mut Unstructured<'_>, out: &mut String) -> Result<()> {
    let count = u.int_in_range(1..=3000)?;
    let (open, middle, close) = *u.choose(&[
        ("(", "1", ")"),
        ("[", "", "]"),
        ("{'a': ", "1", "}"),
        ("-", "1", ""),
        ("not ", "x", ""),
        ("1 ~ ", "1", ""),
        ("1 if x else ", "1", ""),
        ("x[", "0", "]"),
        ("", "x", ".a"),
        ("", "x", "|upper"),
        ("", "1", " ** 2"),
        ("range(", "1", ")"),
    ])?;
    let _ = write!(out, "{{{{ {}{middle}{} }}}}", open.repeat(count), close.repeat(count));
    Ok(())
}

fn statement(u: &mut Unstructured<'_>, out: &mut String, depth: u32) -> Result<()> {
    let leaf = depth >= MAX_DEPTH;
    match u.int_in_range(0..=if leaf { 4 } else { 13 })? {
        0 => out.push_str(&json::string(u)?),
        1 | 2 => {
            let value = expression(u, depth)?;
            let _ = write!(out, "{{{{{} {value} }}}}", if u.arbitrary()? { "-" } else { "" });
        }
        3 => {
            let (name, value) = (target(u)?, expression(u, depth)?);
            let _ = write!(out, "{{% set {name} = {value} %}}");
        }
        4 => long(u, out)?,
        5..=7 => {
            let (name, value) = (*u.choose(&["m", "message", "x", "m, x", "_"])?, expression(u, depth)?);
            let condition = if u.ratio(1, 4)? { format!(" if {}", expression(u, depth)?) } else { String::new() };
            let recursive = if u.ratio(1, 8)? { " recursive" } else { "" };
            let _ = write!(out, "{{% for {name} in {value}{condition}{recursive} %}}");
            block(u, out, depth, "else", "endfor")?;
        }
        8 | 9 => {
            let _ = write!(out, "{{% if {} %}}", expression(u, depth)?);
            block(u, out, depth, "else", "endif")?;
        }
        10 => {
            let _ = write!(out, "{{% macro {}(a, b={}) %}}", u.choose(&["m", "x"])?, expression(u, depth)?);
            block(u, out, depth, "", "endmacro")?;
        }
        11 => {
            let _ = write!(out, "{{% call {}({}) %}}", u.choose(&["m", "x"])?, expression(u, depth)?);
            block(u, out, depth, "", "endcall")?;
        }
        12 => {
            let _ = write!(out, "{{% filter {} %}}", u.choose(&FILTERS)?);
            block(u, out, depth, "", "endfilter")?;
        }
        _ => {
            let _ = write!(
                out,
                "{{% {} %}}",
                u.choose(&["generation", "set x", "break", "continue", "raw", "do x.append(x)", "nope"])?
            );
            let end = *u.choose(&["endgeneration", "endset", "endraw"])?;
            block(u, out, depth, "", end)?;
        }
    }
    Ok(())
}

fn block(u: &mut Unstructured<'_>, out: &mut String, depth: u32, middle: &str, end: &str) -> Result<()> {
    for _ in 0..u.int_in_range(0..=3)? {
        statement(u, out, depth + 1)?;
    }
    if !middle.is_empty() && u.ratio(1, 4)? {
        let _ = write!(out, "{{% {middle} %}}");
        statement(u, out, depth + 1)?;
    }
    // At times the end is missing.
    if u.ratio(63, 64)? {
        let _ = write!(out, "{{% {end} %}}");
    }
    Ok(())
}

/// What can be assigned to.
fn target(u: &mut Unstructured<'_>) -> Result<&'static str> {
    Ok(*u.choose(&["x", "m", "ns", "ns.x", "ns.y", "x, m", "messages"])?)
}

fn expression(u: &mut Unstructured<'_>, depth: u32) -> Result<String> {
    if depth >= MAX_DEPTH {
        return Ok((*u.choose(&NAMES)?).to_owned());
    }
    let next = depth + 1;
    Ok(match u.int_in_range(0..=11)? {
        0 | 1 => (*u.choose(&NAMES)?).to_owned(),
        2 => (*u.choose(&LITERALS)?).to_owned(),
        3 => format!("{}.{}", expression(u, next)?, u.choose(&ATTRIBUTES)?),
        4 => format!("{}[{}]", expression(u, next)?, expression(u, next)?),
        5 => format!(
            "{}[{}:{}]",
            expression(u, next)?,
            u.choose(&["", "1", "-1", "99999999"])?,
            u.choose(&["", "2", "::-1", ":0"])?
        ),
        6 | 7 => format!("({})|{}", expression(u, next)?, u.choose(&FILTERS)?),
        8 => format!("({}).{}", expression(u, next)?, u.choose(&METHODS)?),
        9 => format!("({} is {})", expression(u, next)?, u.choose(&TESTS)?),
        10 => format!("({} {} {})", expression(u, next)?, u.choose(&OPERATORS)?, expression(u, next)?),
        _ => {
            let function =
                u.choose(&["range", "namespace", "dict", "x", "m", "strftime_now", "raise_exception", "joiner", "cycler"])?;
            format!("{function}({}{})", u.choose(&["", "1, ", "*", "**", "x="])?, expression(u, next)?)
        }
    })
}
