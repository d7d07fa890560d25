//! The WGSL of kernels on matrix units, from templates: matrices live in registers, so each has a
//! variable of its own, and loops over matrices are written out.
//!
//! Directives are comments on lines of their own:
//!
//! - `//: for i in COUNT`: the lines up to its `//: end`, COUNT times, with `$i` as 0, 1, ..
//! - `//: if COUNT`: the lines up to its `//: end`, if COUNT is not 0
//!
//! Each count is also a WGSL constant.

use std::fmt::Write as _;

/// Names and values of the constants of a template.
pub(super) type Counts = [(&'static str, u32)];

const DIRECTIVE: &str = "//: ";

/// The WGSL of a template: its constants, and its lines with the directives carried out.
pub(super) fn expand(template: &str, counts: &Counts) -> String {
    let mut source = String::new();
    for (name, count) in counts {
        let _ = writeln!(source, "const {name} = {count}u;");
    }
    source.push_str(&expand_lines(template, counts));
    source
}

fn expand_lines(text: &str, counts: &Counts) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((line, after)) = next_line(rest) {
        rest = after;
        let Some(directive) = line.trim_start().strip_prefix(DIRECTIVE) else {
            expanded.push_str(line);
            continue;
        };
        let (body, after) = split_at_end(after);
        rest = after;
        let count = |name: &str| counts.iter().find(|(known, _)| *known == name).map_or(0, |&(_, count)| count);
        match directive.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["for", variable, "in", name] => (0..count(name)).for_each(|value| {
                let body = body.replace(&format!("${variable}"), &value.to_string());
                expanded.push_str(&expand_lines(&body, counts));
            }),
            ["if", name] if count(name) > 0 => expanded.push_str(&expand_lines(body, counts)),
            _ => {}
        }
    }
    expanded
}

/// The first line, with its end, and the text after it.
fn next_line(text: &str) -> Option<(&str, &str)> {
    let end = text.find('\n').map_or(text.len(), |end| end + 1);
    (end > 0).then(|| text.split_at(end))
}

/// The lines up to the `end` of an open directive, and the text after that line.
fn split_at_end(text: &str) -> (&str, &str) {
    let (mut depth, mut rest) = (1, text);
    while let Some((line, after)) = next_line(rest) {
        if let Some(directive) = line.trim_start().strip_prefix(DIRECTIVE) {
            depth = if directive.trim_end() == "end" { depth - 1 } else { depth + 1 };
        }
        if depth == 0 {
            return (&text[..text.len() - rest.len()], after);
        }
        rest = after;
    }
    (text, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_are_written_out() {
        let template = "\
start
//: for i in ROWS
  //: for j in COLUMNS
  let x$i_$j = $i * COLUMNS;
  //: end
//: end
//: if NONE
left out
//: for i in ROWS
left out
//: end
//: end
//: if ROWS
kept
//: end
last";
        let expanded = expand(template, &[("ROWS", 2), ("COLUMNS", 1), ("NONE", 0)]);
        let expected = "\
const ROWS = 2u;
const COLUMNS = 1u;
const NONE = 0u;
start
  let x0_0 = 0 * COLUMNS;
  let x1_0 = 1 * COLUMNS;
kept
last";
        assert_eq!(expanded, expected);
    }
}
